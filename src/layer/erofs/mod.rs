//! Images of trees in the EROFS format, without file data.
//!
//! The format is that of the kernel's `fs/erofs/erofs_fs.h`. An image holds every name, and of every inode what it has; a
//! regular file's inode has its size and no data, and the attributes `trusted.overlay.metacopy` and
//! `trusted.overlay.redirect`, by which overlayfs takes the data from a folder of contents ("data-only lower layers" in
//! the kernel's overlayfs document).
//!
//! An image is written in one pass over the manifest, folders after what is in them. Memory is needed for the folders
//! that are open, and some bytes per leaf. The same tree gives the same bytes.
//!
//! ```text
//! block 0     superblock, and behind it the root's inode with its attributes
//! then        per folder: its leaves' inodes, then its own; the names of a large folder in blocks before its inode
//! ```
//!
//! What is chosen, and why:
//! - inodes of 64 bytes: the shorter form has neither times nor 32-bit owners;
//! - an empty file has no attributes of overlayfs: it needs no content to be looked for;
//! - no file data, however small: it would be in memory once per tree instead of once, and reading it from the store
//!   would make writing an image slow;
//! - attributes have a filter (Linux 6.6), by which the kernel knows without a search that there is none of a name.

mod dirs;
mod out;
#[cfg(test)]
mod tests;
mod xattrs;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::store::tree::{Leaf, LeafKind, Meta, Name, Record};
use crate::store::{Digest, TreeDigest};
use dirs::Names;
use out::Out;
use xattrs::Xattrs;

const MAGIC: u32 = 0xE0F5_E1E2;
/// The number changes with the layout, so that images of an earlier one are not taken for this one's.
const LABEL: &[u8; 8] = b"larder 1";

const BLOCK: u64 = 4096;
/// Inodes begin at multiples of this; their number is the multiple.
const SLOT: u64 = 32;
const SUPERBLOCK: u64 = 1024;
/// The root's inode has a number of 16 bits, so it comes first.
const ROOT: u64 = SUPERBLOCK + 128;
const INODE: u64 = 64;
/// Where in an inode the number of its names is.
const NAMES: u64 = 44;

/// How an inode has its data: in blocks, with the last part behind the inode, or in chunks of which each may be missing.
const PLAIN: u16 = 0;
const INLINE: u16 = 2;
const CHUNKED: u16 = 4;
/// log2 of the bytes of the largest chunk: so a file is one chunk, or few.
const CHUNK_BITS: u32 = 12 + 31;
const NO_CHUNK: [u8; 4] = u32::MAX.to_le_bytes();

/// Why a tree has no image.
#[derive(Debug)]
pub enum Error {
    Io(io::Error),
    /// The format, or overlayfs, cannot show an entry.
    Unmountable {
        path: PathBuf,
        reason: &'static str,
    },
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::Io(error)
    }
}

/// A tree's image while it is written, record by record of its manifest.
pub struct Writer<'a> {
    out: Out<'a>,
    tree: TreeDigest,
    ids: Option<(u32, u32)>,
    /// Those of the inode that is being written.
    xattrs: Xattrs,
    /// The folders that are open, from the root.
    open: Vec<Open>,
    leaves: Vec<Inode>,
    /// How many names leaves have that have more than one.
    names: HashMap<u32, u32>,
    inodes: u32,
}

/// A folder whose entries are being read.
struct Open {
    name: Name,
    meta: Meta,
    names: Names,
    /// Where the folders in it have the number of their `..`, which is its own.
    below: Vec<u64>,
}

/// An inode that was written.
#[derive(Clone, Copy)]
struct Inode {
    /// Where it is.
    at: u64,
    kind: Kind,
}

/// An inode's type, as it stands beside each of its names.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Regular = 1,
    Folder,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
    Symlink,
}

impl Kind {
    /// As in `st_mode`.
    fn mode(self) -> u16 {
        match self {
            Kind::Regular => 0o100_000,
            Kind::Folder => 0o040_000,
            Kind::CharDevice => 0o020_000,
            Kind::BlockDevice => 0o060_000,
            Kind::Fifo => 0o010_000,
            Kind::Socket => 0o140_000,
            Kind::Symlink => 0o120_000,
        }
    }
}

