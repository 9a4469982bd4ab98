//! Writing a tree as files.
//!
//! Works by descriptors, one folder at a time: no symlink is followed, no path can be too long, and a deep tree needs
//! neither stack nor descriptors. Data is shared with the store's blobs where the file system can (reflink), else
//! copied with its holes; never by a hard link, through which a writer of the copy would change the store.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::Errno;

use super::disk::{self, Step};
use super::tree::{DirId, Leaf, LeafId, LeafKind, Meta, Node, Tree};
use super::{Digest, Error, Reader, files};

/// With so many bytes free beside its value, an attribute is not refused for want of space.
const ROOM_FOR_XATTR: u64 = 1 << 20;
/// Bytes that the kernel is asked to copy at once: between two calls an export can be cancelled.
const COPY: usize = 64 << 20;

/// What an export that goes on for long is told and tells.
#[derive(Debug, Default)]
pub struct ExportWatch {
    /// Set it, and the export soon ends with [`Error::Cancelled`].
    pub cancel: Arc<AtomicBool>,
    /// Entries that are written.
    pub entries: AtomicU64,
}

impl Reader {
    /// Writes the tree into `into`, which must be an empty folder or not exist: contents, hard links, owners, modes,
    /// extended attributes and times, those of the root included. `owner` replaces the owner of every entry.
    ///
    /// Nothing is left out without a word: what the file system cannot keep is an error that names the path. What was
    /// written until then stays, for the caller to remove ([`super::remove_all`]).
    pub fn export(&self, tree: &Tree, into: &Path, owner: Option<(u32, u32)>) -> Result<(), Error> {
        self.export_watched(tree, into, owner, &ExportWatch::default())
    }

    /// As [`Reader::export`], for a caller who watches or cancels it.
    pub fn export_watched(
        &self,
        tree: &Tree,
        into: &Path,
        owner: Option<(u32, u32)>,
        watch: &ExportWatch,
    ) -> Result<(), Error> {
        let error = |action: &'static str| move |e: Errno| Error::io(action, into, e);
        match disk::mkdir(Step::ExportRoot, rustix::fs::CWD, into) {
            Ok(()) | Err(Errno::EXIST) => {}
            // Not even the folder: how much else there is free does not matter.
            Err(full @ (Errno::NOSPC | Errno::DQUOT)) => {
                let parent = into.parent().filter(|parent| *parent != Path::new(""));
                let parent = disk::open_root(parent.unwrap_or(Path::new(".")));
                return Err(Error::full(
                    &full.into(),
                    parent.map_err(error("open the folder of"))?,
                    4096,
                ));
            }
            Err(other) => return Err(error("create")(other)),
        }
        let top = files::open_dir(rustix::fs::CWD, into).map_err(error("open"))?;
        if !files::names(&top).map_err(error("list"))?.is_empty() {
            return Err(Error::io(
                "write into",
                into,
                io::Error::from(io::ErrorKind::DirectoryNotEmpty),
            ));
        }
        // What a default ACL of the parent would give to everything below.
        for acl in ["system.posix_acl_default", "system.posix_acl_access"] {
            match disk::remove_xattr(Step::ExportAcl, &top, acl) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(other) => return Err(error("remove an inherited ACL of")(other)),
            }
        }
        // … and without setgid, groups are not inherited either.
        let private = Mode::from_raw_mode(0o700);
        disk::fchmod(Step::ExportRootMode, &top, private).map_err(error("change the mode of"))?;
        let mut export = Export {
            store: self,
            top: top.as_fd(),
            tree,
            owner,
            watch,
            reflink: true,
            names: vec![None; tree.leaves.len()],
            link_dir: None,
            stack: Vec::new(),
        };
        export.run()
    }
}

struct Export<'a> {
    store: &'a Reader,
    /// The folder that is written into.
    top: BorrowedFd<'a>,
    tree: &'a Tree,
    owner: Option<(u32, u32)>,
    watch: &'a ExportWatch,
    /// Does the file system share blocks? Until it has said no.
    reflink: bool,
    /// Where each leaf's first name is: index in `parents` …
    names: Vec<Option<(DirId, u32)>>,
    /// The folder that a hard link was last made from.
    link_dir: Option<(DirId, OwnedFd)>,
    stack: Vec<Level>,
}

/// A folder that is being written.
struct Level {
    dir: DirId,
    done: usize,
    /// To be sure that `..` leads back to where we came from.
    inode: (u64, u64),
}

