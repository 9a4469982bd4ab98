//! Retention on a node: when a run is due, and running it.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::warn;

use super::others;
use crate::api::conditions::whole_seconds;
use crate::api::{PolicyRules, ProjectedPolicy, RetentionState, RunSummary, Schedule, human_size, int64, truncate};
use crate::policy::{disk_size, limits, limits_of};
use crate::store::{Collecting, Holders, Removals, Report, RunId, Store, Unfinished, Usage, retention};

/// Longest text about a node's retention in its status, in bytes.
const MAX_TEXT: usize = 512;

/// What the agent keeps of retention across its restarts, in `runs/state.json`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// What the status says.
    pub state: RetentionState,
    /// When the node first saw the policy in force.
    pub since: Option<Timestamp>,
    /// When a run was last tried.
    pub tried: Option<Timestamp>,
    /// The policy was edited since the last run.
    pub edited: bool,
    /// Something unreadable kept the last run from deleting: what is said of it, whatever else is wrong.
    pub blocked: Option<String>,
    /// When to make up for a run that failed, if its next time does not come first.
    pub retry: Option<Timestamp>,
    /// Requests that were answered, by the UIDs of their policies, the latest last. A node may come back under a
    /// policy: what was asked for by then has been done.
    pub answered: Vec<(String, String)>,
}

/// How many policies' requests are remembered.
const MAX_ANSWERED: usize = 16;

/// Least time between a run and one that is made because there is too little room: what could go has gone, and what
/// changed since can wait so long.
const PRESSURE_PAUSE: jiff::SignedDuration = jiff::SignedDuration::from_mins(10);

/// The same after a run that left it so because all that is left is needed or fresh.
const OVER_LIMIT_PAUSE: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);

/// A clock that is set back by at most so much has only been corrected.
const CLOCK_STEP: jiff::SignedDuration = jiff::SignedDuration::from_mins(5);

/// A run that failed is tried again so much later.
const RETRY_PAUSE: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);

/// Why a run is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Trigger {
    Schedule,
    /// The annotation `larder.dev/requestedAt`.
    Request,
    /// The last run failed, or was cut off or kept from deleting by what is no more.
    Retry,
    /// The store is over `maxSize`, or the disk under `minFree`.
    Pressure,
}

/// When the next run is.
#[derive(Debug, Clone, PartialEq)]
pub enum Due {
    Now(Trigger),
    At(Timestamp),
    Never,
}

/// Takes a policy up: what is remembered of another one is dropped, what the status says about this one is brought up
/// to date.
pub fn adopt(memory: &mut Memory, policy: Option<&ProjectedPolicy>, node: &str, now: Timestamp) {
    let uid = policy.map(|policy| policy.uid.clone());
    if memory.since.is_none() || memory.state.policy_uid != uid {
        let answered = std::mem::take(&mut memory.answered);
        let request = answered.iter().find(|(policy, _)| Some(policy) == uid.as_ref());
        *memory = Memory {
            state: RetentionState {
                requested_at: request.map(|(_, request)| request.clone()),
                policy_uid: uid,
                ..Default::default()
            },
            since: Some(now),
            answered,
            ..Default::default()
        };
    }
    // The clock was ahead, and was set right: without this nothing would be due until that time comes again. But one
    // that is set back by a little must not make a run due twice.
    for time in [&mut memory.since, &mut memory.tried].into_iter().flatten() {
        if after(now, CLOCK_STEP).is_some_and(|latest| *time > latest) {
            *time = now;
        }
    }
    memory.retry = memory.retry.min(after(now, RETRY_PAUSE));
    let state = &mut memory.state;
    let generation = policy.map_or(0, |policy| policy.generation);
    if state.observed_generation != generation {
        // What made the last run fail may be mended by the new spec; but not what cannot be read.
        (state.observed_generation, state.problem) = (generation, memory.blocked.clone());
        memory.edited = true;
    }
    if let Some(Err(invalid)) = policy.map(|policy| policy.rules.check()) {
        state.problem = Some(truncate(&invalid.to_string(), MAX_TEXT));
    }
    memory.state.next_run = match due(memory, policy, node, now) {
        Due::At(time) => Some(Time(whole_seconds(time))),
        Due::Now(_) | Due::Never => None,
    };
}

