//! Publishing a build: the order in which a tree becomes part of the store.
//!
//! 1. the manifest is staged beside the blobs; **sync**: all of it is durable, none of it has a name
//! 2. the blobs get their names; the ref is staged; **sync**: the names are durable, also those that other builds gave
//!    to blobs that this one found present (so this sync is never skipped)
//! 3. the manifest gets its name, then the ref; **sync**
//!
//! A crash at any point leaves either no new name, or names of whole contents that nothing refers to yet.

use std::io::{BufWriter, Write};
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use rayon::prelude::*;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::build::Kept;
use super::disk::{self, Step};
use super::files::{self, lock};
use super::layout::{Inner, manifest_path, object_path, shard_path};
use super::leases::{Hold, Leased};
use super::refs::{Ref, RefName, Revision};
use super::tree::{Content, EncodeError, Tree};
use super::{Build, Error, TreeDigest, manifests};

/// Under which name a tree is published, and for whom.
#[derive(Debug, Clone)]
pub struct Publish {
    pub name: RefName,
    /// UID of the owning object. If the ref has another owner, that one's revision becomes history.
    pub owner: String,
    /// Generation of the owner's spec that the build is based on.
    pub generation: i64,
    /// The rebuild request that the build answers, if any.
    pub request: Option<String>,
    /// Where the tree comes from, for the record.
    pub source: serde_json::Value,
    /// How many former revisions to keep, at most.
    pub history_limit: u32,
    /// Time of the build.
    pub now: SystemTime,
}

impl Build {
    /// Makes the tree the current revision of a ref, durably. On any error everything that was staged is thrown away.
    ///
    /// Every content that the tree names must have been put in this build or be in the store
    /// ([`Error::MissingBlob`], [`Error::WrongLength`]). An equal tree keeps the revision that the ref has; only its
    /// generation, request, source and limit are brought up to date.
    pub fn publish(self, tree: &Tree, target: Publish) -> Result<Revision, Error> {
        self.check()?;
        let store = self.store.clone();
        let mut moved = *store.not_moving();
        let manifest = self.path.clone() + "/manifest";
        let (looked, staged) = rayon::join(
            || -> Result<_, Error> {
                let contents = tree.sorted_contents();
                Tree::check_sizes(&contents)?;
                let stats = tree.stats_of(&contents);
                self.lease_contents(&contents)?;
                Ok(stats)
            },
            || self.stage_manifest(tree, &manifest),
        );
        let (stats, digest) = (looked?, staged?);
        // From here no collection drops the manifest, be it new or old.
        let _hold = Hold::take(&store, &digest, || Ok::<_, Error>(()))?;
        let keep_manifest = manifests::verify(&store, &digest).is_ok();
        if keep_manifest {
            let removed = files::remove_file(Step::ManifestDiscard, &store.dir, manifest.as_str());
            removed.map_err(|e| Error::io("remove", store.path(&manifest), e))?;
            let touched = files::touch(Step::ManifestTouch, &store.dir, manifest_path(&digest));
            touched.map_err(|e| Error::io("touch", store.path(manifest_path(&digest)), e))?;
        }
        if !keep_manifest || self.has_staged() {
            self.sync(Step::StagedSync)?;
        }
        let added = self.name_blobs()?;

        let revision = Revision {
            digest,
            files: stats.files,
            entries: stats.entries,
            size: stats.logical,
            unique: stats.distinct,
            added,
            built_at: target.now,
        };
        let name = target.name.clone();
        let _ref = store.lock_ref(&name);
        let old = match store.read_ref(&name) {
            Ok(old) => old,
            // A rebuild is what heals it; what it held besides is no longer known.
            Err(Error::BadRef { .. }) => None,
            Err(error) => return Err(error),
        };
        let new = next(old.clone(), revision, target);
        let staged_ref = self.path.clone() + "/ref";
        let write_ref = old.as_ref() != Some(&new);
        if write_ref {
            store.stage_ref(&new, &staged_ref, false)?;
        }
        let not_moving = loop {
            self.sync(Step::NamedSync)?;
            // From here until the tree is published no blob is quarantined: one that is later belongs to it.
            let now = store.not_moving();
            if *now == moved {
                break now;
            }
            // One was, perhaps of this tree: then it is missing, or another build has stored it again meanwhile.
            moved = *now;
            drop(now);
            self.lease_contents(&tree.sorted_contents())?;
        };

        if !keep_manifest {
            let path = manifest_path(&digest);
            let from = manifest.as_str();
            let renamed = disk::rename(Step::ManifestRename, &store.dir, from, &store.dir, path.as_str());
            renamed.map_err(|e| store.write_error(&path, 4096, e))?;
        }
        if write_ref {
            store.name_ref(&name, &staged_ref)?;
        }
        drop(not_moving);
        if write_ref || !keep_manifest {
            self.sync(Step::PublishedSync)?;
        }
        match new.current {
            Some(revision) => Ok(revision),
            // `next` always sets it.
            None => Err(Error::MissingManifest { tree: digest }),
        }
    }

    /// Fails if a write failed before.
    pub(super) fn check(&self) -> Result<(), Error> {
        match self.failed.load(Ordering::Relaxed) {
            true => Err(Error::BuildFailed),
            false => Ok(()),
        }
    }

