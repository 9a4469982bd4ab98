//! What is easily lost, entered or read for ever: attributes, holes, mounts, depth, change, cancelling.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use rustix::fs::{OFlags, XattrFlags, mkdirat, openat, setxattr};
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::*;
use crate::store::Digest;

/// A mount, unmounted when dropped.
struct Bound(PathBuf);

impl Bound {
    fn new(from: &Path, to: &Path) -> Self {
        mount_bind(from, to).unwrap();
        Self(to.to_owned())
    }

    /// A file system on which no change waits for a journal: what changes a file all the time does so at any load.
    fn tmpfs(to: &Path) -> Self {
        run(
            "mount",
            &["-t", "tmpfs", "test"]
                .map(OsStr::new)
                .into_iter()
                .chain([to.as_os_str()])
                .collect::<Vec<_>>(),
        );
        Self(to.to_owned())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let unmounted = unmount(&self.0, UnmountFlags::DETACH);
        if !thread::panicking() {
            unmounted.unwrap();
        }
    }
}

/// Bytes of holes that take far longer to read than a thread ever waits for its turn.
pub(super) const LONG: u64 = 256 << 20;

/// Does something again and again, until dropped.
struct Busy {
    stop: std::sync::Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Busy {
    /// Returns when it was done once.
    fn doing(mut something: impl FnMut() + Send + 'static) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let (begun, first) = std::sync::mpsc::channel();
        let until = stop.clone();
        let thread = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                something();
                let _ = begun.send(());
            }
        });
        first.recv().unwrap();
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

