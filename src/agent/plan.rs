//! What to do about each manifest of the node: pure decisions.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::api::conditions::reasons;
use crate::api::{ManifestState, Phase, ProjectedManifest, int64};
use crate::cluster::{Backoff, ObjectKey};
use crate::store::Ref;

/// What a build is for: the manifest's identity, and what of it the answer will be about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Goal {
    pub uid: String,
    pub generation: i64,
    pub requested_at: Option<String>,
}

impl Goal {
    pub fn of(manifest: &ProjectedManifest) -> Self {
        Self {
            uid: manifest.uid.clone(),
            generation: manifest.generation,
            requested_at: manifest.requested_at.clone(),
        }
    }
}

/// Why a build did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Nobody but a person can help: not tried again until the manifest changes or the agent restarts.
    pub stalled: bool,
    pub reason: &'static str,
    pub message: String,
}

/// The memory of a failed goal.
#[derive(Debug, Clone)]
pub struct Failed {
    pub goal: Goal,
    pub failure: Failure,
    pub backoff: Backoff,
}

/// What is known of one manifest besides its spec.
#[derive(Debug, Default, Clone, Copy)]
pub struct Known<'a> {
    pub stored: Option<&'a Ref>,
    pub building: Option<&'a Goal>,
    pub failed: Option<&'a Failed>,
    /// When its source was last read by this process.
    pub checked: Option<Instant>,
    /// Bytes that it has for itself.
    pub exclusive: Option<i64>,
}

impl<'a> Known<'a> {
    /// The ref, if its tree is the one that the goal asks for.
    fn current(&self, goal: &Goal) -> Option<&'a Ref> {
        self.stored.filter(|stored| {
            stored.owner == goal.uid
                && stored.current.is_some()
                && stored.generation == goal.generation
                && stored.request == goal.requested_at
        })
    }
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The tree of this generation and request is stored. With a time: read the source again then.
    Done(Option<Instant>),
    /// Build now.
    Build,
    /// A build for this goal is under way.
    Building,
    /// A build for an older goal is under way: end it.
    Cancel,
    /// It failed; try again then.
    Retry(Instant),
    /// It failed for good.
    Stalled,
    /// Work is due and held up by `suspend`.
    Suspended,
}

/// Decides about one manifest. `interval` is its rebuild interval, if it has a usable one.
pub fn step(manifest: &ProjectedManifest, known: Known, interval: Option<Duration>, now: Instant) -> Step {
    let goal = Goal::of(manifest);
    if let Some(building) = known.building {
        return if *building == goal && !manifest.suspend {
            Step::Building
        } else {
            Step::Cancel
        };
    }
    let stored = known.current(&goal);
    let failed = known.failed.filter(|failed| failed.goal == goal);
    match (stored, failed) {
        // A failed periodic rebuild is tried again too.
        (_, Some(failed)) if failed.failure.stalled => Step::Stalled,
        (_, Some(_)) | (None, None) if manifest.suspend => Step::Suspended,
        (_, Some(failed)) => failed.backoff.due(now).map_or(Step::Build, Step::Retry),
        (None, None) => Step::Build,
        (Some(_), None) => match (interval, known.checked) {
            (Some(interval), Some(checked)) if !manifest.suspend => {
                let due = checked + interval;
                if due <= now { Step::Build } else { Step::Done(Some(due)) }
            }
            _ => Step::Done(None),
        },
    }
}

/// The refs whose owner is not among the node's manifests any more: their trees become history. What an admin named by
/// `larder store` is nobody's but the admin's.
pub fn retired<'a>(
    refs: &'a BTreeMap<ObjectKey, Ref>,
    manifests: &[ProjectedManifest],
) -> Vec<(&'a ObjectKey, &'a Ref)> {
    let owners: HashSet<&str> = manifests.iter().map(|manifest| manifest.uid.as_str()).collect();
    refs.iter()
        .filter(|(_, entry)| entry.owner != crate::cli::OWNER)
        .filter(|(_, entry)| entry.current.is_some() && !owners.contains(entry.owner.as_str()))
        .collect()
}

