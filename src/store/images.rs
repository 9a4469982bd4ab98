//! Derived images of trees, as the collector sees them. Making and mounting them is not the store's business.

use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use rustix::fs::Mode;
use rustix::io::Errno;

use super::disk::{self, Step};
use super::layout::{Folder, IMAGES, Inner};
use super::{Error, TreeDigest, files, remove};

/// Deepest folder of an image that is counted, so that counting needs few descriptors.
const DEPTH: usize = 64;

pub(super) struct Image {
    pub name: String,
    pub tree: TreeDigest,
    /// Bytes of its files. What lies deeper than 64 folders is not counted.
    pub size: u64,
    /// Made, or seen in use by a collection.
    pub last_used: SystemTime,
}

/// The tree of an image, if the name is one: `<tree hex>[-variant].tree` or `.erofs`.
fn tree_of(name: &str) -> Option<TreeDigest> {
    let stem = name.strip_suffix(".tree").or_else(|| name.strip_suffix(".erofs"))?;
    let (hex, rest) = stem.split_at_checked(64)?;
    let variant = rest.is_empty() || (rest.starts_with('-') && rest.len() > 1);
    variant.then(|| TreeDigest::from_hex(hex)).flatten()
}

/// Every image. Other names in the folder are left alone.
pub(super) fn list(store: &Folder) -> Result<Vec<Image>, Error> {
    let error = |e: Errno| Error::io("list", store.path(IMAGES), e);
    let dir = files::open_dir(&store.dir, IMAGES).map_err(error)?;
    let mut found = Vec::new();
    for (name, _) in files::names(&dir).map_err(error)? {
        let Ok(name) = name.into_string() else { continue };
        let (Some(tree), Some(stat)) = (tree_of(&name), files::stat(&dir, name.as_str()).map_err(error)?) else {
            continue;
        };
        let size = match files::is_dir(&stat) {
            true => tree_size(&dir, &name).map_err(|e| Error::io("count", store.path(IMAGES).join(&name), e))?,
            false => stat.st_size.max(0) as u64,
        };
        // The time of a copied tree's root is the tree's; of its change on disk, ours (see `note_use`).
        let changed = Duration::new(stat.st_ctime.max(0) as u64, stat.st_ctime_nsec as u32);
        found.push(Image {
            name,
            tree,
            size,
            last_used: SystemTime::UNIX_EPOCH + changed,
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Notes that an image is used: the time of its change is set by a change that is none.
pub(super) fn note_use(store: &Folder, name: &str) -> Result<(), Error> {
    let path = format!("{IMAGES}/{name}");
    let noted = files::stat(&store.dir, path.as_str()).and_then(|stat| match stat {
        Some(stat) => disk::chmod(
            Step::InUseTouch,
            &store.dir,
            path.as_str(),
            Mode::from_raw_mode(stat.st_mode),
        ),
        None => Ok(()),
    });
    match noted {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io("touch", store.path(&path), error)),
    }
}

fn tree_size(at: &OwnedFd, name: &str) -> Result<u64, Errno> {
    let mut total = 0u64;
    let top = match files::open_dir(at, name) {
        Err(Errno::NOENT) => return Ok(0),
        other => other?,
    };
    let mut stack = vec![(files::names(&top)?, top)];
    while let Some((names, dir)) = stack.last_mut() {
        let Some((name, _)) = names.pop() else {
            stack.pop();
            continue;
        };
        let Some(stat) = files::stat(&*dir, name.as_c_str())? else {
            continue;
        };
        if !files::is_dir(&stat) {
            // Each name of a hard-linked file has its share.
            total += stat.st_size.max(0) as u64 / u64::from(stat.st_nlink as u32).max(1);
        } else if stack.len() < DEPTH
            && let Some((_, dir)) = stack.last()
            && let Ok(below) = files::open_dir(dir, name.as_c_str())
        {
            stack.push((files::names(&below)?, below));
        }
    }
    Ok(total)
}

/// Removes an image, unless its tree is held by now (`false`). First out of the way in one step, so that nobody finds
/// half of one.
pub(super) fn remove(store: &Inner, name: &str, tree: &TreeDigest) -> Result<bool, Error> {
    let path = format!("{IMAGES}/{name}");
    let away = store.staging_name("image");
    let error = |e: Errno| Error::io("remove", store.path(&path), e);
    let moved = store.leases.unless_held(tree, || {
        disk::rename(Step::ImageMove, &store.dir, path.as_str(), &store.dir, away.as_str())
    });
    match moved {
        None | Some(Err(Errno::NOENT)) => Ok(false),
        Some(Ok(())) => {
            remove::remove_tree(&store.dir, away.as_str()).map_err(error)?;
            Ok(true)
        }
        Some(Err(other)) => Err(error(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_trees_are_images() {
        let hex = "ab".repeat(32);
        let tree = TreeDigest::from_bytes([0xab; 32]);
        for name in [".tree", ".erofs", "-u1000-g1000.tree", "-v2.erofs"] {
            assert_eq!(tree_of(&format!("{hex}{name}")), Some(tree), "{name}");
        }
        for name in ["", ".tmp", "-.tree", "x.tree", ".tree.new"] {
            assert_eq!(tree_of(&format!("{hex}{name}")), None, "{name}");
        }
        assert_eq!(tree_of("é.tree"), None);
        assert_eq!(tree_of(&format!("{}.tree", hex.to_uppercase())), None);
    }
}
