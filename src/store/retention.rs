//! Which history, images and blobs a node need not keep: a pure function from a policy and facts to a plan.
//!
//! Live is never in a plan: what a current revision, a layer, a mount, a hold or a running build needs. Besides, in
//! this order:
//!
//! 1. history that was not used for `max_age` is dropped;
//! 2. blobs with fewer than `min_copies` references from stored manifests, not fresh and not used for `max_age`, go;
//!    history that loses a blob is dropped whole, which may lower other counts, until nothing changes. Without
//!    `max_age`, blobs without any reference go after [`UNREFERENCED_AGE`], and the others stay;
//! 3. while the store is over `max_size` or the disk under `min_free`: unused images, then the longest-unused of
//!    history and unreferenced blobs;
//! 4. if it is still over then, the plan says what takes the room.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Digest, TreeDigest};

/// How long blobs without any reference stay if no policy says otherwise: 24 hours.
pub const UNREFERENCED_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// The limits of a node. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Drop what was not used for so long.
    pub max_age: Option<Duration>,
    /// Largest size of objects, manifests and images together.
    pub max_size: Option<u64>,
    /// Least free space of the file system.
    pub min_free: Option<u64>,
    /// Blobs with fewer references than this are kept only for `max_age`, even if history names them. 0: none go so.
    pub min_copies: u32,
    /// Blobs used within this time stay.
    pub grace: Duration,
}

impl Policy {
    /// What holds on a node without a policy: unreferenced blobs older than [`UNREFERENCED_AGE`] go.
    pub fn built_in() -> Self {
        Self {
            max_age: None,
            max_size: None,
            min_free: None,
            min_copies: 1,
            grace: Duration::from_secs(60 * 60),
        }
    }
}

impl Policy {
    /// Which limit a store of this size breaks on a disk with so much free, in bytes.
    pub fn broken_by(&self, size: u64, free: u64) -> Option<Reason> {
        if self.max_size.is_some_and(|most| size > most) {
            return Some(Reason::MaxSize);
        }
        let is_full = self.min_free.is_some_and(|least| free < least);
        is_full.then_some(Reason::MinFree)
    }
}

/// Who needs a manifest that is live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Live {
    /// A ref's current revision.
    Current,
    /// A layer.
    Layer,
    /// A mount or a hold.
    InUse,
}

/// A stored manifest that a ref, a holder or a hold names.
#[derive(Debug, Clone)]
pub struct ManifestFact {
    pub tree: TreeDigest,
    /// Bytes of the manifest itself.
    pub size: u64,
    /// `None`: it is history only.
    pub live: Option<Live>,
    /// When it stopped being live or was last used, whichever is later.
    pub unused_since: SystemTime,
    /// Indices in [`Facts::blobs`], each once.
    pub blobs: Vec<u32>,
    /// Who needs it, for messages.
    pub needed_by: Vec<String>,
}

/// A content that a stored manifest names or that is in the store.
#[derive(Debug, Clone)]
pub struct BlobFact {
    pub digest: Digest,
    pub size: u64,
    pub last_used: SystemTime,
    /// Does a running build, or one that ended just now, need it?
    pub leased: bool,
    /// Is it in the store? If not, it is damage that others report; here it takes no room.
    pub present: bool,
}

/// A derived image of a tree.
#[derive(Debug, Clone)]
pub struct ImageFact {
    pub name: String,
    pub tree: TreeDigest,
    pub size: u64,
    pub in_use: bool,
    pub last_used: SystemTime,
}

/// What a plan is made from.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub manifests: Vec<ManifestFact>,
    pub blobs: Vec<BlobFact>,
    pub images: Vec<ImageFact>,
    /// Bytes of manifests that nothing names and that go whatever the policy.
    pub orphans: u64,
    /// Bytes in quarantine that go whatever the policy. They are no part of the store's size.
    pub expired: u64,
    /// Bytes free on the file system.
    pub free: u64,
    /// Bytes of the whole file system, but for what it reserves.
    pub total: u64,
}

