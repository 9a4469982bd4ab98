//! How much a store holds.

use serde::Serialize;

use super::layout::Count;
use super::{Error, Reader, Store, files, gc, images};

/// Counts, and bytes as the lengths of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    pub blobs: u64,
    pub blob_bytes: u64,
    pub manifests: u64,
    pub manifest_bytes: u64,
    pub images: u64,
    pub image_bytes: u64,
    /// Bytes free on the file system.
    pub free: u64,
}

impl Reader {
    /// Counts what the store holds. Looks at every blob.
    pub fn usage(&self) -> Result<Usage, Error> {
        let mut count = Count::default();
        for byte in 0..=255 {
            count.add(self.folder.count_shard(byte)?);
        }
        self.count(count)
    }

    fn count(&self, objects: Count) -> Result<Usage, Error> {
        let store = &self.folder;
        let manifests = gc::stored_manifests(store)?;
        let images = images::list(store)?;
        Ok(Usage {
            blobs: objects.blobs,
            blob_bytes: objects.bytes,
            manifests: manifests.len() as u64,
            manifest_bytes: manifests.iter().map(|manifest| manifest.size).sum(),
            images: images.len() as u64,
            image_bytes: images.iter().map(|image| image.size).sum(),
            free: files::available(&store.dir).map_err(|e| Error::io("ask for the free space of", &store.root, e))?,
        })
    }
}

impl Store {
    /// How many blobs there are, and their bytes. The first call looks at every blob; later ones know.
    pub fn blobs(&self) -> Result<(u64, u64), Error> {
        let Count { blobs, bytes } = self.inner.objects()?;
        Ok((blobs, bytes))
    }

    /// As [`Reader::usage`], with what [`Store::blobs`] knows.
    pub fn usage(&self) -> Result<Usage, Error> {
        self.count(self.inner.objects()?)
    }
}
