//! The store's folder: its layout, its identity, the one-writer lock.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};
use serde::{Deserialize, Serialize};

use super::disk::{self, Step};
use super::error::is_full;
use super::fair::FairLock;
use super::files::{self, lock};
use super::leases::Leases;
use super::{Digest, Error, Options, TreeDigest, remove};

/// The version of the layout. A program refuses a store of a later one.
const FORMAT: u32 = 1;
const CONFIG: &str = "larder.json";
/// Largest `larder.json` that is read, in bytes.
const MAX_CONFIG: u64 = 64 << 10;
const LOCK: &str = "lock";
pub(super) const STAGING: &str = "staging";
pub(super) const OBJECTS: &str = "objects";
pub(super) const MANIFESTS: &str = "manifests";
pub(super) const IMAGES: &str = "images";
pub(super) const REFS: &str = "refs";
/// See `cache.rs`.
pub(super) const CACHE: &str = "cache";
pub(super) const QUARANTINE: &str = "quarantine";
/// What runs leave for the next one; the agent has a file of its own there.
pub(super) const RUNS: &str = "runs";
/// A file that only keeps some blocks: see [`Inner::ensure_spare`].
pub(super) const SPARE: &str = "spare";
/// Everything that may be in a store's folder before `larder.json` is, or beside it.
const KNOWN: &[&str] = &[
    CONFIG,
    LOCK,
    SPARE,
    STAGING,
    OBJECTS,
    MANIFESTS,
    IMAGES,
    REFS,
    "layers",
    "mnt",
    CACHE,
    RUNS,
    QUARANTINE,
    "node.json",
    "control.sock",
    "lost+found",
];

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    format: u32,
    id: String,
}

/// Objects whose digest begins with one byte.
#[derive(Default)]
pub(super) struct Shard {
    /// What the shard holds, once it was counted.
    pub counted: Option<Count>,
    /// The blob that is being removed (see `leaving.rs`).
    pub leaving: Option<Digest>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub blobs: u64,
    pub bytes: u64,
}

impl Count {
    pub fn add(&mut self, other: Count) {
        self.blobs += other.blobs;
        self.bytes += other.bytes;
    }
}

/// A store's folder, and what reading it takes.
pub(super) struct Folder {
    pub root: PathBuf,
    /// The root folder; all paths below are relative to it.
    pub dir: OwnedFd,
    pub id: String,
}

impl Folder {
    /// Without the lock, and without any change. Fails with [`Error::NoStore`] if there is none.
    pub fn open(root: &Path) -> Result<Folder, Error> {
        let none = || Error::NoStore { root: root.to_owned() };
        let dir = match disk::open_root(root) {
            Err(rustix::io::Errno::NOENT) => return Err(none()),
            other => other.map_err(|e| Error::io("open", root, e))?,
        };
        refuse_strangers(root, &dir)?;
        let config = read_config(root)?.ok_or_else(none)?;
        Ok(Folder {
            root: root.to_owned(),
            dir,
            id: config.id,
        })
    }

    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }
}

/// An open store.
pub(super) struct Inner {
    pub folder: Arc<Folder>,
    pub options: Options,
    /// One lock per first byte of a digest. A put holds it while it looks for its blob.
    pub shards: Vec<Mutex<Shard>>,
    pub leases: Leases,
    /// A ref is changed under the lock of its name's hash.
    pub ref_locks: Vec<Mutex<()>>,
    /// Held by the running collection, and by who reads all manifests as one.
    pub collecting: FairLock,
    /// Held by the running verification.
    pub verifying: FairLock,
    /// How many blobs were quarantined since the store was opened. Held for writing while one is moved, for reading
    /// while a publish, having seen that none of its blobs was, names its manifest and its ref.
    moved: RwLock<u64>,
    next: AtomicU64,
    /// The kernel drops the lock with the descriptor, so also when the process dies.
    _lock: File,
}

impl Inner {
    pub fn open(root: &Path, options: Options) -> Result<Inner, Error> {
        disk::mkdir_all(Step::RootDir, root).map_err(|e| Error::io("create", root, e))?;
        let dir = disk::open_root(root).map_err(|e| Error::io("open", root, e))?;
        refuse_strangers(root, &dir)?;
        let lock = take_lock(root, &dir)?;
        let id = match read_config(root)? {
            Some(config) => config.id,
            None => create(root, &dir)?,
        };
        let root = root.to_owned();
        let store = Inner {
            folder: Arc::new(Folder { root, dir, id }),
            options,
            shards: (0..256).map(|_| Mutex::default()).collect(),
            leases: Leases::default(),
            ref_locks: (0..64).map(|_| Mutex::default()).collect(),
            collecting: FairLock::default(),
            verifying: FairLock::default(),
            moved: RwLock::default(),
            next: AtomicU64::new(1),
            _lock: lock,
        };
        store.empty_staging()?;
        store.ensure_spare()?;
        Ok(store)
    }

