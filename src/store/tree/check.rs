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

/// One digest has one size. Takes what [`by_digest`] gives.
pub(super) fn sizes(contents: &[(&Digest, u64)]) -> Result<(), TwoSizes> {
    match contents
        .windows(2)
        .find(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1)
    {
        Some(pair) => Err(TwoSizes(*pair[0].0)),
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

/// Digest and size of every file, sorted by them.
pub(super) fn by_digest<'a>(leaves: impl Iterator<Item = &'a Leaf>) -> Vec<(&'a Digest, u64)> {
    // With the first bytes at hand, hardly a comparison has to look at the leaves, which are all over the memory.
    let mut files: Vec<(u64, &Digest, u64)> = leaves
        .filter_map(Leaf::content)
        .map(|(digest, size)| (prefix(digest), digest, size))
        .collect();
    files.par_sort_unstable();
    files.into_iter().map(|(_, digest, size)| (digest, size)).collect()
}

fn prefix(digest: &Digest) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_be_bytes(bytes)
}
