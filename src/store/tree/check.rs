//! What makes a tree valid: the one set of rules that the writer and the reader of manifests share.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{Leaf, LeafKind, Meta};
use crate::store::Digest;

/// Longest name of an entry, in bytes (the kernel's `NAME_MAX`).
pub const MAX_NAME: usize = 255;
/// Longest symlink target, in bytes (the kernel's `PATH_MAX` without the final NUL).
pub const MAX_SYMLINK: usize = 4095;
/// Longest name of an extended attribute, in bytes (the kernel's `XATTR_NAME_MAX`).
pub const MAX_XATTR_NAME: usize = 255;
/// Longest value of an extended attribute, in bytes (the kernel's `XATTR_SIZE_MAX`).
pub const MAX_XATTR_VALUE: usize = 65_536;
/// Largest size of a file, in bytes (the kernel's `loff_t`).
pub(super) const MAX_SIZE: u64 = i64::MAX as u64;
/// Largest device numbers that `mknod` takes: 12 and 20 bits.
pub(super) const MAX_MAJOR: u32 = 0xfff;
pub(super) const MAX_MINOR: u32 = 0xf_ffff;

/// The SHA-256 of no bytes.
pub(super) const EMPTY: Digest = Digest::from_bytes([
    0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27, 0xae, 0x41,
    0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
]);

/// A tree that has no manifest, and the entry that is why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", shown(path))]
pub struct InvalidTree {
    /// The entry's path below the root; empty for the root itself or the tree as a whole.
    pub path: Vec<u8>,
    pub what: Cow<'static, str>,
}

impl InvalidTree {
    pub(super) fn new(path: impl Into<Vec<u8>>, what: impl Into<Cow<'static, str>>) -> Self {
        Self {
            path: path.into(),
            what: what.into(),
        }
    }
}

fn shown(path: &[u8]) -> String {
    match path {
        [] => "the tree".to_owned(),
        _ => format!("\"{}\"", path.escape_ascii()),
    }
}

type Check = Result<(), &'static str>;

pub(super) fn name(name: &[u8]) -> Check {
    match name {
        [] => Err("the name is empty"),
        b"." | b".." => Err("the name is \".\" or \"..\""),
        _ if name.len() > MAX_NAME => Err("the name is longer than 255 bytes"),
        _ if name.contains(&b'/') => Err("the name contains a slash"),
        _ if name.contains(&0) => Err("the name contains a NUL byte"),
        _ => Ok(()),
    }
}

pub(super) fn xattr(name: &[u8], value: &[u8]) -> Check {
    match name {
        [] => Err("the name of an extended attribute is empty"),
        _ if name.len() > MAX_XATTR_NAME => Err("the name of an extended attribute is longer than 255 bytes"),
        _ if name.contains(&0) => Err("the name of an extended attribute contains a NUL byte"),
        _ if value.len() > MAX_XATTR_VALUE => Err("the value of an extended attribute is longer than 64 KiB"),
        _ => Ok(()),
    }
}

pub(super) fn meta(meta: &Meta) -> Check {
    if meta.mode > 0o7777 {
        return Err("the mode has bits beyond 7777 (octal)");
    }
    if meta.mtime.1 >= 1_000_000_000 {
        return Err("the nanoseconds of the time are not below 10^9");
    }
    for (name, value) in &meta.xattrs {
        xattr(name, value)?;
    }
    if meta.xattrs.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
        return Err("the extended attributes are not sorted by name, or one is there twice");
    }
    Ok(())
}

