//! Reading a manifest: strict, as a stream, with memory bounded by what was read and without recursion.
//!
//! Only the one canonical form is taken, so that two manifests with different bytes never stand for one tree.

use std::io::{self, BufRead, BufReader, Read};

use super::write::{Before, MAGIC, VERSION, flag, kind};
use super::{Dir, DirId, Entry, Leaf, LeafId, LeafKind, Meta, Name, Node, Tree, check};
use crate::store::Digest;

/// Bytes that are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("not a manifest: it does not begin with the bytes \"LARDER\\n\"")]
    Magic,
    #[error("the manifest has format version {0}; this program reads version {VERSION}")]
    Version(u8),
    #[error("byte {offset} of the manifest: {what}")]
    Invalid { offset: u64, what: &'static str },
    #[error("the manifest is cut off at byte {offset}")]
    Truncated { offset: u64 },
    #[error("the manifest has two different sizes for {0}")]
    Sizes(Digest),
    #[error("cannot read the manifest: {0}")]
    Io(io::Error),
}

/// One step of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A folder begins; its entries follow, then its [`Record::End`]. The first record is the root, without a name.
    Dir { name: Name, meta: Meta, entries: u64 },
    /// The first name of a leaf.
    Leaf { name: Name, leaf: Leaf },
    /// Another name of the leaf with that number, counted from 0 in the order of [`Record::Leaf`].
    Link { name: Name, leaf: LeafId },
    /// The end of the folder that began last.
    End,
}

/// Reads a manifest record by record. After the root's [`Record::End`] it has made sure that nothing follows.
pub struct Reader<R> {
    input: Input<R>,
    stack: Vec<Frame>,
    before: Before,
    dirs: u32,
    leaves: u32,
    started: bool,
}

struct Frame {
    left: u64,
    /// The name read last, which the next one must exceed; empty before the first.
    last: Vec<u8>,
}

impl<R: Read> Reader<R> {
    pub fn new(input: R) -> Self {
        Self {
            input: Input {
                inner: BufReader::with_capacity(1 << 16, input),
                offset: 0,
            },
            stack: Vec::new(),
            before: Before::default(),
            dirs: 0,
            leaves: 0,
            started: false,
        }
    }

    /// The next record; `None` after the root's end. After an error there is nothing more to be had.
    pub fn next_record(&mut self) -> Result<Option<Record>, FormatError> {
        if !self.started {
            self.started = true;
            let mut magic = [0; MAGIC.len()];
            self.input.fill(&mut magic)?;
            if magic != *MAGIC {
                return Err(FormatError::Magic);
            }
            match self.input.byte()? {
                VERSION => {}
                other => return Err(FormatError::Version(other)),
            }
            let head = self.input.byte()?;
            if head & kind::MASK != kind::DIR {
                return Err(self.input.invalid("the root is not a folder"));
            }
            return self.dir(head, Name::default()).map(Some);
        }
        let Some(frame) = self.stack.last_mut() else {
            return Ok(None);
        };
        if frame.left == 0 {
            self.stack.pop();
            if self.stack.is_empty() {
                self.input.end()?;
            }
            return Ok(Some(Record::End));
        }
        frame.left -= 1;
        let name = self.input.name()?;
        check::name(&name).map_err(|what| self.input.invalid(what))?;
        if *name <= *frame.last {
            return Err(self
                .input
                .invalid("the names are not sorted by their bytes, or one is there twice"));
        }
        frame.last.clear();
        frame.last.extend_from_slice(&name);

        let head = self.input.byte()?;
        match head & kind::MASK {
            kind::DIR => self.dir(head, name).map(Some),
            kind::LINK => {
                if head != kind::LINK {
                    return Err(self.input.invalid("a further name of a leaf has fields of its own"));
                }
                let ordinal = self.input.varint()?;
                match u32::try_from(ordinal) {
                    Ok(leaf) if leaf < self.leaves => Ok(Some(Record::Link {
                        name,
                        leaf: LeafId(leaf),
                    })),
                    _ => Err(self.input.invalid("a further name of a leaf that did not come before")),
                }
            }
            _ => self.leaf(head, name).map(Some),
        }
    }

