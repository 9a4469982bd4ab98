//! Reading without the lock, and contents without a tree.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use super::full_disk::Unmount;
use crate::store::testing::*;
use crate::store::{Digest, Error, Held, Holders, Needed, Options, Problem, Reader, Removed, Store};

/// A content that no tree names.
fn put_loose(store: &Store) -> Digest {
    let build = store.build().unwrap();
    let digest = build.put_bytes(b"loose").unwrap().digest;
    build.store_contents().unwrap();
    digest
}

fn rm(store: &Store, digest: Digest) -> Removed {
    let wanted = BTreeSet::from([digest]);
    let removed = store
        .remove_blobs(&wanted, &Trees(Vec::new()), &never())
        .unwrap()
        .unwrap();
    removed.into_values().next().unwrap()
}

#[test]
fn a_reader_sees_what_its_neighbour_publishes_and_is_told_what_that_one_deletes() {
    let (_dir, store) = store();
    let reader = Reader::open(store.root()).unwrap();
    assert_eq!(reader.id(), store.id());
    let revision = publish(&store, "t", &[("a", b"one")]);
    let tree = reader.load(&revision.digest).unwrap();
    let mut bytes = Vec::new();
    let digest = digest_of(b"one");
    assert_eq!(reader.copy(&digest, &mut bytes).unwrap().unwrap(), 3);
    assert_eq!(bytes, b"one");
    // Others use the disk too.
    let counted = |usage: crate::store::Usage| crate::store::Usage { free: 0, ..usage };
    assert_eq!(counted(reader.usage().unwrap()), counted(store.usage().unwrap()));
    assert_eq!(reader.shard(digest.as_bytes()[0]).unwrap()[0].digest, digest);
    let open = reader.read(&digest).unwrap();

    store.forget(&name("t")).unwrap();
    collect(&store);
    assert!(matches!(
        reader.load(&revision.digest),
        Err(Error::MissingManifest { .. })
    ));
    assert!(matches!(reader.read(&digest), Err(Error::MissingBlob { .. })));
    assert_eq!(reader.blob(&digest).unwrap(), None);
    // What was open stays as it was.
    assert_eq!(std::io::read_to_string(open).unwrap(), "one");
    assert_eq!(tree.stats().files, 1);
}

#[test]
fn a_reader_opens_only_a_store_and_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    for none in [&missing, dir.path()] {
        assert!(matches!(Reader::open(none), Err(Error::NoStore { .. })));
    }
    assert!(!missing.exists());
    std::fs::write(dir.path().join("mine"), "").unwrap();
    assert!(matches!(Reader::open(dir.path()), Err(Error::NotAStore { .. })));
}

#[test]
fn damaged_bytes_are_told_at_the_end_of_a_copy() {
    let (_dir, store) = store();
    publish(&store, "t", &[("a", b"one")]);
    let digest = digest_of(b"one");
    std::fs::write(blob_path(&store, &digest), "two").unwrap();
    let copied = store.copy(&digest, &mut Vec::new()).unwrap();
    assert!(matches!(copied, Err(Error::WrongBlob { found, .. }) if found == digest_of(b"two")));
}

#[test]
fn contents_without_a_tree_outlive_their_build_and_a_reopening() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let blob = build.put_bytes(b"loose").unwrap();
    build.put_bytes(&vec![9; 2 << 20]).unwrap();
    assert!(store.read(&blob.digest).is_err(), "it has no name before it is durable");
    assert_eq!(build.store_contents().unwrap(), 5 + (2 << 20));
    assert!(staging_is_empty(&store));
    let build = store.build().unwrap();
    assert!(!build.put_bytes(b"loose").unwrap().new);
    assert_eq!(build.store_contents().unwrap(), 0);
    assert_eq!(store.blobs().unwrap().0, 2);
    drop(store);
    let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
    assert_eq!(store.copy(&blob.digest, &mut Vec::new()).unwrap().unwrap(), 5);
    assert_eq!(collect(&store).deleted_blobs, 2);
}

#[test]
fn a_content_that_a_running_build_has_found_is_not_removed() {
    let (_dir, store) = store();
    let digest = put_loose(&store);
    let build = store.build().unwrap();
    assert_eq!(build.find(&digest).unwrap(), Some(5));
    let by_build = Removed::Needed(Needed {
        by_build: true,
        ..Needed::default()
    });
    assert_eq!(rm(&store, digest), by_build);
    let tree = tree_of(&build, &[("a", b"loose")]);
    let revision = build.publish(&tree, target("t", "uid-1")).unwrap();
    let Removed::Needed(needed) = rm(&store, digest) else {
        panic!("it was removed");
    };
    assert_eq!(needed.trees[&revision.digest], ["test/t"]);
    assert_eq!(check_all(&store), 1);
    // A tree that only a hold keeps needs it too, and one that nothing names while it is stored.
    let hold = store.hold(&revision.digest).unwrap();
    store.forget(&name("t")).unwrap();
    assert!(matches!(rm(&store, digest), Removed::Needed(_)));
    drop(hold);
    assert!(matches!(rm(&store, digest), Removed::Needed(_)));
}

