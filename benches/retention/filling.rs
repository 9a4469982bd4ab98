//! The store that retention has to do with: a tree that is kept, and as many contents that nothing needs.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use larder::store::retention::Policy;
use larder::store::tree::Tree;
use larder::store::{self, Build, Collecting, Held, RefName, Store};

use super::apart;
use super::flat::{self, publish_tree};

/// Contents of the tree that is kept, and contents that nothing needs.
pub const HALF: usize = 500_000;
/// Files in a folder.
const FOLDER: usize = 1000;

/// Deletes everything that nothing needs.
pub fn all() -> Policy {
    Policy {
        max_age: Some(Duration::ZERO),
        grace: Duration::ZERO,
        ..Policy::built_in()
    }
}

/// Makes the store if this process was started for that, or makes all that nothing needs anew.
pub fn fill_if_asked() -> bool {
    let Some(root) = apart::asked() else {
        return false;
    };
    let store = open(&root);
    let name = RefName::new("local", "kept").expect("a name");
    if store.get_ref(&name).expect("a ref").is_none() {
        publish(&store, "kept");
    }
    add_garbage(&store);
    true
}

pub fn open(root: &Path) -> Store {
    Store::open(root, store::Options::default()).expect("a store")
}

/// Contents that were of a tree: it is forgotten, and its manifest gone.
fn add_garbage(store: &Store) {
    publish(store, "dropped");
    let name = RefName::new("local", "dropped").expect("a name");
    store.forget(&name).expect("forgotten");
    let policy = Policy {
        grace: Duration::from_secs(3600),
        ..all()
    };
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        rate: None,
        cancel: &AtomicBool::new(false),
    };
    let (report, _) = store.collect_with(&policy, &Held::default(), &how).expect("collected");
    assert_eq!(report.deleted_blobs, 0, "they are fresh");
}

/// Small, and each another one.
pub fn content(name: &str, number: usize) -> Vec<u8> {
    format!("content {number} of {name}\n")
        .repeat(1 + number % 40)
        .into_bytes()
}

fn publish(store: &Store, name: &str) {
    let build = store.build().expect("a build");
    let tree = tree_of(&build, name, HALF);
    publish_tree(build, &tree, name);
}

/// Puts so many contents, and makes a tree of them.
pub fn tree_of(build: &Build, name: &str, files: usize) -> Tree {
    let put = |number| build.put_bytes(&content(name, number)).expect("stored");
    flat::tree_of(files, FOLDER, put)
}
