//! A build: putting contents into the store so that a tree of them can be published.
//!
//! What is put is written to the build's own folder in `staging/`; it gets its name under `objects/` only after a
//! sync has made it durable (see `publish.rs`). Dropping a build throws away what it staged.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;
use rustix::fs::OFlags;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::disk::{self, Reader, Step};
use super::files::{self, lock};
use super::large::Until;
use super::layout::{Inner, Shard, object_path};
use super::leases::{BuildLeases, Hold, Leased};
use super::tree::{Leaf, Tree};
use super::{Digest, Error, Store, TreeDigest, manifests, remove};

/// Contents up to this size are hashed in memory, so that one that is there already is never written.
const SMALL: usize = 1 << 20;
/// Zero blocks of this size are not written where the source has holes …
const FINE: usize = 4096;
/// … and of this size where nothing is known of the source.
const COARSE: usize = 1 << 16;

/// Something that was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Was it neither in the store nor in this build before?
    pub new: bool,
}

/// Work towards one tree. Many threads may put at once. Made by [`Store::build`].
///
/// Everything that is put or found is leased until the build is published or dropped: no collection removes it.
pub struct Build {
    pub(super) store: Arc<Inner>,
    pub(super) leases: Arc<BuildLeases>,
    /// `staging/<build>`.
    pub(super) path: String,
    /// Opened before the first write, so that `syncfs` on it reports every write error since then, once.
    pub(super) dir: OwnedFd,
    /// Number of the next staged file. 0 stands for "in the store already".
    next: AtomicU64,
    /// Has a write failed? Then nothing may be published.
    pub(super) failed: AtomicBool,
    /// Is it not known that blocks cannot be shared, and that the kernel cannot copy?
    pub(super) reflink: AtomicBool,
    pub(super) copy_in_kernel: AtomicBool,
    pub(super) kept: Mutex<Vec<Kept>>,
}

/// A tree whose contents may be named by the tree under way.
pub(super) struct Kept {
    _hold: Hold,
    /// Of all its files; sorted, and each once, when they are needed first: other work is done beside that.
    digests: Vec<Digest>,
    is_sorted: bool,
}

impl Kept {
    fn new(hold: Hold, leaves: &[Leaf]) -> Kept {
        let contents = leaves.iter().filter_map(Leaf::content);
        Kept {
            _hold: hold,
            digests: contents.map(|(digest, _)| *digest).collect(),
            is_sorted: false,
        }
    }

    /// Call before [`Kept::names`].
    pub fn sort(&mut self) {
        if !std::mem::replace(&mut self.is_sorted, true) {
            self.digests.par_sort_unstable_by_key(Digest::halves);
            self.digests.dedup();
        }
    }

    pub fn names(&self, digest: &Digest) -> bool {
        self.digests
            .binary_search_by_key(&digest.halves(), Digest::halves)
            .is_ok()
    }
}

impl Store {
    /// Begins a build. Fails with [`Error::DiskFull`] if less than the reserve is free.
    pub fn build(&self) -> Result<Build, Error> {
        let store = self.inner.clone();
        store.reserve(0)?;
        let path = store.staging_name("build");
        let error = |e: Errno| store.write_error(&path, 4096, e);
        files::ensure_dir(Step::BuildDir, &store.dir, &path).map_err(error)?;
        let dir = files::open_dir(&store.dir, path.as_str()).map_err(error)?;
        let leases = store.leases.begin_build();
        Ok(Build {
            leases,
            path,
            dir,
            next: AtomicU64::new(1),
            failed: AtomicBool::new(false),
            reflink: AtomicBool::new(true),
            copy_in_kernel: AtomicBool::new(true),
            kept: Mutex::default(),
            store,
        })
    }
}

impl Build {
    /// Keeps a tree until the build is published or dropped, so that its contents may be named without having been put
    /// or found. Naming them does not count as a use of each; the tree's does. Returns the tree's leaves, in the order
    /// of the manifest. Fails as [`Store::hold`] and [`Reader::load`](super::Reader::load) do.
    pub fn keep(&self, tree: &TreeDigest) -> Result<Vec<Leaf>, Error> {
        let hold = Hold::take_stored(&self.store, tree)?;
        let leaves = manifests::leaves(&self.store, tree)?;
        lock(&self.kept).push(Kept::new(hold, &leaves));
        Ok(leaves)
    }