    /// Makes sure that every content (sorted) is there, and stays.
    fn lease_contents(&self, contents: &[Content]) -> Result<(), Error> {
        let mut kept = lock(&self.kept);
        kept.iter_mut().for_each(Kept::sort);
        let kept: &[Kept] = &kept;
        let lease = |content: &Content| {
            let (digest, expected) = (content.digest, content.size);
            let leased = lock(self.leases.table(digest)).get(digest).map(|leased| leased.size);
            let found = match leased {
                Some(size) => Some(size),
                None if kept.iter().any(|kept| kept.names(digest)) => self.stored(digest)?,
                None => self.find(digest)?,
            };
            match found {
                Some(found) if found == expected => Ok(()),
                Some(found) => Err(Error::WrongLength {
                    digest: *digest,
                    expected,
                    found,
                }),
                None => Err(Error::MissingBlob { digest: *digest }),
            }
        };
        // Nearly all of a large tree that has hardly changed is only looked at: what takes time are the lookups. Sorted,
        // those of a folder are looked up one after the other.
        contents.par_iter().try_for_each(lease)
    }

    fn stage_manifest(&self, tree: &Tree, path: &str) -> Result<TreeDigest, Error> {
        let store = &self.store;
        store.reserve(0)?;
        let flags = OFlags::WRONLY | OFlags::EXCL;
        let file = disk::create(Step::ManifestCreate, &store.dir, path, flags, 0o400);
        let file = file.map_err(|e| store.write_error(path, 4096, e))?;
        let mut out = BufWriter::new(disk::Writer::new(Step::ManifestWrite, file));
        let digest = match tree.encode_but_sizes(&mut out) {
            Ok(digest) => digest,
            Err(EncodeError::Invalid(invalid)) => return Err(invalid.into()),
            Err(EncodeError::Io(error)) => return Err(store.write_error(path, 1 << 16, error)),
        };
        out.flush().map_err(|e| store.write_error(path, 1 << 16, e))?;
        Ok(digest)
    }

    pub(super) fn has_staged(&self) -> bool {
        let staged = |table: &std::sync::Mutex<std::collections::HashMap<_, Leased>>| {
            lock(table).values().any(|leased| leased.staged != 0)
        };
        self.leases.tables.iter().any(staged)
    }

    /// Makes everything on the file system durable, or reports what could not be written since the build began.
    pub(super) fn sync(&self, step: Step) -> Result<(), Error> {
        // What a failed sync lost is not known, so the build is lost. The kernel tells it once per descriptor.
        disk::syncfs(step, &self.dir).map_err(|e| self.store.write_error(&self.path, 0, e))
    }

    /// Gives the staged blobs their names. Returns how many bytes that added.
    pub(super) fn name_blobs(&self) -> Result<u64, Error> {
        let store = &self.store;
        let mut added = 0;
        for (byte, table) in self.leases.tables.iter().enumerate() {
            // Sorted, so that two builds go through a folder alike; a copy, so that no lock is held for long.
            let mut staged: Vec<_> = lock(table)
                .iter()
                .filter(|(_, leased)| leased.staged != 0)
                .map(|(digest, leased)| (*digest, *leased))
                .collect();
            staged.sort_unstable_by_key(|(digest, _)| *digest);
            for (digest, leased) in staged {
                let mut shard = store.shard_to_name(&digest);
                // Once it has its name, it is a blob that is in the store and may be found damaged there.
                let in_store = Leased { staged: 0, ..leased };
                let path = object_path(&digest);
                let there = files::stat(&store.dir, path.as_str());
                let there = there.map_err(|e| Error::io("look for", store.path(&path), e))?;
                let old = there.as_ref().map(|stat| stat.st_size.max(0) as u64);
                if there.as_ref().is_some_and(files::is_file) && old == Some(leased.size) {
                    // Another build was faster. Our copy goes with the build's folder.
                    lock(table).insert(digest, in_store);
                    continue;
                }
                let from = format!("{}/{}", self.path, leased.staged);
                name_blob(store, byte as u8, &from, &path)?;
                lock(table).insert(digest, in_store);
                match old {
                    None => Inner::count_named(&mut shard, leased.size),
                    // Damaged from outside, so the count is not to be trusted either.
                    Some(_) => shard.counted = None,
                }
                added += leased.size;
            }
        }
        Ok(added)
    }
}

fn name_blob(store: &Inner, byte: u8, from: &str, to: &str) -> Result<(), Error> {
    let rename = || disk::rename(Step::BlobRename, &store.dir, from, &store.dir, to);
    let error = |e: Errno| store.write_error(to, 4096, e);
    match rename() {
        Err(Errno::NOENT) => {
            // Somebody has removed an empty shard's folder.
            files::ensure_dir(Step::ShardDir, &store.dir, &shard_path(byte)).map_err(error)?;
            rename().map_err(error)
        }
        other => other.map_err(error),
    }
}

/// The ref after a publish.
fn next(old: Option<Ref>, revision: Revision, target: Publish) -> Ref {
    let mut new = old.unwrap_or_else(|| Ref {
        name: target.name.clone(),
        owner: target.owner.clone(),
        generation: 0,
        request: None,
        source: serde_json::Value::Null,
        current: None,
        history: Vec::new(),
        history_limit: 0,
    });
    let same_owner = new.owner == target.owner;
    let same_tree = new
        .current
        .as_ref()
        .is_some_and(|current| current.digest == revision.digest);
    if !(same_owner && same_tree) {
        if !same_tree {
            new.retire(target.now);
        }
        // A tree that is current again is not history.
        new.history.retain(|old| old.revision.digest != revision.digest);
        new.current = Some(revision);
    }
    new.owner = target.owner;
    new.generation = target.generation;
    new.request = target.request;
    new.source = target.source;
    new.history_limit = target.history_limit;
    new.apply_limit();
    new
}
