//! What the controller says and does about a WritableLayer whose node cannot speak for it.

use jiff::Timestamp;

use super::index::Index;
use crate::api::WritableLayerStatus;
use crate::api::conditions::{Verdict, merge, reasons};
use crate::cluster::ObjectKey;

/// What to do about a layer.
#[derive(Debug, PartialEq)]
pub enum LayerPlan {
    /// Its agent speaks for it.
    Keep,
    /// Write this status over the agent's; the agent takes it back when it returns.
    Say(Box<WritableLayerStatus>),
    /// It is being deleted and its node does not exist: drop the agent's finalizer, once the API server has confirmed
    /// that the Node is not found.
    Drop { node: String },
}

/// The plan for a layer.
pub fn plan(index: &Index, key: &ObjectKey, now: Timestamp) -> LayerPlan {
    let Some(layer) = index.layers.get(key) else {
        return LayerPlan::Keep;
    };
    let verdict = match (&layer.invalid, &layer.node) {
        (Some(invalid), _) => Verdict::Stalled {
            reason: reasons::INVALID_SPEC,
            message: invalid.to_string(),
        },
        (None, None) => return LayerPlan::Keep,
        (None, Some(node)) if !index.nodes.contains_key(node) => {
            if layer.meta.deleting && layer.held {
                return LayerPlan::Drop { node: node.clone() };
            }
            Verdict::Stalled {
                reason: reasons::NODE_NOT_FOUND,
                message: format!("node {node} does not exist"),
            }
        }
        (None, Some(node)) if !index.reachable(node) => {
            let message = format!("node {node} is not ready, or its larder agent is silent");
            Verdict::Progressing {
                reason: reasons::NODE_UNREACHABLE,
                message,
            }
        }
        _ => return LayerPlan::Keep,
    };
    let old = &layer.status;
    let conditions = merge(&old.conditions, verdict.conditions(), layer.meta.generation, now);
    if conditions == old.conditions {
        return LayerPlan::Keep;
    }
    // All that the agent said of the data still holds.
    LayerPlan::Say(Box::new(WritableLayerStatus {
        observed_generation: layer.meta.generation,
        conditions,
        ..old.clone()
    }))
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::api::conditions::{READY, find};

    fn key() -> ObjectKey {
        ObjectKey::new("ns", "l")
    }

    fn said(index: &Index) -> String {
        match plan(index, &key(), Timestamp::UNIX_EPOCH) {
            LayerPlan::Say(status) => find(&status.conditions, READY).unwrap().reason.clone(),
            other => panic!("expected words, got {other:?}"),
        }
    }

    #[test]
    fn the_agent_speaks_for_its_layers_while_it_can() {
        let mut index = world();
        index.layer(layer("l", "n1"));
        assert_eq!(plan(&index, &key(), Timestamp::UNIX_EPOCH), LayerPlan::Keep);
        index.node(not_ready("n1"));
        assert_eq!(said(&index), "NodeUnreachable");
    }

    #[test]
    fn what_was_said_once_is_not_written_again() {
        let mut index = world();
        index.layer(layer("l", "n9"));
        assert_eq!(said(&index), "NodeNotFound");
        let LayerPlan::Say(status) = plan(&index, &key(), Timestamp::UNIX_EPOCH) else {
            panic!()
        };
        index.layers.get_mut(&key()).unwrap().status = *status;
        assert_eq!(
            plan(&index, &key(), Timestamp::from_second(99).unwrap()),
            LayerPlan::Keep
        );
    }

    #[test]
    fn only_a_deleted_layer_on_a_node_that_is_gone_loses_its_finalizer() {
        let mut index = world();
        let mut deleted = layer("l", "n1");
        deleted.metadata.finalizers = Some(vec!["larder.dev/layer".into(), "other/one".into()]);
        deleted.metadata.deletion_timestamp = serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap();
        index.layer(deleted);
        assert_eq!(plan(&index, &key(), Timestamp::UNIX_EPOCH), LayerPlan::Keep);
        index.node(not_ready("n1"));
        assert_eq!(said(&index), "NodeUnreachable");
        index.node_gone("n1", "another-uid");
        assert_eq!(said(&index), "NodeUnreachable");
        index.node_gone("n1", "uid-n1");
        assert_eq!(
            plan(&index, &key(), Timestamp::UNIX_EPOCH),
            LayerPlan::Drop { node: "n1".into() }
        );
    }
}
