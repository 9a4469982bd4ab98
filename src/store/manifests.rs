//! Reading the manifests of the store. A manifest is believed only if its bytes have the digest that it is named by.

use std::fs::File;
use std::io::{self, Read};

use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::disk::{self, Step};
use super::layout::{Folder, manifest_path};
use super::tree::{Digests, FormatError, Leaf, LeafKind, Reader, Record, Tree};
use super::{Digest, Error, TreeDigest};

fn open(store: &Folder, tree: &TreeDigest) -> Result<File, Error> {
    let path = manifest_path(tree);
    match disk::open_file(&store.dir, path.as_str()) {
        Ok(file) => Ok(file),
        Err(Errno::NOENT) => Err(Error::MissingManifest { tree: *tree }),
        Err(error) => Err(Error::io("open", store.path(&path), error)),
    }
}

/// Fails unless the manifest is there and has the right bytes.
pub(super) fn verify(store: &Folder, tree: &TreeDigest) -> Result<(), Error> {
    let mut input = Hashing::new(open(store, tree)?);
    io::copy(&mut input, &mut io::sink()).map_err(|e| Error::io("read", store.path(manifest_path(tree)), e))?;
    input.finish(tree)
}

pub(super) fn load(store: &Folder, tree: &TreeDigest) -> Result<Tree, Error> {
    load_as(store, tree, |input| Tree::read(input))
}

/// As [`load`], but does not check that each digest has one size.
pub(super) fn load_but_sizes(store: &Folder, tree: &TreeDigest) -> Result<Tree, Error> {
    load_as(store, tree, |input| Tree::read_but_sizes(input))
}

fn load_as(
    store: &Folder,
    tree: &TreeDigest,
    read: impl FnOnce(&mut Hashing) -> Result<Tree, FormatError>,
) -> Result<Tree, Error> {
    let mut input = Hashing::new(open(store, tree)?);
    let read = read(&mut input).map_err(|source| bad(store, tree, source))?;
    input.finish(tree)?;
    Ok(read)
}

/// Goes through the records of a manifest. What was seen counts only if this ends well: the digest is known at the end.
pub(super) fn records(store: &Folder, tree: &TreeDigest, mut visit: impl FnMut(Record)) -> Result<(), Error> {
    let mut input = Hashing::new(open(store, tree)?);
    let mut reader = Reader::new(&mut input);
    while let Some(record) = reader.next_record().map_err(|source| bad(store, tree, source))? {
        visit(record);
    }
    input.finish(tree)
}

/// The tree's leaves, in the order of the manifest.
pub(super) fn leaves(store: &Folder, tree: &TreeDigest) -> Result<Vec<Leaf>, Error> {
    let mut leaves = Vec::new();
    records(store, tree, |record| {
        if let Record::Leaf { leaf, .. } = record {
            leaves.push(leaf);
        }
    })?;
    Ok(leaves)
}

/// Digest and size of every distinct content that the tree names, sorted.
pub(super) fn contents(store: &Folder, tree: &TreeDigest) -> Result<Vec<(Digest, u64)>, Error> {
    let mut input = Hashing::new(open(store, tree)?);
    let mut found = Vec::new();
    for content in Digests::new(&mut input) {
        found.push(content.map_err(|source| bad(store, tree, source))?);
    }
    input.finish(tree)?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The regular files of a tree.
pub(super) struct Files {
    /// How many names they have: a hard-linked file has several.
    pub names: u64,
    /// Digest and size of each, in order, repeated where contents are equal; a hard-linked file comes once.
    pub contents: Vec<(Digest, u64)>,
}

/// What a manifest says about regular files. Nothing is told of a manifest that is damaged anywhere.
pub(super) fn files(store: &Folder, tree: &TreeDigest) -> Result<Files, Error> {
    let mut found = Files {
        names: 0,
        contents: Vec::new(),
    };
    let mut is_file: Vec<bool> = Vec::new();
    records(store, tree, |record| match record {
        Record::Leaf { leaf, .. } => {
            if let LeafKind::File { digest, size } = leaf.kind {
                found.contents.push((digest, size));
                is_file.push(true);
                found.names += 1;
            } else {
                is_file.push(false);
            }
        }
        Record::Link { leaf, .. } => found.names += u64::from(is_file[leaf.0 as usize]),
        Record::Dir { .. } | Record::End => {}
    })?;
    Ok(found)
}

/// Goes through the names of a tree's regular files: digest and size of the content, and the path, in the order of the
/// manifest, until `visit` says `false`. The manifest's own digest is not checked.
pub(super) fn paths(
    store: &Folder,
    tree: &TreeDigest,
    visit: &mut dyn FnMut(&Digest, u64, &[u8]) -> bool,
) -> Result<(), Error> {
    let mut reader = Reader::new(open(store, tree)?);
    let mut leaves: Vec<Option<(Digest, u64)>> = Vec::new();
    let mut path: Vec<u8> = Vec::new();
    // Lengths of the paths of the folders above.
    let mut above: Vec<usize> = Vec::new();
    while let Some(record) = reader.next_record().map_err(|source| bad(store, tree, source))? {
        let length = path.len();
        let (name, content) = match record {
            Record::Dir { name, .. } => {
                above.push(length);
                push(&mut path, &name);
                continue;
            }
            Record::End => {
                path.truncate(above.pop().unwrap_or(0));
                continue;
            }
            Record::Leaf { name, leaf } => {
                leaves.push(match leaf.kind {
                    LeafKind::File { digest, size } => Some((digest, size)),
                    _ => None,
                });
                (name, leaves[leaves.len() - 1])
            }
            Record::Link { name, leaf } => (name, leaves[leaf.0 as usize]),
        };
        if let Some((digest, size)) = content {
            push(&mut path, &name);
            if !visit(&digest, size, &path) {
                return Ok(());
            }
            path.truncate(length);
        }
    }
    Ok(())
}

fn push(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}

fn bad(store: &Folder, tree: &TreeDigest, source: FormatError) -> Error {
    match source {
        FormatError::Io(error) => Error::io("read", store.path(manifest_path(tree)), error),
        source => Error::BadManifest { tree: *tree, source },
    }
}

/// Hashes what is read through it.
struct Hashing {
    file: File,
    offset: u64,
    hash: Sha256,
}

impl Hashing {
    fn new(file: File) -> Self {
        Self {
            file,
            offset: 0,
            hash: Sha256::new(),
        }
    }

    /// Call after reading to the end.
    fn finish(self, tree: &TreeDigest) -> Result<(), Error> {
        let found = TreeDigest::from_bytes(self.hash.finalize().into());
        match found == *tree {
            true => Ok(()),
            false => Err(Error::WrongManifest { tree: *tree, found }),
        }
    }
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = disk::pread(Step::ManifestRead, &self.file, buffer, self.offset)?;
        self.offset += read as u64;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}