#[test]
fn a_removed_content_is_counted_no_more_and_can_be_stored_again() {
    let (_dir, store) = store();
    let digest = put_loose(&store);
    assert_eq!(store.blobs().unwrap(), (1, 5));
    assert_eq!(rm(&store, digest), Removed::Gone(5));
    assert_eq!(store.blobs().unwrap(), (0, 0));
    assert_eq!(rm(&store, digest), Removed::Missing);
    publish(&store, "t", &[("a", b"loose")]);
    assert_eq!(check_all(&store), 1);
}

#[test]
fn one_content_that_the_disk_does_not_remove_keeps_no_other_and_is_told() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let wanted: BTreeSet<Digest> = (0..5u8).map(|n| build.put_bytes(&[n]).unwrap().digest).collect();
    build.store_contents().unwrap();
    let third = *wanted.iter().nth(2).unwrap();
    let path = blob_path(&store, &third);
    // What something is mounted on cannot be removed.
    let mounted = Command::new("mount").arg("--bind").arg(&path).arg(&path).status();
    assert!(mounted.unwrap().success(), "this test mounts: run it as root");
    let unmount = Unmount(path.clone());
    let remove = || store.remove_blobs(&wanted, &Trees(vec![]), &never()).unwrap().unwrap();
    for (digest, removed) in remove() {
        match removed {
            Removed::Failed(why) if digest == third => assert!(why.contains(path.to_str().unwrap()), "{why}"),
            removed => assert_eq!((removed, digest == third), (Removed::Gone(1), false)),
        }
    }
    assert_eq!(store.blobs().unwrap(), (1, 1));
    drop(unmount);
    assert_eq!(remove()[&third], Removed::Gone(1));
}

/// Builds a tree of the content that is to be removed when the manifests have been read.
struct Builds<'a>(&'a Store);

impl Holders for Builds<'_> {
    fn held(&self) -> Result<Held, Error> {
        publish(self.0, "t", &[("a", b"loose")]);
        Trees(Vec::new()).held()
    }
}

#[test]
fn a_content_that_a_build_needed_which_has_ended_meanwhile_is_not_removed() {
    let (_dir, store) = store();
    let digest = put_loose(&store);
    let wanted = BTreeSet::from([digest]);
    let removed = store.remove_blobs(&wanted, &Builds(&store), &never()).unwrap().unwrap();
    let by_build = Needed {
        by_build: true,
        ..Needed::default()
    };
    assert_eq!(removed[&digest], Removed::Needed(by_build));
    assert_eq!(check_all(&store), 1);
}

struct Unreadable;

impl Holders for Unreadable {
    fn held(&self) -> Result<Held, Error> {
        let problem = Problem {
            path: "layers/x".to_owned(),
            message: "odd".to_owned(),
        };
        Ok(Held {
            trees: Vec::new(),
            unreadable: vec![problem],
        })
    }
}

#[test]
fn nothing_is_removed_while_anything_that_may_need_it_cannot_be_read() {
    let (_dir, store) = store();
    let digest = put_loose(&store);
    let wanted = BTreeSet::from([digest]);
    let refused = store.remove_blobs(&wanted, &Unreadable, &never()).unwrap().unwrap_err();
    assert_eq!(refused[0].path, "layers/x");
    let write = |path: &Path| std::fs::write(path, "x").unwrap();
    let manifest = store.root().join("manifests").join(digest.hex());
    write(&manifest);
    let none = Trees(Vec::new());
    assert_eq!(
        store.remove_blobs(&wanted, &none, &never()).unwrap().unwrap_err().len(),
        1
    );
    std::fs::remove_file(&manifest).unwrap();
    std::fs::create_dir(store.root().join("refs/test")).unwrap();
    let entry = store.root().join("refs/test/bad");
    write(&entry);
    let refused = store.remove_blobs(&wanted, &none, &never()).unwrap().unwrap_err();
    assert_eq!(refused[0].path, entry.display().to_string());
    assert!(store.read(&digest).is_ok());
    std::fs::remove_file(&entry).unwrap();
    assert_eq!(rm(&store, digest), Removed::Gone(5));
}
