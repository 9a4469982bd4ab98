//! What a collection has removed, looked at by the policy: whether it had to go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::{DAY, World};
use crate::store::retention::Reason;
use crate::store::*;

/// What there was before a collection, by the files.
pub struct Before {
    /// Bytes of contents and manifests, and free on the disk.
    size: u64,
    free: u64,
    /// Trees that are history only, and for how long nobody has used them.
    history: BTreeMap<TreeDigest, Duration>,
    contents: BTreeMap<TreeDigest, Vec<(Digest, u64)>>,
    /// For how long nobody has used each content.
    unused: BTreeMap<Digest, Duration>,
}

impl World {
    pub fn before(&self) -> Before {
        let (live, refs) = (self.live(), self.store.refs().unwrap().refs);
        let old = refs.iter().flat_map(|entry| &entry.history);
        let mut history: BTreeMap<TreeDigest, Duration> = BTreeMap::new();
        for old in old.filter(|old| !live.contains(&old.revision.digest)) {
            let tree = old.revision.digest;
            let retired = self.now.duration_since(old.retired_at).unwrap_or_default();
            let unused = retired.min(self.age(&self.root.join("manifests").join(tree.hex())));
            history
                .entry(tree)
                .and_modify(|known| *known = unused.min(*known))
                .or_insert(unused);
        }
        let contents = live.iter().chain(history.keys()).map(|tree| {
            let whole = self.store.load(tree).unwrap();
            let contents = whole.contents().map(|(digest, size)| (*digest, size));
            (*tree, contents.collect())
        });
        let blobs = self.files().into_iter().filter_map(|path| {
            let (name, folder) = (path.file_name()?.to_str()?, path.parent()?.file_name()?.to_str()?);
            let digest = format!("sha256:{folder}{name}").parse().ok()?;
            Some((digest, self.age(&path)))
        });
        Before {
            size: self.files().iter().map(|path| fs::metadata(path).unwrap().len()).sum(),
            free: self.room().1,
            contents: contents.collect(),
            unused: blobs.collect(),
            history,
        }
    }

    pub fn age(&self, path: &Path) -> Duration {
        let then = fs::metadata(path).unwrap().modified().unwrap();
        self.now.duration_since(then).unwrap_or_default()
    }

    /// Nothing went that the policy keeps: each for the reason that is given, and no more than that asked for.
    pub fn check_reasons(&mut self, before: &Before, gone: &[Gone], leased: &BTreeSet<Digest>) {
        let (name, policy) = self.policy.clone();
        let mut trees: BTreeMap<TreeDigest, Reason> = BTreeMap::new();
        for one in gone {
            let why = format!("{one:?} under {name}");
            let unused = match one.kind {
                Kind::Manifest => {
                    let tree = one.name.parse().unwrap();
                    trees.insert(tree, one.reason);
                    let unused = before.history.get(&tree);
                    assert_eq!(unused.is_none(), one.reason == Reason::Orphaned, "{why}");
                    assert!(!self.live().contains(&tree), "{why}");
                    unused.copied()
                }
                Kind::Blob => Some(before.unused[&one.name.parse().unwrap()]),
                _ => panic!("there is no such thing: {why}"),
            };
            let Some(unused) = unused else { continue };
            let age = policy.max_age.unwrap_or(Duration::from_secs(DAY));
            match one.reason {
                Reason::MaxAge => assert!(unused >= policy.max_age.unwrap(), "{why}"),
                Reason::Unreferenced => assert!(unused >= age && unused >= policy.grace, "{why}"),
                Reason::MinCopies => assert!(unused >= policy.max_age.unwrap(), "{why}"),
                Reason::MaxSize | Reason::MinFree => assert!(unused >= policy.grace, "{why}"),
                Reason::Incomplete | Reason::Orphaned => {}
                Reason::QuarantineAge => panic!("{why}"),
            }
            self.count(
                match (one.kind, one.reason) {
                    (Kind::Manifest, Reason::MaxAge) => "trees too old",
                    (Kind::Manifest, Reason::MaxSize | Reason::MinFree) => "trees for room",
                    (Kind::Manifest, Reason::Incomplete) => "incomplete trees",
                    _ => "others",
                },
                1,
            );
        }
        self.check_room(before, gone, &trees);
        if policy.max_size.is_none() && policy.min_free.is_none() {
            let lost = before
                .history
                .keys()
                .filter(|tree| trees.get(*tree) == Some(&Reason::Incomplete));
            assert_eq!(
                lost.copied().collect::<BTreeSet<_>>(),
                self.incomplete(before, &trees, leased),
                "{name}"
            );
        }
    }

