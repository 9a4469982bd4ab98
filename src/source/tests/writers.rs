//! Snapshots while pods write, and what a snapshot reads.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use rayon::ThreadPoolBuilder;
use rustix::fs::{RenameFlags, renameat_with};

use super::*;
use crate::store::Digest;
use crate::store::testing::digest_of;

const FILES: usize = 8;

/// What is written as a whole: one byte all over.
fn record(byte: u8) -> Vec<u8> {
    vec![byte; 20_000]
}

/// Does what is one write to who writes. One that was held up for long in its midst, as when the machine gives its
/// processor away, cannot be told from two: it is counted.
fn at_once(slow: &AtomicU32, write: impl FnOnce()) {
    let begun = Instant::now();
    write();
    if begun.elapsed() > Duration::from_millis(5) {
        slow.fetch_add(1, Ordering::SeqCst);
    }
}

/// Writes whole records in several ways, and moves what it writes, until it is stopped.
fn write(root: &Path, stop: &AtomicBool, slow: &AtomicU32) {
    let mut byte = 0u8;
    while !stop.load(Ordering::Relaxed) {
        for folder in ["one", "two"] {
            for number in 0..FILES {
                byte = byte.wrapping_add(1);
                let path = root.join(folder).join(number.to_string());
                match number % 4 {
                    // In place.
                    0 => {
                        let file = fs::File::options().write(true).open(&path).unwrap();
                        at_once(slow, || file.write_all_at(&record(byte), 0).unwrap());
                    }
                    // First only the metadata, then emptied and written.
                    1 => {
                        fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + u32::from(byte % 8))).unwrap();
                        at_once(slow, || fs::write(&path, record(byte)).unwrap());
                    }
                    // Replaced, within the folder and from another one.
                    2 => {
                        fs::write(root.join("new"), record(byte)).unwrap();
                        fs::rename(root.join("new"), &path).unwrap();
                    }
                    _ => {
                        let other = path.with_file_name("0");
                        renameat_with(CWD, &path, CWD, &other, RenameFlags::EXCHANGE).unwrap();
                    }
                }
                std::thread::sleep(Duration::from_millis(u64::from(byte % 7)));
            }
        }
        renameat_with(CWD, root.join("one"), CWD, root.join("two"), RenameFlags::EXCHANGE).unwrap();
        std::thread::sleep(Duration::from_millis(u64::from(byte)));
    }
}

fn contents(tree: &Tree) -> Vec<(String, Digest)> {
    let mut found = Vec::new();
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        if let Node::Leaf(leaf) = node
            && let Some((digest, _)) = tree.leaf(leaf).content()
        {
            found.push((String::from_utf8(path.to_vec()).unwrap(), *digest));
        }
    }
    found
}