    /// What builds and collections of a process that is gone have left. Nobody else writes here: we hold the lock.
    fn empty_staging(&self) -> Result<(), Error> {
        let error = |e| Error::io("empty", self.path(STAGING), e);
        files::ensure_dir(Step::StagingDir, &self.dir, STAGING).map_err(error)?;
        let staging = files::open_dir(&self.dir, STAGING).map_err(error)?;
        for (name, _) in files::names(&staging).map_err(error)? {
            remove::remove_tree(&staging, name.as_c_str()).map_err(error)?;
        }
        Ok(())
    }

    /// A name below `staging/` that nobody else uses.
    pub fn staging_name(&self, what: &str) -> String {
        format!("{STAGING}/{what}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// How many blobs were quarantined; while the guard lives, no other is.
    pub fn not_moving(&self) -> RwLockReadGuard<'_, u64> {
        self.moved.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// To count a blob that is quarantined.
    pub fn moved_away(&self) -> RwLockWriteGuard<'_, u64> {
        RwLock::write(&self.moved).unwrap_or_else(PoisonError::into_inner)
    }

    pub fn shard(&self, digest: &Digest) -> &Mutex<Shard> {
        &self.shards[usize::from(digest.as_bytes()[0])]
    }

    /// The error of a write, told apart from a full disk.
    pub fn write_error(&self, path: impl AsRef<Path>, needed: u64, source: impl Into<io::Error>) -> Error {
        let source = source.into();
        if is_full(&source) {
            return Error::full(&source, &self.dir, needed.saturating_add(self.options.reserved_free));
        }
        Error::io("write", self.path(path), source)
    }

    /// Fails unless `needed` bytes can be written with the reserve left free.
    pub fn reserve(&self, needed: u64) -> Result<(), Error> {
        let free = files::available(&self.dir).map_err(|e| Error::io("ask for the free space of", &self.root, e))?;
        let needed = needed.saturating_add(self.options.reserved_free);
        match free < needed {
            true => Err(Error::DiskFull { needed, free }),
            false => Ok(()),
        }
    }

    /// Counts a blob that got its name. Call with the shard's lock held.
    pub fn count_named(shard: &mut Shard, bytes: u64) {
        if let Some(count) = &mut shard.counted {
            count.blobs += 1;
            count.bytes += bytes;
        }
    }

    /// Counts a blob that lost its name. Call with the shard's lock held.
    pub fn count_removed(shard: &mut Shard, bytes: u64) {
        if let Some(count) = &mut shard.counted {
            count.blobs = count.blobs.saturating_sub(1);
            count.bytes = count.bytes.saturating_sub(bytes);
        }
    }

    /// What `objects/` holds: counted once, kept up to date since.
    pub fn objects(&self) -> Result<Count, Error> {
        let mut total = Count::default();
        for (byte, shard) in self.shards.iter().enumerate() {
            let mut shard = lock(shard);
            let count = match shard.counted {
                Some(count) => count,
                None => self.count_shard(byte as u8)?,
            };
            // A blob that is leaving may have been counted, or not.
            if shard.leaving.is_none() {
                shard.counted = Some(count);
            }
            total.add(count);
        }
        Ok(total)
    }
}

impl std::ops::Deref for Inner {
    type Target = Folder;
    fn deref(&self) -> &Folder {
        &self.folder
    }
}

pub(super) fn shard_path(byte: u8) -> String {
    format!("{OBJECTS}/{byte:02x}")
}

pub(super) fn object_path(digest: &Digest) -> String {
    format!("{OBJECTS}/{}", object_name(digest))
}

/// Where a content is below [`Reader::objects_dir`](super::Reader::objects_dir).
pub fn object_name(digest: &Digest) -> String {
    let mut name = digest.hex();
    name.insert(2, '/');
    name
}

/// The digest of the object with that name in a shard; `None` for a name that is none of the store's.
pub(super) fn object_digest(byte: u8, name: &CStr) -> Option<Digest> {
    let name = name.to_bytes();
    let mut digest = [byte; 32];
    // `hex` takes upper case too; a second spelling of one name must not exist.
    if name.iter().any(u8::is_ascii_uppercase) || hex::decode_to_slice(name, &mut digest[1..]).is_err() {
        return None;
    }
    Some(Digest::from_bytes(digest))
}

pub(super) fn manifest_path(tree: &TreeDigest) -> String {
    format!("{MANIFESTS}/{}", tree.hex())
}

fn refuse_strangers(root: &Path, dir: &OwnedFd) -> Result<(), Error> {
    for (name, _) in files::names(dir).map_err(|e| Error::io("list", root, e))? {
        let name = name.to_string_lossy();
        if name == CONFIG {
            return Ok(());
        }
    }
    // Without larder.json it is a new store, or one whose creation was cut short. Never a folder of something else.
    for (name, _) in files::names(dir).map_err(|e| Error::io("list", root, e))? {
        let name = name.to_string_lossy().into_owned();
        if !KNOWN.contains(&name.as_str()) && name != format!("{CONFIG}.new") {
            return Err(Error::NotAStore {
                root: root.to_owned(),
                found: name,
            });
        }
    }
    Ok(())
}

fn take_lock(root: &Path, dir: &OwnedFd) -> Result<File, Error> {
    let path = root.join(LOCK);
    let file = disk::create(Step::LockCreate, dir, LOCK, OFlags::RDWR, 0o600);
    let file = file.map_err(|e| Error::io("open", &path, e))?;
    // A child that the last holder forked holds the lock with it until it becomes another program, which is a moment; but
    // not where many tests start programs on a busy machine.
    let moment = if cfg!(test) { 5000 } else { 500 };
    let patience = Instant::now() + Duration::from_millis(moment);
    let mut locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    while locked == Err(rustix::io::Errno::WOULDBLOCK) && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(10));
        locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    }
    match locked {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            // Only for the message: an unreadable holder is "another process".
            let _ = file.take(32).read_to_string(&mut text);
            return Err(Error::Locked {
                root: root.to_owned(),
                pid: text.trim().parse().ok(),
            });
        }
        Err(error) => return Err(Error::io("lock", &path, error)),
    }
    // The pid is for messages only, and a full disk must not keep a store from being opened (its collection frees it).
    let pid = format!("{}\n", std::process::id());
    let written = disk::truncate(Step::LockTruncate, &file, 0)
        .map_err(io::Error::from)
        .and_then(|()| files::write_at(Step::LockWrite, file.as_fd(), pid.as_bytes(), 0, 0));
    match written {
        Err(error) if !is_full(&error) => Err(Error::io("write", &path, error)),
        _ => Ok(file),
    }
}

