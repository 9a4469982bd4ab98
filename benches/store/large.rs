//! One large file.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::disk::Disk;
use super::goals::Goals;
use super::run::{Taken, median, run};
use super::tools::{self, LARDER};
use super::{remove, rounds, settle};

const SIZE: u64 = 4 << 30;

pub fn bench(disk: &Disk, kind: &str, goals: &mut Goals) {
    let root = &disk.root;
    let (folder, store, copy) = (root.join("large"), root.join("store"), root.join("copy"));
    fs::create_dir(&folder).expect("a folder");
    write(&folder.join("file"));
    let (mut build, mut copied, mut hashed) = (Vec::new(), Vec::new(), Vec::new());
    let mut shared = true;
    for round in 0..rounds() {
        hashed.push(hash(&folder.join("file")));
        for turn in 0..2 {
            // Each begins a round: the disk below does not treat the first and the second alike.
            if (round + turn).is_multiple_of(2) {
                settle(root);
                copied.push(run(&mut tools::copy(&folder, &copy), root));
                remove(root, &copy);
            } else {
                LARDER.init(&store);
                settle(root);
                let before = used(root);
                build.push(run(&mut LARDER.keep(&store, &folder), root));
                shared &= used(root) - before < SIZE / 10;
                remove(root, &store);
            }
        }
    }
    remove(root, &folder);
    let seconds = |taken: &[Taken]| median(taken.iter().map(|taken| taken.seconds).collect());
    let (build, copied, hashed) = (seconds(&build), seconds(&copied), median(hashed));
    println!("\n{kind}, one file of 4 GiB: larder {build:.2} s, cp {copied:.2} s, reading and hashing {hashed:.2} s");
    if kind == "ext4" {
        goals.at_most("ext4: a 4 GiB file to cp and sync", build / copied, 1.2, "×");
    } else {
        goals.at_most(
            format!("{kind}: a 4 GiB file to reading and hashing it"),
            build / hashed,
            1.1,
            "×",
        );
        let copies = if shared { 0.0 } else { 1.0 };
        goals.at_most(
            format!("{kind}: second copies on disk of a 4 GiB file"),
            copies,
            0.0,
            "",
        );
    }
}

/// Bytes that cannot be had from fewer.
fn write(path: &Path) {
    let mut random = File::open("/dev/urandom").expect("random bytes").take(SIZE);
    let mut file = File::create(path).expect("a file");
    std::io::copy(&mut random, &mut file).expect("written");
    file.flush().expect("written");
    assert_eq!(file.metadata().expect("a status").size(), SIZE);
}

/// Seconds for reading and hashing a file, one after the other, with the library that the store uses.
fn hash(path: &Path) -> f64 {
    let start = Instant::now();
    let mut file = File::open(path).expect("a file");
    let mut buffer = vec![0; 1 << 20];
    let mut hash = Sha256::new();
    loop {
        let read = file.read(&mut buffer).expect("read");
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
    }
    std::hint::black_box(hash.finalize());
    start.elapsed().as_secs_f64()
}

/// Bytes that are taken on a file system.
fn used(root: &Path) -> u64 {
    let stat = rustix::fs::statvfs(root).expect("a file system");
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}
