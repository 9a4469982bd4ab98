//! A life of a store: everything that is done with one, from its making to its collection.
//!
//! It is the same each time, and can be lived again on whatever an interrupted one has left; then it ends as the first
//! would have.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use rustix::fs::IFlags;

use super::noise;
use crate::store::testing::*;
use crate::store::tree::{Leaf, LeafKind, Meta, Tree};
use crate::store::*;

/// More than a build hashes in memory.
const BIG: usize = (1 << 20) + 4321;

/// Says what has been done, for the parent to hold the store to. Reaches it whatever happens next.
fn say(what: &str, name: &str, digest: Option<&TreeDigest>) {
    let digest = digest.map_or(String::new(), |digest| digest.to_string());
    let line = format!("\n{what} {name} {digest}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}

fn with_tail_of_zeros(seed: u64, data: usize, length: usize) -> Vec<u8> {
    let mut bytes = noise(seed, data);
    bytes.resize(length, 0);
    bytes
}

/// A file to put: with a hole at its end if it has zeros there.
fn source(sources: &Path, name: &str, bytes: &[u8]) -> File {
    let path = sources.join(name);
    let file = File::create(&path).unwrap();
    let data = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    (&file).write_all(&bytes[..data]).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    File::open(path).unwrap()
}

/// A tree of a few files, some of them shared by all versions, and one of each other kind of entry.
fn tree(build: &Build, sources: &Path, version: u64) -> Result<Tree, Error> {
    let mut tree = Tree::new(meta(0o755));
    let folder = tree.add_dir(Tree::ROOT, *b"folder", meta(0o750))?;
    let mut add = |name: &str, blob: Blob| {
        let leaf = tree.add_leaf(folder, name.as_bytes(), file(blob.digest, blob.size))?;
        tree.add_link(Tree::ROOT, format!("{name}-again").as_bytes(), leaf)
    };
    add("shared", build.put_bytes(&noise(1, 3000))?)?;
    add(
        "own",
        build.put_file(&source(sources, "own", &noise(100 + version, 5000)))?,
    )?;
    add("own too", build.put(&mut noise(200 + version, 700).as_slice())?)?;
    add("empty", build.put_bytes(b"")?)?;
    add("ends in a hole", build.put_bytes(&with_tail_of_zeros(2, 100, 1 << 18))?)?;
    if version.is_multiple_of(3) {
        add(
            "big",
            build.put_file(&source(sources, "big", &noise(300 + version, BIG)))?,
        )?;
        // Put again: the copy is thrown away.
        build.put_file(&source(sources, "big", &noise(300 + version, BIG)))?;
        let sparse = with_tail_of_zeros(3, 5000, 2 << 20);
        add("sparse", build.put_file(&source(sources, "sparse", &sparse))?)?;
        let unknown = with_tail_of_zeros(4, BIG, 2 << 20);
        add("stream", build.put(&mut unknown.as_slice())?)?;
    }
    let link = Leaf {
        meta: Meta { mode: 0o777, ..meta(0) },
        kind: LeafKind::Symlink(b"folder/own".as_slice().into()),
    };
    tree.add_leaf(Tree::ROOT, *b"link", link)?;
    let fifo = Leaf {
        meta: Meta {
            xattrs: [(b"trusted.note".as_slice().into(), b"x".as_slice().into())].into(),
            ..meta(0o600)
        },
        kind: LeafKind::Fifo,
    };
    tree.add_leaf(Tree::ROOT, *b"fifo", fifo)?;
    Ok(tree.finish()?)
}

fn publish(store: &Store, sources: &Path, name: &str, version: u64) -> Result<TreeDigest, Error> {
    let build = store.build()?;
    let tree = tree(&build, sources, version)?;
    // Nobody needs an empty shard's folder, so one may be gone.
    let _ = fs::remove_dir(
        store
            .root()
            .join("objects")
            .join(&digest_of(&noise(100 + version, 5000)).hex()[..2]),
    );
    say("publishing", name, Some(&tree.digest()?));
    let mut target = target(name, "uid-1");
    target.history_limit = 2;
    let digest = build.publish(&tree, target)?.digest;
    say("published", name, Some(&digest));
    Ok(digest)
}

/// Lives it with the store at `root`; a tree is exported to `out`. Fails with what the store failed with.
pub fn live(root: &Path, out: &Path) -> Result<(), Error> {
    // Beside the store, so that blocks can be shared.
    let sources = root.with_extension("sources");
    fs::create_dir_all(&sources).unwrap();
    let store = Store::open(root, Options::default())?;
    say("opened", "", None);
    let first = publish(&store, &sources, "kept", 0)?;
    publish(&store, &sources, "retired", 1)?;
    publish(&store, &sources, "forgotten", 2)?;
    // Three revisions, so that one is dropped and two are history; the last once more, unchanged.
    let mut history = first;
    for version in [3, 4, 5, 5] {
        let digest = publish(&store, &sources, "rebuilt", version)?;
        if version == 4 {
            history = digest;
        }
    }
    store.write_note(&name("forgotten"), b"read at some time")?;
    store.write_note(&name("forgotten"), b"read later")?;
    assert_eq!(
        store.read_note(&name("forgotten"))?.as_deref(),
        Some(b"read later".as_slice())
    );
    say("retiring", "retired", None);
    store.retire(&name("retired"), "uid-1", SystemTime::now())?;
    say("forgetting", "forgotten", None);
    store.forget(&name("forgotten"))?;
    assert_eq!(store.read_note(&name("forgotten"))?, None);
    say("forgotten", "forgotten", None);

    let hold = store.hold(&first)?;
    // A copy of a tree that nobody needs, with what makes removing it hard.
    let copy = store.scratch()?;
    let deep = copy.path().join("a/b/c");
    fs::create_dir_all(&deep).unwrap();
    for folder in [copy.path(), &deep] {
        let fixed = File::create(folder.join("fixed")).unwrap();
        // Not every file system knows it.
        let _ = rustix::fs::ioctl_setflags(&fixed, IFlags::IMMUTABLE);
    }
    drop(copy);
    let unused = store.images_dir().join(format!("{}.tree", "ab".repeat(32)));
    fs::create_dir_all(unused.join("folder/folder")).unwrap();
    say("collecting", "", None);
    let held = Trees(vec![history]);
    let report = store.collect(&nothing_kept(), &held, false, SystemTime::now())?;
    assert_eq!(report.blocked, [], "nothing was damaged");
    say("collected", "", None);
    drop(hold);

    remove_all(out).unwrap();
    store.export(&store.load(&first)?, out, None)?;
    say("exported", "", None);

    // One after the other, so that a fault meets the same blob each time.
    let options = VerifyOptions {
        scope: Scope::All,
        rate: std::num::NonZeroU64::new(1 << 40),
    };
    let found = store.verify(&options, &VerifyProgress::default(), &AtomicBool::new(false))?;
    assert_eq!((&found.bad_manifests[..], &found.bad_refs[..]), (&[][..], &[][..]));
    if !found.is_sound() {
        // A disk that could not read a blob, twice: it is quarantined, and what is current is built again.
        publish(&store, &sources, "kept", 0)?;
        publish(&store, &sources, "rebuilt", 5)?;
    }
    say("verified", "", None);
    drop(store);
    Store::open(root, Options::default())?;
    say("reopened", "", None);
    Ok(())
}
