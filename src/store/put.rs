//! Contents without a tree.

use std::sync::Arc;

use super::disk::Step;
use super::files::lock;
use super::leases::BuildLeases;
use super::{Build, Error};

/// How far a build is, for whoever watches it. Made by [`Build::progress`].
pub struct BuildProgress(Arc<BuildLeases>);

impl BuildProgress {
    /// How many distinct contents were put or found so far.
    pub fn contents(&self) -> u64 {
        self.0.tables.iter().map(|table| lock(table).len() as u64).sum()
    }
}

impl Build {
    pub fn progress(&self) -> BuildProgress {
        BuildProgress(self.leases.clone())
    }

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