/// Why something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reason {
    /// History not used for `maxAge`.
    MaxAge,
    /// A blob that nothing names, not used for `maxAge` (24 h without one).
    Unreferenced,
    /// A blob with fewer than `minCopies` references, not used for `maxAge`.
    MinCopies,
    /// History that lost a blob to `minCopies`.
    Incomplete,
    /// The store was over `maxSize`.
    MaxSize,
    /// The disk was under `minFree`.
    MinFree,
    /// A manifest or image of a tree that nothing names.
    Orphaned,
    /// A damaged blob, quarantined for 30 days (no policy changes this).
    QuarantineAge,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::MaxAge => "not used for maxAge",
            Reason::Unreferenced => "nothing refers to it and it was not used for maxAge (24h if none is set)",
            Reason::MinCopies => "fewer than minCopies references and not used for maxAge",
            Reason::Incomplete => "it lost a file's content to minCopies",
            Reason::MaxSize => "the store was over maxSize; images first, then what was unused the longest",
            Reason::MinFree => "the disk was under minFree; images first, then what was unused the longest",
            Reason::Orphaned => "nothing refers to its tree",
            Reason::QuarantineAge => "it was found damaged and quarantined 30 days ago",
        })
    }
}

/// What still takes room, in bytes; each blob counts under the first cause that applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Causes {
    /// Contents of current revisions.
    pub current: u64,
    /// Contents that no current revision needs, but a layer.
    pub layers: u64,
    /// Contents that only mounts or holds need.
    pub in_use: u64,
    /// Contents that only running builds need.
    pub building: u64,
    /// Contents used within the grace period.
    pub fresh: u64,
    /// Other contents: of history within its grace period.
    pub history: u64,
    pub manifests: u64,
    pub images: u64,
}

impl Causes {
    /// What takes room and how many bytes, the largest first.
    pub fn largest_first(&self) -> Vec<(&'static str, u64)> {
        let mut causes = vec![
            ("current trees", self.current),
            ("layers", self.layers),
            ("mounts", self.in_use),
            ("builds under way", self.building),
            ("fresh contents", self.fresh),
            ("history", self.history),
            ("manifests", self.manifests),
            ("images", self.images),
        ];
        causes.retain(|(_, bytes)| *bytes > 0);
        causes.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        causes
    }
}

/// The limits are not met although everything that may go goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverLimit {
    /// Bytes of the store after the plan.
    pub size: u64,
    pub max_size: Option<u64>,
    /// Bytes free after the plan.
    pub free: u64,
    pub min_free: Option<u64>,
    /// Bytes on the file system that are not the store's, about.
    #[serde(default)]
    pub others: u64,
    pub causes: Causes,
    /// The trees that are needed and hold most that no other stored tree does, the largest first; at most five.
    pub largest: Vec<Holder>,
}

impl OverLimit {
    /// What takes room and how many bytes, the largest first; what is not the store's only if it is the disk that is full.
    pub fn largest_first(&self) -> Vec<(&'static str, u64)> {
        let mut takers = self.causes.largest_first();
        if self.min_free.is_some_and(|least| self.free < least) && self.others > 0 {
            takers.push(("layers' own files and others on the disk", self.others));
            takers.sort_by_key(|(_, bytes)| Reverse(*bytes));
        }
        takers
    }
}

/// A tree that takes room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    pub tree: TreeDigest,
    /// Who needs it: refs as `namespace/name`, layers, mounts.
    pub needed_by: Vec<String>,
    /// Bytes of its contents that no other stored tree names: what would be freed if nobody needed it.
    pub exclusive: u64,
}

/// Holders that are named.
const HOLDERS: usize = 5;

/// What goes; indices into the facts, sorted. Everything else stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    pub manifests: Vec<(usize, Reason)>,
    pub images: Vec<(usize, Reason)>,
    pub blobs: Vec<(usize, Reason)>,
    pub over_limit: Option<OverLimit>,
}

/// Makes the plan, at its fixed point: carried out and planned again at the same time, nothing more goes.
pub fn plan(policy: &Policy, facts: &Facts, now: SystemTime) -> Plan {
    let mut planner = Planner::new(policy, facts, now);
    planner.by_age();
    planner.images_of_dropped();
    planner.by_size();
    planner.finish()
}

