//! Removing a blob while builds go on.
//!
//! Removing a file can wait for the file system's journal, for half a second and more when much is removed, and a lock
//! held meanwhile would be waited for by every build. So the shard's lock is only taken to note that a blob is leaving,
//! and to note that it has left. Meanwhile it counts as gone: whoever puts it stages it anew, and only giving it its
//! name waits until the old one has left.

use std::sync::MutexGuard;

use rustix::io::Errno;

use super::disk::Step;
use super::files::{self, lock};
use super::layout::{Inner, Shard, object_path};
use super::{Digest, Error};

/// A blob that is about to be removed. It counts as there again when this is dropped.
pub(super) struct Leaving<'a> {
    store: &'a Inner,
    digest: Digest,
}

impl Inner {
    /// Has a blob leave, unless a build has leased it: `None`. Call with `collecting` held: one leaves at a time.
    pub fn leave(&self, digest: &Digest) -> Option<Leaving<'_>> {
        let mut shard = lock(self.shard(digest));
        // Under the lock: a build that is not among them looks for its first blob here only after this.
        if self.leases.builds().iter().any(|build| build.has(digest)) {
            return None;
        }
        shard.leaving = Some(*digest);
        Some(Leaving {
            store: self,
            digest: *digest,
        })
    }

    /// The shard of a blob that is to get its name, and that is not leaving.
    pub fn shard_to_name(&self, digest: &Digest) -> MutexGuard<'_, Shard> {
        files::lock_when(self.shard(digest), |shard| !shard.is_leaving(digest))
    }
}

impl Shard {
    /// Then it counts as gone.
    pub fn is_leaving(&self, digest: &Digest) -> bool {
        self.leaving.as_ref() == Some(digest)
    }
}

impl Leaving<'_> {
    /// Removes the file. `false` if there is none.
    pub fn remove(self, size: u64) -> Result<bool, Error> {
        let path = object_path(&self.digest);
        match files::unlink(Step::BlobRemove, &self.store.dir, path.as_str()) {
            Ok(()) => {
                Inner::count_removed(&mut lock(self.store.shard(&self.digest)), size);
                Ok(true)
            }
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(Error::io("remove", self.store.path(&path), error)),
        }
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        lock(self.store.shard(&self.digest)).leaving = None;
    }
}
