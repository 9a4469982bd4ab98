//! How much a layer's changes take.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, FileType, statat};

use super::descent::{Descent, names};
use super::error::IoContext;
use super::life::{read_mounts, top};
use super::{Error, LayerRecord, Mode, Paths, check, disk, has_disk};

/// How full a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Bytes that its changes take: on its own file system if it has one, or else the blocks of its files.
    pub used: u64,
    /// Per cent of its own file system's room for files that are taken; 0 without a limit.
    pub bytes_full: u8,
    /// Likewise of its inodes: every file and folder that is made or changed takes one.
    pub inodes_full: u8,
    /// Its own file system takes no writes any more, after an error: [`Layers::prepare`](super::Layers::prepare) makes it
    /// usable again when nobody uses it.
    pub stopped: bool,
    /// Its changes are on the store's disk in the end, and that has less free than is reserved.
    pub disk_full: bool,
    /// Likewise, or it has hardly more.
    pub disk_short: bool,
}

pub(super) fn room(paths: &Paths, record: &LayerRecord) -> Result<Room, Error> {
    let of_bytes = |used| Room {
        used,
        ..Room::default()
    };
    if record.mode == Mode::ReadOnly {
        return Ok(Room::default());
    }
    if !has_disk(record) {
        let upper = paths.folder.join("upper");
        return match File::open(&upper) {
            Ok(folder) => Ok(of_bytes(allocated(folder).context("count the blocks in", &upper)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Room::default()),
            Err(e) => Err(Error::io("open", &upper, e)),
        };
    }
    if let Some(mount) = top(&read_mounts()?, &paths.disk) {
        let stopped = check::has_stopped(mount);
        let room = match record.size {
            Some(_) => disk::room(&paths.disk)?,
            // A tmpfs without a limit does not say what it holds.
            None => {
                let folder = File::open(&paths.disk).context("open", &paths.disk)?;
                of_bytes(allocated(folder).context("count the blocks in", &paths.disk)?)
            }
        };
        return Ok(Room { stopped, ..room });
    }
    match fs::symlink_metadata(&paths.image) {
        Ok(image) => Ok(of_bytes(image.blocks() * 512)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Room::default()),
        Err(e) => Err(Error::io("stat", &paths.image, e)),
    }
}

/// Bytes of the blocks of everything below a folder; a file with several names counts once.
fn allocated(root: File) -> io::Result<u64> {
    let mut bytes = rustix::fs::fstat(&root)?.st_blocks as u64 * 512;
    let mut seen = std::collections::HashSet::new();
    let mut descent = Descent::new(root.into())?;
    let mut pending: Vec<Vec<CString>> = vec![names(descent.folder()?)?];
    while let Some(level) = pending.last_mut() {
        let Some(name) = level.pop() else {
            pending.pop();
            if !pending.is_empty() {
                descent.leave()?;
            }
            continue;
        };
        // The layer is in use: what vanishes while we count counts nothing.
        let stat = match statat(descent.folder()?, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(rustix::io::Errno::NOENT) => continue,
            other => other?,
        };
        if stat.st_nlink < 2 || FileType::from_raw_mode(stat.st_mode).is_dir() || seen.insert(stat.st_ino) {
            bytes += stat.st_blocks as u64 * 512;
        }
        if FileType::from_raw_mode(stat.st_mode).is_dir() {
            match descent.enter(&name) {
                Err(e) if e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::NotADirectory => {}
                other => {
                    other?;
                    pending.push(names(descent.folder()?)?);
                }
            }
        }
    }
    Ok(bytes)
}