/// A time in the future counts as now: clocks go wrong, and an age is never negative.
fn age(now: SystemTime, then: SystemTime) -> Duration {
    now.duration_since(then).unwrap_or_default()
}

struct Planner<'a> {
    policy: &'a Policy,
    facts: &'a Facts,
    now: SystemTime,
    manifests: Vec<Option<Reason>>,
    images: Vec<Option<Reason>>,
    blobs: Vec<Option<Reason>>,
    /// References of each blob from manifests that stay.
    counts: Vec<u32>,
    live: Vec<bool>,
    /// History that names a blob; only filled if a blob may go although history names it.
    named_by: HashMap<u32, Vec<u32>>,
    size: u64,
    free: u64,
    /// While limits are enforced: what may go, the longest unused first.
    queue: Option<BinaryHeap<Reverse<Candidate>>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    last_used: SystemTime,
    /// Total order, so that a plan does not depend on the order of the facts.
    name: [u8; 32],
    what: What,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Manifest(usize),
    Blob(usize),
}

impl<'a> Planner<'a> {
    fn new(policy: &'a Policy, facts: &'a Facts, now: SystemTime) -> Self {
        let mut counts = vec![0u32; facts.blobs.len()];
        let mut live: Vec<bool> = facts.blobs.iter().map(|blob| blob.leased).collect();
        let mut named_by: HashMap<u32, Vec<u32>> = HashMap::new();
        for (index, manifest) in facts.manifests.iter().enumerate() {
            for blob in &manifest.blobs {
                counts[*blob as usize] += 1;
                if manifest.live.is_some() {
                    live[*blob as usize] = true;
                } else if policy.min_copies > 1 {
                    named_by.entry(*blob).or_default().push(index as u32);
                }
            }
        }
        let blobs = facts.blobs.iter().filter(|blob| blob.present).map(|blob| blob.size);
        let manifests = facts.manifests.iter().map(|manifest| manifest.size);
        let images = facts.images.iter().map(|image| image.size);
        Self {
            size: blobs.chain(manifests).chain(images).fold(0, u64::saturating_add),
            free: facts.free.saturating_add(facts.orphans).saturating_add(facts.expired),
            manifests: vec![None; facts.manifests.len()],
            images: vec![None; facts.images.len()],
            blobs: vec![None; facts.blobs.len()],
            policy,
            facts,
            now,
            counts,
            live,
            named_by,
            queue: None,
        }
    }

    fn is_fresh(&self, then: SystemTime) -> bool {
        age(self.now, then) < self.policy.grace
    }

    /// Rules 1 and 2.
    fn by_age(&mut self) {
        if let Some(max_age) = self.policy.max_age {
            let manifests = self.facts.manifests.iter().enumerate();
            let old = manifests.filter(|(_, one)| one.live.is_none() && age(self.now, one.unused_since) >= max_age);
            let old = old.map(|(index, _)| index).collect();
            // All of them before any blob: what is too old goes for that, not for what its neighbours lost.
            self.drop_manifests(old, Reason::MaxAge);
        }
        self.settle((0..self.facts.blobs.len()).collect());
    }

    /// Drops manifests. Returns the blobs that they named, each once: their counts are lower now.
    fn drop_manifests(&mut self, manifests: Vec<usize>, reason: Reason) -> Vec<usize> {
        let facts = self.facts;
        let mut named = Vec::new();
        for index in manifests {
            self.manifests[index] = Some(reason);
            self.gone(facts.manifests[index].size);
            for blob in &facts.manifests[index].blobs {
                self.counts[*blob as usize] -= 1;
                named.push(*blob as usize);
            }
        }
        named.sort_unstable();
        named.dedup();
        named
    }