    /// As [`Build::keep`], and returns the whole tree. That each digest has one size in it is checked by what publishes a
    /// tree that is made of it.
    pub fn keep_tree(&self, tree: &TreeDigest) -> Result<Tree, Error> {
        let hold = Hold::take_stored(&self.store, tree)?;
        let loaded = manifests::load_but_sizes(&self.store, tree)?;
        lock(&self.kept).push(Kept::new(hold, &loaded.leaves));
        Ok(loaded)
    }

    /// Stores what a reader gives until its end.
    ///
    /// Fails with [`Error::Source`] if the reader does (the build may go on), else the build is lost.
    pub fn put(&self, from: &mut dyn Read) -> Result<Blob, Error> {
        let mut head = Vec::new();
        from.take(SMALL as u64 + 1)
            .read_to_end(&mut head)
            .map_err(Error::Source)?;
        match head.len() > SMALL {
            false => self.put_small(&head, COARSE),
            true => self.put_stream(&mut head.as_slice().chain(from), COARSE),
        }
    }

    /// Stores a file's whole content, whatever the descriptor's position. Holes stay holes. The digest is that of the
    /// bytes that were stored, even if the file changes meanwhile. Fails as [`Build::put`] does.
    pub fn put_file(&self, from: &File) -> Result<Blob, Error> {
        self.put_file_until(from, &AtomicBool::new(false))
    }

    /// Bytes of the store's disk in all, without those that it reserves for root.
    pub fn disk_size(&self) -> Result<u64, Error> {
        let asked = |error| Error::io("ask for the size of the disk of", &self.store.root, error);
        files::total(&self.store.dir).map_err(asked)
    }

    /// As [`Build::put_file`]. Soon after `cancel` is set, however large the file is, it fails with [`Error::Cancelled`].
    pub fn put_file_until(&self, from: &File, cancel: &AtomicBool) -> Result<Blob, Error> {
        let put = self.put_opened(from, cancel);
        match put.is_err() && cancel.load(Ordering::Relaxed) {
            true => Err(Error::Cancelled),
            false => put,
        }
    }

    fn put_opened(&self, from: &File, cancel: &AtomicBool) -> Result<Blob, Error> {
        let stat = rustix::fs::fstat(from).map_err(|e| Error::Source(e.into()))?;
        let size = stat.st_size.max(0) as u64;
        let hole = match files::is_sparse(&stat) {
            true => FINE,
            false => 0,
        };
        let mut reader = Until {
            reader: Reader::new(Step::SourceRead, from),
            cancel,
        };
        if size > SMALL as u64 {
            return self.put_large(from, &stat, hole, cancel);
        }
        // One more than expected, so that the end is seen without growing the buffer.
        let mut head = Vec::with_capacity(size as usize + 1);
        let limit = SMALL as u64 + 1;
        reader
            .by_ref()
            .take(limit)
            .read_to_end(&mut head)
            .map_err(Error::Source)?;
        match head.len() > SMALL {
            false => self.put_small(&head, hole),
            true => self.put_stream(&mut head.as_slice().chain(reader), hole),
        }
    }

    /// Stores bytes.
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<Blob, Error> {
        match bytes.len() > SMALL {
            false => self.put_small(bytes, COARSE),
            true => self.put_stream(&mut { bytes }, COARSE),
        }
    }

    /// Is a content in the store, or in this build, already? Then it is leased, counts as used now, and its size is
    /// returned: compare it with the size that you expect.
    pub fn find(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        let size = {
            let shard = lock(self.store.shard(digest));
            let mut table = lock(self.leases.table(digest));
            if let Some(leased) = table.get(digest) {
                return Ok(Some(leased.size));
            }
            let Some(size) = self.there(&shard, digest)? else {
                return Ok(None);
            };
            table.insert(*digest, Leased { size, staged: 0 });
            size
        };
        self.touch(digest)?;
        Ok(Some(size))
    }

