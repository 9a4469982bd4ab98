//! A layer as a tree: what was changed in it, over the tree below.
//!
//! Only the changes are read; what was not touched comes from the manifest of the tree below, and so does the content
//! of a file of which only the metadata was changed. What an upper folder means is told in `resolve.rs`.

mod resolve;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use super::error::Error;
use super::read::{Reading, read};
use crate::layer::{LayerId, Layers, own};
use crate::store::Build;
use crate::store::tree::Tree;
use resolve::Upper;

/// A layer is written to while it is read. This is long for a write, and for what overlayfs does in two steps: opening
/// a file of which only the metadata was copied with `O_TRUNC` takes `metacopy` away first and cuts the file to nothing
/// then (seen in 6.18). Between the two it has its old length, and zeros that nobody wrote.
const SETTLE: Duration = Duration::from_millis(20);

/// Reads the layer's tree as it is now, and its new contents into a build. The layer stays in use meanwhile; what
/// changes while it is read is read again.
///
/// # Errors
/// As [`super::scan`], and those of [`Layers::upper`].
pub fn snapshot(layers: &Layers, id: &LayerId, build: &Build, cancel: &AtomicBool) -> Result<Tree, Error> {
    let upper = layers.upper(id)?;
    let failed = |action, source| Error::io(action, "the layer".as_ref(), source);
    // Until the build is published, also when the layer is released before.
    let (base, synced) = rayon::join(
        || build.keep_tree(&upper.record.tree),
        || rustix::fs::syncfs(&upper.folder),
    );
    let base = base?;
    synced.map_err(|errno| failed("sync", errno.into()))?;
    let folder = upper.folder.as_fd().try_clone_to_owned();
    let folder: OwnedFd = folder.map_err(|error| failed("open", error))?;
    let mut base = Some(base);
    let load = || {
        let mut base = match base.take() {
            Some(base) => base,
            None => layers.store().load(&upper.record.tree)?,
        };
        if let Some(ids) = upper.record.ids {
            own(&mut base, ids);
        }
        Ok(base)
    };
    let reading = Reading {
        build,
        cancel,
        store: None,
        known: None,
        settle: SETTLE,
        notes: false,
        progress: &AtomicU64::new(0),
    };
    over(&folder, load, &reading)
}

/// Reads an upper folder over the tree that `load` gives: once for each try, as what comes out is made of it.
fn over(folder: &OwnedFd, mut load: impl FnMut() -> Result<Tree, Error>, reading: &Reading) -> Result<Tree, Error> {
    let (rules, tree) = Upper::over(load()?);
    let mut first = Some(tree);
    let begin = || match first.take() {
        Some(tree) => Ok(tree),
        None => Ok(Upper::over(load()?).1),
    };
    Ok(read(folder, &rules, begin, reading)?.0)
}
