//! Everything that works on a store at once, and an independent look at what is there, meanwhile and at the end.
//!
//! Ten seconds in `make test`, ten minutes with `LARDER_SOAK`; `LARDER_STRESS_SECONDS` says otherwise. On a machine that is
//! busy it goes on until all that it looks at has happened a few times. Which threads meet when is chance, whatever the
//! seed: the orders themselves are `gc/model/`'s business.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::store::retention::Policy;
use crate::store::testing::*;
use crate::store::tree::Tree;
use crate::store::*;

/// Refs are few, and so are contents: builds, garbage and collections meet at the same ones all the time.
const REFS: u32 = 12;
const CONTENTS: u32 = 60;
/// What must have happened, and how often, or the test has looked at nothing.
const ENOUGH: u64 = 5;
const MUST_HAPPEN: [&str; 16] = [
    "trees published",
    "builds given up",
    "trees held",
    "blobs found",
    "trees exported",
    "refs dropped",
    "collections",
    "dry collections",
    "blobs deleted",
    "history dropped",
    "current trees checked",
    "blobs checked",
    "blobs verified",
    "blobs removed",
    "blobs not removed",
    "trees kept",
];
/// For how much longer a machine may take to come to all of that.
const PATIENCE: Duration = Duration::from_secs(120);

struct Stress {
    store: Store,
    /// For files beside the store.
    dir: PathBuf,
    end: Instant,
    failed: AtomicBool,
    next: AtomicU64,
    /// How often what was done.
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Stress {
    /// Does something again and again until the time is over and all has happened, or something somewhere has failed.
    fn repeat(&self, mut something: impl FnMut()) {
        while self.goes_on() && !self.failed.load(Ordering::Relaxed) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(&mut something)) {
                self.failed.store(true, Ordering::Relaxed);
                resume_unwind(panic);
            }
        }
    }

    fn goes_on(&self) -> bool {
        let now = Instant::now();
        now < self.end || (now < self.end + PATIENCE && self.seldom().is_some())
    }

    /// Something that has hardly happened yet.
    fn seldom(&self) -> Option<&'static str> {
        let counts = self.counts.lock().unwrap();
        let seldom = |what: &&str| counts.get(*what).is_none_or(|count| *count < ENOUGH);
        MUST_HAPPEN.into_iter().find(seldom)
    }

    fn count(&self, what: &'static str, by: u64) {
        *self.counts.lock().unwrap().entry(what).or_default() += by;
    }

    /// A path that nobody else uses.
    fn path(&self) -> PathBuf {
        self.dir.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

fn content(number: u32) -> Vec<u8> {
    match number {
        // Larger than what is hashed in memory.
        0 => number.to_be_bytes().repeat(300_000),
        _ => number.to_be_bytes().repeat(1 + number as usize % 50),
    }
}

/// Half of the trees are one of a few, so that one is published again while a collection is about to drop it.
fn files(rng: &mut StdRng) -> Vec<(String, Vec<u8>)> {
    let rng = &mut match rng.random_bool(0.5) {
        true => StdRng::seed_from_u64(rng.random_range(0..4)),
        false => StdRng::seed_from_u64(rng.random()),
    };
    let count = rng.random_range(1..12);
    (0..count)
        .map(|index| (format!("f{index}"), content(rng.random_range(0..CONTENTS))))
        .collect()
}

/// Some refs change all the time, some seldom: history that a collection plans to drop is still there when it comes to it.
fn any_name(rng: &mut StdRng) -> RefName {
    let most = rng.random_range(1..=REFS);
    name(&format!("r{}", rng.random_range(0..most)))
}

fn pause(rng: &mut StdRng) {
    if rng.random_bool(0.4) {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..5)));
    }
}

/// The blob is there, now, with the right bytes.
fn check_blob(store: &Store, digest: &Digest, size: u64) {
    let bytes = fs::read(blob_path(store, digest)).unwrap_or_else(|e| panic!("{digest}: {e}"));
    assert_eq!((digest_of(&bytes), bytes.len() as u64), (*digest, size));
}

/// Every content of a tree that somebody holds must be there, now.
fn check_tree(store: &Store, digest: &TreeDigest) -> Tree {
    let tree = store.load(digest).unwrap();
    for (digest, size) in tree.contents() {
        check_blob(store, digest, size);
    }
    tree
}