/// What an inode says besides its metadata.
struct Body<'b> {
    kind: Kind,
    links: u32,
    size: u64,
    layout: u16,
    /// The first block, the number of a device, or the form of the chunks.
    place: u32,
    /// Bytes behind the attributes.
    tail: &'b [u8],
}

impl Body<'_> {
    fn empty(kind: Kind, place: u32) -> Body<'static> {
        Body {
            kind,
            links: 1,
            size: 0,
            layout: PLAIN,
            place,
            tail: &[],
        }
    }
}

impl<'a> Writer<'a> {
    /// Begins an image in an empty file. With `ids`, they own every entry.
    pub fn new(file: &'a File, tree: TreeDigest, ids: Option<(u32, u32)>) -> Writer<'a> {
        Writer {
            out: Out::new(file),
            tree,
            ids,
            xattrs: Xattrs::default(),
            open: Vec::new(),
            leaves: Vec::new(),
            names: HashMap::new(),
            inodes: 0,
        }
    }

    /// Takes the next record of the manifest.
    pub fn record(&mut self, record: Record) -> Result<(), Error> {
        match record {
            Record::Dir { name, meta, .. } => self.begin(name, meta),
            Record::Leaf { name, leaf } => {
                let inode = self.leaf(&name, &leaf)?;
                self.leaves.push(inode);
                self.name(&name, inode)
            }
            Record::Link { name, leaf } => {
                *self.names.entry(leaf.0).or_insert(1) += 1;
                self.name(&name, self.leaves[leaf.0 as usize])
            }
            Record::End => self.end(),
        }
    }

    /// Ends the image, after the end of the root. It is not durable yet. Returns its length in bytes.
    pub fn finish(mut self) -> io::Result<u64> {
        for (leaf, names) in std::mem::take(&mut self.names) {
            let at = self.leaves[leaf as usize].at;
            self.out.patch(at + NAMES, &names.to_le_bytes())?;
        }
        let end = self.out.position().next_multiple_of(BLOCK);
        self.out.skip_to(end)?;
        let superblock = self.superblock(end / BLOCK);
        self.out.patch(SUPERBLOCK, &superblock)?;
        self.out.flush()?;
        Ok(end)
    }

    /// `struct erofs_super_block`.
    fn superblock(&self, blocks: u64) -> [u8; 128] {
        let mut bytes = [0; 128];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC.to_le_bytes());
        // Inodes have times of their own; attributes have a filter.
        put(8, &0b110u32.to_le_bytes());
        put(12, &[BLOCK.trailing_zeros() as u8]);
        put(14, &((ROOT / SLOT) as u16).to_le_bytes());
        put(16, &u64::from(self.inodes).to_le_bytes());
        put(36, &(blocks as u32).to_le_bytes());
        put(48, &self.tree.as_bytes()[..16]);
        put(64, LABEL);
        // There are files in chunks.
        put(80, &0b100u32.to_le_bytes());
        bytes
    }

    fn begin(&mut self, name: Name, meta: Meta) -> Result<(), Error> {
        if self.open.is_empty() {
            // Its place is known now, what is in it at the end.
            self.out.skip_to(ROOT)?;
            self.attributes(&[], &meta, None)?;
            self.inode(ROOT, &meta, &Body::empty(Kind::Folder, 0))?;
        }
        self.open.push(Open {
            name,
            meta,
            names: Names::default(),
            below: Vec::new(),
        });
        Ok(())
    }

    fn name(&mut self, name: &[u8], inode: Inode) -> Result<(), Error> {
        let folder = self.open.last_mut();
        // The reader gives no name outside a folder.
        match folder.is_some_and(|folder| folder.names.add(name, inode.kind as u8, inode.at / SLOT)) {
            true => Ok(()),
            false => Err(self.unmountable(name, "the names of a folder have more than 4 GiB together")),
        }
    }

