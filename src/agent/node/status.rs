//! What the NodeStore's status says, and when it is written.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use tracing::warn;

use super::{Node, TICK};
use crate::agent::analysis::Trouble;
use crate::agent::plan::{self, Step};
use crate::agent::work::Done;
use crate::api::conditions::{OVER_LIMIT, READY, RETENTION_FAILED, Verdict, Wanted, find, merge, reasons};
use crate::api::{NodeStore, NodeStoreStatus, Parsed, ProjectedManifest};
use crate::cluster::{AGENT_MANAGER, ObjectKey, WriteError, apply_status, is_news};

/// While a build is younger than this, its end is waited for before the status is written: most builds are quick, and
/// the write that says "building" would be out of date at once.
const QUICK: Duration = Duration::from_millis(300);

impl Node {
    /// Writes the status if it differs and may be written now; gives the time of the next look.
    pub(super) fn write_status(&mut self, manifests: &[ProjectedManifest], steps: &[Step], now: Instant) -> Instant {
        let later = now + TICK;
        let (Some(observed), Some(spec)) = (&self.observed, &self.spec) else {
            return later;
        };
        // A spec of an earlier NodeStore is worked on, but this one's status is not about it.
        if self.writing || observed.uid != spec.uid {
            return later;
        }
        let states = manifests.iter().zip(steps);
        let mut wanted = self.verdict().conditions();
        if let Some(over) = &self.memory.state.over_limit {
            wanted.push(Wanted {
                kind: OVER_LIMIT,
                status: true,
                reason: reasons::LIVE_CONTENT,
                message: over.clone(),
            });
        }
        if let Some(problem) = &self.memory.state.problem {
            let policy = spec.spec.retention.as_ref();
            wanted.push(Wanted {
                kind: RETENTION_FAILED,
                status: true,
                reason: match policy.is_some_and(|policy| policy.rules.check().is_err()) {
                    true => reasons::INVALID_SPEC,
                    false => reasons::RUN_FAILED,
                },
                message: problem.clone(),
            });
        }
        let road = self.builder.layers.known_road();
        if let Some(road) = road {
            self.health.metrics().layers_are_made_by(road);
        }
        let status = NodeStoreStatus {
            observed_generation: spec.generation,
            conditions: merge(&observed.status.conditions, wanted, spec.generation, Timestamp::now()),
            store_id: Some(self.builder.store.id().to_owned()),
            road: road.map(|road| road.to_string()),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            manifests: states
                .map(|(manifest, step)| plan::state(manifest, self.known(manifest), *step))
                .collect(),
            retention: self.memory.since.map(|_| self.memory.state.clone()),
            usage: self.usage.clone().or_else(|| observed.status.usage.clone()),
            analytics: match &self.figures {
                Some(figures) => Some(figures.status.clone()),
                None => observed.status.analytics.clone(),
            },
        };
        if status == observed.status {
            self.differs_since = None;
            return later;
        }
        let since = *self.differs_since.get_or_insert(now);
        if self.jobs.values().any(|job| now < job.started + QUICK) && now < since + QUICK {
            return (since + QUICK).min(later);
        }
        if let Some(due) = self.write_backoff.due(now) {
            return due;
        }
        if let Err(due) = self.throttle.take(now) {
            return due;
        }
        self.writing = true;
        let (client, key) = (self.client.clone(), ObjectKey::new("", &self.node));
        let (old, new) = (&observed.status.conditions, &status.conditions);
        for (kind, announced) in [
            (OVER_LIMIT, &mut self.announced_over),
            (RETENTION_FAILED, &mut self.announced_failed),
        ] {
            self.announcer
                .warn_of::<NodeStore>(kind, &key, &observed.uid, old, new, announced);
        }
        let resource_version = observed.resource_version.clone();
        self.tasks.spawn(async move {
            let written = apply_status::<NodeStore, _>(&client, &key, AGENT_MANAGER, &resource_version, &status).await;
            Done::Written(written.map(Box::new))
        });
        later
    }

    /// What a manifest has for itself. After a restart, what the API server knows until it is counted again.
    pub(super) fn exclusive(&self, manifest: &ProjectedManifest) -> Option<i64> {
        if let Some(figures) = &self.figures {
            let key = ObjectKey::new(&manifest.namespace, &manifest.name);
            return figures.exclusive.get(&key).copied();
        }
        let said = &self.observed.as_ref()?.status.manifests;
        said.iter()
            .find(|state| state.uid == manifest.uid)
            .and_then(|state| state.exclusive_bytes)
    }

    fn verdict(&self) -> Verdict {
        if let Some(Trouble { reason, message }) = self.trouble.clone().or_else(|| self.trouble_before()) {
            return Verdict::Stalled { reason, message };
        }
        Verdict::Ready {
            reason: reasons::SERVING,
            message: "the store is open".to_owned(),
        }
    }

    /// What was wrong before this process began, as long as it has not looked whether it still is.
    fn trouble_before(&self) -> Option<Trouble> {
        let observed = self.observed.as_ref().filter(|_| self.figures.is_none())?;
        let ready = find(&observed.status.conditions, READY)?;
        let reason = [reasons::STORE_ERROR, reasons::CONTENT_MISSING]
            .into_iter()
            .find(|reason| ready.reason == *reason)?;
        Some(Trouble {
            reason,
            message: ready.message.clone(),
        })
    }

    pub(super) fn written(&mut self, result: Result<Box<Parsed<NodeStore>>, WriteError>, now: Instant) {
        self.writing = false;
        match result {
            Ok(object) => {
                self.write_backoff.succeeded();
                self.differs_since = None;
                self.health.metrics().writes.inc();
                let known = self.observed.as_ref();
                let known = known.map(|known| (known.uid.as_str(), known.resource_version.as_str()));
                if is_news(known, &object.metadata) {
                    self.observe(*object);
                }
            }
            Err(error) => {
                self.health.metrics().write_errors.inc();
                self.write_backoff.failed(now);
                if error.is_news(self.write_backoff.failures()) {
                    let failures = self.write_backoff.failures();
                    warn!(node = self.node, %error, failures, "cannot write the node's status; trying again");
                }
            }
        }
    }
}
