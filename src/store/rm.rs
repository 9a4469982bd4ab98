//! Removing single contents that nothing needs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

use super::disk::{self, Step};
use super::files;
use super::gc::{Mark, StoredManifest, stored_manifests};
use super::{Digest, Error, HeldTree, Holders, Problem, Store, TreeDigest, manifests};

/// What became of a content that was to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// It is gone; it had so many bytes.
    Gone(u64),
    /// It was not in the store.
    Missing,
    /// It stays.
    Needed(Needed),
    /// The disk did not remove it, and why. What was asked for besides is removed all the same.
    Failed(String),
}

/// Who needs a content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Needed {
    /// Stored trees that name it, each with the refs, histories, layers and mounts that name the tree.
    pub trees: BTreeMap<TreeDigest, Vec<String>>,
    /// Does a running build, or one that ended while this was decided?
    pub by_build: bool,
}

impl Store {
    /// Removes contents that no stored tree and no running build names, whatever their age, durably.
    ///
    /// Nothing is removed if a manifest, a ref or a holder cannot be read, since it may need any of them: the outer
    /// `Err` of the result. Waits for a collection that runs; with `cancel` set meanwhile it is [`Error::Cancelled`].
    pub fn remove_blobs(
        &self,
        digests: &BTreeSet<Digest>,
        holders: &dyn Holders,
        cancel: &AtomicBool,
    ) -> Result<Result<BTreeMap<Digest, Removed>, Vec<Problem>>, Error> {
        let store = &self.inner;
        let _one_at_a_time = store.collecting.lock_unless(cancel).ok_or(Error::Cancelled)?;
        // What is leased or published from here on is found by its lease below, as in a sweep.
        let _mark = Mark::begin(store);
        let mut problems = Vec::new();
        let mut needed: BTreeMap<Digest, BTreeSet<TreeDigest>> = BTreeMap::new();
        for StoredManifest { tree, .. } in stored_manifests(store)? {
            match manifests::contents(store, &tree) {
                Ok(contents) => {
                    for (digest, _) in contents.iter().filter(|(digest, _)| digests.contains(digest)) {
                        needed.entry(*digest).or_default().insert(tree);
                    }
                }
                Err(Error::MissingManifest { .. }) => {}
                Err(error) => problems.push(Problem {
                    path: store.path(super::layout::manifest_path(&tree)).display().to_string(),
                    message: error.to_string(),
                }),
            }
        }
        let by = self.namers(holders, &mut problems)?;
        if !problems.is_empty() {
            return Ok(Err(problems));
        }
        // As in a sweep: no manifest that was dropped before may come back after a crash and miss them.
        let dir = files::open_dir(&store.dir, ".").map_err(|e| Error::io("open", &store.root, e))?;
        disk::syncfs(Step::SweepSync, &dir).map_err(|e| Error::io("sync", &store.root, e))?;
        let mut done = BTreeMap::new();
        for digest in digests {
            let removed = match needed.remove(digest) {
                Some(trees) => {
                    let named = |tree| (tree, by.get(&tree).cloned().unwrap_or_default());
                    Removed::Needed(Needed {
                        trees: trees.into_iter().map(named).collect(),
                        by_build: false,
                    })
                }
                None => self
                    .remove_unleased(digest)
                    .unwrap_or_else(|error| Removed::Failed(error.to_string())),
            };
            done.insert(*digest, removed);
        }
        if done.values().any(|removed| matches!(removed, Removed::Gone(_))) {
            disk::syncfs(Step::RemovedSync, &dir).map_err(|e| Error::io("sync", &store.root, e))?;
        }
        Ok(Ok(done))
    }

    /// Who names each tree, in words.
    fn namers(
        &self,
        holders: &dyn Holders,
        problems: &mut Vec<Problem>,
    ) -> Result<BTreeMap<TreeDigest, Vec<String>>, Error> {
        let refs = self.refs()?;
        let held = holders.held()?;
        problems.extend(refs.unreadable);
        problems.extend(held.unreadable);
        let mut by: BTreeMap<TreeDigest, Vec<String>> = BTreeMap::new();
        for entry in &refs.refs {
            if let Some(current) = &entry.current {
                by.entry(current.digest).or_default().push(entry.name.to_string());
            }
            for old in &entry.history {
                let name = format!("the history of {}", entry.name);
                by.entry(old.revision.digest).or_default().push(name);
            }
        }
        for (tree, names) in HeldTree::names(held.trees) {
            by.entry(tree).or_default().extend(names);
        }
        Ok(by)
    }

    fn remove_unleased(&self, digest: &Digest) -> Result<Removed, Error> {
        let Some(leaving) = self.inner.leave(digest) else {
            return Ok(Removed::Needed(Needed {
                by_build: true,
                ..Needed::default()
            }));
        };
        Ok(match self.blob(digest)? {
            Some(blob) if leaving.remove(blob.size)? => Removed::Gone(blob.size),
            _ => Removed::Missing,
        })
    }
}
