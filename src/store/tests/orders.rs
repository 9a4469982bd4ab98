//! The store's own code in orders that a seed decides (`turns.rs`): what `gc/model/` tries on a model in every order is
//! tried here on the real thing, in some. Some hundred orders find that a lease, a hold or the second look at manifests
//! does not count; what only a narrow order shows (that nothing is forgotten during a collection) is left to the model.

use std::sync::Mutex;
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::full_disk::Unmount;
use crate::store::retention::Policy;
use crate::store::testing::*;
use crate::store::turns::take_turns;
use crate::store::*;

/// The contents of a few trees that share some.
const TREES: [&[(&str, &[u8])]; 3] = [&[("a", b"0")], &[("a", b"0"), ("b", b"1")], &[("b", b"1")]];

/// Two namespaces, so that between reading the one ref and the other there is a step.
fn ref_name(number: usize) -> RefName {
    RefName::new(["one", "two"][number], "tree").unwrap()
}

struct Place {
    store: Store,
    /// What layers record on disk.
    layers: Mutex<Vec<TreeDigest>>,
}

impl Holders for Place {
    fn held(&self) -> Result<Held, Error> {
        turns::point();
        Ok(Held {
            trees: self
                .layers
                .lock()
                .unwrap()
                .iter()
                .map(|tree| HeldTree::by_layer(*tree, "layer"))
                .collect(),
            unreadable: Vec::new(),
        })
    }
}

#[derive(Debug, Clone, Copy)]
enum Work {
    Build {
        tree: usize,
        name: usize,
        history_limit: u32,
    },
    FailedBuild {
        tree: usize,
    },
    /// Contents without a tree.
    Contents {
        tree: usize,
    },
    /// A tree that is kept by a build, and published once more without being put.
    Keep {
        tree: usize,
        name: usize,
    },
    Remove {
        tree: usize,
    },
    Hold {
        tree: usize,
    },
    Layer {
        tree: usize,
    },
    Retire {
        name: usize,
    },
    Forget {
        name: usize,
    },
    Collect {
        keeps_history: bool,
    },
}

impl Work {
    fn any(rng: &mut StdRng) -> Work {
        let (tree, name) = (rng.random_range(0..TREES.len()), rng.random_range(0..2));
        match rng.random_range(0..18) {
            0..5 => Work::Build {
                tree,
                name,
                history_limit: rng.random_range(0..3),
            },
            5 => Work::FailedBuild { tree },
            6 | 7 => Work::Hold { tree },
            8..11 => Work::Layer { tree },
            11 => Work::Retire { name },
            12 => Work::Forget { name },
            13 => Work::Contents { tree },
            14 | 15 => Work::Keep { tree, name },
            16 => Work::Remove { tree },
            _ => Work::Collect {
                keeps_history: rng.random_bool(0.3),
            },
        }
    }

