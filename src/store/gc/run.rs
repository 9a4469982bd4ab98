//! Carrying a plan out.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::io::Errno;

use super::mark::{Marked, StoredManifest, stored_manifests};
use super::{Decision, DroppedHistory, Kind, Report};
use crate::store::disk::{self, Step};
use crate::store::files;
use crate::store::layout::{Inner, manifest_path};
use crate::store::pace::{self, Pace};
use crate::store::quarantine::Quarantined;
use crate::store::retention::{Live, Plan, Reason};
use crate::store::{Digest, Error, Problem, RefName, TreeDigest, images, manifests, quarantine};

/// Blobs that are removed in one turn, at most …
const BATCH: usize = 64;
/// … and for about so long, on a slow disk.
const TURN: Duration = Duration::from_millis(10);
/// While a build is under way, a turn is followed by a pause so many times as long: names that go and files that come
/// share the file system's journal, and the build's syncs wait for what is in it.
const YIELD: u32 = 8;
/// Files that cannot be removed and are passed over; one more, and the disk is broken or read-only.
const MAX_FAILURES: u32 = 64;
/// Names that a report gives of what went for one reason.
const SAMPLES: usize = 5;

/// What went of one kind, for one reason.
#[derive(Default)]
pub(super) struct Tally {
    count: u64,
    bytes: u64,
    /// The first by name, so that a dry run and the real one give the same.
    samples: BTreeSet<String>,
}

/// A plan that is being carried out.
pub(super) struct Run<'a> {
    pub store: &'a Inner,
    pub marked: &'a Marked,
    pub plan: &'a Plan,
    /// What went, as [`Removals`](super::Removals) has it.
    pub gone: Vec<(Kind, Reason, u32)>,
    pub quarantined: Vec<Quarantined>,
    pub tally: BTreeMap<(Kind, Reason), Tally>,
    pub history: Vec<DroppedHistory>,
    pub blocked: Vec<Problem>,
    pub pace: Pace,
    pub cancel: &'a AtomicBool,
    pub started: SystemTime,
    pub failures: Failures,
}

/// Why files could not be removed.
#[derive(Default)]
pub(super) struct Failures {
    first: Option<Error>,
    count: u32,
}

impl Failures {
    /// One file that cannot be removed must not keep all others.
    fn pass_over(&mut self, error: Error) -> Result<(), Error> {
        self.count += 1;
        if self.count > MAX_FAILURES {
            return Err(self.first.take().unwrap_or(error));
        }
        self.first.get_or_insert(error);
        Ok(())
    }
}

