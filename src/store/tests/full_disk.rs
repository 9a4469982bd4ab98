//! A disk that is full, on a small ext4 of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::store::testing::*;
use crate::store::*;

pub struct Unmount(pub PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn small_disk(dir: &Path, megabytes: u64) -> (PathBuf, Unmount) {
    disk_of(dir, megabytes, "ext4", &["-m0"])
}

/// A file system of that size, mounted until the guard is dropped (its loop device goes with the mount).
pub fn disk_of(dir: &Path, megabytes: u64, kind: &str, options: &[&str]) -> (PathBuf, Unmount) {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts a file system: run it as root"
    );
    let (image, mount) = (dir.join("disk.img"), dir.join("disk"));
    fs::create_dir(&mount).unwrap();
    fs::File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
    run(Command::new(format!("mkfs.{kind}")).arg("-q").args(options).arg(&image));
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount));
    (mount.clone(), Unmount(mount))
}

/// Fills a file system to the last block.
fn fill(path: &Path) {
    let file = fs::File::create(path).unwrap();
    for length in [1 << 20, 4096, 1] {
        let block = vec![1; length];
        while std::io::Write::write_all(&mut &file, &block).is_ok() {}
    }
    let _ = file.sync_all();
}

pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

pub fn free(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}

#[test]
fn a_full_disk_fails_a_build_cleanly_and_a_collection_frees_it() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = small_disk(dir.path(), 64);
    let store = Store::open(&disk.join("store"), Options::default()).unwrap();
    publish(&store, "kept", &[("f", &noise(1, 10 << 20))]);
    publish(&store, "garbage", &[("f", &noise(2, 20 << 20))]);
    store.retire(&name("garbage"), "uid-1", SystemTime::now()).unwrap();
    // Two revisions of history beside a current one: dropping them means rewriting a ref.
    for seed in [3, 4, 5] {
        publish(&store, "rebuilt", &[("f", &noise(seed, 1 << 20))]);
    }
    fill(&disk.join("ballast"));
    assert_eq!(free(&disk), 0);

    for _ in 0..3 {
        let error = match store.build() {
            Ok(build) => build.put_bytes(&noise(9, 20 << 20)).unwrap_err(),
            Err(error) => error,
        };
        assert!(
            matches!(error, Error::DiskFull { needed, free: 0 } if needed > 0),
            "{error}"
        );
        assert!(staging_is_empty(&store), "what was staged is gone");
    }
    assert_eq!(check_all(&store), 5, "nothing that was there has suffered");

    let report = collect(&store);
    assert_eq!((report.deleted_blobs, report.dropped_history.len()), (3, 3));
    assert!(report.freed_bytes > 22 << 20);
    assert!(free(&disk) > 20 << 20);
    publish(&store, "again", &[("f", &noise(9, 15 << 20))]);
    assert_eq!(check_all(&store), 3);
}

#[test]
fn history_can_be_dropped_without_a_free_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = small_disk(dir.path(), 32);
    let store = Store::open(&disk.join("store"), Options::default()).unwrap();
    for name in ["a", "b", "c"] {
        for seed in 0..3u8 {
            publish(
                &store,
                name,
                &[("f", &[name.as_bytes(), &[seed]].concat().repeat(5000))],
            );
        }
    }
    fill(&disk.join("ballast"));
    assert_eq!(free(&disk), 0);
    // Nothing is garbage yet: the first rewriting of a ref has to find its room.
    let report = collect(&store);
    assert_eq!((report.dropped_history.len(), report.deleted_blobs), (6, 6));
    assert_eq!(check_all(&store), 3);
    let root = store.root().to_owned();
    drop(store);
    assert_eq!(check_all(&Store::open(&root, Options::default()).unwrap()), 3);
}

#[test]
fn a_full_disk_does_not_keep_a_store_from_opening() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = small_disk(dir.path(), 32);
    let root = disk.join("store");
    publish(&Store::open(&root, Options::default()).unwrap(), "a", &[("f", b"x")]);
    fs::remove_file(root.join("spare")).unwrap();
    fill(&disk.join("ballast"));
    let store = Store::open(&root, Options::default()).unwrap();
    store.forget(&name("a")).unwrap();
    assert_eq!(collect(&store).deleted_blobs, 1);
}

#[test]
fn a_build_stops_before_the_reserve() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = small_disk(dir.path(), 64);
    let before = free(&disk);
    let options = Options {
        reserved_free: before - (8 << 20),
    };
    let store = Store::open(&disk.join("store"), options).unwrap();
    let build = store.build().unwrap();
    let mut put = 0;
    let error = loop {
        match build.put_bytes(&noise(put, 512 << 10)) {
            Ok(_) => put += 1,
            Err(error) => break error,
        }
    };
    assert!(error.is_disk_full(), "{error}");
    assert!((8..16).contains(&put), "{put} of 512 KiB were put");
    assert!(free(&disk) >= before - (8 << 20));
    // A build of which a write failed is lost.
    let tree = tree::Tree::new(meta(0o755));
    assert!(matches!(
        build.publish(&tree, target("a", "uid")),
        Err(Error::BuildFailed)
    ));
    assert!(staging_is_empty(&store));
}

#[test]
fn a_disk_without_inodes_says_so_instead_of_how_much_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = disk_of(dir.path(), 32, "ext4", &["-m0", "-N400"]);
    let store = Store::open(&disk.join("store"), Options::default()).unwrap();
    publish(&store, "kept", &[("f", b"kept")]);
    let build = store.build().unwrap();
    let put = |number: u32| build.put_bytes(&number.to_le_bytes());
    let error = (0..1000).find_map(|number| put(number).err()).unwrap();
    assert!(matches!(error, Error::NoInodes { free } if free > 16 << 20), "{error}");
    let tree = store.load(&store.get_ref(&name("kept")).unwrap().unwrap().current.unwrap().digest);
    let error = store.export(&tree.unwrap(), &disk.join("out"), None).unwrap_err();
    assert!(
        matches!(error, Error::NoInodes { .. }) && error.is_disk_full(),
        "{error}"
    );
    drop(build);
    assert_eq!(check_all(&store), 1);
}

#[test]
fn a_record_that_finds_no_room_costs_no_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = small_disk(dir.path(), 32);
    let store = Store::open(&disk.join("store"), Options::default()).unwrap();
    publish(&store, "gone", &[("f", &noise(1, 1 << 20))]);
    store.retire(&name("gone"), "uid-1", SystemTime::now()).unwrap();
    let how = Collecting {
        dry_run: true,
        now: SystemTime::now(),
        rate: None,
        cancel: &never(),
    };
    let record = || {
        let (report, removals) = store.collect_with(&nothing_kept(), &Trees(vec![]), &how).unwrap();
        assert_eq!(removals.len(), 2);
        store.record_run(&report, &removals, &serde_json::json!({"trigger": "test"}))
    };
    let ids: Vec<RunId> = (0..3).map(|_| record().unwrap()).collect();
    fill(&disk.join("ballast"));
    let error = record().unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    assert!(staging_is_empty(&store));
    let Runs { runs, unreadable } = store.runs().unwrap();
    assert_eq!(
        (runs.iter().map(|(id, _)| id.clone()).collect(), unreadable.len()),
        (ids, 0)
    );
}
