//! Builds, retirements, holds and collections at once, and an independent look at what is left.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::store::testing::*;
use crate::store::*;

/// Contents are few, so that builds, garbage and collections meet at the same blobs all the time.
fn content(number: u32) -> Vec<u8> {
    number.to_be_bytes().repeat(1 + number as usize % 50)
}

/// Half of the trees are one of a few, so that one is published again while a collection is about to drop it.
fn files(rng: &mut StdRng) -> Vec<(String, Vec<u8>)> {
    let rng = &mut match rng.random_bool(0.5) {
        true => StdRng::seed_from_u64(rng.random_range(0..4)),
        false => StdRng::seed_from_u64(rng.random()),
    };
    let count = rng.random_range(1..12);
    (0..count)
        .map(|index| (format!("f{index}"), content(rng.random_range(0..60))))
        .collect()
}

/// Every content of a tree that somebody holds must be there, now.
fn check_tree(store: &Store, digest: &TreeDigest) {
    let tree = store.load(digest).unwrap();
    for (digest, size) in tree.contents() {
        let bytes = std::fs::read(blob_path(store, digest)).unwrap_or_else(|e| panic!("{digest}: {e}"));
        assert_eq!((digest_of(&bytes), bytes.len() as u64), (*digest, size));
    }
}

fn build_and_check(store: &Store, rng: &mut StdRng) {
    let files = files(rng);
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let build = store.build().unwrap();
    let tree = tree_of(&build, &files);
    if rng.random_bool(0.2) {
        return;
    }
    if rng.random_bool(0.3) {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..5)));
    }
    let hold = {
        let mut target = target(&format!("r{}", rng.random_range(0..6)), "uid-1");
        target.history_limit = rng.random_range(0..3);
        let revision = build.publish(&tree, target).unwrap();
        // Another thread may have replaced it and a collection removed it since: then there is nothing to hold.
        store.hold(&revision.digest)
    };
    match hold {
        Ok(hold) => {
            if rng.random_bool(0.5) {
                std::thread::sleep(Duration::from_millis(rng.random_range(0..5)));
            }
            check_tree(store, hold.tree());
        }
        Err(Error::MissingManifest { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Whatever a ref stands for now is whole. Under the ref's lock it stays what the ref stands for, so that there is
/// no excuse for a tree that is gone. Returns how many trees were looked at.
fn check_refs(store: &Store) -> u64 {
    let mut checked = 0;
    for number in 0..6 {
        let name = name(&format!("r{number}"));
        let hold = {
            let _guard = store.inner.lock_ref(&name);
            let current = store.get_ref(&name).unwrap().and_then(|entry| entry.current);
            current.map(|revision| store.hold(&revision.digest).unwrap())
        };
        if let Some(hold) = hold {
            check_tree(store, hold.tree());
            checked += 1;
        }
    }
    checked
}

fn drop_something(store: &Store, rng: &mut StdRng) {
    let name = name(&format!("r{}", rng.random_range(0..6)));
    match rng.random_bool(0.5) {
        true => drop(store.retire(&name, "uid-1", SystemTime::now()).unwrap()),
        false => store.forget(&name).unwrap(),
    }
}

#[test]
fn nothing_that_is_needed_is_lost_when_all_happens_at_once() {
    let seconds = std::env::var("LARDER_STRESS_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(4);
    let seed = rand::rng().random::<u64>();
    println!("seed {seed}");
    let (_dir, store) = store();
    let end = Instant::now() + Duration::from_secs(seconds);
    let failed = AtomicBool::new(false);
    let (builds, collections, deleted) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let checked = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, failed, builds) = (&store, &failed, &builds);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed ^ thread);
                while Instant::now() < end && !failed.load(Ordering::Relaxed) {
                    let run = std::panic::AssertUnwindSafe(|| match rng.random_bool(0.7) {
                        true => build_and_check(store, &mut rng),
                        false => drop_something(store, &mut rng),
                    });
                    if let Err(panic) = std::panic::catch_unwind(run) {
                        failed.store(true, Ordering::Relaxed);
                        std::panic::resume_unwind(panic);
                    }
                    builds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let (watched, watch_failed, watch_checked) = (&store, &failed, &checked);
        scope.spawn(move || {
            while Instant::now() < end && !watch_failed.load(Ordering::Relaxed) {
                watch_checked.fetch_add(check_refs(watched), Ordering::Relaxed);
                // Holds protect: looking all the time would leave the collections nothing to do.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        for _ in 0..2 {
            let (store, failed, collections, deleted) = (&store, &failed, &collections, &deleted);
            scope.spawn(move || {
                while Instant::now() < end && !failed.load(Ordering::Relaxed) {
                    let report = collect(store);
                    assert_eq!(report.blocked, []);
                    assert_eq!(report.missing_blobs, 0);
                    collections.fetch_add(1, Ordering::Relaxed);
                    deleted.fetch_add(report.deleted_blobs, Ordering::Relaxed);
                }
            });
        }
    });
    let (builds, collections, deleted) = (builds.into_inner(), collections.into_inner(), deleted.into_inner());
    let checked = checked.into_inner();
    println!(
        "{builds} builds and removals, {collections} collections, {deleted} blobs deleted, {checked} trees checked"
    );
    assert!(
        builds > 20 && collections > 5 && deleted > 20 && checked > 20,
        "hardly anything happened"
    );
    check_all(&store);
    // What is left is exactly what is needed, and the count has kept up.
    let report = collect(&store);
    assert_eq!((report.blocked.len(), report.missing_blobs), (0, 0));
    assert!(staging_is_empty(&store));
    let needed = check_all(&store) as u64;
    let usage = store.usage().unwrap();
    assert_eq!(usage.blobs, needed);
    let root = store.root().to_owned();
    drop(store);
    let recounted = Store::open(&root, Options::default()).unwrap().usage().unwrap();
    assert_eq!((recounted.blobs, recounted.blob_bytes), (usage.blobs, usage.blob_bytes));
}
