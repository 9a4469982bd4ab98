//! Reading a folder tree: one thread walks and looks at names, several read attributes and contents.
//!
//! One pass serves a plain folder and a layer's upper, which differ in what becomes of some entries ([`Rules`]). Memory
//! is bounded by the resulting tree, and open folders by a constant, whatever the depth.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use rustix::fs::{AtFlags, FileType, OFlags, Stat, fstat, statat};
use rustix::io::Errno;

use super::error::{Error, FailureKind, Failures};
use super::leaf::{self, Trouble, Way, device, file_type, let_settle, same};
use super::unchanged::{Known, Marks};
use crate::layer::descent::{Descent, names, open_beneath};
use crate::layer::xattrs::{Buffers, Xattrs, meta};
use crate::store::tree::{DirId, Entry, Leaf, LeafId, LeafKind, Meta, Tree};
use crate::store::{self, Build};

/// Entries that are read together. Each may keep its folder open.
const BATCH: usize = 256;
/// Bytes from which on reading a file may take long.
const LARGE: i64 = 16 << 20;

/// How often a tree that changes while it is read is read again.
const TRIES: u32 = 3;

/// What a pass makes of what it meets. `tree` is the one under way, in which the tree below lies too, if there is one.
pub(super) trait Rules: Sync {
    /// Whether the entry with this path, relative to the root, is left out.
    fn excludes(&self, path: &[u8]) -> bool;

    /// Whether a character device 0/0 is a deletion, and no entry that cannot be kept.
    fn has_whiteouts(&self) -> bool;

    /// The folder of the tree below whose entries a folder shows besides its own. Takes overlayfs's own attributes from
    /// those of the folder, which is the root if it is at no place.
    fn folder(&self, tree: &Tree, at: Option<Place>, xattrs: &mut Xattrs) -> Result<Option<DirId>, FailureKind>;

    /// What a leaf is if not what lies there. Takes overlayfs's own attributes from those of the leaf.
    fn leaf(&self, tree: &Tree, at: Place, stat: &Stat, xattrs: &mut Xattrs) -> Result<Option<LeafKind>, FailureKind>;
}

/// Where an entry is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// The folder of the tree below that the entry's folder shows.
    pub below: Option<DirId>,
    pub name: &'a [u8],
}

/// What surrounds a pass.
pub(super) struct Reading<'a> {
    pub build: &'a Build,
    pub cancel: &'a AtomicBool,
    /// Device and inode of the store, which is not entered.
    pub store: Option<(u64, u64)>,
    /// What was read of this folder before.
    pub known: Option<&'a Known>,
    /// How old the last change of a file should be when it is read; see [`Way`].
    pub settle: Duration,
    /// Whether marks are made of what is read.
    pub notes: bool,
    /// Counts the entries that have been read.
    pub progress: &'a AtomicU64,
}

/// Reads everything below `root`; again when folders changed meanwhile. `begin` gives the tree to begin with: its root
/// has no entries, and what else is in it may be shown by [`Rules::folder`]. With the tree come the marks of what was read,
/// by the numbers that leaves had first, and these numbers in the order of the tree.
pub(super) fn read(
    root: &OwnedFd,
    rules: &dyn Rules,
    mut begin: impl FnMut() -> Result<Tree, Error>,
    reading: &Reading,
) -> Result<(Tree, Marks, Vec<u32>), Error> {
    let mut tried = 1;
    loop {
        let mut walk = Walk::new(root, rules, begin()?, reading)?;
        walk.run()?;
        let tree = std::mem::replace(&mut walk.tree, Tree::new(Meta::default()));
        let (looked, finished) = rayon::join(|| walk.look_again(root), || tree.finish_and_tell());
        looked?;
        if walk.failures.count > 0 && walk.failures.only_changes() && tried < TRIES {
            tried += 1;
            continue;
        }
        walk.failures.into_result()?;
        let (tree, order) = finished.map_err(store::Error::from)?;
        return Ok((tree, walk.marks, order));
    }
}

/// A folder on the way down.
struct Frame {
    dir: DirId,
    below: Option<DirId>,
    /// Its place in [`Walk::visits`].
    visit: usize,
    /// Length of its path.
    path: usize,
    /// Folders in it that have not been entered, the first one last.
    folders: Vec<(CString, Stat)>,
}

/// A folder as it was, in the order of the walk. Its path is not kept: in a deep tree, all paths together are longer
/// than the tree is large.
struct Visit {
    /// The visit of the folder that it is in; the root's own for the root.
    parent: usize,
    depth: usize,
    name: CString,
    stat: Stat,
}

/// An entry that waits for being read.
struct Pending {
    folder: Arc<OwnedFd>,
    /// The visit of its folder.
    visit: usize,
    name: CString,
    /// The folder of the tree below that its folder shows.
    below: Option<DirId>,
    stat: Stat,
    leaf: LeafId,
    order: u64,
}

