//! What the store's room is used for: when it is counted, and what the status and the metrics say of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tracing::{info, warn};

use super::node::Node;
use super::work::{self, Analysed, Done};
use super::{others, retention};
use crate::api::conditions::reasons;
use crate::api::{BlobAmount, LargestManifest, SharedBlob, SizeBucket, StoreAnalytics, human_size, int64};
use crate::cluster::ObjectKey;
use crate::store::{self, Amount, Analytics, Damage, RefUse};

/// Changes come together: after one, others are waited for so long.
const SETTLE: Duration = Duration::from_secs(2);

/// Least pause between two counts, and least pause in lengths of the last count: it reads every manifest, and may take
/// a fiftieth of a processor.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_FACTOR: u32 = 50;

/// While something is wrong with the store, it is looked this often whether it still is: nobody may tell of the repair.
const RECHECK: Duration = Duration::from_secs(60);

/// How long a retention run is waited for.
const RUN: Duration = Duration::from_secs(60);

/// How many manifests and contents are listed.
pub const LISTED: usize = 10;

/// When to count.
#[derive(Debug)]
pub struct Pace {
    /// The first change that no count has begun after; it may be one to come.
    changed: Option<Instant>,
    counting: bool,
    not_before: Instant,
}

impl Pace {
    /// The first count is due a little later.
    pub fn new(now: Instant) -> Self {
        Self {
            changed: Some(now),
            counting: false,
            not_before: now,
        }
    }

    /// The store changes at this time.
    pub fn changed(&mut self, at: Instant) {
        self.changed = Some(self.changed.map_or(at, |known| known.min(at)));
    }

    /// Begins a count if one is due; `Err`: when it will be, if anything has changed.
    fn begin(&mut self, now: Instant) -> Result<(), Option<Instant>> {
        let due = self.changed.map(|changed| (changed + SETTLE).max(self.not_before));
        match due {
            Some(due) if due <= now && !self.counting => {
                self.changed = None;
                self.counting = true;
                Ok(())
            }
            _ => Err(due.filter(|_| !self.counting)),
        }
    }

    pub fn is_counting(&self) -> bool {
        self.counting
    }

    /// While somebody waits for the next count, the last one, which may have been held up, does not put it off for long.
    fn ended(&mut self, now: Instant, took: Duration, is_waited_for: bool) {
        self.counting = false;
        let pause = PAUSE.max(took * PAUSE_FACTOR);
        self.not_before = now + if is_waited_for { pause.min(RECHECK) } else { pause };
    }
}

/// What is wrong with the store itself, for the NodeStore's Ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub reason: &'static str,
    pub message: String,
}

impl Trouble {
    /// The first thing that is wrong, and how many more there are.
    pub fn of(found: Result<&Damage, &store::Error>) -> Option<Self> {
        let error = |message| Trouble {
            reason: reasons::STORE_ERROR,
            message,
        };
        let damage = match found {
            Ok(damage) => damage,
            Err(failed) => return Some(error(failed.to_string())),
        };
        if let [first, more @ ..] = &damage.problems[..] {
            let others = others(more.len());
            return Some(error(format!("{}: {}{others}", first.path, first.message)));
        }
        let Amount { blobs, bytes } = damage.missing;
        let (what, are) = if blobs == 1 {
            ("content", "is")
        } else {
            ("contents", "are")
        };
        (blobs > 0).then(|| Trouble {
            reason: reasons::CONTENT_MISSING,
            message: format!(
                "{blobs} {what} of trees in use {are} missing, {} in all; `larder store verify` names the trees",
                human_size(bytes)
            ),
        })
    }
}

/// What was counted.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub status: StoreAnalytics,
    /// Bytes that go with a ref and its history.
    pub exclusive: BTreeMap<ObjectKey, i64>,
}

