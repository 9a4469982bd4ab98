use std::fs::{self, File};
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use crate::store::testing::*;
use crate::store::tree::Tree;
use crate::store::*;

#[test]
fn a_store_is_private_and_has_an_id_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/store");
    let store = Store::open(&root, Options::default()).unwrap();
    assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o7777, 0o700);
    let id = store.id().to_owned();
    assert_eq!(id.len(), 36);
    drop(store);
    assert_eq!(Store::open(&root, Options::default()).unwrap().id(), id);
    assert_ne!(Store::open(&dir.path().join("b"), Options::default()).unwrap().id(), id);
}

#[test]
fn a_second_handle_is_refused_and_told_who_holds_the_store() {
    let (_dir, store) = store();
    let error = Store::open(store.root(), Options::default()).err().unwrap();
    assert!(
        matches!(error, Error::Locked { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains(&format!("the process {}", std::process::id()))
    );
}

#[test]
fn a_lock_of_another_process_is_respected_until_it_dies() {
    let (_dir, store) = store();
    let root = store.root().to_owned();
    drop(store);
    let mut child = std::process::Command::new("flock")
        .arg("--no-fork")
        .arg(root.join("lock"))
        .args(["sh", "-c", "echo locked; exec sleep 60"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 7];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    assert!(matches!(
        Store::open(&root, Options::default()),
        Err(Error::Locked { .. })
    ));
    child.kill().unwrap();
    child.wait().unwrap();
    Store::open(&root, Options::default()).unwrap();
}

#[test]
fn a_folder_of_something_else_is_not_made_a_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("photo.jpg"), "x").unwrap();
    let error = Store::open(dir.path(), Options::default()).err().unwrap();
    assert!(
        matches!(&error, Error::NotAStore { found, .. } if found == "photo.jpg"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made there");
}

#[test]
fn a_creation_that_was_cut_short_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("objects/00")).unwrap();
    fs::write(dir.path().join("lock"), "1\n").unwrap();
    fs::write(dir.path().join("larder.json.new"), "{").unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    publish(&store, "a", &[("f", b"content")]);
    assert_eq!(check_all(&store), 1);
}

#[test]
fn a_store_of_a_later_format_is_refused() {
    let (_dir, store) = store();
    let root = store.root().to_owned();
    drop(store);
    fs::write(root.join("larder.json"), r#"{"format": 2, "id": "x"}"#).unwrap();
    let error = Store::open(&root, Options::default()).err().unwrap().to_string();
    assert!(error.contains("format 2") && error.contains("larder.json"), "{error}");
}

#[test]
fn what_a_dead_process_left_in_staging_is_gone_after_opening() {
    let (_dir, store) = store();
    let root = store.root().to_owned();
    drop(store);
    let left = root.join("staging/build-7/deep/er");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("file"), "x").unwrap();
    fs::write(root.join("staging/ref-1"), "x").unwrap();
    let store = Store::open(&root, Options::default()).unwrap();
    assert!(staging_is_empty(&store));
}

#[test]
fn a_published_tree_reads_back() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"")]);
    let mut expected = target("t", "uid-1");
    expected.now = at(1_700_000_000);
    let revision = build.publish(&tree, expected).unwrap();
    assert_eq!(revision.digest, tree.digest().unwrap());
    assert_eq!((revision.files, revision.entries), (4, 4));
    assert_eq!((revision.size, revision.unique, revision.added), (9, 6, 6));
    assert_eq!(store.load(&revision.digest).unwrap(), tree);
    let mut text = String::new();
    store
        .read(&digest_of(b"two"))
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "two");
    let blob = fs::metadata(blob_path(&store, &digest_of(b"two"))).unwrap();
    assert_eq!(
        (blob.permissions().mode() & 0o7777, blob.uid(), blob.gid()),
        (0o400, 0, 0)
    );
    assert!(staging_is_empty(&store));
    let found = store.get_ref(&name("t")).unwrap().unwrap();
    assert_eq!(found.current, Some(revision));
    assert_eq!(check_all(&store), 3);
}