type Outcome = (Pending, Result<(Leaf, Stat), Trouble>);

struct Walk<'a> {
    rules: &'a dyn Rules,
    reading: &'a Reading<'a>,
    descent: Descent,
    tree: Tree,
    failures: Failures,
    visits: Vec<Visit>,
    path: Vec<u8>,
    /// The leaves of inodes with several names.
    links: HashMap<(u64, u64), LeafId>,
    marks: Marks,
    pending: Vec<Pending>,
    buffers: Buffers,
    order: u64,
    /// As in [`Way`].
    most: u64,
    sparse: AtomicU64,
    /// For large files, once there is one.
    threads: OnceCell<ThreadPool>,
}

impl<'a> Walk<'a> {
    fn new(root: &OwnedFd, rules: &'a dyn Rules, tree: Tree, reading: &'a Reading<'a>) -> Result<Self, Error> {
        let root = root
            .try_clone()
            .map_err(|source| Error::io("open", "the source".as_ref(), source))?;
        let device = fstat(&root)
            .map_err(|e| Error::io("look at", "the source".as_ref(), e))?
            .st_dev;
        Ok(Self {
            rules,
            reading,
            marks: Marks::new(device),
            descent: Descent::new(root).map_err(|source| Error::io("open", "the source".as_ref(), source))?,
            tree,
            failures: Failures::default(),
            visits: Vec::new(),
            path: Vec::new(),
            links: HashMap::new(),
            pending: Vec::new(),
            buffers: Buffers::new(),
            order: 0,
            most: reading.build.disk_size()?,
            sparse: AtomicU64::new(0),
            threads: OnceCell::new(),
        })
    }

    fn run(&mut self) -> Result<(), Error> {
        let root = self.folder(Tree::ROOT, None, (0, 0), c"".into())?;
        let mut frames: Vec<Frame> = root.into_iter().collect();
        while let Some(frame) = frames.last_mut() {
            if self.reading.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            self.path.truncate(frame.path);
            let Some((name, stat)) = frame.folders.pop() else {
                let left = frames.len() > 1;
                frames.pop();
                if left && let Err(error) = self.descent.leave() {
                    // The way back is lost: the rest of the tree cannot be read in this pass.
                    self.fail(error_kind(&error));
                    break;
                }
                continue;
            };
            let (dir, below, place) = (frame.dir, frame.below, (frame.visit, frames.len()));
            self.push(&name);
            if let Some(frame) = self.enter(dir, below, place, name, &stat)? {
                frames.push(frame);
            }
        }
        self.flush()
    }

    /// Goes into a folder, if that can be. `place` is its parent's visit and its own depth.
    fn enter(
        &mut self,
        parent: DirId,
        below: Option<DirId>,
        place: (usize, usize),
        name: CString,
        seen: &Stat,
    ) -> Result<Option<Frame>, Error> {
        if self.reading.store == Some((seen.st_dev, seen.st_ino)) {
            self.fail(FailureKind::Store);
            return Ok(None);
        }
        if let Err(error) = self.descent.enter(&name) {
            self.fail(error_kind(&error));
            return Ok(None);
        }
        let dir = self
            .tree
            .add_dir(parent, name.to_bytes(), Meta::default())
            .map_err(store::Error::from)?;
        let frame = self.folder(dir, below, place, name)?;
        if frame.is_none() && self.descent.leave().is_err() {
            self.fail(FailureKind::Changed);
        }
        Ok(frame)
    }

    /// Reads the current folder's attributes and names; what is no folder is read later. `above`: what the folder that
    /// it is in shows of the tree below.
    fn folder(
        &mut self,
        dir: DirId,
        above: Option<DirId>,
        (parent, depth): (usize, usize),
        name: CString,
    ) -> Result<Option<Frame>, Error> {
        let looked = self.look();
        let (folder, stat, mut xattrs, names) = match looked {
            Ok(looked) => looked,
            Err(error) => {
                self.fail(error_kind(&error));
                return Ok(None);
            }
        };
        let place = (depth > 0).then_some(Place {
            below: above,
            name: name.to_bytes(),
        });
        let below = match self.rules.folder(&self.tree, place, &mut xattrs) {
            Ok(below) => below,
            Err(kind) => {
                self.fail(kind);
                return Ok(None);
            }
        };
        self.tree.dirs[dir.0 as usize].meta = meta(&stat, xattrs);
        let visit = self.visits.len();
        self.visits.push(Visit {
            parent,
            depth,
            name,
            stat,
        });
        let length = self.path.len();
        let mut folders = Vec::new();
        for name in &names {
            self.push(name);
            if !self.rules.excludes(&self.path) {
                self.entry(&folder, dir, below, visit, name, &mut folders)?;
            }
            self.path.truncate(length);
        }
        if let Some(below) = below {
            self.show_below(below, dir, &names);
        }
        folders.reverse();
        Ok(Some(Frame {
            dir,
            below,
            visit,
            path: length,
            folders,
        }))
    }