impl Figures {
    pub fn of(found: &Analytics, damage: &Damage) -> Self {
        let named = found
            .refs
            .iter()
            .filter_map(|used| Some((key_of(used)?, int64(used.exclusive_bytes))));
        Self {
            status: status(found, damage),
            exclusive: named.collect(),
        }
    }
}

impl Node {
    /// Begins a count if one is due; gives the time of the next look.
    pub(super) fn analyse(&mut self, now: Instant) -> Option<Instant> {
        // What a short run takes would have to be counted again; a long one must not hold up what is to be said.
        if let Some(run) = &self.collecting
            && now < run.began + RUN
        {
            return Some(run.began + RUN);
        }
        match self.pace.begin(now) {
            Ok(()) => {
                let builder = self.builder.clone();
                self.tasks
                    .spawn_blocking(move || Done::Analysed(Box::new(work::analyse(&builder))));
                None
            }
            Err(due) => due,
        }
    }

    pub(super) fn analysed(&mut self, analysed: Analysed, now: Instant) {
        let Analysed {
            began,
            result,
            trouble,
            is_blocked,
        } = analysed;
        let is_waited_for = trouble.is_some() || self.memory.blocked.is_some();
        self.pace.ended(now, now.duration_since(began), is_waited_for);
        let metrics = &self.health.metrics().store;
        metrics.problems.set(trouble.is_some().into());
        if trouble != self.trouble {
            match &trouble {
                Some(trouble) => warn!(node = self.node, trouble.message, "something is wrong with the store"),
                None => info!(node = self.node, "nothing is wrong with the store any more"),
            }
        }
        if trouble.is_some() {
            self.pace.changed(now + RECHECK);
        }
        self.trouble = trouble;
        if self.memory.blocked.is_some() && !is_blocked && self.ran.is_none_or(|ran| ran < began) {
            retention::unblock(&mut self.memory, Timestamp::now());
            self.saving.wanted.memory = true;
        }
        match result {
            Ok(figures) => {
                show(&figures.status, metrics);
                self.figures = Some(figures);
            }
            Err(error) => warn!(
                node = self.node,
                error, "cannot count what the store's room is used for"
            ),
        }
    }
}

fn status(found: &Analytics, damage: &Damage) -> StoreAnalytics {
    let dedup = &found.dedup;
    let mut largest: Vec<_> = found.refs.iter().filter(|used| used.exclusive_bytes > 0).collect();
    // Those of a size stay in the order of their names.
    largest.sort_by_key(|used| std::cmp::Reverse(used.exclusive_bytes));
    let largest = largest.iter().take(LISTED).filter_map(|used| {
        let ObjectKey { namespace, name } = key_of(used)?;
        Some(LargestManifest {
            namespace,
            name,
            exclusive_bytes: int64(used.exclusive_bytes),
            exclusive: human_size(used.exclusive_bytes),
        })
    });
    let shared = found.top_saved.iter().take(LISTED).map(|blob| SharedBlob {
        digest: format!("sha256:{}", blob.digest.hex()),
        size_bytes: int64(blob.size),
        references: int64(blob.references),
        trees: int64(blob.manifests),
        saved_bytes: int64(blob.saved_bytes),
        saved: human_size(blob.saved_bytes),
    });
    let sizes = found.sizes.iter().map(|bucket| SizeBucket {
        below: bucket.below.map(int64),
        blobs: int64(bucket.amount.blobs),
        size_bytes: int64(bucket.amount.bytes),
    });
    StoreAnalytics {
        trees: int64(dedup.manifests),
        references: int64(dedup.references),
        unique_blobs: int64(dedup.unique_blobs),
        logical_bytes: int64(dedup.logical_bytes),
        logical: human_size(dedup.logical_bytes),
        unique_bytes: int64(dedup.unique_bytes),
        saved_bytes: int64(dedup.saved_bytes),
        saved: human_size(dedup.saved_bytes),
        saved_percent: format!("{:.1}", dedup.saved_percent),
        ratio: format!("{:.2}", dedup.ratio),
        current: amount(found.current),
        history: amount(found.history),
        unnamed: amount(found.unnamed),
        garbage: amount(found.garbage),
        missing: amount(found.missing),
        sizes: sizes.collect(),
        largest_manifests: largest.collect(),
        most_shared: shared.collect(),
        incomplete: !damage.problems.is_empty(),
    }
}