impl Export<'_> {
    fn run(&mut self) -> Result<(), Error> {
        let tree = self.tree;
        if tree.dirs.is_empty() {
            return Ok(());
        }
        // The parent of every folder, to find the way to the first name of a hard link.
        let mut parents = vec![None; tree.dirs.len()];
        let mut current = self.open(self.top, ".")?;
        self.push(Tree::ROOT, &current)?;
        while let Some(level) = self.stack.last_mut() {
            let dir = level.dir;
            let Some(entry) = tree.dir(dir).entries.get(level.done) else {
                self.finish_dir(&current, &tree.dir(dir).meta)?;
                self.stack.pop();
                if let Some(parent) = self.stack.last() {
                    let up = self.open(current.as_fd(), "..")?;
                    if inode(&up).map_err(|e| self.error("look at the folder", e))? != parent.inode {
                        return Err(self.error("return to the folder, which was moved meanwhile", Errno::STALE));
                    }
                    current = up;
                }
                continue;
            };
            if self.watch.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            self.watch.entries.fetch_add(1, Ordering::Relaxed);
            level.done += 1;
            let index = level.done as u32 - 1;
            let name: &[u8] = &entry.name;
            match entry.node {
                Node::Dir(id) => {
                    let made = disk::mkdir(Step::ExportDir, &current, name);
                    made.map_err(|e| self.error("create the folder", e))?;
                    current = self.open(current.as_fd(), name)?;
                    parents[id.0 as usize] = Some((dir, index));
                    self.push(id, &current)?;
                }
                Node::Leaf(id) => match self.names[id.0 as usize] {
                    None => {
                        self.leaf(&current, name, tree.leaf(id))?;
                        self.names[id.0 as usize] = Some((dir, index));
                    }
                    Some(first) => self.link(&current, name, id, first, &parents)?,
                },
            }
        }
        Ok(())
    }

    fn push(&mut self, dir: DirId, fd: &OwnedFd) -> Result<(), Error> {
        let inode = inode(fd).map_err(|e| self.error("look at the folder", e))?;
        self.stack.push(Level { dir, done: 0, inode });
        Ok(())
    }

    fn open(&self, at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> Result<OwnedFd, Error> {
        files::open_dir(at, name).map_err(|e| self.error("open the folder", e))
    }

    fn leaf(&mut self, dir: &OwnedFd, name: &[u8], leaf: &Leaf) -> Result<(), Error> {
        let mode = Mode::from_raw_mode(leaf.meta.mode.into());
        match &leaf.kind {
            LeafKind::File { digest, size } => return self.file(dir, name, leaf, digest, *size),
            LeafKind::Symlink(target) => disk::symlink(Step::ExportSpecial, target, dir, name),
            LeafKind::CharDevice { major, minor } => {
                let device = rustix::fs::makedev(*major, *minor);
                disk::mknod(Step::ExportSpecial, dir, name, FileType::CharacterDevice, mode, device)
            }
            LeafKind::BlockDevice { major, minor } => {
                let device = rustix::fs::makedev(*major, *minor);
                disk::mknod(Step::ExportSpecial, dir, name, FileType::BlockDevice, mode, device)
            }
            LeafKind::Fifo => disk::mknod(Step::ExportSpecial, dir, name, FileType::Fifo, mode, 0),
            LeafKind::Socket => disk::mknod(Step::ExportSpecial, dir, name, FileType::Socket, mode, 0),
        }
        .map_err(|e| self.error("create the entry", e))?;

        let owner = self.owner(&leaf.meta);
        disk::chown(Step::ExportOwner, dir, name, owner).map_err(|e| self.error("set the owner", e))?;
        if !matches!(leaf.kind, LeafKind::Symlink(_)) {
            // Again: the umask and the change of the owner have taken bits away.
            disk::chmod(Step::ExportMode, dir, name, mode).map_err(|e| self.error("set the mode", e))?;
        }
        if !leaf.meta.xattrs.is_empty() {
            // There is no call for an entry of a folder's descriptor; this path reaches the same and is never too long.
            let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
            path.extend_from_slice(name);
            for (attribute, value) in &leaf.meta.xattrs {
                disk::set_xattr(Step::ExportXattr, path.as_slice(), attribute, value)
                    .map_err(|e| self.xattr(attribute, value, e))?;
            }
        }
        let times = times(&leaf.meta);
        disk::set_times(Step::ExportTime, dir, name, &times).map_err(|e| self.error("set the time", e))?;
        self.check_time(&leaf.meta, rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW))
    }

    fn file(&mut self, dir: &OwnedFd, name: &[u8], leaf: &Leaf, digest: &Digest, size: u64) -> Result<(), Error> {
        let made = disk::create(Step::ExportFile, dir, name, OFlags::WRONLY | OFlags::EXCL, 0o600);
        let file = made.map_err(|e| self.error("create the file", e))?;
        if size > 0 {
            self.data(&file, digest, size)?;
        }
        self.finish(&file, &leaf.meta)
    }

    fn data(&mut self, file: &File, digest: &Digest, size: u64) -> Result<(), Error> {
        let blob = |source| Error::ExportBlob {
            path: self.path(),
            source: Box::new(source),
        };
        let from = self.store.read(digest).map_err(blob)?;
        let stat = rustix::fs::fstat(&from).map_err(|e| self.error("look at its content", e))?;
        if stat.st_size.max(0) as u64 != size {
            return Err(blob(Error::WrongLength {
                digest: *digest,
                expected: size,
                found: stat.st_size.max(0) as u64,
            }));
        }
        if self.reflink {
            match disk::reflink(Step::ExportReflink, file, &from) {
                Ok(()) => return Ok(()),
                // Not this file system, or not from this one. Other failures are the copy's to find and name.
                Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::XDEV) => self.reflink = false,
                Err(_) => {}
            }
        }
        match copy(&from, file, size, files::is_sparse(&stat), &self.watch.cancel) {
            Err(Errno::CANCELED) => Err(Error::Cancelled),
            other => other.map_err(|e| self.error("write the content", e)),
        }
    }

    /// Another name for a leaf that has been written.
    fn link(
        &mut self,
        dir: &OwnedFd,
        name: &[u8],
        leaf: LeafId,
        first: (DirId, u32),
        parents: &[Option<(DirId, u32)>],
    ) -> Result<(), Error> {
        let tree = self.tree;
        let names = |(dir, index): (DirId, u32)| &*tree.dir(dir).entries[index as usize].name;
        if self.link_dir.as_ref().is_none_or(|(id, _)| *id != first.0) {
            let mut way = Vec::new();
            let mut at = first.0;
            while let Some(parent) = parents[at.0 as usize] {
                way.push(names(parent));
                at = parent.0;
            }
            let mut fd = self.open(self.top, ".")?;
            while let Some(name) = way.pop() {
                fd = self.open(fd.as_fd(), name)?;
            }
            self.link_dir = Some((first.0, fd));
        }
        let Some((_, from)) = &self.link_dir else {
            // Was set just above.
            return Err(self.error("find the first name", Errno::NOENT));
        };
        debug_assert!(self.names[leaf.0 as usize].is_some());
        disk::link(Step::ExportLink, from, names(first), dir, name).map_err(|e| self.error("create the hard link", e))
    }

    /// The order matters: a change of the owner takes away setuid bits and capabilities; every change moves the time.
    fn finish(&self, file: impl AsFd + Copy, meta: &Meta) -> Result<(), Error> {
        let owner = self.owner(meta);
        disk::fchown(Step::ExportOwner, file, owner).map_err(|e| self.error("set the owner", e))?;
        let mode = Mode::from_raw_mode(meta.mode.into());
        disk::fchmod(Step::ExportMode, file, mode).map_err(|e| self.error("set the mode", e))?;
        for (attribute, value) in &meta.xattrs {
            disk::set_file_xattr(Step::ExportXattr, file, attribute, value)
                .map_err(|e| self.xattr(attribute, value, e))?;
        }
        disk::set_file_times(Step::ExportTime, file, &times(meta)).map_err(|e| self.error("set the time", e))?;
        self.check_time(meta, rustix::fs::fstat(file))
    }

    /// After everything in the folder is written, which would have moved its time.
    fn finish_dir(&self, dir: &OwnedFd, meta: &Meta) -> Result<(), Error> {
        self.finish(dir, meta)
    }

    fn owner(&self, meta: &Meta) -> (Option<Uid>, Option<Gid>) {
        let (uid, gid) = self.owner.unwrap_or((meta.uid, meta.gid));
        (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }

    /// File systems clamp and round times that they cannot keep, without an error.
    fn check_time(&self, meta: &Meta, stat: Result<rustix::fs::Stat, Errno>) -> Result<(), Error> {
        let stat = stat.map_err(|e| self.error("look at the entry", e))?;
        if (stat.st_mtime, stat.st_mtime_nsec as u32) != meta.mtime {
            return Err(Error::Time {
                path: self.path(),
                seconds: meta.mtime.0,
                nanos: meta.mtime.1,
            });
        }
        Ok(())
    }

    /// The path of the entry that is being written.
    fn path(&self) -> Vec<u8> {
        let names = self.stack.iter().filter_map(|level| {
            let entries = &self.tree.dir(level.dir).entries;
            entries.get(level.done.wrapping_sub(1))
        });
        names.map(|entry| &*entry.name).collect::<Vec<_>>().join(&b'/')
    }

    fn error(&self, action: &'static str, source: impl Into<io::Error>) -> Error {
        let source = source.into();
        match super::error::is_full(&source) {
            true => self.full(&source),
            false => Error::Export {
                path: self.path(),
                action,
                source,
            },
        }
    }

    /// The disk that is written to, which need not be the store's, is full.
    fn full(&self, source: &io::Error) -> Error {
        Error::full(source, self.top, 4096)
    }

    fn free(&self) -> u64 {
        // Unknown counts as none: the write has failed for want of space, so far as is known.
        files::available(self.top).unwrap_or(0)
    }

    fn xattr(&self, attribute: &[u8], value: &[u8], source: Errno) -> Error {
        // ext4 says "no space" of an attribute that does not fit into the one block that an inode has for them.
        let has_room = source == Errno::NOSPC && self.free() > value.len() as u64 + ROOM_FOR_XATTR;
        if super::error::is_full(&source.into()) && !has_room {
            return self.full(&source.into());
        }
        Error::Xattr {
            path: self.path(),
            attribute: attribute.escape_ascii().to_string(),
            source: source.into(),
        }
    }
}