/// What the node says of a manifest.
pub fn state(manifest: &ProjectedManifest, known: Known, step: Step) -> ManifestState {
    let tree = known
        .stored
        .filter(|stored| stored.owner == manifest.uid)
        .and_then(|stored| stored.current.as_ref());
    let (phase, reason, message) = match (step, known.failed.filter(|failed| failed.goal == Goal::of(manifest))) {
        (Step::Stalled, Some(failed)) => (Phase::Stalled, failed.failure.reason, failed.failure.message.clone()),
        // While the next try is under way, the last one's outcome is still what is known.
        (Step::Retry(_) | Step::Building | Step::Build | Step::Cancel, Some(failed)) => {
            (Phase::Failed, failed.failure.reason, failed.failure.message.clone())
        }
        (Step::Suspended, _) => (
            Phase::Stalled,
            reasons::SUSPENDED,
            "spec.suspend holds up a build that is due".to_owned(),
        ),
        (Step::Done(_), _) => (Phase::Ready, "", String::new()),
        // A periodic rebuild does not make a stored tree less ready.
        _ if known.current(&Goal::of(manifest)).is_some() => (Phase::Ready, "", String::new()),
        _ => (Phase::Building, reasons::BUILDING, String::new()),
    };
    let text = |text: &str| (!text.is_empty()).then(|| crate::api::truncate(text, 512));
    ManifestState {
        namespace: manifest.namespace.clone(),
        name: manifest.name.clone(),
        uid: manifest.uid.clone(),
        observed_generation: manifest.generation,
        requested_at: manifest.requested_at.clone(),
        phase,
        reason: text(reason),
        message: text(&message),
        digest: tree.map(|tree| tree.digest.to_string()),
        files: tree.map(|tree| int64(tree.files)),
        size_bytes: tree.map(|tree| int64(tree.size)),
        unique_bytes: tree.map(|tree| int64(tree.unique)),
        added_bytes: tree.map(|tree| int64(tree.added)),
        exclusive_bytes: known.exclusive.filter(|_| tree.is_some()),
    }
}