pub(super) fn kind(kind: &LeafKind) -> Check {
    match kind {
        LeafKind::File { digest, size } => {
            if *size > MAX_SIZE {
                return Err("the size is beyond 2^63-1");
            }
            if (*size == 0) != (*digest == EMPTY) {
                return Err("an empty file and the digest of no bytes belong together");
            }
        }
        LeafKind::Symlink(target) => {
            if target.is_empty() || target.len() > MAX_SYMLINK {
                return Err("the target of a symlink is empty or longer than 4095 bytes");
            }
            if target.contains(&0) {
                return Err("the target of a symlink contains a NUL byte");
            }
        }
        LeafKind::CharDevice { major: 0, minor: 0 } => {
            // overlayfs reads it as "deleted": a tree with one would lose an entry below it when mounted.
            return Err("character device 0/0 is an overlay whiteout and cannot be kept");
        }
        LeafKind::CharDevice { major, minor } | LeafKind::BlockDevice { major, minor } => {
            if *major > MAX_MAJOR || *minor > MAX_MINOR {
                return Err("a device number is out of range (major up to 4095, minor up to 1048575)");
            }
        }
        LeafKind::Fifo | LeafKind::Socket => {}
    }
    Ok(())
}

/// A content that a tree names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Content<'a> {
    pub digest: &'a Digest,
    pub size: u64,
    /// How many leaves have it.
    pub leaves: u64,
}

/// The contents of leaves, sorted by digest and size, each once.
pub(super) fn contents<'a>(leaves: impl Iterator<Item = &'a Leaf>) -> Vec<Content<'a>> {
    // No comparison looks at the leaves, which are all over the memory: half a digest decides.
    let mut files: Vec<(u128, u64, &Digest)> = leaves
        .filter_map(Leaf::content)
        .map(|(digest, size)| (digest.halves().0, size, digest))
        .collect();
    files.par_sort_unstable_by_key(|(half, size, _)| (*half, *size));
    // Unless somebody has made two digests with an equal half, which neighbours then are not in order of.
    if files
        .windows(2)
        .any(|pair| pair[0].0 == pair[1].0 && pair[0].2 != pair[1].2)
    {
        files.par_sort_unstable_by_key(|(_, size, digest)| (digest.halves(), *size));
    }
    let mut contents: Vec<Content> = Vec::new();
    let mut last = None;
    for (half, size, digest) in files {
        match contents.last_mut() {
            Some(content) if last == Some((half, size)) && content.digest == digest => content.leaves += 1,
            _ => contents.push(Content {
                digest,
                size,
                leaves: 1,
            }),
        }
        last = Some((half, size));
    }
    contents
}

/// One digest has one size. Takes what [`contents`] gives.
pub(super) fn sizes(contents: &[Content]) -> Result<(), TwoSizes> {
    match contents.windows(2).find(|pair| pair[0].digest == pair[1].digest) {
        Some(pair) => Err(TwoSizes(*pair[0].digest)),
        None => Ok(()),
    }
}

/// The digest that has two.
#[derive(Debug)]
pub(super) struct TwoSizes(pub Digest);

impl From<TwoSizes> for InvalidTree {
    fn from(TwoSizes(digest): TwoSizes) -> InvalidTree {
        InvalidTree::new(*b"", format!("{digest} has two different sizes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_sorted_by_the_whole_digest_and_the_size_and_counted() {
        let digest = |first: u8, last: u8| {
            let mut bytes = [7; 32];
            (bytes[0], bytes[31]) = (first, last);
            Digest::from_bytes(bytes)
        };
        // Halves that are equal, and digests that are.
        let all = [
            (1, 9, 5),
            (0, 2, 1),
            (1, 3, 8),
            (1, 9, 5),
            (1, 9, 4),
            (0, 1, 7),
            (2, 0, 0),
        ];
        let leaves = all.map(|(first, last, size)| Leaf {
            meta: Meta::default(),
            kind: LeafKind::File {
                digest: digest(first, last),
                size,
            },
        });
        for count in 0..=all.len() {
            let mut expected = std::collections::BTreeMap::new();
            for (first, last, size) in &all[..count] {
                *expected.entry((digest(*first, *last), *size)).or_insert(0) += 1;
            }
            let found = contents(leaves[..count].iter()).into_iter();
            let found: Vec<_> = found.map(|one| ((*one.digest, one.size), one.leaves)).collect();
            assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
        }
        let found = contents(leaves.iter());
        assert_eq!(sizes(&found).map_err(|two| two.0), Err(digest(1, 9)));
        assert!(sizes(&contents(leaves[..4].iter())).is_ok());
    }
}
