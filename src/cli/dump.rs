//! A tree in the dump format of composefs, which `mkcomposefs --from-file` reads: composefs-dump(5).
//!
//! The payload of a file is its path below `objects/`. The digest column stays `-`: it is for fs-verity digests, and a
//! store's names are SHA-256 of the bytes.

use std::io::{self, Write};

use rustix::fs::makedev;

use super::links::Links;
use crate::store::Digest;
use crate::store::tree::{LeafKind, Meta, Node, Tree};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHAR_DEVICE: u32 = 0o020_000;
const BLOCK_DEVICE: u32 = 0o060_000;
const FIFO: u32 = 0o010_000;
const SOCKET: u32 = 0o140_000;

/// Writes one line per name.
pub fn write(tree: &Tree, out: &mut dyn Write) -> io::Result<()> {
    let mut links = Links::of(tree);
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        let path = [b"/", path].concat();
        match node {
            Node::Dir(id) => {
                let dir = tree.dir(id);
                let folders = dir.entries.iter().filter(|entry| matches!(entry.node, Node::Dir(_)));
                let line = Line {
                    path: &path,
                    size: 0,
                    mark: "",
                    kind: DIRECTORY,
                    links: 2 + folders.count() as u32,
                    device: 0,
                    payload: None,
                };
                line.write(&dir.meta, out)?;
            }
            Node::Leaf(id) => {
                let leaf = tree.leaf(id);
                let (kind, size, device, payload) = inode(&leaf.kind);
                let known = links.first(id, &path);
                let line = Line {
                    path: &path,
                    size,
                    mark: if known.is_some() { "@" } else { "" },
                    kind,
                    links: links.count(id),
                    device,
                    payload: known.as_ref().or(payload.as_ref()).map(|payload| &payload[..]),
                };
                line.write(&leaf.meta, out)?;
            }
        }
    }
    Ok(())
}

/// Type, size, device and payload.
fn inode(kind: &LeafKind) -> (u32, u64, u64, Option<Vec<u8>>) {
    match kind {
        // Nothing has to be fetched for an empty file.
        LeafKind::File { size: 0, .. } => (REGULAR, 0, 0, None),
        LeafKind::File { digest, size } => (REGULAR, *size, 0, Some(object(digest))),
        LeafKind::Symlink(target) => (SYMLINK, target.len() as u64, 0, Some(target.to_vec())),
        LeafKind::CharDevice { major, minor } => (CHAR_DEVICE, 0, makedev(*major, *minor), None),
        LeafKind::BlockDevice { major, minor } => (BLOCK_DEVICE, 0, makedev(*major, *minor), None),
        LeafKind::Fifo => (FIFO, 0, 0, None),
        LeafKind::Socket => (SOCKET, 0, 0, None),
    }
}

/// Relative to the folder of objects, as in a composefs repository.
fn object(digest: &Digest) -> Vec<u8> {
    let hex = digest.hex();
    format!("{}/{}", &hex[..2], &hex[2..]).into_bytes()
}

struct Line<'a> {
    path: &'a [u8],
    size: u64,
    mark: &'static str,
    kind: u32,
    links: u32,
    device: u64,
    payload: Option<&'a [u8]>,
}

impl Line<'_> {
    fn write(&self, meta: &Meta, out: &mut dyn Write) -> io::Result<()> {
        escape(self.path, false, out)?;
        let (seconds, nanos) = meta.mtime;
        write!(
            out,
            " {} {}{:o} {} {} {} {} {seconds}.{nanos} ",
            self.size,
            self.mark,
            self.kind | u32::from(meta.mode),
            self.links,
            meta.uid,
            meta.gid,
            self.device,
        )?;
        match self.payload {
            None => out.write_all(b"-")?,
            // Alone it would say that there is none.
            Some(b"-") => out.write_all(b"\\x2d")?,
            Some(payload) => escape(payload, false, out)?,
        }
        out.write_all(b" - -")?;
        for (name, value) in &meta.xattrs {
            out.write_all(b" ")?;
            escape(name, true, out)?;
            out.write_all(b"=")?;
            escape(value, true, out)?;
        }
        out.write_all(b"\n")
    }
}

/// Everything but visible ASCII is escaped; `=` only where it divides a name from its value.
fn escape(bytes: &[u8], equals: bool, out: &mut dyn Write) -> io::Result<()> {
    for byte in bytes {
        match byte {
            b'\\' => out.write_all(b"\\\\")?,
            b'\n' => out.write_all(b"\\n")?,
            b'\r' => out.write_all(b"\\r")?,
            b'\t' => out.write_all(b"\\t")?,
            b'=' if equals => out.write_all(b"\\x3d")?,
            byte if byte.is_ascii_graphic() => out.write_all(&[*byte])?,
            byte => write!(out, "\\x{byte:02x}")?,
        }
    }
    Ok(())
}
