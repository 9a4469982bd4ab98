//! What file systems cannot keep, and what they share: on small disks of their own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::full_disk::{disk_of, free, noise};
use crate::store::large::hash_shared;
use crate::store::testing::*;
use crate::store::tree::{Leaf, LeafKind, Meta, Tree};
use crate::store::*;

/// A tree with one FIFO, at `d/x`.
fn one_entry(change: impl FnOnce(&mut Meta)) -> Tree {
    let mut tree = Tree::new(meta(0o755));
    let folder = tree.add_dir(Tree::ROOT, *b"d", meta(0o755)).unwrap();
    let mut meta = meta(0o644);
    change(&mut meta);
    let kind = LeafKind::Fifo;
    tree.add_leaf(folder, *b"x", Leaf { meta, kind }).unwrap();
    tree.finish().unwrap()
}

#[test]
fn an_attribute_that_is_too_large_for_the_file_system_is_not_a_full_disk() {
    let (dir, store) = store();
    let (disk, _guard) = disk_of(dir.path(), 32, "ext4", &["-m0"]);
    // ext4 keeps the attributes of an inode in one block, and says ENOSPC of one that does not fit.
    let tree = one_entry(|meta| meta.xattrs = vec![((*b"trusted.large").into(), vec![7; 60_000].into())]);
    let error = store.export(&tree, &disk.join("out"), None).unwrap_err();
    assert!(
        matches!(&error, Error::Xattr { path, attribute, .. } if path == b"d/x" && attribute == "trusted.large"),
        "{error}"
    );
}

#[test]
fn a_full_disk_is_told_of_the_disk_that_is_written_to() {
    let (dir, store) = store();
    let (disk, _guard) = disk_of(dir.path(), 32, "ext4", &["-m0"]);
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("big", &noise(1, 48 << 20))]);
    build.publish(&tree, target("a", "uid")).unwrap();
    let error = store.export(&tree, &disk.join("out"), None).unwrap_err();
    assert!(
        matches!(error, Error::DiskFull { free, .. } if free < 1 << 20),
        "{error}"
    );
}

#[test]
fn a_time_that_the_file_system_would_round_is_an_error_with_the_path() {
    let (dir, store) = store();
    // Inodes of 128 bytes have no room for nanoseconds.
    let (disk, _guard) = disk_of(dir.path(), 32, "ext4", &["-m0", "-I128"]);
    let mut whole = one_entry(|meta| meta.mtime = (1_700_000_000, 0));
    for dir in &mut whole.dirs {
        dir.meta.mtime = (1_700_000_000, 0);
    }
    store.export(&whole, &disk.join("whole"), None).unwrap();
    assert_eq!(fs::metadata(disk.join("whole/d/x")).unwrap().mtime(), 1_700_000_000);

    let mut fraction = whole.clone();
    fraction.leaves[0].meta.mtime = (1_700_000_000, 5);
    let error = store.export(&fraction, &disk.join("fraction"), None).unwrap_err();
    assert!(
        matches!(&error, Error::Time { path, seconds: 1_700_000_000, nanos: 5 } if path == b"d/x"),
        "{error}"
    );
    assert!(error.to_string().contains("1700000000 s and 5 ns"), "{error}");
}

fn used_by(disk: &Path, act: impl FnOnce()) -> u64 {
    let sync = || rustix::fs::syncfs(fs::File::open(disk).unwrap()).unwrap();
    sync();
    let before = free(disk);
    act();
    sync();
    before.saturating_sub(free(disk))
}

#[test]
fn data_is_shared_where_the_file_system_can() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = disk_of(dir.path(), 320, "xfs", &["-m", "reflink=1"]);
    let store = Store::open(&disk.join("store"), Options::default()).unwrap();
    let source = disk.join("source");
    let content = noise(7, 20 << 20);
    fs::write(&source, &content).unwrap();
    let build = store.build().unwrap();
    let mut tree = Tree::new(meta(0o755));
    let stored = used_by(&disk, || {
        let blob = build.put_file(&fs::File::open(&source).unwrap()).unwrap();
        assert_eq!(blob.digest, digest_of(&content));
        tree.add_leaf(Tree::ROOT, *b"f", file(blob.digest, blob.size)).unwrap();
    });
    let tree = tree.finish().unwrap();
    build.publish(&tree, target("a", "uid")).unwrap();
    let exported = used_by(&disk, || store.export(&tree, &disk.join("out"), None).unwrap());
    assert!(stored < 2 << 20 && exported < 2 << 20, "{stored} and {exported} bytes");

    // What is written to the copy does not reach the store.
    let out = fs::File::options().write(true).open(disk.join("out/f")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&out, &[0; 8192], 4096).unwrap();
    out.sync_all().unwrap();
    assert_eq!(check_all(&store), 1);
}

#[test]
fn a_file_that_shares_only_a_part_of_another_is_none_that_shares_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::File::options().read(true).write(true).open(path).unwrap()
    };
    let (whole, same, part) = (file("whole", b"whole"), file("same", b"whole"), file("part", b"who"));
    assert_eq!(disk::check_shared(&same, &whole), Ok(()));
    assert_eq!(disk::check_shared(&part, &whole), Err(rustix::io::Errno::IO));
    assert_eq!((part.metadata().unwrap().len(), same.metadata().unwrap().len()), (0, 5));
}

#[test]
fn a_source_that_may_have_changed_is_not_hashed_for_what_shares_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        fs::write(dir.path().join(name), bytes).unwrap();
        fs::File::open(dir.path().join(name)).unwrap()
    };
    // As if the source had been written to since.
    let (source, stored) = (write("source", b"later!!"), write("stored", b"earlier"));
    let of_source = (digest_of(b"later!!"), 7);
    let of_stored = (digest_of(b"earlier"), 7);
    let stat = rustix::fs::fstat(&source).unwrap();
    let changed = SystemTime::now();
    let settled = changed + Duration::from_secs(3);
    let hash = |before: &rustix::fs::Stat, now| hash_shared(&source, before, &stored, now, &false.into()).unwrap();
    assert_eq!(hash(&stat, settled), of_source);
    assert_eq!(hash(&stat, changed), of_stored, "a further change would not show");
    let mut before = stat;
    before.st_ctime -= 1;
    assert_eq!(hash(&before, settled), of_stored, "it has changed");
}
