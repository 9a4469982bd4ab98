//! Writing a manifest: docs/format.md, byte by byte.

use std::io::{self, Write};

use sha2::{Digest as _, Sha256};

use super::order::{Met, in_order};
use super::{InvalidTree, Leaf, LeafKind, Meta, Tree, check};
use crate::store::TreeDigest;

/// The first seven bytes of every manifest.
pub const MAGIC: &[u8; 7] = b"LARDER\n";
/// The eighth byte: the version of the format. A change of any byte of any manifest is a new version.
pub const VERSION: u8 = 1;

/// The low three bits of a record's first byte.
pub(super) mod kind {
    pub const DIR: u8 = 0;
    pub const FILE: u8 = 1;
    pub const SYMLINK: u8 = 2;
    pub const CHAR_DEVICE: u8 = 3;
    pub const BLOCK_DEVICE: u8 = 4;
    pub const FIFO: u8 = 5;
    pub const SOCKET: u8 = 6;
    pub const LINK: u8 = 7;
    pub const MASK: u8 = 7;
}

/// The other bits: which fields follow, because they differ from those of the inode before.
pub(super) mod flag {
    pub const MODE: u8 = 1 << 3;
    pub const OWNER: u8 = 1 << 4;
    pub const MTIME: u8 = 1 << 5;
    pub const XATTRS: u8 = 1 << 6;
    pub const RESERVED: u8 = 1 << 7;
}

/// What the next inode is compared with.
#[derive(Default, Clone, Copy)]
pub(super) struct Before {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
}

/// Why a manifest was not written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error(transparent)]
    Invalid(#[from] InvalidTree),
    #[error("cannot write the manifest: {0}")]
    Io(#[from] io::Error),
}

const FLUSH_AT: usize = 1 << 16;

impl Tree {
    /// Writes the tree's manifest and returns its digest. Equal trees give equal bytes, however their folders and
    /// leaves are numbered; what no name reaches is not written.
    ///
    /// Fails if the tree is not valid (a bad or unsorted name, a folder with two names, …) or `out` fails.
    pub fn encode(&self, out: &mut dyn Write) -> Result<TreeDigest, EncodeError> {
        let (digest, ordinals) = self.write_records(out)?;
        let reached = self
            .leaves
            .iter()
            .zip(&ordinals)
            .filter(|(_, ordinal)| ordinal.is_some());
        check::sizes(&check::contents(reached.map(|(leaf, _)| leaf))).map_err(InvalidTree::from)?;
        Ok(digest)
    }

    /// As [`Tree::encode`], but does not check that each digest has one size. For a tree of which all leaves have names,
    /// whose caller does.
    pub(crate) fn encode_but_sizes(&self, out: &mut dyn Write) -> Result<TreeDigest, EncodeError> {
        Ok(self.write_records(out)?.0)
    }

    /// Also returns for each leaf as which one it was written.
    fn write_records(&self, out: &mut dyn Write) -> Result<(TreeDigest, Vec<Option<u32>>), EncodeError> {
        let mut writer = Writer {
            out,
            buffer: Vec::with_capacity(FLUSH_AT + 4096),
            hash: Sha256::new(),
            before: Before::default(),
        };
        writer.buffer.extend_from_slice(MAGIC);
        writer.buffer.push(VERSION);
        let ordinals = in_order(self, |met| writer.met(&met))?;
        writer.flush()?;
        Ok((TreeDigest::from_bytes(writer.hash.finalize().into()), ordinals))
    }

    /// The digest alone. Fails if the tree is not valid.
    pub fn digest(&self) -> Result<TreeDigest, InvalidTree> {
        match self.encode(&mut io::sink()) {
            Ok(digest) => Ok(digest),
            Err(EncodeError::Invalid(invalid)) => Err(invalid),
            // A sink takes everything.
            Err(EncodeError::Io(error)) => Err(InvalidTree::new(*b"", error.to_string())),
        }
    }
}

struct Writer<'a> {
    out: &'a mut dyn Write,
    buffer: Vec<u8>,
    hash: Sha256,
    before: Before,
}

impl Writer<'_> {
    fn met(&mut self, met: &Met<'_>) -> Result<(), EncodeError> {
        match met {
            Met::Root { dir } => {
                self.inode(kind::DIR, &dir.meta);
                self.varint(dir.entries.len() as u64);
            }
            Met::Dir { name, dir, .. } => {
                self.bytes(name);
                self.inode(kind::DIR, &dir.meta);
                self.varint(dir.entries.len() as u64);
            }
            Met::Leaf { name, leaf, .. } => {
                self.bytes(name);
                self.leaf(leaf);
            }
            Met::Link { name, ordinal } => {
                self.bytes(name);
                self.buffer.push(kind::LINK);
                self.varint(u64::from(*ordinal));
            }
        }
        if self.buffer.len() >= FLUSH_AT {
            self.flush()?;
        }
        Ok(())
    }

    fn leaf(&mut self, leaf: &Leaf) {
        match &leaf.kind {
            LeafKind::File { digest, size } => {
                self.inode(kind::FILE, &leaf.meta);
                self.varint(*size);
                self.buffer.extend_from_slice(digest.as_bytes());
            }
            LeafKind::Symlink(target) => {
                self.inode(kind::SYMLINK, &leaf.meta);
                self.bytes(target);
            }
            LeafKind::CharDevice { major, minor } => {
                self.inode(kind::CHAR_DEVICE, &leaf.meta);
                self.varint(u64::from(*major));
                self.varint(u64::from(*minor));
            }
            LeafKind::BlockDevice { major, minor } => {
                self.inode(kind::BLOCK_DEVICE, &leaf.meta);
                self.varint(u64::from(*major));
                self.varint(u64::from(*minor));
            }
            LeafKind::Fifo => self.inode(kind::FIFO, &leaf.meta),
            LeafKind::Socket => self.inode(kind::SOCKET, &leaf.meta),
        }
    }

    /// A record's first byte and the fields that it announces.
    fn inode(&mut self, kind: u8, meta: &Meta) {
        let before = self.before;
        let mut head = kind;
        for (differs, flag) in [
            (meta.mode != before.mode, flag::MODE),
            ((meta.uid, meta.gid) != (before.uid, before.gid), flag::OWNER),
            (meta.mtime != before.mtime, flag::MTIME),
            (!meta.xattrs.is_empty(), flag::XATTRS),
        ] {
            if differs {
                head |= flag;
            }
        }
        self.buffer.push(head);
        if head & flag::MODE != 0 {
            self.varint(u64::from(meta.mode));
        }
        if head & flag::OWNER != 0 {
            self.varint(u64::from(meta.uid));
            self.varint(u64::from(meta.gid));
        }
        if head & flag::MTIME != 0 {
            // Files of one tree are of near times: a difference is shorter than the time.
            self.varint(zigzag(meta.mtime.0.wrapping_sub(before.mtime.0)));
            self.varint(u64::from(meta.mtime.1));
        }
        if head & flag::XATTRS != 0 {
            self.varint(meta.xattrs.len() as u64);
            for (name, value) in &meta.xattrs {
                self.bytes(name);
                self.bytes(value);
            }
        }
        self.before = Before {
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            mtime: meta.mtime,
        };
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.buffer.extend_from_slice(bytes);
    }

    /// Unsigned LEB128: seven bits a byte, lowest first, the high bit set on all but the last.
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.buffer.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.buffer.push(value as u8);
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hash.update(&self.buffer);
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Small numbers of either sign become small unsigned ones: 0, -1, 1, -2 … → 0, 1, 2, 3 …
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}
