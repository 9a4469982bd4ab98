//! Collecting: finding out what is live, having `retention.rs` plan, and carrying the plan out so that nothing that
//! anybody needs can be lost.
//!
//! 1. **Mark.** From its beginning nothing that is leased or held is forgotten (`leases.rs`). All refs, holders and
//!    holds are read, then the manifests that they name. If anything of that cannot be read, nothing is deleted.
//! 2. **Drop** images, then history from refs, then manifests: each manifest under the lock that a hold takes.
//! 3. **Look again**: every manifest that is in `manifests/` now and was not marked protects its blobs too. Sync.
//! 4. **Sweep** shard by shard; under the shard's lock the leases are looked at once more.
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
use std::time::SystemTime;

use serde::Serialize;

use super::files::lock;
use super::layout::Inner;
use super::retention::{OverLimit, Policy, Reason, plan};
use super::{Error, Problem, Store, TreeDigest, quarantine, time};
use mark::mark;
pub(super) use mark::stored_manifests;
use run::Run;

/// The trees that something outside the store needs: layers, mounts, pod volumes.
pub trait Holders {
    /// Is asked once per collection, after its mark has begun. An error stops the collection.
    fn held(&self) -> Result<Held, Error>;
}

/// See [`Holders`].
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub trees: Vec<TreeDigest>,
    /// What could not be read, and may name any tree. Anything here stops all deletion.
    pub unreadable: Vec<Problem>,
}

/// What a collection did, or with `dry_run` would do.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub dry_run: bool,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DroppedHistory {
    /// The ref, as `namespace/name`.
    pub name: String,
    pub digest: TreeDigest,
    pub reason: Reason,
}

/// How much of a kind went, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    Image,
    Manifest,
    Blob,
    /// A damaged blob in `quarantine/`.
    Quarantined,
}

impl Store {
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
    ) -> Result<Report, Error> {
        self.collect_and(policy, holders, dry_run, now, &|| {})
    }

    /// `after_plan` runs between the plan and its execution: for tests of what happens then.
    pub(super) fn collect_and(
        &self,
        policy: &Policy,
        holders: &dyn Holders,
        dry_run: bool,
        now: SystemTime,
        after_plan: &dyn Fn(),
    ) -> Result<Report, Error> {
        let store = &self.inner;
        let _one_at_a_time = lock(&store.collecting);
        let _mark = Mark::begin(store);
        let marked = mark(store, holders, now)?;
        let planned = plan(policy, &marked.facts, now);
        after_plan();
        let mut run = Run {
            store,
            marked: &marked,
            plan: &planned,
            tally: BTreeMap::new(),
            history: Vec::new(),
            blocked: marked.blocked.clone(),
        };
        // What could not be read may need anything: then nothing goes, and a dry run promises nothing else.
        if run.blocked.is_empty() {
            // It is needed by nothing, whatever is live.
            run.expire(&quarantine::old(store, now)?, dry_run)?;
            match dry_run {
                true => run.pretend(),
                false => {
                    run.execute()?;
                    // A ref that was rewritten on a full disk has used it up.
                    store.ensure_spare()?;
                }
            }
        }
        Ok(run.report(dry_run, now))
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
