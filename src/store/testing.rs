//! What the store's tests share.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proptest::prelude::*;

use super::retention::Policy;
use super::tree::{DirId, Leaf, LeafId, LeafKind, Meta, Tree};
use super::{
    Build, Digest, Error, Held, HeldTree, Holders, Options, Publish, RefName, Report, Revision, Store, TreeDigest,
};

pub fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
    (dir, store)
}

/// A flag of what is never cancelled.
pub fn never() -> AtomicBool {
    AtomicBool::new(false)
}

pub fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

pub fn name(name: &str) -> RefName {
    RefName::new("test", name).unwrap()
}

pub fn target(ref_name: &str, owner: &str) -> Publish {
    Publish {
        name: name(ref_name),
        owner: owner.to_owned(),
        generation: 1,
        request: None,
        source: serde_json::json!({"directory": {"path": "/srv"}}),
        history_limit: 3,
        now: SystemTime::now(),
    }
}

pub fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        mtime: (1_700_000_000, 5),
        ..Meta::default()
    }
}

/// A flat tree of files with those contents, put into the build.
pub fn tree_of(build: &Build, files: &[(&str, &[u8])]) -> Tree {
    let mut tree = Tree::new(meta(0o755));
    for (name, content) in files {
        let blob = build.put_bytes(content).unwrap();
        let leaf = file(blob.digest, blob.size);
        tree.add_leaf(Tree::ROOT, name.as_bytes(), leaf).unwrap();
    }
    tree.finish().unwrap()
}

pub fn file(digest: Digest, size: u64) -> Leaf {
    Leaf {
        meta: meta(0o644),
        kind: LeafKind::File { digest, size },
    }
}

pub fn publish(store: &Store, ref_name: &str, files: &[(&str, &[u8])]) -> Revision {
    let build = store.build().unwrap();
    let tree = tree_of(&build, files);
    build.publish(&tree, target(ref_name, "uid-1")).unwrap()
}

pub struct Trees(pub Vec<TreeDigest>);

impl Holders for Trees {
    fn held(&self) -> Result<Held, Error> {
        Ok(Held {
            trees: self
                .0
                .iter()
                .map(|tree| HeldTree::by_mount(*tree, Path::new("/mnt")))
                .collect(),
            unreadable: Vec::new(),
        })
    }
}

/// A policy that keeps nothing that is not live.
pub fn nothing_kept() -> Policy {
    Policy {
        max_age: Some(Duration::ZERO),
        grace: Duration::ZERO,
        ..Policy::built_in()
    }
}

pub fn collect(store: &Store) -> Report {
    store
        .collect(&nothing_kept(), &Trees(Vec::new()), false, SystemTime::now())
        .unwrap()
}

pub fn digest_of(bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    Digest::from_bytes(sha2::Sha256::digest(bytes).into())
}

pub fn blob_path(store: &Store, digest: &Digest) -> std::path::PathBuf {
    let hex = digest.hex();
    store.root().join("objects").join(&hex[..2]).join(&hex[2..])
}

/// The independent check: every published manifest has all its blobs, with the right bytes. Returns how many blobs.
pub fn check_all(store: &Store) -> usize {
    let refs = store.refs().unwrap();
    assert_eq!(refs.unreadable, []);
    let mut checked = std::collections::HashSet::new();
    for entry in &refs.refs {
        let history = entry.history.iter().map(|old| &old.revision);
        for revision in entry.current.iter().chain(history) {
            let tree = store.load(&revision.digest).unwrap();
            for (digest, size) in tree.contents() {
                if checked.insert(*digest) {
                    let bytes = std::fs::read(blob_path(store, digest)).unwrap();
                    assert_eq!((digest_of(&bytes), bytes.len() as u64), (*digest, size));
                }
            }
        }
    }
    checked.len()
}

pub fn staging_is_empty(store: &Store) -> bool {
    std::fs::read_dir(store.root().join("staging"))
        .unwrap()
        .next()
        .is_none()
}

