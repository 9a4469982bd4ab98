//! A tree of files with everything that it keeps: types, modes, owners, times, extended attributes, hard links.
//!
//! The in-memory form is two flat arenas, so that neither a deep tree nor dropping one needs a deep stack. A file's
//! content is a digest and a size; its bytes are a blob of the store. Hard links are several entries with one
//! [`LeafId`].
//!
//! - [`Tree::new`], [`Tree::add_dir`], [`Tree::add_leaf`], [`Tree::add_link`], [`Tree::finish`]: making one.
//! - [`Tree::encode`], [`Tree::decode`], [`Reader`], [`Digests`]: the manifest, its canonical form as bytes.
//! - [`Tree::lookup`], [`Tree::walk`], [`Tree::stats`]: looking into one.

mod build;
mod check;
mod diff;
#[cfg(test)]
mod golden;
mod name;
mod order;
mod read;
#[cfg(test)]
mod tests;
mod walk;
mod write;

pub(crate) use build::reorder;
pub(crate) use check::Content;
pub use check::{InvalidTree, MAX_NAME, MAX_SYMLINK, MAX_XATTR_NAME, MAX_XATTR_VALUE};
pub use diff::{Change, Difference, What, diff};
pub use name::Name;
pub use read::{Digests, FormatError, Reader, Record};
pub use walk::{Stats, Walk};
pub use write::{EncodeError, MAGIC, VERSION};

use super::Digest;

/// Index of a folder in [`Tree::dirs`]. The root is `DirId(0)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirId(pub u32);

/// Index of a leaf (anything but a folder) in [`Tree::leaves`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeafId(pub u32);

/// A whole tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Every folder; the first is the root.
    pub dirs: Vec<Dir>,
    /// Every other inode, once, however many names it has.
    pub leaves: Vec<Leaf>,
}

/// A folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dir {
    pub meta: Meta,
    /// Sorted by the bytes of the name; names are unique.
    pub entries: Vec<Entry>,
}

/// A name in a folder. Names are bytes: not empty, not `.` or `..`, without `/` and NUL, at most 255 of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: Name,
    pub node: Node,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    Dir(DirId),
    Leaf(LeafId),
}

/// An inode that is not a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub meta: Meta,
    pub kind: LeafKind,
}

/// The type of a leaf and what belongs to the type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeafKind {
    /// Size in bytes. An empty file has the digest of no bytes, and a blob like any other.
    File {
        digest: Digest,
        size: u64,
    },
    /// The link's target, as it stands in the link.
    Symlink(Box<[u8]>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

/// Name and value of an extended attribute.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky: `0o7777` at most.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Time of the last change of the content: seconds since 1970 (also before it) and nanoseconds below 10^9.
    pub mtime: (i64, u32),
    /// Extended attributes, sorted by name; names are unique.
    pub xattrs: Vec<Xattr>,
}
