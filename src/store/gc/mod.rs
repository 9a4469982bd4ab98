//! Collecting: finding out what is live, having `retention.rs` plan, and carrying the plan out so that nothing that
//! anybody needs can be lost.
//!
//! 1. **Mark.** From its beginning nothing that is leased or held is forgotten (`leases.rs`). All refs, holders and
//!    holds are read, then the manifests that they name. If anything of that cannot be read, nothing is deleted.
//! 2. **Drop** images, then history from refs, then manifests: each while nobody can take a hold on it.
//! 3. **Look again**: every manifest that is in `manifests/` now and was not marked protects its blobs too. Sync.
//! 4. **Sweep** blob by blob; under its shard's lock the leases are looked at once more (`leaving.rs`).
//!
//! What needs no ref to be rewritten goes first, so that a collection works without a free byte.
//!
//! `model/` has these steps and those of builds and holds, with the functions that they stand for, and tries every
//! order of them: what changes the order here changes it there.

mod mark;
#[cfg(test)]
mod model;
mod run;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::layout::Inner;
use super::pace::Pace;
use super::quarantine::Quarantined;
use super::retention::{Facts, OverLimit, Plan, Policy, Reason, plan};
use super::{Error, Problem, Store, TreeDigest, time};
pub use mark::StoredManifest;
pub(super) use mark::stored_manifests;
use mark::{Marked, mark};
use run::{Failures, Run};

/// The trees that something outside the store needs: layers, mounts, pod volumes.
pub trait Holders {
    /// Is asked once per collection, after its mark has begun. An error stops the collection.
    fn held(&self) -> Result<Held, Error>;
}

/// See [`Holders`].
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub trees: Vec<HeldTree>,
    /// What could not be read, and may name any tree. Anything here stops all deletion.
    pub unreadable: Vec<Problem>,
}

/// A tree, and who holds it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldTree {
    pub tree: TreeDigest,
    by: HeldBy,
}

/// What holds a tree; with its name, for messages.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum HeldBy {
    Layer(String),
    Mount(String),
}

/// Holders of a kind that are named, at most: thousands of layers may share a tree.
const NAMED: usize = 3;

impl HeldTree {
    /// A tree of a layer.
    pub fn by_layer(tree: TreeDigest, name: impl fmt::Display) -> Self {
        let by = HeldBy::Layer(format!("the layer {name}"));
        Self { tree, by }
    }

    /// A tree that is mounted somewhere.
    pub fn by_mount(tree: TreeDigest, point: &Path) -> Self {
        let by = HeldBy::Mount(format!("the mount at {}", point.display()));
        Self { tree, by }
    }

    /// Who holds it, in words.
    pub fn by(&self) -> &str {
        match &self.by {
            HeldBy::Layer(by) | HeldBy::Mount(by) => by,
        }
    }

    pub(super) fn is_layer(&self) -> bool {
        matches!(self.by, HeldBy::Layer(_))
    }

    /// The holders of each tree in words, a few of each kind; layers first.
    pub(super) fn names(mut held: Vec<HeldTree>) -> BTreeMap<TreeDigest, Vec<String>> {
        held.sort();
        held.dedup();
        let mut names: BTreeMap<TreeDigest, Vec<String>> = BTreeMap::new();
        for same in held.chunk_by(|one, other| one.tree == other.tree && one.is_layer() == other.is_layer()) {
            let names = names.entry(same[0].tree).or_default();
            names.extend(same.iter().take(NAMED).map(|held| held.by().to_owned()));
            let more = same.len().saturating_sub(NAMED);
            let kind = if same[0].is_layer() { "layers" } else { "mounts" };
            names.extend((more > 0).then(|| format!("{more} more {kind}")));
        }
        names
    }
}

/// What is known beforehand, such as that nothing is held.
impl Holders for Held {
    fn held(&self) -> Result<Held, Error> {
        Ok(self.clone())
    }
}

