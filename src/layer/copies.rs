//! Is the copy of a tree ([`super::lower`]) what the tree is? Entry by entry, with contents by their digests.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, OFlags, Stat, fstat, readlinkat, statat};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::descent::{Descent, names, open_beneath};
use super::xattrs::{Buffers, meta};
use crate::store::Digest;
use crate::store::tree::{DirId, Entry, Leaf, LeafId, LeafKind, Node, Tree};

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 18;

/// How a copy compares.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Alike,
    /// The first entry, from the copy's root, that is another one or cannot be read.
    Differs(Vec<u8>),
    Cancelled,
}

/// Compares a folder with the tree that it should be a copy of. `wait` is told how many bytes were read, and says whether to
/// go on.
///
/// # Errors
/// If the folder cannot be walked: what cannot be read in it differs.
pub(super) fn compare(folder: OwnedFd, tree: &Tree, wait: &mut dyn FnMut(u64) -> bool) -> io::Result<Compared> {
    let mut comparison = Comparison {
        tree,
        links: tree.links(),
        inodes: HashMap::new(),
        descent: Descent::new(folder)?,
        buffers: Buffers::new(),
        chunk: vec![0; CHUNK],
        wait,
    };
    let mut path: Vec<u8> = Vec::new();
    if !comparison.folder(Tree::ROOT).unwrap_or(false) {
        return Ok(Compared::Differs(b".".to_vec()));
    }
    // The folders that are open: their entries that are left, and the length of their path.
    let mut frames: Vec<(std::slice::Iter<'_, Entry>, usize)> = vec![(tree.dir(Tree::ROOT).entries.iter(), 0)];
    while let Some((entries, length)) = frames.last_mut() {
        path.truncate(*length);
        let Some(entry) = entries.next() else {
            frames.pop();
            if !frames.is_empty() {
                comparison.descent.leave()?;
            }
            continue;
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(&*entry.name);
        let compared = match entry.node {
            Node::Dir(dir) => comparison.enter(&entry.name, dir),
            Node::Leaf(leaf) => comparison.leaf(&entry.name, leaf),
        };
        match (compared, entry.node) {
            (Ok(Some(true)), Node::Dir(dir)) => frames.push((tree.dir(dir).entries.iter(), path.len())),
            (Ok(Some(true)), Node::Leaf(_)) => {}
            (Ok(None), _) => return Ok(Compared::Cancelled),
            (Ok(Some(false)) | Err(_), _) => return Ok(Compared::Differs(path)),
        }
    }
    Ok(Compared::Alike)
}

struct Comparison<'a> {
    tree: &'a Tree,
    links: Vec<u32>,
    /// Where the leaves with several names are.
    inodes: HashMap<LeafId, (u64, u64)>,
    descent: Descent,
    buffers: Buffers,
    chunk: Vec<u8>,
    wait: &'a mut dyn FnMut(u64) -> bool,
}

impl Comparison<'_> {
    /// Is the current folder, with its names, as this one of the tree?
    fn folder(&mut self, dir: DirId) -> io::Result<bool> {
        let folder = self.descent.folder()?.clone();
        let dir = self.tree.dir(dir);
        let names = names(&*folder)?;
        let names = names.iter().map(|name| name.to_bytes());
        Ok(names.eq(dir.entries.iter().map(|entry| &*entry.name))
            && dir.meta == meta(&fstat(&folder)?, self.buffers.of(&*folder)?))
    }

    fn enter(&mut self, name: &[u8], dir: DirId) -> io::Result<Option<bool>> {
        self.descent.enter(&c_string(name)?)?;
        self.folder(dir).map(Some)
    }

    /// `None` if it was not to go on.
    fn leaf(&mut self, name: &[u8], id: LeafId) -> io::Result<Option<bool>> {
        let name = c_string(name)?;
        let folder = self.descent.folder()?.clone();
        let leaf = self.tree.leaf(id);
        let place = open_beneath(&*folder, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)?;
        let stat = statat(&place, c"", AtFlags::EMPTY_PATH)?;
        let links = self.links[id.0 as usize];
        let inode = (stat.st_dev, stat.st_ino);
        let is_same = leaf.meta == meta(&stat, self.buffers.at(&place)?)
            && stat.st_nlink as u64 == u64::from(links)
            && (links < 2 || *self.inodes.entry(id).or_insert(inode) == inode)
            && is_of_kind(leaf, &stat, &place)?;
        match &leaf.kind {
            LeafKind::File { digest, .. } if is_same => self.content(&folder, &name, digest),
            _ => Ok(Some(is_same)),
        }
    }

    /// A file with several names is read for each: it is rare, and what a name leads to is what counts.
    fn content(&mut self, folder: &OwnedFd, name: &CStr, digest: &Digest) -> io::Result<Option<bool>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = open_beneath(folder, name, flags)?;
        let mut hash = Sha256::new();
        loop {
            match rustix::io::read(&file, &mut self.chunk[..]) {
                Ok(0) => return Ok(Some(Digest::from_bytes(hash.finalize().into()) == *digest)),
                Ok(read) => {
                    hash.update(&self.chunk[..read]);
                    if !(self.wait)(read as u64) {
                        return Ok(None);
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn is_of_kind(leaf: &Leaf, stat: &Stat, place: impl AsFd) -> io::Result<bool> {
    let device = || (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    Ok(match (&leaf.kind, FileType::from_raw_mode(stat.st_mode)) {
        (LeafKind::File { size, .. }, FileType::RegularFile) => u64::try_from(stat.st_size) == Ok(*size),
        (LeafKind::Symlink(target), FileType::Symlink) => readlinkat(place, c"", Vec::new())?.as_bytes() == &**target,
        (LeafKind::CharDevice { major, minor }, FileType::CharacterDevice)
        | (LeafKind::BlockDevice { major, minor }, FileType::BlockDevice) => device() == (*major, *minor),
        (LeafKind::Fifo, FileType::Fifo) | (LeafKind::Socket, FileType::Socket) => true,
        _ => false,
    })
}

fn c_string(name: &[u8]) -> io::Result<CString> {
    Ok(CString::new(name)?)
}
