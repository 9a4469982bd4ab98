//! Generated folders on real file systems: made by plain calls of the kernel (`make.rs`), read, published, exported, and
//! compared by an eye of its own (`look.rs`) with what was made, byte by byte and attribute by attribute.

mod images;
mod layers;
mod look;
mod make;
mod operate;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::store::remove_all;
use look::{Looked, holes_are_kept, look};

/// A file system in memory's own blocks, so that no sync waits for a disk. Gone when dropped.
struct Disk {
    path: PathBuf,
    mounts: Vec<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Disk {
    fn new(kind: &str, megabytes: u64, options: &[&str]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir().unwrap();
        let (memory, path) = (dir.path().join("memory"), dir.path().join("disk"));
        fs::create_dir(&memory).unwrap();
        fs::create_dir(&path).unwrap();
        let mut disk = Self {
            path: path.clone(),
            mounts: Vec::new(),
            _dir: dir,
        };
        let size = format!("size={}m", megabytes + 16);
        run(
            "mount",
            &["-t", "tmpfs", "-o", &size, "test", &memory.to_string_lossy()].map(OsStr::new),
        );
        disk.mounts.push(memory.clone());
        let image = memory.join("image");
        fs::File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        let mut arguments: Vec<&OsStr> = vec!["-q".as_ref()];
        arguments.extend(options.iter().map(OsStr::new));
        arguments.push(image.as_os_str());
        run(&format!("mkfs.{kind}"), &arguments);
        run(
            "mount",
            &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), path.as_os_str()],
        );
        disk.mounts.push(path);
        disk
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for mount in self.mounts.iter().rev() {
            // The loop device goes with its mount.
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
    }
}