fn read_config(root: &Path) -> Result<Option<Config>, Error> {
    let path = root.join(CONFIG);
    match files::read_bounded(&path, MAX_CONFIG) {
        Ok(text) => parse_config(&path, &text).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", &path, error)),
    }
}

fn parse_config(path: &Path, text: &[u8]) -> Result<Config, Error> {
    let invalid = |message: String| Error::Config {
        path: path.to_owned(),
        message,
    };
    let config: Config = serde_json::from_slice(text).map_err(|e| invalid(format!("cannot be read: {e}")))?;
    if config.format != FORMAT {
        let format = config.format;
        return Err(invalid(format!(
            "the store has format {format}; this program works with format {FORMAT}"
        )));
    }
    if config.id.is_empty() {
        return Err(invalid("the store has no id".to_owned()));
    }
    Ok(config)
}

/// The id in a `larder.json`, as inputs of tests and fuzz targets.
#[cfg(any(test, fuzzing))]
pub fn parse_config_id(text: &[u8]) -> Result<String, Error> {
    parse_config(Path::new(CONFIG), text).map(|config| config.id)
}

/// Makes the folders, then `larder.json`, whose presence says that the store is whole.
fn create(root: &Path, dir: &OwnedFd) -> Result<String, Error> {
    let error = |e: rustix::io::Errno| Error::io("create the folders of", root, e);
    for name in [STAGING, OBJECTS, MANIFESTS, IMAGES, REFS] {
        files::ensure_dir(Step::LayoutDir, dir, name).map_err(error)?;
    }
    for byte in 0..=255 {
        files::ensure_dir(Step::LayoutDir, dir, &shard_path(byte)).map_err(error)?;
    }
    let config = Config {
        format: FORMAT,
        id: uuid::Uuid::new_v4().to_string(),
    };
    let path = root.join(CONFIG);
    let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::io("write", &path, io::Error::from(e)))?;
    let new = format!("{CONFIG}.new");
    let written = disk::create(Step::ConfigCreate, dir, &new, OFlags::WRONLY | OFlags::TRUNC, 0o600)
        .map_err(io::Error::from)
        .and_then(|file| {
            files::write_at(Step::ConfigWrite, file.as_fd(), &text, 0, 0)?;
            Ok(disk::fsync(Step::ConfigSync, &file)?)
        });
    written.map_err(|e| Error::io("write", root.join(&new), e))?;
    disk::rename(Step::ConfigRename, dir, &new, dir, CONFIG).map_err(|e| Error::io("create", &path, e))?;
    disk::syncfs(Step::LayoutSync, dir).map_err(error)?;
    Ok(config.id)
}