#[test]
fn a_build_that_is_dropped_leaves_nothing() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    build.put_bytes(b"x").unwrap();
    build.put(&mut Cursor::new(vec![7; 3 << 20])).unwrap();
    assert!(!staging_is_empty(&store));
    assert!(matches!(store.read(&digest_of(b"x")), Err(Error::MissingBlob { .. })));
    drop(build);
    assert!(staging_is_empty(&store));
    assert_eq!(store.usage().unwrap().blobs, 0);
}

#[test]
fn content_is_stored_once_and_counts_as_used_when_found() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"shared"), ("g", b"own")]);
    let path = blob_path(&store, &digest_of(b"shared"));
    let before = File::open(&path).unwrap();
    before.set_modified(at(1000)).unwrap();
    let revision = publish(&store, "b", &[("x", b"shared"), ("y", b"new")]);
    assert_eq!((revision.unique, revision.added), (9, 3));
    let after = fs::metadata(&path).unwrap();
    assert_eq!(after.ino(), before.metadata().unwrap().ino());
    assert!(after.modified().unwrap().elapsed().unwrap() < Duration::from_secs(60));

    let build = store.build().unwrap();
    let blob = build.put_bytes(b"shared").unwrap();
    assert_eq!((blob.size, blob.new), (6, false));
    assert!(build.put_bytes(b"unheard of").unwrap().new);
    assert!(
        !build.put_bytes(b"unheard of").unwrap().new,
        "once in a build is enough"
    );
    assert_eq!(build.find(&digest_of(b"unheard of")).unwrap(), Some(10));
    assert_eq!(build.find(&digest_of(b"own")).unwrap(), Some(3));
    assert_eq!(build.find(&digest_of(b"nowhere")).unwrap(), None);
}

#[test]
fn every_way_to_put_gives_the_same_blob() {
    let (_dir, store) = store();
    for size in [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 17] {
        let bytes: Vec<u8> = (0..size).map(|i| (i ^ (i >> 7)) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        // The descriptor's position must not matter.
        file.seek(SeekFrom::Start(size as u64 / 2)).unwrap();
        let (one, two, three) = (store.build().unwrap(), store.build().unwrap(), store.build().unwrap());
        let blobs = [
            one.put_bytes(&bytes).unwrap(),
            two.put_file(&file).unwrap(),
            three.put(&mut Cursor::new(&bytes)).unwrap(),
        ];
        let expected = Blob {
            digest: digest_of(&bytes),
            size: size as u64,
            new: true,
        };
        assert_eq!(blobs, [expected; 3], "{size} bytes");
        for (build, name) in [(one, "one"), (two, "two"), (three, "three")] {
            let mut tree = Tree::new(meta(0o755));
            tree.add_leaf(Tree::ROOT, *b"f", file_leaf(&expected)).unwrap();
            build.publish(&tree.finish().unwrap(), target(name, "uid")).unwrap();
            check_all(&store);
        }
    }
}

fn file_leaf(blob: &Blob) -> tree::Leaf {
    file(blob.digest, blob.size)
}

#[test]
fn holes_stay_holes() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let mut tree = Tree::new(meta(0o755));
    for (name, length) in [("small", 512 << 10), ("large", 8 << 20), ("only-hole", 4 << 20)] {
        let file = tempfile::tempfile_in(store.root()).unwrap();
        file.set_len(length).unwrap();
        if name != "only-hole" {
            std::os::unix::fs::FileExt::write_all_at(&file, b"in the middle", length / 2).unwrap();
        }
        let blob = build.put_file(&file).unwrap();
        tree.add_leaf(Tree::ROOT, name.as_bytes(), file_leaf(&blob)).unwrap();
        assert_eq!(blob.size, length);
    }
    build.publish(&tree.finish().unwrap(), target("sparse", "uid")).unwrap();
    assert_eq!(check_all(&store), 3);
    let objects = store.root().join("objects");
    let blobs = fs::read_dir(objects)
        .unwrap()
        .flat_map(|dir| fs::read_dir(dir.unwrap().path()).unwrap());
    let blocks: u64 = blobs.map(|blob| blob.unwrap().metadata().unwrap().blocks() * 512).sum();
    assert!(blocks <= 64 << 10, "{blocks} bytes on disk");
}

