//! Listing `objects/`.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;

use rustix::fs::Stat;
use rustix::io::Errno;

use super::layout::{Count, Folder, object_digest, shard_path};
use super::{Digest, Error, files};

/// The objects whose digest begins with one byte, as they were when the folder was listed.
pub(super) struct Objects<'a> {
    store: &'a Folder,
    path: String,
    dir: OwnedFd,
    objects: Vec<(Digest, CString)>,
}

impl Folder {
    /// Lists one shard. Names that are not the store's are passed over.
    pub fn list_shard(&self, byte: u8) -> Result<Option<Objects<'_>>, Error> {
        let path = shard_path(byte);
        let error = |e: Errno| Error::io("list", self.path(&path), e);
        let dir = match files::open_dir(&self.dir, path.as_str()) {
            Err(Errno::NOENT) => return Ok(None),
            other => other.map_err(error)?,
        };
        let names = files::names(&dir).map_err(error)?.into_iter();
        let objects = names
            .filter_map(|(name, _)| Some((object_digest(byte, &name)?, name)))
            .collect();
        Ok(Some(Objects {
            store: self,
            path,
            dir,
            objects,
        }))
    }

    /// Counts the objects of one shard.
    pub fn count_shard(&self, byte: u8) -> Result<Count, Error> {
        let mut count = Count::default();
        let Some(shard) = self.list_shard(byte)? else {
            return Ok(count);
        };
        for (_, name) in shard.iter() {
            if let Some(stat) = shard.stat(name)? {
                count.blobs += 1;
                count.bytes += stat.st_size.max(0) as u64;
            }
        }
        Ok(count)
    }
}

impl Objects<'_> {
    /// Digests and names in the folder, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Digest, &CStr)> {
        self.objects.iter().map(|(digest, name)| (*digest, name.as_c_str()))
    }

    /// `None` for one that is gone meanwhile.
    pub fn stat(&self, name: &CStr) -> Result<Option<Stat>, Error> {
        files::stat(&self.dir, name).map_err(|e| {
            Error::io(
                "look at",
                self.store.path(&self.path).join(name.to_string_lossy().as_ref()),
                e,
            )
        })
    }
}