    /// Adds the entries of a folder of the tree below, but for those that have one of the names (sorted), which are
    /// above them. What is below an entry is not copied: it is where it was, and gets another name.
    fn show_below(&mut self, below: DirId, dir: DirId, names: &[CString]) {
        let hidden = |entry: &&Entry| names.binary_search_by(|name| name.to_bytes().cmp(&entry.name)).is_ok();
        let entries = &self.tree.dir(below).entries;
        let shown: Vec<Entry> = entries.iter().filter(|entry| !hidden(entry)).cloned().collect();
        self.tree.dirs[dir.0 as usize].entries.extend(shown);
    }

    fn look(&mut self) -> std::io::Result<(Arc<OwnedFd>, Stat, Xattrs, Vec<CString>)> {
        let folder = self.descent.folder()?.clone();
        let mut stat = fstat(&folder)?;
        // Times may move by a clock's tick: a name that comes within that of the last one, after they were listed, would
        // not be seen from the folder's times.
        if let_settle(&stat, self.reading.settle) {
            stat = fstat(&folder)?;
        }
        let xattrs = self.buffers.of(&*folder)?;
        let names = names(&*folder)?;
        Ok((folder, stat, xattrs, names))
    }

    fn entry(
        &mut self,
        folder: &Arc<OwnedFd>,
        dir: DirId,
        below: Option<DirId>,
        visit: usize,
        name: &CString,
        folders: &mut Vec<(CString, Stat)>,
    ) -> Result<(), Error> {
        let stat = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                self.fail(FailureKind::Changed);
                return Ok(());
            }
            Err(errno) => {
                self.fail(FailureKind::Errno(errno.raw_os_error()));
                return Ok(());
            }
        };
        let kind = file_type(&stat);
        if kind == FileType::Directory {
            folders.push((name.clone(), stat));
            return Ok(());
        }
        if kind == FileType::CharacterDevice && device(&stat) == (0, 0) {
            // All whiteouts of a layer share one inode; they are no hard links.
            if !self.rules.has_whiteouts() {
                self.fail(FailureKind::Whiteout);
            }
            return Ok(());
        }
        let inode = (stat.st_dev, stat.st_ino);
        if let Some(leaf) = self.links.get(&inode).filter(|_| stat.st_nlink > 1) {
            // Opens nothing; fails if this is that inode only because it is mounted here.
            let place = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Err(errno) = open_beneath(folder, name, place) {
                self.fail(error_kind(&errno.into()));
                return Ok(());
            }
            self.tree
                .add_link(dir, name.to_bytes(), *leaf)
                .map_err(store::Error::from)?;
            return Ok(());
        }
        let unchanged = self.reading.known.and_then(|known| known.unchanged(&stat));
        let is_unchanged = unchanged.is_some();
        // Its place is taken now, so that further names of the inode find it; what it is, is filled in when it is read.
        let unread = || Leaf {
            meta: Meta::default(),
            kind: LeafKind::Socket,
        };
        let leaf = self
            .tree
            .add_leaf(dir, name.to_bytes(), unchanged.unwrap_or_else(unread))
            .map_err(store::Error::from)?;
        if stat.st_nlink > 1 {
            self.links.insert(inode, leaf);
        }
        if is_unchanged {
            self.reading.progress.fetch_add(1, Ordering::Relaxed);
            self.mark(leaf, &stat);
            return Ok(());
        }
        self.order += 1;
        self.pending.push(Pending {
            folder: folder.clone(),
            visit,
            name: name.clone(),
            below,
            stat,
            leaf,
            order: self.order,
        });
        if self.pending.len() >= BATCH {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Reads what waits.
    fn flush(&mut self) -> Result<(), Error> {
        if self.reading.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let progress = self.reading.progress;
        let (rules, tree) = (self.rules, &self.tree);
        let read_all = |entries: Vec<Pending>, in_turn: i64| -> Vec<Outcome> {
            let way = Way {
                build: self.reading.build,
                cancel: self.reading.cancel,
                settle: self.reading.settle,
                in_turn,
                most: self.most,
                sparse: &self.sparse,
            };
            let read = entries.into_par_iter().map_init(Buffers::new, |buffers, entry| {
                let place = Place {
                    below: entry.below,
                    name: entry.name.to_bytes(),
                };
                let other = |stat: &Stat, xattrs: &mut Xattrs| rules.leaf(tree, place, stat, xattrs);
                let read = leaf::read(&entry.folder, &entry.name, &entry.stat, &other, &way, buffers);
                if !matches!(read, Err(Trouble::Large)) {
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                (entry, read)
            });
            read.collect()
        };
        let pending = std::mem::take(&mut self.pending);
        let (large, small): (Vec<_>, Vec<_>) = pending.into_iter().partition(|entry| entry.stat.st_size > LARGE);
        let mut read = match large.is_empty() {
            true => read_all(small, LARGE),
            false => {
                let mut read = Vec::new();
                let small = self.threads()?.in_place_scope(|scope| {
                    scope.spawn(|_| read = read_all(large, i64::MAX));
                    read_all(small, LARGE)
                });
                read.extend(small);
                read
            }
        };
        // Those that became large just now.
        let large: Vec<Pending> = read
            .extract_if(.., |(_, read)| matches!(read, Err(Trouble::Large)))
            .map(|(entry, _)| entry)
            .collect();
        if !large.is_empty() {
            read.extend(self.threads()?.install(|| read_all(large, i64::MAX)));
        }
        for (entry, read) in read {
            let kind = match read {
                Ok((leaf, stat)) => {
                    self.tree.leaves[entry.leaf.0 as usize] = leaf;
                    self.mark(entry.leaf, &stat);
                    continue;
                }
                Err(Trouble::Kind(kind)) => kind,
                Err(Trouble::Store(error)) => return Err(error.into()),
                Err(Trouble::Cancelled) => return Err(Error::Cancelled),
                Err(Trouble::MountPoint) => FailureKind::MountPoint,
                Err(Trouble::Errno(errno)) => FailureKind::Errno(errno.raw_os_error()),
                // None is left for another turn.
                Err(Trouble::Changed | Trouble::Replaced | Trouble::Large) => FailureKind::Changed,
            };
            let path = || path_of(&self.visits, entry.visit, &entry.name);
            self.failures.add(entry.order, path, kind);
        }
        Ok(())
    }

    /// Threads of their own, or everything else that goes on in this process would wait for large files.
    fn threads(&self) -> Result<&ThreadPool, Error> {
        if let Some(threads) = self.threads.get() {
            return Ok(threads);
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(rayon::current_num_threads())
            .thread_name(|number| format!("read-{number}"));
        let error = |error| Error::io("start threads for", "the source".as_ref(), std::io::Error::other(error));
        let pool = pool.build().map_err(error)?;
        Ok(self.threads.get_or_init(|| pool))
    }

    /// Looks whether the folders are as they were: something that was moved from one that was still to be read into
    /// one that had been read would be missing.
    fn look_again(&mut self, root: &OwnedFd) -> Result<(), Error> {
        let failed = |source| Error::io("open", "the source".as_ref(), source);
        let mut descent = Descent::new(root.try_clone().map_err(failed)?).map_err(failed)?;
        let mut depth = 0;
        for (at, visit) in self.visits.iter().enumerate() {
            let mut look = || -> std::io::Result<bool> {
                if visit.depth > 0 {
                    while depth >= visit.depth {
                        descent.leave()?;
                        depth -= 1;
                    }
                    descent.enter(&visit.name)?;
                    depth += 1;
                }
                Ok(same(&visit.stat, &fstat(descent.folder()?)?))
            };
            if !look().unwrap_or(false) {
                self.order += 1;
                let path = || path_of(&self.visits, at, c"");
                self.failures.add(self.order, path, FailureKind::Changed);
                // Where it would go on from is not certain any more; one change is enough for another pass.
                return Ok(());
            }
        }
        Ok(())
    }

    fn mark(&mut self, leaf: LeafId, stat: &Stat) {
        if self.reading.notes {
            self.marks.add(leaf.0 as usize, stat);
        }
    }

    fn push(&mut self, name: &CString) {
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name.to_bytes());
    }

    fn fail(&mut self, kind: FailureKind) {
        self.order += 1;
        self.failures.add(self.order, || self.path.clone(), kind);
    }
}

/// The path of an entry of a visited folder, or with an empty name that of the folder.
fn path_of(visits: &[Visit], mut visit: usize, name: &CStr) -> Vec<u8> {
    let mut names = vec![name.to_bytes()];
    while let Some(folder) = visits.get(visit).filter(|folder| folder.depth > 0) {
        names.push(folder.name.to_bytes());
        visit = folder.parent;
    }
    names.retain(|name| !name.is_empty());
    names.reverse();
    names.join(&b'/')
}

fn error_kind(error: &std::io::Error) -> FailureKind {
    match Errno::from_io_error(error) {
        Some(Errno::XDEV) => FailureKind::MountPoint,
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::NODATA) => FailureKind::Changed,
        Some(errno) => FailureKind::Errno(errno.raw_os_error()),
        None => FailureKind::Errno(Errno::IO.raw_os_error()),
    }
}
