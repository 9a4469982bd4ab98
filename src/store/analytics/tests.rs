//! The figures against a naive computation of its own, which reads whole trees and the files on disk.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::SystemTime;

use proptest::prelude::*;

use super::*;
use crate::store::Store;
use crate::store::testing::*;
use crate::store::tree::{LeafId, LeafKind, Node, Tree};

/// The contents of [`any_steps`] are `seed` repeated.
fn known_contents() -> Vec<Vec<u8>> {
    (0u8..20).map(|seed| vec![seed; usize::from(seed) * 3]).collect()
}

fn publish_grown(store: &Store, ref_name: &str, tree: &Tree) -> TreeDigest {
    let build = store.build().unwrap();
    for content in known_contents() {
        build.put_bytes(&content).unwrap();
    }
    let tree = tree.clone().finish().unwrap();
    let mut target = target(ref_name, "uid-1");
    target.history_limit = 3;
    build.publish(&tree, target).unwrap().digest
}

/// Every figure, from whole trees in memory.
fn naive(store: &Store, top: usize) -> Analytics {
    let refs = store.refs().unwrap().refs;
    let mut trees: BTreeMap<TreeDigest, Tree> = BTreeMap::new();
    for entry in std::fs::read_dir(store.root().join("manifests")).unwrap() {
        let digest = TreeDigest::from_hex(entry.unwrap().file_name().to_str().unwrap()).unwrap();
        trees.insert(digest, store.load(&digest).unwrap());
    }
    let current: BTreeSet<TreeDigest> = refs
        .iter()
        .filter_map(|r| r.current.as_ref())
        .map(|r| r.digest)
        .collect();
    let history: BTreeSet<TreeDigest> = refs
        .iter()
        .flat_map(|r| &r.history)
        .map(|r| r.revision.digest)
        .collect();
    let leaves = |tree: &Tree| -> Vec<(Digest, u64)> {
        tree.leaves
            .iter()
            .filter_map(|leaf| match leaf.kind {
                LeafKind::File { digest, size } => Some((digest, size)),
                _ => None,
            })
            .collect()
    };
    let all: Vec<(Digest, u64)> = trees.values().flat_map(leaves).collect();
    let unique: BTreeMap<Digest, u64> = all.iter().copied().collect();
    let of = |chosen: &dyn Fn(&TreeDigest) -> bool| -> BTreeMap<Digest, u64> {
        let chosen = trees.iter().filter(|(digest, _)| chosen(digest));
        chosen.flat_map(|(_, tree)| leaves(tree)).collect()
    };
    let amount = |blobs: &BTreeMap<Digest, u64>| Amount {
        blobs: blobs.len() as u64,
        bytes: blobs.values().sum(),
    };
    let in_current = of(&|digest| current.contains(digest));
    let mut in_history = of(&|digest| history.contains(digest));
    in_history.retain(|digest, _| !in_current.contains_key(digest));
    let mut in_unnamed = of(&|digest| !current.contains(digest) && !history.contains(digest));
    in_unnamed.retain(|digest, _| !in_current.contains_key(digest) && !in_history.contains_key(digest));
    let mut on_disk: BTreeMap<Digest, u64> = BTreeMap::new();
    for shard in std::fs::read_dir(store.root().join("objects")).unwrap() {
        let shard = shard.unwrap();
        for blob in std::fs::read_dir(shard.path()).unwrap() {
            let blob = blob.unwrap();
            let hex = format!(
                "{}{}",
                shard.file_name().to_str().unwrap(),
                blob.file_name().to_str().unwrap()
            );
            on_disk.insert(Digest::from_hex(&hex).unwrap(), blob.metadata().unwrap().len());
        }
    }
    let mut garbage = on_disk.clone();
    garbage.retain(|digest, _| !unique.contains_key(digest));
    let references = |digest: &Digest| all.iter().filter(|(other, _)| other == digest).count() as u64;
    let naming = |digest: &Digest| -> Vec<TreeDigest> {
        let naming = trees
            .iter()
            .filter(|(_, tree)| leaves(tree).iter().any(|(other, _)| other == digest));
        naming.map(|(tree, _)| *tree).collect()
    };
    let mut missing = unique.clone();
    missing.retain(|digest, _| {
        let is_needed = |tree: &TreeDigest| current.contains(tree) || history.contains(tree);
        !on_disk.contains_key(digest) && naming(digest).iter().any(is_needed)
    });

    let names_of = |digest: &TreeDigest| {
        let current: Vec<String> = refs
            .iter()
            .filter(|r| r.current.as_ref().is_some_and(|r| r.digest == *digest))
            .map(|r| r.name.to_string())
            .collect();
        let history: Vec<String> = refs
            .iter()
            .filter(|r| r.history.iter().any(|old| old.revision.digest == *digest))
            .map(|r| r.name.to_string())
            .collect();
        (current, history)
    };
    let mut manifests: Vec<ManifestUse> = trees
        .iter()
        .map(|(digest, tree)| {
            let (current_of, history_of) = names_of(digest);
            let distinct: BTreeMap<Digest, u64> = leaves(tree).into_iter().collect();
            let mut exclusive = distinct.clone();
            exclusive.retain(|blob, _| naming(blob) == [*digest]);
            let is_file = |id: LeafId| matches!(tree.leaf(id).kind, LeafKind::File { .. });
            let entries = tree.dirs.iter().flat_map(|dir| &dir.entries);
            ManifestUse {
                digest: *digest,
                current_of,
                history_of,
                files: entries
                    .filter(|entry| matches!(entry.node, Node::Leaf(id) if is_file(id)))
                    .count() as u64,
                references: leaves(tree).len() as u64,
                blobs: distinct.len() as u64,
                logical_bytes: leaves(tree).iter().map(|(_, size)| size).sum(),
                unique_bytes: distinct.values().sum(),
                exclusive_blobs: exclusive.len() as u64,
                exclusive_bytes: exclusive.values().sum(),
            }
        })
        .collect();
    let mut refs_used: Vec<RefUse> = refs
        .iter()
        .map(|r| {
            let name = r.name.to_string();
            // Of the trees that a ref names; the next collection takes the others.
            let users = |digest: &Digest| -> BTreeSet<String> {
                let names = naming(digest).into_iter().flat_map(|tree| {
                    let (current, history) = names_of(&tree);
                    current.into_iter().chain(history)
                });
                names.collect()
            };
            let only: Vec<u64> = unique
                .iter()
                .filter(|(digest, _)| users(digest) == BTreeSet::from([name.clone()]))
                .map(|(_, size)| *size)
                .collect();
            RefUse {
                name,
                exclusive_blobs: only.len() as u64,
                exclusive_bytes: only.iter().sum(),
            }
        })
        .collect();
    refs_used.sort_by(|a, b| a.name.cmp(&b.name));
    let class = |used: &ManifestUse| match (used.current_of.is_empty(), used.history_of.is_empty()) {
        (false, _) => 0,
        (true, false) => 1,
        (true, true) => 2,
    };
    manifests.sort_by_key(|used| {
        (
            class(used),
            used.current_of.clone(),
            used.history_of.clone(),
            used.digest,
        )
    });
    let top_by = |figure: &dyn Fn(&TopBlob) -> u64| {
        let mut blobs: Vec<TopBlob> = unique
            .iter()
            .map(|(digest, size)| TopBlob {
                digest: *digest,
                size: *size,
                references: references(digest),
                manifests: naming(digest).len() as u64,
                saved_bytes: size * (references(digest) - 1),
                samples: Vec::new(),
            })
            .filter(|blob| figure(blob) > 0)
            .collect();
        blobs.sort_by_key(|blob| (std::cmp::Reverse(figure(blob)), blob.digest));
        blobs.truncate(top);
        blobs
    };
    let logical: u64 = all.iter().map(|(_, size)| size).sum();
    let stored: u64 = unique.values().sum();
    let between = |from: u64, below: Option<u64>| Bucket {
        below,
        amount: amount(
            &unique
                .iter()
                .filter(|(_, size)| **size >= from && below.is_none_or(|below| **size < below))
                .map(|(digest, size)| (*digest, *size))
                .collect(),
        ),
    };
    Analytics {
        dedup: Dedup {
            refs: refs.len() as u64,
            manifests: trees.len() as u64,
            references: all.len() as u64,
            unique_blobs: unique.len() as u64,
            logical_bytes: logical,
            unique_bytes: stored,
            saved_bytes: logical - stored,
            saved_percent: match logical {
                0 => 0.0,
                _ => 100.0 * ((logical - stored) as f64 / logical as f64),
            },
            ratio: match stored {
                0 => 1.0,
                _ => logical as f64 / stored as f64,
            },
            incomplete: false,
            problems: Vec::new(),
        },
        current: amount(&in_current),
        history: amount(&in_history),
        unnamed: amount(&in_unnamed),
        garbage: amount(&garbage),
        missing: amount(&missing),
        sizes: vec![
            between(0, Some(1024)),
            between(1024, Some(65_536)),
            between(65_536, Some(1_048_576)),
            between(1_048_576, Some(104_857_600)),
            between(104_857_600, None),
        ],
        manifests,
        refs: refs_used,
        top_saved: top_by(&|blob| blob.saved_bytes),
        top_size: top_by(&|blob| blob.size),
    }
}