    /// What went for want of room: not one more than was needed, and none that was used later than one that stayed.
    fn check_room(&self, before: &Before, gone: &[Gone], trees: &BTreeMap<TreeDigest, Reason>) {
        let policy = &self.policy.1;
        let is_for_room = |reason: &Reason| matches!(reason, Reason::MaxSize | Reason::MinFree);
        // The largest step that may have been the last: a tree with all its contents, or a content.
        let of_tree = |one: &Gone| {
            let contents = one.name.parse().ok().and_then(|tree| before.contents.get(&tree));
            let contents = contents.into_iter().flatten().map(|(_, size)| size).sum::<u64>();
            one.bytes + if one.kind == Kind::Manifest { contents } else { 0 }
        };
        let Some(step) = gone.iter().filter(|one| is_for_room(&one.reason)).map(of_tree).max() else {
            return;
        };
        let freed: u64 = gone.iter().map(|one| one.bytes).sum();
        let was_over = policy.max_size.is_some_and(|most| before.size - freed + step > most)
            || policy
                .min_free
                .is_some_and(|least| (before.free + freed).saturating_sub(step) < least);
        assert!(
            was_over,
            "{freed} bytes went of {} under {:?}",
            before.size, self.policy
        );
        let went = trees
            .iter()
            .filter(|(_, reason)| is_for_room(reason))
            .map(|(tree, _)| before.history[tree]);
        let stayed = before.history.iter().filter(|(tree, _)| !trees.contains_key(*tree));
        let stayed = stayed
            .map(|(_, unused)| *unused)
            .filter(|unused| *unused >= policy.grace);
        if let (Some(went), Some(stayed)) = (went.min(), stayed.max()) {
            assert!(
                went >= stayed,
                "one unused for {went:?} went, one for {stayed:?} stayed"
            );
        }
    }

    /// The history that loses a content to `minCopies`, found by trying again and again.
    fn incomplete(
        &self,
        before: &Before,
        trees: &BTreeMap<TreeDigest, Reason>,
        leased: &BTreeSet<Digest>,
    ) -> BTreeSet<TreeDigest> {
        let (policy, live) = (&self.policy.1, self.live());
        let mut lost = BTreeSet::new();
        let Some(max_age) = policy.max_age else { return lost };
        loop {
            let stays = |tree: &TreeDigest| !lost.contains(tree) && trees.get(tree) != Some(&Reason::MaxAge);
            let staying: Vec<_> = before.contents.iter().filter(|(tree, _)| stays(tree)).collect();
            let has = |contents: &[(Digest, u64)], digest: &Digest| contents.iter().any(|(one, _)| one == digest);
            let goes = |digest: &Digest| {
                let naming = || staying.iter().filter(|(_, contents)| has(contents, digest));
                let unused = before.unused[digest];
                (naming().count() as u32) < policy.min_copies
                    && !naming().any(|(tree, _)| live.contains(*tree))
                    && !leased.contains(digest)
                    && unused >= max_age.max(policy.grace)
            };
            let next: Vec<TreeDigest> = staying
                .iter()
                .filter(|(tree, contents)| !live.contains(*tree) && contents.iter().any(|(digest, _)| goes(digest)))
                .map(|(tree, _)| **tree)
                .collect();
            if next.is_empty() {
                return lost;
            }
            lost.extend(next);
        }
    }
}
