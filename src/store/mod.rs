//! The node-local content-addressed store. Knows no Kubernetes and no mounts.
//!
//! What it promises:
//! - a name under `objects/` has whole, right bytes, whatever crashes (`publish.rs` has the order of syncs);
//! - a tree that a ref, a [`Hold`], a build or a [`Holders`] names keeps its manifest and all its blobs (`gc.rs`);
//! - what cannot be read is reported and stops deletion; it is never taken for absent.
//!
//! No database: the file system is the truth, and opening a store reads nothing but `larder.json`. Nothing outside
//! this module builds a path below `objects/`. All calls block. Whatever changes the disk is done by `disk/`, as a step
//! with a name.

mod analytics;
mod build;
mod cache;
mod digest;
mod disk;
mod error;
mod export;
mod fair;
mod files;
mod gc;
mod images;
mod index;
mod large;
mod layout;
mod leases;
mod leaving;
mod manifests;
mod pace;
mod publish;
mod put;
mod quarantine;
mod reader;
mod refs;
mod remove;
mod replace;
pub mod retention;
mod rm;
mod runs;
mod shards;
mod stored;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod time;
pub mod tree;
#[cfg(test)]
mod turns;
mod usage;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use analytics::{Amount, Analytics, Bucket, Damage, Dedup, FileOf, ManifestUse, RefUse, TopBlob};
pub use build::{Blob, Build};
pub use digest::{Digest, InvalidDigest, TreeDigest};
use disk::Step;
pub use error::{Error, Problem, path_text};
pub use export::ExportWatch;
pub use files::{is_settled, is_sparse, read_bounded};
pub use gc::{
    Collecting, Decision, DroppedHistory, Gone, Held, HeldTree, Holders, Kind, Removals, Report, StoredManifest,
    Unfinished,
};
pub use layout::object_name;
#[cfg(any(test, fuzzing))]
pub use layout::parse_config_id as parse_config;
pub use leases::Hold;
pub(crate) use pace::Pace;
pub use publish::Publish;
pub use quarantine::QUARANTINE_AGE;
pub use reader::{BlobInfo, Reader};
#[cfg(any(test, fuzzing))]
pub use refs::parse_ref;
pub use refs::{Ref, RefName, Refs, Retired, Revision};
pub use remove::remove_all;
pub use rm::{Needed, Removed};
#[cfg(any(test, fuzzing))]
pub use runs::parse_run;
pub use runs::{RunId, RunRecord, Runs};
pub use usage::Usage;
pub use verify::{BadBlob, BadManifest, Fault, HurtFile, HurtTree, Scope, Verification, VerifyOptions, VerifyProgress};

/// How a store is opened.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Bytes that builds leave free on the store's file system. A node's agent sets it above the kubelet's eviction
    /// threshold. 0 by default.
    pub reserved_free: u64,
}

/// An open store; clones share it. Only one process at a time has a store open.
///
/// It reads as a [`Reader`] does, by that one's methods.
#[derive(Clone)]
pub struct Store {
    inner: Arc<layout::Inner>,
    reader: Reader,
}

impl std::ops::Deref for Store {
    type Target = Reader;
    fn deref(&self) -> &Reader {
        &self.reader
    }
}

impl Store {
    /// Opens a store, or makes one in a folder that does not exist or is empty (mode 0700), and empties `staging/`.
    ///
    /// Fails with [`Error::Locked`] while another process (or another handle) has it open; one that died is no
    /// obstacle. Fails with [`Error::NotAStore`] for a folder of something else.
    pub fn open(root: &Path, options: Options) -> Result<Store, Error> {
        let inner = Arc::new(layout::Inner::open(root, options)?);
        let reader = Reader::new(inner.folder.clone());
        Ok(Store { inner, reader })
    }

    /// Keeps a tree with its blobs and images while the guard lives. Fails with [`Error::MissingManifest`] if it is
    /// not in the store (any more).
    pub fn hold(&self, tree: &TreeDigest) -> Result<Hold, Error> {
        Hold::take_stored(&self.inner, tree)
    }

    /// Is there room for so many bytes more, and for what stays free ([`Options::reserved_free`])?
    /// [`Error::DiskFull`] if not.
    pub fn check_room(&self, needed: u64) -> Result<(), Error> {
        self.inner.reserve(needed)
    }

    /// An empty folder on the store's file system, removed with all its content when dropped, and at the next start.
    pub fn scratch(&self) -> Result<Scratch, Error> {
        let name = self.inner.staging_name("scratch");
        files::ensure_dir(Step::ScratchDir, &self.inner.dir, &name)
            .map_err(|e| self.inner.write_error(&name, 4096, e))?;
        Ok(Scratch {
            path: self.inner.path(&name),
            name,
            store: self.inner.clone(),
        })
    }
}

/// A temporary folder. Made by [`Store::scratch`].
pub struct Scratch {
    store: Arc<layout::Inner>,
    name: String,
    path: PathBuf,
}

impl Scratch {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Should it fail, the next start empties staging.
        let _ = remove::remove_tree(&self.store.dir, self.name.as_str());
    }
}