/// When the next run is due. What was asked for is answered, and recorded, as that, also if room is wanted as well.
pub fn next(memory: &Memory, policy: Option<&ProjectedPolicy>, room: Option<Room>, node: &str, now: Timestamp) -> Due {
    match due(memory, policy, node, now) {
        Due::Now(trigger) => Due::Now(trigger),
        _ if is_pressed(memory, policy, room, now) => Due::Now(Trigger::Pressure),
        later => later,
    }
}

/// When the next run is due that is not made for want of room: a new request is due at once, a missed run is made up once,
/// and so is one that failed.
fn due(memory: &Memory, policy: Option<&ProjectedPolicy>, node: &str, now: Timestamp) -> Due {
    let from = memory.tried.max(memory.since).unwrap_or(now);
    let scheduled = |schedule: &Schedule, jitter: Duration| {
        let next = schedule.next_after(from);
        let next = next.map(|next| (next.checked_add(jitter).unwrap_or(next), Trigger::Schedule));
        let retry = memory.retry.map(|retry| (retry, Trigger::Retry));
        match next.into_iter().chain(retry).min_by_key(|(time, _)| *time) {
            None => Due::Never,
            Some((time, trigger)) if time <= now => Due::Now(trigger),
            Some((time, _)) => Due::At(time),
        }
    };
    let Some(policy) = policy else {
        return built_in_schedule().map_or(Due::Never, |schedule| {
            scheduled(&schedule, jitter(node, "", Duration::from_secs(3600)))
        });
    };
    let (Ok(schedule), Ok(longest)) = (policy.rules.check(), policy.rules.jitter()) else {
        return Due::Never;
    };
    if policy.rules.suspend {
        return Due::Never;
    }
    if policy.requested_at.is_some() && policy.requested_at != memory.state.requested_at {
        return Due::Now(Trigger::Request);
    }
    scheduled(&schedule, jitter(node, &policy.uid, longest))
}

/// Whether a policy wants a run because of the room that there is, whatever its schedule.
fn is_pressed(memory: &Memory, policy: Option<&ProjectedPolicy>, room: Option<Room>, now: Timestamp) -> bool {
    let (Some(policy), Some(room)) = (policy, room) else {
        return false;
    };
    let pause = match memory.state.over_limit {
        Some(_) if !memory.edited => OVER_LIMIT_PAUSE,
        _ => PRESSURE_PAUSE,
    };
    // The clock may have been set back since.
    let recently = memory
        .tried
        .is_some_and(|tried| now.duration_since(tried).abs() < pause);
    if recently || policy.rules.suspend || policy.rules.dry_run || policy.rules.check().is_err() {
        return false;
    }
    is_over(&policy.rules, Some(room)).unwrap_or_default()
}

/// Whether the limits of a policy are broken; `None` if that is not known.
fn is_over(rules: &PolicyRules, room: Option<Room>) -> Option<bool> {
    if !asks_for_room(rules) {
        return Some(false);
    }
    let room = room?;
    let limits = limits_of(rules, room.total).ok()?;
    Some(limits.broken_by(room.size, room.free).is_some())
}

/// Whether a policy has limits that room is looked at for.
pub fn asks_for_room(rules: &PolicyRules) -> bool {
    rules.max_size.is_some() || rules.min_free.is_some()
}

/// Forgets that the node was over its limits when it is no more, whoever made the room or moved the limits. `room` was
/// looked at after the last run.
pub fn ease(memory: &mut Memory, policy: Option<&ProjectedPolicy>, room: Option<Room>) {
    if policy.is_none_or(|policy| is_over(&policy.rules, room) == Some(false)) {
        memory.state.over_limit = None;
    }
}

/// The room that the store takes and has, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Objects, manifests and images together.
    pub size: u64,
    /// Free on the file system.
    pub free: u64,
    /// The file system's size.
    pub total: u64,
}

