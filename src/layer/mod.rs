//! Writable layers over stored trees: a shared read-only copy of the tree below, the layer's own changes above, merged
//! by overlayfs.
//!
//! What this module promises:
//! - a layer's changes are mounted at most once at any time, whatever happened to the process before (one lock per
//!   layer, and one process per store);
//! - each operation can be repeated: it finishes what an earlier one, killed at any step, began;
//! - opening mounts and unmounts nothing: what is mounted stays, and counts as in use;
//! - data goes only when a layer is released, and not while a mount or a process uses it.
//!
//! On disk, below the store's root:
//!
//! ```text
//! images/<tree>[-u<uid>-g<gid>].tree/   the copied tree (lower.rs)
//! layers/<id>/layer.json                what the layer is (record.rs): written first, removed last
//! layers/<id>/upper/, work/             its changes, without a limit
//! layers/<id>/disk.img, disk/           or with one: an ext4 of that size, holding upper/ and work/ (disk.rs);
//!                                       for a layer in memory, a tmpfs at disk/
//! mnt/<id>/                             the merged view
//! ```
//!
//! All calls block.

pub(crate) mod descent;
mod disk;
mod error;
mod inuse;
mod life;
mod lock;
mod loopdev;
mod lower;
mod mount;
pub mod mountinfo;
mod record;
mod upper;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub use error::Error;
use error::IoContext;
use lock::{Locks, relock};
pub(crate) use lower::{own, unescape};
pub use record::{LayerId, LayerOwner, LayerRecord, Lost, Mode, Stage};
pub use upper::Upper;

use crate::store::{Held, Hold, Holders, Problem, Store, TreeDigest};

/// Mountinfo's source of every mount that shows a tree: this, and the tree's digest.
pub const SOURCE_PREFIX: &str = "larder:";

