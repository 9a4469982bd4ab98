//! Verification: is everything what its name says?
//!
//! 1. **Blobs** are read and hashed (`blobs.rs`): all, a sample, or what changed since the last full verification. One
//!    that is wrong or cannot be read is judged a second time and then quarantined, so that the next put heals it.
//! 2. **Refs and manifests** are read (`trees.rs`), with no collection running: is each manifest whole, and each content
//!    that it names there, with the length that it gives? What the wrong and missing ones hurt is looked up.
//!
//! Builds, puts and collections go on meanwhile. A blob that a collection removed is no damage; a build that had found
//! a blob which is then quarantined does not publish without it (`quarantine.rs`, `publish.rs`). A damaged manifest is
//! reported and stays where it is: it goes on stopping collections, which must not guess what it named.

mod blobs;
mod record;
#[cfg(test)]
mod tests;
mod trees;

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use serde::Serialize;

use super::{Digest, Error, FileOf, Problem, Store, TreeDigest, time};

/// Which blobs are read. Refs, manifests, and whether blobs are there with the right length, are always looked at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "scope", rename_all = "camelCase")]
pub enum Scope {
    All,
    /// A part of them: `fraction` is from 0 to 1. The same seed chooses the same blobs.
    Sample {
        fraction: f64,
        seed: u64,
    },
    /// Those whose status (ctime) changed since the last full verification began; all if there was none.
    ///
    /// Sees what was put since, and every change through the file system, of content, owner, times or name. Does not
    /// see what the disk itself lost or changed, or what was written to it past the file system.
    Changed,
}

/// How to verify.
#[derive(Debug, Clone, Copy)]
pub struct VerifyOptions {
    pub scope: Scope,
    /// Bytes of blobs per second, at most; a small one counts as 4 KiB. One blob is then read at a time. `None`: as
    /// many at once as there are processors.
    pub rate: Option<NonZeroU64>,
}

/// How far the reading of blobs is. Another thread may look at it.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    pub blobs: AtomicU64,
    pub bytes: AtomicU64,
    /// What there is to read; 0 until it is known.
    pub total_blobs: AtomicU64,
    pub total_bytes: AtomicU64,
}

/// What a verification found.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    #[serde(flatten)]
    pub scope: Scope,
    #[serde(with = "time")]
    pub started: SystemTime,
    #[serde(with = "time")]
    pub finished: SystemTime,
    /// `false`: it was cancelled or has failed, and what had been found by then is told.
    pub complete: bool,
    /// Why it ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Blobs that were read and hashed (or could not be), and the bytes that were read.
    pub blobs: u64,
    pub bytes: u64,
    /// Blobs that there are besides, not chosen by the scope.
    pub passed_over: u64,
    pub manifests: u64,
    pub refs: u64,
    /// Sorted by digest.
    pub bad_blobs: Vec<BadBlob>,
    pub bad_manifests: Vec<BadManifest>,
    /// Refs that cannot be read.
    pub bad_refs: Vec<Problem>,
    /// Trees that lack contents: with refs before those without.
    pub hurt: Vec<HurtTree>,
    /// Blobs in `quarantine/`, also of earlier times, and their bytes.
    pub quarantined_blobs: u64,
    pub quarantined_bytes: u64,
}

/// A blob that is not what its name says, or is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BadBlob {
    pub digest: Digest,
    /// Where it belongs.
    pub path: PathBuf,
    #[serde(flatten)]
    pub fault: Fault,
    /// Where it was moved to.
    pub quarantined: Option<PathBuf>,
    /// Why it was not moved although it should have been; it is still under its name then.
    pub not_moved: Option<String>,
    /// Why it may be under its name again after a power cut, although it was moved.
    pub not_durable: Option<String>,
    /// Is a right one under its name by now? Somebody has put it again.
    pub healed: bool,
    /// Files that it is the content of, in stored trees: names of hard links each.
    pub files: u64,
    /// The first few of them.
    pub samples: Vec<FileOf>,
}

/// What is wrong with a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "fault", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Fault {
    /// It was read, and has other bytes: their digest and how many.
    Damaged { found: Digest, length: u64 },
    /// The system could not read it.
    Unreadable { errno: i32, message: String },
    /// Something else is under its name: a folder, a link.
    NotAFile,
    /// A manifest names it, and there is nothing.
    Missing,
}