    fn put_small(&self, bytes: &[u8], hole: usize) -> Result<Blob, Error> {
        let digest = Digest::from_bytes(Sha256::digest(bytes).into());
        let size = bytes.len() as u64;
        let number = self.next_number();
        let new = self.claim(&digest, size, number)?;
        if new {
            self.guard(|| {
                self.store.reserve(size)?;
                let file = self.create(number)?;
                let written = files::write_at(Step::BlobWrite, file.as_fd(), bytes, 0, hole);
                written.map_err(|e| self.store.write_error(&self.path, size, e))?;
                self.set_length(&file, size)
            })?;
        }
        Ok(Blob { digest, size, new })
    }

    pub(super) fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Leases a blob. `true` if it must be staged, under `number`.
    ///
    /// A file that has another length than the content is not taken for it: the new copy will replace it.
    fn claim(&self, digest: &Digest, size: u64, number: u64) -> Result<bool, Error> {
        let new = {
            let shard = lock(self.store.shard(digest));
            let mut table = lock(self.leases.table(digest));
            if table.get(digest).is_some_and(|leased| leased.size == size) {
                return Ok(false);
            }
            let new = self.there(&shard, digest)? != Some(size);
            let staged = match new {
                true => number,
                false => 0,
            };
            table.insert(*digest, Leased { size, staged });
            new
        };
        if !new {
            self.touch(digest)?;
        }
        Ok(new)
    }

    /// Claims a blob that is staged already.
    pub(super) fn adopt(&self, digest: Digest, size: u64, number: u64) -> Result<Blob, Error> {
        let new = self.claim(&digest, size, number)?;
        if !new {
            self.discard(number)?;
        }
        Ok(Blob { digest, size, new })
    }

    /// The length of a blob's file, if it will stay when it is leased now.
    fn there(&self, shard: &Shard, digest: &Digest) -> Result<Option<u64>, Error> {
        match shard.is_leaving(digest) {
            true => Ok(None),
            false => self.stored(digest),
        }
    }

    /// The length of a blob's file. Call with the blob kept from collections.
    pub(super) fn stored(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        let path = object_path(digest);
        let stat = files::stat(&self.store.dir, path.as_str());
        let stat = stat.map_err(|e| Error::io("look for", self.store.path(&path), e))?;
        Ok(stat.filter(files::is_file).map(|stat| stat.st_size.max(0) as u64))
    }

    /// Notes that a blob is used now. Call with it leased, but not with the shard's lock held: a file system that is busy
    /// deleting may have this wait for its journal.
    fn touch(&self, digest: &Digest) -> Result<(), Error> {
        let path = object_path(digest);
        match files::touch(Step::BlobTouch, &self.store.dir, path.as_str()) {
            // A verification has found it damaged just now: the publish will miss it.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(Error::io("touch", self.store.path(&path), error)),
        }
    }

    pub(super) fn create(&self, number: u64) -> Result<File, Error> {
        let flags = OFlags::RDWR | OFlags::EXCL;
        let file = disk::create(Step::BlobCreate, &self.dir, number.to_string(), flags, 0o400);
        file.map_err(|e| self.store.write_error(&self.path, 4096, e))
    }

    /// A file that ends in a hole has its length set by hand.
    pub(super) fn set_length(&self, file: &File, size: u64) -> Result<(), Error> {
        let stat = rustix::fs::fstat(file).map_err(|e| Error::io("look at", self.store.path(&self.path), e))?;
        if stat.st_size.max(0) as u64 != size {
            let cut = disk::truncate(Step::BlobTruncate, file, size);
            cut.map_err(|e| self.store.write_error(&self.path, 4096, e))?;
        }
        Ok(())
    }

    pub(super) fn discard(&self, number: u64) -> Result<(), Error> {
        let removed = files::remove_file(Step::BlobDiscard, &self.dir, number.to_string());
        removed.map_err(|e| Error::io("remove a staged file of", self.store.path(&self.path), e))
    }

    /// Runs a write; if it fails, the build is lost.
    pub(super) fn guard<T>(&self, write: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        write().inspect_err(|_| self.failed.store(true, Ordering::Relaxed))
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        // A collection may take the blobs from here on; those of a published tree have their ref by now.
        self.store.leases.end_build(&self.leases);
        // Should it fail, the next start empties staging.
        let _ = remove::remove_tree(&self.store.dir, self.path.as_str());
    }
}
