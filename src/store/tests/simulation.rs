//! Ninety days of a store, told by a seed: trees come, change and go, mounts and layers too, policies change, the clock
//! jumps, the process ends and begins anew, also in the middle of a collection, and builds go on beside one. After each
//! step a checker that knows nothing of the planner looks whether all that is needed is there, and after each collection
//! whether the policy's limits are kept.
//!
//! Time is the test's: the store is told it, and what it has noted by the system's clock, the times of files, is set to
//! it after each step. 2,000 steps, with `LARDER_SOAK` 50,000; `LARDER_SEED` repeats one.

mod reasons;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::crash::Ram;
use crate::store::retention::Policy;
use crate::store::testing::*;
use crate::store::*;

const DAY: u64 = 24 * 60 * 60;
const DAYS: u64 = 90;
const REFS: usize = 8;
const CONTENTS: u64 = 120;

/// The bytes of a content: some hundreds to some thousands.
fn content(number: u64) -> Vec<u8> {
    let length = 200 + number * 7919 % 6000;
    format!("content {number} ")
        .into_bytes()
        .into_iter()
        .cycle()
        .take(length as usize)
        .collect()
}

/// `total`: bytes of the file system.
fn policies(total: u64) -> Vec<(&'static str, Policy)> {
    let days = |days: u64| Some(Duration::from_secs(days * DAY));
    let kib = |kib: u64| Some(kib << 10);
    let with = |max_age, max_size, min_copies| Policy {
        max_age,
        max_size,
        min_copies,
        ..Policy::built_in()
    };
    vec![
        ("built-in", Policy::built_in()),
        ("three days", with(days(3), None, 1)),
        ("small", with(None, kib(120), 1)),
        ("old and small", with(days(10), kib(250), 1)),
        ("twice or not at all", with(days(5), None, 2)),
        ("nothing", with(None, Some(0), 1)),
        (
            "a full disk",
            Policy {
                min_free: Some(total - (400 << 10)),
                ..Policy::built_in()
            },
        ),
        (
            "small, with time to think",
            Policy {
                grace: Duration::from_secs(12 * 60 * 60),
                ..with(days(3), kib(60), 1)
            },
        ),
        ("nothing kept", nothing_kept()),
    ]
}

struct World {
    root: PathBuf,
    store: Store,
    now: SystemTime,
    /// When the test began, by the system's clock: times of files from then on are the store's own.
    real: SystemTime,
    policy: (&'static str, Policy),
    /// What each ref should stand for, by the test's own account.
    current: BTreeMap<String, TreeDigest>,
    /// What layers and mounts hold.
    held: Vec<HeldTree>,
    /// How often what was done.
    counts: BTreeMap<&'static str, u64>,
}

impl World {
    fn new(root: &Path) -> World {
        World {
            root: root.to_owned(),
            store: Store::open(root, Options::default()).unwrap(),
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000),
            // Less what the file system's clock lags.
            real: SystemTime::now() - Duration::from_secs(5),
            policy: policies(u64::MAX).remove(0),
            current: BTreeMap::new(),
            held: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str, by: u64) {
        *self.counts.entry(what).or_default() += by;
    }

    /// Bytes of the file system: all, and what is free.
    fn room(&self) -> (u64, u64) {
        let stat = rustix::fs::statvfs(&self.root).unwrap();
        (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)
    }

    /// Every file of contents and manifests.
    fn files(&self) -> Vec<PathBuf> {
        let list = |folder: &Path| -> Vec<PathBuf> {
            fs::read_dir(folder).map_or(Vec::new(), |entries| {
                entries.map(|entry| entry.unwrap().path()).collect()
            })
        };
        let mut files = list(&self.root.join("manifests"));
        files.extend(list(&self.root.join("objects")).iter().flat_map(|shard| list(shard)));
        files
    }

