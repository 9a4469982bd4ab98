//! Writable layers over stored trees: a shared read-only copy of the tree below, the layer's own changes above, merged
//! by overlayfs.
//!
//! What this module promises:
//! - a layer's changes are mounted at most once at any time, whatever happened to the process before (one lock per
//!   layer, and one process per store);
//! - each operation can be repeated: it finishes what an earlier one, killed at any step, began;
//! - opening mounts and unmounts nothing: what is mounted stays, and counts as in use;
//! - all layers of a tree share one mount of its image, and so the memory that its names and contents take;
//! - data goes only when a layer is released, and not while a mount or a process uses it.
//!
//! On disk, below the store's root:
//!
//! ```text
//! images/<tree>[-u<uid>-g<gid>].erofs   the tree as an image (image.rs, erofs/), or where the kernel cannot mount that
//! images/<tree>[-u<uid>-g<gid>].tree/   the copied tree (lower.rs)
//! layers/<id>/layer.json                what the layer is (record.rs): written first, removed last
//! layers/<id>/upper/, work/             its changes, without a limit
//! layers/<id>/disk.img, disk/           or with one: an ext4 of that size, holding upper/ and work/ (disk.rs, check.rs);
//!                                       for a layer in memory, a tmpfs at disk/
//! mnt/<id>/                             the merged view
//! mnt/images/, mnt/trees/               what layers of one tree share (shared.rs)
//! ```
//!
//! All calls block.

mod check;
mod copies;
pub(crate) mod descent;
mod disk;
mod erofs;
mod error;
mod image;
mod inuse;
mod life;
mod lock;
mod loopdev;
mod lower;
mod mount;
mod mounted;
pub mod mountinfo;
mod record;
mod release;
mod road;
mod shared;
mod upper;
mod used;
mod verify;
pub(crate) mod xattrs;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

pub use error::Error;
use error::IoContext;
use lock::{Locks, relock};
pub(crate) use lower::{own, unescape};
pub use record::{LayerId, LayerOwner, LayerRecord, Lost, Mode, OwnerKind, Stage};
pub use road::{Found, Road};
pub use upper::Upper;
pub use used::Room;
pub use verify::{BadImage, ImageVerification};

use crate::store::{Held, HeldTree, Hold, Holders, Problem, Store, TreeDigest};

/// Mountinfo's source of every mount that shows a tree: this, and the tree's digest.
pub const SOURCE_PREFIX: &str = "larder:";

/// A disk that was full is so until it has this much more than is reserved, or it would be told again and again.
const HARDLY: u64 = 256 << 20;

/// How often, and after what pause, something busy that nobody is seen to use is tried again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// What holds for every layer of a node.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The limit in bytes of a layer that declares none; `None`: such a layer has none but the disk's, or for a tmpfs
    /// the memory's.
    pub default_size: Option<u64>,
    /// Let setuid and setgid bits and file capabilities count in layers. Off, a file in a layer gives nobody another
    /// user's rights.
    pub allow_suid: bool,
    /// The road to take; `None`: the first that goes to its end, found when it is needed first.
    pub road: Option<Road>,
}

/// What a layer should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpec {
    pub id: LayerId,
    pub owner: LayerOwner,
    pub tree: TreeDigest,
    pub mode: Mode,
    /// The limit in bytes, rounded down to a multiple of 4096; `None`: [`Options::default_size`]. Counts when the layer
    /// is made; later, [`Layers::grow`] changes it.
    pub size: Option<u64>,
    /// The uid and gid that every entry of the tree gets in this layer.
    pub ids: Option<(u32, u32)>,
}

/// A layer that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Where the layer is mounted.
    pub path: PathBuf,
    /// It was mounted already.
    pub reused: bool,
    /// What the layer lost since it was made; told each time.
    pub lost: Option<Lost>,
    /// The limit in force, in bytes.
    pub size: Option<u64>,
    /// Where files are now that were at [`Prepared::path`] although nothing was mounted there. Who wrote them has that
    /// folder and not the layer, until it is started again.
    pub found: Option<PathBuf>,
    /// What `e2fsck` said if the layer's own file system had had an error: it is mended, and files in it may be lost.
    pub checked: Option<String>,
}

/// The layers of a store; clones share them.
#[derive(Clone)]
pub struct Layers(Arc<Inner>);

