//! What to do about one layer: pure decisions, and the blocking work that follows from them.

use std::io::ErrorKind;

use jiff::Timestamp;

use crate::api::conditions::{NEARLY_FULL, Verdict, Wanted, merge, reasons};
use crate::api::{
    Invalid, LAYER_FINALIZER, LayerMode, Owner, Parsed, Size, WritableLayer, WritableLayerStatus, human_size, int64,
};
use crate::cluster::ObjectKey;
use crate::layer::{self, LayerId, LayerOwner, LayerRecord, LayerSpec, Layers, Lost, Mode};
use crate::store::{self, TreeDigest};

/// A WritableLayer as the API server has it.
#[derive(Debug, Clone)]
pub struct Observed {
    pub uid: String,
    pub resource_version: String,
    pub generation: i64,
    pub deleting: bool,
    /// The agent's finalizer is on it.
    pub held: bool,
    pub manifest: ObjectKey,
    pub mode: LayerMode,
    pub size: Option<Size>,
    pub owner: Option<Owner>,
    pub status: WritableLayerStatus,
}

impl Observed {
    /// Reads an object.
    ///
    /// # Errors
    /// When it does not decode.
    pub fn of(object: Parsed<WritableLayer>) -> Result<Self, Invalid> {
        let layer = object.object?;
        let metadata = object.metadata;
        Ok(Self {
            uid: metadata.uid.unwrap_or_default(),
            resource_version: metadata.resource_version.unwrap_or_default(),
            generation: metadata.generation.unwrap_or_default(),
            deleting: metadata.deletion_timestamp.is_some(),
            held: metadata
                .finalizers
                .iter()
                .flatten()
                .any(|finalizer| finalizer == LAYER_FINALIZER),
            manifest: ObjectKey::new(metadata.namespace.unwrap_or_default(), layer.spec.manifest.name),
            mode: layer.spec.mode,
            size: layer.spec.size_limit,
            owner: layer.spec.owner,
            status: layer.status.unwrap_or_default(),
        })
    }

    /// The layer's name on the disk: its UID.
    pub fn id(&self) -> Option<LayerId> {
        self.uid.parse().ok()
    }
}

/// What to do now.
#[derive(Debug, PartialEq)]
pub enum Step {
    Nothing,
    Say(Outcome),
    /// Set the agent's finalizers to these.
    Finalizers(&'static [&'static str]),
    Prepare {
        spec: Box<LayerSpec>,
        grow: Option<u64>,
    },
    Release {
        id: LayerId,
        detach: bool,
    },
}

/// How a layer stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Mounted {
        tree: TreeDigest,
        path: String,
        size: Option<u64>,
        lost: bool,
        used: Option<u64>,
        nearly_full: bool,
    },
    Waiting {
        reason: &'static str,
        message: String,
    },
    Failed {
        reason: &'static str,
        message: String,
    },
    Stalled {
        reason: &'static str,
        message: String,
    },
    Released,
}

/// Decides about a layer. `placed` is its manifest on this node: absent, not stored yet, or stored.
pub fn step(
    key: &ObjectKey,
    observed: &Observed,
    placed: Option<Option<TreeDigest>>,
    record: Option<&LayerRecord>,
    store_id: &str,
    patience_ended: bool,
) -> Step {
    let Some(id) = observed.id() else {
        let message = format!("the object's UID {:?} is not a UUID", observed.uid);
        return Step::Say(Outcome::Stalled {
            reason: reasons::INVALID_SPEC,
            message,
        });
    };
    if observed.deleting {
        return match (record, observed.held) {
            (Some(_), _) => Step::Release {
                id,
                detach: patience_ended,
            },
            (None, true) => Step::Finalizers(&[]),
            (None, false) => Step::Nothing,
        };
    }
    // Before the finalizer: the API server takes no write to an object that breaks its schema, and nothing is made yet.
    let size = match observed.size.as_ref().map(Size::bytes).transpose() {
        Ok(size) => size,
        Err(invalid) => {
            let message = format!("spec.sizeLimit: {invalid}");
            return Step::Say(Outcome::Stalled {
                reason: reasons::INVALID_SPEC,
                message,
            });
        }
    };
    if !observed.held {
        return Step::Finalizers(super::layers::HELD);
    }
    let other_store = observed.status.store_id.as_ref().filter(|known| *known != store_id);
    if let (Some(known), None) = (other_store, record) {
        let message = format!(
            "the layer's data was in store {known}, and this node's disk has store {store_id} now; \
             delete the layer and make a new one"
        );
        return Step::Say(Outcome::Stalled {
            reason: reasons::DATA_LOST,
            message,
        });
    }
    // A layer keeps the tree that it was made over, also when its manifest is built anew or deleted.
    let tree = match (record, placed) {
        (Some(record), _) => record.tree,
        (None, Some(Some(tree))) => tree,
        (None, Some(None)) => {
            let message = format!("CasManifest {} is not stored on this node yet", observed.manifest);
            return Step::Say(Outcome::Waiting {
                reason: reasons::MANIFEST_NOT_READY,
                message,
            });
        }
        (None, None) => {
            let message = format!(
                "CasManifest {} is not placed on this node: it does not exist, or its nodeSelector does not select the node",
                observed.manifest
            );
            return Step::Say(Outcome::Waiting {
                reason: reasons::NOT_PLACED,
                message,
            });
        }
    };
    let spec = LayerSpec {
        id,
        owner: LayerOwner::object(&key.namespace, &key.name),
        tree,
        mode: match observed.mode {
            LayerMode::Overlay => Mode::Overlay,
            LayerMode::Tmpfs => Mode::Tmpfs,
        },
        size,
        ids: observed.owner.map(|owner| (owner.uid, owner.gid)),
    };
    Step::Prepare {
        spec: Box::new(spec),
        grow: size.filter(|_| record.is_some()),
    }
}

