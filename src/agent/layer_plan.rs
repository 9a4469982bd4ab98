//! What to do about one layer: pure decisions, and the blocking work that follows from them.

use super::layer_outcome::{Outcome, outcome, short};
use crate::api::conditions::reasons;
use crate::api::{
    Invalid, LAYER_FINALIZER, LayerMode, Owner, Parsed, Size, WritableLayer, WritableLayerStatus, truncate,
};
use crate::cluster::ObjectKey;
use crate::layer::{LayerId, LayerOwner, LayerRecord, LayerSpec, Layers, Lost, Mode};
use crate::store::TreeDigest;

/// Most of what another program said that an event repeats, in bytes; an event takes 1024.
const MAX_SAID: usize = 768;

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
    /// Whether its status is known, to be compared with and written over.
    pub decodes: bool,
}

impl Observed {
    /// Reads an object. Of one that is being deleted, only the metadata must decode: the rest is no matter for that.
    ///
    /// # Errors
    /// When it does not decode.
    pub fn of(object: Parsed<WritableLayer>) -> Result<Self, Invalid> {
        let metadata = object.metadata;
        let layer = match object.object {
            Err(_) if metadata.deletion_timestamp.is_some() => None,
            layer => Some(layer?),
        };
        let decodes = layer.is_some();
        let (spec, status) = layer.map(|layer| (layer.spec, layer.status)).unzip();
        let manifest = spec.as_ref().map(|spec| &*spec.manifest.name).unwrap_or_default();
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
            manifest: ObjectKey::new(metadata.namespace.unwrap_or_default(), manifest),
            mode: spec.as_ref().map(|spec| spec.mode).unwrap_or_default(),
            owner: spec.as_ref().and_then(|spec| spec.owner),
            size: spec.and_then(|spec| spec.size_limit),
            status: status.flatten().unwrap_or_default(),
            decodes,
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
    /// Read what the disk has of the layer.
    Recall {
        id: LayerId,
    },
}

/// What is known of a layer's record.
#[derive(Debug, Clone, Copy)]
pub enum Recorded<'a> {
    As(&'a LayerRecord),
    /// The disk has none.
    No,
    /// None was found, which may be because it could not be read.
    Unknown,
}

/// Decides about a layer. `released`: this agent has released it. `placed` is its manifest on this node: absent, not stored yet, or stored.
pub fn step(
    key: &ObjectKey,
    observed: &Observed,
    placed: Option<Option<TreeDigest>>,
    recorded: Recorded<'_>,
    store_id: &str,
    patience_ended: bool,
    released: bool,
) -> Step {
    let record = match recorded {
        Recorded::As(record) => Some(record),
        Recorded::No | Recorded::Unknown => None,
    };
    let Some(id) = observed.id() else {
        let message = format!("the object's UID {:?} is not a UUID", observed.uid);
        return Step::Say(Outcome::Stalled {
            reason: reasons::INVALID_SPEC,
            message,
        });
    };
    if observed.deleting {
        // Also without a record: one that cannot be read is none that is not there. Nothing to release is no error.
        if record.is_some() || (observed.held && !released) {
            return Step::Release {
                id,
                detach: patience_ended,
            };
        }
        return match observed.held {
            true => Step::Finalizers(&[]),
            false => Step::Nothing,
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
    // It was made here once. Over which tree, must be known before it is made over another one.
    if let (Recorded::Unknown, Some(_)) = (recorded, &observed.status.store_id) {
        return Step::Recall { id };
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

/// What came of preparing a layer.
pub struct Ended {
    pub outcome: Outcome,
    /// It is mounted, and was not before.
    pub anew: bool,
    /// What somebody should know of: reasons of events, and what they say.
    pub news: Vec<(&'static str, String)>,
}

/// Mounts a layer, and grows it if it is smaller than it should be. Blocks.
pub fn prepare(layers: &Layers, spec: &LayerSpec, grow: Option<u64>) -> Ended {
    let mut prepared = match layers.prepare(spec) {
        Ok(prepared) => prepared,
        Err(error) => {
            return Ended {
                outcome: outcome(error),
                anew: false,
                news: Vec::new(),
            };
        }
    };
    let mut refused = None;
    // Limits are whole blocks, so that a smaller difference is none.
    if let Some(size) = grow.filter(|size| prepared.size.is_none_or(|now| now / 4096 != size / 4096)) {
        match layers.grow(&spec.id, size) {
            Ok(()) => prepared.size = Some(size),
            Err(error) => refused = Some(Box::new(outcome(error))),
        }
    }
    let room = layers.room(&spec.id).ok();
    let mounted = Outcome::Mounted {
        tree: spec.tree,
        path: prepared.path.to_string_lossy().into_owned(),
        size: prepared.size,
        lost: prepared.lost == Some(Lost::Reboot),
        used: room.map(|room| room.used),
        short: room.and_then(|room| short(&room, None)),
        refused,
    };
    let found = prepared.found.map(|found| {
        let note = format!(
            "files were written at the layer's path while it was not mounted; they are in {} on the node now, and the pods \
             that wrote them must be started again to have the layer",
            found.display()
        );
        (reasons::FILES_FOUND, note)
    });
    let checked = prepared.checked.map(|said| {
        let note = format!(
            "the layer's own file system had an error, and was checked; files in it may be lost. e2fsck said: {}",
            truncate(&said, MAX_SAID)
        );
        (reasons::FILE_SYSTEM_CHECKED, note)
    });
    Ended {
        outcome: mounted,
        anew: !prepared.reused,
        news: found.into_iter().chain(checked).collect(),
    }
}

/// Unmounts a layer and removes its data. Blocks.
pub fn release(layers: &Layers, id: &LayerId, detach: bool) -> Outcome {
    match layers.release(id, detach) {
        Ok(()) => Outcome::Released,
        Err(error) => outcome(error),
    }
}

#[cfg(test)]
pub(super) mod tests;
