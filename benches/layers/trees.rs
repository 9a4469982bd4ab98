//! The trees that are mounted, and the store that they are in.

use std::path::{Path, PathBuf};

use larder::layer::{self, LayerOwner, LayerSpec, Layers, Mode};
use larder::store::{self, RefName, Store, TreeDigest};

use super::apart;
use super::flat::{publish_tree, tree_of};

/// Files in a folder.
pub const FOLDER: usize = 100;
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

/// Makes the trees if this process was started for that.
pub fn make() -> bool {
    let Some(root) = apart::asked() else {
        return false;
    };
    let store = Store::open(&root, store::Options::default()).expect("a store");
    for files in [SMALL, MIDDLE, LARGE] {
        publish(&store, files);
    }
    true
}

impl Site {
    pub fn new(disk: &Path) -> Site {
        let root = disk.join("store");
        apart::ask(&root);
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

fn publish(store: &Store, files: usize) -> TreeDigest {
    let build = store.build().expect("a build");
    let blobs: Vec<_> = (0..CONTENTS.min(files))
        .map(|number| build.put_bytes(&content(number)).expect("stored"))
        .collect();
    let tree = tree_of(files, FOLDER, |file| blobs[file % blobs.len()]);
    publish_tree(build, &tree, &format!("files-{files}"))
}