/// Mounts a layer, and grows it if it is smaller than it should be. Tells also whether it was not mounted before.
/// Blocks.
pub fn prepare(layers: &Layers, spec: &LayerSpec, grow: Option<u64>) -> (Outcome, bool) {
    let mut prepared = match layers.prepare(spec) {
        Ok(prepared) => prepared,
        Err(error) => return (outcome(error), false),
    };
    // Limits are whole blocks, so that a smaller difference is none.
    if let Some(size) = grow.filter(|size| prepared.size.is_some_and(|now| now / 4096 < size / 4096)) {
        match layers.grow(&spec.id, size) {
            Ok(()) => prepared.size = Some(size),
            Err(error) => return (outcome(error), false),
        }
    }
    let used = layers.used_bytes(&spec.id).ok();
    let mounted = Outcome::Mounted {
        tree: spec.tree,
        path: prepared.path.to_string_lossy().into_owned(),
        size: prepared.size,
        lost: prepared.lost == Some(Lost::Reboot),
        used,
        nearly_full: used.is_some_and(|used| nearly_full(used, prepared.size, false)),
    };
    (mounted, !prepared.reused)
}

/// Unmounts a layer and removes its data. Blocks.
pub fn release(layers: &Layers, id: &LayerId, detach: bool) -> Outcome {
    match layers.release(id, detach) {
        Ok(()) => Outcome::Released,
        Err(error) => outcome(error),
    }
}

fn outcome(error: layer::Error) -> Outcome {
    use layer::Error;
    let message = error.to_string();
    match error {
        Error::DataLost { .. } => Outcome::Stalled {
            reason: reasons::DATA_LOST,
            message,
        },
        Error::InUse { .. } => Outcome::Waiting {
            reason: reasons::IN_USE,
            message,
        },
        Error::Immutable { .. }
        | Error::InvalidId(_)
        | Error::Shrink { .. }
        | Error::TooSmall { .. }
        | Error::Unlimited { .. } => Outcome::Stalled {
            reason: reasons::INVALID_SPEC,
            message,
        },
        Error::Store(store::Error::MissingManifest { .. }) => Outcome::Waiting {
            reason: reasons::MANIFEST_NOT_READY,
            message,
        },
        Error::Store(error) if error.is_disk_full() => Outcome::Failed {
            reason: reasons::DISK_FULL,
            message,
        },
        // There was no room for the image, or for the layer's own file.
        Error::Io { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Outcome::Failed {
                reason: reasons::DISK_FULL,
                message,
            }
        }
        _ => Outcome::Failed {
            reason: reasons::MOUNT_FAILED,
            message,
        },
    }
}

/// The use to report: it moves in steps of a tenth of the limit (of 64 MiB where there is none), so that a busy layer
/// does not write to the API server all the time.
pub fn threshold(bytes: u64, limit: Option<u64>, reported: Option<u64>) -> Option<u64> {
    let step = limit.map_or(64 << 20, |limit| (limit / 10).max(1));
    match reported {
        Some(reported) if reported / step == bytes / step => Some(reported),
        _ => Some(bytes),
    }
}