#[test]
fn an_error_of_the_reader_is_not_an_error_of_the_store() {
    struct Fails(usize);
    impl Read for Fails {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::from_raw_os_error(libc::EIO));
            }
            let length = self.0.min(buffer.len());
            buffer[..length].fill(1);
            self.0 -= length;
            Ok(length)
        }
    }
    let (_dir, store) = store();
    let build = store.build().unwrap();
    for length in [10, 5 << 20] {
        let error = build.put(&mut Fails(length)).unwrap_err();
        assert!(
            matches!(&error, Error::Source(e) if e.raw_os_error() == Some(libc::EIO)),
            "{error}"
        );
    }
    let tree = tree_of(&build, &[("good", b"good")]);
    build.publish(&tree, target("a", "uid")).unwrap();
    assert_eq!(check_all(&store), 1);
    assert_eq!(store.usage().unwrap().blobs, 1);
}

#[test]
fn a_tree_that_names_what_is_not_there_is_not_published() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let mut tree = Tree::new(meta(0o755));
    tree.add_leaf(Tree::ROOT, *b"f", file(digest_of(b"never put"), 9))
        .unwrap();
    let missing = digest_of(b"never put");
    let error = build.publish(&tree, target("a", "uid")).unwrap_err();
    assert!(
        matches!(error, Error::MissingBlob { digest } if digest == missing),
        "{error}"
    );
    assert_eq!(store.get_ref(&name("a")).unwrap(), None);

    let build = store.build().unwrap();
    let blob = build.put_bytes(b"content").unwrap();
    let mut tree = Tree::new(meta(0o755));
    tree.add_leaf(Tree::ROOT, *b"f", file(blob.digest, 8)).unwrap();
    let error = build.publish(&tree, target("a", "uid")).unwrap_err();
    assert!(
        matches!(
            error,
            Error::WrongLength {
                expected: 8,
                found: 7,
                ..
            }
        ),
        "{error}"
    );
    assert!(staging_is_empty(&store));
}

#[test]
fn an_invalid_tree_is_not_published() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let mut tree = tree_of(&build, &[("a", b"x"), ("b", b"y")]);
    tree.dirs[0].entries.swap(0, 1);
    let error = build.publish(&tree, target("a", "uid")).unwrap_err();
    assert!(matches!(error, Error::InvalidTree(_)), "{error}");
    assert!(staging_is_empty(&store));
    assert_eq!(store.usage().unwrap().blobs, 0);
}

#[test]
fn a_blob_of_the_wrong_length_is_healed_by_the_next_put() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"precious"), ("g", b"other")]);
    for damage in ["", "precious and more"] {
        let path = blob_path(&store, &digest_of(b"precious"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, damage).unwrap();
        let build = store.build().unwrap();
        // Even after it was found with its wrong length.
        assert_eq!(build.find(&digest_of(b"precious")).unwrap(), Some(damage.len() as u64));
        let tree = tree_of(&build, &[("f", b"precious"), ("g", b"other")]);
        let again = build.publish(&tree, target("a", "uid-1")).unwrap();
        assert_eq!(again, revision, "an equal tree keeps its revision");
        assert_eq!(check_all(&store), 2);
        let usage = store.usage().unwrap();
        assert_eq!((usage.blobs, usage.blob_bytes), (2, 13));
    }
}

