//! Trees of many files in folders of a size.

use std::time::SystemTime;

use larder::store::tree::{Leaf, LeafKind, Meta, Tree};
use larder::store::{Blob, Build, Publish, RefName, TreeDigest};

pub fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        mtime: (1_700_000_000, 0),
        ..Meta::default()
    }
}

/// A tree of so many files, so many in a folder, with these contents.
pub fn tree_of(files: usize, per_folder: usize, mut content: impl FnMut(usize) -> Blob) -> Tree {
    let mut tree = Tree::new(meta(0o755));
    let mut folder = Tree::ROOT;
    for file in 0..files {
        if file % per_folder == 0 {
            let name = format!("folder-{:05}", file / per_folder);
            folder = tree
                .add_dir(Tree::ROOT, name.as_bytes(), meta(0o755))
                .expect("a folder");
        }
        let blob = content(file);
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
    tree.finish().expect("a tree")
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