impl Room {
    /// Blocks.
    pub fn of(store: &Store) -> Option<Room> {
        let Usage {
            blob_bytes,
            manifest_bytes,
            image_bytes,
            free,
            ..
        } = store.usage().ok()?;
        Some(Room {
            size: blob_bytes.saturating_add(manifest_bytes).saturating_add(image_bytes),
            free,
            total: disk_size(store).ok()?,
        })
    }
}

fn built_in_schedule() -> Option<Schedule> {
    Schedule::parse("@daily", None).ok()
}

/// A delay below `longest`, the same at each run of a policy on a node, so that `nextRun` can be told beforehand.
fn jitter(node: &str, policy: &str, longest: Duration) -> Duration {
    use sha2::Digest;
    let hash = sha2::Sha256::digest(format!("{node}\0{policy}"));
    let share = u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]);
    Duration::from_secs((longest.as_secs_f64() * f64::from(share) / f64::from(u32::MAX)) as u64)
}

/// How a run is made.
pub struct How {
    pub policy: Option<ProjectedPolicy>,
    pub trigger: Trigger,
    /// Most files removed in a second.
    pub rate: Option<NonZeroU64>,
    pub cancel: Arc<AtomicBool>,
}

/// Runs retention now, and keeps the record of the run. Blocks.
///
/// # Errors
/// What kept the run from being made, for the status.
pub fn run(store: &Store, holders: &dyn Holders, how: &How) -> Result<(Report, Option<RunId>), String> {
    let (policy, dry_run) = match &how.policy {
        None => (retention::Policy::built_in(), false),
        Some(policy) => {
            let limits = limits(&policy.rules, store).map_err(|error| error.to_string())?;
            (limits, policy.rules.dry_run)
        }
    };
    let collecting = Collecting {
        dry_run,
        now: SystemTime::now(),
        rate: how.rate,
        cancel: &how.cancel,
    };
    let (report, removals): (Report, Removals) = match store.collect_with(&policy, holders, &collecting) {
        Ok(collected) => collected,
        // It is in the report, too.
        Err(Unfinished { done: Some(done), .. }) => *done,
        Err(unfinished) => return Err(unfinished.to_string()),
    };
    if matches!(how.trigger, Trigger::Pressure | Trigger::Retry) && removals.is_empty() {
        // There may be one each ten minutes, and what other runs did is worth more.
        return Ok((report, None));
    }
    let about = json!({"trigger": how.trigger, "policy": how.policy});
    let recorded = store
        .record_run(&report, &removals, &about)
        .inspect_err(|error| warn!(%error, "the run is not recorded"));
    Ok((report, recorded.ok()))
}

/// Notes what a run did, or why it could not be made.
pub fn note(memory: &mut Memory, mut request: Option<String>, result: Result<&Report, &str>, now: Timestamp) {
    memory.tried = Some(now);
    memory.edited = false;
    let has_failed = result.map_or(true, |report| report.failed.is_some());
    let blocked = result.ok().and_then(blocked);
    let was_cut_off = !has_failed && blocked.is_none() && result.is_ok_and(|report| !report.complete);
    memory.retry = match (has_failed, was_cut_off) {
        (true, _) => after(now, RETRY_PAUSE),
        // By another policy, or another form of it, which is to have its run.
        (false, true) => Some(now),
        // What cannot be read is waited for, as nothing goes before it is mended.
        (false, false) => None,
    };
    memory.blocked = blocked;
    let state = &mut memory.state;
    if was_cut_off {
        request = state.requested_at.clone();
    } else if let (Some(policy), Some(request)) = (&state.policy_uid, &request) {
        memory.answered.retain(|(known, _)| known != policy);
        memory.answered.push((policy.clone(), request.clone()));
        let excess = memory.answered.len().saturating_sub(MAX_ANSWERED);
        memory.answered.drain(..excess);
    }
    state.requested_at = request;
    match result {
        Ok(report) => {
            state.last_run = Some(RunSummary {
                time: Time(whole_seconds(now)),
                scanned_blobs: int64(report.scanned_blobs),
                deleted_blobs: int64(report.deleted_blobs),
                freed_bytes: int64(report.freed_bytes),
                freed: RunSummary::freed_text(report.freed_bytes, report.dry_run),
                dropped_revisions: int64(report.dropped_history.len() as u64),
                dry_run: report.dry_run,
            });
            // One that ended before its plan knows nothing of it.
            if report.complete && report.blocked.is_empty() {
                let over = report.over_limit.as_ref();
                let after = if report.dry_run { "after what would go, " } else { "" };
                state.over_limit = over.map(|over| truncate(&format!("{after}{}", over_limit(over)), MAX_TEXT));
            }
            let failed = report.failed.as_ref().map(|failed| {
                let text = format!("it ended early, what it had deleted stays deleted: {failed}");
                truncate(&text, MAX_TEXT)
            });
            state.problem = failed.or_else(|| memory.blocked.clone());
        }
        Err(problem) => state.problem = Some(truncate(problem, MAX_TEXT)),
    }
}

