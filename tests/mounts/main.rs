//! Layers on real mounts, without a cluster. Needs root.

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod kills;
mod shared;
mod sharing;
mod stopped;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use larder::layer::{Error, LayerId, LayerOwner, LayerSpec, Layers, Lost, Mode, Options, Road, mountinfo};
use larder::store::tree::{Leaf, LeafKind, Meta, Tree};
use larder::store::{self, Build, Holders, Publish, RefName, Store, TreeDigest, retention};
use support::{StoreDir, temp_store_dir};

const SIZE: u64 = 32 << 20;

/// A store in a folder that is unmounted and removed at the end, also after a failure.
struct Site {
    store: Store,
    layers: Layers,
    tree: TreeDigest,
    dir: StoreDir,
    root: PathBuf,
    /// One test at a time: a new mount namespace has a copy of every test's mounts, and a program that is being started
    /// has, until its exec, every test's descriptors.
    turn: Option<MutexGuard<'static, ()>>,
}

static TURN: Mutex<()> = Mutex::new(());

impl Site {
    /// Whether a tree counts as mounted for collections, besides as a layer's.
    fn is_mounted(&self, tree: &TreeDigest) -> bool {
        let held = self.layers.held().unwrap();
        let mut of_tree = held.trees.iter().filter(|held| held.tree == *tree);
        of_tree.any(|held| held.by().starts_with("the mount at "))
    }

    fn new() -> Self {
        Self::at("store")
    }

    /// A test's first site waits for its turn; a second one is made by [`Site::beside`], or it would wait for ever.
    fn at(name: &str) -> Self {
        Self::make(name, Some(TURN.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Another store, in the same test.
    fn beside(&self) -> Self {
        Self::make("store", None)
    }

    fn make(name: &str, turn: Option<MutexGuard<'static, ()>>) -> Self {
        Self::in_folder(temp_store_dir(), name, turn)
    }

    /// On a disk of its own, of so many bytes.
    fn small(bytes: u64) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = temp_store_dir();
        let (disk, image) = (dir.path().join("disk"), dir.path().join("small.img"));
        fs::create_dir(&disk).unwrap();
        fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        for (command, on) in [("mkfs.ext4 -q -F", None), ("mount -o loop", Some(&disk))] {
            let mut words = command.split(' ');
            let mut command = Command::new(words.next().unwrap());
            let done = command.args(words).arg(&image).args(on).status().unwrap();
            assert!(done.success(), "{command:?}");
        }
        Self::in_folder(dir, "disk/store", Some(turn))
    }

    /// On a disk whose sectors are of 4096 bytes.
    fn of_large_sectors() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = temp_store_dir();
        let (disk, image) = (dir.path().join("disk"), dir.path().join("sectors.img"));
        fs::create_dir(&disk).unwrap();
        fs::File::create(&image).unwrap().set_len(1 << 30).unwrap();
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", "4096"]).arg(&image);
        let device = String::from_utf8(losetup.output().unwrap().stdout).unwrap();
        let device = device.trim();
        for words in [
            vec!["mkfs.ext4", "-q", device],
            vec!["mount", device, disk.to_str().unwrap()],
            vec!["losetup", "--detach", device],
        ] {
            let done = Command::new(words[0]).args(&words[1..]).status().unwrap();
            assert!(done.success(), "{words:?}");
        }
        Self::in_folder(dir, "disk/store", Some(turn))
    }

    /// In memory, where the kernel mounts no image from its file.
    fn in_memory() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = temp_store_dir();
        let memory = dir.path().join("memory");
        fs::create_dir(&memory).unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=256m", "larder-test"])
            .arg(&memory);
        assert!(mount.status().unwrap().success());
        Self::in_folder(dir, "memory/store", Some(turn))
    }

    fn in_folder(dir: StoreDir, name: &str, turn: Option<MutexGuard<'static, ()>>) -> Self {
        let root = dir.path().join(name);
        let (store, layers) = open(&root);
        let tree = publish(&store, "base");
        Self {
            store,
            layers,
            tree,
            dir,
            root,
            turn,
        }
    }