/// Puts a content in one of the ways that there are.
fn put(stress: &Stress, build: &Build, bytes: &[u8], rng: &mut StdRng) -> Blob {
    match rng.random_range(0..3) {
        0 => build.put_bytes(bytes),
        1 => build.put(&mut &*bytes),
        _ => {
            let path = stress.path();
            fs::write(&path, bytes).unwrap();
            let put = build.put_file(&fs::File::open(&path).unwrap());
            fs::remove_file(path).unwrap();
            put
        }
    }
    .unwrap()
}

fn build(stress: &Stress, rng: &mut StdRng) {
    let store = &stress.store;
    let build = store.build().unwrap();
    let files = files(rng);
    let mut tree = Tree::new(meta(0o755));
    // Two threads of one build, now and then.
    let seeds: [u64; 2] = rng.random();
    let (one, other) = files.split_at(if rng.random_bool(0.2) { files.len() / 2 } else { 0 });
    let put_all = |files: &[(String, Vec<u8>)], seed| -> Vec<Blob> {
        let mut rng = StdRng::seed_from_u64(seed);
        files
            .iter()
            .map(|(_, bytes)| put(stress, &build, bytes, &mut rng))
            .collect()
    };
    let blobs = std::thread::scope(|scope| {
        let first = (!one.is_empty()).then(|| scope.spawn(|| put_all(one, seeds[0])));
        let second = put_all(other, seeds[1]);
        let mut blobs = first.map(|thread| thread.join().unwrap()).unwrap_or_default();
        blobs.extend(second);
        blobs
    });
    for ((name, bytes), blob) in files.iter().zip(blobs) {
        assert_eq!((blob.digest, blob.size), (digest_of(bytes), bytes.len() as u64));
        tree.add_leaf(Tree::ROOT, name.as_bytes(), file(blob.digest, blob.size))
            .unwrap();
    }
    let tree = tree.finish().unwrap();
    if rng.random_bool(0.2) {
        stress.count("builds given up", 1);
        return;
    }
    pause(rng);
    let target = Publish {
        name: any_name(rng),
        history_limit: rng.random_range(0..3),
        ..target("any", "uid-1")
    };
    let revision = build.publish(&tree, target).unwrap();
    stress.count("trees published", 1);
    // Another thread may have replaced it and a collection removed it since: then there is nothing to hold.
    match store.hold(&revision.digest) {
        Ok(hold) => {
            pause(rng);
            check_tree(store, hold.tree());
            stress.count("trees held", 1);
        }
        Err(Error::MissingManifest { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Contents without a tree, which go with the next collection; and contents that are removed by hand, unless a tree or a
/// build needs them.
fn loose(stress: &Stress, rng: &mut StdRng) {
    let numbers: Vec<u32> = (0..rng.random_range(1..6))
        .map(|_| rng.random_range(1..CONTENTS))
        .collect();
    if rng.random_bool(0.5) {
        let build = stress.store.build().unwrap();
        for number in numbers {
            put(stress, &build, &content(number), rng);
        }
        build.store_contents().unwrap();
        return;
    }
    let digests = numbers.iter().map(|number| digest_of(&content(*number))).collect();
    let removed = stress
        .store
        .remove_blobs(&digests, &Trees(Vec::new()), &never())
        .unwrap();
    for (digest, outcome) in removed.unwrap() {
        match outcome {
            Removed::Gone(_) => stress.count("blobs removed", 1),
            Removed::Needed(_) => stress.count("blobs not removed", 1),
            Removed::Missing => {}
            Removed::Failed(why) => panic!("{digest}: {why}"),
        }
    }
}

/// A tree that a build keeps is published again under another name, though nothing of it was put.
fn keep(stress: &Stress, rng: &mut StdRng) {
    let store = &stress.store;
    let Some(entry) = store.get_ref(&any_name(rng)).unwrap() else {
        return;
    };
    let Some(current) = entry.current else { return };
    pause(rng);
    let build = store.build().unwrap();
    let kept = match build.keep_tree(&current.digest) {
        Ok(kept) => kept,
        // It was replaced and collected meanwhile.
        Err(Error::MissingManifest { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    pause(rng);
    check_tree(store, &current.digest);
    let target = Publish {
        name: any_name(rng),
        ..target("any", "uid-1")
    };
    assert_eq!(build.publish(&kept, target).unwrap().digest, current.digest);
    stress.count("trees kept", 1);
}

/// What a build finds stays until the build ends.
fn find(stress: &Stress, rng: &mut StdRng) {
    let build = stress.store.build().unwrap();
    let mut found = Vec::new();
    for _ in 0..rng.random_range(1..10) {
        let bytes = content(rng.random_range(1..CONTENTS));
        let digest = digest_of(&bytes);
        if let Some(size) = build.find(&digest).unwrap() {
            assert_eq!(size, bytes.len() as u64);
            found.push((digest, size));
        }
    }
    pause(rng);
    for (digest, size) in &found {
        check_blob(&stress.store, digest, *size);
    }
    stress.count("blobs found", found.len() as u64);
}

/// Nothing of what the others do may look like damage, and what they need is never taken from them.
fn verify(stress: &Stress, rng: &mut StdRng) {
    let scope = match rng.random_bool(0.5) {
        true => Scope::All,
        false => Scope::Changed,
    };
    let options = VerifyOptions { scope, rate: None };
    let found = stress
        .store
        .verify(&options, &VerifyProgress::default(), &AtomicBool::new(false))
        .unwrap();
    assert!(found.is_sound() && found.quarantined_blobs == 0, "{found:#?}");
    stress.count("blobs verified", found.blobs);
    pause(rng);
}

/// A hold on what a ref stands for now, taken under the ref's lock: it cannot have gone yet, so that there is no excuse.
fn hold_current(store: &Store, name: &RefName) -> Option<Hold> {
    let _guard = store.inner.lock_ref(name);
    let current = store.get_ref(name).unwrap().and_then(|entry| entry.current);
    current.map(|revision| store.hold(&revision.digest).unwrap())
}

fn export(stress: &Stress, rng: &mut StdRng) {
    let Some(hold) = hold_current(&stress.store, &any_name(rng)) else {
        return;
    };
    let tree = stress.store.load(hold.tree()).unwrap();
    let into = stress.path();
    pause(rng);
    stress.store.export(&tree, &into, None).unwrap();
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        if let tree::Node::Leaf(id) = node
            && let tree::LeafKind::File { digest, .. } = &tree.leaf(id).kind
        {
            let bytes = fs::read(into.join(std::str::from_utf8(path).unwrap())).unwrap();
            assert_eq!(digest_of(&bytes), *digest);
        }
    }
    remove_all(&into).unwrap();
    stress.count("trees exported", 1);
}

fn drop_something(stress: &Stress, rng: &mut StdRng) {
    let name = any_name(rng);
    match rng.random_bool(0.5) {
        true => drop(stress.store.retire(&name, "uid-1", SystemTime::now()).unwrap()),
        false => stress.store.forget(&name).unwrap(),
    }
    stress.count("refs dropped", 1);
}

fn collect_somehow(stress: &Stress, rng: &mut StdRng) {
    let policy = match rng.random_range(0..4) {
        // History stays, and unreferenced blobs go.
        0 => Policy {
            max_age: Some(Duration::from_secs(3600)),
            ..nothing_kept()
        },
        // As much history goes as there are bytes too many.
        1 => Policy {
            max_age: None,
            max_size: Some(rng.random_range(1000..20_000)),
            ..nothing_kept()
        },
        _ => nothing_kept(),
    };
    let dry_run = rng.random_bool(0.2);
    let held = Trees(Vec::new());
    let report = stress
        .store
        .collect(&policy, &held, dry_run, SystemTime::now())
        .unwrap();
    assert_eq!((report.blocked, report.missing_blobs), (vec![], 0));
    match dry_run {
        true => stress.count("dry collections", 1),
        false => {
            stress.count("collections", 1);
            stress.count("blobs deleted", report.deleted_blobs);
            stress.count("history dropped", report.dropped_history.len() as u64);
        }
    }
}

/// Whatever a ref stands for now is whole.
fn watch_refs(stress: &Stress) {
    for number in 0..REFS {
        if let Some(hold) = hold_current(&stress.store, &name(&format!("r{number}"))) {
            check_tree(&stress.store, hold.tree());
            stress.count("current trees checked", 1);
        }
    }
    // Holds protect: looking all the time would leave the collections nothing to do.
    std::thread::sleep(Duration::from_millis(20));
}

/// Whatever has a name under `objects/` has the right bytes, at any moment.
fn watch_objects(stress: &Stress, rng: &mut StdRng) {
    let shard = format!("{:02x}", rng.random_range(0..256));
    for entry in fs::read_dir(stress.store.root().join("objects").join(&shard)).unwrap() {
        let path = entry.unwrap().path();
        match fs::read(&path) {
            Ok(bytes) => assert_eq!(digest_of(&bytes).hex(), hex_of(&path)),
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => panic!("{path:?}: {error}"),
        }
        stress.count("blobs checked", 1);
    }
}

/// The digest that an object's path stands for.
fn hex_of(path: &Path) -> String {
    let part = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    part(path.parent().unwrap()) + &part(path)
}

fn entries(path: &Path) -> Vec<PathBuf> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The files in the folders of a folder.
fn files_below(path: PathBuf) -> Vec<PathBuf> {
    entries(&path).iter().flat_map(|folder| entries(folder)).collect()
}

/// Hashes all that lies in a store and follows every ref, with none of the store's code but the reader of manifests.
/// Returns the blobs that refs need, and those that are there.
fn audit(root: &Path) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut there = BTreeSet::new();
    for path in files_below(root.join("objects")) {
        let bytes = fs::read(&path).unwrap();
        assert_eq!(digest_of(&bytes).hex(), hex_of(&path));
        there.insert(hex_of(&path));
    }
    let mut needed = BTreeSet::new();
    for path in files_below(root.join("refs")) {
        let entry: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let history = entry["history"].as_array().unwrap().iter().map(|old| &old["revision"]);
        for revision in entry.get("current").into_iter().chain(history) {
            let digest = revision["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let bytes = fs::read(root.join("manifests").join(digest)).unwrap();
            assert_eq!(digest_of(&bytes).hex(), digest);
            let tree = Tree::decode(&bytes).unwrap();
            needed.extend(tree.contents().map(|(digest, _)| digest.hex()));
        }
    }
    assert!(needed.is_subset(&there), "lost: {:?}", needed.difference(&there));
    (needed, there)
}

#[test]
fn nothing_that_is_needed_is_lost_when_all_happens_at_once() {
    let usual = match std::env::var_os("LARDER_SOAK") {
        Some(_) => 600,
        None => 10,
    };
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = number("LARDER_STRESS_SECONDS").unwrap_or(usual);
    let seed = number("LARDER_SEED").unwrap_or_else(|| rand::rng().random());
    println!("LARDER_SEED={seed}");
    let (dir, store) = store();
    let stress = Stress {
        store,
        dir: dir.path().to_owned(),
        end: Instant::now() + Duration::from_secs(seconds),
        failed: AtomicBool::new(false),
        next: AtomicU64::new(0),
        counts: Mutex::default(),
    };
    let stress = &stress;
    type Work = fn(&Stress, &mut StdRng);
    const WORKS: [Work; 10] = [
        build,
        build,
        build,
        build,
        find,
        keep,
        loose,
        export,
        drop_something,
        drop_something,
    ];
    std::thread::scope(|scope| {
        for thread in 0..5 {
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed ^ thread);
                stress.repeat(|| WORKS.choose(&mut rng).unwrap()(stress, &mut rng));
            });
        }
        for thread in 5..7 {
            let mut rng = StdRng::seed_from_u64(seed ^ thread);
            scope.spawn(move || stress.repeat(|| collect_somehow(stress, &mut rng)));
        }
        let mut rng = StdRng::seed_from_u64(seed ^ 7);
        scope.spawn(move || stress.repeat(|| verify(stress, &mut rng)));
        scope.spawn(|| stress.repeat(|| watch_refs(stress)));
        let mut rng = StdRng::seed_from_u64(seed);
        scope.spawn(move || stress.repeat(|| watch_objects(stress, &mut rng)));
    });
    let counts = stress.counts.lock().unwrap().clone();
    println!("{counts:?}");
    assert_eq!(stress.seldom(), None, "hardly happened: {counts:?}");
    let store = &stress.store;
    audit(store.root());
    check_all(store);
    // What is left is exactly what is needed, and the count has kept up.
    let report = collect(store);
    assert_eq!((report.blocked.len(), report.missing_blobs), (0, 0));
    assert!(staging_is_empty(store));
    let (needed, there) = audit(store.root());
    assert_eq!(needed, there);
    let usage = store.usage().unwrap();
    assert_eq!(usage.blobs, needed.len() as u64);
    // Nobody in this process knows anything by heart.
    let recount = usage_of_files(store.root());
    assert_eq!((usage.blobs, usage.blob_bytes), recount);
}

/// How many files lie under `objects/`, and their bytes.
fn usage_of_files(root: &Path) -> (u64, u64) {
    let files = files_below(root.join("objects"));
    files.iter().fold((0, 0), |(count, bytes), path| {
        (count + 1, bytes + fs::metadata(path).unwrap().len())
    })
}
