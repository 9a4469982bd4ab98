//! A disk that has no block or no inode left, and one that has promised more than is below it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use rand::Rng;

use super::rounds::{Target, by_patience};
use super::*;

/// Takes all blocks, then gives so many bytes back.
fn take_blocks(folder: &Path, but: u64) {
    let file = File::create(folder.join("ballast")).unwrap();
    for length in [1 << 20, 4096, 1] {
        let block = vec![1; length];
        while (&file).write_all(&block).is_ok() {}
    }
    file.sync_all().unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length.saturating_sub(but)).unwrap();
}

/// Takes all inodes, then gives so many back.
fn take_inodes(folder: &Path, but: u64) {
    let folder = folder.join("ballast");
    fs::create_dir_all(&folder).unwrap();
    let files = (0..).take_while(|number| File::create(folder.join(number.to_string())).is_ok());
    let count: u64 = files.count() as u64;
    for number in count.saturating_sub(but)..count {
        fs::remove_file(folder.join(number.to_string())).unwrap();
    }
}

fn give_back(folder: &Path) {
    let path = folder.join("ballast");
    match path.is_dir() {
        true => fs::remove_dir_all(path).unwrap(),
        false => {
            // XFS frees the blocks of a file that is removed at some time later, and those of one that is cut off at once.
            File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
            fs::remove_file(path).unwrap();
        }
    }
}

/// What is done in a round, and with how much room: more and more of it up to `needed`, so that there is too little in
/// the first rounds whatever the seed.
fn next(rounds: &mut Rounds, round: u64, all: u64, needed: u64) -> (Target, u64) {
    let target = Target {
        new: !round.is_multiple_of(3),
        detour: Vec::new(),
    };
    (target, (round * needed + rounds.rng.random_range(0..needed)) / all)
}

/// Lives with less than `needed` room. Before what is left is collected, the disk is filled to the brim.
fn filled(kind: &str, megabytes: u64, take: fn(&Path, u64), needed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let disk = Disk::new(ram.path(), kind, megabytes);
    let mut rounds = Rounds::new(disk.path(), ram.path(), None);
    let all = by_patience(8, 300);
    for round in 0..all {
        let (target, left) = next(&mut rounds, round, all, needed);
        let _context = rounds.begin(&format!("{left} left for {target:?}"), &target);
        disk.sync();
        take(disk.path(), left);
        let life = live(&rounds.work(&target, None, false));
        if let Ended::Failed(error) = &life.ended {
            let full = ["the disk is full", "no inode left", "No space left on device"];
            assert!(full.iter().any(|text| error.contains(text)), "{error}");
            assert_eq!(
                staged(&rounds.root),
                [""; 0],
                "a failed build has left something behind"
            );
        }
        give_back(disk.path());
        // A store that could not even be made cannot be opened either, while there is no room for it.
        let made = rounds.root.join("larder.json").exists();
        if made {
            take(disk.path(), 0);
        }
        rounds.inspect(&target, false, &life);
        if made {
            give_back(disk.path());
        }
        rounds.heal();
    }
    println!("{:?}", rounds.ended);
    assert!(rounds.ended["failed"] >= 2);
}

#[test]
fn a_disk_that_fills_up_at_any_moment_spoils_nothing_on_ext4() {
    filled("ext4", 48, take_blocks, 8 << 20);
}

#[test]
fn a_disk_that_fills_up_at_any_moment_spoils_nothing_on_xfs() {
    filled("xfs", 320, take_blocks, 3 << 20);
}

#[test]
fn running_out_of_inodes_at_any_moment_spoils_nothing() {
    filled("ext4", 48, take_inodes, 400);
}

/// The disk has room, what is below it has none: writes are lost after they were taken, and only a sync tells, once.
fn thin(kind: &str, megabytes: u64, needed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let out = Ram::new(&dir.path().join("out"));
    let ram = Ram::new(dir.path());
    let disk = Disk::new(ram.path(), kind, megabytes);
    let folder = disk.path().to_owned();
    let mut rounds = Rounds::new(&folder, out.path(), Some(disk));
    let all = by_patience(8, 300);
    for round in 0..all {
        let (target, left) = next(&mut rounds, round, all, needed);
        let _context = rounds.begin(&format!("{left} left below {target:?}"), &target);
        if let Some(disk) = &rounds.disk {
            // What was removed takes no room below either, so that new blocks have to be found there.
            disk.trim();
            disk.write_by_pages();
        }
        ram.leave(Some(left));
        // The second life begins where the first one's sync has failed: for it all may look well.
        let life = live(&rounds.work(&target, None, true));
        ram.leave(None);
        rounds.judge(&target, false, &life);
    }
    println!("{:?}", rounds.ended);
    assert!(rounds.ended["failed"] >= 1);
}

#[test]
fn a_disk_that_is_thinner_than_it_says_spoils_nothing_on_ext4() {
    thin("ext4", 96, 7 << 20);
}

#[test]
fn a_disk_that_is_thinner_than_it_says_spoils_nothing_on_xfs() {
    thin("xfs", 320, 3 << 20);
}
