//! What can go wrong, each naming the object it is about.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tree::{FormatError, InvalidTree};
use super::{Digest, TreeDigest, files};

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The reader that content came from failed; the store itself is well.
    #[error("cannot read the content to store: {0}")]
    Source(#[source] io::Error),
    /// `needed` includes what must stay free (see [`super::Options::reserved_free`]).
    #[error("the disk is full: {needed} bytes must be free, {free} are")]
    DiskFull { needed: u64, free: u64 },
    /// `free` is in bytes.
    #[error("the disk has no inode left for another file or folder, though {free} bytes are free")]
    NoInodes { free: u64 },
    #[error("a quota of the disk is used up")]
    QuotaExceeded,
    #[error("the content {digest} is not in the store")]
    MissingBlob { digest: Digest },
    #[error("the content {digest} has {found} bytes in the store instead of {expected}: store it again to heal it")]
    WrongLength { digest: Digest, expected: u64, found: u64 },
    #[error("the content {digest} is damaged: its bytes have the digest {found}; store it again to heal it")]
    WrongBlob { digest: Digest, found: Digest },
    #[error("the manifest {tree} is not in the store")]
    MissingManifest { tree: TreeDigest },
    #[error("the manifest {tree} is damaged: {source}; rebuild the tree to heal it")]
    BadManifest { tree: TreeDigest, source: FormatError },
    #[error("the manifest {tree} is damaged: its bytes have the digest {found}; rebuild the tree to heal it")]
    WrongManifest { tree: TreeDigest, found: TreeDigest },
    #[error("not a valid tree: {0}")]
    InvalidTree(#[from] InvalidTree),
    #[error("the store {} is in use by {}", root.display(), holder(*.pid))]
    Locked { root: PathBuf, pid: Option<u32> },
    #[error("{} is not a store and not empty: it holds {found:?}", root.display())]
    NotAStore { root: PathBuf, found: String },
    #[error("there is no store in {}", root.display())]
    NoStore { root: PathBuf },
    #[error("{}: {message}", path.display())]
    Config { path: PathBuf, message: String },
    #[error("the ref {name} cannot be read: {message}; rebuild its owner or forget the ref")]
    BadRef { name: String, message: String },
    #[error(
        "{text:?} is not a valid {what}: expected lower-case letters, digits, '-' and (in names) '.', as in DNS-1123"
    )]
    InvalidName { what: &'static str, text: String },
    /// An earlier write of the same build failed, so nothing of the build may be published.
    #[error("a write of this build failed before: nothing of it can be published, build again")]
    BuildFailed,
    #[error("cannot export {}: cannot {action}: {source}", shown(path))]
    Export {
        path: Vec<u8>,
        action: &'static str,
        source: io::Error,
    },
    #[error(
        "cannot export {}: cannot set the extended attribute {attribute:?}: {source}",
        shown(path)
    )]
    Xattr {
        path: Vec<u8>,
        attribute: String,
        source: io::Error,
    },
    #[error(
        "cannot export {}: the file system cannot keep its time, {seconds} s and {nanos} ns since 1970",
        shown(path)
    )]
    Time { path: Vec<u8>, seconds: i64, nanos: u32 },
    #[error("cancelled")]
    Cancelled,
    #[error("cannot export {}: {source}", shown(path))]
    ExportBlob { path: Vec<u8>, source: Box<Error> },
}

fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("the process {pid}"),
        None => "another process".to_owned(),
    }
}

/// What is wrong with something, and who needs it, if anybody does.
pub(super) fn needed_by(message: &str, by: &[String]) -> String {
    match by {
        [] => message.to_owned(),
        by => format!("{message}; it is needed by {}", by.join(", ")),
    }
}

/// Any path as text, without a loss and without a second spelling: a backslash is `\\`, a byte that is no part of
/// UTF-8 is `\xNN`, everything else is itself, control characters too.
pub fn path_text(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', "\\\\"));
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

fn shown(path: &[u8]) -> String {
    format!("\"{}\"", path.escape_ascii())
}

impl Error {
    pub(super) fn io(action: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Error::Io {
            action,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
    }

    /// Is it that the disk (or a quota, or the inodes) is full?
    pub fn is_disk_full(&self) -> bool {
        matches!(
            self,
            Error::DiskFull { .. } | Error::NoInodes { .. } | Error::QuotaExceeded
        )
    }

    /// The error of a write for which [`is_full`]: what there is none left of, on the disk that `at` is on.
    pub(super) fn full(source: &io::Error, at: impl AsFd, needed: u64) -> Self {
        if source.raw_os_error() == Some(libc::EDQUOT) {
            return Error::QuotaExceeded;
        }
        // Unknown counts as none: the write has failed for want of room, so far as is known.
        let (free, inodes) = files::left(at).unwrap_or((0, 1));
        match free >= needed && inodes == 0 {
            true => Error::NoInodes { free },
            false => Error::DiskFull { needed, free },
        }
    }
}

/// Something in the store that could not be read, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file, or the object that the file is about.
    pub path: String,
    pub message: String,
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