#[test]
fn a_damaged_manifest_is_named_and_healed_by_rebuilding() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"x")]);
    let path = store.root().join("manifests").join(revision.digest.hex());
    let whole = fs::read(&path).unwrap();
    let mut other_mode = whole.clone();
    other_mode[9] ^= 1;
    for damage in [&whole[..whole.len() - 1], b"", &other_mode, b"LARDER\n\x09"] {
        fs::remove_file(&path).unwrap();
        fs::write(&path, damage).unwrap();
        let error = store.load(&revision.digest).unwrap_err();
        assert!(
            matches!(error, Error::BadManifest { .. } | Error::WrongManifest { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(&revision.digest.hex()), "{error}");
        publish(&store, "a", &[("f", b"x")]);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(
        store.load(&revision.digest),
        Err(Error::MissingManifest { .. })
    ));
}

#[test]
fn builds_stop_before_the_reserve_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        reserved_free: u64::MAX / 2,
    };
    let store = Store::open(dir.path(), options).unwrap();
    let error = store.build().err().unwrap();
    assert!(
        matches!(error, Error::DiskFull { needed, free } if needed == u64::MAX / 2 && free > 0),
        "{error}"
    );
}

#[test]
fn usage_is_counted_once_and_kept_up_to_date() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"12345"), ("g", b"678")]);
    let usage = store.usage().unwrap();
    assert_eq!(
        (usage.blobs, usage.blob_bytes, usage.manifests, usage.images),
        (2, 8, 1, 0)
    );
    assert!(usage.manifest_bytes > 80 && usage.free > 0);
    publish(&store, "b", &[("f", b"12345"), ("h", b"90")]);
    let image = store.images_dir().join(format!("{}.tree", "ab".repeat(32)));
    fs::create_dir_all(image.join("sub")).unwrap();
    fs::write(image.join("sub/file"), "1234567").unwrap();
    let counted = store.usage().unwrap();
    assert_eq!((counted.blobs, counted.blob_bytes, counted.manifests), (3, 10, 2));
    assert_eq!((counted.images, counted.image_bytes), (1, 7));
    let root = store.root().to_owned();
    drop(store);
    let recounted = Store::open(&root, Options::default()).unwrap().usage().unwrap();
    assert_eq!((recounted.blobs, recounted.blob_bytes), (3, 10));
}

#[test]
fn scratch_folders_go_with_everything_below() {
    let (_dir, store) = store();
    let scratch = store.scratch().unwrap();
    let deep = scratch.path().join("a/b/c");
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("f"), "x").unwrap();
    std::os::unix::fs::symlink("/etc", scratch.path().join("link")).unwrap();
    drop(scratch);
    assert!(staging_is_empty(&store));
    assert!(fs::exists("/etc/passwd").unwrap());
}

#[test]
fn a_build_is_shared_by_threads() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let contents: Vec<Vec<u8>> = (0..200u32).map(|i| (i % 50).to_be_bytes().repeat(20)).collect();
    std::thread::scope(|scope| {
        for part in contents.chunks(25) {
            let build = &build;
            scope.spawn(move || assert!(part.iter().all(|bytes| build.put_bytes(bytes).is_ok())));
        }
    });
    let names: Vec<String> = (0..200).map(|i| format!("f{i}")).collect();
    let files: Vec<(&str, &[u8])> = names
        .iter()
        .map(String::as_str)
        .zip(contents.iter().map(Vec::as_slice))
        .collect();
    let tree = tree_of(&build, &files);
    let revision = build.publish(&tree, target("a", "uid")).unwrap();
    assert_eq!((revision.unique, revision.added), (50 * 80, 50 * 80));
    assert_eq!(check_all(&store), 50);
}

#[test]
fn times_in_json_are_rfc_3339() {
    let (_dir, store) = store();
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[]);
    let mut target = target("a", "uid");
    target.now = at(1_700_000_000);
    let revision = build.publish(&tree, target).unwrap();
    let json = serde_json::to_value(&revision).unwrap();
    assert_eq!(json["builtAt"], "2023-11-14T22:13:20Z");
    assert_eq!(json["digest"], revision.digest.to_string());
    assert_eq!(serde_json::from_value::<Revision>(json).unwrap(), revision);
    assert!(revision.built_at < SystemTime::now());
}