    fn run(self, place: &Place) {
        let store = &place.store;
        match self {
            Work::Build {
                tree,
                name,
                history_limit,
            } => {
                let build = store.build().unwrap();
                let tree = tree_of(&build, TREES[tree]);
                let target = Publish {
                    name: ref_name(name),
                    history_limit,
                    ..target("any", "uid-1")
                };
                build.publish(&tree, target).unwrap();
            }
            Work::FailedBuild { tree } => {
                let build = store.build().unwrap();
                for (_, bytes) in TREES[tree] {
                    let found = build.find(&digest_of(bytes)).unwrap();
                    build.put_bytes(bytes).unwrap();
                    turns::point();
                    if found.is_some() {
                        assert_eq!(std::fs::read(blob_path(store, &digest_of(bytes))).unwrap(), *bytes);
                    }
                }
            }
            Work::Contents { tree } => {
                let build = store.build().unwrap();
                for (_, bytes) in TREES[tree] {
                    build.put_bytes(bytes).unwrap();
                }
                build.store_contents().unwrap();
            }
            Work::Keep { tree, name } => {
                let build = store.build().unwrap();
                match build.keep_tree(&digest(tree)) {
                    Ok(kept) => {
                        turns::point();
                        let target = Publish {
                            name: ref_name(name),
                            ..target("any", "uid-1")
                        };
                        build.publish(&kept, target).unwrap();
                    }
                    Err(Error::MissingManifest { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            // What is needed stays: that is looked at in the end, and by those who hold a tree meanwhile.
            Work::Remove { tree } => {
                let digests = TREES[tree].iter().map(|(_, bytes)| digest_of(bytes)).collect();
                let removed = store.remove_blobs(&digests, place, &never()).unwrap().unwrap();
                assert!(!removed.values().any(|one| matches!(one, Removed::Failed(_))));
            }
            Work::Hold { tree } => {
                if let Some(hold) = hold(store, tree) {
                    turns::point();
                    check_tree(store, hold.tree());
                }
            }
            Work::Layer { tree } => {
                let Some(hold) = hold(store, tree) else { return };
                turns::point();
                let tree = *hold.tree();
                place.layers.lock().unwrap().push(tree);
                drop(hold);
                turns::point();
                check_tree(store, &tree);
                place.layers.lock().unwrap().pop_if(|last| *last == tree);
            }
            Work::Retire { name } => drop(store.retire(&ref_name(name), "uid-1", SystemTime::now()).unwrap()),
            Work::Forget { name } => store.forget(&ref_name(name)).unwrap(),
            Work::Collect { keeps_history } => {
                let policy = match keeps_history {
                    true => Policy {
                        max_age: None,
                        ..nothing_kept()
                    },
                    false => nothing_kept(),
                };
                let report = store.collect(&policy, place, false, SystemTime::now()).unwrap();
                assert_eq!((report.blocked, report.missing_blobs), (vec![], 0));
            }
        }
    }
}

fn hold(store: &Store, tree: usize) -> Option<Hold> {
    match store.hold(&digest(tree)) {
        Ok(hold) => Some(hold),
        Err(Error::MissingManifest { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

fn digest(tree: usize) -> TreeDigest {
    let mut made = tree::Tree::new(meta(0o755));
    for (name, bytes) in TREES[tree] {
        let leaf = file(digest_of(bytes), bytes.len() as u64);
        made.add_leaf(tree::Tree::ROOT, name.as_bytes(), leaf).unwrap();
    }
    made.finish().unwrap().digest().unwrap()
}

fn check_tree(store: &Store, digest: &TreeDigest) {
    for (digest, size) in store.load(digest).unwrap().contents() {
        let bytes = std::fs::read(blob_path(store, digest)).unwrap_or_else(|e| panic!("{digest}: {e}"));
        assert_eq!((digest_of(&bytes), bytes.len() as u64), (*digest, size));
    }
}

/// Some works first, one after another, then some at once, of which one at least is a collection or removes contents.
fn try_order(root: &std::path::Path, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let place = Place {
        store: Store::open(root, Options::default()).unwrap(),
        layers: Mutex::default(),
    };
    // What there is at first: contents without a tree, current trees, history, orphans.
    let mut before = Vec::new();
    for tree in 0..TREES.len() {
        let name = rng.random_range(0..2);
        if rng.random_bool(0.3) {
            before.push(Work::Contents { tree });
        }
        if rng.random_bool(0.6) {
            let history_limit = rng.random_range(0..3);
            before.push(Work::Build {
                tree,
                name,
                history_limit,
            });
        }
        match rng.random_range(0..4) {
            0 => before.push(Work::Retire { name }),
            1 | 2 => before.push(Work::Forget { name }),
            _ => {}
        }
    }
    before.iter().for_each(|work| work.run(&place));
    let mut works: Vec<Work> = (0..rng.random_range(1..4)).map(|_| Work::any(&mut rng)).collect();
    works.push(match rng.random_ratio(1, 3) {
        true => Work::Remove {
            tree: rng.random_range(0..TREES.len()),
        },
        false => Work::Collect { keeps_history: false },
    });
    if rng.random_ratio(1, 3) {
        works.push(Work::Collect { keeps_history: true });
    }
    println!("LARDER_SEED={seed}: {before:?}, then at once {works:?}");
    let place = &place;
    let run = |work: Work| -> Box<dyn FnOnce() + Send + '_> { Box::new(move || work.run(place)) };
    take_turns(rng.random(), works.into_iter().map(run).collect());

    check_all(&place.store);
    collect(&place.store);
    let blobs = check_all(&place.store);
    assert_eq!(place.store.blobs().unwrap().0, blobs as u64, "garbage is left");
    assert!(staging_is_empty(&place.store));
}

#[test]
fn the_store_loses_nothing_in_any_order_that_chance_finds() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    std::fs::create_dir(&memory).unwrap();
    // No sync waits for a disk, so that there are many.
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64m", "none"])
        .arg(&memory)
        .status();
    assert!(
        mount.unwrap().success(),
        "this test mounts a file system: run it as root"
    );
    let _unmount = Unmount(memory.clone());
    let given = std::env::var("LARDER_SEED").ok().and_then(|seed| seed.parse().ok());
    let first: u64 = given.unwrap_or_else(|| rand::rng().random());
    let rounds = match std::env::var_os("LARDER_SOAK") {
        Some(_) => 20_000,
        None => 300,
    };
    for round in 0..rounds {
        let root = memory.join("store");
        try_order(&root, first.wrapping_add(round));
        std::fs::remove_dir_all(root).unwrap();
    }
}
