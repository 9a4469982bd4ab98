use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::{layer, store};

/// At most this many failures are named; all are counted.
const SAMPLE: usize = 10;

/// Why there is no tree.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Layer(#[from] layer::Error),
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The text of a root is not `PATH=NAMESPACE[,NAMESPACE…]`.
    #[error("{text:?} is not a source root: {reason}; expected PATH=NAMESPACE[,NAMESPACE...] with an absolute path")]
    InvalidRoot { text: String, reason: &'static str },
    #[error("{path:?} is not an absolute path without \"..\"")]
    InvalidPath { path: String },
    #[error(
        "{path} is outside the folders that namespace {namespace} may read on this node: {}",
        Listed(allowed)
    )]
    OutsideRoots {
        path: String,
        namespace: String,
        allowed: Vec<PathBuf>,
    },
    #[error("{} does not exist", path.display())]
    Missing { path: PathBuf },
    #[error("{} is a symbolic link: name the folder itself", path.display())]
    Symlink { path: PathBuf },
    #[error("{} is not a folder", path.display())]
    NotADirectory { path: PathBuf },
    #[error("{} is a mount point below an allowed root: allow it as a root of its own", path.display())]
    MountPoint { path: PathBuf },
    #[error("{} lies in the store itself", path.display())]
    InsideStore { path: PathBuf },
    #[error("exclude: {glob:?} is not a valid pattern: {reason}")]
    InvalidGlob { glob: String, reason: String },
    /// Something could not be read or kept. Trying again helps only when the cause is removed.
    #[error("{count} entries cannot be read: {}", Listed(first))]
    Unreadable { count: u64, first: Vec<Failure> },
    /// Everything can be read, but some of it changed meanwhile, in each of several tries. Worth another try later.
    #[error("{count} entries changed while they were read: {}", Listed(first))]
    Changed { count: u64, first: Vec<Failure> },
    #[error("cancelled")]
    Cancelled,
    #[error("too many entries: a tree has at most 2^32 folders and 2^32 other inodes")]
    TooMany,
}

impl Error {
    pub(super) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Error {
        Error::Io {
            action,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// One entry that did not get into a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Relative to the source; `.` is the source itself. Bytes that are not UTF-8 or not printable are escaped.
    pub path: String,
    pub kind: FailureKind,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailureKind {
    /// The system's error number.
    Errno(i32),
    /// It changed or went while it was read.
    Changed,
    /// Character device 0/0, which no overlay can show.
    Whiteout,
    /// Another file system is mounted there.
    MountPoint,
    /// It is the store itself.
    Store,
    /// A sparse file, with which all sparse files that were read have more bytes than the store's disk has in all.
    TooLarge { size: u64, disk: u64 },
    /// An attribute of overlayfs that has a value or a place which larder's mounts don't make.
    Overlay { attribute: String },
    /// An attribute of overlayfs that leads to a path of the tree below where nothing fits.
    Below { attribute: &'static str, path: String },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path)?;
        match &self.kind {
            FailureKind::Errno(errno) => write!(f, "{}", io::Error::from_raw_os_error(*errno)),
            FailureKind::Changed => f.write_str("it changed while it was read"),
            FailureKind::Whiteout => {
                f.write_str("a character device 0/0, which means a deleted file in an overlay: remove or exclude it")
            }
            FailureKind::MountPoint => f.write_str("a mount point, which is not entered: exclude it"),
            FailureKind::Store => f.write_str("the store itself, which is not entered: exclude it"),
            FailureKind::TooLarge { size, disk } => {
                write!(
                    f,
                    "it is sparse, and with it sparse files have {size} bytes, while the store's disk has {disk} in all: exclude some"
                )
            }
            FailureKind::Overlay { attribute } => write!(
                f,
                "it has the attribute {attribute}, which larder's mounts don't make so and a snapshot cannot resolve"
            ),
            FailureKind::Below { attribute, path } => write!(
                f,
                "its attribute {attribute} leads to {path} of the tree below the layer, and nothing there fits"
            ),
        }
    }
}

/// The failures of one reading, in the order of the walk, whichever thread met them first.
#[derive(Debug, Default)]
pub(super) struct Failures {
    pub count: u64,
    /// How many of them are not [`FailureKind::Changed`].
    lasting: u64,
    first: BTreeMap<u64, Failure>,
}

impl Failures {
    /// `order` says where in the walk it was.
    pub fn add(&mut self, order: u64, path: impl FnOnce() -> Vec<u8>, kind: FailureKind) {
        self.count += 1;
        let lasting = kind != FailureKind::Changed;
        self.lasting += u64::from(lasting);
        // What lasts is told before what changed: it is what the user must act on.
        let order = order | if lasting { 0 } else { 1 << 63 };
        if self.first.len() < SAMPLE || self.first.last_key_value().is_some_and(|(last, _)| order < *last) {
            self.first.insert(
                order,
                Failure {
                    path: shown(&path()),
                    kind,
                },
            );
            while self.first.len() > SAMPLE {
                self.first.pop_last();
            }
        }
    }

    pub fn only_changes(&self) -> bool {
        self.lasting == 0
    }

    pub fn into_result(self) -> Result<(), Error> {
        let count = self.count;
        let only_changes = self.only_changes();
        let first = self.first.into_values().collect();
        match (count, only_changes) {
            (0, _) => Ok(()),
            (_, true) => Err(Error::Changed { count, first }),
            (_, false) => Err(Error::Unreadable { count, first }),
        }
    }
}

/// A path for people: escaped where it is not plain text, and cut in the middle where it is too long to read.
pub(super) fn shown(path: &[u8]) -> String {
    const HALF: usize = 200;
    if path.is_empty() {
        return ".".to_owned();
    }
    let text = |part: &[u8]| match std::str::from_utf8(part) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => part.escape_ascii().to_string(),
    };
    if path.len() <= 2 * HALF {
        return text(path);
    }
    format!("{}…{}", text(&path[..HALF]), text(&path[path.len() - HALF..]))
}

struct Listed<'a, T>(&'a [T]);

impl fmt::Display for Listed<'_, PathBuf> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, path) in self.0.iter().enumerate() {
            write!(f, "{}{}", if at == 0 { "" } else { ", " }, path.display())?;
        }
        Ok(())
    }
}

impl Listed<'_, Failure> {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, failure) in self.0.iter().enumerate() {
            write!(f, "{}{failure}", if at == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl fmt::Display for Listed<'_, Failure> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ten_failures_of_the_walk_are_named_whatever_the_order_of_arrival() {
        let mut failures = Failures::default();
        for order in (0..25).rev() {
            failures.add(
                order,
                || format!("f{order}").into_bytes(),
                FailureKind::Errno(libc::EACCES),
            );
        }
        failures.add(99, || b"moved".to_vec(), FailureKind::Changed);
        let Err(Error::Unreadable { count, first }) = failures.into_result() else {
            panic!("not unreadable")
        };
        assert_eq!(count, 26);
        assert_eq!(
            first.iter().map(|f| &f.path[..]).collect::<Vec<_>>(),
            ["f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9"]
        );
    }

    #[test]
    fn paths_are_shown_whole_or_cut_in_the_middle() {
        assert_eq!(shown(b""), ".");
        assert_eq!(shown("ä/b".as_bytes()), "ä/b");
        assert_eq!(shown(b"a\xff\n"), "a\\xff\\n");
        let long = shown(&[b'x'; 5000]);
        assert!(long.contains('…') && long.len() < 500);
    }
}
