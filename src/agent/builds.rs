//! Building a tree: from a manifest's source into the store, on a blocking thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use super::plan::Failure;
use crate::api::conditions::reasons;
use crate::api::{ProjectedManifest, Source};
use crate::cluster::ObjectKey;
use crate::layer::{self, LayerId, Layers};
use crate::source::{self, Roots, ScanOptions};
use crate::store::{self, Publish, RefName, Store};

/// What builds need of the node.
#[derive(Clone)]
pub struct Builder {
    pub store: Store,
    pub layers: Layers,
    pub roots: Arc<Roots>,
}

/// The layers that are mounted on this node, by namespace and name.
pub type MountedLayers = HashMap<ObjectKey, LayerId>;

/// Why a build ended without a tree.
#[derive(Debug)]
pub enum Ended {
    Cancelled,
    Failed(Failure),
}

impl Builder {
    /// Reads the source and publishes the tree. Blocks for as long as the source is large.
    pub fn build(
        &self,
        manifest: &ProjectedManifest,
        mounted: &MountedLayers,
        cancel: &AtomicBool,
    ) -> Result<(), Ended> {
        let target = Publish {
            name: RefName::new(&manifest.namespace, &manifest.name).map_err(store_failure)?,
            owner: manifest.uid.clone(),
            generation: manifest.generation,
            request: manifest.requested_at.clone(),
            source: serde_json::to_value(&manifest.source).unwrap_or_default(),
            history_limit: manifest.revision_history_limit,
            now: SystemTime::now(),
        };
        let published = match &manifest.source {
            Source {
                directory: Some(directory),
                layer: None,
            } => {
                let folder = self
                    .roots
                    .open(&manifest.namespace, &directory.path)
                    .map_err(source_failure)?;
                let options = ScanOptions {
                    exclude: directory.exclude.clone(),
                    ..ScanOptions::default()
                };
                source::build_directory(&self.store, &folder, &options, target, cancel)
            }
            Source {
                directory: None,
                layer: Some(layer),
            } => {
                let id = mounted
                    .get(&ObjectKey::new(&manifest.namespace, &layer.name))
                    .ok_or_else(|| {
                        let message = format!("WritableLayer {} is not mounted on this node", layer.name);
                        failed(false, reasons::LAYER_NOT_READY, message)
                    })?;
                self.store.build().map_err(source::Error::from).and_then(|build| {
                    let tree = source::snapshot(&self.layers, id, &build, cancel)?;
                    Ok(build.publish(&tree, target)?)
                })
            }
            _ => {
                return Err(failed(
                    true,
                    reasons::INVALID_SPEC,
                    "exactly one source must be set".to_owned(),
                ));
            }
        };
        published.map(|_| ()).map_err(source_failure)
    }
}

fn failed(stalled: bool, reason: &'static str, message: String) -> Ended {
    Ended::Failed(Failure {
        stalled,
        reason,
        message,
    })
}

fn store_failure(error: store::Error) -> Ended {
    let reason = match &error {
        error if error.is_disk_full() => reasons::DISK_FULL,
        store::Error::InvalidTree(_) => return failed(true, reasons::SOURCE_UNSUPPORTED, error.to_string()),
        store::Error::Source(_) => reasons::SOURCE_UNREADABLE,
        _ => reasons::STORE_ERROR,
    };
    failed(false, reason, error.to_string())
}

fn source_failure(error: source::Error) -> Ended {
    use source::Error;
    let (stalled, reason) = match error {
        Error::Cancelled => return Ended::Cancelled,
        Error::Store(error) => return store_failure(error),
        Error::Layer(layer::Error::Store(error)) => return store_failure(error),
        Error::Layer(_) => (false, reasons::LAYER_NOT_READY),
        Error::InvalidPath { .. } | Error::InvalidGlob { .. } | Error::InvalidRoot { .. } => {
            (true, reasons::INVALID_SPEC)
        }
        Error::OutsideRoots { .. } | Error::Symlink { .. } | Error::MountPoint { .. } | Error::InsideStore { .. } => {
            (true, reasons::SOURCE_NOT_ALLOWED)
        }
        Error::Missing { .. } | Error::NotADirectory { .. } => (false, reasons::SOURCE_NOT_FOUND),
        Error::Unreadable { .. } | Error::Io { .. } => (false, reasons::SOURCE_UNREADABLE),
        Error::Changed { .. } => (false, reasons::SOURCE_CHANGED),
        Error::TooMany => (true, reasons::SOURCE_UNSUPPORTED),
    };
    failed(stalled, reason, error.to_string())
}