    /// Rule 2 for blobs whose counts have changed, until nothing does any more.
    ///
    /// In rounds, each with the counts as they were at its beginning, so that the reasons do not depend on an order.
    fn settle(&mut self, mut blobs: Vec<usize>) {
        loop {
            let mut losers = Vec::new();
            for blob in blobs {
                match self.judge(blob) {
                    Some(reason) => {
                        self.drop_blob(blob, reason);
                        let named_by = self.named_by.get(&(blob as u32)).into_iter().flatten();
                        losers.extend(named_by.map(|index| *index as usize));
                    }
                    None => self.enqueue(blob),
                }
            }
            losers.retain(|index| self.manifests[*index].is_none());
            losers.sort_unstable();
            losers.dedup();
            if losers.is_empty() {
                return;
            }
            blobs = self.drop_manifests(losers, Reason::Incomplete);
        }
    }

    fn may_go(&self, index: usize) -> bool {
        let blob = &self.facts.blobs[index];
        blob.present && !self.live[index] && self.blobs[index].is_none() && !self.is_fresh(blob.last_used)
    }

    /// Why a blob goes by rule 2, if it does.
    fn judge(&self, index: usize) -> Option<Reason> {
        let count = self.counts[index];
        if count >= self.policy.min_copies || !self.may_go(index) {
            return None;
        }
        let (limit, reason) = match count {
            0 => (self.policy.max_age.unwrap_or(UNREFERENCED_AGE), Reason::Unreferenced),
            _ => (self.policy.max_age?, Reason::MinCopies),
        };
        (age(self.now, self.facts.blobs[index].last_used) >= limit).then_some(reason)
    }

    /// While limits are enforced, a blob that nothing names waits for its turn.
    fn enqueue(&mut self, index: usize) {
        if self.counts[index] != 0 || !self.may_go(index) {
            return;
        }
        if let Some(queue) = &mut self.queue {
            let blob = &self.facts.blobs[index];
            queue.push(Reverse(Candidate {
                last_used: blob.last_used,
                name: *blob.digest.as_bytes(),
                what: What::Blob(index),
            }));
        }
    }

    fn drop_blob(&mut self, index: usize, reason: Reason) {
        self.blobs[index] = Some(reason);
        self.gone(self.facts.blobs[index].size);
    }

    fn drop_image(&mut self, index: usize, reason: Reason) {
        self.images[index] = Some(reason);
        self.gone(self.facts.images[index].size);
    }

    fn gone(&mut self, size: u64) {
        self.size = self.size.saturating_sub(size);
        self.free = self.free.saturating_add(size);
    }

    /// An image goes before the blobs of its tree, so with its manifest.
    fn images_of_dropped(&mut self) {
        let stay = |(index, manifest): (usize, &ManifestFact)| self.manifests[index].is_none().then_some(manifest.tree);
        let facts = self.facts;
        let stays: std::collections::HashSet<TreeDigest> =
            facts.manifests.iter().enumerate().filter_map(stay).collect();
        for (index, image) in facts.images.iter().enumerate() {
            if !image.in_use && !stays.contains(&image.tree) && self.images[index].is_none() {
                self.drop_image(index, Reason::Orphaned);
            }
        }
    }

    fn over(&self) -> Option<Reason> {
        self.policy.broken_by(self.size, self.free)
    }

    /// Rule 3.
    fn by_size(&mut self) {
        if self.over().is_none() {
            return;
        }
        let facts = self.facts;
        let mut unused: Vec<usize> = (0..facts.images.len()).filter(|i| !facts.images[*i].in_use).collect();
        unused.sort_by_key(|i| (facts.images[*i].last_used, &facts.images[*i].name));
        for image in unused {
            match self.over() {
                Some(reason) if self.images[image].is_none() => self.drop_image(image, reason),
                Some(_) => {}
                None => return,
            }
        }
        self.queue = Some(BinaryHeap::new());
        for blob in 0..facts.blobs.len() {
            self.enqueue(blob);
        }
        for (index, manifest) in facts.manifests.iter().enumerate() {
            let may_go = manifest.live.is_none() && self.manifests[index].is_none();
            if may_go && !self.is_fresh(manifest.unused_since) {
                let candidate = Candidate {
                    last_used: manifest.unused_since,
                    name: *manifest.tree.as_bytes(),
                    what: What::Manifest(index),
                };
                self.queue.get_or_insert_default().push(Reverse(candidate));
            }
        }
        while let Some(reason) = self.over() {
            match self.queue.as_mut().and_then(BinaryHeap::pop) {
                Some(Reverse(Candidate {
                    what: What::Manifest(index),
                    ..
                })) => {
                    // Perhaps it has lost a blob since it was put in the queue.
                    if self.manifests[index].is_none() {
                        let named = self.drop_manifests(vec![index], reason);
                        self.settle(named);
                    }
                }
                Some(Reverse(Candidate {
                    what: What::Blob(index),
                    ..
                })) => {
                    if self.blobs[index].is_none() {
                        self.drop_blob(index, reason);
                    }
                }
                None => return,
            }
        }
    }