/// How a collection is made, besides by which policy.
#[derive(Debug, Clone, Copy)]
pub struct Collecting<'a> {
    /// Find out what may go, and delete nothing.
    pub dry_run: bool,
    pub now: SystemTime,
    /// Most files removed in a second; `None`: as fast as the disk does it.
    pub rate: Option<NonZeroU64>,
    /// The collection ends soon after this is set. What it has deleted stays deleted; another one goes on from there.
    pub cancel: &'a AtomicBool,
}

/// Something that went, or in a dry run would have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gone {
    pub kind: Kind,
    pub reason: Reason,
    pub bytes: u64,
    /// When it was last used: for history, built, mounted or current; for an image, made or seen in use by a collection.
    #[serde(with = "time")]
    pub last_used: SystemTime,
    /// The digest of a blob or manifest, the file name of an image or in quarantine.
    pub name: String,
}

/// Everything that a collection removed, or would have. A [`Gone`] for each would take more memory than the collection.
pub struct Removals {
    facts: Facts,
    orphans: Vec<StoredManifest>,
    quarantined: Vec<Quarantined>,
    /// In the order in which they went. The numbers are those of the facts; behind the manifests come the orphans.
    gone: Vec<(Kind, Reason, u32)>,
}

impl Removals {
    pub fn len(&self) -> usize {
        self.gone.len()
    }

    pub fn is_empty(&self) -> bool {
        self.gone.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Gone> {
        self.gone
            .iter()
            .map(|(kind, reason, number)| self.one(*kind, *reason, *number as usize))
    }

    fn one(&self, kind: Kind, reason: Reason, number: usize) -> Gone {
        let facts = &self.facts;
        let (bytes, last_used, name) = match kind {
            Kind::Image => {
                let image = &facts.images[number];
                (image.size, image.last_used, image.name.clone())
            }
            Kind::Manifest => match facts.manifests.get(number) {
                Some(manifest) => (manifest.size, manifest.unused_since, manifest.tree.to_string()),
                None => {
                    let orphan = &self.orphans[number - facts.manifests.len()];
                    // When it was named last nobody knows.
                    (orphan.size, orphan.last_used, orphan.tree.to_string())
                }
            },
            Kind::Blob => {
                let blob = &facts.blobs[number];
                (blob.size, blob.last_used, blob.digest.to_string())
            }
            Kind::Quarantined => {
                let one = &self.quarantined[number];
                (one.size, one.taken, one.name.clone())
            }
        };
        Gone {
            kind,
            reason,
            bytes,
            last_used,
            name,
        }
    }
}

/// What a collection did, or with `dry_run` would do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub dry_run: bool,
    /// `false`: it was cancelled before its end, or has failed.
    pub complete: bool,
    /// Why it ended early. What it had deleted by then is in the report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    #[serde(with = "time")]
    pub started: SystemTime,
    #[serde(with = "time")]
    pub finished: SystemTime,
    pub scanned_blobs: u64,
    pub deleted_blobs: u64,
    /// Bytes of the blobs, manifests, images and quarantined files that went.
    pub freed_bytes: u64,
    pub dropped_history: Vec<DroppedHistory>,
    /// What went, by kind and reason.
    pub decisions: Vec<Decision>,
    pub over_limit: Option<OverLimit>,
    /// What could not be read. If there is anything, deletion was not begun, or stopped at it.
    pub blocked: Vec<Problem>,
    /// Contents that a stored manifest names and that are not there: damage. Rebuilding the trees heals it.
    pub missing_blobs: u64,
}

/// A revision that is history no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DroppedHistory {
    /// The ref, as `namespace/name`.
    pub name: String,
    pub digest: TreeDigest,
    pub reason: Reason,
}

/// How much of a kind went, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    pub kind: Kind,
    pub reason: Reason,
    /// The reason in words.
    pub message: String,
    pub count: u64,
    pub bytes: u64,
    /// The first few of them by name: digests of blobs and manifests, file names of images and in quarantine.
    pub samples: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    Image,
    Manifest,
    Blob,
    /// A damaged blob in `quarantine/`.
    Quarantined,
}

/// Why a collection was not made, or ended early.
#[derive(thiserror::Error)]
#[error("{error}")]
pub struct Unfinished {
    pub error: Error,
    /// What it did until then, if it had begun; it is worth a record like any other.
    pub done: Option<Box<(Report, Removals)>>,
}