    fn spec(&self, mode: Mode) -> LayerSpec {
        LayerSpec {
            id: new_id(),
            owner: LayerOwner::object("ns", "layer"),
            tree: self.tree,
            mode,
            size: Some(SIZE),
            ids: None,
        }
    }

    /// Another process over the same disk: everything in memory is gone, the mounts stay.
    fn restart(self) -> Self {
        self.restart_with(store::Options::default())
    }

    fn restart_with(self, options: store::Options) -> Self {
        let Self {
            store,
            layers,
            tree,
            dir,
            root,
            turn,
        } = self;
        drop((store, layers));
        let (store, layers) = open_with(&root, options);
        Self {
            store,
            layers,
            tree,
            dir,
            root,
            turn,
        }
    }

    /// As [`Site::restart`], after the machine was off: no mount and no loop device is left.
    fn reboot(self) -> Self {
        for mount in self.dir.mounts().iter().rev() {
            rustix::mount::unmount(mount, rustix::mount::UnmountFlags::empty()).unwrap();
        }
        assert!(self.dir.loop_devices().is_empty(), "loop devices go with their mounts");
        self.restart()
    }

    /// How many mounts the layers of a tree share.
    fn shared(&self) -> usize {
        match self.layers.road().unwrap().road {
            Road::Copy => 0,
            Road::Descriptors | Road::Paths => 1,
        }
    }

    fn nothing_is_left(&self) {
        self.nothing_is_left_but(&[], 0);
    }

    /// These mounts and so many loop devices are not the store's.
    fn nothing_is_left_but(&self, mounts: &[&Path], devices: usize) {
        self.layers.unmount_unused(Duration::ZERO).unwrap();
        assert_eq!(self.dir.mounts(), mounts);
        let left = self.dir.loop_devices();
        assert_eq!(left.len(), devices, "{left:?}");
        for folder in ["layers", "mnt"] {
            let left: Vec<_> = fs::read_dir(self.root.join(folder))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            let kept = ["images", "trees", "empty"].map(|name| self.root.join("mnt").join(name));
            for path in left {
                assert!(kept.contains(&path), "{path:?} is left");
                assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "{path:?} is not empty");
            }
        }
    }
}

/// The road to test; without one, the best that the kernel can go.
fn road() -> Option<Road> {
    let road = std::env::var("LARDER_TEST_ROAD").ok()?;
    Some(road.parse().unwrap())
}

fn open(root: &Path) -> (Store, Layers) {
    open_with(root, store::Options::default())
}

fn open_with(root: &Path, options: store::Options) -> (Store, Layers) {
    let store = Store::open(root, options).unwrap();
    let options = Options {
        road: road(),
        ..Options::default()
    };
    let layers = Layers::open(store.clone(), options).unwrap();
    (store, layers)
}

fn new_id() -> LayerId {
    uuid::Uuid::new_v4().to_string().parse().unwrap()
}

/// `file` with the text "below", `folder/other`, and the store's identity.
fn publish(store: &Store, name: &str) -> TreeDigest {
    let build = store.build().unwrap();
    let meta = |mode| Meta {
        mode,
        ..Meta::default()
    };
    let mut tree = Tree::new(meta(0o755));
    let folder = tree.add_dir(Tree::ROOT, *b"folder", meta(0o755)).unwrap();
    for (dir, name, text) in [
        (Tree::ROOT, &b"file"[..], "below"),
        (folder, &b"other"[..], "other"),
        // A tree of no other test: mounts that show one hold it, whosever they are.
        (Tree::ROOT, &b"store"[..], store.id()),
    ] {
        let blob = build.put_bytes(text.as_bytes()).unwrap();
        let kind = LeafKind::File {
            digest: blob.digest,
            size: blob.size,
        };
        tree.add_leaf(
            dir,
            name,
            Leaf {
                meta: meta(0o4755),
                kind,
            },
        )
        .unwrap();
    }
    publish_tree(build, &tree.finish().unwrap(), name)
}