    fn dir(&mut self, head: u8, name: Name) -> Result<Record, FormatError> {
        let meta = self.meta(head)?;
        let entries = self.input.varint()?;
        self.dirs = match self.dirs.checked_add(1) {
            Some(dirs) => dirs,
            None => return Err(self.input.invalid("more than 2^32-1 folders")),
        };
        self.stack.push(Frame {
            left: entries,
            last: Vec::new(),
        });
        Ok(Record::Dir { name, meta, entries })
    }

    fn leaf(&mut self, head: u8, name: Name) -> Result<Record, FormatError> {
        let meta = self.meta(head)?;
        let kind = match head & kind::MASK {
            kind::FILE => {
                let size = self.input.varint()?;
                let mut digest = [0; 32];
                self.input.fill(&mut digest)?;
                LeafKind::File {
                    digest: Digest::from_bytes(digest),
                    size,
                }
            }
            kind::SYMLINK => LeafKind::Symlink(self.input.bytes(check::MAX_SYMLINK)?),
            kind::CHAR_DEVICE => LeafKind::CharDevice {
                major: self.input.u32()?,
                minor: self.input.u32()?,
            },
            kind::BLOCK_DEVICE => LeafKind::BlockDevice {
                major: self.input.u32()?,
                minor: self.input.u32()?,
            },
            kind::FIFO => LeafKind::Fifo,
            // The three bits have eight values; folder and link were taken before.
            _ => LeafKind::Socket,
        };
        check::kind(&kind).map_err(|what| self.input.invalid(what))?;
        self.leaves = match self.leaves.checked_add(1) {
            Some(leaves) => leaves,
            None => return Err(self.input.invalid("more than 2^32-1 leaves")),
        };
        Ok(Record::Leaf {
            name,
            leaf: Leaf { meta, kind },
        })
    }

    fn meta(&mut self, head: u8) -> Result<Meta, FormatError> {
        const REPEATED: &str = "a field is written although it equals that of the inode before";
        if head & flag::RESERVED != 0 {
            return Err(self.input.invalid("a reserved bit is set"));
        }
        let before = self.before;
        let mut now = before;
        if head & flag::MODE != 0 {
            let mode = self.input.varint()?;
            now.mode = u16::try_from(mode).map_err(|_| self.input.invalid("the mode has bits beyond 7777 (octal)"))?;
            if now.mode == before.mode {
                return Err(self.input.invalid(REPEATED));
            }
        }
        if head & flag::OWNER != 0 {
            (now.uid, now.gid) = (self.input.u32()?, self.input.u32()?);
            if (now.uid, now.gid) == (before.uid, before.gid) {
                return Err(self.input.invalid(REPEATED));
            }
        }
        if head & flag::MTIME != 0 {
            let seconds = unzigzag(self.input.varint()?);
            now.mtime = (before.mtime.0.wrapping_add(seconds), self.input.u32()?);
            if now.mtime == before.mtime {
                return Err(self.input.invalid(REPEATED));
            }
        }
        let mut meta = Meta {
            mode: now.mode,
            uid: now.uid,
            gid: now.gid,
            mtime: now.mtime,
            xattrs: Vec::new(),
        };
        if head & flag::XATTRS != 0 {
            let count = self.input.varint()?;
            if count == 0 {
                return Err(self.input.invalid("an empty list of extended attributes is written"));
            }
            // Grows with what is really there, not with what the count promises.
            for _ in 0..count {
                let name = self.input.bytes(check::MAX_XATTR_NAME)?;
                let value = self.input.bytes(check::MAX_XATTR_VALUE)?;
                meta.xattrs.push((name, value));
            }
        }
        check::meta(&meta).map_err(|what| self.input.invalid(what))?;
        self.before = now;
        Ok(meta)
    }
}

/// The contents that a manifest names: digest and size of every file, in order, repeated where the tree repeats
/// them. Checks all that [`Reader`] checks; not that one digest has one size.
pub struct Digests<R>(Reader<R>);

impl<R: Read> Digests<R> {
    pub fn new(input: R) -> Self {
        Self(Reader::new(input))
    }
}

impl<R: Read> Iterator for Digests<R> {
    type Item = Result<(Digest, u64), FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0.next_record() {
                Ok(Some(Record::Leaf {
                    leaf:
                        Leaf {
                            kind: LeafKind::File { digest, size },
                            ..
                        },
                    ..
                })) => return Some(Ok((digest, size))),
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => {
                    // Whatever is asked after an error, there is nothing more.
                    self.0.stack.clear();
                    return Some(Err(error));
                }
            }
        }
    }
}