/// Whether to say that little is left: from nine tenths of the limit on, and until a twentieth less is used, so that a
/// layer at the mark does not say it again and again.
pub fn nearly_full(bytes: u64, limit: Option<u64>, said: bool) -> bool {
    let percent = if said { 85 } else { 90 };
    limit.is_some_and(|limit| u128::from(bytes) * 100 >= u128::from(limit) * percent)
}

impl Outcome {
    /// What Ready says of it.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Mounted { lost: true, .. } => Verdict::Ready {
                reason: reasons::RESET_BY_REBOOT,
                message: "mounted, and empty: what was written before the node's reboot was in memory".to_owned(),
            },
            Self::Mounted { .. } => Verdict::Ready {
                reason: reasons::MOUNTED,
                message: "mounted".to_owned(),
            },
            Self::Waiting { reason, message } | Self::Failed { reason, message } => Verdict::Progressing {
                reason,
                message: message.clone(),
            },
            Self::Stalled { reason, message } => Verdict::Stalled {
                reason,
                message: message.clone(),
            },
            Self::Released => Verdict::Progressing {
                reason: reasons::RELEASING,
                message: "unmounted; its data is removed".to_owned(),
            },
        }
    }

    /// Every condition of it.
    fn conditions(&self) -> Vec<Wanted> {
        let mut conditions = self.verdict().conditions();
        if let Self::Mounted {
            nearly_full: true,
            size: Some(size),
            used: Some(used),
            ..
        } = self
        {
            conditions.push(Wanted {
                kind: NEARLY_FULL,
                status: true,
                reason: reasons::SPACE_USED,
                message: format!(
                    "{} of {} are used; at the limit, writing fails with ENOSPC: raise spec.sizeLimit or delete files in the layer",
                    human_size(*used),
                    human_size(*size)
                ),
            });
        }
        conditions
    }

    /// Takes note of how many bytes are used now.
    pub fn note_use(&mut self, bytes: u64) {
        if let Self::Mounted {
            used,
            size,
            nearly_full: full,
            ..
        } = self
        {
            let full_now = nearly_full(bytes, *size, *full);
            *used = match full_now == *full {
                true => threshold(bytes, *size, *used),
                // With the news comes the figure.
                false => Some(bytes),
            };
            *full = full_now;
        }
    }

    /// Whether the agent is to try again by itself, without a change of the object or its manifest.
    pub fn again(&self) -> bool {
        match self {
            Self::Failed { .. } => true,
            Self::Waiting { reason, .. } => *reason == reasons::IN_USE,
            _ => false,
        }
    }

    /// The status that says so. What is known of the data stays until it is known otherwise.
    pub fn status(&self, observed: &Observed, store_id: &str, now: Timestamp) -> WritableLayerStatus {
        let old = &observed.status;
        let conditions = merge(&old.conditions, self.conditions(), observed.generation, now);
        let kept = WritableLayerStatus {
            observed_generation: observed.generation,
            conditions,
            ..old.clone()
        };
        match self {
            Self::Mounted {
                tree, path, size, used, ..
            } => WritableLayerStatus {
                digest: Some(tree.to_string()),
                path: Some(path.clone()),
                size_limit: Some(size.map_or_else(|| "none".to_owned(), human_size)),
                used_bytes: used.map(int64),
                store_id: Some(store_id.to_owned()),
                ..kept
            },
            Self::Released => WritableLayerStatus {
                path: None,
                used_bytes: None,
                ..kept
            },
            _ => kept,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::conditions::find;
    use serde_json::json;

    const UID: &str = "6f1ed002-ab59-4a7c-8a5d-0123456789ab";

    fn observed(change: serde_json::Value) -> Observed {
        let mut object = json!({
            "metadata": {"name": "l", "namespace": "ns", "uid": UID, "generation": 1, "resourceVersion": "1",
                         "finalizers": ["larder.dev/layer"]},
            "spec": {"manifest": {"name": "m"}, "nodeName": "n", "sizeLimit": "1Gi"}
        });
        for (part, fields) in change.as_object().unwrap() {
            for (field, value) in fields.as_object().unwrap() {
                object[part][field] = value.clone();
            }
        }
        Observed::of(serde_json::from_value(object).unwrap()).unwrap()
    }

    fn decide(observed: &Observed, placed: Option<Option<TreeDigest>>) -> Step {
        step(&ObjectKey::new("ns", "l"), observed, placed, None, "store-1", false)
    }

    fn reason(step: Step) -> &'static str {
        match step {
            Step::Say(outcome) => outcome.verdict().reason(),
            other => panic!("expected words, got {other:?}"),
        }
    }

    #[test]
    fn a_layer_is_held_before_anything_is_made() {
        let tree = TreeDigest::from_bytes([7; 32]);
        let free = observed(json!({"metadata": {"finalizers": []}}));
        assert_eq!(decide(&free, Some(Some(tree))), Step::Finalizers(&["larder.dev/layer"]));
        let Step::Prepare { spec, grow } = decide(&observed(json!({})), Some(Some(tree))) else {
            panic!()
        };
        assert_eq!((spec.tree, spec.size, grow), (tree, Some(1 << 30), None));
        assert_eq!(spec.id.as_str(), UID);
    }

    #[test]
    fn a_layer_waits_for_its_tree_and_says_for_what() {
        assert_eq!(reason(decide(&observed(json!({})), None)), "NotPlaced");
        assert_eq!(reason(decide(&observed(json!({})), Some(None))), "ManifestNotReady");
    }

    #[test]
    fn a_wiped_disk_is_said_and_not_silently_filled_anew() {
        let lost = observed(json!({"status": {"observedGeneration": 1, "storeId": "store-0"}}));
        assert_eq!(
            reason(decide(&lost, Some(Some(TreeDigest::from_bytes([7; 32]))))),
            "DataLost"
        );
    }

    #[test]
    fn a_deleted_layer_without_data_loses_its_finalizer_only() {
        let deleted = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        assert_eq!(decide(&observed(deleted.clone()), None), Step::Finalizers(&[]));
        let mut other = deleted;
        other["metadata"]["finalizers"] = json!(["other/one"]);
        assert_eq!(decide(&observed(other), None), Step::Nothing);
    }

    #[test]
    fn a_bad_size_that_is_stored_is_named() {
        let Step::Say(outcome) = decide(&observed(json!({"spec": {"sizeLimit": {"a": 1}}})), Some(None)) else {
            panic!()
        };
        assert!(outcome.verdict().message().contains("spec.sizeLimit"), "{outcome:?}");
    }

    #[test]
    fn use_is_reported_in_tenths_of_the_limit() {
        assert_eq!(threshold(5, Some(100), None), Some(5));
        assert_eq!(threshold(9, Some(100), Some(5)), Some(5));
        assert_eq!(threshold(11, Some(100), Some(5)), Some(11));
    }

    #[test]
    fn a_layer_says_when_little_is_left_and_takes_it_back_a_twentieth_later() {
        let mut outcome = Outcome::Mounted {
            tree: TreeDigest::from_bytes([7; 32]),
            path: "/x".into(),
            size: Some(1 << 30),
            lost: false,
            used: Some(1 << 20),
            nearly_full: false,
        };
        let percent = |percent: u64| (1u64 << 30) / 100 * percent + 99;
        let mut observed = observed(json!({}));
        for (used, says) in [
            (89, None),
            (90, Some("922Mi of 1Gi are used")),
            (86, Some("881Mi of 1Gi are used")),
            (84, None),
            (100, Some("1Gi of 1Gi are used")),
        ] {
            outcome.note_use(percent(used));
            observed.status = outcome.status(&observed, "s", Timestamp::from_second(10).unwrap());
            let full = find(&observed.status.conditions, NEARLY_FULL);
            assert_eq!(full.is_some(), says.is_some(), "{used} percent: {full:?}");
            if let (Some(full), Some(says)) = (full, says) {
                assert_eq!((&*full.status, &*full.reason), ("True", "SpaceUsed"));
                assert!(full.message.starts_with(says), "{used} percent: {}", full.message);
            }
        }
        assert!(!nearly_full(u64::MAX, None, true), "without a limit nothing is full");
    }

    #[test]
    fn a_status_from_its_own_outcome_changes_nothing() {
        let outcome = Outcome::Mounted {
            tree: TreeDigest::from_bytes([7; 32]),
            path: "/x".into(),
            size: None,
            lost: false,
            used: Some(1),
            nearly_full: false,
        };
        let mut observed = observed(json!({}));
        let first = outcome.status(&observed, "s", Timestamp::from_second(10).unwrap());
        observed.status = first.clone();
        assert_eq!(
            outcome.status(&observed, "s", Timestamp::from_second(99).unwrap()),
            first
        );
    }
}