    fn finish(mut self) -> Plan {
        // Rule 3 may have dropped manifests, all images of which are gone already; but not if it stopped before.
        self.images_of_dropped();
        let over_limit = self.over().map(|_| OverLimit {
            size: self.size,
            max_size: self.policy.max_size,
            free: self.free,
            min_free: self.policy.min_free,
            others: self.facts.total.saturating_sub(self.free.saturating_add(self.size)),
            causes: self.causes(),
            largest: self.largest(),
        });
        fn chosen(reasons: Vec<Option<Reason>>) -> Vec<(usize, Reason)> {
            let numbered = reasons.into_iter().enumerate();
            numbered.filter_map(|(index, reason)| Some((index, reason?))).collect()
        }
        Plan {
            manifests: chosen(self.manifests),
            images: chosen(self.images),
            blobs: chosen(self.blobs),
            over_limit,
        }
    }

    /// The trees that hold most, for rule 4.
    fn largest(&self) -> Vec<Holder> {
        let facts = self.facts;
        let exclusive = |manifest: &ManifestFact| {
            let alone = manifest.blobs.iter().filter(|blob| self.counts[**blob as usize] == 1);
            let sizes = alone
                .map(|blob| &facts.blobs[*blob as usize])
                .filter(|blob| blob.present);
            sizes.fold(0, |sum: u64, blob| sum.saturating_add(blob.size))
        };
        let live = facts.manifests.iter().filter(|manifest| manifest.live.is_some());
        let mut holders: Vec<(u64, &ManifestFact)> = live.map(|manifest| (exclusive(manifest), manifest)).collect();
        holders.sort_by_key(|(exclusive, manifest)| (Reverse(*exclusive), manifest.tree));
        holders.truncate(HOLDERS);
        let named = holders.into_iter().map(|(exclusive, manifest)| Holder {
            tree: manifest.tree,
            needed_by: manifest.needed_by.clone(),
            exclusive,
        });
        named.collect()
    }

    /// Rule 4: what is left.
    fn causes(&self) -> Causes {
        let facts = self.facts;
        // By whom each is needed, if at all: the first of these counts.
        let mut needed: Vec<Option<Live>> = vec![None; facts.blobs.len()];
        for manifest in &facts.manifests {
            let Some(live) = manifest.live else { continue };
            for blob in &manifest.blobs {
                let known = &mut needed[*blob as usize];
                *known = Some(known.map_or(live, |known| known.min(live)));
            }
        }
        let mut causes = Causes::default();
        for (index, blob) in facts.blobs.iter().enumerate() {
            if !blob.present || self.blobs[index].is_some() {
                continue;
            }
            let cause = match needed[index] {
                Some(Live::Current) => &mut causes.current,
                Some(Live::Layer) => &mut causes.layers,
                Some(Live::InUse) => &mut causes.in_use,
                None if blob.leased => &mut causes.building,
                None if self.is_fresh(blob.last_used) => &mut causes.fresh,
                None => &mut causes.history,
            };
            *cause = cause.saturating_add(blob.size);
        }
        let left = |reasons: &[Option<Reason>], size: &dyn Fn(usize) -> u64| {
            let stays = reasons.iter().enumerate().filter(|(_, reason)| reason.is_none());
            stays.map(|(index, _)| size(index)).fold(0, u64::saturating_add)
        };
        causes.manifests = left(&self.manifests, &|index| facts.manifests[index].size);
        causes.images = left(&self.images, &|index| facts.images[index].size);
        causes
    }
}

#[cfg(test)]
mod tests;
