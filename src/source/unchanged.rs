//! Which files of a folder are as they were when it was read last, so that they need not be read again.
//!
//! Beside each ref of a folder the store keeps a note: for every leaf of the tree the inode it was read from and the
//! time of that inode's last change (ctime), which no program can set. A leaf with the same device, inode, size, mtime
//! and ctime is taken over as it is in the tree, with its digest and extended attributes. A file that was changed just
//! before the reading began has no such note: another change might have left it with the same time ([`is_settled`]).
//!
//! What this cannot see is what no file system tells: a write through a shared memory mapping whose page was dirty
//! already when the file was read.

use std::time::SystemTime;

use rustix::fs::{FileType, Stat};
use sha2::{Digest as _, Sha256};

use super::leaf::{device, file_type};
use crate::store::tree::{Leaf, LeafKind, Meta, reorder};
use crate::store::{Build, Error, RefName, Store, TreeDigest, is_settled};

const MAGIC: &[u8; 16] = b"LARDER-UNCHANGED";
const VERSION: u8 = 1;
const HEAD: usize = MAGIC.len() + 1 + 32 + 8;
const MARK: usize = 20;

/// How a leaf's inode was when the leaf was read. Inode 0, which no file has, stands for "not known".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Mark {
    inode: u64,
    ctime: (i64, u32),
}

/// The marks of a reading under way, in the order in which leaves were added to the tree.
pub(super) struct Marks {
    device: u64,
    since: SystemTime,
    marks: Vec<Mark>,
}

impl Marks {
    /// Call before anything is read. `device` is that of the root; a leaf of another one gets no mark.
    pub fn new(device: u64) -> Self {
        Self {
            device,
            since: SystemTime::now(),
            marks: Vec::new(),
        }
    }

    /// The leaf with that number was read, with this status before and after.
    pub fn add(&mut self, leaf: usize, stat: &Stat) {
        if stat.st_dev != self.device || !is_settled(stat, self.since) {
            return;
        }
        if self.marks.len() <= leaf {
            self.marks.resize(leaf + 1, Mark::default());
        }
        self.marks[leaf] = mark(stat);
    }

    /// Puts the marks into the order of the finished tree, where leaf `order[i]` has become leaf `i`.
    pub fn finish(mut self, order: &[u32]) -> Seen {
        // The last leaves may have none.
        let leaves = order.iter().max().map_or(0, |last| *last as usize + 1);
        self.marks.resize(leaves, Mark::default());
        reorder(&mut self.marks, order);
        Seen {
            device: self.device,
            marks: self.marks,
        }
    }
}

impl Mark {
    fn encode(&self, note: &mut Vec<u8>) {
        note.extend_from_slice(&self.inode.to_le_bytes());
        note.extend_from_slice(&self.ctime.0.to_le_bytes());
        note.extend_from_slice(&self.ctime.1.to_le_bytes());
    }

    fn decode(bytes: &[u8; MARK]) -> Option<Mark> {
        let (inode, rest) = bytes.split_first_chunk()?;
        let (seconds, nanos) = rest.split_first_chunk()?;
        Some(Mark {
            inode: u64::from_le_bytes(*inode),
            ctime: (i64::from_le_bytes(*seconds), u32::from_le_bytes(nanos.try_into().ok()?)),
        })
    }
}

fn mark(stat: &Stat) -> Mark {
    Mark {
        inode: stat.st_ino,
        ctime: (stat.st_ctime, stat.st_ctime_nsec as u32),
    }
}

/// What is noted beside a ref.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    device: u64,
    /// One for each leaf of the tree.
    marks: Vec<Mark>,
}

impl Seen {
    /// Notes it beside the ref that the tree was published under.
    pub fn save(&self, store: &Store, name: &RefName, tree: &TreeDigest) -> Result<(), Error> {
        store.write_note(name, &self.encode(tree))
    }

    fn encode(&self, tree: &TreeDigest) -> Vec<u8> {
        let mut note = Vec::with_capacity(HEAD + self.marks.len() * MARK + 32);
        note.extend_from_slice(MAGIC);
        note.push(VERSION);
        note.extend_from_slice(tree.as_bytes());
        note.extend_from_slice(&self.device.to_le_bytes());
        for mark in &self.marks {
            mark.encode(&mut note);
        }
        // Written without a sync: after a power cut there may be anything.
        let check = Sha256::digest(&note);
        note.extend_from_slice(&check);
        note
    }

