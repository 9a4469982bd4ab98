//! What the store's room is used for, and what storing every content once saves: exact figures, in one pass over the
//! manifests, with one small entry per distinct content in memory. docs/store.md defines each figure.
//!
//! Every stored manifest counts, once, however many refs name it. What cannot be read is reported, and the figures
//! then say that they are incomplete.

mod count;
#[cfg(test)]
mod tests;

use serde::Serialize;

use super::{Digest, Error, Held, Holders, Problem, Reader, TreeDigest};

/// What storing every content once saves.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dedup {
    pub refs: u64,
    /// Distinct trees that are stored: current, history, and those that no ref names.
    pub manifests: u64,
    /// Regular files of all these trees. Equal files count each, the names of one hard-linked file together once.
    pub references: u64,
    /// Distinct contents of them.
    pub unique_blobs: u64,
    /// Bytes of all references: what the trees would take without deduplication.
    pub logical_bytes: u64,
    /// Bytes of the distinct contents: what they do take.
    pub unique_bytes: u64,
    /// `logical_bytes` less `unique_bytes`.
    pub saved_bytes: u64,
    /// `saved_bytes` in per cent of `logical_bytes`; 0 if that is 0.
    pub saved_percent: f64,
    /// `logical_bytes` over `unique_bytes`; 1 if that is 0.
    pub ratio: f64,
    /// Something could not be read: the true figures are higher, or (what a tree has for itself) lower.
    pub incomplete: bool,
    pub problems: Vec<Problem>,
}

/// What the store's room is used for.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Analytics {
    pub dedup: Dedup,
    /// Contents that a current tree names.
    pub current: Amount,
    /// Contents that history names, and no current tree.
    pub history: Amount,
    /// Contents that only trees name which no ref does: of layers and mounts, or the next collection takes them.
    pub unnamed: Amount,
    /// What lies in the store and no stored tree names: of running builds, or collections take it in time.
    pub garbage: Amount,
    /// Contents that a tree names and that are not there: damage. They are among the figures above. Trees that the next
    /// collection takes do not count.
    pub missing: Amount,
    /// The distinct contents by size, the smallest first.
    pub sizes: Vec<Bucket>,
    /// Every stored tree: the current ones by the names of their refs, then history, then those that no ref names.
    pub manifests: Vec<ManifestUse>,
    /// Every ref, by its name.
    pub refs: Vec<RefUse>,
    /// Contents that save most by being stored once: size times references beyond the first.
    pub top_saved: Vec<TopBlob>,
    /// The largest contents.
    pub top_size: Vec<TopBlob>,
}

/// So many distinct contents, and their bytes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Amount {
    pub blobs: u64,
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.blobs += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// The contents of some sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bucket {
    /// The sizes are below this, in bytes, and at least that of the bucket before. `None`: no bound.
    pub below: Option<u64>,
    #[serde(flatten)]
    pub amount: Amount,
}

/// Upper bounds of the buckets: 1 KiB, 64 KiB, 1 MiB, 100 MiB.
const BUCKETS: [u64; 4] = [1 << 10, 1 << 16, 1 << 20, 100 << 20];

/// What one tree takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestUse {
    pub digest: TreeDigest,
    /// Refs that stand for it now, as `namespace/name`.
    pub current_of: Vec<String>,
    /// Refs in whose history it is.
    pub history_of: Vec<String>,
    /// Names of regular files.
    pub files: u64,
    /// Regular files, see [`Dedup::references`].
    pub references: u64,
    /// Distinct contents.
    pub blobs: u64,
    /// Bytes of its references.
    pub logical_bytes: u64,
    /// Bytes of its distinct contents.
    pub unique_bytes: u64,
    /// Contents that no other stored tree names, whichever refs name this one: what goes when the last of them does.
    pub exclusive_blobs: u64,
    pub exclusive_bytes: u64,
}

/// What one ref keeps, with its history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefUse {
    /// As `namespace/name`.
    pub name: String,
    /// Contents that only trees of this ref name, current or history: what goes when the ref and its history do. Trees
    /// that the next collection takes do not count.
    pub exclusive_blobs: u64,
    pub exclusive_bytes: u64,
}

/// One content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TopBlob {
    pub digest: Digest,
    pub size: u64,
    pub references: u64,
    /// Trees that name it.
    pub manifests: u64,
    /// Size times references beyond the first.
    pub saved_bytes: u64,
    /// A few of the files that it is the content of.
    pub samples: Vec<FileOf>,
}

/// A file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileOf {
    pub manifest: TreeDigest,
    /// Below the root of the tree, as [`path_text`](crate::store::path_text) writes it.
    pub path: String,
}

/// What is wrong with a store, as far as reading the manifests and listing the contents tells.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Damage {
    /// What cannot be read, and keeps collections from deleting as long as it cannot; and what contradicts another part
    /// of the store, which keeps nothing.
    pub problems: Vec<Problem>,
    /// Contents that a current tree, or one of a layer or mount, names and that are not there.
    pub missing: Amount,
}

impl Reader {
    /// What storing every content once saves. Reads every manifest, and no blob.
    ///
    /// Beside a collection it counts again, a few times, until nothing has gone meanwhile.
    pub fn dedup(&self) -> Result<Dedup, Error> {
        count::settled(&self.folder, &Held::default(), |count| Ok(count.dedup()))
    }

    /// What the room is used for, with the `top` first contents of each order and some of their files. Reads every
    /// manifest, and the names in `objects/`. As [`Reader::dedup`] beside a collection.
    pub fn analytics(&self, holders: &dyn Holders, top: usize) -> Result<Analytics, Error> {
        count::settled(&self.folder, holders, |count| {
            let mut found = count.analytics(top)?;
            count.add_samples(&mut found)?;
            Ok(found)
        })
    }

    /// As [`Reader::analytics`], without the files, and what is wrong.
    pub fn look_through(&self, holders: &dyn Holders, top: usize) -> Result<(Analytics, Damage), Error> {
        count::settled(&self.folder, holders, |count| {
            let found = count.analytics(top)?;
            Ok((found, count.damage()))
        })
    }
}