impl Tree {
    /// Reads a manifest. Folders and leaves are numbered in the order of the manifest.
    pub fn decode(bytes: &[u8]) -> Result<Tree, FormatError> {
        Self::read(bytes)
    }

    /// Reads a manifest from a stream, to the stream's end.
    pub fn read(input: impl Read) -> Result<Tree, FormatError> {
        let tree = Self::read_but_sizes(input)?;
        check::sizes(&check::contents(tree.leaves.iter())).map_err(|two| FormatError::Sizes(two.0))?;
        Ok(tree)
    }

    /// As [`Tree::read`], but does not check that each digest has one size: for what is published, which checks it.
    pub(crate) fn read_but_sizes(input: impl Read) -> Result<Tree, FormatError> {
        let mut reader = Reader::new(input);
        let mut tree = Tree {
            dirs: Vec::new(),
            leaves: Vec::new(),
        };
        let mut open: Vec<DirId> = Vec::new();
        while let Some(record) = reader.next_record()? {
            let (name, node) = match record {
                Record::Dir { name, meta, .. } => {
                    let id = DirId(reader.dirs - 1);
                    tree.dirs.push(Dir {
                        meta,
                        entries: Vec::new(),
                    });
                    if let Some(parent) = open.last() {
                        tree.dirs[parent.0 as usize].entries.push(Entry {
                            name,
                            node: Node::Dir(id),
                        });
                    }
                    open.push(id);
                    continue;
                }
                Record::Leaf { name, leaf } => {
                    tree.leaves.push(leaf);
                    (name, Node::Leaf(LeafId(reader.leaves - 1)))
                }
                Record::Link { name, leaf } => (name, Node::Leaf(leaf)),
                Record::End => {
                    open.pop();
                    continue;
                }
            };
            if let Some(parent) = open.last() {
                tree.dirs[parent.0 as usize].entries.push(Entry { name, node });
            }
        }
        Ok(tree)
    }
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// The bytes, and how many were taken.
struct Input<R> {
    inner: BufReader<R>,
    offset: u64,
}

impl<R: Read> Input<R> {
    fn invalid(&self, what: &'static str) -> FormatError {
        FormatError::Invalid {
            offset: self.offset,
            what,
        }
    }

    #[inline]
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), FormatError> {
        match self.inner.read_exact(buffer) {
            Ok(()) => {
                self.offset += buffer.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(FormatError::Truncated { offset: self.offset })
            }
            Err(error) => Err(FormatError::Io(error)),
        }
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, FormatError> {
        // Nearly always: most of a manifest is read byte by byte.
        if let Some(byte) = self.inner.buffer().first().copied() {
            self.inner.consume(1);
            self.offset += 1;
            return Ok(byte);
        }
        let mut byte = [0];
        self.fill(&mut byte)?;
        Ok(byte[0])
    }

    /// A length and so many bytes.
    fn name(&mut self) -> Result<Name, FormatError> {
        let length = self.length(check::MAX_NAME)?;
        let mut name = Name::zeros(length);
        self.fill(name.bytes_mut())?;
        Ok(name)
    }

    /// A length and so many bytes. `limit` bounds what is set aside for a length that lies.
    fn bytes(&mut self, limit: usize) -> Result<Box<[u8]>, FormatError> {
        let mut bytes = vec![0; self.length(limit)?].into_boxed_slice();
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn length(&mut self, limit: usize) -> Result<usize, FormatError> {
        let length = self.varint()?;
        match usize::try_from(length) {
            Ok(length) if length <= limit => Ok(length),
            _ => Err(self.invalid("a name, target or value is longer than is allowed")),
        }
    }

    fn varint(&mut self) -> Result<u64, FormatError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift != 0 {
                    return Err(self.invalid("a number is not written in its shortest form"));
                }
                return Ok(value);
            }
        }
        Err(self.invalid("a number is beyond 64 bits"))
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_| self.invalid("a number is beyond 32 bits"))
    }

    fn end(&mut self) -> Result<(), FormatError> {
        loop {
            match self.inner.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(_) => return Err(self.invalid("bytes follow after the root's end")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FormatError::Io(error)),
            }
        }
    }
}
