//! What the store's room is used for: when it is counted, and what the status and the metrics say of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::node::Node;
use super::work::{self, Analysed, Done};
use crate::api::{BlobAmount, LargestManifest, SharedBlob, SizeBucket, StoreAnalytics, human_size};
use crate::cluster::ObjectKey;
use crate::store::{Amount, Analytics};

/// Changes come together: after one, others are waited for so long.
const SETTLE: Duration = Duration::from_secs(2);

/// Least pause between two counts, and least pause in lengths of the last count: it reads every manifest, and may take
/// a fiftieth of a processor.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_FACTOR: u32 = 50;

/// While something is wrong with the store, it is looked this often whether it still is: nobody may tell of the repair.
const RECHECK: Duration = Duration::from_secs(60);

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

    fn ended(&mut self, now: Instant, took: Duration) {
        self.counting = false;
        self.not_before = now + PAUSE.max(took * PAUSE_FACTOR);
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
    pub fn of(found: &Analytics) -> Self {
        let named = found.refs.iter().filter_map(|used| {
            let (namespace, name) = used.name.split_once('/')?;
            Some((ObjectKey::new(namespace, name), number(used.exclusive_bytes)))
        });
        Self {
            status: status(found),
            exclusive: named.collect(),
        }
    }
}

impl Node {
    /// Begins a count if one is due; gives the time of the next look.
    pub(super) fn analyse(&mut self, now: Instant) -> Option<Instant> {
        // What a run takes would have to be counted again.
        if self.collecting.is_some() {
            return None;
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
        let Analysed { began, result, problem } = analysed;
        self.pace.ended(now, now.duration_since(began));
        if problem != self.problem {
            match &problem {
                Some(problem) => warn!(node = self.node, problem, "something is wrong with the store"),
                None => debug!(node = self.node, "nothing is wrong with the store any more"),
            }
        }
        self.problem = problem;
        if self.problem.is_some() {
            self.pace.changed(now + RECHECK);
        } else if self.memory.blocked && self.ran.is_none_or(|ran| ran < began) {
            // What kept the last run from deleting is mended; that is said before there is another run.
            (self.memory.blocked, self.memory.state.problem) = (false, None);
            self.unsaved.memory = true;
        }
        match result {
            Ok(figures) => {
                show(&figures.status, &self.health.metrics().store);
                self.figures = Some(figures);
            }
            Err(error) => warn!(
                node = self.node,
                error, "cannot count what the store's room is used for"
            ),
        }
    }
}

fn status(found: &Analytics) -> StoreAnalytics {
    let dedup = &found.dedup;
    let mut largest: Vec<_> = found.refs.iter().filter(|used| used.exclusive_bytes > 0).collect();
    // Those of a size stay in the order of their names.
    largest.sort_by_key(|used| std::cmp::Reverse(used.exclusive_bytes));
    let largest = largest.iter().take(LISTED).map(|used| LargestManifest {
        name: used.name.clone(),
        exclusive_bytes: number(used.exclusive_bytes),
        exclusive: human_size(used.exclusive_bytes),
    });
    let shared = found.top_saved.iter().take(LISTED).map(|blob| SharedBlob {
        digest: format!("sha256:{}", blob.digest.hex()),
        size_bytes: number(blob.size),
        references: number(blob.references),
        manifests: number(blob.manifests),
        saved_bytes: number(blob.saved_bytes),
        saved: human_size(blob.saved_bytes),
    });
    let sizes = found.sizes.iter().map(|bucket| SizeBucket {
        below: bucket.below.map(number),
        blobs: number(bucket.amount.blobs),
        bytes: number(bucket.amount.bytes),
    });
    StoreAnalytics {
        manifests: number(dedup.manifests),
        references: number(dedup.references),
        unique_blobs: number(dedup.unique_blobs),
        logical_bytes: number(dedup.logical_bytes),
        logical: human_size(dedup.logical_bytes),
        unique_bytes: number(dedup.unique_bytes),
        saved_bytes: number(dedup.saved_bytes),
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
        incomplete: dedup.incomplete,
    }
}

fn amount(amount: Amount) -> BlobAmount {
    BlobAmount {
        blobs: number(amount.blobs),
        bytes: number(amount.bytes),
        size: human_size(amount.bytes),
    }
}

fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn show(status: &StoreAnalytics, metrics: &crate::telemetry::StoreMetrics) {
    metrics.manifests.set(status.manifests);
    metrics.references.set(status.references);
    metrics.logical_bytes.set(status.logical_bytes);
    metrics.unique_bytes.set(status.unique_bytes);
    metrics.saved_bytes.set(status.saved_bytes);
    for (of, amount) in [
        ("current", &status.current),
        ("history", &status.history),
        ("unnamed", &status.unnamed),
        ("garbage", &status.garbage),
        ("missing", &status.missing),
    ] {
        metrics.of(of, amount.blobs, amount.bytes);
    }
    for bucket in &status.sizes {
        metrics.below(bucket.below, bucket.blobs, bucket.bytes);
    }
    metrics.largest(
        status
            .largest_manifests
            .iter()
            .map(|largest| (largest.name.as_str(), largest.exclusive_bytes)),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

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
        pace.ended(at(4), Duration::from_secs(2));
        assert_eq!(pace.begin(at(9)), Err(Some(at(104))));
        assert_eq!(pace.begin(at(104)), Ok(()));
        pace.ended(at(104), Duration::from_millis(1));
        assert_eq!(pace.begin(at(200)), Err(None), "nothing has changed");
        // A look that is planned holds up nothing.
        pace.changed(at(260));
        pace.changed(at(200));
        assert_eq!(pace.begin(at(201)), Err(Some(at(202))));
        assert_eq!(pace.begin(at(202)), Ok(()));
    }
}
