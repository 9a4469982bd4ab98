//! The end of a layer: out of sight, and gone.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::error::IoContext;
use super::life::{read_mounts, top};
use super::lock::relock;
use super::mounted::fail_if_shown_elsewhere;
use super::record::{self, sync_folder};
use super::{
    Error, Inner, LayerId, LayerRecord, Mode, PAUSE, Paths, Stage, TRIES, inuse, make_private, mount, set_fixed,
};
use crate::store::remove_all;

/// Where files are kept that were written into the folder of a layer while that was not mounted there.
const FOUND: &str = "found";

impl Inner {
    pub(super) fn release(&self, id: &LayerId, detach: bool) -> Result<(), Error> {
        let paths = self.paths(id);
        self.take_down(id, &paths, detach)?;
        self.remove(id, &paths)?;
        relock(&self.holds).remove(id);
        Ok(())
    }

    /// Unmounts everything of a layer.
    pub(super) fn take_down(&self, id: &LayerId, paths: &Paths, detach: bool) -> Result<(), Error> {
        let in_use = |by: String| Error::InUse { id: id.clone(), by };
        if relock(&self.readers).contains_key(id) {
            return Err(in_use("a snapshot that is being taken".to_owned()));
        }
        let mounts = read_mounts()?;
        // All read-only layers of a tree are one file system: who shows it elsewhere need not have it from here, and
        // loses nothing, for the tree stays while anybody shows it.
        let mode = LayerRecord::read(&paths.folder, id)
            .ok()
            .flatten()
            .map(|record| record.mode);
        let dev = match mode {
            Some(Mode::ReadOnly) => None,
            _ => top(&mounts, &paths.mount).map(|m| m.dev),
        };
        // However long they take: under a pod that still has the layer, its files would vanish, and its tree could.
        fail_if_shown_elsewhere(id, &paths.mount, dev)?;
        // They would go with it, unasked.
        let is_inside = |point: &PathBuf| {
            [&paths.mount, &paths.disk]
                .into_iter()
                .any(|own| point != own && point.starts_with(own))
        };
        if let Some(inside) = mounts.iter().find(|m| is_inside(&m.point)) {
            return Err(in_use(format!("a mount inside it, at {}", inside.point.display())));
        }
        for point in [&paths.mount, &paths.disk] {
            for mount in mounts.iter().filter(|m| m.point == *point) {
                let mut tries = 0;
                while !mount::detach_at(point, detach)? {
                    let users = inuse::openers(mount.dev).context("look for users of", point)?;
                    if !users.is_empty() {
                        return Err(in_use(users.join(", ")));
                    }
                    // Nobody: perhaps it ended just now, or was a program that we start (it has our descriptors until
                    // its exec).
                    tries += 1;
                    if tries == TRIES {
                        return Err(in_use("a process".to_owned()));
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
        // Who came meanwhile, as a pod that was just starting. (By its number, the file system cannot be known any more.)
        fail_if_shown_elsewhere(id, &paths.mount, None)?;
        // What is mounted there now is not ours, and its files are not ours to remove.
        let mounts = read_mounts()?;
        let ours = [&paths.mount, &paths.folder];
        if let Some(mount) = mounts
            .iter()
            .find(|m| ours.iter().any(|path| m.point.starts_with(path)))
        {
            return Err(Error::Occupied {
                path: mount.point.clone(),
                source_name: String::from_utf8_lossy(&mount.source).into_owned(),
            });
        }
        Ok(())
    }

    /// Removes the folder that the layer is mounted at, with nothing mounted there.
    pub(super) fn remove_point(&self, id: &LayerId, paths: &Paths) -> Result<(), Error> {
        self.set_aside(id, paths)?;
        set_fixed(&paths.mount, false);
        match fs::remove_dir(&paths.mount) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &paths.mount, e)),
            _ => Ok(()),
        }
    }

    /// Moves away what lies in the folder that the layer is mounted at, with nothing mounted there; returns where to.
    ///
    /// A pod that starts before the layer is mounted again after a reboot writes into the folder itself. That is no part
    /// of the layer, and may be somebody's only copy.
    pub(super) fn set_aside(&self, id: &LayerId, paths: &Paths) -> Result<Option<PathBuf>, Error> {
        let is_empty = match fs::read_dir(&paths.mount) {
            Ok(mut entries) => entries.next().is_none(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            Err(e) => return Err(Error::io("list", &paths.mount, e)),
        };
        if is_empty {
            return Ok(None);
        }
        set_fixed(&paths.mount, false);
        let found = self.root.join(FOUND);
        make_private(&found)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let to = found.join(format!("{id}-{}", now.as_millis()));
        match renameat_with(CWD, &paths.mount, CWD, &to, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(Some(to)),
            Err(errno) => Err(Error::io("move away what lies in", &paths.mount, errno.into())),
        }
    }

    /// Removes what is on disk of an unmounted layer, its record last.
    fn remove(&self, id: &LayerId, paths: &Paths) -> Result<(), Error> {
        self.remove_point(id, paths)?;
        let entries = match fs::read_dir(&paths.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("list", &paths.folder, e)),
        };
        let found = LayerRecord::read(&paths.folder, id);
        let is_durable = !matches!(&found, Ok(Some(record)) if !record.is_durable());
        match found {
            Ok(Some(mut record)) if record.stage != Stage::Releasing => {
                record.stage = Stage::Releasing;
                match record.write(&paths.folder) {
                    // A full disk must not keep anybody from making room; prepare then finds the data gone.
                    Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::StorageFull => {}
                    other => other?,
                }
            }
            // A record that cannot be read says nothing that is needed for removing.
            Ok(_) | Err(Error::Record { .. }) => {}
            Err(error) => return Err(error),
        }
        for entry in entries {
            let entry = entry.context("list", &paths.folder)?;
            if entry.file_name() != record::FILE_NAME {
                remove_all(&entry.path()).context("remove", &entry.path())?;
            }
        }
        // The data must not outlive the record.
        if is_durable {
            sync_folder(&paths.folder)?;
        }
        remove_all(&paths.folder).context("remove", &paths.folder)?;
        match is_durable {
            true => sync_folder(&self.root.join("layers")),
            false => Ok(()),
        }
    }
}
