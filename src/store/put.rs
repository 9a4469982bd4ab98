//! Contents without a tree.

use super::disk::Step;
use super::{Build, Error};

impl Build {
    /// Stores what was put, durably, without a tree that names it, and returns how many bytes that added. A collection
    /// takes contents that nothing names when they are no longer fresh.
    ///
    /// In the order of a publish: what is stored is durable before it gets its name (see `publish.rs`).
    pub fn store_contents(self) -> Result<u64, Error> {
        self.check()?;
        if self.has_staged() {
            self.sync(Step::StagedSync)?;
        }
        let added = self.name_blobs()?;
        // Also if nothing is new: another build may have given a content that was found its name just now.
        self.sync(Step::NamedSync)?;
        Ok(added)
    }
}
