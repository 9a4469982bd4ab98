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

mod build;
mod cache;
mod digest;
mod disk;
mod error;
mod export;
mod files;
mod gc;
mod images;
mod layout;
mod leases;
mod manifests;
mod publish;
mod refs;
mod remove;
pub mod retention;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod time;
pub mod tree;
mod usage;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

pub use build::{Blob, Build};
pub use digest::{Digest, InvalidDigest, TreeDigest};
use disk::Step;
pub use error::{Error, Problem};
pub use gc::{Decision, DroppedHistory, Held, Holders, Kind, Report};
pub use leases::Hold;
pub use publish::Publish;
pub use refs::{Ref, RefName, Refs, Retired, Revision};
pub use remove::remove_all;
use tree::Tree;
pub use usage::Usage;

/// How a store is opened.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Bytes that builds leave free on the store's file system. A node's agent sets it above the kubelet's eviction
    /// threshold. 0 by default.
    pub reserved_free: u64,
}

/// An open store; clones share it. Only one process at a time has a store open.
#[derive(Clone)]
pub struct Store {
    inner: Arc<layout::Inner>,
}

impl Store {
    /// Opens a store, or makes one in a folder that does not exist or is empty (mode 0700), and empties `staging/`.
    ///
    /// Fails with [`Error::Locked`] while another process (or another handle) has it open; one that died is no
    /// obstacle. Fails with [`Error::NotAStore`] for a folder of something else.
    pub fn open(root: &Path, options: Options) -> Result<Store, Error> {
        let inner = Arc::new(layout::Inner::open(root, options)?);
        Ok(Store { inner })
    }

    /// The store's own id (a UUID), made with it: another id under the same path is another store.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Opens a content for reading. Fails with [`Error::MissingBlob`].
    pub fn read(&self, digest: &Digest) -> Result<File, Error> {
        let path = layout::object_path(digest);
        match disk::open_file(&self.inner.dir, path.as_str()) {
            Ok(file) => Ok(file),
            Err(Errno::NOENT) => Err(Error::MissingBlob { digest: *digest }),
            Err(error) => Err(Error::io("open", self.inner.path(&path), error)),
        }
    }

    /// Reads a tree's manifest and checks that it is that tree.
    pub fn load(&self, tree: &TreeDigest) -> Result<Tree, Error> {
        manifests::load(&self.inner, tree)
    }

    /// Keeps a tree with its blobs and images while the guard lives. Fails with [`Error::MissingManifest`] if it is
    /// not in the store (any more).
    pub fn hold(&self, tree: &TreeDigest) -> Result<Hold, Error> {
        Hold::take_stored(&self.inner, tree)
    }

    /// Where images of trees are: folders `<tree hex>[-variant].tree` and files `<tree hex>[-variant].erofs`, made
    /// under another name ([`Store::scratch`]) and renamed when whole. A collection removes those of trees that
    /// nothing holds, before their blobs.
    pub fn images_dir(&self) -> PathBuf {
        self.inner.path(layout::IMAGES)
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