    fn end(&mut self) -> Result<(), Error> {
        // The reader ends no folder that was not begun.
        let Some(folder) = self.open.pop() else { return Ok(()) };
        let is_root = self.open.is_empty();
        let names = folder.names.lay();
        // What does not fill a block stands behind the inode, if that saves the better part of a block.
        let in_blocks = match names.size() % BLOCK <= BLOCK / 2 && !is_root {
            true => names.size() / BLOCK * BLOCK,
            false => names.size().next_multiple_of(BLOCK),
        };
        let tail = names.size().saturating_sub(in_blocks);
        self.attributes(&folder.name, &folder.meta, None)?;
        let (first, at) = match is_root {
            true => (self.out.position().next_multiple_of(BLOCK), ROOT),
            false => self.place(in_blocks, tail, false),
        };
        let (bytes, parent_at) = names.bytes(at / SLOT);
        let links = u32::try_from(folder.below.len()).unwrap_or(u32::MAX).saturating_add(2);
        let (blocks, rest) = bytes.split_at(bytes.len().min(in_blocks as usize));
        self.blocks(first, in_blocks, blocks)?;
        let body = Body {
            kind: Kind::Folder,
            links,
            size: in_blocks + tail,
            layout: if tail > 0 { INLINE } else { PLAIN },
            place: (first / BLOCK) as u32,
            tail: rest,
        };
        if is_root {
            let fixed = self.fixed(&folder.meta, &body);
            // Its own number was written first.
            self.out.patch(ROOT, &fixed[..20])?;
            self.out.patch(ROOT + NAMES, &links.to_le_bytes())?;
        } else {
            self.inode(at, &folder.meta, &body)?;
        }
        let parent_at = match parent_at < in_blocks {
            true => first + parent_at,
            // The tail ends where the inode does.
            false => self.out.position() - tail + (parent_at - in_blocks),
        };
        for below in folder.below {
            self.out.patch(below, &(at / SLOT).to_le_bytes())?;
        }
        match self.open.last_mut() {
            // The root's is itself.
            None => self.out.patch(parent_at, &(ROOT / SLOT).to_le_bytes())?,
            Some(parent) => {
                parent.below.push(parent_at);
                let kind = Kind::Folder;
                self.name(&folder.name, Inode { at, kind })?;
            }
        }
        Ok(())
    }

    fn leaf(&mut self, name: &[u8], leaf: &Leaf) -> Result<Inode, Error> {
        let content = match &leaf.kind {
            LeafKind::File { digest, size } if *size > 0 => Some(digest),
            _ => None,
        };
        self.attributes(name, &leaf.meta, content)?;
        let mut chunks = Vec::new();
        let mut first = 0;
        let body = match &leaf.kind {
            LeafKind::File { size: 0, .. } => Body::empty(Kind::Regular, 0),
            LeafKind::File { size, .. } => {
                for _ in 0..size.div_ceil(1 << CHUNK_BITS) {
                    chunks.extend(NO_CHUNK);
                }
                Body {
                    size: *size,
                    layout: CHUNKED,
                    tail: &chunks,
                    ..Body::empty(Kind::Regular, CHUNK_BITS - BLOCK.trailing_zeros())
                }
            }
            LeafKind::Symlink(target) => {
                // The kernel reads the two together; older ones only where they are in one block.
                let inline = self.header() + target.len() as u64 <= BLOCK;
                if !inline {
                    first = self.out.position().next_multiple_of(BLOCK);
                    self.blocks(first, BLOCK, target)?;
                }
                Body {
                    size: target.len() as u64,
                    layout: if inline { INLINE } else { PLAIN },
                    tail: if inline { target } else { &[] },
                    ..Body::empty(Kind::Symlink, (first / BLOCK) as u32)
                }
            }
            LeafKind::CharDevice { major: 0, minor: 0 } => {
                let reason = "character device 0/0 means a deleted file to overlayfs";
                return Err(self.unmountable(name, reason));
            }
            LeafKind::CharDevice { major, minor } => Body::empty(Kind::CharDevice, device(*major, *minor)),
            LeafKind::BlockDevice { major, minor } => Body::empty(Kind::BlockDevice, device(*major, *minor)),
            LeafKind::Fifo => Body::empty(Kind::Fifo, 0),
            LeafKind::Socket => Body::empty(Kind::Socket, 0),
        };
        let (_, at) = match body.layout == CHUNKED {
            // Each chunk's number is read by itself.
            true => self.place(0, 0, false),
            false => self.place(0, body.tail.len() as u64, body.kind == Kind::Symlink),
        };
        self.inode(at, &leaf.meta, &body)?;
        Ok(Inode { at, kind: body.kind })
    }