    fn decode(note: &[u8]) -> Option<(TreeDigest, Seen)> {
        let (note, check) = note.split_last_chunk::<32>()?;
        if Sha256::digest(note)[..] != check[..] {
            return None;
        }
        let (magic, rest) = note.split_first_chunk::<16>()?;
        let (version, rest) = rest.split_first()?;
        if magic != MAGIC || *version != VERSION {
            return None;
        }
        let (tree, rest) = rest.split_first_chunk()?;
        let (device, rest) = rest.split_first_chunk()?;
        let (marks, rest) = rest.as_chunks::<MARK>();
        if !rest.is_empty() {
            return None;
        }
        let seen = Seen {
            device: u64::from_le_bytes(*device),
            marks: marks.iter().map(Mark::decode).collect::<Option<_>>()?,
        };
        Some((TreeDigest::from_bytes(*tree), seen))
    }
}

/// Reads a note as an input of tests and fuzz targets, also one whose check does not hold, and writes what was read.
#[cfg(any(test, fuzzing))]
pub fn reread_note(note: &[u8]) -> Option<Vec<u8>> {
    let whole = [note, &Sha256::digest(note)].concat();
    assert!(Seen::decode(note).is_none_or(|(tree, seen)| seen.encode(&tree) == note));
    let (tree, seen) = Seen::decode(&whole)?;
    let mut again = seen.encode(&tree);
    again.truncate(note.len());
    Some(again)
}

/// The leaves of a tree that was read before, and how their inodes were.
pub(super) struct Known {
    tree: TreeDigest,
    leaves: Vec<Leaf>,
    seen: Seen,
    /// The leaves that have a mark, by inode.
    by_inode: Vec<u32>,
}

impl Known {
    /// What was published under that name from a folder last; the build keeps it. `None` if nothing is noted, or what
    /// is noted cannot be used: then all is read.
    pub fn load(store: &Store, name: &RefName, build: &Build) -> Option<Known> {
        let note = store.read_note(name).unwrap_or_else(|error| {
            tracing::warn!(%name, %error, "cannot read what is known of the folder; reading all of it");
            None
        })?;
        let (tree, seen) = Seen::decode(&note)?;
        drop(note);
        // A tree that is damaged or gone is one that is to be built anew.
        let leaves = build.keep(&tree).ok()?;
        if leaves.len() != seen.marks.len() {
            return None;
        }
        let marked = (0..).zip(&seen.marks).filter(|(_, mark)| mark.inode != 0);
        let mut by_inode: Vec<u32> = marked.map(|(leaf, _)| leaf).collect();
        by_inode.sort_unstable_by_key(|leaf| seen.marks[*leaf as usize].inode);
        Some(Known {
            tree,
            leaves,
            seen,
            by_inode,
        })
    }

    /// The tree beside which exactly this is noted already.
    pub fn noted_as(self, seen: &Seen) -> Option<TreeDigest> {
        (self.seen == *seen).then_some(self.tree)
    }

    /// The leaf that was read from this inode, if it is now as it was then.
    pub fn unchanged(&self, stat: &Stat) -> Option<Leaf> {
        let mark_of = |leaf: &u32| self.seen.marks[*leaf as usize];
        let found = self
            .by_inode
            .binary_search_by_key(&stat.st_ino, |leaf| mark_of(leaf).inode);
        let number = self.by_inode[found.ok()?];
        let leaf = &self.leaves[number as usize];
        let same = mark_of(&number) == mark(stat)
            && self.seen.device == stat.st_dev
            && leaf.meta.mtime == (stat.st_mtime, stat.st_mtime_nsec as u32)
            && is_kind(&leaf.kind, stat);
        same.then(|| Leaf {
            meta: Meta {
                mode: (stat.st_mode & 0o7777) as u16,
                uid: stat.st_uid,
                gid: stat.st_gid,
                ..leaf.meta.clone()
            },
            kind: leaf.kind.clone(),
        })
    }
}

fn is_kind(kind: &LeafKind, stat: &Stat) -> bool {
    match (kind, file_type(stat)) {
        (LeafKind::File { size, .. }, FileType::RegularFile) => i64::try_from(*size) == Ok(stat.st_size),
        (LeafKind::Symlink(target), FileType::Symlink) => i64::try_from(target.len()) == Ok(stat.st_size),
        (LeafKind::CharDevice { major, minor }, FileType::CharacterDevice)
        | (LeafKind::BlockDevice { major, minor }, FileType::BlockDevice) => (*major, *minor) == device(stat),
        (LeafKind::Fifo, FileType::Fifo) | (LeafKind::Socket, FileType::Socket) => true,
        _ => false,
    }
}
