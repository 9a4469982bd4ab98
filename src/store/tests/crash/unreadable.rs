//! A disk that has lost what it had: a part of it can no longer be read.

use std::fs::{self, File};
use std::time::SystemTime;

use super::*;
use crate::store::testing::*;
use crate::store::{Error, Options, Store};

const FILES: u64 = 40;
const SIZE: usize = 3 << 19;

/// Cuts off the second half of a disk, with nothing of it left in memory.
fn lose_half(disk: &Disk) {
    disk.mount_again();
    let image = File::options().write(true).open(disk.image()).unwrap();
    image.set_len(image.metadata().unwrap().len() / 2).unwrap();
}

fn is_read_error(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

#[test]
fn a_source_that_cannot_be_read_is_an_error_and_never_a_shorter_file() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let disk = Disk::new(ram.path(), "ext4", 96);
    let contents: Vec<_> = (0..FILES).map(|seed| noise(seed, 4096).repeat(SIZE / 4096)).collect();
    let path = |number: usize| disk.path().join(number.to_string());
    for (number, content) in contents.iter().enumerate() {
        fs::write(path(number), content).unwrap();
    }
    lose_half(&disk);

    let root = ram.path().join("store");
    let store = Store::open(&root, Options::default()).unwrap();
    let build = store.build().unwrap();
    let mut read = Vec::new();
    for (number, content) in contents.iter().enumerate() {
        match build.put_file(&File::open(path(number)).unwrap()) {
            Ok(blob) => {
                assert_eq!(blob.digest, digest_of(content));
                read.push((number.to_string(), content));
            }
            Err(Error::Source(error)) if is_read_error(&error) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!((1..FILES as usize).contains(&read.len()), "{} were read", read.len());
    // The others of the build are good.
    let files: Vec<_> = read
        .iter()
        .map(|(name, content)| (&**name, content.as_slice()))
        .collect();
    let tree = tree_of(&build, &files);
    build.publish(&tree, target("a", "uid-1")).unwrap();
    assert_eq!(look(&root).objects.len(), files.len());
    assert_eq!(staged(&root), [""; 0]);
}

#[test]
fn a_blob_that_cannot_be_read_is_an_error_and_costs_no_other_tree() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let disk = Disk::new(ram.path(), "ext4", 96);
    let root = disk.path().join("store");
    let contents: Vec<_> = (0..FILES).map(|seed| noise(seed, 4096).repeat(SIZE / 4096)).collect();
    let store = Store::open(&root, Options::default()).unwrap();
    let trees: Vec<_> = contents
        .iter()
        .enumerate()
        .map(|(number, content)| publish(&store, &format!("tree-{number}"), &[("f", content)]).digest)
        .collect();
    drop(store);
    let whole = look(&root);
    lose_half(&disk);

    let store = Store::open(&root, Options::default()).unwrap();
    let mut lost = 0;
    for (number, digest) in trees.iter().enumerate() {
        let out = ram.path().join(format!("out-{number}"));
        let exported = store.load(digest).and_then(|tree| store.export(&tree, &out, None));
        match exported {
            Ok(()) => assert_eq!(fs::read(out.join("f")).unwrap(), contents[number]),
            Err(Error::Export { path, source, .. }) if is_read_error(&source) => {
                assert_eq!(path, b"f");
                lost += 1;
            }
            // The manifest.
            Err(Error::Io { source, .. }) if is_read_error(&source) => lost += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!((1..FILES).contains(&lost), "{lost} were lost");
    // What cannot be read is not absent: everything that is needed stays.
    let report = store.collect(&nothing_kept(), &Trees(Vec::new()), false, SystemTime::now());
    assert_eq!(report.unwrap().deleted_blobs, 0);
    let names = |folder: &str| -> usize {
        let folders = fs::read_dir(root.join(folder)).unwrap();
        folders
            .map(|entry| fs::read_dir(entry.unwrap().path()).unwrap().count())
            .sum()
    };
    assert_eq!((names("objects"), names("refs")), (whole.objects.len(), trees.len()));
}
