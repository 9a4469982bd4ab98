//! What layers of one tree share: one mount of its image, and one read-only view of it.
//!
//! ```text
//! mnt/images/<tree>[-u<uid>-g<gid>]/   the image: names, metadata, and where each file's data is
//! mnt/trees/<tree>[-u<uid>-g<gid>]/    the tree, read-only: what read-only layers show
//! ```
//!
//! Both are made when they are needed first, by whichever layer that is, and stay for the next one. What nobody has used
//! for a while is unmounted ([`Inner::unmount_unused`]).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::IoContext;
use super::life::{read_mounts, top};
use super::lock::relock;
use super::mount::{self, Flags, Overlay, open_folder};
use super::road::{Road, mount_image};
use super::{Error, Inner, LayerRecord, SOURCE_PREFIX, image, inuse, list, lower, make_private, mounted};
use crate::store::TreeDigest;

pub(super) const IMAGES: &str = "images";
pub(super) const TREES: &str = "trees";
/// An overlay without an upper wants two lower folders: the second has nothing in it.
const EMPTY: &str = "empty";

/// The tree that a layer stands on.
pub(super) struct Lower {
    /// Where it can be looked at.
    pub path: PathBuf,
    pub tree: OwnedFd,
    /// Where its files have their data, if not in the tree.
    pub data: Option<OwnedFd>,
}

/// The name of what is made of a tree, with every entry owned by `ids` where given.
pub(super) fn stem(tree: &TreeDigest, ids: Option<(u32, u32)>) -> String {
    let variant = ids.map(|(uid, gid)| format!("-u{uid}-g{gid}")).unwrap_or_default();
    format!("{}{variant}", tree.hex())
}

/// The tree that such a name begins with.
pub(super) fn tree_of(stem: &str) -> Option<TreeDigest> {
    format!("sha256:{}", stem.get(..64)?).parse().ok()
}

/// The tree and the owner that a whole such name stands for.
pub(super) fn parts_of(name: &str) -> Option<(TreeDigest, Option<(u32, u32)>)> {
    let tree = tree_of(name)?;
    let ids = match name.get(64..)? {
        "" => None,
        variant => {
            let (uid, gid) = variant.strip_prefix("-u")?.split_once("-g")?;
            Some((uid.parse().ok()?, gid.parse().ok()?))
        }
    };
    // Numbers can be written in several ways; one of them is ours.
    (stem(&tree, ids) == name).then_some((tree, ids))
}

impl Inner {
    /// Makes a tree ready to be a lower layer. The caller's record of the layer, which is written already, keeps it so.
    pub(super) fn lower(&self, tree: &TreeDigest, ids: Option<(u32, u32)>) -> Result<Lower, Error> {
        let stem = stem(tree, ids);
        self.trees.with(&stem, || self.lower_of(tree, ids, &stem))
    }

    fn lower_of(&self, tree: &TreeDigest, ids: Option<(u32, u32)>, stem: &str) -> Result<Lower, Error> {
        let road = self.road()?;
        if road == Road::Copy {
            let path = lower::path(&self.store, tree, ids);
            let tree = lower::ensure(&self.store, tree, ids)?;
            return Ok(Lower { path, tree, data: None });
        }
        let path = self.root.join("mnt").join(IMAGES).join(stem);
        if top(&read_mounts()?, &path).is_none() {
            make_below(&self.root.join("mnt"), IMAGES, stem)?;
            let image = image::ensure(&self.store, tree, ids)?;
            match mount_image(&image, &path, road) {
                // The kernel finds it damaged: it is only a cache.
                Err(Error::Mount { source, .. })
                    if matches!(source.raw_os_error(), Some(libc::EUCLEAN | libc::EINVAL | libc::EIO)) =>
                {
                    let image = image::make(&self.store, tree, ids)?;
                    mount_image(&image, &path, road)?;
                }
                other => other?,
            }
        }
        let objects = self.store.objects_dir();
        Ok(Lower {
            tree: open_folder(&path)?,
            path,
            data: Some(open_folder(&objects)?),
        })
    }

    /// Makes the read-only view of a tree, and says where it is.
    pub(super) fn view(&self, tree: &TreeDigest, ids: Option<(u32, u32)>) -> Result<PathBuf, Error> {
        let stem = stem(tree, ids);
        let mounts = self.root.join("mnt");
        let path = mounts.join(TREES).join(&stem);
        self.trees.with(&stem, || {
            if top(&read_mounts()?, &path).is_some() {
                return Ok(());
            }
            make_below(&mounts, TREES, &stem)?;
            let lower = self.lower_of(tree, ids, &stem)?;
            let empty = mounts.join(EMPTY);
            make_private(&empty)?;
            let empty = open_folder(&empty)?;
            let layers = [lower.tree.as_fd(), empty.as_fd()];
            let overlay = Overlay {
                source: &format!("{SOURCE_PREFIX}{tree}"),
                lower: if lower.data.is_some() { &layers[..1] } else { &layers },
                data: lower.data.as_ref().map(AsFd::as_fd),
                changes: None,
            };
            let flags = Flags {
                allow_suid: self.options.allow_suid,
            };
            mount::overlay(&overlay, self.road()?.told(), flags, &path)?.attach(&path)
        })?;
        Ok(path)
    }

