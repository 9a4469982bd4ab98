//! A tree as JSON, for programs that know nothing of manifests (docs/cli.md).

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

use super::links::Links;
use super::text::{lossless, rfc3339};
use super::trees::Named;
use crate::store::tree::{LeafId, LeafKind, Meta, Node, Tree};
use crate::store::{Digest, TreeDigest};

/// What a tree is as JSON. It is written while it is walked: nothing of it is held in memory twice.
pub fn document<'a>(named: &Named, tree: &'a Tree) -> Document<'a> {
    let current = named.entry.as_ref().and_then(|entry| entry.current.as_ref());
    let stats = tree.stats();
    Document {
        name: named.name(),
        digest: named.digest,
        created_at: current.and_then(|current| rfc3339(current.built_at)),
        file_count: stats.files,
        entry_count: stats.entries,
        size: stats.logical,
        unique: stats.distinct,
        files: Files(tree),
        entries: Entries(tree),
    }
}

#[derive(Serialize)]
pub struct Document<'a> {
    name: Option<String>,
    digest: TreeDigest,
    created_at: Option<String>,
    file_count: u64,
    entry_count: u64,
    size: u64,
    unique: u64,
    files: Files<'a>,
    entries: Entries<'a>,
}

/// Path → digest, of regular files.
struct Files<'a>(&'a Tree);

impl Serialize for Files<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut walk = self.0.walk();
        while let Some((path, node)) = walk.next() {
            if let Node::Leaf(id) = node
                && let LeafKind::File { digest, .. } = &self.0.leaf(id).kind
            {
                map.serialize_entry(&lossless(path), digest)?;
            }
        }
        map.end()
    }
}

/// Every name in the order of the walk, the root first.
struct Entries<'a>(&'a Tree);

impl Serialize for Entries<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tree = self.0;
        let mut list = serializer.serialize_seq(None)?;
        let mut links = Links::of(tree);
        let mut walk = tree.walk();
        while let Some((path, node)) = walk.next() {
            let path = lossless(path);
            let entry = match node {
                Node::Dir(id) => Entry::new(&tree.dir(id).meta, path, Kind::Directory),
                Node::Leaf(id) => Entry {
                    link_to: links.first(id, &path),
                    ..leaf(tree, id, path)
                },
            };
            list.serialize_element(&entry)?;
        }
        list.end()
    }
}

fn leaf(tree: &Tree, id: LeafId, path: String) -> Entry<'_> {
    let leaf = tree.leaf(id);
    let kind = match &leaf.kind {
        LeafKind::File { digest, size } => Kind::File {
            sha256: digest,
            size: *size,
        },
        LeafKind::Symlink(target) => Kind::Symlink {
            target: lossless(target),
        },
        LeafKind::CharDevice { major, minor } => Kind::CharDevice {
            major: *major,
            minor: *minor,
        },
        LeafKind::BlockDevice { major, minor } => Kind::BlockDevice {
            major: *major,
            minor: *minor,
        },
        LeafKind::Fifo => Kind::Fifo,
        LeafKind::Socket => Kind::Socket,
    };
    Entry::new(&leaf.meta, path, kind)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    path: String,
    #[serde(flatten)]
    kind: Kind<'a>,
    /// Octal.
    mode: String,
    uid: u32,
    gid: u32,
    mtime: Mtime,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    xattrs: Vec<Xattr>,
    /// A hard link to this path, the inode's first name.
    #[serde(skip_serializing_if = "Option::is_none")]
    link_to: Option<String>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "camelCase")]
enum Kind<'a> {
    Directory,
    File { sha256: &'a Digest, size: u64 },
    Symlink { target: String },
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Socket,
}

#[derive(Serialize)]
struct Mtime {
    seconds: i64,
    nanoseconds: u32,
}

#[derive(Serialize)]
struct Xattr {
    name: String,
    value: String,
}

impl<'a> Entry<'a> {
    fn new(meta: &Meta, path: String, kind: Kind<'a>) -> Self {
        let xattr = |(name, value): &(Box<[u8]>, Box<[u8]>)| Xattr {
            name: lossless(name),
            value: lossless(value),
        };
        Entry {
            path,
            kind,
            mode: format!("{:04o}", meta.mode),
            uid: meta.uid,
            gid: meta.gid,
            mtime: Mtime {
                seconds: meta.mtime.0,
                nanoseconds: meta.mtime.1,
            },
            xattrs: meta.xattrs.iter().map(xattr).collect(),
            link_to: None,
        }
    }
}