    /// Times that the store took from the system's clock become the test's.
    fn settle(&self) {
        for path in self.files() {
            if fs::metadata(&path).unwrap().modified().unwrap() >= self.real {
                File::open(&path).unwrap().set_modified(self.now).unwrap();
            }
        }
    }

    fn step(&mut self, rng: &mut StdRng) {
        let name = format!("ref-{}", rng.random_range(0..REFS));
        match rng.random_range(0..100) {
            0..35 => {
                let build = self.store.build().unwrap();
                let first = rng.random_range(0..CONTENTS);
                let contents: Vec<Vec<u8>> = (0..rng.random_range(1..12))
                    .map(|_| content((first + rng.random_range(0..20)) % CONTENTS))
                    .collect();
                let names: Vec<String> = (0..contents.len()).map(|number| number.to_string()).collect();
                let files: Vec<(&str, &[u8])> = names
                    .iter()
                    .zip(&contents)
                    .map(|(name, bytes)| (&**name, &**bytes))
                    .collect();
                let tree = tree_of(&build, &files);
                let mut target = target(&name, "uid-1");
                (target.now, target.history_limit) = (self.now, rng.random_range(0..5));
                let digest = build.publish(&tree, target).unwrap().digest;
                self.current.insert(name, digest);
            }
            35..45 => {
                self.store
                    .retire(&crate::store::testing::name(&name), "uid-1", self.now)
                    .unwrap();
                self.current.remove(&name);
            }
            45..48 => {
                self.store.forget(&crate::store::testing::name(&name)).unwrap();
                self.current.remove(&name);
            }
            48..53 => {
                // Contents that were put and never named.
                let build = self.store.build().unwrap();
                build.put_bytes(&content(rng.random_range(0..CONTENTS))).unwrap();
            }
            53..63 => {
                let known: Vec<TreeDigest> = self
                    .store
                    .manifests()
                    .unwrap()
                    .into_iter()
                    .map(|manifest| manifest.tree)
                    .collect();
                if let Some(tree) = known.choose(rng) {
                    self.held.push(match rng.random_bool(0.5) {
                        true => HeldTree::by_layer(*tree, "default/work"),
                        false => HeldTree::by_mount(*tree, Path::new("/mnt")),
                    });
                }
            }
            63..71 => {
                if !self.held.is_empty() {
                    let number = rng.random_range(0..self.held.len());
                    self.held.swap_remove(number);
                }
            }
            71..75 => self.policy = policies(self.room().0).choose(rng).unwrap().clone(),
            75..78 => self.restart(),
            78..80 => {
                let jump = Duration::from_secs(rng.random_range(0..5 * DAY));
                self.now = match rng.random_bool(0.5) {
                    true => self.now + jump,
                    false => self.now - jump,
                };
            }
            _ => self.collect(rng),
        }
        self.settle();
        self.check();
    }

    /// A process ends and begins anew. Nothing is done at its end, so it is as if it had been killed.
    fn restart(&mut self) {
        let root = self.root.clone();
        let old = std::mem::replace(&mut self.store, scratch_store(&root.with_extension("other")));
        drop(old);
        self.store = Store::open(&root, Options::default()).unwrap();
    }

    fn holders(&self) -> Held {
        Held {
            trees: self.held.clone(),
            unreadable: Vec::new(),
        }
    }

    /// A collection that ends on its way, and the process with it.
    fn break_off(&mut self, rng: &mut StdRng) {
        let holders = self.holders();
        let cancel = AtomicBool::new(false);
        let how = |dry_run| Collecting {
            dry_run,
            now: self.now,
            rate: None,
            cancel: &cancel,
        };
        let planned = self.store.collect_with(&self.policy.1, &holders, &how(true)).unwrap().1;
        let blobs: Vec<Gone> = planned.iter().filter(|gone| gone.kind == Kind::Blob).collect();
        let Some(gone) = blobs.choose(rng) else {
            return;
        };
        let path = blob_path(&self.store, &gone.name.parse().unwrap());
        // What is in its place cannot be removed.
        let hinder = || {
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
        };
        let ended = self.store.collect_and(&self.policy.1, &holders, &how(false), &hinder);
        let done = ended.err().and_then(|unfinished| unfinished.done).expect("what it did");
        fs::remove_dir(&path).unwrap();
        assert!(!done.0.complete && done.1.len() < planned.len());
        self.count("collections broken off", 1);
        self.count("things removed by these", done.1.len() as u64);
        self.restart();
    }

