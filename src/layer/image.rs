//! Images of trees in the store's folder: made when they are missing, and made again when they are not whole.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::error::IoContext;
use super::record::sync_folder;
use super::shared::stem;
use super::{Error, erofs};
use crate::store::tree::Record;
use crate::store::{Scratch, Store, TreeDigest};

/// Its name until then.
const TEMPORARY: &str = "image";

/// An image is made by one at a time: the caller sees to it, and holds the tree.
pub(super) fn ensure(store: &Store, tree: &TreeDigest, ids: Option<(u32, u32)>) -> Result<File, Error> {
    let path = path(store, tree, ids);
    match open(&path)? {
        // One that cannot be read is not whole.
        Some(image) if erofs::is_whole(&image, tree).unwrap_or(false) => Ok(image),
        _ => make(store, tree, ids),
    }
}

pub(super) fn path(store: &Store, tree: &TreeDigest, ids: Option<(u32, u32)>) -> PathBuf {
    store.images_dir().join(format!("{}.erofs", stem(tree, ids)))
}

fn open(path: &Path) -> Result<Option<File>, Error> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    match File::options().read(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("open", path, e)),
    }
}

/// Makes the image, in the place of one that is there.
pub(super) fn make(store: &Store, tree: &TreeDigest, ids: Option<(u32, u32)>) -> Result<File, Error> {
    let made = Made::new(store, tree, ids)?;
    let path = path(store, tree, ids);
    made.name(store, &path)?;
    // For reading only, as one that was there.
    open(&path)?.ok_or_else(|| Error::io("open", &path, io::ErrorKind::NotFound.into()))
}

/// Compares an image with what its tree gives, byte by byte, and puts that in its place if it is another. Was it the same?
///
/// `wait` is told how many bytes were written or read, and says whether to go on: `None` if not.
pub(super) fn renew(
    store: &Store,
    tree: &TreeDigest,
    ids: Option<(u32, u32)>,
    wait: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<bool>, Error> {
    let path = path(store, tree, ids);
    let Some(image) = open(&path)? else {
        return Ok(Some(true));
    };
    let made = Made::new(store, tree, ids)?;
    let length = made.file.metadata().context("look at", &path)?.len();
    if !wait(length) {
        return Ok(None);
    }
    // What cannot be read is not the same.
    let same = are_same(&image, &made.file, wait).unwrap_or(Some(false));
    if same == Some(false) {
        made.name(store, &path)?;
    }
    Ok(same)
}

/// `None` if `wait` says so.
fn are_same(one: &File, other: &File, wait: &mut dyn FnMut(u64) -> bool) -> io::Result<Option<bool>> {
    use std::os::unix::fs::FileExt;
    const PART: usize = 1 << 20;
    let length = one.metadata()?.len();
    if length != other.metadata()?.len() {
        return Ok(Some(false));
    }
    let (mut part, mut beside) = (vec![0; PART], vec![0; PART]);
    let mut at = 0;
    while at < length {
        let count = (length - at).min(PART as u64) as usize;
        one.read_exact_at(&mut part[..count], at)?;
        other.read_exact_at(&mut beside[..count], at)?;
        if part[..count] != beside[..count] {
            return Ok(Some(false));
        }
        at += count as u64;
        if !wait(count as u64) {
            return Ok(None);
        }
    }
    Ok(Some(true))
}

/// An image that has no name yet.
struct Made {
    scratch: Scratch,
    file: File,
}

impl Made {
    fn new(store: &Store, tree: &TreeDigest, ids: Option<(u32, u32)>) -> Result<Made, Error> {
        let scratch = store.scratch()?;
        let temporary = scratch.path().join(TEMPORARY);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&temporary)
            .context("create", &temporary)?;
        write(&file, tree, ids, |visit| Ok(store.records(tree, visit)?)).map_err(|error| match error {
            Error::Io { source, .. } => Error::io("write", &temporary, source),
            other => other,
        })?;
        Ok(Made { scratch, file })
    }

    /// Gives it its name, durably.
    fn name(self, store: &Store, path: &Path) -> Result<(), Error> {
        let temporary = self.scratch.path().join(TEMPORARY);
        self.file.sync_all().context("sync", &temporary)?;
        fs::rename(&temporary, path).context("rename to", path)?;
        sync_folder(&store.images_dir())
    }
}

/// Writes a tree's image from the records that `all` goes through.
pub(super) fn write(
    image: &File,
    tree: &TreeDigest,
    ids: Option<(u32, u32)>,
    all: impl FnOnce(&mut dyn FnMut(Record)) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut writer = erofs::Writer::new(image, *tree, ids);
    let mut failed = None;
    all(&mut |record| {
        if failed.is_none() {
            failed = writer.record(record).err();
        }
    })?;
    match failed {
        None => {}
        Some(erofs::Error::Io(source)) => return Err(Error::io("write", Path::new("the image"), source)),
        Some(erofs::Error::Unmountable { path, reason }) => {
            return Err(Error::Unmountable {
                tree: *tree,
                path,
                reason,
            });
        }
    }
    writer.finish().context("write", Path::new("the image"))?;
    Ok(())
}