/// What kept a run from deleting, if anything did.
fn blocked(report: &Report) -> Option<String> {
    let problem = report.blocked.first()?;
    let more = if report.decisions.is_empty() { "" } else { " more" };
    let said = format!(
        "nothing{more} was deleted, because {} cannot be read: {}{}",
        problem.path,
        problem.message,
        others(report.blocked.len() - 1)
    );
    Some(truncate(&said, MAX_TEXT))
}

/// Notes that what kept the last run from deleting is mended: it is made up for.
pub fn unblock(memory: &mut Memory, now: Timestamp) {
    (memory.blocked, memory.state.problem) = (None, None);
    memory.retry = Some(now);
}

fn after(time: Timestamp, pause: jiff::SignedDuration) -> Option<Timestamp> {
    time.checked_add(pause).ok()
}

/// Whether a run that was begun under one policy must not go on under another, or under another form of it. When the next
/// one is to be is nothing to it.
pub fn is_outdated(begun: Option<&ProjectedPolicy>, now: Option<&ProjectedPolicy>) -> bool {
    let rules = |policy: &ProjectedPolicy| {
        let rules = PolicyRules {
            schedule: String::new(),
            time_zone: None,
            jitter: None,
            ..policy.rules.clone()
        };
        (policy.uid.clone(), rules)
    };
    begun.map(rules) != now.map(rules)
}

/// What a run did, in a sentence.
pub fn summary(report: &Report, trigger: Trigger, record: Option<&RunId>) -> String {
    let trigger = match trigger {
        Trigger::Schedule => "as scheduled",
        Trigger::Request => "as requested",
        Trigger::Retry => "to make up for the run before",
        Trigger::Pressure => "for want of room",
    };
    let end = if report.complete { "" } else { "; it ended early" };
    let verb = if report.dry_run { "would delete" } else { "deleted" };
    let more = record
        .map(|id| format!("; `larder store runs {id}` says what and why"))
        .unwrap_or_default();
    let counted = |count: u64, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    format!(
        "{trigger}: {verb} {} and {} of history, {} in all{end}{more}",
        counted(report.deleted_blobs, "content"),
        counted(report.dropped_history.len() as u64, "revision"),
        human_size(report.freed_bytes)
    )
}

/// Bytes per cause, the largest first.
fn over_limit(over: &retention::OverLimit) -> String {
    let causes = over.largest_first().into_iter();
    let causes: Vec<String> = causes
        .map(|(cause, bytes)| format!("{cause} {}", human_size(bytes)))
        .collect();
    let limit = match (over.max_size, over.min_free) {
        (Some(max), _) if over.size > max => format!("{} of at most {}", human_size(over.size), human_size(max)),
        (_, Some(min)) => format!("{} free of at least {}", human_size(over.free), human_size(min)),
        _ => human_size(over.size),
    };
    let holders = over.largest.iter().filter(|holder| holder.exclusive > 0);
    let holders: Vec<String> = holders
        .map(|holder| {
            let by = holder.needed_by.first().map_or("-", String::as_str);
            format!("{by} {}", human_size(holder.exclusive))
        })
        .collect();
    let holders = match holders.is_empty() {
        true => String::new(),
        false => format!("; most is held by {}", holders.join(", ")),
    };
    format!("{limit}: {}{holders}", causes.join(", "))
}

#[cfg(test)]
mod tests;
