//! What is said of a CasManifest: its nodes' states, summed up.

use jiff::Timestamp;

use super::index::{Index, ManifestFacts};
use crate::api::conditions::{Verdict, merge, reasons};
use crate::api::{CasManifestStatus, Duration, Failure, ManifestState, NodeCounts, Phase, human_size};
use crate::cluster::ObjectKey;

const MAX_FAILURES: usize = 10;
/// Ten of them and the rest of a status stay far below 64 KiB.
const MAX_FAILURE_MESSAGE: usize = 512;

/// What one node that should have the tree says.
enum NodeSays<'a> {
    Unreachable,
    Refused,
    /// It has not yet taken this generation and request up.
    Nothing,
    State(&'a ManifestState),
}

/// The status as it should be. `None` when the manifest is gone.
pub fn plan(index: &Index, key: &ObjectKey, now: Timestamp) -> Option<CasManifestStatus> {
    let manifest = index.manifests.get(key)?;
    let old = &manifest.status;
    let mut status = CasManifestStatus {
        observed_generation: manifest.meta.generation,
        ..Default::default()
    };

    let mut nodes: Vec<(&str, NodeSays)> = index
        .nodes
        .keys()
        .filter(|node| index.has_agent(node) && index.places(key, manifest, node))
        .map(|node| (node.as_str(), ask(index, manifest, node)))
        .collect();
    nodes.sort_by_key(|(name, _)| *name);

    let counts = count(&nodes);
    let current: Vec<&ManifestState> = nodes.iter().filter_map(|(_, says)| says.ready()).collect();
    // While a new tree is built, what is stored is still what can be mounted.
    let stored: Vec<&ManifestState> = if current.is_empty() {
        nodes
            .iter()
            .filter_map(|(node, _)| state(index, manifest, node))
            .filter(|state| state.digest.is_some())
            .collect()
    } else {
        current
    };
    describe_tree(&mut status, &stored);
    status.failures = failures(&nodes);
    let handled = nodes
        .iter()
        .all(|(_, says)| matches!(says, NodeSays::Unreachable | NodeSays::Refused | NodeSays::State(_)));
    status.last_handled_reconcile_at = match &manifest.spec {
        Ok(_) if handled && counts.desired > counts.unreachable => manifest.meta.requested_at.clone(),
        _ => old.last_handled_reconcile_at.clone(),
    };

    let verdict = match &manifest.spec {
        Err(invalid) => Verdict::Stalled {
            reason: reasons::INVALID_SPEC,
            message: invalid.to_string(),
        },
        Ok(spec) => match spec.rebuild_interval.as_ref().map(Duration::get) {
            Some(Err(invalid)) => Verdict::Stalled {
                reason: reasons::INVALID_SPEC,
                message: format!("spec.rebuildInterval: {invalid}"),
            },
            _ => verdict(&nodes, &counts, &status),
        },
    };
    status.nodes = Some(counts);
    status.conditions = merge(&old.conditions, verdict.conditions(), manifest.meta.generation, now);
    Some(status)
}

impl NodeSays<'_> {
    fn ready(&self) -> Option<&ManifestState> {
        match self {
            Self::State(state) if state.phase == Phase::Ready => Some(state),
            _ => None,
        }
    }
}

/// The node's state of this very manifest, of whatever generation.
fn state<'a>(index: &'a Index, manifest: &ManifestFacts, node: &str) -> Option<&'a ManifestState> {
    index
        .stores
        .get(node)?
        .status
        .manifests
        .iter()
        .find(|state| state.uid == manifest.meta.uid)
}

fn ask<'a>(index: &'a Index, manifest: &ManifestFacts, node: &str) -> NodeSays<'a> {
    if index
        .refused
        .get(node)
        .is_some_and(|refused| refused.contains(&manifest.meta.uid))
    {
        return NodeSays::Refused;
    }
    if !index.reachable(node) {
        return NodeSays::Unreachable;
    }
    match state(index, manifest, node) {
        Some(state)
            if state.observed_generation == manifest.meta.generation
                && state.requested_at == manifest.meta.requested_at =>
        {
            NodeSays::State(state)
        }
        _ => NodeSays::Nothing,
    }
}

