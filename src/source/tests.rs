//! Awkward folders, and layers against their merged view. Needs root: it makes devices, owners and mounts.

mod edges;
mod generated;
mod layers;
mod unchanged;
mod writers;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;
use crate::layer::{self, LayerId, LayerOwner, LayerSpec, Layers};
use crate::store::tree::{LeafKind, Node, Tree};
use crate::store::{Build, Options, Publish, RefName, Store};

/// A store and a folder beside it, on a real disk.
struct Place {
    store: Store,
    source: PathBuf,
    dir: tempfile::TempDir,
}

/// What layers of the store shared stays mounted for the next one, of which there is none any more.
impl Drop for Place {
    fn drop(&mut self) {
        let mounts = layer::mountinfo::of_self().unwrap_or_default();
        for mount in mounts
            .iter()
            .rev()
            .filter(|mount| mount.point.starts_with(self.dir.path()))
        {
            let _ = rustix::mount::unmount(&mount.point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

impl Place {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
        Self { store, source, dir }
    }

    fn scan(&self) -> Result<Tree, Error> {
        self.scan_but(&[])
    }

    fn scan_but(&self, exclude: &[&str]) -> Result<Tree, Error> {
        scan_of(&self.store, &self.source, exclude, &self.store.build()?)
    }
}

fn scan_of(store: &Store, path: &Path, exclude: &[&str], build: &Build) -> Result<Tree, Error> {
    let options = ScanOptions {
        exclude: exclude.iter().map(|glob| (*glob).to_owned()).collect(),
        ..ScanOptions::default()
    };
    scan(&SourceDir::open(store, path)?, &options, build, &AtomicBool::new(false))
}

fn leaf<'a>(tree: &'a Tree, path: &str) -> &'a crate::store::tree::Leaf {
    match tree.lookup(path.as_bytes()) {
        Some(Node::Leaf(id)) => tree.leaf(id),
        other => panic!("{path}: {other:?}"),
    }
}

fn run(command: &str, args: &[&OsStr]) {
    let status = Command::new(command).args(args).status().unwrap();
    assert!(status.success(), "{command} {args:?}");
}

fn device(path: &Path, kind: FileType, major: u32, minor: u32) {
    let mode = Mode::from_raw_mode(0o600);
    mknodat(CWD, path, kind, mode, rustix::fs::makedev(major, minor)).unwrap();
}

#[test]
fn everything_that_an_inode_has_is_kept() {
    let place = Place::new();
    let at = |name: &str| place.source.join(name);
    fs::write(at("file"), "content").unwrap();
    chown(at("file"), Some(1234), Some(4321)).unwrap();
    fs::set_permissions(at("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    rustix::fs::setxattr(at("file"), "user.k", b"a\0b", rustix::fs::XattrFlags::empty()).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    fs::File::options()
        .write(true)
        .open(at("file"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    symlink("../any/where", at("link")).unwrap();
    rustix::fs::lsetxattr(at("link"), "trusted.l", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    device(&at("fifo"), FileType::Fifo, 0, 0);
    device(&at("null"), FileType::CharacterDevice, 1, 3);
    device(&at("disk"), FileType::BlockDevice, 7, 300);
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    fs::create_dir_all(at("empty/folder")).unwrap();
    fs::write(place.source.join(OsStr::from_bytes(b"odd\xff\n name")), "").unwrap();

    // A FIFO that were opened would hang here.
    let tree = place.scan().unwrap();
    let file = leaf(&tree, "file");
    assert_eq!((file.meta.mode, file.meta.uid, file.meta.gid), (0o4755, 1234, 4321));
    assert_eq!(file.meta.mtime, (1_234_567_890, 123_456_789));
    assert_eq!(file.meta.xattrs, [((*b"user.k").into(), (*b"a\0b").into())]);
    assert!(matches!(file.kind, LeafKind::File { size: 7, .. }));
    let link = leaf(&tree, "link");
    assert_eq!(link.kind, LeafKind::Symlink((*b"../any/where").into()));
    assert_eq!(link.meta.xattrs, [((*b"trusted.l").into(), (*b"x").into())]);
    assert_eq!(leaf(&tree, "fifo").kind, LeafKind::Fifo);
    assert_eq!(leaf(&tree, "null").kind, LeafKind::CharDevice { major: 1, minor: 3 });
    assert_eq!(leaf(&tree, "disk").kind, LeafKind::BlockDevice { major: 7, minor: 300 });
    assert_eq!(leaf(&tree, "socket").kind, LeafKind::Socket);
    assert!(matches!(tree.lookup(b"empty/folder"), Some(Node::Dir(_))));
    assert!(tree.lookup(b"odd\xff\n name").is_some());
    assert_eq!(tree.digest().unwrap(), place.scan().unwrap().digest().unwrap());
}

#[test]
fn hard_links_are_one_inode_and_names_outside_do_not_count() {
    let place = Place::new();
    fs::create_dir_all(place.source.join("a")).unwrap();
    fs::create_dir_all(place.source.join("b")).unwrap();
    fs::write(place.source.join("a/f"), "123").unwrap();
    fs::hard_link(place.source.join("a/f"), place.source.join("b/g")).unwrap();
    fs::hard_link(place.source.join("a/f"), place.dir.path().join("outside")).unwrap();
    let tree = place.scan().unwrap();
    assert_eq!(tree.lookup(b"a/f"), tree.lookup(b"b/g"));
    assert_eq!((tree.leaves.len(), tree.stats().files), (1, 2));
}

#[test]
fn a_whiteout_in_a_plain_folder_is_refused_by_name() {
    let place = Place::new();
    fs::create_dir(place.source.join("d")).unwrap();
    device(&place.source.join("d/wh"), FileType::CharacterDevice, 0, 0);
    let error = place.scan().unwrap_err();
    assert!(matches!(&error, Error::Unreadable { count: 1, .. }), "{error:?}");
    assert!(error.to_string().contains("d/wh"), "{error}");
    assert!(place.scan_but(&["d/wh"]).is_ok());
}

#[test]
fn what_cannot_be_read_fails_the_reading_with_names_and_number() {
    let place = Place::new();
    for i in 0..30 {
        let path = place.source.join(format!("f{i:02}"));
        fs::write(&path, "secret").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    }
    fs::write(place.source.join("ok"), "fine").unwrap();
    // The rights of root are those of the thread, and rayon's threads have their own: all work is done in a pool
    // without them.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .start_handler(|_| drop_rights())
        .build()
        .unwrap();
    let error = pool.install(|| place.scan()).unwrap_err();
    let Error::Unreadable { count, first } = &error else {
        panic!("{error:?}")
    };
    assert_eq!((*count, first.len()), (30, 10));
    assert!(error.to_string().contains("f00: Permission denied"), "{error}");
}

/// Takes from this thread what lets root read everything.
fn drop_rights() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    let rights = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    sets.effective.remove(rights);
    set_capabilities(None, sets).unwrap();
}

#[test]
fn excluded_entries_are_left_out_and_bad_globs_named() {
    let place = Place::new();
    for path in ["keep.rs", "a.tmp", "d/b.tmp", "d/keep", "target/x", "d/target/y"] {
        let path = place.source.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    let tree = place.scan_but(&["**/*.tmp", "target"]).unwrap();
    for (path, there) in [
        ("keep.rs", true),
        ("a.tmp", false),
        ("d/b.tmp", false),
        ("d/keep", true),
        ("target", false),
    ] {
        assert_eq!(tree.lookup(path.as_bytes()).is_some(), there, "{path}");
    }
    assert!(
        tree.lookup(b"d/target/y").is_some(),
        "a glob without ** is relative to the root"
    );
    assert!(place.scan_but(&["[a"]).unwrap_err().to_string().contains("[a"));
}

#[test]
fn a_path_longer_than_the_system_takes_is_read() {
    let place = Place::new();
    let name = "n".repeat(200);
    let mut folder: std::os::fd::OwnedFd = fs::File::open(&place.source).unwrap().into();
    for _ in 0..60 {
        rustix::fs::mkdirat(&folder, &*name, Mode::RWXU).unwrap();
        folder = rustix::fs::openat(&folder, &*name, rustix::fs::OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    drop(
        rustix::fs::openat(
            &folder,
            "leaf",
            rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
            Mode::RWXU,
        )
        .unwrap(),
    );
    let tree = place.scan().unwrap();
    let path = [vec![name.as_str(); 60].join("/"), "leaf".to_owned()].join("/");
    assert!(path.len() > 4096 && tree.lookup(path.as_bytes()).is_some());
}

#[test]
fn links_and_mounts_are_not_followed_and_the_store_is_not_entered() {
    let place = Place::new();
    symlink("/etc", place.source.join("etc")).unwrap();
    let tree = place.scan().unwrap();
    assert_eq!(leaf(&tree, "etc").kind, LeafKind::Symlink((*b"/etc").into()));
    let around = SourceDir::open(&place.store, place.dir.path()).unwrap();
    let build = place.store.build().unwrap();
    let error = scan(&around, &ScanOptions::default(), &build, &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("store: the store itself"), "{error}");
}

#[test]
fn a_namespace_reads_below_its_roots_only() {
    let place = Place::new();
    let import = place.dir.path().join("import");
    fs::create_dir_all(import.join("team/tree")).unwrap();
    fs::create_dir_all(import.join("other")).unwrap();
    symlink("/etc", import.join("team/link")).unwrap();
    let shared: SourceRoot = format!("{}=team,ci", place.source.display()).parse().unwrap();
    let roots = Roots::new(&place.store, import.clone(), vec![shared]).unwrap();
    let open = |namespace: &str, path: &Path| roots.open(namespace, &path.to_string_lossy());
    assert!(open("team", &import.join("team/tree")).is_ok());
    assert!(open("ci", &place.source).is_ok());
    assert!(matches!(open("other", &place.source), Err(Error::OutsideRoots { .. })));
    assert!(matches!(
        open("team", &import.join("other")),
        Err(Error::OutsideRoots { .. })
    ));
    assert!(matches!(
        open("team", &import.join("team/../other")),
        Err(Error::InvalidPath { .. })
    ));
    assert!(matches!(
        open("team", &import.join("team/link")),
        Err(Error::Symlink { .. })
    ));
    assert!(matches!(
        open("team", &import.join("team/link/ssl")),
        Err(Error::Symlink { .. })
    ));
    assert!(matches!(
        open("team", &import.join("team/none")),
        Err(Error::Missing { .. })
    ));
    assert!(matches!(
        open("..", &import.join("../x")),
        Err(Error::InvalidPath { .. })
    ));
}

/// A layer over a published tree, unmounted when dropped.
struct Mounted {
    place: Rc<Place>,
    layers: Layers,
    spec: LayerSpec,
    path: PathBuf,
}

impl Mounted {
    /// Over the place's source.
    fn over(place: Place, mode: layer::Mode) -> Self {
        Self::owned(place, mode, None)
    }

    /// The same, with one owner for everything in it.
    fn owned(place: Place, mode: layer::Mode, ids: Option<(u32, u32)>) -> Self {
        let build = place.store.build().unwrap();
        let tree = scan_of(&place.store, &place.source, &[], &build).unwrap();
        let tree = publish(build, &tree, "base");
        let layers = Layers::open(place.store.clone(), layer::Options::default()).unwrap();
        Self::on(Rc::new(place), layers, tree, mode, ids)
    }

    /// Another layer, over this one's snapshot.
    fn stacked(&self) -> Self {
        let build = self.place.store.build().unwrap();
        let tree = snapshot(&self.layers, &self.spec.id, &build, &AtomicBool::new(false)).unwrap();
        let tree = publish(build, &tree, "snapshot");
        Self::on(self.place.clone(), self.layers.clone(), tree, self.spec.mode, None)
    }

    fn on(
        place: Rc<Place>,
        layers: Layers,
        tree: crate::store::TreeDigest,
        mode: layer::Mode,
        ids: Option<(u32, u32)>,
    ) -> Self {
        let id: LayerId = uuid::Uuid::new_v4().to_string().parse().unwrap();
        let owner = LayerOwner::object("ns", "l");
        let spec = LayerSpec {
            id,
            owner,
            tree,
            mode,
            size: Some(64 << 20),
            ids,
        };
        let path = layers.prepare(&spec).unwrap().path;
        Self {
            place,
            layers,
            spec,
            path,
        }
    }

    /// Takes the merged view away. A program that another test starts has our descriptors until its exec.
    fn unmount(&self) {
        for _ in 0..100 {
            match rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::empty()) {
                Err(rustix::io::Errno::BUSY) => std::thread::sleep(std::time::Duration::from_millis(20)),
                other => return other.unwrap(),
            }
        }
        panic!("{} stays in use", self.path.display());
    }

    /// The snapshot, and the merged view read as a plain folder: they must be equal.
    fn both(&self) -> (Tree, Tree) {
        let build = self.place.store.build().unwrap();
        let snapshot = snapshot(&self.layers, &self.spec.id, &build, &AtomicBool::new(false)).unwrap();
        // Mounted anew: until it is looked up again, a name whose hard link was made after its copy-up shows the inode
        // number of the file below, and groups look torn that are whole.
        self.unmount();
        assert!(!self.layers.prepare(&self.spec).unwrap().reused);
        // The layer's own mount lies in the store, which is no source.
        let view = self.place.dir.path().join("view");
        fs::create_dir(&view).unwrap();
        rustix::mount::mount_bind(&self.path, &view).unwrap();
        let merged = scan_of(&self.place.store, &view, &[], &build);
        rustix::mount::unmount(&view, rustix::mount::UnmountFlags::DETACH).unwrap();
        fs::remove_dir(&view).unwrap();
        (snapshot, merged.unwrap())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let released = self.layers.release(&self.spec.id, true);
        if !std::thread::panicking() {
            released.unwrap();
        }
    }
}

fn publish(build: Build, tree: &Tree, name: &str) -> crate::store::TreeDigest {
    let target = Publish {
        name: RefName::new("ns", name).unwrap(),
        owner: name.to_owned(),
        generation: 1,
        request: None,
        source: serde_json::Value::Null,
        history_limit: 0,
        now: SystemTime::now(),
    };
    build.publish(tree, target).unwrap().digest
}

/// What the two trees say of each path, for a failure's message.
fn lines(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        let path = path.escape_ascii();
        lines.push(match node {
            Node::Dir(id) => format!("{path} {:?}", tree.dir(id).meta),
            Node::Leaf(id) => format!("{path} #{} {:?}", id.0, tree.leaf(id)),
        });
    }
    lines
}

#[test]
fn a_folder_deleted_and_made_again_shows_nothing_old_two_snapshots_later() {
    let place = Place::new();
    fs::create_dir(place.source.join("d")).unwrap();
    fs::write(place.source.join("d/old"), "old").unwrap();
    let first = Mounted::over(place, layer::Mode::Tmpfs);
    fs::remove_dir_all(first.path.join("d")).unwrap();
    let (gone, merged) = first.both();
    assert_eq!(lines(&gone), lines(&merged));
    assert_eq!(gone.lookup(b"d"), None);

    // The same in one layer: the folder is opaque.
    fs::create_dir(first.path.join("d")).unwrap();
    fs::write(first.path.join("d/new"), "new").unwrap();
    let (again, merged) = first.both();
    assert_eq!(lines(&again), lines(&merged));
    assert!(again.lookup(b"d/new").is_some() && again.lookup(b"d/old").is_none());
}