impl Run<'_> {
    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Counts something that went, which has this number in the facts.
    fn count(&mut self, kind: Kind, reason: Reason, number: usize, bytes: u64, name: impl ToString) {
        self.gone.push((kind, reason, number as u32));
        let tally = self.tally.entry((kind, reason)).or_default();
        tally.count += 1;
        tally.bytes = tally.bytes.saturating_add(bytes);
        tally.samples.insert(name.to_string());
        if tally.samples.len() > SAMPLES {
            tally.samples.pop_last();
        }
    }

    fn note_history(&mut self, index: usize, name: &RefName, reason: Reason) {
        self.history.push(DroppedHistory {
            name: name.to_string(),
            digest: self.marked.facts.manifests[index].tree,
            reason,
        });
    }

    /// Deletes, or says what would be deleted.
    pub fn carry_out(&mut self, old: Vec<Quarantined>, dry_run: bool) -> Result<(), Error> {
        // It is needed by nothing, whatever is live.
        self.expire(old, dry_run)?;
        if dry_run {
            self.pretend();
            return Ok(());
        }
        let ended = self.execute();
        // A ref that was rewritten on a full disk has used it up.
        let spare = self.store.ensure_spare();
        let passed_over = self.failures.first.take().map_or(Ok(()), Err);
        ended.and(passed_over).and(spare)
    }

    fn expire(&mut self, old: Vec<Quarantined>, dry_run: bool) -> Result<(), Error> {
        for one in old {
            if self.is_cancelled() {
                break;
            }
            if !dry_run && let Err(error) = quarantine::discard(self.store, &one) {
                self.failures.pass_over(error)?;
                continue;
            }
            // Its wait ends early if cancelled, and then the next one is not begun.
            if !dry_run {
                self.pace.wait(1, self.cancel);
            }
            let number = self.quarantined.len();
            self.count(Kind::Quarantined, Reason::QuarantineAge, number, one.size, &one.name);
            self.quarantined.push(one);
        }
        Ok(())
    }

    fn pretend(&mut self) {
        let (marked, plan) = (self.marked, self.plan);
        for (index, reason) in &plan.images {
            let image = &marked.facts.images[*index];
            self.count(Kind::Image, *reason, *index, image.size, &image.name);
        }
        for (number, orphan) in marked.orphans.iter().enumerate() {
            let number = marked.facts.manifests.len() + number;
            self.count(Kind::Manifest, Reason::Orphaned, number, orphan.size, orphan.tree);
        }
        for (index, reason) in &plan.manifests {
            for name in &marked.history[*index] {
                self.note_history(*index, name, *reason);
            }
            let manifest = &marked.facts.manifests[*index];
            self.count(Kind::Manifest, *reason, *index, manifest.size, manifest.tree);
        }
        for (index, reason) in &plan.blobs {
            let blob = &marked.facts.blobs[*index];
            self.count(Kind::Blob, *reason, *index, blob.size, blob.digest);
        }
    }

    fn execute(&mut self) -> Result<(), Error> {
        let (store, marked, plan) = (self.store, self.marked, self.plan);
        for manifest in marked
            .facts
            .manifests
            .iter()
            .filter(|manifest| matches!(manifest.live, Some(Live::Layer | Live::InUse)))
        {
            // In use until now: its age as history, should it become that, begins here.
            match files::touch(Step::InUseTouch, &store.dir, manifest_path(&manifest.tree)) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(Error::io("touch", store.path(manifest_path(&manifest.tree)), error)),
            }
        }
        for image in marked.facts.images.iter().filter(|image| image.in_use) {
            images::note_use(store, &image.name)?;
        }
        for (index, reason) in &plan.images {
            let image = &marked.facts.images[*index];
            if self.is_cancelled() {
                return Ok(());
            }
            match images::remove(store, &image.name, &image.tree) {
                Ok(true) => {
                    self.count(Kind::Image, *reason, *index, image.size, &image.name);
                    self.pace.wait(1, self.cancel);
                }
                Ok(false) => {}
                Err(error) => self.failures.pass_over(error)?,
            }
        }

        // First what no ref has to be rewritten for: it frees the room that rewriting needs.
        let known = marked.facts.manifests.len();
        let orphans = marked
            .orphans
            .iter()
            .enumerate()
            .map(|(number, orphan)| (orphan.tree, orphan.size, known + number, Reason::Orphaned));
        self.drop_manifests(orphans.collect())?;
        let mut named = vec![false; marked.facts.blobs.len()];
        for blob in marked.facts.manifests.iter().flat_map(|manifest| &manifest.blobs) {
            named[*blob as usize] = true;
        }
        let (later, first): (Vec<_>, Vec<_>) = plan.blobs.iter().partition(|(index, _)| named[*index]);
        if !self.sweep(first)? || plan.manifests.is_empty() {
            return Ok(());
        }

        let dropped: HashMap<TreeDigest, (usize, Reason)> = plan
            .manifests
            .iter()
            .map(|(index, reason)| (marked.facts.manifests[*index].tree, (*index, *reason)))
            .collect();
        let refs: HashSet<&RefName> = plan
            .manifests
            .iter()
            .flat_map(|(index, _)| &marked.history[*index])
            .collect();
        let mut refs: Vec<_> = refs.into_iter().collect();
        refs.sort();
        for name in refs {
            if self.is_cancelled() {
                return Ok(());
            }
            if let Err(error) = self.drop_history(name, &dropped) {
                self.failures.pass_over(error)?;
            }
        }
        let manifests = plan.manifests.iter().map(|(index, reason)| {
            let manifest = &marked.facts.manifests[*index];
            (manifest.tree, manifest.size, *index, *reason)
        });
        self.drop_manifests(manifests.collect())?;
        self.sweep(later)?;
        Ok(())
    }

    /// Takes what the plan drops out of a ref's history, as that is now.
    fn drop_history(&mut self, name: &RefName, dropped: &HashMap<TreeDigest, (usize, Reason)>) -> Result<(), Error> {
        let store = self.store;
        let _guard = store.lock_ref(name);
        let Some(mut entry) = store.read_ref(name)? else {
            return Ok(());
        };
        let mut gone = Vec::new();
        entry.history.retain(|old| match dropped.get(&old.revision.digest) {
            Some(found) => {
                gone.push(*found);
                false
            }
            None => true,
        });
        if gone.is_empty() {
            return Ok(());
        }
        store.write_ref(&entry)?;
        for (index, reason) in gone {
            self.note_history(index, name, reason);
        }
        Ok(())
    }

    /// Removes manifests that no ref names and nobody holds by now.
    fn drop_manifests(&mut self, trees: Vec<(TreeDigest, u64, usize, Reason)>) -> Result<(), Error> {
        if trees.is_empty() {
            return Ok(());
        }
        let store = self.store;
        let refs = store.refs()?;
        if !refs.unreadable.is_empty() {
            self.blocked.extend(refs.unreadable);
            return Ok(());
        }
        let mut named: HashSet<TreeDigest> = HashSet::new();
        for entry in &refs.refs {
            named.extend(entry.current.iter().map(|revision| revision.digest));
            named.extend(entry.history.iter().map(|old| old.revision.digest));
        }
        for (tree, size, number, reason) in trees {
            if self.is_cancelled() {
                return Ok(());
            }
            if named.contains(&tree) {
                continue;
            }
            let path = manifest_path(&tree);
            // A publish that makes it current again holds it before it looks whether it is there.
            let remove = || files::remove_file(Step::ManifestRemove, &store.dir, path.as_str());
            match store.leases.unless_held(&tree, remove) {
                Some(Ok(())) => {
                    self.count(Kind::Manifest, reason, number, size, tree);
                    self.pace.wait(1, self.cancel);
                }
                Some(Err(error)) => self.failures.pass_over(Error::io("remove", store.path(&path), error))?,
                None => {}
            }
        }
        Ok(())
    }

    /// Removes blobs, but not those that a manifest that is there now, or a lease, needs. `false` if something that
    /// could need them cannot be read.
    fn sweep(&mut self, blobs: Vec<&(usize, Reason)>) -> Result<bool, Error> {
        let (store, facts) = (self.store, &self.marked.facts);
        if !self.blocked.is_empty() {
            return Ok(false);
        }
        if blobs.is_empty() {
            return Ok(true);
        }
        let dropped: HashSet<usize> = self.plan.manifests.iter().map(|(index, _)| *index).collect();
        let kept: HashSet<TreeDigest> = facts
            .manifests
            .iter()
            .enumerate()
            .filter(|(index, _)| !dropped.contains(index))
            .map(|(_, manifest)| manifest.tree)
            .collect();
        let mut protected: HashSet<Digest> = HashSet::new();
        let marked: HashMap<TreeDigest, usize> = facts
            .manifests
            .iter()
            .enumerate()
            .map(|(index, manifest)| (manifest.tree, index))
            .collect();
        for StoredManifest { tree, .. } in stored_manifests(store)? {
            if kept.contains(&tree) {
                continue;
            }
            if let Some(index) = marked.get(&tree) {
                let named = &facts.manifests[*index].blobs;
                protected.extend(named.iter().map(|blob| facts.blobs[*blob as usize].digest));
                continue;
            }
            match manifests::contents(store, &tree) {
                Ok(contents) => protected.extend(contents.into_iter().map(|(digest, _)| digest)),
                Err(Error::MissingManifest { .. }) => {}
                Err(error) => {
                    self.blocked.push(Problem {
                        path: store.path(manifest_path(&tree)).display().to_string(),
                        message: error.to_string(),
                    });
                    return Ok(false);
                }
            }
        }
        // A blob must not be gone while a ref or manifest that names it comes back after a crash.
        let dir = files::open_dir(&store.dir, ".").map_err(|e| Error::io("open", &store.root, e))?;
        disk::syncfs(Step::SweepSync, &dir).map_err(|e| Error::io("sync", &store.root, e))?;

        let mut blobs: Vec<(usize, Reason)> = blobs.into_iter().copied().collect();
        blobs.retain(|(index, _)| !protected.contains(&facts.blobs[*index].digest));
        // Folder by folder, and in each in the order in which it was listed.
        blobs.sort_by_key(|(index, _)| facts.blobs[*index].digest.as_bytes()[0]);
        let mut rest = &blobs[..];
        while !rest.is_empty() {
            let begin = Instant::now();
            let done = self.sweep_some(rest)?;
            rest = &rest[done..];
            if store.leases.is_building() && !pace::sleep_until(Instant::now() + begin.elapsed() * YIELD, self.cancel) {
                return Ok(false);
            }
            if !self.pace.wait(done as u64, self.cancel) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes the first of these blobs, as many as belong to one turn. Returns how many were dealt with.
    fn sweep_some(&mut self, blobs: &[(usize, Reason)]) -> Result<usize, Error> {
        let (store, facts) = (self.store, &self.marked.facts);
        let begin = Instant::now();
        let mut done = 0;
        for (index, reason) in blobs.iter().take(self.pace.batch(BATCH)) {
            let blob = &facts.blobs[*index];
            match store.leave(&blob.digest).map(|leaving| leaving.remove(blob.size)) {
                Some(Ok(true)) => self.count(Kind::Blob, *reason, *index, blob.size, blob.digest),
                Some(Ok(false)) | None => {}
                Some(Err(error)) => self.failures.pass_over(error)?,
            }
            done += 1;
            if begin.elapsed() > TURN {
                break;
            }
        }
        Ok(done)
    }

    /// The report, and everything that went.
    pub fn report(self, dry_run: bool, complete: bool) -> (Report, Vec<(Kind, Reason, u32)>, Vec<Quarantined>) {
        let started = self.started;
        let marked = self.marked;
        let decisions: Vec<Decision> = self
            .tally
            .into_iter()
            .map(|((kind, reason), tally)| Decision {
                kind,
                reason,
                message: reason.to_string(),
                count: tally.count,
                bytes: tally.bytes,
                samples: tally.samples.into_iter().collect(),
            })
            .collect();
        let deleted = decisions.iter().filter(|decision| decision.kind == Kind::Blob);
        let missing = marked.facts.blobs.iter().filter(|blob| !blob.present).count() as u64;
        let report = Report {
            dry_run,
            complete,
            failed: None,
            started,
            finished: SystemTime::now().max(started),
            scanned_blobs: marked.scanned,
            deleted_blobs: deleted.map(|decision| decision.count).sum(),
            freed_bytes: decisions.iter().map(|decision| decision.bytes).sum(),
            dropped_history: self.history,
            decisions,
            over_limit: self.plan.over_limit.clone(),
            blocked: self.blocked,
            missing_blobs: missing,
        };
        (report, self.gone, self.quarantined)
    }
}