fn inode(fd: &OwnedFd) -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn times(meta: &Meta) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: meta.mtime.0,
            tv_nsec: meta.mtime.1.into(),
        },
    }
}

/// Copies a blob's data, leaving its holes out. Fails with `CANCELED` soon after `cancel` is set.
fn copy(from: &File, to: &File, size: u64, sparse: bool, cancel: &AtomicBool) -> Result<(), Errno> {
    if !sparse {
        return copy_run(from, to, 0, size, cancel);
    }
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_run(from, to, start, end.min(size), cancel)?;
        at = end;
    }
    disk::truncate(Step::ExportTruncate, to, size)
}

fn copy_run(from: &File, to: &File, start: u64, end: u64, cancel: &AtomicBool) -> Result<(), Errno> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        if cancel.load(Ordering::Relaxed) {
            return Err(Errno::CANCELED);
        }
        let length = usize::try_from(end - read_at).unwrap_or(usize::MAX).min(COPY);
        match disk::copy(Step::ExportCopy, from, &mut read_at, to, &mut write_at, length) {
            // A file that is shorter than its length said a moment ago: never on a healthy store.
            Ok(0) => return Err(Errno::IO),
            Ok(_) | Err(Errno::INTR) => {}
            // Between file systems, or one that cannot: through memory.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                return copy_through(from, to, read_at, end, cancel);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn copy_through(from: &File, to: &File, mut at: u64, end: u64, cancel: &AtomicBool) -> Result<(), Errno> {
    let mut buffer = vec![0; 1 << 17];
    while at < end {
        if cancel.load(Ordering::Relaxed) {
            return Err(Errno::CANCELED);
        }
        let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let read = match disk::pread(Step::ExportRead, from, &mut buffer[..length], at) {
            Ok(0) => return Err(Errno::IO),
            Ok(read) => read,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        };
        files::write_at(Step::ExportWrite, to.as_fd(), &buffer[..read], at, 0)
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        at += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_of_a_large_file_is_cancelled_in_its_middle() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        std::io::Write::write_all(&mut &from, &[7; 1000]).unwrap();
        let cancel = AtomicBool::new(true);
        for sparse in [false, true] {
            assert_eq!(copy(&from, &to, 1000, sparse, &cancel), Err(Errno::CANCELED));
        }
        assert_eq!(copy_through(&from, &to, 0, 1000, &cancel), Err(Errno::CANCELED));
        assert_eq!(to.metadata().unwrap().len(), 0);
        cancel.store(false, Ordering::Relaxed);
        assert_eq!(copy(&from, &to, 1000, false, &cancel), Ok(()));
        assert_eq!(to.metadata().unwrap().len(), 1000);
    }
}