    /// Unmounts images and views that no layer needs and nobody else shows, and has not for so long as this process
    /// has looked. Returns how many went.
    pub(super) fn unmount_unused(&self, for_at_least: Duration) -> Result<usize, Error> {
        let folders = [TREES, IMAGES].map(|folder| self.root.join("mnt").join(folder));
        let mounts = read_mounts()?;
        let stems: HashSet<String> = mounts
            .iter()
            .filter(|mount| folders.iter().any(|folder| mount.point.parent() == Some(folder)))
            .filter_map(|mount| Some(mount.point.file_name()?.to_str()?.to_owned()))
            .collect();
        // Most are needed, and there may be hundreds: only of the others it is looked who else shows them.
        let (records, problems) = list(&self.root)?;
        let needed: HashSet<String> = records
            .iter()
            .map(|record| self::stem(&record.tree, record.ids))
            .collect();
        let is_needed = |stem: &String| !problems.is_empty() || needed.contains(stem);
        self.remove_points(&folders, &stems, &is_needed)?;
        let mut gone = 0;
        let now = Instant::now();
        relock(&self.unused).retain(|stem, _| stems.contains(stem) && !is_needed(stem));
        for stem in stems.iter().filter(|stem| !is_needed(stem)) {
            let since = *relock(&self.unused).entry(stem.clone()).or_insert(now);
            if now.duration_since(since) < for_at_least {
                continue;
            }
            gone += self.trees.with(stem, || -> Result<usize, Error> {
                // A layer of it may have come since.
                if self.is_used(stem)? {
                    relock(&self.unused).remove(stem);
                    return Ok(0);
                }
                let mut gone = 0;
                let mounts = read_mounts()?;
                let points = folders.iter().map(|folder| folder.join(stem));
                for point in points.filter(|point| top(&mounts, point).is_some()) {
                    // Somebody who has it open is waited for.
                    if !mount::detach_at(&point, false)? {
                        return Ok(gone);
                    }
                    gone += 1;
                    let _ = fs::remove_dir(&point);
                }
                Ok(gone)
            })?;
        }
        Ok(gone)
    }

    /// Removes the folders on which nothing is mounted any more since a reboot, for trees that nobody needs.
    fn remove_points(
        &self,
        folders: &[PathBuf],
        mounted: &HashSet<String>,
        is_needed: &dyn Fn(&String) -> bool,
    ) -> Result<(), Error> {
        let mut left = HashSet::new();
        for folder in folders {
            let entries = match fs::read_dir(folder) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.context("list", folder)?,
            };
            for entry in entries {
                left.extend(entry.context("list", folder)?.file_name().into_string());
            }
        }
        for stem in left.difference(mounted).filter(|stem| !is_needed(stem)) {
            self.trees.with(stem, || -> Result<(), Error> {
                if self.is_used(stem)? {
                    return Ok(());
                }
                let mounts = read_mounts()?;
                for point in folders.iter().map(|folder| folder.join(stem)) {
                    if top(&mounts, &point).is_none() {
                        // An empty folder that stays does no harm.
                        let _ = fs::remove_dir(&point);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Is there a layer over this tree, or another mount that shows it, in whatever namespace? Call with its lock held.
    pub(super) fn is_used(&self, stem: &str) -> Result<bool, Error> {
        let (records, problems) = list(&self.root)?;
        let stands_on_it = |record: &LayerRecord| self::stem(&record.tree, record.ids) == stem;
        // A record that cannot be read may be of a layer over it.
        if !problems.is_empty() || records.iter().any(stands_on_it) {
            return Ok(true);
        }
        let mounts = read_mounts()?;
        let view = self.root.join("mnt").join(TREES).join(stem);
        let tree = tree_of(stem);
        let dev = top(&mounts, &view).map(|mount| mount.dev);
        let shows = |mount: &super::mountinfo::Mount| {
            let shows_tree = tree.is_some() && mounted::tree(mount) == tree;
            // The same tree may be in another store, too, or be shown with another owner.
            let is_ours = !mounted::is_elsewhere(mount, &self.root) && !mounted::is_of_another(mount, stem);
            mount.point != view && shows_tree && is_ours
        };
        let users = inuse::mounts(dev, &view, shows).context("look for other mounts of", &view)?;
        Ok(!users.is_empty())
    }

    /// Trees whose images are mounted.
    pub(super) fn mounted_images<'a>(&self, mounts: &'a [super::mountinfo::Mount]) -> Vec<(TreeDigest, &'a Path)> {
        let folder = self.root.join("mnt").join(IMAGES);
        let points = mounts.iter().filter(|mount| mount.point.parent() == Some(&folder));
        points
            .filter_map(|mount| Some((tree_of(mount.point.file_name()?.to_str()?)?, &*mount.point)))
            .collect()
    }
}

fn make_below(mounts: &Path, folder: &str, name: &str) -> Result<(), Error> {
    let folder = mounts.join(folder);
    make_private(&folder)?;
    make_private(&folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_the_tree_and_owner_that_it_was_made_of() {
        let tree = TreeDigest::from_bytes([0xab; 32]);
        for ids in [None, Some((0, 0)), Some((70_000, u32::MAX))] {
            assert_eq!(parts_of(&stem(&tree, ids)), Some((tree, ids)));
        }
        let hex = tree.hex();
        for name in ["-u1", "-u1-g", "-u01-g1", "-u+1-g1", "-u1-g4294967296", "-u1-g1-", "x"] {
            assert_eq!(parts_of(&format!("{hex}{name}")), None, "{name}");
        }
        assert_eq!(parts_of(&hex.to_uppercase()), None);
        assert_eq!(parts_of("é"), None);
    }
}