/// One step in growing a tree: which folder, which name, what.
#[derive(Debug, Clone)]
pub enum Grow {
    Dir(usize, Vec<u8>, Meta),
    Leaf(usize, Vec<u8>, Leaf),
    Link(usize, Vec<u8>, usize),
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("no slash, no NUL", |byte| *byte != 0 && *byte != b'/');
    let short = prop::collection::vec(byte.clone(), 1..6);
    let long = prop::collection::vec(byte, 250..256);
    prop_oneof![20 => short, 1 => long].prop_filter("not . or ..", |name| name != b"." && name != b"..")
}

fn any_meta() -> impl Strategy<Value = Meta> {
    let id = prop_oneof![3 => Just(0u32), 1 => any::<u32>()];
    let seconds = prop_oneof![3 => 1_600_000_000i64..1_700_000_000, 1 => any::<i64>(), 1 => Just(i64::MIN)];
    let name = prop::collection::vec(1u8.., 1..12);
    let xattrs = prop::collection::btree_map(name, prop::collection::vec(any::<u8>(), 0..20), 0..3);
    (0u16..=0o7777, id.clone(), id, seconds, 0u32..1_000_000_000, xattrs).prop_map(
        |(mode, uid, gid, seconds, nanos, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime: (seconds, nanos),
            xattrs: xattrs
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        },
    )
}

fn any_kind() -> impl Strategy<Value = LeafKind> {
    let content = (0u8..20).prop_map(|seed| {
        let bytes = vec![seed; usize::from(seed) * 3];
        LeafKind::File {
            digest: digest_of(&bytes),
            size: bytes.len() as u64,
        }
    });
    prop_oneof![
        6 => content,
        1 => prop::collection::vec(1u8.., 1..30).prop_map(|target| LeafKind::Symlink(target.into())),
        1 => (1u32..=0xfff, 0u32..=0xf_ffff).prop_map(|(major, minor)| LeafKind::CharDevice { major, minor }),
        1 => (0u32..=0xfff, 0u32..=0xf_ffff).prop_map(|(major, minor)| LeafKind::BlockDevice { major, minor }),
        1 => Just(LeafKind::Fifo),
        1 => Just(LeafKind::Socket),
    ]
}

/// Steps for a tree of every type of entry, odd names, deep folders and hard links across folders.
pub fn any_steps() -> impl Strategy<Value = (Meta, Vec<Grow>)> {
    let step = prop_oneof![
        2 => (any::<usize>(), any_name(), any_meta()).prop_map(|(dir, name, meta)| Grow::Dir(dir, name, meta)),
        4 => (any::<usize>(), any_name(), any_meta(), any_kind())
            .prop_map(|(dir, name, meta, kind)| Grow::Leaf(dir, name, Leaf { meta, kind })),
        1 => (any::<usize>(), any_name(), any::<usize>()).prop_map(|(dir, name, leaf)| Grow::Link(dir, name, leaf)),
    ];
    (any_meta(), prop::collection::vec(step, 0..60))
}

/// Grows a tree; steps whose name is taken are passed over. Not finished: entries are in the order of the steps.
pub fn grow(root: &Meta, steps: &[Grow]) -> Tree {
    let mut tree = Tree::new(root.clone());
    for step in steps {
        let (Grow::Dir(at, name, _) | Grow::Leaf(at, name, _) | Grow::Link(at, name, _)) = step;
        let dir = DirId((at % tree.dirs.len()) as u32);
        if tree.dir(dir).entries.iter().any(|entry| *entry.name == **name) {
            continue;
        }
        match step {
            Grow::Dir(_, name, meta) => {
                tree.add_dir(dir, name.as_slice(), meta.clone()).unwrap();
            }
            Grow::Leaf(_, name, leaf) => {
                tree.add_leaf(dir, name.as_slice(), leaf.clone()).unwrap();
            }
            Grow::Link(_, name, leaf) if !tree.leaves.is_empty() => {
                let leaf = LeafId((leaf % tree.leaves.len()) as u32);
                tree.add_link(dir, name.as_slice(), leaf).unwrap();
            }
            Grow::Link(..) => {}
        }
    }
    tree
}