    fn collect(&mut self, rng: &mut StdRng) {
        if rng.random_bool(0.1) {
            self.break_off(rng);
            self.settle();
            self.check();
        }
        let holders = self.holders();
        // A build goes on meanwhile, which needs what it has found.
        let build = self.store.build().unwrap();
        let mut leased: BTreeSet<Digest> = BTreeSet::new();
        if rng.random_bool(0.3) {
            let found = (0..CONTENTS).map(|number| digest_of(&content(number)));
            leased.extend(found.filter(|digest| rng.random_bool(0.1) && build.find(digest).unwrap().is_some()));
        }
        let run = |dry_run| {
            let how = Collecting {
                dry_run,
                now: self.now,
                rate: None,
                cancel: &AtomicBool::new(false),
            };
            self.store.collect_with(&self.policy.1, &holders, &how).unwrap()
        };
        let before = self.before();
        let planned: Vec<Gone> = run(true).1.iter().collect();
        let (report, removals) = run(false);
        assert_eq!(
            (report.blocked.len(), report.missing_blobs, report.complete),
            (0, 0, true)
        );
        let sorted = |mut gone: Vec<Gone>| {
            gone.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
            gone
        };
        assert_eq!(
            sorted(planned),
            sorted(removals.iter().collect()),
            "a dry run is what the run then does"
        );
        self.settle();
        self.check_bytes();
        for digest in &leased {
            assert!(
                blob_path(&self.store, digest).exists(),
                "{digest} is of a running build"
            );
        }
        self.check_limits(&leased);
        if rng.random_bool(0.3) {
            let again = run(false).0;
            assert_eq!(
                (again.deleted_blobs, again.freed_bytes),
                (0, 0),
                "directly after a run nothing is left to do"
            );
        }
        drop(build);
        let gone: Vec<Gone> = removals.iter().collect();
        self.check_reasons(&before, &gone, &leased);
        self.count("collections", 1);
        self.count("contents deleted", report.deleted_blobs);
        self.count("contents of builds", leased.len() as u64);
    }

    /// A naive look at the files themselves: all that refs, layers and mounts name is there, history too.
    fn check(&self) {
        let refs = self.store.refs().unwrap().refs;
        let found: BTreeMap<String, TreeDigest> = refs
            .iter()
            .filter_map(|entry| Some((entry.name.name().to_owned(), entry.current.as_ref()?.digest)))
            .collect();
        assert_eq!(found, self.current);
        let history = refs.iter().flat_map(|entry| &entry.history);
        let mut trees = self.live();
        trees.extend(history.map(|old| old.revision.digest));
        for tree in trees {
            for (digest, size) in self.store.load(&tree).unwrap().contents() {
                let found = fs::metadata(blob_path(&self.store, digest)).map(|found| found.len());
                assert_eq!(found.ok(), Some(size), "{digest} of {tree}");
            }
        }
    }

    /// And it has the right bytes.
    fn check_bytes(&self) {
        self.check();
        check_all(&self.store);
    }

    fn live(&self) -> BTreeSet<TreeDigest> {
        let held = self.held.iter().map(|held| held.tree);
        self.current.values().copied().chain(held).collect()
    }