impl fmt::Debug for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.done.as_ref().map(|done| &done.0);
        write!(f, "{:?}, after {report:?}", self.error)
    }
}

impl From<Error> for Unfinished {
    fn from(error: Error) -> Self {
        Unfinished { error, done: None }
    }
}

impl From<Unfinished> for Error {
    fn from(unfinished: Unfinished) -> Self {
        unfinished.error
    }
}

impl Store {
    /// Whether a collection, or something that waits for one, is under way; for messages only, as it may end or begin
    /// at any moment.
    pub fn is_collecting(&self) -> bool {
        self.inner.collecting.is_held()
    }

    /// Finds out what may go by the policy, and deletes it unless `dry_run`. Collections wait for one another; builds
    /// go on meanwhile.
    ///
    /// What was deleted before an error stays deleted; the next collection goes on from there.
    pub fn collect(
        &self,
        policy: &Policy,
        holders: &dyn Holders,
        dry_run: bool,
        now: SystemTime,
    ) -> Result<Report, Unfinished> {
        let how = Collecting {
            dry_run,
            now,
            rate: None,
            cancel: &AtomicBool::new(false),
        };
        Ok(self.collect_and(policy, holders, &how, &|| {})?.0)
    }

    /// As [`Store::collect`], and tells everything that went.
    pub fn collect_with(
        &self,
        policy: &Policy,
        holders: &dyn Holders,
        how: &Collecting,
    ) -> Result<(Report, Removals), Unfinished> {
        self.collect_and(policy, holders, how, &|| {})
    }

    /// `after_plan` runs between the plan and its execution: for tests of what happens then.
    pub(super) fn collect_and(
        &self,
        policy: &Policy,
        holders: &dyn Holders,
        how: &Collecting,
        after_plan: &dyn Fn(),
    ) -> Result<(Report, Removals), Unfinished> {
        let dry_run = how.dry_run;
        let store = &self.inner;
        // The one before may take its time, by its rate; then it is later than when the caller looked at the clock.
        let asked = Instant::now();
        let one_at_a_time = store.collecting.lock_unless(how.cancel);
        let now = how.now + Duration::from_secs(asked.elapsed().as_secs());
        let how = &Collecting { now, ..*how };
        let (_mark, mut marked) = match one_at_a_time {
            Some(_) => (Some(Mark::begin(store)), mark(store, holders, how)?),
            None => (None, Marked::default()),
        };
        let planned = match marked.complete {
            true => plan(policy, &marked.facts, now),
            false => Plan::default(),
        };
        after_plan();
        let old = std::mem::take(&mut marked.quarantined);
        let mut run = Run {
            store,
            marked: &marked,
            plan: &planned,
            tally: BTreeMap::new(),
            gone: Vec::new(),
            quarantined: Vec::new(),
            history: Vec::new(),
            blocked: marked.blocked.clone(),
            pace: Pace::new(how.rate),
            cancel: how.cancel,
            started: now,
            failures: Failures::default(),
        };
        // What could not be read may need anything: then nothing goes, and a dry run promises nothing else.
        let ended = match run.blocked.is_empty() && marked.complete {
            true => run.carry_out(old, dry_run),
            false => Ok(()),
        };
        let complete = marked.complete && ended.is_ok() && !how.cancel.load(Ordering::Relaxed);
        let (mut report, gone, quarantined) = run.report(dry_run, complete);
        report.failed = ended.as_ref().err().map(Error::to_string);
        let removals = Removals {
            facts: marked.facts,
            orphans: marked.orphans,
            quarantined,
            gone,
        };
        match ended {
            Ok(()) => Ok((report, removals)),
            Err(error) => Err(Unfinished {
                error,
                done: Some(Box::new((report, removals))),
            }),
        }
    }
}

/// From its beginning to its drop nothing that is leased or held is forgotten.
pub(super) struct Mark<'a>(&'a Inner);

impl<'a> Mark<'a> {
    pub(super) fn begin(store: &'a Inner) -> Self {
        store.leases.begin_mark();
        Mark(store)
    }
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        self.0.leases.end_sweep();
    }
}