    /// Encodes an inode's attributes.
    fn attributes(&mut self, name: &[u8], meta: &Meta, content: Option<&Digest>) -> Result<(), Error> {
        self.xattrs.begin();
        if let Some(digest) = content {
            self.xattrs.data_in(digest);
        }
        for xattr in &meta.xattrs {
            if let Err(reason) = self.xattrs.add(xattr) {
                return Err(self.unmountable(name, reason));
            }
        }
        Ok(())
    }

    /// Length of the inode with its attributes.
    fn header(&self) -> u64 {
        INODE + self.xattrs.len()
    }

    /// Where the blocks of the next inode begin, and where itself: so that its tail is in one block, and with `together`
    /// all of it.
    fn place(&self, blocks: u64, tail: u64, together: bool) -> (u64, u64) {
        let mut first = self.out.position();
        if blocks > 0 {
            first = first.next_multiple_of(BLOCK);
        }
        let at = (first + blocks).next_multiple_of(SLOT);
        if tail == 0 {
            return (first, at);
        }
        let begin = if together { at } else { at + self.header() };
        let end = at + self.header() + tail;
        if begin / BLOCK == (end - 1) / BLOCK {
            return (first, at);
        }
        let begin = begin.next_multiple_of(BLOCK);
        let at = if together { begin } else { begin - self.header() };
        (first, at.next_multiple_of(SLOT))
    }

    /// Writes bytes at a block's begin, and zeros up to `length`.
    fn blocks(&mut self, first: u64, length: u64, bytes: &[u8]) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        self.out.skip_to(first)?;
        self.out.write(bytes)?;
        self.out.skip_to(first + length)
    }

    fn inode(&mut self, at: u64, meta: &Meta, body: &Body<'_>) -> io::Result<()> {
        self.inodes += 1;
        self.out.skip_to(at)?;
        let fixed = self.fixed(meta, body);
        self.out.write(&fixed)?;
        self.out.write(self.xattrs.bytes())?;
        self.out.write(body.tail)
    }

    /// `struct erofs_inode_extended`.
    fn fixed(&self, meta: &Meta, body: &Body<'_>) -> [u8; INODE as usize] {
        let mut bytes = [0; INODE as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let (uid, gid) = self.ids.unwrap_or((meta.uid, meta.gid));
        put(0, &(1 | body.layout << 1).to_le_bytes());
        put(2, &self.xattrs.units().to_le_bytes());
        put(4, &(body.kind.mode() | meta.mode).to_le_bytes());
        put(8, &body.size.to_le_bytes());
        put(16, &body.place.to_le_bytes());
        put(20, &self.inodes.to_le_bytes());
        put(24, &uid.to_le_bytes());
        put(28, &gid.to_le_bytes());
        put(32, &meta.mtime.0.to_le_bytes());
        put(40, &meta.mtime.1.to_le_bytes());
        put(NAMES as usize, &body.links.to_le_bytes());
        bytes
    }

    fn unmountable(&self, name: &[u8], reason: &'static str) -> Error {
        let above = self.open.iter().map(|folder| &*folder.name);
        let path = above.chain([name]).filter(|name| !name.is_empty());
        Error::Unmountable {
            path: path.map(OsStr::from_bytes).collect(),
            reason,
        }
    }
}

/// Whether a file looks like the whole image of a tree in this layout: by its superblock and its length.
pub fn is_whole(image: &File, tree: &TreeDigest) -> io::Result<bool> {
    let mut bytes = [0; 128];
    match image.read_exact_at(&mut bytes, SUPERBLOCK) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        other => other?,
    }
    let field = |at: usize, length: usize| &bytes[at..at + length];
    let mut blocks = [0; 4];
    blocks.copy_from_slice(field(36, 4));
    let length = u64::from(u32::from_le_bytes(blocks)) * BLOCK;
    Ok(field(0, 4) == MAGIC.to_le_bytes()
        && field(48, 16) == &tree.as_bytes()[..16]
        && field(64, 8) == LABEL
        && image.metadata()?.len() == length)
}

/// As the kernel's `new_decode_dev` reads it.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