fn publish_tree(build: Build, tree: &Tree, name: &str) -> TreeDigest {
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

const MODES: [Mode; 2] = [Mode::Overlay, Mode::Tmpfs];

#[test]
fn what_is_written_stays_in_the_layer_and_within_its_limit() {
    let site = Site::new();
    for mode in MODES {
        let (spec, other) = (site.spec(mode), site.spec(mode));
        let prepared = site.layers.prepare(&spec).unwrap();
        let beside = site.layers.prepare(&other).unwrap();
        assert_eq!(
            (prepared.reused, prepared.lost, prepared.size),
            (false, None, Some(SIZE))
        );
        fs::write(prepared.path.join("file"), "changed").unwrap();
        assert_eq!(fs::read_to_string(beside.path.join("file")).unwrap(), "below");
        let mut large = fs::File::create(prepared.path.join("large")).unwrap();
        let full = large.write_all(&vec![1; SIZE as usize + 1]).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC), "{mode:?}");
        fs::write(beside.path.join("room"), vec![1; 1 << 20]).unwrap();
        assert!(site.layers.room(&spec.id).unwrap().used > SIZE / 2);
        drop(large);
        for id in [&spec.id, &other.id] {
            site.layers.release(id, false).unwrap();
        }
    }
    site.nothing_is_left();
    let copies = fs::read_dir(site.store.images_dir()).unwrap().count();
    assert_eq!(copies, 1, "all layers of a tree share one copy of it");
}

#[test]
fn the_mount_says_its_tree_and_gives_nobody_rights() {
    let site = Site::new();
    let spec = site.spec(Mode::Tmpfs);
    let path = site.layers.prepare(&spec).unwrap().path;
    let mounts = mountinfo::of_self().unwrap();
    let mount = mounts.iter().find(|mount| mount.point == path).unwrap();
    assert_eq!(mount.source, format!("larder:{}", site.tree).as_bytes());
    let line = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = line
        .lines()
        .find(|line| line.contains(path.to_str().unwrap()))
        .unwrap()
        .to_owned();
    assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
    // Where it is the kernel's default, it is not shown.
    let default = |option: &str| fs::read_to_string(format!("/sys/module/overlay/parameters/{option}")).unwrap();
    for option in ["metacopy", "redirect_dir"] {
        let shown = line.contains(&format!("{option}=on"));
        assert!(shown || default(option).trim() == "Y", "{line}");
    }
    site.layers.release(&spec.id, false).unwrap();
}

#[test]
fn a_layer_can_belong_to_somebody_else() {
    let site = Site::new();
    let spec = LayerSpec {
        ids: Some((1234, 4321)),
        ..site.spec(Mode::Tmpfs)
    };
    let path = site.layers.prepare(&spec).unwrap().path;
    for name in ["", "file", "folder", "folder/other"] {
        let meta = path.join(name).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 4321), "{name}");
    }
    site.layers.release(&spec.id, false).unwrap();
}

