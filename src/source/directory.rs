//! A folder of the node as a tree.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use rustix::fs::Stat;

use super::error::{Error, FailureKind};
use super::read::{Place, Reading, Rules, read};
use super::roots::SourceDir;
use super::unchanged::{Known, Seen};
use crate::layer::xattrs::Xattrs;
use crate::store::tree::{DirId, LeafKind, Meta, Tree};
use crate::store::{self, Build, Publish, Revision, Store};

/// What of a folder is read.
#[derive(Debug, Clone, Default)]
pub struct ScanOptions {
    /// Globs of paths, relative to the folder, that are left out: `*` stays within a name, `**` goes over folders. A
    /// folder that matches is left out whole.
    pub exclude: Vec<String>,
    /// Counts the entries that were read, or found to be as they were.
    pub progress: Arc<AtomicU64>,
}

/// Reads a folder into a tree, and its contents into a build.
///
/// Everything is kept as it is, or the reading fails and names what could not be read. Blocks; begins no file after
/// `cancel` is set.
///
/// A change through a shared memory mapping is seen only when the kernel notes a new time for it: not while the page
/// waits for being written back. The tree then has bytes that were there, from before or after that change.
///
/// # Errors
/// [`Error::Unreadable`] or [`Error::Changed`] with the first entries concerned and their number, [`Error::InvalidGlob`],
/// [`Error::Cancelled`], [`Error::Store`].
pub fn scan(dir: &SourceDir, options: &ScanOptions, build: &Build, cancel: &AtomicBool) -> Result<Tree, Error> {
    scan_knowing(dir, options, build, None, cancel).map(|(tree, _)| tree)
}

/// Reads a folder and publishes it as the ref's current tree, leaving out reading what is as it was when the ref's
/// folder was read last.
///
/// # Errors
/// As [`scan`] and [`Build::publish`].
pub fn build_directory(
    store: &Store,
    dir: &SourceDir,
    options: &ScanOptions,
    target: Publish,
    cancel: &AtomicBool,
) -> Result<Revision, Error> {
    let build = store.build()?;
    let known = Known::load(store, &target.name, &build);
    let knows = known.is_some();
    match publish(store, dir, options, target.clone(), build, known, cancel) {
        // Damage in the store, which reading all files again heals.
        Err(Error::Store(store::Error::MissingBlob { .. } | store::Error::WrongLength { .. })) if knows => {
            publish(store, dir, options, target, store.build()?, None, cancel)
        }
        other => other,
    }
}

fn publish(
    store: &Store,
    dir: &SourceDir,
    options: &ScanOptions,
    target: Publish,
    build: Build,
    known: Option<Known>,
    cancel: &AtomicBool,
) -> Result<Revision, Error> {
    let name = target.name.clone();
    let (tree, seen) = scan_knowing(dir, options, &build, known.as_ref(), cancel)?;
    // Ends what was known, which is as large as the tree: the publishing needs that memory.
    let noted = known.and_then(|known| known.noted_as(&seen));
    let revision = build.publish(&tree, target)?;
    if noted != Some(revision.digest)
        && let Err(error) = seen.save(store, &name, &revision.digest)
    {
        tracing::warn!(%name, %error, "cannot note what was read; the next build reads all files again");
    }
    Ok(revision)
}

fn scan_knowing(
    dir: &SourceDir,
    options: &ScanOptions,
    build: &Build,
    known: Option<&Known>,
    cancel: &AtomicBool,
) -> Result<(Tree, Seen), Error> {
    let exclude = globs(&options.exclude)?;
    let reading = Reading {
        build,
        cancel,
        store: Some(dir.store),
        known,
        settle: Duration::ZERO,
        notes: true,
        progress: &options.progress,
    };
    let begin = || Ok(Tree::new(Meta::default()));
    let (tree, marks, order) = read(&dir.folder, &Plain { exclude: &exclude }, begin, &reading)?;
    Ok((tree, marks.finish(&order)))
}

fn globs(texts: &[String]) -> Result<GlobSet, Error> {
    let mut set = GlobSetBuilder::new();
    let invalid = |text: &str, error: globset::Error| Error::InvalidGlob {
        glob: text.to_owned(),
        reason: error.kind().to_string(),
    };
    for text in texts {
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .build()
            .map_err(|error| invalid(text, error))?;
        set.add(glob);
    }
    set.build().map_err(|error| invalid("all together", error))
}

/// Are these good patterns? For inputs of tests and fuzz targets.
#[cfg(any(test, fuzzing))]
pub fn check_globs(texts: &[String]) -> Result<(), Error> {
    globs(texts).map(drop)
}

struct Plain<'a> {
    exclude: &'a GlobSet,
}

impl Rules for Plain<'_> {
    fn excludes(&self, path: &[u8]) -> bool {
        !self.exclude.is_empty() && self.exclude.is_match(Path::new(OsStr::from_bytes(path)))
    }

    fn has_whiteouts(&self) -> bool {
        false
    }

    // In a plain folder the attributes of an overlay are somebody's data.

    fn folder(&self, _: &Tree, _: Option<Place>, _: &mut Xattrs) -> Result<Option<DirId>, FailureKind> {
        Ok(None)
    }

    fn leaf(&self, _: &Tree, _: Place, _: &Stat, _: &mut Xattrs) -> Result<Option<LeafKind>, FailureKind> {
        Ok(None)
    }
}
