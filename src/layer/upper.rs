//! Reading what a layer changed while it stays where it is.

use std::fs::File;
use std::sync::Arc;

use super::error::IoContext;
use super::lock::relock;
use super::{Error, Inner, LayerId, LayerRecord, Mode, Stage, mountinfo};

/// A prepared layer's upper folder, open for reading. The layer is not released while this lives.
pub struct Upper {
    pub record: LayerRecord,
    /// The folder that overlayfs writes changes into.
    pub folder: File,
    layers: Arc<Inner>,
}

impl Upper {
    /// Call with the layer's lock held.
    pub(super) fn open(layers: &Arc<Inner>, id: &LayerId) -> Result<Upper, Error> {
        let paths = layers.paths(id);
        let record = LayerRecord::read(&paths.folder, id)?.ok_or_else(|| Error::NotFound { id: id.clone() })?;
        if record.mode == Mode::ReadOnly {
            return Err(Error::ReadOnly { id: id.clone() });
        }
        let mounts = mountinfo::of_self().context("read", "/proc/self/mountinfo".as_ref())?;
        if record.stage != Stage::Made || !mounts.iter().any(|m| m.point == paths.mount) {
            return Err(Error::NotMounted { id: id.clone() });
        }
        let path = paths.changes(&record).join("upper");
        let folder = File::open(&path).context("open", &path)?;
        *relock(&layers.readers).entry(id.clone()).or_default() += 1;
        Ok(Upper {
            record,
            folder,
            layers: layers.clone(),
        })
    }
}

impl Drop for Upper {
    fn drop(&mut self) {
        let mut readers = relock(&self.layers.readers);
        if let Some(count) = readers.get_mut(&self.record.id) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.record.id);
            }
        }
    }
}