/// What holds for every layer of a node.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The limit in bytes of a layer that declares none; `None`: such a layer has none but the disk's, or for a tmpfs
    /// the memory's.
    pub default_size: Option<u64>,
    /// Let setuid and setgid bits and file capabilities count in layers. Off, a file in a layer gives nobody another
    /// user's rights.
    pub allow_suid: bool,
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
    /// One maker per copied tree.
    copies: Locks<PathBuf>,
    /// The trees of the layers, held as long as these exist.
    holds: Mutex<HashMap<LayerId, Hold>>,
    /// How many read a layer's upper just now.
    readers: Mutex<HashMap<LayerId, usize>>,
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
            copies: Locks::default(),
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
    /// its upper is mounted in a mount namespace that this process did not mount it in.
    pub fn prepare(&self, spec: &LayerSpec) -> Result<Prepared, Error> {
        self.0.locks.with(&spec.id, || self.0.prepare(spec))
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
    /// With `detach` (the caller's patience has ended) mounts and processes don't count: the layer is detached, and
    /// whoever still uses it finds it emptied.
    pub fn release(&self, id: &LayerId, detach: bool) -> Result<(), Error> {
        self.0.locks.with(id, || self.0.release(id, detach))
    }

    /// Bytes that a layer's changes take: on its own file system if it has one, or else the blocks of its files.
    pub fn used_bytes(&self, id: &LayerId) -> Result<u64, Error> {
        self.0.used_bytes(id)
    }

    /// Every layer that has a record, whatever its stage, and what in the folder of layers cannot be understood.
    ///
    /// A layer at [`Stage::Releasing`] waits for a call of [`Layers::release`] to finish.
    pub fn list(&self) -> Result<(Vec<LayerRecord>, Vec<Problem>), Error> {
        let folder = self.0.root.join("layers");
        let mut records = Vec::new();
        let mut problems = Vec::new();
        for entry in fs::read_dir(&folder).context("list", &folder)? {
            let entry = entry.context("list", &folder)?;
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
            match LayerRecord::read(&path, &id) {
                Ok(Some(record)) => records.push(record),
                Ok(None) if has_no_data(&path)? => {}
                Ok(None) => problem("the layer has data and no layer.json: release it to give them up".to_owned()),
                Err(error) => problem(error.to_string()),
            }
        }
        records.sort_by(|a, b| a.id.cmp(&b.id));
        problems.sort_by(|a, b| a.path.cmp(&b.path));
        Ok((records, problems))
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

impl Holders for Layers {
    /// The trees of all layers, and those that mounts of this namespace show.
    fn held(&self) -> Result<Held, crate::store::Error> {
        let io = |path: &str, source| crate::store::Error::Io {
            action: "read",
            path: path.into(),
            source,
        };
        let (records, unreadable) = self.list().map_err(|error| match error {
            Error::Store(error) => error,
            Error::Io { action, path, source } => crate::store::Error::Io { action, path, source },
            other => io("layers", io::Error::other(other.to_string())),
        })?;
        let mut trees: Vec<TreeDigest> = records.iter().map(|record| record.tree).collect();
        let mounts = mountinfo::of_self().map_err(|e| io("/proc/self/mountinfo", e))?;
        let images = self.0.store.images_dir();
        let images = fs::canonicalize(&images).unwrap_or(images);
        trees.extend(
            mounts
                .iter()
                .filter(|mount| !is_elsewhere(mount, &images))
                .filter_map(mounted_tree),
        );
        trees.sort();
        trees.dedup();
        Ok(Held { trees, unreadable })
    }
}

/// Whether a mount surely stands on another store's copies: each of its lower folders is named, and none lies below
/// `images`. A mount that does not say where it stands counts as this store's.
fn is_elsewhere(mount: &mountinfo::Mount, images: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let options = mount.options.split(|byte| *byte == b',');
    let lowers: Vec<&Path> = options
        .filter_map(|option| {
            option
                .strip_prefix(b"lowerdir+=")
                .or_else(|| option.strip_prefix(b"lowerdir="))
        })
        .map(|lower| Path::new(std::ffi::OsStr::from_bytes(lower)))
        .collect();
    // A path by descriptor, or one that a comma cut, names nothing.
    let named = |lower: &&Path| lower.parent().is_some_and(|folder| folder.ends_with("images"));
    // What a comma in our own path cut may look like another store's; uncut, it is in the options all the same.
    let ours = images.as_os_str().as_bytes();
    let says_ours = mount.options.windows(ours.len()).any(|part| part == ours);
    !lowers.is_empty() && !says_ours && lowers.iter().all(named)
}

/// The tree that a mount shows.
fn mounted_tree(mount: &mountinfo::Mount) -> Option<TreeDigest> {
    std::str::from_utf8(&mount.source)
        .ok()?
        .strip_prefix(SOURCE_PREFIX)?
        .parse()
        .ok()
}

impl Inner {
    fn paths(&self, id: &LayerId) -> Paths {
        let folder = self.root.join("layers").join(id.as_str());
        Paths {
            image: folder.join("disk.img"),
            disk: folder.join("disk"),
            mount: self.root.join("mnt").join(id.as_str()),
            folder,
        }
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
    /// The folder that holds `upper` and `work`.
    fn changes(&self, record: &LayerRecord) -> &Path {
        if has_disk(record) { &self.disk } else { &self.folder }
    }
}

/// Does the layer have a file system of its own?
fn has_disk(record: &LayerRecord) -> bool {
    record.mode == Mode::Tmpfs || record.size.is_some()
}

fn has_no_data(folder: &Path) -> Result<bool, Error> {
    for entry in fs::read_dir(folder).context("list", folder)? {
        let entry = entry.context("list", folder)?;
        if entry.file_name() != record::TEMPORARY_NAME {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes a folder that only root enters; one that is there already is good.
fn make_private(folder: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", folder, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(options: &str) -> mountinfo::Mount {
        mountinfo::Mount {
            id: 2,
            parent: 1,
            dev: (0, 50),
            root: "/".into(),
            point: "/m".into(),
            flags: "rw".into(),
            shared: None,
            master: None,
            fs_type: "overlay".into(),
            source: b"larder:x".to_vec(),
            options: options.into(),
        }
    }

    #[test]
    fn only_a_mount_that_surely_stands_on_another_store_is_elsewhere() {
        for (options, images, elsewhere) in [
            ("rw,lowerdir+=/s/images/a.tree,upperdir=/u", "/s/images", false),
            ("rw,lowerdir+=/other/images/a.tree,upperdir=/u", "/s/images", true),
            ("rw,lowerdir+=/proc/self/fd/7", "/s/images", false),
            ("rw", "/s/images", false),
            // A comma in the path of the store itself.
            ("rw,lowerdir+=/a,b/images/a.tree", "/a,b/images", false),
            (
                "rw,lowerdir+=/x/images/y,z/images/a.tree",
                "/x/images/y,z/images",
                false,
            ),
        ] {
            assert_eq!(is_elsewhere(&over(options), Path::new(images)), elsewhere, "{options}");
        }
    }
}