/// Stops the writer, also after a failure: or the test would wait for it for ever.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn under_a_writer(mode: layer::Mode) {
    let place = Place::new();
    for folder in ["one", "two"] {
        fs::create_dir(place.source.join(folder)).unwrap();
        for number in 0..FILES {
            fs::write(place.source.join(folder).join(number.to_string()), record(0)).unwrap();
        }
    }
    let mounted = Mounted::over(place, mode);
    // Emptied and not yet written is a state that there is.
    let whole: HashSet<Digest> = (0..=255)
        .map(|byte| digest_of(&record(byte)))
        .chain([digest_of(b"")])
        .collect();
    let (stop, slow) = (AtomicBool::new(false), AtomicU32::new(0));
    let snapshot = || {
        let build = mounted.place.store.build().unwrap();
        snapshot(&mounted.layers, &mounted.spec.id, &build, &AtomicBool::new(false))
    };
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(&mounted.path, &stop, &slow));
        let stopping = Stopping(&stop);
        let (mut whole_ones, mut judged) = (0, 0);
        for _ in 0..1000 {
            if judged >= 12 && whole_ones >= 3 {
                break;
            }
            let before = slow.load(Ordering::SeqCst);
            match snapshot() {
                Ok(tree) => {
                    let found = contents(&tree);
                    let torn = found.iter().find(|(_, digest)| !whole.contains(digest));
                    if let Some((path, _)) = torn {
                        // If it was held up, it is counted when it goes on.
                        let found = Instant::now();
                        while slow.load(Ordering::SeqCst) == before {
                            assert!(found.elapsed() < Duration::from_secs(10), "{path} is what nobody wrote");
                            std::thread::sleep(Duration::from_millis(10));
                        }
                        continue;
                    }
                    let names =
                        ["one", "two"].map(|folder| found.iter().filter(|(path, _)| path.starts_with(folder)).count());
                    assert_eq!(names, [FILES, FILES]);
                    whole_ones += 1;
                    judged += 1;
                }
                Err(Error::Changed { count, first }) => {
                    assert!(count > 0 && !first.is_empty() && first.iter().all(|failure| !failure.path.is_empty()));
                    judged += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        eprintln!("{whole_ones} of {judged} snapshots were whole");
        drop(stopping);
        writing.join().unwrap();
        assert!(judged >= 12, "the writer is held up all the time");
        assert!(whole_ones >= 3, "{whole_ones} of {judged} snapshots came to an end");
    });
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
}

#[test]
fn under_a_writer_every_file_of_a_snapshot_in_memory_is_one_that_was_written() {
    under_a_writer(layer::Mode::Tmpfs);
}

#[test]
fn under_a_writer_every_file_of_a_snapshot_on_disk_is_one_that_was_written() {
    under_a_writer(layer::Mode::Overlay);
}

/// Bytes that this thread has got from `read` and its like, from wherever.
fn bytes_read() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
    line.parse().unwrap()
}

#[test]
fn a_snapshot_reads_no_data_of_files_of_which_only_the_metadata_was_changed() {
    const COUNT: usize = 60;
    const SIZE: u64 = 1 << 20;
    let place = Place::new();
    for number in 0..COUNT {
        let file = fs::File::create(place.source.join(number.to_string())).unwrap();
        file.write_all_at(&[1; 100], number as u64 * 4096).unwrap();
        file.set_len(SIZE).unwrap();
    }
    let mounted = Mounted::over(place, layer::Mode::Overlay);
    let at = |number: usize| mounted.path.join(number.to_string());
    for number in 0..COUNT {
        match number % 4 {
            0 => fs::set_permissions(at(number), fs::Permissions::from_mode(0o4711)).unwrap(),
            1 => chown(at(number), Some(1000), Some(1000)).unwrap(),
            2 => fs::rename(at(number), mounted.path.join(format!("moved {number}"))).unwrap(),
            _ => fs::hard_link(at(number), mounted.path.join(format!("linked {number}"))).unwrap(),
        }
    }
    // One whose data is read, so that the count is known to count.
    fs::write(mounted.path.join("new"), vec![7; 300_000]).unwrap();
    let (store, layers, id) = (&mounted.place.store, &mounted.layers, &mounted.spec.id);
    let snapshot_reads = |expected_entries: usize| {
        let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| {
            let build = store.build().unwrap();
            let before = bytes_read();
            let tree = snapshot(layers, id, &build, &AtomicBool::new(false)).unwrap();
            assert_eq!(tree.stats().entries as usize, expected_entries);
            bytes_read() - before
        })
    };
    let with_one = snapshot_reads(COUNT + COUNT / 4 + 1);
    fs::remove_file(mounted.path.join("new")).unwrap();
    let without = snapshot_reads(COUNT + COUNT / 4);
    // Give or take what the mounts of other tests add to the list of mounts.
    assert!(with_one >= without + 250_000, "{with_one} and {without}");
    // The manifest, twice, and the list of mounts.
    assert!(without < SIZE / 4, "{without} bytes");
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
}
