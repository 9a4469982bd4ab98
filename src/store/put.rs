//! Contents without a tree.

use super::disk::Step;
use super::files::lock;
use super::{Blob, Build, Digest, Error};

impl Build {
    /// Stores what was put, durably, without a tree that names it, and returns how many bytes that added. A collection
    /// takes contents that nothing names when they are no longer fresh.
    ///
    /// In the order of a publish: what is stored is durable before it gets its name (see `publish.rs`). Fails with
    /// [`Error::MissingBlob`] if a content that was found present was quarantined meanwhile.
    pub fn store_contents(self) -> Result<u64, Error> {
        self.check()?;
        let mut moved = *self.store.not_moving();
        let tables = self.leases.tables.iter();
        let put: Vec<Digest> = tables
            .flat_map(|table| lock(table).keys().copied().collect::<Vec<_>>())
            .collect();
        if self.has_staged() {
            self.sync(Step::StagedSync)?;
        }
        let added = self.name_blobs()?;
        loop {
            // Also if nothing is new: another build may have given a content that was found its name just now.
            self.sync(Step::NamedSync)?;
            let now = *self.store.not_moving();
            if now == moved {
                return Ok(added);
            }
            moved = now;
            for digest in &put {
                self.find(digest)?.ok_or(Error::MissingBlob { digest: *digest })?;
            }
        }
    }

    /// Forgets something that was put: it is not what was wanted. It must not have been put twice.
    pub fn forget(&self, blob: &Blob) -> Result<(), Error> {
        let leased = lock(self.leases.table(&blob.digest)).remove(&blob.digest);
        match leased {
            Some(leased) if leased.staged != 0 => self.discard(leased.staged),
            _ => Ok(()),
        }
    }
}
