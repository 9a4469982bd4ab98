//! The lower layer of a writable one: a tree as ordinary files, copied once and shared by every layer of that tree.
//!
//! It is a cache in the store's folder of images. It is made under another name and renamed when it is whole and
//! durable; the store's garbage collection removes it when nothing holds the tree.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::Error;
use super::copies::{self, Compared};
use super::error::IoContext;
use super::mount::open_folder;
use super::record::sync_folder;
use super::xattrs::Buffers;
use crate::store::tree::{LeafKind, Meta, Node, Tree};
use crate::store::{Store, TreeDigest};

const PRIVATE: &[u8] = b"trusted.overlay.";
const ESCAPED: &[u8] = b"trusted.overlay.overlay.";

/// The folder of a tree's copy, with every entry owned by `ids` where given.
pub(super) fn path(store: &Store, tree: &TreeDigest, ids: Option<(u32, u32)>) -> PathBuf {
    store
        .images_dir()
        .join(format!("{}.tree", super::shared::stem(tree, ids)))
}

/// Opens the copy of a tree, making it first where it is missing. The caller holds the tree, and is the only one who
/// makes this copy.
pub(super) fn ensure(store: &Store, digest: &TreeDigest, ids: Option<(u32, u32)>) -> Result<OwnedFd, Error> {
    let path = path(store, digest, ids);
    if let Some(folder) = existing(&path)? {
        return Ok(folder);
    }
    let mut tree = store.load(digest)?;
    refuse_whiteouts(&tree, digest)?;
    escape(&mut tree);
    let scratch = store.scratch()?;
    let temporary = scratch.path().join("tree");
    fs::create_dir(&temporary).context("create", &temporary)?;
    // Opened before the first write: a descriptor that is opened later does not hear of an earlier write error.
    let folder = open_for_sync(&temporary)?;
    store.export(&tree, &temporary, ids)?;
    rustix::fs::syncfs(&folder).context("sync", &temporary)?;
    fs::rename(&temporary, &path).context("rename to", &path)?;
    sync_folder(&store.images_dir())?;
    open_folder(&path)
}

/// Compares the copy of a tree with what it should be; `None` if there is none. `wait` as in [`copies::compare`]. With it comes
/// the folder that was compared, as nobody else keeps it in its place meanwhile.
pub(super) fn compare(
    store: &Store,
    digest: &TreeDigest,
    ids: Option<(u32, u32)>,
    wait: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<(Compared, OwnedFd)>, Error> {
    let path = path(store, digest, ids);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = match rustix::fs::open(&path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        folder => folder.context("open", &path)?,
    };
    let mut tree = store.load(digest)?;
    escape(&mut tree);
    if let Some(ids) = ids {
        own(&mut tree, ids);
    }
    let compared = folder.try_clone().and_then(|root| copies::compare(root, &tree, wait));
    Ok(Some((compared.context("walk", &path)?, folder)))
}

/// Takes the copy of a tree away, if it is still this folder. The caller has seen that nobody uses it.
pub(super) fn discard(
    store: &Store,
    digest: &TreeDigest,
    ids: Option<(u32, u32)>,
    copy: &OwnedFd,
) -> Result<(), Error> {
    let path = path(store, digest, ids);
    let seen = rustix::fs::fstat(copy).context("look at", &path)?;
    match rustix::fs::lstat(&path) {
        Ok(there) if (there.st_dev, there.st_ino) == (seen.st_dev, seen.st_ino) => {}
        // It has gone meanwhile, and perhaps another one was made.
        Ok(_) | Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(Error::io("look at", &path, error.into())),
    }
    // In one step: half of a copy would be taken for a whole one.
    let scratch = store.scratch()?;
    fs::rename(&path, scratch.path().join("tree")).context("take away", &path)?;
    sync_folder(&store.images_dir())
}

/// Gives `upper` the owner, mode, extended attributes and modification time of `lower`, so that the root of the merged
/// view equals the root of the tree.
pub(super) fn copy_root(lower: &Path, upper: &Path) -> Result<(), Error> {
    let from = fs::File::open(lower).context("open", lower)?;
    let to = fs::File::open(upper).context("open", upper)?;
    let stat = rustix::fs::fstat(&from).context("stat", lower)?;
    rustix::fs::fchown(&to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
        .context("change the owner of", upper)?;
    rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777)).context("change the mode of", upper)?;
    copy_xattrs(from.as_fd(), to.as_fd(), lower, upper)?;
    let mtime = Timespec {
        tv_sec: stat.st_mtime,
        tv_nsec: stat.st_mtime_nsec as _,
    };
    rustix::fs::futimens(
        &to,
        &Timestamps {
            last_access: mtime,
            last_modification: mtime,
        },
    )
    .context("set the times of", upper)
}

fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>, lower: &Path, upper: &Path) -> Result<(), Error> {
    let xattrs = Buffers::new().of(from).context("read the attributes of", lower)?;
    for (name, value) in xattrs {
        rustix::fs::fsetxattr(to, &*name, &value, rustix::fs::XattrFlags::empty())
            .context("set an attribute of", upper)?;
    }
    Ok(())
}

/// What every inode of the tree has.
fn metas(tree: &mut Tree) -> impl Iterator<Item = &mut Meta> {
    let dirs = tree.dirs.iter_mut().map(|dir| &mut dir.meta);
    dirs.chain(tree.leaves.iter_mut().map(|leaf| &mut leaf.meta))
}

/// Gives every entry the owner that a layer with `ids` shows.
pub(crate) fn own(tree: &mut Tree, ids: (u32, u32)) {
    for meta in metas(tree) {
        (meta.uid, meta.gid) = ids;
    }
}

/// Escapes the attributes that overlayfs would take for its own (kernel 6.7 and later show them unescaped through the
/// mount; "Nesting overlayfs mounts" in the kernel's overlayfs document).
fn escape(tree: &mut Tree) {
    for meta in metas(tree) {
        let mut changed = false;
        for (name, _) in &mut meta.xattrs {
            if let Some(rest) = name.strip_prefix(PRIVATE) {
                *name = [ESCAPED, rest].concat().into();
                changed = true;
            }
        }
        if changed {
            meta.xattrs.sort();
        }
    }
}

/// The name that a user gave an attribute which overlayfs keeps in escaped form; `None` for overlayfs's own ones.
pub(crate) fn unescape(name: &[u8]) -> Option<Vec<u8>> {
    match name.strip_prefix(ESCAPED) {
        Some(rest) => Some([PRIVATE, rest].concat()),
        None if name.starts_with(PRIVATE) => None,
        None => Some(name.to_vec()),
    }
}

/// Character device 0/0 in a lower layer hides the name that it has: the tree would not be shown as it is.
fn refuse_whiteouts(tree: &Tree, digest: &TreeDigest) -> Result<(), Error> {
    let whiteout = |node: &Node| match node {
        Node::Leaf(leaf) => {
            matches!(
                tree.leaves[leaf.0 as usize].kind,
                LeafKind::CharDevice { major: 0, minor: 0 }
            )
        }
        Node::Dir(_) => false,
    };
    for dir in &tree.dirs {
        if let Some(entry) = dir.entries.iter().find(|e| whiteout(&e.node)) {
            return Err(Error::Unmountable {
                tree: *digest,
                path: std::ffi::OsStr::from_bytes(&entry.name).into(),
                reason: "character device 0/0 means a deleted file to overlayfs",
            });
        }
    }
    Ok(())
}

fn existing(path: &Path) -> Result<Option<OwnedFd>, Error> {
    match open_folder(path) {
        Ok(folder) => Ok(Some(folder)),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn open_for_sync(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).context("open", path)
}
