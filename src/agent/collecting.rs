//! Retention in the node's loop: when a run begins, and what becomes of its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tracing::{info, warn};

use super::node::{Node, RunUnderWay, TICK};
use super::retention::{self, Due, How, Room, Trigger};
use super::work::{self, Collected, Done};
use crate::api::conditions::reasons;
use crate::api::{NodeStore, ProjectedPolicy};
use crate::cluster::ObjectKey;
use crate::store::{Report, RunId};

/// How often it is looked how much room there is.
const LOOK: Duration = Duration::from_secs(60);

impl Node {
    /// Begins a run if one is due; gives the time of the next look.
    pub(super) fn retention(&mut self, now: Instant) -> Instant {
        let policy = self.spec.as_ref().and_then(|spec| spec.spec.retention.clone());
        // Before the first spec nobody knows which policy is in force.
        if self.spec.is_none() {
            return now + TICK;
        }
        if let Some(run) = &self.collecting {
            if retention::is_outdated(run.policy.as_ref(), policy.as_ref()) {
                // It ends soon, and what is due by the new one is done then.
                run.cancel.store(true, Ordering::Relaxed);
            }
            return now + TICK;
        }
        self.look(policy.as_ref(), now);
        let time = Timestamp::now();
        let before = self.memory.clone();
        retention::adopt(&mut self.memory, policy.as_ref(), &self.node, time);
        retention::ease(&mut self.memory, policy.as_ref(), self.room);
        self.saving.wanted.memory |= self.memory != before;
        let is_over = self.memory.state.over_limit.is_some();
        self.health.metrics().over_limit.set(is_over.into());
        match retention::next(&self.memory, policy.as_ref(), self.room, &self.node, time) {
            Due::Never => now + TICK,
            Due::At(at) => {
                now + Duration::try_from(at.duration_since(time))
                    .unwrap_or_default()
                    .min(TICK)
            }
            // What should go may still be on its way into history; and of a run and a look through the store one at a time
            // is enough for the memory and the disk.
            Due::Now(_) if !self.retiring.is_empty() || self.pace.is_counting() => now + Duration::from_millis(50),
            Due::Now(trigger) => {
                let name = policy.as_ref().map(|policy| policy.name.clone());
                info!(node = self.node, ?trigger, policy = name, "retention begins");
                let how = How {
                    policy: policy.clone(),
                    trigger,
                    rate: self.removal_rate,
                    cancel: Arc::default(),
                };
                self.collecting = Some(RunUnderWay {
                    policy,
                    cancel: how.cancel.clone(),
                    began: now,
                });
                let builder = self.builder.clone();
                self.tasks
                    .spawn_blocking(move || Done::Collected(Box::new(work::collect(&builder, how))));
                now + TICK
            }
        }
    }

    /// Looks now and then how much room there is, for a policy that asks for some: others use the disk, too.
    fn look(&mut self, policy: Option<&ProjectedPolicy>, now: Instant) {
        let is_due = self.looked.is_none_or(|looked| now.duration_since(looked) > LOOK);
        if is_due && policy.is_some_and(|policy| retention::asks_for_room(&policy.rules)) {
            self.looked = Some(now);
            let builder = self.builder.clone();
            self.tasks
                .spawn_blocking(move || Done::Looked(Room::of(&builder.store)));
        }
    }

    pub(super) fn collected(&mut self, collected: Collected) {
        let Collected {
            request,
            trigger,
            result,
            refs,
            usage,
        } = collected;
        self.counted(usage);
        self.collecting = None;
        let now = Instant::now();
        self.ran = Some(now);
        // What was seen before the run says nothing of what it left.
        (self.room, self.looked) = (None, None);
        self.pace.changed(now);
        self.health.metrics().retention_runs.inc();
        match &result {
            Ok((report, record)) => {
                info!(
                    node = self.node,
                    ?trigger,
                    record = record.as_ref().map(tracing::field::display),
                    scanned = report.scanned_blobs,
                    deleted = report.deleted_blobs,
                    freed_bytes = report.freed_bytes,
                    dropped_revisions = report.dropped_history.len(),
                    dry_run = report.dry_run,
                    "retention ran"
                );
                if let Some(error) = &report.failed {
                    warn!(node = self.node, error, "retention ended early");
                }
                if !report.dry_run {
                    self.health.metrics().freed_bytes.inc_by(report.freed_bytes);
                }
                self.announce_run(report, trigger, record.as_ref());
            }
            Err(error) => warn!(node = self.node, error, "retention failed"),
        }
        let has_failed = |report: &Report| report.failed.is_some() || !report.blocked.is_empty();
        if result.as_ref().map_or(true, |(report, _)| has_failed(report)) {
            self.health.metrics().retention_failures.inc();
        }
        let noted = result.as_ref().map(|(report, _)| report).map_err(String::as_str);
        retention::note(&mut self.memory, request, noted, Timestamp::now());
        self.saving.wanted.memory = true;
        if let Some(refs) = refs {
            // A build that ended meanwhile is newer than what was read.
            for (key, entry) in refs {
                self.refs
                    .entry(key)
                    .and_modify(|known| known.history = entry.history.clone())
                    .or_insert(entry);
            }
        }
    }

    /// Says in an event what a run did, if it did anything.
    fn announce_run(&self, report: &Report, trigger: Trigger, record: Option<&RunId>) {
        let Some(observed) = self.observed.as_ref().filter(|_| !report.decisions.is_empty()) else {
            return;
        };
        let reason = match report.dry_run {
            true => reasons::RETENTION_DRY_RUN,
            false => reasons::RETENTION_RAN,
        };
        let note = retention::summary(report, trigger, record);
        let key = ObjectKey::new("", &self.node);
        self.announcer
            .announce::<NodeStore>(&key, &observed.uid, false, reason, &note);
    }
}