/// A manifest that is damaged or missing. It stays, and stops collections, until its tree is built again or the refs
/// are forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BadManifest {
    pub digest: TreeDigest,
    pub path: PathBuf,
    pub message: String,
    /// Refs that stand for it now, as `namespace/name`.
    pub current_of: Vec<String>,
    /// Refs in whose history it is.
    pub history_of: Vec<String>,
}

/// A tree that lacks contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HurtTree {
    pub digest: TreeDigest,
    pub current_of: Vec<String>,
    pub history_of: Vec<String>,
    /// Distinct contents that it lacks.
    pub blobs: u64,
    /// Files that have them: names of hard links each.
    pub files: u64,
    /// The first few files, by path.
    pub samples: Vec<HurtFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HurtFile {
    /// Below the root of the tree, as [`path_text`](crate::store::path_text) writes it.
    pub path: String,
    pub content: Digest,
}

impl Verification {
    /// Is nothing wrong, or was all that was wrong healed meanwhile?
    pub fn is_sound(&self) -> bool {
        self.bad_blobs.iter().all(|bad| bad.healed) && self.bad_manifests.is_empty() && self.bad_refs.is_empty()
    }
}

impl Store {
    /// Reads blobs and all manifests and refs, quarantines the blobs that are wrong, and tells what they hurt.
    ///
    /// Blocks, for as long as the disk takes; verifications wait for one another. After `cancel` is set it ends soon,
    /// and the report is not `complete`. Fails only if the contents cannot be listed: what goes wrong later is in the report.
    pub fn verify(
        &self,
        options: &VerifyOptions,
        progress: &VerifyProgress,
        cancel: &AtomicBool,
    ) -> Result<Verification, Error> {
        let store = &self.inner;
        let _one_at_a_time = store.verifying.lock_unless(cancel).ok_or(Error::Cancelled)?;
        let started = SystemTime::now();
        let since = match options.scope {
            Scope::Changed => record::last_full(store, started),
            _ => None,
        };
        let chosen = blobs::choose(store, options.scope, since)?;
        let mut bad = blobs::check(store, &chosen.blobs, options.rate, progress, cancel);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut report = Verification {
            scope: options.scope,
            started,
            finished: started,
            complete: !cancel.load(Ordering::Relaxed),
            failed: None,
            blobs: read(&progress.blobs),
            bytes: read(&progress.bytes),
            passed_over: chosen.passed_over,
            manifests: 0,
            refs: 0,
            bad_blobs: Vec::new(),
            bad_manifests: Vec::new(),
            bad_refs: Vec::new(),
            hurt: Vec::new(),
            quarantined_blobs: 0,
            quarantined_bytes: 0,
        };
        let ended = self.judge(&mut report, &mut bad, cancel);
        // Whatever went wrong since: what was moved away must not go without a word.
        report.bad_blobs = bad.into_values().collect();
        report.finished = SystemTime::now().max(started);
        if let Err(error) = ended {
            report.complete = false;
            report.failed = Some(error.to_string());
        }
        Ok(report)
    }

    /// What the bad blobs hurt, and all besides that is to be said of the store.
    fn judge(
        &self,
        report: &mut Verification,
        bad: &mut BTreeMap<Digest, BadBlob>,
        cancel: &AtomicBool,
    ) -> Result<(), Error> {
        let store = &self.inner;
        // Also after a cancellation: what was quarantined until then must not go without saying what it hurts.
        if report.complete || !bad.is_empty() {
            trees::check(store, report, bad, cancel)?;
        }
        for one in super::quarantine::list(store)? {
            report.quarantined_blobs += 1;
            report.quarantined_bytes = report.quarantined_bytes.saturating_add(one.size);
        }
        let in_place = bad
            .values()
            .any(|bad| bad.not_moved.is_some() || bad.not_durable.is_some());
        // What is still under its name, or may come back to it, must be found again by what looks for changes.
        if report.scope == Scope::All && report.complete && !in_place {
            record::write_full(store, report.started)?;
        }
        Ok(())
    }
}