    /// Whether what may go has gone, by the policy; not what a running build needs.
    fn check_limits(&self, leased: &BTreeSet<Digest>) {
        let refs = self.store.refs().unwrap().refs;
        let live = self.live();
        let mut named = leased.clone();
        for tree in &live {
            named.extend(self.store.load(tree).unwrap().contents().map(|(digest, _)| *digest));
        }
        let policy = &self.policy.1;
        let age = |path: &Path| self.age(path);
        let files = self.files();
        let size: u64 = files.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        let is_over = policy.max_size.is_some_and(|most| size > most)
            || policy.min_free.is_some_and(|least| self.room().1 < least);
        for entry in &refs {
            for old in &entry.history {
                let tree = old.revision.digest;
                named.extend(self.store.load(&tree).unwrap().contents().map(|(digest, _)| *digest));
                if live.contains(&tree) {
                    continue;
                }
                // The same tree may be younger history of another ref.
                let retired = refs
                    .iter()
                    .flat_map(|entry| &entry.history)
                    .filter(|other| other.revision.digest == tree)
                    .map(|other| self.now.duration_since(other.retired_at).unwrap_or_default())
                    .min();
                let unused = age(&self.root.join("manifests").join(tree.hex())).min(retired.unwrap());
                let too_old = policy.max_age.is_some_and(|most| unused >= most);
                assert!(
                    !too_old,
                    "history of {} is {unused:?} old under {:?}",
                    entry.name, self.policy
                );
                let may_go = unused >= policy.grace;
                assert!(
                    !(is_over && may_go),
                    "{size} bytes, and history of {} is kept under {:?}",
                    entry.name,
                    self.policy
                );
            }
        }
        for path in files
            .iter()
            .filter(|path| path.parent().unwrap().file_name().unwrap() != "manifests")
        {
            let hex = format!(
                "{}{}",
                path.parent().unwrap().file_name().unwrap().to_str().unwrap(),
                path.file_name().unwrap().to_str().unwrap()
            );
            let digest: Digest = format!("sha256:{hex}").parse().unwrap();
            if named.contains(&digest) || age(path) < policy.grace {
                continue;
            }
            let most = policy.max_age.unwrap_or(Duration::from_secs(DAY));
            assert!(
                age(path) < most && !is_over,
                "{digest} is named by nothing, and {:?} old under {:?}",
                age(path),
                self.policy
            );
        }
    }
}

/// Something to put in a store's place while that is closed.
fn scratch_store(root: &Path) -> Store {
    Store::open(root, Options::default()).unwrap()
}

/// Ninety days of a store in so many steps. Returns how often what was done.
fn ninety_days(seed: u64, steps: u64) -> BTreeMap<&'static str, u64> {
    eprintln!("LARDER_SEED={seed}, {steps} steps");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let mut world = World::new(&ram.path().join("store"));
    for _ in 0..steps {
        world.step(&mut rng);
        // On average the days are over with the steps.
        world.now += Duration::from_secs(rng.random_range(0..=2 * DAYS * DAY / steps));
    }
    println!("{:?}", world.counts);
    // What comes of age in ninety days is as much in many small steps as in few large ones.
    for (what, least) in [
        ("collections", steps / 10),
        ("contents deleted", 200),
        ("contents of builds", 200),
        ("collections broken off", 5),
        ("things removed by these", 5),
        ("trees too old", 5),
        ("trees for room", 20),
    ] {
        let count = world.counts.get(what).copied().unwrap_or_default();
        assert!(count >= least, "hardly any {what}: {count}");
    }
    world.counts
}

/// In the long form 50,000 steps: many in one store, and several stores in which a policy and a tree stay for days.
#[test]
fn ninety_days_lose_nothing_that_is_needed_and_keep_the_limits() {
    let given = std::env::var("LARDER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| rand::rng().random());
    if std::env::var_os("LARDER_SOAK").is_none() {
        ninety_days(seed, 2_000);
        return;
    }
    ninety_days(seed, 30_000);
    let worlds = (1..=10).map(|more| ninety_days(seed.wrapping_add(more), 2_000));
    let incomplete = worlds.filter(|counts| counts.contains_key("incomplete trees")).count();
    assert!(incomplete > 0, "no tree lost a content to minCopies");
}
