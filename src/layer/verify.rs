//! Are the images and copies of trees what their trees give? One that is not is replaced, or removed: it is a cache, and can
//! be made again.

use std::fs;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::error::IoContext;
use super::life::{read_mounts, top};
use super::shared::{IMAGES, TREES, parts_of};
use super::{Error, Inner, copies, image, lower};
use crate::store::{Pace, Problem, TreeDigest};

/// What was found of the images, and of the copies that stand for them on the road [`Road::Copy`](super::Road::Copy).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageVerification {
    /// How many were compared.
    pub images: u64,
    /// Those that were other ones than their trees give. Right images are in their places, and copies are gone.
    pub bad: Vec<BadImage>,
    /// Those that could not be compared, with why: their trees' manifests are damaged, or there is no room on the disk.
    pub passed_over: Vec<Problem>,
}

/// An image that was not what its tree gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BadImage {
    pub path: PathBuf,
    pub tree: TreeDigest,
    /// The damaged one is mounted, and stays so until no layer stands on it: what layers of the tree show may be wrong. A
    /// copy is then still there, also when its layers are not mounted, for only their end lets it be removed.
    pub mounted: bool,
    /// Of a copy, the first entry that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
}

enum Compared {
    Alike,
    Bad(BadImage),
    Cancelled,
}

impl ImageVerification {
    /// Does nothing show a damaged image any more?
    pub fn is_sound(&self) -> bool {
        self.bad.iter().all(|bad| !bad.mounted)
    }
}

impl Inner {
    pub(super) fn verify_images(
        &self,
        rate: Option<NonZeroU64>,
        cancel: &AtomicBool,
    ) -> Result<ImageVerification, Error> {
        let folder = self.store.images_dir();
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).context("list", &folder)? {
            let name = entry.context("list", &folder)?.file_name();
            let Some((stem, kind)) = name.to_str().and_then(|name| name.rsplit_once('.')) else {
                continue;
            };
            let is_copy = match kind {
                "erofs" => false,
                "tree" => true,
                _ => continue,
            };
            if let Some((tree, ids)) = parts_of(stem) {
                names.push((stem.to_owned(), is_copy, tree, ids));
            }
        }
        names.sort();
        let mut found = ImageVerification::default();
        let mut pace = Pace::new(rate);
        for (stem, is_copy, tree, ids) in names {
            if cancel.load(Ordering::Relaxed) {
                break;
            }
            let mut wait = |bytes| pace.wait(bytes, cancel);
            let verified = match is_copy {
                false => self
                    .trees
                    .with(&stem, || self.verify_image(&stem, tree, ids, &mut wait)),
                true => self.verify_copy(&stem, tree, ids, &mut wait),
            };
            match verified {
                Ok(Compared::Alike) => found.images += 1,
                Ok(Compared::Bad(bad)) => {
                    found.images += 1;
                    found.bad.push(bad);
                }
                Ok(Compared::Cancelled) => break,
                // A tree without a whole manifest, a disk without room: what was found besides is told all the same. A
                // collection may have taken the image with its tree.
                Err(error) => {
                    let path = match is_copy {
                        false => image::path(&self.store, &tree, ids),
                        true => lower::path(&self.store, &tree, ids),
                    };
                    if fs::symlink_metadata(&path).is_ok() {
                        found.passed_over.push(Problem {
                            path: path.display().to_string(),
                            message: error.to_string(),
                        });
                    }
                }
            }
        }
        Ok(found)
    }

    /// Compares one image, and replaces it if it is another. Call with its lock held.
    fn verify_image(
        &self,
        stem: &str,
        tree: TreeDigest,
        ids: Option<(u32, u32)>,
        wait: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Compared, Error> {
        // No collection takes the image meanwhile.
        let _hold = self.store.hold(&tree)?;
        // Before anything is replaced: what is replaced must be told. The lock keeps it mounted, or not.
        let point = self.root.join("mnt").join(IMAGES).join(stem);
        let mounted = top(&read_mounts()?, &point).is_some();
        Ok(match image::renew(&self.store, &tree, ids, wait)? {
            None => Compared::Cancelled,
            Some(true) => Compared::Alike,
            Some(false) => Compared::Bad(BadImage {
                path: image::path(&self.store, &tree, ids),
                tree,
                mounted,
                entry: None,
            }),
        })
    }

    /// Compares one copy, and removes it if it is another tree and nobody uses it. That may take long, and is done without its
    /// lock: nobody writes to a copy, and no collection takes one whose tree is held.
    fn verify_copy(
        &self,
        stem: &String,
        tree: TreeDigest,
        ids: Option<(u32, u32)>,
        wait: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Compared, Error> {
        let _hold = self.store.hold(&tree)?;
        let (entry, copy) = match lower::compare(&self.store, &tree, ids, wait)? {
            None | Some((copies::Compared::Alike, _)) => return Ok(Compared::Alike),
            Some((copies::Compared::Cancelled, _)) => return Ok(Compared::Cancelled),
            Some((copies::Compared::Differs(path), copy)) => (path, copy),
        };
        let mounted = self.trees.with(stem, || -> Result<bool, Error> {
            // Its view stays mounted for a while when no layer is left.
            let view = self.root.join("mnt").join(TREES).join(stem);
            let mounted = self.is_used(stem)? || top(&read_mounts()?, &view).is_some();
            if !mounted {
                lower::discard(&self.store, &tree, ids, &copy)?;
            }
            Ok(mounted)
        })?;
        Ok(Compared::Bad(BadImage {
            path: lower::path(&self.store, &tree, ids),
            tree,
            mounted,
            entry: Some(String::from_utf8_lossy(&entry).into_owned()),
        }))
    }
}