/// Takes the samples out, after a look whether each is a file with that content, and none is there twice.
fn without_samples(store: &Store, mut found: Analytics) -> Analytics {
    for blob in found.top_saved.iter_mut().chain(&mut found.top_size) {
        assert!((1..=3).contains(&blob.samples.len()), "{blob:?}");
        let distinct: HashSet<_> = blob.samples.iter().map(|file| (file.manifest, &file.path)).collect();
        assert_eq!(distinct.len(), blob.samples.len());
        for file in &blob.samples {
            let tree = store.load(&file.manifest).unwrap();
            let mut walk = tree.walk();
            let mut same = false;
            while let Some((path, node)) = walk.next() {
                if let Node::Leaf(id) = node
                    && crate::store::error::path_text(path) == file.path
                {
                    same |= matches!(tree.leaf(id).kind, LeafKind::File { digest, .. } if digest == blob.digest);
                }
            }
            assert!(same, "{} is not at {}", blob.digest, file.path);
        }
        blob.samples.clear();
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_figures_are_those_of_a_naive_computation(
        grown in prop::collection::vec((any_steps(), 0usize..4), 1..8),
        retired in any::<bool>(),
        orphaned in any::<bool>(),
        lost in any::<Option<prop::sample::Index>>(),
        top in 0usize..6,
    ) {
        let (_dir, store) = store();
        let mut digests = Vec::new();
        for (((root, steps), ref_number), index) in grown.iter().zip(0..) {
            digests.push(publish_grown(&store, &format!("r{ref_number}"), &grow(root, steps)));
            if index == 0 {
                // A tree that two refs share.
                publish_grown(&store, "shared", &grow(root, steps));
            }
        }
        if retired {
            store.retire(&name("r1"), "uid-1", SystemTime::now()).unwrap();
        }
        if orphaned {
            store.forget(&name("r2")).unwrap();
        }
        if let (Some(lost), false) = (lost, digests.is_empty()) {
            let tree = store.load(lost.get(&digests)).unwrap();
            if let Some((digest, _)) = tree.contents().next() {
                std::fs::remove_file(blob_path(&store, digest)).unwrap();
            }
        }
        let found = store.analytics(&Held::default(), top).unwrap();
        prop_assert_eq!(&store.dedup().unwrap(), &found.dedup);
        prop_assert_eq!(without_samples(&store, found), naive(&store, top));
    }
}

#[test]
fn a_store_of_known_trees_has_these_figures() {
    let (_dir, store) = store();
    let large = vec![7; 2000];
    publish(&store, "a", &[("x", &large), ("y", &large), ("z", b"old")]);
    publish(&store, "a", &[("x", &large), ("z", b"newer")]);
    publish(&store, "b", &[("one", &large), ("two", b"newer"), ("three", b"only b")]);
    let unnamed = store.build().unwrap();
    unnamed.put_bytes(b"staged only").unwrap();
    drop(unnamed);
    publish(&store, "gone", &[("f", b"garbage of 19 bytes")]);
    store.forget(&name("gone")).unwrap();
    let found = store.analytics(&Held::default(), 1).unwrap();
    assert_eq!(
        (
            found.dedup.refs,
            found.dedup.manifests,
            found.dedup.references,
            found.dedup.unique_blobs
        ),
        (2, 4, 9, 5)
    );
    let logical = 4003 + 2005 + 2011 + 19;
    let unique = 2000 + 3 + 5 + 6 + 19;
    assert_eq!((found.dedup.logical_bytes, found.dedup.unique_bytes), (logical, unique));
    assert_eq!(found.dedup.saved_bytes, logical - unique);
    assert_eq!(found.current, Amount { blobs: 3, bytes: 2011 });
    assert_eq!(found.history, Amount { blobs: 1, bytes: 3 });
    assert_eq!(found.unnamed, Amount { blobs: 1, bytes: 19 });
    assert_eq!(found.garbage, Amount::default());
    let exclusive: Vec<_> = found
        .manifests
        .iter()
        .map(|used| {
            (
                used.current_of.join(","),
                used.history_of.join(","),
                used.exclusive_bytes,
            )
        })
        .collect();
    let row = |current: &str, history: &str, bytes| (current.to_owned(), history.to_owned(), bytes);
    assert_eq!(
        exclusive,
        [
            row("test/a", "", 0),
            row("test/b", "", 6),
            row("", "test/a", 3),
            row("", "", 19)
        ]
    );
    // "newer" is of both; "old" is of a's history alone, and goes when a does.
    let of_refs: Vec<_> = found
        .refs
        .iter()
        .map(|used| (&*used.name, used.exclusive_blobs, used.exclusive_bytes))
        .collect();
    assert_eq!(of_refs, [("test/a", 1, 3), ("test/b", 1, 6)]);
    assert_eq!(found.top_saved.len(), 1);
    assert_eq!(
        (found.top_saved[0].references, found.top_saved[0].saved_bytes),
        (4, 6000)
    );
    let first_sample = &found.top_saved[0].samples[0];
    assert_eq!(
        (first_sample.manifest, &*first_sample.path),
        (found.manifests[0].digest, "x")
    );
    assert_eq!(found.sizes[1].amount, Amount { blobs: 1, bytes: 2000 });

    // What was stored for a tree that goes with the next collection is garbage after it.
    let report = store.collect(
        &crate::store::retention::Policy::built_in(),
        &Trees(Vec::new()),
        false,
        SystemTime::now(),
    );
    assert_eq!(report.unwrap().deleted_blobs, 0);
    let found = store.analytics(&Held::default(), 1).unwrap();
    assert_eq!(
        (found.unnamed, found.garbage),
        (Amount::default(), Amount { blobs: 1, bytes: 19 })
    );
}

#[test]
fn what_cannot_be_read_is_reported_and_makes_the_figures_incomplete() {
    let (_dir, store) = store();
    let damaged = publish(&store, "a", &[("x", b"one")]).digest;
    let missing = publish(&store, "b", &[("x", b"two")]).digest;
    publish(&store, "c", &[("x", b"three")]);
    publish(&store, "d", &[("x", b"four")]);
    let path = |digest: &TreeDigest| store.root().join("manifests").join(digest.hex());
    let mut bytes = std::fs::read(path(&damaged)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::remove_file(path(&damaged)).unwrap();
    std::fs::write(path(&damaged), bytes).unwrap();
    std::fs::remove_file(path(&missing)).unwrap();
    std::fs::write(store.root().join("refs/test/d"), "{").unwrap();
    let found = store.dedup().unwrap();
    assert!(found.incomplete);
    let problems: Vec<&str> = found.problems.iter().map(|problem| problem.path.as_str()).collect();
    assert_eq!(problems.len(), 3, "{problems:?}");
    for (file, message) in [
        ("refs/test/d", "cannot be read"),
        (&*missing.hex(), "not in the store"),
        (&*damaged.hex(), "damaged"),
    ] {
        let found = found
            .problems
            .iter()
            .find(|problem| problem.path.contains(file))
            .unwrap();
        assert!(found.message.contains(message), "{found:?}");
    }
    // Of the four trees, those of "c" and (without its ref) "d" could be read.
    assert_eq!((found.refs, found.manifests, found.logical_bytes), (3, 2, 9));
}

#[test]
fn a_tree_that_the_next_collection_takes_spoils_no_figure_and_a_held_one_counts() {
    let (_dir, store) = store();
    let shared = vec![7; 2000];
    let former = publish(&store, "a", &[("x", &shared), ("y", b"old")]).digest;
    let mut target = target("a", "uid-1");
    target.history_limit = 0;
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("x", &shared), ("y", b"newer")]);
    build.publish(&tree, target).unwrap();
    std::fs::remove_file(blob_path(&store, &digest_of(b"old"))).unwrap();

    let (found, damage) = store.look_through(&Held::default(), 1).unwrap();
    assert_eq!(found.dedup.manifests, 2);
    assert_eq!(
        (found.refs[0].exclusive_blobs, found.refs[0].exclusive_bytes),
        (2, 2005)
    );
    assert_eq!((found.missing, &damage), (Amount::default(), &Damage::default()));
    let held = Trees(vec![former]);
    let (found, damage) = store.look_through(&held, 1).unwrap();
    assert_eq!((found.refs[0].exclusive_blobs, found.refs[0].exclusive_bytes), (1, 5));
    let lost = Amount { blobs: 1, bytes: 3 };
    assert_eq!((found.missing, damage.missing), (lost, lost));

    // Its manifest is damaged: that hurts only who needs it.
    let path = store.root().join("manifests").join(former.hex());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "no manifest").unwrap();
    assert_eq!(store.look_through(&Held::default(), 1).unwrap().1, Damage::default());
    let problems = store.look_through(&held, 1).unwrap().1.problems;
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].message.ends_with("needed by the mount at /mnt"),
        "{problems:?}"
    );
    std::fs::remove_file(&path).unwrap();
    let problems = store.look_through(&held, 1).unwrap().1.problems;
    assert!(problems[0].message.contains("not in the store"), "{problems:?}");
    assert!(problems[0].path.ends_with(&former.hex()), "{problems:?}");
    assert_eq!(store.look_through(&Held::default(), 1).unwrap().1, Damage::default());
}