fn kinds(error: &Error) -> Vec<(String, FailureKind)> {
    match error {
        Error::Unreadable { first, .. } | Error::Changed { first, .. } => {
            first.iter().map(|f| (f.path.clone(), f.kind.clone())).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn capabilities_and_access_lists_are_kept_and_labels_of_the_node_are_not() {
    // include/uapi/linux/capability.h: revision 2, effective, CAP_NET_RAW permitted.
    const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // include/uapi/linux/posix_acl_xattr.h: version 2; owner rw-, user 1234 r--, group r--, mask r--, others ---.
    let list: Vec<u8> = [
        (1u16, 6u16, u32::MAX),
        (2, 4, 1234),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ]
    .iter()
    .flat_map(|(tag, permissions, id)| [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat())
    .collect();
    let list = [&2u32.to_le_bytes()[..], &list].concat();
    let place = Place::new();
    let (file, folder) = (place.source.join("ping"), place.source.join("d"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&folder).unwrap();
    let set = |path: &Path, name: &str, value: &[u8]| setxattr(path, name, value, XattrFlags::empty()).unwrap();
    set(&file, "system.posix_acl_access", &list);
    set(&file, "security.capability", &CAPABILITY);
    set(&file, "security.selinux", b"system_u:object_r:etc_t:s0\0");
    set(&folder, "system.posix_acl_default", &list);
    set(&folder, "trusted.t", b"a\0b");

    let tree = place.scan().unwrap();
    let pair = |name: &str, value: &[u8]| (name.as_bytes().into(), value.into());
    assert_eq!(
        leaf(&tree, "ping").meta.xattrs,
        [
            pair("security.capability", &CAPABILITY),
            pair("system.posix_acl_access", &list)
        ]
    );
    let Some(Node::Dir(folder)) = tree.lookup(b"d") else {
        panic!("no folder")
    };
    assert_eq!(
        tree.dir(folder).meta.xattrs,
        [pair("system.posix_acl_default", &list), pair("trusted.t", b"a\0b")]
    );
}

#[test]
fn a_file_with_holes_has_the_content_that_reading_it_gives() {
    let place = Place::new();
    let path = place.source.join("holes");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(b"begin").unwrap();
    file.set_len(3 << 20).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 3 << 20);
    let digest = Digest::from_bytes(<sha2::Sha256 as sha2::Digest>::digest(&bytes).into());
    let tree = place.scan().unwrap();
    assert_eq!(leaf(&tree, "holes").kind, LeafKind::File { digest, size: 3 << 20 });
}

#[test]
fn a_folder_that_cannot_be_entered_is_named_beside_a_file() {
    let place = Place::new();
    fs::create_dir_all(place.source.join("a/nodir")).unwrap();
    fs::write(place.source.join("a/nodir/inside"), "x").unwrap();
    fs::write(place.source.join("noread"), "x").unwrap();
    fs::write(place.source.join("ok"), "x").unwrap();
    for closed in ["a/nodir", "noread"] {
        fs::set_permissions(place.source.join(closed), fs::Permissions::from_mode(0o000)).unwrap();
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .start_handler(|_| drop_rights())
        .build()
        .unwrap();
    let error = pool.install(|| place.scan()).unwrap_err();
    let mut found = kinds(&error);
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let denied = FailureKind::Errno(libc::EACCES);
    assert_eq!(
        found,
        [("a/nodir".to_owned(), denied.clone()), ("noread".to_owned(), denied)]
    );
    assert!(matches!(error, Error::Unreadable { count: 2, .. }), "{error:?}");
    assert!(pool.install(|| place.scan_but(&["noread", "a/nodir"])).is_ok());
}

#[test]
fn nothing_of_what_is_mounted_in_a_source_is_read_or_recorded() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    fs::create_dir_all(outside.join("d")).unwrap();
    fs::write(outside.join("d/secret"), "of another tenant").unwrap();
    fs::write(outside.join("file"), "of another tenant").unwrap();
    device(&outside.join("fifo"), FileType::Fifo, 0, 0);
    device(&outside.join("null"), FileType::CharacterDevice, 1, 3);
    fs::create_dir(place.source.join("d")).unwrap();
    for name in ["fifo", "file", "null"] {
        fs::write(place.source.join(name), "below the mount").unwrap();
    }
    fs::write(place.source.join("ok"), "x").unwrap();
    // A name of a group that is mounted over another file is no further name of it.
    fs::write(place.source.join("group"), "x").unwrap();
    fs::hard_link(place.source.join("group"), outside.join("zgroup")).unwrap();
    fs::write(place.source.join("zgroup"), "below the mount").unwrap();
    // All of one file system: the device number tells nothing.
    let mounts: Vec<_> = ["d", "fifo", "file", "null", "zgroup"]
        .iter()
        .map(|name| Bound::new(&outside.join(name), &place.source.join(name)))
        .collect();
    let error = place.scan().unwrap_err();
    let mut found = kinds(&error);
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let mounted = |name: &str| (name.to_owned(), FailureKind::MountPoint);
    assert_eq!(found, ["d", "fifo", "file", "null", "zgroup"].map(mounted));
    assert!(place.scan_but(&["d", "fifo", "file", "null", "zgroup"]).is_ok());
    drop(mounts);
    assert!(place.scan().is_ok());
}

#[test]
fn thousands_of_levels_take_memory_by_their_number_only() {
    const LEVELS: usize = 3000;
    let place = Place::new();
    let name = "n".repeat(250);
    let mut folder: OwnedFd = fs::File::open(&place.source).unwrap().into();
    for _ in 0..LEVELS {
        mkdirat(&folder, &*name, Mode::RWXU).unwrap();
        folder = openat(&folder, &*name, OFlags::DIRECTORY, Mode::empty()).unwrap();
        drop(openat(&folder, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap());
    }
    let before = peak_memory();
    let begun = Instant::now();
    let tree = place.scan();
    let (grown, took) = (peak_memory() - before, begun.elapsed());
    // Before anything can fail: what removes the temporary folder needs a stack as deep as the tree.
    crate::store::remove_all(&place.source).unwrap();
    let tree = tree.unwrap();
    assert_eq!((tree.dirs.len(), tree.leaves.len()), (LEVELS + 1, LEVELS));
    // The paths alone of all its folders are 1.1 GB. Other tests that run meanwhile need far less than the rest.
    assert!(grown < 300 << 20, "{} MB in {took:?}", grown >> 20);
}

/// Most memory that this process had at any time, in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_file_that_never_stays_the_same_is_named() {
    let place = Place::new();
    let _tmpfs = Bound::tmpfs(&place.source);
    fs::create_dir(place.source.join("logs")).unwrap();
    fs::write(place.source.join("ok"), "x").unwrap();
    let path = place.source.join("logs/busy");
    let mut file = fs::File::create(&path).unwrap();
    file.set_len(LONG).unwrap();
    let busy = Busy::doing(move || file.write_all(b"more").unwrap());
    let error = place.scan().unwrap_err();
    assert!(matches!(error, Error::Changed { count: 1, .. }), "{error:?}");
    assert_eq!(kinds(&error), [("logs/busy".to_owned(), FailureKind::Changed)]);
    drop(busy);
    assert!(place.scan().is_ok(), "it stays the same now");
}

#[test]
fn a_folder_that_never_stays_the_same_is_named() {
    let place = Place::new();
    let _tmpfs = Bound::tmpfs(&place.source);
    fs::create_dir_all(place.source.join("a/busy")).unwrap();
    fs::File::create(place.source.join("z")).unwrap().set_len(LONG).unwrap();
    let (one, two) = (place.source.join("a/busy/one"), place.source.join("a/busy/two"));
    fs::write(&one, "x").unwrap();
    let _busy = Busy::doing(move || {
        fs::rename(&one, &two).unwrap();
        fs::rename(&two, &one).unwrap();
    });
    let error = place.scan().unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error:?}");
    assert!(
        kinds(&error).iter().all(|(path, _)| path.starts_with("a/busy")),
        "{error}"
    );
}

#[test]
fn a_cancelled_reading_ends_soon_also_between_large_files() {
    let place = Place::new();
    for i in 0..2000 {
        let file = fs::File::create(place.source.join(format!("f{i:03}"))).unwrap();
        file.set_len(64 << 20).unwrap();
    }
    let build = place.store.build().unwrap();
    let folder = SourceDir::open(&place.store, &place.source).unwrap();
    let cancel = AtomicBool::new(false);
    let cancelled = thread::scope(|scope| {
        let scan = scope.spawn(|| scan(&folder, &ScanOptions::default(), &build, &cancel));
        thread::sleep(Duration::from_millis(100));
        cancel.store(true, Ordering::Relaxed);
        let at = Instant::now();
        (scan.join().unwrap(), at.elapsed())
    });
    assert!(matches!(cancelled.0, Err(Error::Cancelled)), "{:?}", cancelled.0);
    // All of them are 128 GB to look through, which takes minutes; one or two are what may still be read.
    assert!(cancelled.1 < Duration::from_secs(60), "{:?}", cancelled.1);
}

#[test]
fn a_path_outside_the_roots_is_answered_with_the_roots_of_the_namespace_only() {
    let place = Place::new();
    let extra = |text: &str| text.parse::<SourceRoot>().unwrap();
    let roots = vec![extra("/srv/mine=team"), extra("/srv/theirs=other"), extra("/srv/all=*")];
    let roots = Roots::new(&place.store, "/import".into(), roots).unwrap();
    assert_eq!(
        roots.open("team", "/etc").unwrap_err().to_string(),
        "/etc is outside the folders that namespace team may read on this node: /import/team, /srv/all, /srv/mine"
    );
    // Not by a prefix of the text.
    assert!(matches!(
        roots.open("team", "/srv/mine2"),
        Err(Error::OutsideRoots { .. })
    ));
}

#[test]
fn a_file_larger_than_the_disk_is_named_and_not_read() {
    let place = Place::new();
    let disk = place.store.build().unwrap().disk_size().unwrap();
    let file = fs::File::create(place.source.join("huge")).unwrap();
    file.set_len(disk + 1).unwrap();
    fs::write(place.source.join("small"), "small").unwrap();
    match place.scan().unwrap_err() {
        Error::Unreadable { count: 1, first } => {
            let size = disk + 1;
            assert_eq!(first[0].path, "huge");
            assert_eq!(first[0].kind, FailureKind::TooLarge { size, disk });
        }
        error => panic!("{error}"),
    }
    assert!(place.scan_but(&["huge"]).is_ok());
}

/// Sets the flag when dropped.
struct Cancelled<'a>(&'a AtomicBool);

impl Drop for Cancelled<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn files_that_are_read_for_hours_hold_up_no_other_build_and_end_when_cancelled() {
    let (slow, other) = (Place::new(), Place::new());
    let build = slow.store.build().unwrap();
    // As much together as may be, and one for each thread.
    let files = rayon::current_num_threads();
    let size = build.disk_size().unwrap() / files as u64;
    for number in 0..files {
        let file = fs::File::create(slow.source.join(number.to_string())).unwrap();
        file.set_len(size).unwrap();
    }
    for number in 0..1000 {
        fs::write(other.source.join(number.to_string()), number.to_string()).unwrap();
    }
    let cancel = AtomicBool::new(false);
    let source = SourceDir::open(&slow.store, &slow.source).unwrap();
    thread::scope(|scope| {
        // Also after a failure: the test would wait for all the zeros.
        let cancelled = Cancelled(&cancel);
        let reading = scope.spawn(|| scan(&source, &ScanOptions::default(), &build, &cancel));
        thread::sleep(Duration::from_millis(300));
        assert_eq!(other.scan().unwrap().stats().files, 1000);
        assert!(!reading.is_finished(), "all zeros are read: {size} bytes a file");
        drop(cancelled);
        let asked = Instant::now();
        let read = reading.join().unwrap();
        assert!(matches!(read, Err(Error::Cancelled)), "{read:?}");
        assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    });
}