struct Inner {
    store: Store,
    options: Options,
    /// The store's root as mountinfo shows it: without symlinks.
    root: PathBuf,
    /// One mount per upper, always: every change of a layer is made under its lock.
    locks: Locks<LayerId>,
    owners: Locks<LayerOwner>,
    /// One at a time makes, mounts and unmounts what the layers of a tree share.
    trees: Locks<String>,
    /// Since when nobody has been seen to use it.
    unused: Mutex<HashMap<String, Instant>>,
    road: OnceLock<Found>,
    trying: Mutex<()>,
    /// The trees of the layers, held as long as these exist.
    holds: Mutex<HashMap<LayerId, Hold>>,
    /// How many read a layer's upper just now.
    readers: Mutex<HashMap<LayerId, usize>>,
}

/// How a layer is just now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Where it is mounted, or would be.
    pub path: PathBuf,
    /// In this process's mount namespace.
    pub mounted: bool,
    /// [`Room::used`]; `None` while its file system is not mounted.
    pub used: Option<u64>,
    /// As [`Room::stopped`].
    pub stopped: bool,
}

/// Where the parts of a layer are.
struct Paths {
    folder: PathBuf,
    image: PathBuf,
    disk: PathBuf,
    mount: PathBuf,
}

impl Layers {
    /// Opens the layers of a store: reads their records, and holds their trees. Mounts and unmounts nothing.
    ///
    /// A record that cannot be read, and one whose tree is not in the store any more, is no error here:
    /// [`Layers::list`] names the first, [`Layers::prepare`] fails for the second.
    pub fn open(store: Store, options: Options) -> Result<Layers, Error> {
        let root = fs::canonicalize(store.root()).context("resolve", store.root())?;
        for folder in ["layers", "mnt"] {
            make_private(&root.join(folder))?;
        }
        let layers = Layers(Arc::new(Inner {
            store,
            options,
            root,
            locks: Locks::default(),
            owners: Locks::default(),
            trees: Locks::default(),
            unused: Mutex::default(),
            road: OnceLock::new(),
            trying: Mutex::default(),
            holds: Mutex::default(),
            readers: Mutex::default(),
        }));
        for record in layers.list()?.0 {
            match layers.0.hold(&record.id, &record.tree) {
                Ok(()) | Err(Error::Store(crate::store::Error::MissingManifest { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(layers)
    }

    /// The store that the layers are over.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Where a layer is mounted when it is prepared.
    pub fn path(&self, id: &LayerId) -> PathBuf {
        self.0.paths(id).mount
    }

    /// Makes the layer usable, and says where it is mounted.
    ///
    /// Can be repeated; finishes what an earlier call, killed at any step, began. After a restart of the node, a layer
    /// on the disk comes back with its data, one in memory empty and with [`Prepared::lost`].
    ///
    /// Fails with [`Error::DataLost`] if the layer was made in another store or its data is gone, with
    /// [`Error::Immutable`] if the layer was made with another owner, tree, mode or ids, and with [`Error::InUse`] if
    /// its upper is mounted in a mount namespace that this process did not mount it in. A layer whose own file system
    /// takes no writes any more after an error is checked and mounted anew, or if somebody uses it [`Error::Stopped`].
    pub fn prepare(&self, spec: &LayerSpec) -> Result<Prepared, Error> {
        self.0.locks.with(&spec.id, || self.0.prepare(spec))
    }

    /// Runs `work` while no other call of this with the same owner does: to look for a layer of that owner, and to prepare
    /// one if there is none.
    pub fn with_owner<T>(&self, owner: &LayerOwner, work: impl FnOnce() -> T) -> T {
        self.0.owners.with(owner, work)
    }

    /// Gives a prepared layer a larger limit, in bytes, while it is in use. The same size is no error, a smaller one
    /// is [`Error::Shrink`].
    pub fn grow(&self, id: &LayerId, size: u64) -> Result<(), Error> {
        self.0.locks.with(id, || self.0.grow(id, size))
    }

    /// Unmounts a layer and removes all its data. Repeating it finishes an interrupted one; a layer that does not
    /// exist is no error.
    ///
    /// Fails with [`Error::InUse`] while another mount, a process or a snapshot uses the layer; its data then stays.
    /// With `detach` (the caller's patience has ended) processes that see this mount of it don't count: the layer is
    /// detached, and those find it emptied. Who mounted it elsewhere, as a container does, is waited for all the same.
    pub fn release(&self, id: &LayerId, detach: bool) -> Result<(), Error> {
        self.0.locks.with(id, || self.0.release(id, detach))
    }

    /// Unmounts a layer on disk that nobody uses; it stays, to be prepared again. Fails as [`Layers::release`] does.
    pub fn unmount(&self, id: &LayerId) -> Result<(), Error> {
        self.0.locks.with(id, || self.0.unmount(id))
    }

    /// How full a layer is.
    pub fn room(&self, id: &LayerId) -> Result<Room, Error> {
        let record = self.record(id)?.ok_or_else(|| Error::NotFound { id: id.clone() })?;
        let room = used::room(&self.0.paths(id), &record)?;
        let lacks = |bytes| {
            let reserve = self.0.store.check_room(bytes);
            record.mode == Mode::Overlay && reserve.is_err_and(|error| error.is_disk_full())
        };
        Ok(Room {
            disk_full: lacks(0),
            disk_short: lacks(HARDLY),
            ..room
        })
    }

    /// How layers come by their trees on this node. Found out once.
    pub fn road(&self) -> Result<&Found, Error> {
        self.0.found()
    }

    /// The road, if it is known already: nothing is tried.
    pub fn known_road(&self) -> Option<Road> {
        self.0.road.get().map(|found| found.road)
    }

    /// Unmounts what layers of a tree share where no layer needs it and nobody else shows it, and that for so long as
    /// this process has looked. Returns how many mounts went. Until then, the tree is in use for a collection.
    pub fn unmount_unused(&self, for_at_least: Duration) -> Result<usize, Error> {
        self.0.unmount_unused(for_at_least)
    }

    /// Compares every image of a tree with what the tree gives, byte by byte, and replaces those that differ. Likewise every
    /// copy of a tree (the road [`Road::Copy`]), entry by entry; one that differs is removed, to be made again when it is
    /// needed. Takes about as long as making images and reading copies; layers that are prepared meanwhile wait for the image
    /// or copy of their tree only. `rate`: bytes per second, of images that are made and of what is read, in the mean: an
    /// image is made in one go.
    ///
    /// After `cancel` is set it ends soon, at the latest when the image under way is made.
    pub fn verify_images(&self, rate: Option<NonZeroU64>, cancel: &AtomicBool) -> Result<ImageVerification, Error> {
        self.0.verify_images(rate, cancel)
    }

    /// As [`list`], of this store. Its folder of layers was made when they were opened: that it is not there is an error.
    pub fn list(&self) -> Result<(Vec<LayerRecord>, Vec<Problem>), Error> {
        list_in(&self.0.root.join("layers"))
    }

    /// What is recorded of a layer; `None` when it has no record.
    pub fn record(&self, id: &LayerId) -> Result<Option<LayerRecord>, Error> {
        LayerRecord::read(&self.0.paths(id).folder, id)
    }

    /// Opens what a layer changed, for reading; the layer is not released meanwhile.
    ///
    /// Fails with [`Error::NotFound`], and with [`Error::NotMounted`] unless the layer is prepared.
    pub fn upper(&self, id: &LayerId) -> Result<Upper, Error> {
        self.0.locks.with(id, || Upper::open(&self.0, id))
    }
}

/// Every layer that has a record in the store at `root`, whatever its stage, and what in the folder of layers cannot be
/// understood. Needs no lock. A store that never had layers need not have the folder.
///
/// A layer at [`Stage::Releasing`] waits for a call of [`Layers::release`] to finish.
pub fn list(root: &Path) -> Result<(Vec<LayerRecord>, Vec<Problem>), Error> {
    let folder = root.join("layers");
    match fs::symlink_metadata(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((Vec::new(), Vec::new())),
        _ => list_in(&folder),
    }
}

fn list_in(folder: &Path) -> Result<(Vec<LayerRecord>, Vec<Problem>), Error> {
    let mut records = Vec::new();
    let mut problems = Vec::new();
    for entry in fs::read_dir(folder).context("list", folder)? {
        let entry = entry.context("list", folder)?;
        let path = entry.path();
        let mut problem = |message: String| {
            problems.push(Problem {
                path: path.display().to_string(),
                message,
            });
        };
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<LayerId>().ok()) else {
            problem("not a layer's folder: move it away".to_owned());
            continue;
        };
        let mut found = LayerRecord::read(&path, &id);
        if matches!(found, Ok(None)) {
            if record::has_no_data(&path)? {
                continue;
            }
            // It may have been made between the two looks.
            found = LayerRecord::read(&path, &id);
        }
        match found {
            Ok(Some(record)) => records.push(record),
            Ok(None) => problem("the layer has data and no layer.json: release it to give them up".to_owned()),
            Err(error) => problem(error.to_string()),
        }
    }
    records.sort_by(|a, b| a.id.cmp(&b.id));
    problems.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((records, problems))
}

/// How a layer of the store at `root` is just now. Needs no lock.
pub fn look(root: &Path, record: &LayerRecord) -> Result<Seen, Error> {
    let root = fs::canonicalize(root).context("resolve", root)?;
    let paths = Paths::of(&root, &record.id);
    let mounts = life::read_mounts()?;
    let is_up = |point: &Path| life::top(&mounts, point).is_some();
    let counted = record.stage == Stage::Made && (!has_disk(record) || is_up(&paths.disk));
    let room = counted.then(|| used::room(&paths, record)).transpose()?;
    Ok(Seen {
        mounted: is_up(&paths.mount),
        used: room.map(|room| room.used),
        stopped: room.is_some_and(|room| room.stopped),
        path: paths.mount,
    })
}

impl Holders for Layers {
    /// The trees of all layers, and those that mounts of this namespace show.
    fn held(&self) -> Result<Held, crate::store::Error> {
        let (records, unreadable) = self.list()?;
        let layers = records
            .iter()
            .map(|record| HeldTree::by_layer(record.tree, &record.owner));
        let mut trees: Vec<HeldTree> = layers.collect();
        let mounts = life::read_mounts()?;
        let ours = mounts
            .iter()
            .filter(|mount| !mounted::is_elsewhere(mount, &self.0.root));
        let shown = |mount: &mountinfo::Mount| Some(HeldTree::by_mount(mounted::tree(mount)?, &mount.point));
        trees.extend(ours.filter_map(shown));
        let images = self.0.mounted_images(&mounts).into_iter();
        trees.extend(images.map(|(tree, point)| HeldTree::by_mount(tree, point)));
        Ok(Held { trees, unreadable })
    }
}

impl Inner {
    fn paths(&self, id: &LayerId) -> Paths {
        Paths::of(&self.root, id)
    }

    fn road(&self) -> Result<Road, Error> {
        Ok(self.found()?.road)
    }

    fn found(&self) -> Result<&Found, Error> {
        if let Some(found) = self.road.get() {
            return Ok(found);
        }
        // One at a time: they use one place.
        let _one = relock(&self.trying);
        if let Some(found) = self.road.get() {
            return Ok(found);
        }
        let found = road::find(&self.store, &self.root.join("mnt"), self.options.road)?;
        Ok(self.road.get_or_init(|| found))
    }

    fn hold(&self, id: &LayerId, tree: &TreeDigest) -> Result<(), Error> {
        if !relock(&self.holds).contains_key(id) {
            let hold = self.store.hold(tree)?;
            relock(&self.holds).insert(id.clone(), hold);
        }
        Ok(())
    }
}

impl Paths {
    fn of(root: &Path, id: &LayerId) -> Paths {
        let folder = root.join("layers").join(id.as_str());
        Paths {
            image: folder.join("disk.img"),
            disk: folder.join("disk"),
            mount: root.join("mnt").join(id.as_str()),
            folder,
        }
    }

    /// The folder that holds `upper` and `work`.
    fn changes(&self, record: &LayerRecord) -> &Path {
        if has_disk(record) { &self.disk } else { &self.folder }
    }
}

/// Does the layer have a file system of its own?
fn has_disk(record: &LayerRecord) -> bool {
    record.mode == Mode::Tmpfs || record.size.is_some()
}

/// Makes a folder that only root enters; one that is there already is good.
/// Makes the folder that a layer is mounted at. While nothing is, nobody writes into it, where its file system knows that
/// (chattr(1) `+i`): who comes before the layer is back must not take the folder for the layer.
fn make_point(folder: &Path) -> Result<(), Error> {
    make_private(folder)?;
    set_fixed(folder, true);
    Ok(())
}

/// Lets nobody change what is in a folder, or everybody again. Without a word where that cannot be had: it is a help, and
/// nothing relies on it.
fn set_fixed(folder: &Path, fixed: bool) {
    use rustix::fs::{IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open(folder, flags, Mode::empty()) else {
        return;
    };
    if let Ok(mut flags) = ioctl_getflags(&folder)
        && flags.contains(IFlags::IMMUTABLE) != fixed
    {
        flags.set(IFlags::IMMUTABLE, fixed);
        let _ = ioctl_setflags(&folder, flags);
    }
}

fn make_private(folder: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", folder, e)),
        _ => Ok(()),
    }
}