fn count(nodes: &[(&str, NodeSays)]) -> NodeCounts {
    let count = |wanted: fn(&NodeSays) -> bool| nodes.iter().filter(|(_, says)| wanted(says)).count() as i64;
    let (desired, ready) = (nodes.len() as i64, count(|says| says.ready().is_some()));
    NodeCounts {
        desired,
        ready,
        failed: count(|says| match says {
            NodeSays::State(state) => matches!(state.phase, Phase::Failed | Phase::Stalled),
            NodeSays::Refused => true,
            _ => false,
        }),
        unreachable: count(|says| matches!(says, NodeSays::Unreachable)),
        summary: format!("{ready}/{desired}"),
    }
}

fn describe_tree(status: &mut CasManifestStatus, stored: &[&ManifestState]) {
    let Some(first) = stored.first() else { return };
    if stored.iter().all(|state| state.digest == first.digest) {
        status.digest = first.digest.clone();
    }
    let largest = |field: fn(&ManifestState) -> Option<i64>| stored.iter().filter_map(|state| field(state)).max();
    status.files = largest(|state| state.files);
    status.size_bytes = largest(|state| state.size_bytes);
    status.unique_bytes = largest(|state| state.unique_bytes);
    status.exclusive_bytes = largest(|state| state.exclusive_bytes);
    let saved = stored
        .iter()
        .filter_map(|state| Some((state.size_bytes? - state.added_bytes?).max(0)));
    status.saved_bytes = saved.min();
    let human = |bytes: Option<i64>| bytes.map(|bytes| human_size(bytes.unsigned_abs()));
    status.size = human(status.size_bytes);
    status.unique = human(status.unique_bytes);
    status.exclusive = human(status.exclusive_bytes);
    status.saved = human(status.saved_bytes);
}

fn failures(nodes: &[(&str, NodeSays)]) -> Vec<Failure> {
    let failure = |(node, says): &(&str, NodeSays)| {
        let (reason, message) = match says {
            NodeSays::Refused => (reasons::NODE_FULL, refused_message()),
            NodeSays::State(state) if matches!(state.phase, Phase::Failed | Phase::Stalled) => (
                state.reason.as_deref().unwrap_or(reasons::STORE_ERROR),
                state.message.clone().unwrap_or_default(),
            ),
            _ => return None,
        };
        let message = crate::api::truncate(&message, MAX_FAILURE_MESSAGE);
        Some(Failure {
            node: (*node).to_owned(),
            reason: reason.to_owned(),
            message,
        })
    };
    nodes.iter().filter_map(failure).take(MAX_FAILURES).collect()
}

fn refused_message() -> String {
    format!(
        "the node holds {} manifests or {} KiB of them already; narrow the nodeSelector or delete older manifests",
        crate::api::MAX_NODE_MANIFESTS,
        crate::api::MAX_NODE_SPEC_BYTES / 1024
    )
}

