//! The trees that are mounted, and the store that they are in.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use larder::layer::{self, LayerOwner, LayerSpec, Layers, Mode};
use larder::store::tree::{Leaf, LeafKind, Meta, Tree};
use larder::store::{self, Build, Publish, RefName, Store, TreeDigest};

/// Files in a folder.
const FOLDER: usize = 100;
/// Distinct contents of a tree: more would only take longer to store.
const CONTENTS: usize = 10_000;
/// Numbers of files.
pub const SMALL: usize = 1_000;
pub const MIDDLE: usize = 100_000;
pub const LARGE: usize = 1_000_000;
/// Of a layer that has a limit.
pub const LIMIT: u64 = 1 << 30;

pub struct Site {
    pub root: PathBuf,
    pub store: Store,
    pub layers: Layers,
    /// By number of files.
    pub trees: Vec<(usize, TreeDigest)>,
}

/// Set for the process that makes the trees: its memory would count as that of the programs that the bench starts, for
/// what a process has had before it becomes another program counts as that one's.
const MAKE: &str = "LARDER_BENCH_TREES";

/// Makes the trees if this process was started for that.
pub fn make() -> bool {
    let Some(root) = std::env::var_os(MAKE) else {
        return false;
    };
    let store = Store::open(Path::new(&root), store::Options::default()).expect("a store");
    for files in [SMALL, MIDDLE, LARGE] {
        publish(&store, files);
    }
    true
}

impl Site {
    pub fn new(disk: &Path) -> Site {
        let root = disk.join("store");
        let program = std::env::current_exe().expect("this program");
        super::disk::sh(std::process::Command::new(program).env(MAKE, &root));
        let store = Store::open(&root, store::Options::default()).expect("a store");
        let layers = Layers::open(store.clone(), layer::Options::default()).expect("layers");
        let trees = [SMALL, MIDDLE, LARGE].map(|files| {
            let name = RefName::new("local", format!("files-{files}")).expect("a name");
            let stored = store.get_ref(&name).expect("a ref").and_then(|stored| stored.current);
            (files, stored.expect("a tree").digest)
        });
        Site {
            root: disk.to_owned(),
            store,
            layers,
            trees: trees.into(),
        }
    }

    pub fn tree(&self, files: usize) -> TreeDigest {
        let found = self.trees.iter().find(|(known, _)| *known == files);
        found.expect("a tree of so many files").1
    }

    pub fn spec(&self, tree: TreeDigest, mode: Mode) -> LayerSpec {
        LayerSpec {
            id: uuid::Uuid::new_v4().to_string().parse().expect("an id"),
            owner: LayerOwner::admin("bench"),
            tree,
            mode,
            size: Some(LIMIT),
            ids: None,
        }
    }
}

pub fn path_of(file: usize) -> String {
    format!("folder-{:05}/file-{file:07}", file / FOLDER)
}

/// As large as the files of toolchains are: four of five up to 8 KiB, the others up to 64, and 10 KiB in the mean. (The files
/// that the store's bench keeps have 14 KiB in the mean.)
fn content(number: usize) -> Vec<u8> {
    let length = match number % 5 {
        0 => 8192 + number * 7919 % 57_344,
        _ => 256 + number * 7919 % 7_936,
    };
    format!("content {number}\n")
        .into_bytes()
        .into_iter()
        .cycle()
        .take(length)
        .collect()
}

pub fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        mtime: (1_700_000_000, 0),
        ..Meta::default()
    }
}

fn publish(store: &Store, files: usize) -> TreeDigest {
    let build = store.build().expect("a build");
    let blobs: Vec<_> = (0..CONTENTS.min(files))
        .map(|number| build.put_bytes(&content(number)).expect("stored"))
        .collect();
    let mut tree = Tree::new(meta(0o755));
    let mut folder = Tree::ROOT;
    for file in 0..files {
        if file % FOLDER == 0 {
            let name = format!("folder-{:05}", file / FOLDER);
            folder = tree
                .add_dir(Tree::ROOT, name.as_bytes(), meta(0o755))
                .expect("a folder");
        }
        let blob = &blobs[file % blobs.len()];
        let leaf = Leaf {
            meta: meta(0o644),
            kind: LeafKind::File {
                digest: blob.digest,
                size: blob.size,
            },
        };
        let name = format!("file-{file:07}");
        tree.add_leaf(folder, name.as_bytes(), leaf).expect("a file");
    }
    publish_tree(build, &tree.finish().expect("a tree"), &format!("files-{files}"))
}

pub fn publish_tree(build: Build, tree: &Tree, name: &str) -> TreeDigest {
    let target = Publish {
        name: RefName::new("local", name).expect("a name"),
        owner: "bench".to_owned(),
        generation: 0,
        request: None,
        source: serde_json::Value::Null,
        history_limit: 0,
        now: SystemTime::now(),
    };
    build.publish(tree, target).expect("published").digest
}
