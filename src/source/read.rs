//! Reading a folder tree: one thread walks and looks at names, several read attributes and contents.
//!
//! One pass serves a plain folder and a layer's upper, which differ in what becomes of some entries ([`Rules`]). Memory
//! is bounded by the resulting tree, and open folders by a constant, whatever the depth.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, OFlags, Stat, fstat, statat};
use rustix::io::Errno;

use super::error::{Error, FailureKind, Failures};
use super::leaf::{self, Trouble, device, file_type, meta, same};
use super::unchanged::{Known, Marks, Seen};
use super::xattrs::{Buffers, Xattrs};
use crate::layer::descent::{Descent, names, open_beneath};
use crate::store::tree::{DirId, Leaf, LeafId, LeafKind, Meta, Tree};
use crate::store::{self, Build};

/// Entries that are read together. Each may keep its folder open.
const BATCH: usize = 256;

/// How often a tree that changes while it is read is read again.
const TRIES: u32 = 3;

/// What a pass makes of what it meets.
pub(super) trait Rules: Send {
    /// Whether the entry with this path, relative to the root, is left out.
    fn excludes(&self, path: &[u8]) -> bool;

    /// Whether a character device 0/0 is a deletion, and no entry that cannot be kept.
    fn has_whiteouts(&self) -> bool;

    /// Takes overlayfs's own attributes from an entry's; says whether they hide what lies below.
    fn take_marks(&self, xattrs: &mut Xattrs) -> Result<bool, FailureKind>;

    /// The folder below the root, if there is one.
    fn below_root(&self) -> Option<DirId>;

    /// The folder below the entry of a folder.
    fn below(&self, parent: DirId, name: &[u8]) -> Option<DirId>;

    /// Adds the entries of the folder `below` to `dir`, but for those that `hidden` (sorted) names.
    fn merge(&mut self, tree: &mut Tree, below: DirId, dir: DirId, hidden: &[CString]) -> Result<(), store::Error>;
}

/// What surrounds a pass.
pub(super) struct Reading<'a> {
    pub build: &'a Build,
    pub cancel: &'a AtomicBool,
    /// Device and inode of the store, which is not entered.
    pub store: Option<(u64, u64)>,
    /// What was read of this folder before.
    pub known: Option<&'a Known>,
    /// Counts the entries that have been read.
    pub progress: &'a AtomicU64,
}

/// Reads everything below `root`; again when folders changed meanwhile.
pub(super) fn read<R: Rules>(
    root: &OwnedFd,
    mut rules: impl FnMut() -> R,
    reading: &Reading,
) -> Result<(Tree, Seen), Error> {
    let mut tried = 1;
    loop {
        let mut walk = Walk::new(root, rules(), reading)?;
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
        return Ok((tree, walk.marks.finish(&order)));
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
    stat: Stat,
    leaf: LeafId,
    order: u64,
}

struct Walk<'a, R> {
    rules: R,
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
}

impl<'a, R: Rules> Walk<'a, R> {
    fn new(root: &OwnedFd, rules: R, reading: &'a Reading<'a>) -> Result<Self, Error> {
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
            tree: Tree::new(Meta::default()),
            failures: Failures::default(),
            visits: Vec::new(),
            path: Vec::new(),
            links: HashMap::new(),
            pending: Vec::new(),
            buffers: Buffers::new(),
            order: 0,
        })
    }

    fn run(&mut self) -> Result<(), Error> {
        let below = self.rules.below_root();
        let mut frames: Vec<Frame> = self
            .folder(Tree::ROOT, below, (0, 0), c"".into())?
            .into_iter()
            .collect();
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
        let below = below.and_then(|below| self.rules.below(below, name.to_bytes()));
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

    /// Reads the current folder's attributes and names; what is no folder is read later.
    fn folder(
        &mut self,
        dir: DirId,
        below: Option<DirId>,
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
        let opaque = match self.rules.take_marks(&mut xattrs) {
            Ok(opaque) => opaque,
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
        let below = below.filter(|_| !opaque);
        let length = self.path.len();
        let mut folders = Vec::new();
        for name in &names {
            self.push(name);
            if !self.rules.excludes(&self.path) {
                self.entry(&folder, dir, visit, name, &mut folders)?;
            }
            self.path.truncate(length);
        }
        if let Some(below) = below {
            self.rules.merge(&mut self.tree, below, dir, &names)?;
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

    fn look(&mut self) -> std::io::Result<(Arc<OwnedFd>, Stat, Xattrs, Vec<CString>)> {
        let folder = self.descent.folder()?.clone();
        let stat = fstat(&folder)?;
        let xattrs = self.buffers.of(&*folder)?;
        let names = names(&*folder)?;
        Ok((folder, stat, xattrs, names))
    }

    fn entry(
        &mut self,
        folder: &Arc<OwnedFd>,
        dir: DirId,
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
            self.marks.add(leaf.0 as usize, &stat);
            return Ok(());
        }
        self.order += 1;
        self.pending.push(Pending {
            folder: folder.clone(),
            visit,
            name: name.clone(),
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
        let (build, cancel, progress) = (self.reading.build, self.reading.cancel, self.reading.progress);
        let pending = std::mem::take(&mut self.pending);
        let read: Vec<Result<(Leaf, Stat), Trouble>> = pending
            .par_iter()
            .map_init(Buffers::new, |buffers, entry| {
                let read = leaf::read(&entry.folder, &entry.name, &entry.stat, build, cancel, buffers);
                progress.fetch_add(1, Ordering::Relaxed);
                read
            })
            .collect();
        for (entry, read) in pending.into_iter().zip(read) {
            let kind = match read {
                Ok((mut leaf, stat)) => match self.rules.take_marks(&mut leaf.meta.xattrs) {
                    Ok(_) => {
                        let number = entry.leaf.0 as usize;
                        self.tree.leaves[number] = leaf;
                        self.marks.add(number, &stat);
                        continue;
                    }
                    Err(kind) => kind,
                },
                Err(Trouble::Store(error)) => return Err(error.into()),
                Err(Trouble::Cancelled) => return Err(Error::Cancelled),
                Err(Trouble::MountPoint) => FailureKind::MountPoint,
                Err(Trouble::Errno(errno)) => FailureKind::Errno(errno.raw_os_error()),
                Err(Trouble::Changed | Trouble::Replaced) => FailureKind::Changed,
            };
            let path = || path_of(&self.visits, entry.visit, &entry.name);
            self.failures.add(entry.order, path, kind);
        }
        Ok(())
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
