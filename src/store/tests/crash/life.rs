//! A life of a store: everything that is done with one, from its making to its collection.
//!
//! It is the same each time, and can be lived again on whatever an interrupted one has left; then it ends as the first
//! would have.

use std::fs::{self, File};
use std::io::Write as _;
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

/// Former revisions that refs keep.
pub const HISTORY: u32 = 2;

/// Is told what is about to be done, and what has been: an action, a ref's name (or `-`) and a digest (or `-`).
pub type Say<'a> = &'a mut dyn FnMut(&str, &str, &str);

/// Bytes that no other seed has, no page like another, and then zeros up to a length.
fn bytes(seed: u64, data: usize, length: usize) -> Vec<u8> {
    // In long strides: tests are not optimized.
    let mut bytes = noise(seed, data.min(4096)).repeat(data.div_ceil(4096).max(1));
    for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
        page[..8].copy_from_slice(&number.to_le_bytes());
    }
    bytes.truncate(data);
    bytes.resize(length, 0);
    bytes
}

/// A file to put: those bytes, then a hole.
fn source(sources: &Path, name: &str, seed: u64, data: usize, length: usize) -> File {
    let path = sources.join(format!("{name}-{seed}"));
    // From an earlier life: the disk may be full by now.
    if !path.exists() {
        let file = File::create(&path).unwrap();
        (&file).write_all(&bytes(seed, data, data)).unwrap();
        file.set_len(length as u64).unwrap();
        file.sync_all().unwrap();
    }
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
    add("shared", build.put_bytes(&bytes(1, 3000, 3000))?)?;
    add(
        "own",
        build.put_file(&source(sources, "own", 100 + version, 5000, 5000))?,
    )?;
    add("own too", build.put(&mut bytes(200 + version, 700, 700).as_slice())?)?;
    add("empty", build.put_bytes(b"")?)?;
    add("ends in a hole", build.put_bytes(&bytes(2, 100, 1 << 18))?)?;
    if version.is_multiple_of(3) {
        let big = source(sources, "big", 300 + version, BIG, BIG);
        add("big", build.put_file(&big)?)?;
        // Put again: the copy is thrown away.
        build.put_file(&big)?;
    }
    if version == 0 {
        let sparse = source(sources, "sparse", 3, 5000, BIG + 4096);
        add("sparse", build.put_file(&sparse)?)?;
        add("stream", build.put(&mut bytes(4, BIG, 5 << 18).as_slice())?)?;
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

fn publish(store: &Store, sources: &Path, (name, version): (&str, u64), say: Say<'_>) -> Result<TreeDigest, Error> {
    let build = store.build()?;
    let tree = tree(&build, sources, version)?;
    // Nobody needs an empty shard's folder, so one may be gone.
    let _ = fs::remove_dir(
        store
            .root()
            .join("objects")
            .join(&digest_of(&bytes(100 + version, 5000, 5000)).hex()[..2]),
    );
    say("publishing", name, &tree.digest()?.to_string());
    let mut target = target(name, "uid-1");
    target.history_limit = HISTORY;
    let digest = build.publish(&tree, target)?.digest;
    say("published", name, &digest.to_string());
    Ok(digest)
}

/// Contents that no tree names: they stay until a collection, or until they are removed by hand.
fn put(store: &Store, sources: &Path, say: Say<'_>) -> Result<(), Error> {
    let small = bytes(500, 900, 900);
    let (first, loose) = (digest_of(&small), source(sources, "loose", 501, BIG, BIG));
    let build = store.build()?;
    build.put_bytes(&small)?;
    let second = build.put_file(&loose)?.digest;
    say("putting", "-", &first.to_string());
    build.store_contents()?;
    say("put", "-", &first.to_string());
    say("put", "-", &second.to_string());
    say("removing", "-", &second.to_string());
    let failed = |name: String, message: String| Error::BadRef { name, message };
    match store.remove_blobs(&[second].into(), &Trees(vec![]), &never())? {
        Ok(done) => {
            if let Some(Removed::Failed(why)) = done.into_values().next() {
                return Err(failed(second.to_string(), why));
            }
        }
        // It could not be read just now.
        Err(problems) => {
            let problem = problems.into_iter().next().expect("what stopped it");
            return Err(failed(problem.path, problem.message));
        }
    }
    say("removed", "-", &second.to_string());
    Ok(())
}

/// Lives it with the store at `root`; a tree is exported to `out`. Fails with what the store failed with.
pub fn live(root: &Path, out: &Path, say: Say<'_>) -> Result<(), Error> {
    // Beside the store, so that blocks can be shared.
    let sources = root.with_extension("sources");
    fs::create_dir_all(&sources).unwrap();
    let store = Store::open(root, Options::default())?;
    say("opened", "-", "-");
    put(&store, &sources, say)?;
    let first = publish(&store, &sources, ("kept", 0), say)?;
    publish(&store, &sources, ("retired", 1), say)?;
    publish(&store, &sources, ("forgotten", 2), say)?;
    // Three revisions, so that one is dropped and two are history; the last once more, unchanged.
    let mut history = first;
    for version in [3, 4, 5, 5] {
        let digest = publish(&store, &sources, ("rebuilt", version), say)?;
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
    say("retiring", "retired", "-");
    store.retire(&name("retired"), "uid-1", SystemTime::now())?;
    say("retired", "retired", "-");
    say("forgetting", "forgotten", "-");
    store.forget(&name("forgotten"))?;
    assert_eq!(store.read_note(&name("forgotten"))?, None);
    say("forgotten", "forgotten", "-");

    let hold = store.hold(&first)?;
    // A copy of a tree that nobody needs, with what makes removing it hard.
    let copy = store.scratch()?;
    let deep = copy.path().join("a/b/c");
    let made = |e| store.inner.write_error(copy.path(), 0, e);
    fs::create_dir_all(&deep).map_err(made)?;
    for folder in [copy.path(), &deep] {
        let fixed = File::create(folder.join("fixed")).map_err(made)?;
        // Not every file system knows it.
        let _ = rustix::fs::ioctl_setflags(&fixed, IFlags::IMMUTABLE);
    }
    drop(copy);
    let unused = store.images_dir().join(format!("{}.tree", "ab".repeat(32)));
    let made = |e| store.inner.write_error(&unused, 0, e);
    fs::create_dir_all(unused.join("folder/folder")).map_err(made)?;
    say("collecting", "-", &history.to_string());
    let held = Trees(vec![history]);
    // Records of earlier runs, of which one has to go.
    for day in 1..=2 {
        let record = root.join(format!("runs/2000010{day}T000000.000Z.jsonl"));
        let made = |e| store.inner.write_error(&record, 0, e);
        fs::create_dir_all(root.join("runs")).map_err(made)?;
        File::create(&record).map_err(made)?.set_len(400_000).map_err(made)?;
    }
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        rate: None,
        cancel: &AtomicBool::new(false),
    };
    let (report, removals) = store.collect_with(&nothing_kept(), &held, &how)?;
    if let Some(problem) = report.blocked.first().cloned() {
        // It could not be read just now.
        return Err(Error::BadRef {
            name: problem.path,
            message: problem.message,
        });
    }
    store.record_run(&report, &removals, &serde_json::Value::Null)?;
    say("collected", "-", "-");
    drop(hold);

    remove_all(out).map_err(|e| Error::io("remove", out, e))?;
    store.export(&store.load(&first)?, out, None)?;
    say("exported", "-", "-");

    // One after the other, so that a fault meets the same blob each time.
    let options = VerifyOptions {
        scope: Scope::All,
        rate: std::num::NonZeroU64::new(1 << 40),
    };
    let found = store.verify(&options, &VerifyProgress::default(), &AtomicBool::new(false))?;
    if !(found.bad_manifests.is_empty() && found.bad_refs.is_empty()) {
        // They could not be read just now.
        return Err(Error::BadRef {
            name: "verified".to_owned(),
            message: format!("{found:?}"),
        });
    }
    for bad in &found.bad_blobs {
        let moved = match bad.quarantined.is_some() && bad.not_moved.is_none() {
            true => "moved",
            false => "unmoved",
        };
        let durable = match bad.not_durable {
            None => "durable",
            Some(_) => "volatile",
        };
        say(moved, durable, &bad.digest.to_string());
    }
    if !found.is_sound() {
        // A disk that could not read a blob, twice: it is quarantined, and what is current is built again.
        publish(&store, &sources, ("kept", 0), say)?;
        publish(&store, &sources, ("rebuilt", 5), say)?;
    }
    say("verified", "-", "-");
    drop(store);
    Store::open(root, Options::default())?;
    say("reopened", "-", "-");
    Ok(())
}