#[test]
fn a_limit_grows_while_the_layer_is_in_use_and_never_shrinks() {
    let site = Site::new();
    for mode in MODES {
        let spec = site.spec(mode);
        let path = site.layers.prepare(&spec).unwrap().path;
        let open = fs::File::create(path.join("open")).unwrap();
        match site.layers.grow(&spec.id, 2 * SIZE) {
            Ok(()) => {
                fs::write(path.join("large"), vec![1; SIZE as usize + 1]).unwrap();
                let shrunk = site.layers.grow(&spec.id, SIZE);
                assert!(matches!(shrunk, Err(Error::Shrink { .. })), "{mode:?}");
            }
            // The kernel lets ext4 grow with this right only; where it was taken away, the error says so.
            Err(error) => {
                assert!(mode == Mode::Overlay && !has_sys_resource(), "{error}");
                assert!(error.to_string().contains("CAP_SYS_RESOURCE"), "{error}");
                let below = fs::read_to_string(path.join("file")).unwrap();
                assert_eq!(below, "below", "it stays usable");
            }
        }
        drop(open);
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

fn has_sys_resource() -> bool {
    use rustix::thread::{CapabilitySet, capabilities};
    capabilities(None)
        .unwrap()
        .effective
        .contains(CapabilitySet::SYS_RESOURCE)
}

#[test]
fn a_restart_mounts_nothing_anew_and_a_reboot_brings_the_disk_back() {
    let mut site = Site::new();
    let (disk, memory) = (site.spec(Mode::Overlay), site.spec(Mode::Tmpfs));
    for spec in [&disk, &memory] {
        let path = site.layers.prepare(spec).unwrap().path;
        fs::write(path.join("mine"), "mine").unwrap();
        fs::remove_file(path.join("folder/other")).unwrap();
    }
    let mounts = site.dir.mounts();
    site = site.restart();
    for spec in [&disk, &memory] {
        let prepared = site.layers.prepare(spec).unwrap();
        assert_eq!((prepared.reused, prepared.lost), (true, None));
        assert_eq!(fs::read_to_string(prepared.path.join("mine")).unwrap(), "mine");
    }
    assert_eq!(site.dir.mounts(), mounts);

    site = site.reboot();
    let prepared = site.layers.prepare(&disk).unwrap();
    assert_eq!((prepared.reused, prepared.lost), (false, None));
    assert_eq!(fs::read_to_string(prepared.path.join("mine")).unwrap(), "mine");
    assert!(!prepared.path.join("folder/other").exists());
    let prepared = site.layers.prepare(&memory).unwrap();
    assert_eq!(prepared.lost, Some(Lost::Reboot));
    assert!(!prepared.path.join("mine").exists() && prepared.path.join("folder/other").exists());
    for spec in [&disk, &memory] {
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

/// A process that holds something of a layer until it is dropped.
struct Holder(Child);

impl Holder {
    /// Runs a shell command that prints a line when it is ready, and then waits for the end of its input.
    fn start(command: &str) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// Binds a layer in a mount namespace of its own, as a pod's: it would not go with the agent's own mount.
fn bound_elsewhere(layer: &Path) -> String {
    let shown = layer.display();
    format!(
        "d=$(mktemp -d); unshare --mount --propagation private sh -c \
         'mount --bind {shown} '$d' && umount {shown} && echo ready && read _'; rmdir $d"
    )
}

#[test]
fn a_layer_in_use_is_not_released_and_its_user_is_named() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    let shown = path.display();
    for (command, word) in [
        (format!("exec 3<{shown}/file; echo ready; read _"), "sh"),
        (bound_elsewhere(&path), "mount"),
    ] {
        let holder = Holder::start(&command);
        let error = site.layers.release(&spec.id, false).unwrap_err();
        let Error::InUse { by, .. } = &error else {
            panic!("{error}")
        };
        assert!(by.contains(word), "{by}");
        assert_eq!(
            fs::read_to_string(path.join("file")).unwrap(),
            "below",
            "it stays usable"
        );
        drop(holder);
    }
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn patience_ends_with_a_detached_layer() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    let holder = Holder::start(&format!("cd {}; echo ready; read _", path.display()));
    assert!(matches!(site.layers.release(&spec.id, false), Err(Error::InUse { .. })));
    site.layers.release(&spec.id, true).unwrap();
    drop(holder);
    let start = std::time::Instant::now();
    while !site.dir.loop_devices().is_empty() && start.elapsed().as_secs() < 10 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    site.nothing_is_left();
}

#[test]
fn patience_never_ends_for_who_has_the_layer_mounted_himself() {
    let site = Site::new();
    // Without a file system of its own, its files would be removed under that one.
    let spec = LayerSpec {
        size: None,
        ..site.spec(Mode::Overlay)
    };
    let path = site.layers.prepare(&spec).unwrap().path;
    fs::write(path.join("new"), "new").unwrap();
    let holder = Holder::start(&bound_elsewhere(&path));
    let error = site.layers.release(&spec.id, true).unwrap_err();
    assert!(
        matches!(&error, Error::InUse { by, .. } if by.contains("mount")),
        "{error}"
    );
    assert_eq!(fs::read_to_string(path.join("new")).unwrap(), "new");
    drop(holder);
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

fn make_mutable(folder: &Path) {
    let done = Command::new("chattr").arg("-i").arg(folder).status().unwrap();
    assert!(done.success());
}

#[test]
fn what_is_written_where_a_layer_is_not_mounted_yet_is_kept_and_spoils_nothing() {
    let mut site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let prepared = site.layers.prepare(&spec).unwrap();
    assert_eq!(prepared.found, None);
    let path = prepared.path;
    fs::write(path.join("new"), "new").unwrap();
    site = site.reboot();
    // A pod that comes before the agent has the bare folder, and cannot take it for the layer.
    for refused in [fs::write(path.join("lost"), "one"), fs::create_dir(path.join("lost"))] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
    // But on a file system that does not know that.
    make_mutable(&path);
    fs::write(path.join("lost"), "one").unwrap();
    let prepared = site.layers.prepare(&spec).unwrap();
    let found = prepared.found.unwrap();
    assert_eq!(fs::read_to_string(found.join("lost")).unwrap(), "one");
    assert!(found.starts_with(site.root.join("found")), "{found:?}");
    assert_eq!(fs::read_to_string(path.join("new")).unwrap(), "new");
    assert!(!path.join("lost").exists());
    site = site.reboot();
    make_mutable(&path);
    fs::write(path.join("lost"), "two").unwrap();
    site.layers.release(&spec.id, false).unwrap();
    let kept: Vec<_> = fs::read_dir(site.root.join("found"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path().join("lost")).unwrap())
        .collect();
    assert!(kept.len() == 2 && kept.contains(&"two".to_owned()), "{kept:?}");
    site.nothing_is_left();
}

#[test]
fn a_layer_whose_record_cannot_be_read_is_released_by_its_id() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    site.layers.prepare(&spec).unwrap();
    let folder = site.root.join("layers").join(spec.id.as_str());
    fs::write(folder.join("layer.json"), "{\"version\":").unwrap();
    assert!(site.layers.record(&spec.id).is_err());
    assert_eq!(site.layers.list().unwrap().1.len(), 1);
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_layer_of_another_store_is_lost_and_not_silently_made_anew() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    site.layers.prepare(&spec).unwrap();
    let site = site.reboot();
    let Site {
        store,
        layers,
        dir,
        root,
        ..
    } = site;
    drop((store, layers));
    // The store was wiped; the layers' folder survived.
    fs::rename(&root, dir.path().join("old")).unwrap();
    let (store, layers) = open(&root);
    let tree = publish(&store, "base");
    fs::remove_dir(root.join("layers")).unwrap();
    fs::rename(dir.path().join("old/layers"), root.join("layers")).unwrap();
    let error = layers.prepare(&LayerSpec { tree, ..spec.clone() }).unwrap_err();
    assert!(matches!(error, Error::DataLost { .. }), "{error}");
    layers.release(&spec.id, false).unwrap();
}

#[test]
fn rounds_of_making_and_releasing_leave_nothing() {
    let site = Site::new();
    for round in 0..50 {
        let spec = site.spec(MODES[round % 2]);
        let path = site.layers.prepare(&spec).unwrap().path;
        fs::write(path.join("new"), "new").unwrap();
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

#[test]
fn what_a_kill_leaves_half_made_is_finished_or_cleaned() {
    let mut site = Site::new();
    for cut in ["overlay", "disk", "upper", "image"] {
        let spec = site.spec(Mode::Overlay);
        let path = site.layers.prepare(&spec).unwrap().path;
        let folder = site.root.join("layers").join(spec.id.as_str());
        // The states in which a kill between two steps leaves a layer that was never usable.
        rustix::mount::unmount(&path, rustix::mount::UnmountFlags::empty()).unwrap();
        if cut != "overlay" {
            let record = fs::read_to_string(folder.join("layer.json")).unwrap();
            fs::write(folder.join("layer.json"), record.replace("\"Made\"", "\"Making\"")).unwrap();
        }
        if cut == "upper" {
            fs::remove_dir_all(folder.join("disk/upper")).unwrap();
        }
        if cut == "image" {
            rustix::mount::unmount(folder.join("disk"), rustix::mount::UnmountFlags::empty()).unwrap();
            fs::OpenOptions::new()
                .write(true)
                .open(folder.join("disk.img"))
                .unwrap()
                .set_len(100)
                .unwrap();
        }
        site = site.restart();
        let prepared = site.layers.prepare(&spec).unwrap();
        assert_eq!(
            fs::read_to_string(prepared.path.join("file")).unwrap(),
            "below",
            "{cut}"
        );
        site.layers.release(&spec.id, false).unwrap();
        site.nothing_is_left();
    }
}

#[test]
fn odd_characters_in_the_stores_path_mean_nothing() {
    let site = Site::at("a,b:c\\d e=f");
    for mode in MODES {
        let spec = site.spec(mode);
        let path = site.layers.prepare(&spec).unwrap().path;
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "below");
        fs::write(path.join("new"), "new").unwrap();
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

#[test]
fn mounts_of_another_store_hold_nothing_here() {
    let here = Site::new();
    let there = here.beside();
    let spec = there.spec(Mode::Tmpfs);
    there.layers.prepare(&spec).unwrap();
    assert!(there.is_mounted(&there.tree));
    assert!(
        !here.is_mounted(&there.tree),
        "a tree that this store never had would stop its collections"
    );
    there.layers.release(&spec.id, false).unwrap();
    // Nor those of the same tree.
    let both = [&here, &there].map(|site| {
        let build = site.store.build().unwrap();
        let mut tree = Tree::new(Meta::default());
        let blob = build.put_bytes(here.store.id().as_bytes()).unwrap();
        let kind = LeafKind::File {
            digest: blob.digest,
            size: blob.size,
        };
        let meta = Meta::default();
        tree.add_leaf(Tree::ROOT, *b"of both", Leaf { meta, kind }).unwrap();
        let tree = publish_tree(build, &tree.finish().unwrap(), "both");
        let spec = LayerSpec {
            tree,
            ..site.spec(Mode::Tmpfs)
        };
        site.layers.prepare(&spec).unwrap();
        spec
    });
    assert_eq!(both[0].tree, both[1].tree);
    here.layers.release(&both[0].id, false).unwrap();
    here.layers.unmount_unused(Duration::ZERO).unwrap();
    here.nothing_is_left();
    assert!(there.is_mounted(&both[1].tree));
    there.layers.release(&both[1].id, false).unwrap();
    there.nothing_is_left();
}

#[test]
fn a_collection_keeps_the_tree_of_a_layer_and_takes_it_when_the_layer_is_gone() {
    let site = Site::new();
    let spec = site.spec(Mode::Tmpfs);
    let path = site.layers.prepare(&spec).unwrap().path;
    site.store.forget(&RefName::new("ns", "base").unwrap()).unwrap();
    let policy = retention::Policy {
        max_age: Some(std::time::Duration::from_nanos(1)),
        max_size: Some(0),
        min_free: None,
        min_copies: 1,
        grace: std::time::Duration::ZERO,
    };
    let later = || SystemTime::now() + std::time::Duration::from_secs(3600);
    assert!(site.is_mounted(&site.tree));
    let report = site.store.collect(&policy, &site.layers, false, later()).unwrap();
    assert_eq!(report.deleted_blobs, 0);
    // What the mount stands on is there too, also after a restart that knows the layer from the disk alone.
    let site = site.restart();
    let report = site.store.collect(&policy, &site.layers, false, later()).unwrap();
    assert_eq!(report.deleted_blobs, 0);
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "below");
    site.layers.release(&spec.id, false).unwrap();
    site.layers.unmount_unused(Duration::ZERO).unwrap();
    let report = site.store.collect(&policy, &site.layers, false, later()).unwrap();
    assert_eq!(report.deleted_blobs, 3);
    assert_eq!(fs::read_dir(site.store.images_dir()).unwrap().count(), 0);
}