/// Forgets what is remembered of manifests that are no longer the node's.
pub fn prune<T>(memory: &mut HashMap<String, T>, manifests: &[ProjectedManifest]) {
    let uids: HashSet<&str> = manifests.iter().map(|manifest| manifest.uid.as_str()).collect();
    memory.retain(|uid, _| uids.contains(uid.as_str()));
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::store::{RefName, Revision, TreeDigest};

    fn manifest(generation: i64) -> ProjectedManifest {
        serde_json::from_value(serde_json::json!({
            "namespace": "ns", "name": "m", "uid": "u1", "generation": generation,
            "source": {"directory": {"path": "/x"}}, "revisionHistoryLimit": 3, "suspend": false
        }))
        .unwrap()
    }

    fn stored(owner: &str, generation: i64) -> Ref {
        Ref {
            name: RefName::new("ns", "m").unwrap(),
            owner: owner.into(),
            generation,
            request: None,
            source: serde_json::Value::Null,
            current: Some(Revision {
                digest: TreeDigest::from_bytes([1; 32]),
                files: 2,
                entries: 3,
                size: 100,
                unique: 80,
                added: 10,
                built_at: SystemTime::UNIX_EPOCH,
            }),
            history: Vec::new(),
            history_limit: 3,
        }
    }

    fn failed(stalled: bool, now: Instant) -> Failed {
        let mut backoff = Backoff::slow();
        backoff.failed(now);
        let failure = Failure {
            stalled,
            reason: reasons::SOURCE_UNREADABLE,
            message: "f: denied".into(),
        };
        Failed {
            goal: Goal::of(&manifest(2)),
            failure,
            backoff,
        }
    }

    #[test]
    fn a_manifest_is_built_once_per_generation_and_owner() {
        let now = Instant::now();
        let cases = [
            (None, Step::Build),
            (Some(stored("u1", 2)), Step::Done(None)),
            (Some(stored("u1", 1)), Step::Build),
            (Some(stored("u0", 2)), Step::Build),
        ];
        for (stored, expected) in &cases {
            let known = Known {
                stored: stored.as_ref(),
                ..Known::default()
            };
            assert_eq!(step(&manifest(2), known, None, now), *expected, "{stored:?}");
        }
    }

    #[test]
    fn a_request_is_a_goal_of_its_own() {
        let (now, stored) = (Instant::now(), stored("u1", 2));
        let mut asked = manifest(2);
        asked.requested_at = Some("now".into());
        assert_eq!(
            step(
                &asked,
                Known {
                    stored: Some(&stored),
                    ..Known::default()
                },
                None,
                now
            ),
            Step::Build
        );
    }

    #[test]
    fn a_build_for_an_older_goal_is_ended() {
        let now = Instant::now();
        let (old, new) = (Goal::of(&manifest(1)), Goal::of(&manifest(2)));
        assert_eq!(
            step(
                &manifest(2),
                Known {
                    building: Some(&old),
                    ..Known::default()
                },
                None,
                now
            ),
            Step::Cancel
        );
        assert_eq!(
            step(
                &manifest(2),
                Known {
                    building: Some(&new),
                    ..Known::default()
                },
                None,
                now
            ),
            Step::Building
        );
    }

    #[test]
    fn a_failure_waits_and_a_stalled_one_waits_for_a_change() {
        let now = Instant::now();
        let waiting = failed(false, now);
        let known = Known {
            failed: Some(&waiting),
            ..Known::default()
        };
        assert!(matches!(step(&manifest(2), known, None, now), Step::Retry(_)));
        assert_eq!(
            step(&manifest(2), known, None, now + Duration::from_secs(600)),
            Step::Build
        );
        assert_eq!(
            step(&manifest(3), known, None, now),
            Step::Build,
            "a new generation is tried at once"
        );
        let stalled = failed(true, now);
        let known = Known {
            failed: Some(&stalled),
            ..Known::default()
        };
        assert_eq!(
            step(&manifest(2), known, None, now + Duration::from_secs(600)),
            Step::Stalled
        );
        assert_eq!(state(&manifest(2), known, Step::Stalled).phase, Phase::Stalled);
    }

    #[test]
    fn suspend_holds_up_builds_but_not_what_is_stored() {
        let (now, stored) = (Instant::now(), stored("u1", 2));
        let mut suspended = manifest(2);
        suspended.suspend = true;
        let known = Known {
            stored: Some(&stored),
            ..Known::default()
        };
        assert_eq!(step(&suspended, known, Some(Duration::ZERO), now), Step::Done(None));
        suspended.generation = 3;
        assert_eq!(step(&suspended, known, None, now), Step::Suspended);
        let said = state(&suspended, known, Step::Suspended);
        assert_eq!(
            (said.phase, said.reason.as_deref(), said.files),
            (Phase::Stalled, Some("Suspended"), Some(2))
        );
    }

    #[test]
    fn an_interval_runs_from_the_last_reading() {
        let (now, stored) = (Instant::now(), stored("u1", 2));
        let hour = Duration::from_secs(3600);
        let known = Known {
            stored: Some(&stored),
            checked: Some(now),
            ..Known::default()
        };
        assert_eq!(step(&manifest(2), known, Some(hour), now), Step::Done(Some(now + hour)));
        assert_eq!(step(&manifest(2), known, Some(hour), now + hour), Step::Build);
        // While it is read again, the tree is as ready as before.
        let goal = Goal::of(&manifest(2));
        assert_eq!(
            state(
                &manifest(2),
                Known {
                    building: Some(&goal),
                    ..known
                },
                Step::Building
            )
            .phase,
            Phase::Ready
        );
    }

    #[test]
    fn only_trees_without_an_owner_are_retired() {
        let refs: BTreeMap<_, _> = [
            (ObjectKey::new("ns", "m"), stored("u1", 1)),
            (ObjectKey::new("ns", "gone"), stored("u9", 1)),
            (ObjectKey::new("local", "an-admins"), stored(crate::cli::OWNER, 0)),
            (
                ObjectKey::new("ns", "already"),
                Ref {
                    current: None,
                    ..stored("u8", 1)
                },
            ),
        ]
        .into();
        let retired: Vec<_> = retired(&refs, &[manifest(2)])
            .into_iter()
            .map(|(key, _)| key.name.as_str())
            .collect();
        assert_eq!(retired, ["gone"]);
    }
}
