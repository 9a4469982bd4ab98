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
    /// When a run was last tried; one that failed waits for its next time like one that worked.
    pub tried: Option<Timestamp>,
    /// The policy was edited since the last run.
    pub edited: bool,
    /// The problem that the status names is that something unreadable kept the last run from deleting.
    pub blocked: bool,
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

/// Why a run is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Trigger {
    Schedule,
    /// The annotation `larder.dev/requestedAt`.
    Request,
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
    // The clock was ahead, and was set right: without this nothing would be due until that time comes again.
    for time in [&mut memory.since, &mut memory.tried].into_iter().flatten() {
        *time = (*time).min(now);
    }
    let state = &mut memory.state;
    let generation = policy.map_or(0, |policy| policy.generation);
    if state.observed_generation != generation {
        // What kept the last run from working may be mended by the new spec.
        (state.observed_generation, state.problem) = (generation, None);
        memory.blocked = false;
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

/// When the next run is due: a new request is due at once, a missed run is made up once.
pub fn due(memory: &Memory, policy: Option<&ProjectedPolicy>, node: &str, now: Timestamp) -> Due {
    let from = memory.tried.max(memory.since).unwrap_or(now);
    let scheduled = |schedule: &Schedule, jitter: Duration| {
        let Some(next) = schedule.next_after(from) else {
            return Due::Never;
        };
        let time = next.checked_add(jitter).unwrap_or(next);
        if time <= now {
            Due::Now(Trigger::Schedule)
        } else {
            Due::At(time)
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
pub fn is_pressed(memory: &Memory, policy: Option<&ProjectedPolicy>, room: Option<Room>, now: Timestamp) -> bool {
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
    if rules.max_size.is_none() && rules.min_free.is_none() {
        return Some(false);
    }
    let room = room?;
    let limits = limits_of(rules, room.total).ok()?;
    let is_larger = limits.max_size.is_some_and(|most| room.size > most);
    Some(is_larger || limits.min_free.is_some_and(|least| room.free < least))
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
    if how.trigger == Trigger::Pressure && removals.is_empty() {
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
pub fn note(memory: &mut Memory, request: Option<String>, result: Result<&Report, &str>, now: Timestamp) {
    memory.tried = Some(now);
    memory.edited = false;
    memory.blocked = result.is_ok_and(|report| !report.blocked.is_empty());
    let state = &mut memory.state;
    if let (Some(policy), Some(request)) = (&state.policy_uid, &request) {
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
                state.over_limit = over.map(|over| truncate(&over_limit(over), MAX_TEXT));
            }
            let failed = report.failed.as_ref().map(|failed| {
                let text = format!("it ended early, what it had deleted stays deleted: {failed}");
                truncate(&text, MAX_TEXT)
            });
            let blocked = report.blocked.first().map(|problem| {
                let said = format!(
                    "nothing was deleted, because {} cannot be read: {}{}",
                    problem.path,
                    problem.message,
                    others(report.blocked.len() - 1)
                );
                truncate(&said, MAX_TEXT)
            });
            state.problem = failed.or(blocked);
        }
        Err(problem) => state.problem = Some(truncate(problem, MAX_TEXT)),
    }
}

/// What a run did, in a sentence.
pub fn summary(report: &Report, trigger: Trigger, record: Option<&RunId>) -> String {
    let trigger = match trigger {
        Trigger::Schedule => "as scheduled",
        Trigger::Request => "as requested",
        Trigger::Pressure => "for want of room",
    };
    let verb = if report.dry_run { "would delete" } else { "deleted" };
    let more = record
        .map(|id| format!("; `larder store runs {id}` says what and why"))
        .unwrap_or_default();
    let counted = |count: u64, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    format!(
        "{trigger}: {verb} {} and {} of history, {} in all{more}",
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
mod tests {
    use super::*;
    use serde_json::json;

    fn policy(rules: serde_json::Value) -> ProjectedPolicy {
        serde_json::from_value(json!({"name": "p", "uid": "u", "generation": 1, "rules": rules})).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn report(complete: bool) -> Report {
        let at = "2026-01-01T12:00:00Z";
        serde_json::from_value(json!({
            "dryRun": false, "complete": complete, "started": at, "finished": at, "scannedBlobs": 0, "deletedBlobs": 0,
            "freedBytes": 0, "droppedHistory": [], "decisions": [], "overLimit": null, "blocked": [], "missingBlobs": 0,
        }))
        .unwrap()
    }

    fn ran(memory: &mut Memory, time: &str) {
        (memory.tried, memory.edited) = (Some(at(time)), false);
    }

    #[test]
    fn a_schedule_runs_from_when_the_policy_was_first_seen_and_a_missed_run_is_made_up_once() {
        let policy = policy(json!({"schedule": "0 3 * * *"}));
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&policy), "n", at("2026-01-01T12:00:00Z"));
        assert_eq!(memory.state.next_run, Some(Time(at("2026-01-02T03:00:00Z"))));
        assert_eq!(
            due(&memory, Some(&policy), "n", at("2026-01-01T12:00:01Z")),
            Due::At(at("2026-01-02T03:00:00Z"))
        );
        // Three days later the agent comes back.
        assert_eq!(
            due(&memory, Some(&policy), "n", at("2026-01-04T10:00:00Z")),
            Due::Now(Trigger::Schedule)
        );
        ran(&mut memory, "2026-01-04T10:00:00Z");
        assert_eq!(
            due(&memory, Some(&policy), "n", at("2026-01-04T10:00:01Z")),
            Due::At(at("2026-01-05T03:00:00Z"))
        );
    }

    #[test]
    fn a_restart_repeats_no_run() {
        let mut policy = policy(json!({"schedule": "0 3 * * *"}));
        policy.requested_at = Some("1".into());
        let mut memory = Memory::default();
        let now = at("2026-01-02T03:00:00Z");
        adopt(&mut memory, Some(&policy), "n", now);
        note(&mut memory, policy.requested_at.clone(), Ok(&report(true)), now);
        let mut after: Memory = serde_json::from_str(&serde_json::to_string(&memory).unwrap()).unwrap();
        assert_eq!(after, memory);
        let later = at("2026-01-02T03:00:05Z");
        adopt(&mut after, Some(&policy), "n", later);
        assert_eq!(
            due(&after, Some(&policy), "n", later),
            Due::At(at("2026-01-03T03:00:00Z"))
        );
    }

    /// However the clock was set, and whenever the agent looked: in the next day there is one run, at its time.
    #[test]
    fn a_day_of_a_right_clock_has_one_run_whatever_it_was_before() {
        use rand::{Rng, SeedableRng};
        let seed = rand::rng().random();
        println!("seed {seed}");
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let policy = policy(json!({"schedule": "0 3 * * *", "timeZone": "Europe/Berlin"}));
        let hour = jiff::SignedDuration::from_hours(1);
        let look = |memory: &mut Memory, now: Timestamp| {
            adopt(memory, Some(&policy), "n", now);
            let is_due = due(memory, Some(&policy), "n", now) == Due::Now(Trigger::Schedule);
            if is_due {
                note(memory, None, Ok(&report(true)), now);
            }
            is_due
        };
        for _ in 0..300 {
            let mut memory = Memory::default();
            let mut now = at("2026-03-01T12:00:00Z");
            for _ in 0..rng.random_range(0..20) {
                now += match rng.random_range(0..4) {
                    0 => hour * rng.random_range(-2000..2000),
                    _ => hour * rng.random_range(0..60),
                };
                look(&mut memory, now);
            }
            // At noon in Berlin, whatever was missed has been made up for.
            now = at("2026-10-23T10:00:00Z");
            look(&mut memory, now);
            // Two nights, of which the second has an hour more.
            for night in ["2026-10-24T01:00:00Z", "2026-10-25T02:00:00Z"] {
                let mut runs = Vec::new();
                for _ in 0..24 {
                    now += hour;
                    if look(&mut memory, now) {
                        runs.push(now);
                    }
                }
                assert_eq!(runs, [at(night)], "{memory:?}");
            }
        }
    }

    #[test]
    fn a_request_is_due_once() {
        let mut policy = policy(json!({}));
        let mut memory = Memory::default();
        let now = at("2026-01-01T12:00:00Z");
        adopt(&mut memory, Some(&policy), "n", now);
        assert!(matches!(due(&memory, Some(&policy), "n", now), Due::At(_)));
        policy.requested_at = Some("1".into());
        assert_eq!(due(&memory, Some(&policy), "n", now), Due::Now(Trigger::Request));
        note(&mut memory, policy.requested_at.clone(), Err("disk on fire"), now);
        assert!(matches!(due(&memory, Some(&policy), "n", now), Due::At(_)));
        assert_eq!(memory.state.problem.as_deref(), Some("disk on fire"));
    }

    #[test]
    fn a_suspended_or_bad_policy_never_runs() {
        let now = at("2026-01-01T12:00:00Z");
        for rules in [
            json!({"suspend": true}),
            json!({"maxAge": "soon"}),
            json!({"schedule": "never"}),
        ] {
            let mut policy = policy(rules.clone());
            policy.requested_at = Some("1".into());
            let mut memory = Memory::default();
            adopt(&mut memory, Some(&policy), "n", now);
            assert_eq!(
                due(&memory, Some(&policy), "n", at("2027-01-01T12:00:00Z")),
                Due::Never,
                "{rules}"
            );
            assert_eq!(
                memory.state.problem.is_some(),
                rules.get("suspend").is_none(),
                "{rules}"
            );
        }
    }

    #[test]
    fn another_policy_starts_with_a_clean_memory() {
        let now = at("2026-01-01T12:00:00Z");
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&policy(json!({}))), "n", now);
        note(&mut memory, None, Err("no disk"), now);
        let kept = memory.clone();
        adopt(&mut memory, Some(&policy(json!({}))), "n", at("2026-01-01T14:00:00Z"));
        assert_eq!(memory.state.problem, kept.state.problem);
        adopt(&mut memory, None, "n", now);
        assert_eq!(
            (&memory.state.problem, &memory.state.policy_uid, &memory.tried),
            (&None, &None, &None)
        );
    }

    #[test]
    fn a_policy_that_comes_back_does_not_repeat_what_it_was_asked_for() {
        let now = at("2026-01-01T12:00:00Z");
        let mut asked = policy(json!({}));
        asked.requested_at = Some("1".into());
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&asked), "n", now);
        note(&mut memory, Some("1".into()), Err("no disk"), now);
        for number in 0..MAX_ANSWERED - 1 {
            let mut other = policy(json!({}));
            other.uid = format!("other-{number}");
            adopt(&mut memory, Some(&other), "n", now);
            note(&mut memory, Some("x".into()), Err("no disk"), now);
        }
        adopt(&mut memory, Some(&asked), "n", now);
        assert!(matches!(due(&memory, Some(&asked), "n", now), Due::At(_)));
        assert_eq!(memory.state.requested_at.as_deref(), Some("1"));
        assert_eq!(memory.state.last_run, None);
        asked.requested_at = Some("2".into());
        assert_eq!(due(&memory, Some(&asked), "n", now), Due::Now(Trigger::Request));
        assert_eq!(memory.answered.len(), MAX_ANSWERED);
    }

    #[test]
    fn too_little_room_is_a_reason_for_a_run_but_not_again_and_again() {
        let gib = 1u64 << 30;
        let room = |size: u64, free: u64| {
            Some(Room {
                size: size * gib,
                free: free * gib,
                total: 100 * gib,
            })
        };
        let limited = policy(json!({"maxSize": "50Gi", "minFree": "10%"}));
        let mut memory = Memory::default();
        let now = at("2026-01-01T12:00:00Z");
        adopt(&mut memory, Some(&limited), "n", now);
        for (room, pressed) in [
            (room(50, 10), false),
            (room(51, 10), true),
            (room(50, 9), true),
            (None, false),
        ] {
            assert_eq!(is_pressed(&memory, Some(&limited), room, now), pressed, "{room:?}");
        }
        assert!(
            !is_pressed(&memory, None, room(99, 0), now),
            "the built-in policy has no limits"
        );
        for rules in [
            json!({"maxSize": "1Gi", "suspend": true}),
            json!({"maxSize": "1Gi", "dryRun": true}),
            json!({"maxSize": "1Gi", "maxAge": "soon"}),
            json!({}),
        ] {
            assert!(
                !is_pressed(&memory, Some(&policy(rules.clone())), room(99, 0), now),
                "{rules}"
            );
        }
        ran(&mut memory, "2026-01-01T12:00:00Z");
        for (time, pressed) in [
            ("2026-01-01T12:09:59Z", false),
            ("2026-01-01T12:10:00Z", true),
            // The clock was set back by a day.
            ("2025-12-31T12:00:00Z", true),
        ] {
            assert_eq!(
                is_pressed(&memory, Some(&limited), room(51, 0), at(time)),
                pressed,
                "{time}"
            );
        }
        memory.state.over_limit = Some("current trees 51Gi".into());
        for (time, pressed) in [("2026-01-01T12:59:59Z", false), ("2026-01-01T13:00:00Z", true)] {
            assert_eq!(
                is_pressed(&memory, Some(&limited), room(51, 0), at(time)),
                pressed,
                "{time}"
            );
        }
    }

    #[test]
    fn a_clock_that_was_ahead_for_a_while_stops_no_schedule() {
        let policy = policy(json!({"schedule": "0 3 * * *"}));
        // With a run in that time, and with the policy first seen in it.
        for has_run in [true, false] {
            let mut memory = Memory::default();
            adopt(&mut memory, Some(&policy), "n", at("2038-01-01T12:00:00Z"));
            if has_run {
                note(&mut memory, None, Err("no disk"), at("2038-01-02T03:00:00Z"));
            }
            adopt(&mut memory, Some(&policy), "n", at("2026-01-01T12:00:00Z"));
            let next = at("2026-01-02T03:00:00Z");
            assert_eq!(memory.state.next_run, Some(Time(next)), "{has_run}");
            adopt(&mut memory, Some(&policy), "n", at("2026-01-02T02:59:59Z"));
            assert_eq!(due(&memory, Some(&policy), "n", next), Due::Now(Trigger::Schedule));
        }
    }

    #[test]
    fn a_node_is_over_its_limits_until_there_is_room_again() {
        let gib = 1u64 << 30;
        let room = |size: u64| Room {
            size: size * gib,
            free: 50 * gib,
            total: 100 * gib,
        };
        let limited = |generation: i64, rules| ProjectedPolicy {
            generation,
            ..policy(rules)
        };
        let now = at("2026-01-01T12:00:00Z");
        let over = |rules, room| {
            let mut memory = Memory::default();
            adopt(&mut memory, Some(&limited(1, json!({"maxSize": "10Gi"}))), "n", now);
            note(&mut memory, None, Err("no disk"), now);
            memory.state.over_limit = Some("20Gi of at most 10Gi".into());
            let policy = limited(2, rules);
            adopt(&mut memory, Some(&policy), "n", now);
            ease(&mut memory, Some(&policy), room);
            memory.state.over_limit.is_some()
        };
        // Nothing changed; nobody has looked since the last run; somebody made room; the limit was raised, and taken away.
        assert!(over(json!({"maxSize": "10Gi"}), Some(room(20))));
        assert!(over(json!({"maxSize": "10Gi"}), None));
        assert!(!over(json!({"maxSize": "10Gi"}), Some(room(10))));
        assert!(!over(json!({"maxSize": "30Gi"}), Some(room(20))));
        assert!(!over(json!({}), None));

        // A run that could not look says nothing of it, and one that was cut off neither.
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&limited(1, json!({"maxSize": "10Gi"}))), "n", now);
        memory.state.over_limit = Some("20Gi of at most 10Gi".into());
        let problem = crate::store::Problem {
            path: "/store/refs/x".into(),
            message: "it is damaged".into(),
        };
        let blocked = Report {
            blocked: vec![problem],
            ..report(true)
        };
        for report in [&blocked, &report(false)] {
            note(&mut memory, None, Ok(report), now);
            assert!(memory.state.over_limit.is_some());
        }
        note(&mut memory, None, Ok(&report(true)), now);
        assert_eq!(memory.state.over_limit, None);
    }

    #[test]
    fn a_run_that_ended_early_says_what_it_did_and_why_it_ended() {
        let now = at("2026-01-01T12:00:00Z");
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&policy(json!({}))), "n", now);
        let report = Report {
            failed: Some("cannot remove /store/objects/ab/cd: Input/output error".into()),
            deleted_blobs: 7,
            ..report(false)
        };
        note(&mut memory, None, Ok(&report), now);
        assert_eq!(memory.state.last_run.unwrap().deleted_blobs, 7);
        let problem = memory.state.problem.unwrap();
        assert!(
            problem.contains("ended early") && problem.contains("objects/ab/cd"),
            "{problem}"
        );
    }

    #[test]
    fn after_an_edit_a_node_over_its_limits_is_seen_to_sooner() {
        let room = Some(Room {
            size: 20,
            free: 50,
            total: 100,
        });
        let mut edited = policy(json!({"maxSize": "10"}));
        let now = at("2026-01-01T12:00:00Z");
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&edited), "n", now);
        note(&mut memory, None, Err("no disk"), now);
        memory.state.over_limit = Some("20 of at most 10".into());
        let later = at("2026-01-01T12:10:00Z");
        assert!(!is_pressed(&memory, Some(&edited), room, later));
        edited.generation += 1;
        adopt(&mut memory, Some(&edited), "n", later);
        assert!(is_pressed(&memory, Some(&edited), room, later));
    }

    #[test]
    fn jitter_is_bounded_and_differs_between_nodes() {
        let longest = Duration::from_secs(600);
        let delays: std::collections::BTreeSet<_> = (0..50).map(|i| jitter(&format!("n{i}"), "u", longest)).collect();
        assert!(delays.len() > 30 && delays.iter().all(|delay| *delay <= longest));
        assert_eq!(jitter("n", "u", longest), jitter("n", "u", longest));
        assert_eq!(jitter("n", "u", Duration::ZERO), Duration::ZERO);
    }
}