fn key_of(used: &RefUse) -> Option<ObjectKey> {
    let (namespace, name) = used.name.split_once('/')?;
    Some(ObjectKey::new(namespace, name))
}

fn amount(amount: Amount) -> BlobAmount {
    BlobAmount {
        blobs: int64(amount.blobs),
        size_bytes: int64(amount.bytes),
        size: human_size(amount.bytes),
    }
}

fn show(status: &StoreAnalytics, metrics: &crate::telemetry::StoreMetrics) {
    metrics.trees.set(status.trees);
    metrics.references.set(status.references);
    metrics.logical_bytes.set(status.logical_bytes);
    metrics.unique_bytes.set(status.unique_bytes);
    metrics.saved_bytes.set(status.saved_bytes);
    for (by, amount) in [
        ("current", &status.current),
        ("history", &status.history),
        ("unnamed", &status.unnamed),
        ("garbage", &status.garbage),
    ] {
        metrics.used(by, amount.blobs, amount.size_bytes);
    }
    metrics.missing_blobs.set(status.missing.blobs);
    metrics.missing_bytes.set(status.missing.size_bytes);
    for bucket in &status.sizes {
        metrics.below(bucket.below, bucket.blobs, bucket.size_bytes);
    }
    let largest = status.largest_manifests.iter();
    metrics.largest(largest.map(|one| (one.namespace.as_str(), one.name.as_str(), one.exclusive_bytes)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Problem;

    #[test]
    fn what_is_wrong_is_said_with_the_worst_first() {
        let problem = |path: &str| Problem {
            path: path.to_owned(),
            message: "no".to_owned(),
        };
        let said = |damage: &Damage| Trouble::of(Ok(damage)).map(|trouble| (trouble.reason, trouble.message));
        let mut damage = Damage::default();
        assert_eq!(said(&damage), None);
        damage.missing = Amount { blobs: 2, bytes: 2048 };
        let (reason, message) = said(&damage).unwrap();
        assert_eq!(reason, "ContentMissing");
        assert!(
            message.starts_with("2 contents of trees in use are missing, 2Ki in all"),
            "{message}"
        );
        damage.problems = vec![problem("refs/a/b"), problem("refs/c/d")];
        assert_eq!(
            said(&damage),
            Some(("StoreError", "refs/a/b: no (and 1 more)".to_owned()))
        );
    }

    #[test]
    fn changes_are_counted_together_and_counting_is_a_small_part_of_the_time() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start);
        assert_eq!(pace.begin(start), Err(Some(at(2))));
        pace.changed(at(1));
        assert_eq!(pace.begin(at(2)), Ok(()), "later changes do not put it off");
        assert_eq!(pace.begin(at(3)), Err(None), "one at a time");
        pace.changed(at(3));
        pace.ended(at(4), Duration::from_secs(2), false);
        assert_eq!(pace.begin(at(9)), Err(Some(at(104))));
        assert_eq!(pace.begin(at(104)), Ok(()));
        pace.ended(at(104), Duration::from_millis(1), false);
        assert_eq!(pace.begin(at(200)), Err(None), "nothing has changed");
        // A look that is planned holds up nothing.
        pace.changed(at(260));
        pace.changed(at(200));
        assert_eq!(pace.begin(at(201)), Err(Some(at(202))));
        assert_eq!(pace.begin(at(202)), Ok(()));
        pace.changed(at(203));
        pace.ended(at(210), Duration::from_secs(8), true);
        assert_eq!(pace.begin(at(211)), Err(Some(at(270))), "somebody waits");
    }
}