fn verdict(nodes: &[(&str, NodeSays)], counts: &NodeCounts, status: &CasManifestStatus) -> Verdict {
    let NodeCounts {
        desired,
        ready,
        failed,
        unreachable,
        ..
    } = *counts;
    if desired == 0 {
        let message = "no node with a larder agent is selected".to_owned();
        return Verdict::Progressing {
            reason: reasons::NO_NODES,
            message,
        };
    }
    if let Some(first) = status.failures.first() {
        let message = match failed {
            1 if desired == 1 => format!("node {}: {}", first.node, first.message),
            _ => format!(
                "{failed} of {desired} nodes failed; first node {}: {}",
                first.node, first.message
            ),
        };
        let reason = reasons::ALL
            .iter()
            .find(|known| **known == first.reason)
            .copied()
            .unwrap_or(reasons::STORE_ERROR);
        // A failure that a node retries by itself is progress; one that it does not needs somebody.
        let stalled = nodes.iter().any(|(_, says)| match says {
            NodeSays::State(state) => state.phase == Phase::Stalled,
            NodeSays::Refused => true,
            _ => false,
        });
        return if stalled {
            Verdict::Stalled { reason, message }
        } else {
            Verdict::Progressing { reason, message }
        };
    }
    if ready == 0 && unreachable == desired {
        let message = format!("none of {desired} selected nodes can be reached");
        return Verdict::Progressing {
            reason: reasons::NODES_UNREACHABLE,
            message,
        };
    }
    if ready + unreachable < desired {
        let message = format!("{ready} of {desired} nodes have the tree");
        return Verdict::Progressing {
            reason: reasons::BUILDING,
            message,
        };
    }
    let mut message = format!("{ready} of {desired} nodes have the tree");
    if unreachable > 0 {
        message += &format!("; {unreachable} cannot be reached");
    }
    if status.digest.is_none() {
        message += "; the nodes' trees differ, so there is no one digest";
        return Verdict::Ready {
            reason: reasons::DIGESTS_DIFFER,
            message,
        };
    }
    Verdict::Ready {
        reason: reasons::STORED,
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan_node::{self, NodePlan};
    use super::super::testing::*;
    use super::*;
    use crate::api::conditions::{READY, RECONCILING, STALLED, find, is_true};
    use crate::api::{MAX_MESSAGE, NodeStoreStatus};
    use serde_json::json;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("ns", name)
    }

    /// Lets a node take its plan up and answer with this state of `ns/m`.
    fn answer(index: &mut Index, node: &str, fields: serde_json::Value) {
        let spec = match plan_node::plan(index, node).0 {
            NodePlan::Write { spec, .. } => *spec,
            _ => index.stores[node].spec.clone(),
        };
        let mut state = json!({"namespace": "ns", "name": "m", "uid": "uid-m", "observedGeneration": 1, "phase": "Ready",
            "digest": "sha256:aa", "files": 3, "sizeBytes": 3000, "uniqueBytes": 2000, "addedBytes": 500});
        for (field, value) in fields.as_object().unwrap() {
            state[field] = value.clone();
        }
        let status: NodeStoreStatus =
            serde_json::from_value(json!({"observedGeneration": 1, "manifests": [state]})).unwrap();
        index.store(store(node, &format!("uid-{node}"), spec, status));
    }

    fn at_zero() -> Timestamp {
        Timestamp::UNIX_EPOCH
    }

    fn ready(status: &CasManifestStatus) -> (&str, &str) {
        let ready = find(&status.conditions, READY).unwrap();
        (&ready.status, &ready.reason)
    }

    #[test]
    fn a_tree_on_every_node_is_ready_with_its_sizes() {
        let mut index = world();
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(ready(&status), ("False", "Building"));
        assert!(is_true(&status.conditions, RECONCILING));
        answer(&mut index, "n1", json!({}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(ready(&status), ("True", "Stored"));
        assert_eq!(status.conditions.len(), 1);
        assert_eq!(status.digest.as_deref(), Some("sha256:aa"));
        assert_eq!(
            (status.files, status.size_bytes, status.unique_bytes, status.saved_bytes),
            (Some(3), Some(3000), Some(2000), Some(2500))
        );
        assert_eq!(status.nodes.unwrap().summary, "1/1");
        assert_eq!(status.observed_generation, 1);
    }

    #[test]
    fn an_answer_to_an_older_generation_or_request_is_not_ready_but_shows_the_stored_tree() {
        let mut index = world();
        answer(&mut index, "n1", json!({"observedGeneration": 0}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(ready(&status), ("False", "Building"));
        assert_eq!(status.digest.as_deref(), Some("sha256:aa"));

        let mut requested = manifest("m", 1, json!({}));
        requested.metadata.annotations = Some([("larder.dev/requestedAt".to_owned(), "now".to_owned())].into());
        index.manifest(requested);
        answer(&mut index, "n1", json!({}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(
            (ready(&status), &status.last_handled_reconcile_at),
            (("False", "Building"), &None)
        );
        answer(&mut index, "n1", json!({"requestedAt": "now"}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(
            (ready(&status).0, status.last_handled_reconcile_at.as_deref()),
            ("True", Some("now"))
        );
    }

    #[test]
    fn an_answer_about_another_object_of_the_name_does_not_count() {
        let mut index = world();
        answer(&mut index, "n1", json!({"uid": "uid-of-its-predecessor"}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!((ready(&status), &status.digest), (("False", "Building"), &None));
    }

    #[test]
    fn nodes_that_cannot_be_reached_do_not_hold_up_ready() {
        let mut index = world();
        index.node(node("n2", &[]));
        index.lease(lease("n2", 1), now());
        answer(&mut index, "n1", json!({}));
        assert_eq!(
            ready(&plan(&index, &key("m"), at_zero()).unwrap()),
            ("False", "Building")
        );
        index.node(not_ready("n2"));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(ready(&status), ("True", "Stored"));
        assert_eq!(
            status.nodes.unwrap(),
            NodeCounts {
                desired: 2,
                ready: 1,
                failed: 0,
                unreachable: 1,
                summary: "1/2".into()
            }
        );
        index.node(not_ready("n1"));
        assert_eq!(
            ready(&plan(&index, &key("m"), at_zero()).unwrap()),
            ("False", "NodesUnreachable")
        );
    }

    #[test]
    fn a_silent_agent_is_unreachable_by_the_controllers_own_clock() {
        let mut index = Index::default();
        let start = now();
        index.node(node("n1", &[]));
        // A renewal far in the future by the node's clock does not keep it alive.
        index.lease(lease("n1", 32_000_000_000), start);
        index.tick(start + crate::cluster::HEARTBEAT_DURATION);
        assert!(index.reachable("n1"));
        index.tick(start + crate::cluster::HEARTBEAT_DURATION + Index::TICK);
        assert!(!index.reachable("n1"));
    }

    #[test]
    fn no_selected_node_is_said_so() {
        let mut index = world();
        index.manifest(manifest("other", 1, json!({"nodeSelector": {"no": "where"}})));
        assert_eq!(
            ready(&plan(&index, &key("other"), at_zero()).unwrap()),
            ("False", "NoNodes")
        );
    }

    #[test]
    fn different_trees_have_no_common_digest_and_are_ready() {
        let mut index = world();
        index.node(node("n2", &[]));
        index.lease(lease("n2", 1), now());
        answer(&mut index, "n1", json!({}));
        answer(&mut index, "n2", json!({"digest": "sha256:bb", "addedBytes": 0}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(
            (ready(&status), status.digest.as_ref()),
            (("True", "DigestsDiffer"), None)
        );
        assert_eq!(status.saved_bytes, Some(2500), "the node that saved least counts");
        assert_eq!(status.exclusive_bytes, None, "no node has counted");

        answer(&mut index, "n1", json!({"exclusiveBytes": 700}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(status.exclusive.as_deref(), Some("700"));
        answer(&mut index, "n2", json!({"exclusiveBytes": 0}));
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(status.exclusive_bytes, Some(700), "the node that frees most counts");
    }

    #[test]
    fn failures_are_named_and_bounded() {
        let mut index = world();
        for i in 2..40 {
            index.node(node(&format!("n{i}"), &[]));
            index.lease(lease(&format!("n{i}"), 1), now());
        }
        for i in 1..40 {
            let fields = json!({"phase": "Failed", "reason": "SourceUnreadable", "message": "x".repeat(5000)});
            answer(&mut index, &format!("n{i}"), fields);
        }
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert_eq!(ready(&status), ("False", "SourceUnreadable"));
        assert!(
            is_true(&status.conditions, RECONCILING),
            "a failure that is retried is progress"
        );
        assert_eq!((status.failures.len(), status.nodes.as_ref().unwrap().failed), (10, 39));
        assert!(
            status
                .conditions
                .iter()
                .all(|condition| condition.message.len() <= MAX_MESSAGE)
        );
        assert!(serde_json::to_vec(&status).unwrap().len() < 16 * 1024);
        answer(
            &mut index,
            "n1",
            json!({"phase": "Stalled", "reason": "SourceNotAllowed", "message": "no"}),
        );
        let status = plan(&index, &key("m"), at_zero()).unwrap();
        assert!(is_true(&status.conditions, STALLED));
        assert_eq!(ready(&status), ("False", "SourceNotAllowed"));
    }

    #[test]
    fn an_object_that_does_not_decode_gets_a_condition_that_names_the_field() {
        let mut index = world();
        index.manifest(undecodable("bad"));
        let status = plan(&index, &key("bad"), at_zero()).unwrap();
        let ready = find(&status.conditions, READY).unwrap();
        assert_eq!(ready.reason, "InvalidSpec");
        assert!(
            ready.message.contains("spec.nodeSelector") && ready.message.contains("`5`"),
            "{}",
            ready.message
        );
    }

    #[test]
    fn a_plan_from_its_own_outcome_changes_nothing() {
        let mut index = world();
        answer(&mut index, "n1", json!({}));
        let first = plan(&index, &key("m"), Timestamp::from_second(100).unwrap()).unwrap();
        index.manifests.get_mut(&key("m")).unwrap().status = first.clone();
        assert_eq!(
            plan(&index, &key("m"), Timestamp::from_second(200).unwrap()).unwrap(),
            first
        );
    }
}
