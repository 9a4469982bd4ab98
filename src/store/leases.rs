//! What running work keeps from the garbage collector, in memory: the blobs of builds, and the trees of [`Hold`]s.
//!
//! While a collection runs nothing is forgotten: what was kept at any time since its mark began counts until its
//! sweep ends ("sticky"). Work that ended before the mark began has its ref on disk by then.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::disk::Step;
use super::files::{self, lock};
use super::layout::{Inner, manifest_path};
use super::{Digest, Error, TreeDigest};

/// A blob that a build stores or has found present.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leased {
    pub size: u64,
    /// The number of its file in the build's staging folder; 0 if it was in the store already.
    pub staged: u64,
}

/// The blobs of one build, by the first byte of the digest.
pub(super) struct BuildLeases {
    pub tables: Vec<Mutex<HashMap<Digest, Leased>>>,
}

impl BuildLeases {
    fn new() -> Self {
        Self {
            tables: (0..256).map(|_| Mutex::default()).collect(),
        }
    }

    pub fn table(&self, digest: &Digest) -> &Mutex<HashMap<Digest, Leased>> {
        &self.tables[usize::from(digest.as_bytes()[0])]
    }

    pub fn has(&self, digest: &Digest) -> bool {
        lock(self.table(digest)).contains_key(digest)
    }
}

#[derive(Default)]
pub(super) struct Leases(Mutex<State>);

#[derive(Default)]
struct State {
    builds: Vec<Arc<BuildLeases>>,
    trees: HashMap<TreeDigest, u32>,
    /// The tree of which something is being removed: who wants to hold it waits.
    dropping: Option<TreeDigest>,
    /// What ended since the mark of the running collection began.
    sticky: Option<Sticky>,
}

#[derive(Default)]
struct Sticky {
    builds: Vec<Arc<BuildLeases>>,
    trees: HashSet<TreeDigest>,
}

impl Leases {
    pub fn begin_build(&self) -> Arc<BuildLeases> {
        let leases = Arc::new(BuildLeases::new());
        lock(&self.0).builds.push(leases.clone());
        leases
    }

    pub fn end_build(&self, leases: &Arc<BuildLeases>) {
        let mut state = lock(&self.0);
        state.builds.retain(|other| !Arc::ptr_eq(other, leases));
        if let Some(sticky) = &mut state.sticky {
            sticky.builds.push(leases.clone());
        }
    }

    /// From now on nothing is forgotten. Only one collection runs at a time.
    pub fn begin_mark(&self) {
        lock(&self.0).sticky = Some(Sticky::default());
    }

    pub fn end_sweep(&self) {
        lock(&self.0).sticky = None;
    }

    /// Every build whose leases count now. A build that begins later takes its first lease under a shard's lock.
    pub fn builds(&self) -> Vec<Arc<BuildLeases>> {
        let state = lock(&self.0);
        let ended = state.sticky.iter().flat_map(|sticky| &sticky.builds);
        state.builds.iter().chain(ended).cloned().collect()
    }

    /// Is a build under way?
    pub fn is_building(&self) -> bool {
        !lock(&self.0).builds.is_empty()
    }

    /// Every tree that is held, or was since the mark began.
    pub fn trees(&self) -> HashSet<TreeDigest> {
        lock(&self.0).trees()
    }

    /// Runs `act` unless the tree is held, with nobody able to take a hold on it meanwhile. `None` if it is held. Call with
    /// `collecting` held: one tree is dropped at a time.
    ///
    /// What `act` removes may wait for the file system's journal, so nothing is locked meanwhile (see `leaving.rs`).
    pub fn unless_held<T>(&self, tree: &TreeDigest, act: impl FnOnce() -> T) -> Option<T> {
        let mut state = lock(&self.0);
        if state.is_held(tree) {
            return None;
        }
        state.dropping = Some(*tree);
        drop(state);
        let _dropping = Dropping(self);
        Some(act())
    }
}

/// Ends [`State::dropping`].
struct Dropping<'a>(&'a Leases);

impl Drop for Dropping<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).dropping = None;
    }
}

impl State {
    fn trees(&self) -> HashSet<TreeDigest> {
        let ended = self.sticky.iter().flat_map(|sticky| &sticky.trees);
        self.trees.keys().chain(ended).copied().collect()
    }

    fn is_held(&self, tree: &TreeDigest) -> bool {
        self.trees.contains_key(tree) || self.sticky.as_ref().is_some_and(|sticky| sticky.trees.contains(tree))
    }
}

/// Keeps a tree, its blobs and its images while it lives.
#[must_use = "the tree is held only while the hold lives"]
pub struct Hold {
    store: Arc<Inner>,
    tree: TreeDigest,
}

impl Hold {
    /// Takes a hold if `check` agrees, when the tree is not being dropped.
    pub(super) fn take<E>(
        store: &Arc<Inner>,
        tree: &TreeDigest,
        check: impl FnOnce() -> Result<(), E>,
    ) -> Result<Hold, E> {
        let mut state = files::lock_when(&store.leases.0, |state| state.dropping.as_ref() != Some(tree));
        check()?;
        *state.trees.entry(*tree).or_default() += 1;
        Ok(Hold {
            store: store.clone(),
            tree: *tree,
        })
    }

    /// Takes a hold on a tree that is in the store. Fails with [`Error::MissingManifest`] if it is not.
    pub(super) fn take_stored(store: &Arc<Inner>, tree: &TreeDigest) -> Result<Hold, Error> {
        let path = manifest_path(tree);
        let hold = Hold::take(store, tree, || {
            let there = files::stat(&store.dir, path.as_str());
            match there.map_err(|error| Error::io("look for", store.path(&path), error))? {
                Some(_) => Ok(()),
                None => Err(Error::MissingManifest { tree: *tree }),
            }
        })?;
        // Not with the leases locked: a file system that is busy deleting may have this wait for its journal.
        match files::touch(Step::HoldTouch, &store.dir, path.as_str()) {
            Ok(()) => Ok(hold),
            Err(Errno::NOENT) => Err(Error::MissingManifest { tree: *tree }),
            Err(error) => Err(Error::io("touch", store.path(&path), error)),
        }
    }

    pub fn tree(&self) -> &TreeDigest {
        &self.tree
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // The manifest's mtime is "last used". Best effort: the tree then counts as unused a little longer.
        let _ = files::touch(Step::HoldTouch, &self.store.dir, manifest_path(&self.tree));
        let mut state = lock(&self.store.leases.0);
        if let Some(count) = state.trees.get_mut(&self.tree) {
            *count -= 1;
            if *count == 0 {
                state.trees.remove(&self.tree);
            }
        }
        if let Some(sticky) = &mut state.sticky {
            sticky.trees.insert(self.tree);
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hold").field(&self.tree).finish()
    }
}
