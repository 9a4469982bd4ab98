//! What a mount shows, and what it stands on, as far as it says so.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::IoContext;
use super::mountinfo::Mount;
use super::{Error, LayerId, SOURCE_PREFIX, inuse, shared};
use crate::store::TreeDigest;

/// The tree that a mount shows.
pub(super) fn tree(mount: &Mount) -> Option<TreeDigest> {
    std::str::from_utf8(&mount.source)
        .ok()?
        .strip_prefix(SOURCE_PREFIX)?
        .parse()
        .ok()
}

/// Whether a mount surely stands on another store than that at `root`: each of its lower folders is named as an image's
/// mount or copy is, and none is this store's. A mount that does not say where it stands counts as this store's.
pub(super) fn is_elsewhere(mount: &Mount, root: &Path) -> bool {
    let lowers = lowers(mount);
    // A path by descriptor, or one that a comma cut, names nothing.
    let named = |lower: &&Path| lower.parent().is_some_and(|folder| folder.ends_with("images"));
    // What a comma in our own path cut may look like another store's; uncut, it is in the options all the same.
    let says_ours = ["images", "mnt/images"]
        .iter()
        .any(|folder| says(mount, root.join(folder).as_os_str().as_bytes()));
    !lowers.is_empty() && !says_ours && lowers.iter().all(named)
}

/// Whether a mount of a tree surely stands on what was made of it under another name ([`shared::stem`]) than this.
pub(super) fn is_of_another(mount: &Mount, stem: &str) -> bool {
    // The first is the tree; there may be an empty one beside it.
    lowers(mount)
        .first()
        .and_then(|lower| stem_of(lower))
        .is_some_and(|name| name != stem)
}

/// The name of what a lower folder was made of, if it is an image's mount or copy.
fn stem_of(lower: &Path) -> Option<&str> {
    let name = lower.file_name()?.to_str()?;
    let name = name.strip_suffix(".tree").unwrap_or(name);
    let is_name = lower.parent()?.ends_with("images") && shared::parts_of(name).is_some();
    is_name.then_some(name)
}

/// Is it an overlay that writes to this layer's upper? The id in its path is unique.
///
/// Where the path of the store is an unusual one, a kernel before 6.13 shows the upper as `/proc/self/fd/N`; there the mount
/// point has the id, unless it is a bind.
fn is_upper_of(mount: &Mount, id: &LayerId) -> bool {
    let named =
        mount.source.starts_with(SOURCE_PREFIX.as_bytes()) && mount.point.ends_with(Path::new("mnt").join(id.as_str()));
    let shows = |part: String| says(mount, part.as_bytes());
    mount.fs_type == "overlay"
        && (named || shows(format!("/layers/{id}/upper")) || shows(format!("/layers/{id}/disk/upper")))
}

/// Fails if somebody else than `own` shows the layer, in whatever namespace: by the file system's number `dev` if it has one
/// here, and by its upper.
pub(super) fn fail_if_shown_elsewhere(id: &LayerId, own: &Path, dev: Option<(u32, u32)>) -> Result<(), Error> {
    let users = inuse::mounts(dev, own, |mount| is_upper_of(mount, id)).context("look for other mounts of", own)?;
    match users.is_empty() {
        true => Ok(()),
        false => Err(Error::InUse {
            id: id.clone(),
            by: users.join(", "),
        }),
    }
}

/// The lower folders of an overlay, as far as it says them.
fn lowers(mount: &Mount) -> Vec<&Path> {
    let options = mount.options.split(|byte| *byte == b',');
    options
        .filter_map(|option| {
            option
                .strip_prefix(b"lowerdir+=")
                .or_else(|| option.strip_prefix(b"lowerdir="))
        })
        .map(|lower| Path::new(OsStr::from_bytes(lower)))
        .collect()
}

fn says(mount: &Mount, part: &[u8]) -> bool {
    mount.options.windows(part.len()).any(|found| found == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(options: &str) -> Mount {
        Mount {
            id: 2,
            parent: 1,
            dev: (0, 50),
            root: "/".into(),
            point: "/m".into(),
            flags: "rw".into(),
            shared: None,
            master: None,
            fs_type: "overlay".into(),
            source: b"larder:x".to_vec(),
            options: options.into(),
        }
    }

    #[test]
    fn only_a_mount_that_surely_stands_on_another_store_is_elsewhere() {
        for (options, root, elsewhere) in [
            ("rw,lowerdir+=/s/images/a.tree,upperdir=/u", "/s", false),
            ("rw,lowerdir+=/other/images/a.tree,upperdir=/u", "/s", true),
            (
                "rw,lowerdir+=/s/mnt/images/a,datadir+=/s/objects,upperdir=/u",
                "/s",
                false,
            ),
            (
                "rw,lowerdir+=/o/mnt/images/a,datadir+=/o/objects,upperdir=/u",
                "/s",
                true,
            ),
            ("rw,lowerdir+=/proc/self/fd/7", "/s", false),
            ("rw", "/s", false),
            // A comma in the path of the store itself.
            ("rw,lowerdir+=/a,b/images/a.tree", "/a,b", false),
            ("rw,lowerdir+=/x/images/y,z/images/a.tree", "/x/images/y,z", false),
        ] {
            assert_eq!(is_elsewhere(&over(options), Path::new(root)), elsewhere, "{options}");
        }
    }

    #[test]
    fn a_mount_is_of_another_owner_only_where_it_says_so() {
        let tree = "ab".repeat(32);
        let owned = format!("{tree}-u1-g2");
        for (options, of_tree, of_owned) in [
            (
                format!("rw,lowerdir+=/s/mnt/images/{tree},datadir+=/s/objects"),
                false,
                true,
            ),
            (
                format!("rw,lowerdir+=/s/mnt/images/{owned},datadir+=/s/objects"),
                true,
                false,
            ),
            (
                format!("rw,lowerdir+=/s/images/{owned}.tree,lowerdir+=/s/mnt/empty"),
                true,
                false,
            ),
            (format!("rw,lowerdir+=/s/images/{tree}.tree,upperdir=/u"), false, true),
            (format!("rw,lowerdir+=/s/elsewhere/{tree},upperdir=/u"), false, false),
            ("rw,lowerdir+=/proc/self/fd/7".to_owned(), false, false),
            ("rw,lowerdir+=/s/mnt/images/x".to_owned(), false, false),
            ("rw".to_owned(), false, false),
        ] {
            let found = [&tree, &owned].map(|stem| is_of_another(&over(&options), stem));
            assert_eq!(found, [of_tree, of_owned], "{options}");
        }
    }
}
