//! The store that retention has to do with: a tree that is kept, and as many contents that nothing needs.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use larder::store::retention::Policy;
use larder::store::tree::{Leaf, LeafKind, Meta, Tree};
use larder::store::{self, Build, Collecting, Held, Holders, Publish, RefName, Store};

/// Contents of the tree that is kept, and contents that nothing needs.
pub const HALF: usize = 500_000;
/// Files in a folder.
const FOLDER: usize = 1000;

/// Set for the process that fills the store: its memory would count as that of the programs that the bench starts, for
/// what a process has had before it becomes another program counts as that one's.
const FILL: &str = "LARDER_BENCH_FILL";

/// No layers and no mounts.
pub struct Nobody;

impl Holders for Nobody {
    fn held(&self) -> Result<Held, store::Error> {
        Ok(Held::default())
    }
}

/// Deletes everything that nothing needs.
pub fn all() -> Policy {
    Policy {
        max_age: Some(Duration::ZERO),
        grace: Duration::ZERO,
        ..Policy::built_in()
    }
}

/// Fills a store if this process was started for that.
pub fn fill_if_asked() -> bool {
    let Some(root) = std::env::var_os(FILL) else {
        return false;
    };
    let store = open(Path::new(&root));
    let name = RefName::new("local", "kept").expect("a name");
    if store.get_ref(&name).expect("a ref").is_none() {
        publish(&store, "kept");
    }
    add_garbage(&store);
    true
}

/// Makes the store, or makes all that nothing needs anew.
pub fn fill(root: &Path) {
    let program = std::env::current_exe().expect("this program");
    super::disk::sh(Command::new(program).env(FILL, root));
}

pub fn open(root: &Path) -> Store {
    Store::open(root, store::Options::default()).expect("a store")
}

/// Contents that were of a tree: it is forgotten, and its manifest gone.
pub fn add_garbage(store: &Store) {
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
    let (report, _) = store.collect_with(&policy, &Nobody, &how).expect("collected");
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
    let mut tree = Tree::new(meta(0o755));
    let mut folder = Tree::ROOT;
    for number in 0..files {
        if number % FOLDER == 0 {
            let name = format!("folder-{:05}", number / FOLDER);
            folder = tree
                .add_dir(Tree::ROOT, name.as_bytes(), meta(0o755))
                .expect("a folder");
        }
        let blob = build.put_bytes(&content(name, number)).expect("stored");
        let leaf = Leaf {
            meta: meta(0o644),
            kind: LeafKind::File {
                digest: blob.digest,
                size: blob.size,
            },
        };
        let name = format!("file-{number:07}");
        tree.add_leaf(folder, name.as_bytes(), leaf).expect("a file");
    }
    tree.finish().expect("a tree")
}

pub fn publish_tree(build: Build, tree: &Tree, name: &str) {
    let target = Publish {
        name: RefName::new("local", name).expect("a name"),
        owner: "bench".to_owned(),
        generation: 1,
        request: None,
        source: serde_json::Value::Null,
        history_limit: 0,
        now: SystemTime::now(),
    };
    build.publish(tree, target).expect("published");
}

fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        mtime: (1_700_000_000, 0),
        ..Meta::default()
    }
}