fn first_seed() -> u64 {
    let given = std::env::var("LARDER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| rand::rng().random());
    eprintln!("LARDER_SEED={seed}");
    seed
}

fn rounds(usual: u64) -> u64 {
    match std::env::var_os("LARDER_SOAK") {
        Some(_) => usual * 20,
        None => usual,
    }
}

/// Reads a folder into the store and publishes it.
fn take(store: &Store, source: &Path) -> Tree {
    let build = store.build().unwrap();
    let tree = scan_of(store, source, &[], &build).unwrap();
    let digest = publish(build, &tree, "generated");
    let loaded = store.load(&digest).unwrap();
    assert_eq!(loaded, tree);
    loaded
}

fn assert_alike(made: &Looked, found: &Looked, what: &str) {
    for (path, entry) in made {
        let other = found.get(path);
        assert_eq!(Some(entry), other, "{what}: {}", path.escape_ascii());
    }
    assert_eq!(made.len(), found.len(), "{what}: there is more than was made");
}

/// Makes a folder by each seed and takes it through the store.
fn survive(store: &Store, disk: &Path, largest: (u32, u32), seeds: impl Iterator<Item = u64>) {
    let (source, out) = (disk.join("source"), disk.join("out"));
    let mut zeros = BTreeSet::new();
    for seed in seeds {
        let what = format!("LARDER_SEED={seed}");
        fs::create_dir(&source).unwrap();
        make::folder(&source, largest, &mut StdRng::seed_from_u64(seed));
        let made = look(&source);
        let tree = take(store, &source);
        assert_eq!(tree.stats().entries + 1, made.len() as u64, "{what}");
        store
            .export(&tree, &out, None)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_alike(&made, &look(&out), &what);
        assert_alike(
            &made,
            &look(&source),
            &format!("{what}: reading has changed the source"),
        );
        holes_are_kept(&source, &out, &mut zeros, &what);
        // What was exported is the same tree again, and so is what it was made of.
        let digest = tree.digest().unwrap();
        for again in [&out, &source] {
            let build = store.build().unwrap();
            assert_eq!(
                scan_of(store, again, &[], &build).unwrap().digest().unwrap(),
                digest,
                "{what}"
            );
        }
        remove_all(&source).unwrap();
        remove_all(&out).unwrap();
    }
}

fn survive_on(kind: &str, megabytes: u64, options: &[&str], largest: (u32, u32), usual: u64) {
    let first = first_seed();
    // The store keeps all trees, and there is room for so many.
    for begin in (0..rounds(usual)).step_by(usual as usize) {
        let disk = Disk::new(kind, megabytes, options);
        let store = Store::open(&disk.path.join("store"), Options::default()).unwrap();
        let seeds = (begin..begin + usual).map(|round| first.wrapping_add(round));
        survive(&store, &disk.path, largest, seeds);
    }
}

#[test]
fn any_folder_survives_the_store_on_ext4() {
    survive_on("ext4", 128, &["-m0", "-b4096"], (0xfff, 0xf_ffff), 150);
}

/// Where data is shared by reflink, and a device has numbers of 9 and 18 bits.
#[test]
fn any_folder_survives_the_store_on_xfs() {
    survive_on("xfs", 320, &[], (0x1ff, 0x3_ffff), 100);
}

#[test]
fn a_folder_of_a_hundred_thousand_entries_survives_the_store() {
    let disk = Disk::new("ext4", 512, &["-m0", "-b4096", "-N250000"]);
    let store = Store::open(&disk.path.join("store"), Options::default()).unwrap();
    let (source, out) = (disk.path.join("source"), disk.path.join("out"));
    fs::create_dir(&source).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    make::large_folder(&source, 100_000, &mut rng);
    let made = look(&source);
    assert_eq!(made.len(), 100_001);
    let tree = take(&store, &source);
    store.export(&tree, &out, None).unwrap();
    assert_alike(&made, &look(&out), "large");
    let again = scan_of(&store, &out, &[], &store.build().unwrap()).unwrap();
    assert_eq!(again.digest(), tree.digest());
}

/// The looker must see what it is there to compare: each change of one thing alone is seen.
#[test]
fn the_comparison_sees_every_single_difference() {
    let disk = Disk::new("ext4", 32, &[]);
    let root = disk.path.join("d");
    fs::create_dir(&root).unwrap();
    let at = |name: &str| root.join(name);
    fs::write(at("file"), "content").unwrap();
    fs::write(at("twin"), "content").unwrap();
    fs::hard_link(at("file"), at("link")).unwrap();
    symlink("target", at("symlink")).unwrap();
    device(&at("null"), FileType::CharacterDevice, 1, 3);
    let pin = || {
        // The same time everywhere, so that only the change itself is seen.
        for name in ["file", "twin", "symlink", "null", ""] {
            make::set_mtime(&at(name), 1_000_000_000, 5);
        }
    };
    pin();
    let flags = rustix::fs::XattrFlags::empty();
    type Change<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let changes: Vec<Change> = vec![
        ("content", Box::new(|| fs::write(at("file"), "contenT").unwrap())),
        ("length", Box::new(|| fs::write(at("file"), "contenT+").unwrap())),
        (
            "mode",
            Box::new(|| fs::set_permissions(at("file"), fs::Permissions::from_mode(0o4600)).unwrap()),
        ),
        ("uid", Box::new(|| chown(at("twin"), Some(7), None).unwrap())),
        (
            "gid of a link",
            Box::new(|| std::os::unix::fs::lchown(at("symlink"), None, Some(7)).unwrap()),
        ),
        (
            "xattr",
            Box::new(|| rustix::fs::setxattr(at("file"), "user.a", b"1", flags).unwrap()),
        ),
        (
            "xattr's value",
            Box::new(|| rustix::fs::setxattr(at("file"), "user.a", b"2", flags).unwrap()),
        ),
        (
            "xattr of a link",
            Box::new(|| rustix::fs::lsetxattr(at("symlink"), "trusted.a", b"1", flags).unwrap()),
        ),
        (
            "nanoseconds",
            Box::new(|| make::set_mtime(&at("twin"), 1_000_000_000, 6)),
        ),
        ("a folder's time", Box::new(|| make::set_mtime(&root, 1_000_000_001, 5))),
        (
            "hard link",
            Box::new(|| {
                fs::remove_file(at("link")).unwrap();
                fs::hard_link(at("twin"), at("link")).unwrap();
            }),
        ),
        (
            "target",
            Box::new(|| {
                fs::remove_file(at("symlink")).unwrap();
                symlink("Target", at("symlink")).unwrap();
            }),
        ),
        (
            "device",
            Box::new(|| {
                fs::remove_file(at("null")).unwrap();
                device(&at("null"), FileType::CharacterDevice, 1, 5);
            }),
        ),
        ("name", Box::new(|| fs::rename(at("twin"), at("twiN")).unwrap())),
    ];
    for (what, change) in changes {
        let before = look(&root);
        change();
        if !what.contains("time") && what != "nanoseconds" && what != "name" {
            pin();
        }
        assert_ne!(before, look(&root), "{what}");
        if what != "name" {
            pin();
        }
    }
}
