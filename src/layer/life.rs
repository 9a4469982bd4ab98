//! A layer's life: made, mounted, grown, released; each step so that it can be interrupted and done again.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, statat};

use super::descent::{Descent, names};
use super::error::IoContext;
use super::lock::relock;
use super::mountinfo::{self, Mount};
use super::record::{self, sync_folder};

use super::{
    Error, Inner, LayerId, LayerRecord, LayerSpec, Lost, Mode, Paths, Prepared, SOURCE_PREFIX, Stage, disk, has_disk,
    has_no_data, inuse, lower, make_private, mount,
};
use crate::store::remove_all;

/// How often, and after what pause, something busy that nobody is seen to use is tried again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

impl Inner {
    pub(super) fn prepare(&self, spec: &LayerSpec) -> Result<Prepared, Error> {
        let paths = self.paths(&spec.id);
        let found = LayerRecord::read(&paths.folder, &spec.id)?;
        if let Some(record) = &found {
            self.check(record, spec)?;
        }
        let mounts = read_mounts()?;
        let source = format!("{SOURCE_PREFIX}{}", spec.tree);
        let prepared = |record: &LayerRecord, reused| Prepared {
            path: paths.mount.clone(),
            reused,
            lost: record.lost,
            size: record.size,
        };
        if let Some(mount) = top(&mounts, &paths.mount) {
            if mount.source != source.as_bytes() {
                return Err(Error::Occupied {
                    path: paths.mount,
                    source_name: String::from_utf8_lossy(&mount.source).into_owned(),
                });
            }
            return match &found {
                Some(record) if record.stage == Stage::Made => {
                    self.hold(&spec.id, &spec.tree)?;
                    Ok(prepared(record, true))
                }
                _ => Err(missing_record(&paths, "the layer is mounted")),
            };
        }
        let mut record = match found {
            Some(record) => {
                self.hold(&spec.id, &spec.tree)?;
                record
            }
            None => self.begin(spec, &paths)?,
        };
        let lower_path = lower::path(&self.store, &spec.tree, spec.ids);
        let lower = self
            .copies
            .with(&lower_path, || lower::ensure(&self.store, &spec.tree, spec.ids))?;
        self.bring_up(&mut record, &paths, &lower_path, &mounts)?;

        let changes = paths.changes(&record);
        let upper = mount::open_folder(&changes.join("upper"))?;
        let work = mount::open_folder(&changes.join("work"))?;
        make_private(&paths.mount)?;
        let layers = mount::Overlay {
            source: &source,
            lower: lower.as_fd(),
            upper: upper.as_fd(),
            work: work.as_fd(),
        };
        mount::overlay(
            &layers,
            mount::Flags {
                allow_suid: self.options.allow_suid,
            },
            &paths.mount,
        )?
        .attach(&paths.mount)?;
        Ok(prepared(&record, false))
    }

    /// Is the layer on disk the one that is asked for?
    fn check(&self, record: &LayerRecord, spec: &LayerSpec) -> Result<(), Error> {
        let id = &spec.id;
        if record.store_id != self.store.id() {
            return Err(Error::DataLost {
                id: id.clone(),
                reason: format!(
                    "it was made in store {}, and this is store {}",
                    record.store_id,
                    self.store.id()
                ),
            });
        }
        if record.stage == Stage::Releasing {
            return Err(Error::Releasing { id: id.clone() });
        }
        let ids = |ids: Option<(u32, u32)>| ids.map_or("none".to_owned(), |(uid, gid)| format!("{uid}:{gid}"));
        for (field, recorded, wanted) in [
            ("owner object", record.owner.to_string(), spec.owner.to_string()),
            ("tree", record.tree.to_string(), spec.tree.to_string()),
            ("mode", format!("{:?}", record.mode), format!("{:?}", spec.mode)),
            ("owner", ids(record.ids), ids(spec.ids)),
        ] {
            if recorded != wanted {
                return Err(Error::Immutable {
                    id: id.clone(),
                    field,
                    recorded,
                    wanted,
                });
            }
        }
        Ok(())
    }

    /// Writes a new layer's record, before anything else of it is made.
    fn begin(&self, spec: &LayerSpec, paths: &Paths) -> Result<LayerRecord, Error> {
        let size = spec.size.or(self.options.default_size).map(whole_pages);
        check_size(&spec.id, spec.mode, size)?;
        // Held first, so that no collection takes the tree away between the look at it and the record.
        self.hold(&spec.id, &spec.tree)?;
        let begun = make_private(&paths.folder).and_then(|()| {
            if !has_no_data(&paths.folder)? {
                return Err(missing_record(paths, "the layer has data"));
            }
            let record = LayerRecord::new(spec, size, self.store.id());
            record.write(&paths.folder)?;
            sync_folder(&self.root.join("layers"))?;
            Ok(record)
        });
        if begun.is_err() {
            relock(&self.holds).remove(&spec.id);
        }
        begun
    }

    /// Makes or mounts the folders that overlayfs writes to.
    fn bring_up(&self, record: &mut LayerRecord, paths: &Paths, lower: &Path, mounts: &[Mount]) -> Result<(), Error> {
        let disk_is_up = top(mounts, &paths.disk).is_some();
        if record.stage == Stage::Made {
            // What this process does not see mounted may still be mounted where it does not look: a second mount of one
            // upper would damage it, and a layer in memory that is in use there is not lost.
            let users = inuse::mounts(None, &paths.mount, |m| is_upper_of(m, &record.id))
                .context("look for other mounts of", &paths.mount)?;
            if !users.is_empty() {
                return Err(Error::InUse {
                    id: record.id.clone(),
                    by: users.join(", "),
                });
            }
        }
        if record.stage == Stage::Made && record.mode == Mode::Tmpfs && !disk_is_up {
            // Recorded before anything is made anew, so that it is told even if we die in between.
            record.lost = Some(Lost::Reboot);
            record.stage = Stage::Making;
            record.write(&paths.folder)?;
        }
        if record.stage == Stage::Making {
            return make(record, paths, lower, mounts);
        }
        let lost = |reason: &str| Error::DataLost {
            id: record.id.clone(),
            reason: reason.to_owned(),
        };
        if has_disk(record) && !disk_is_up {
            // Only what is not there is lost: a disk that cannot be read may be repaired.
            if !paths.image.try_exists().context("stat", &paths.image)? {
                return Err(lost("disk.img is gone"));
            }
            make_private(&paths.disk)?;
            disk::mount(&paths.image, &paths.disk)?;
        }
        let changes = paths.changes(record);
        for folder in ["upper", "work"].map(|name| changes.join(name)) {
            if !folder.try_exists().context("stat", &folder)? {
                return Err(lost("its upper or work folder is gone"));
            }
        }
        Ok(())
    }

    pub(super) fn grow(&self, id: &LayerId, size: u64) -> Result<(), Error> {
        let paths = self.paths(id);
        let size = whole_pages(size);
        let mut record = LayerRecord::read(&paths.folder, id)?.ok_or_else(|| Error::NotFound { id: id.clone() })?;
        let from = record.size.ok_or_else(|| Error::Unlimited { id: id.clone() })?;
        if size < from {
            return Err(Error::Shrink {
                id: id.clone(),
                from,
                to: size,
            });
        }
        if size == from {
            return Ok(());
        }
        let mounts = read_mounts()?;
        let Some(mount) = top(&mounts, &paths.disk).filter(|_| record.stage == Stage::Made) else {
            return Err(Error::NotMounted { id: id.clone() });
        };
        match record.mode {
            Mode::Tmpfs => mount::resize_tmpfs(&paths.disk, size)?,
            Mode::Overlay => disk::grow(&paths.image, &paths.disk, &mount.source, size)?,
        }
        // Recorded last: until then, the caller finds the old size and does it again.
        record.size = Some(size);
        record.write(&paths.folder)
    }

    pub(super) fn release(&self, id: &LayerId, detach: bool) -> Result<(), Error> {
        let paths = self.paths(id);
        let in_use = |by: String| Error::InUse { id: id.clone(), by };
        if relock(&self.readers).contains_key(id) {
            return Err(in_use("a snapshot that is being taken".to_owned()));
        }
        let mounts = read_mounts()?;
        let dev = top(&mounts, &paths.mount).map(|m| m.dev);
        if !detach {
            let users = inuse::mounts(dev, &paths.mount, |m| is_upper_of(m, id))
                .context("look for other mounts of", &paths.mount)?;
            if !users.is_empty() {
                return Err(in_use(users.join(", ")));
            }
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
        self.remove(id, &paths)?;
        relock(&self.holds).remove(id);
        Ok(())
    }

    /// Removes what is on disk of an unmounted layer, its record last.
    fn remove(&self, id: &LayerId, paths: &Paths) -> Result<(), Error> {
        remove_folder(&paths.mount)?;
        let entries = match fs::read_dir(&paths.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("list", &paths.folder, e)),
        };
        match LayerRecord::read(&paths.folder, id) {
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
        sync_folder(&paths.folder)?;
        remove_all(&paths.folder).context("remove", &paths.folder)?;
        sync_folder(&self.root.join("layers"))
    }

    pub(super) fn used_bytes(&self, id: &LayerId) -> Result<u64, Error> {
        let paths = self.paths(id);
        let record = LayerRecord::read(&paths.folder, id)?.ok_or_else(|| Error::NotFound { id: id.clone() })?;
        if !has_disk(&record) {
            let upper = paths.folder.join("upper");
            return match File::open(&upper) {
                Ok(folder) => allocated(folder).context("count the blocks in", &upper),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
                Err(e) => Err(Error::io("open", &upper, e)),
            };
        }
        if top(&read_mounts()?, &paths.disk).is_some() {
            return disk::used(&paths.disk);
        }
        match fs::symlink_metadata(&paths.image) {
            Ok(image) => Ok(image.blocks() * 512),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(Error::io("stat", &paths.image, e)),
        }
    }
}

/// Makes everything of a layer that was never mounted, whatever an interrupted try left.
fn make(record: &mut LayerRecord, paths: &Paths, lower: &Path, mounts: &[Mount]) -> Result<(), Error> {
    for _ in mounts.iter().filter(|m| m.point == paths.disk) {
        if !mount::detach_at(&paths.disk, false)? {
            return Err(Error::InUse {
                id: record.id.clone(),
                by: "a process that has its unfinished file system open".to_owned(),
            });
        }
    }
    for left in [&paths.disk, &paths.folder.join("upper"), &paths.folder.join("work")] {
        remove_all(left).context("remove", left)?;
    }
    match (record.mode, record.size) {
        (Mode::Tmpfs, size) => {
            make_private(&paths.disk)?;
            let source = format!("larder-layer:{}", record.id);
            mount::tmpfs(size, &source, &paths.disk)?.attach(&paths.disk)?;
        }
        (Mode::Overlay, Some(size)) => {
            make_private(&paths.disk)?;
            disk::make(&paths.image, size)?;
            disk::mount(&paths.image, &paths.disk)?;
        }
        (Mode::Overlay, None) => {}
    }
    let changes = paths.changes(record);
    let (upper, work) = (changes.join("upper"), changes.join("work"));
    make_private(&upper)?;
    make_private(&work)?;
    lower::copy_root(lower, &upper)?;
    if has_disk(record) {
        let folder = File::open(changes).context("open", changes)?;
        rustix::fs::syncfs(&folder).context("sync", changes)?;
        if record.mode == Mode::Overlay {
            File::open(&paths.image)
                .and_then(|f| f.sync_all())
                .context("sync", &paths.image)?;
        }
    } else {
        sync_folder(&upper)?;
        sync_folder(&work)?;
    }
    record.stage = Stage::Made;
    record.write(&paths.folder)
}

/// A file system ends at a whole page, at most at the limit.
fn whole_pages(size: u64) -> u64 {
    size & !4095
}

fn check_size(id: &LayerId, mode: Mode, size: Option<u64>) -> Result<(), Error> {
    let least = match mode {
        Mode::Overlay => disk::LEAST,
        // Room for the two folders and a first file.
        Mode::Tmpfs => 64 << 10,
    };
    match size {
        Some(size) if size < least => Err(Error::TooSmall {
            id: id.clone(),
            size,
            least,
        }),
        _ => Ok(()),
    }
}

fn missing_record(paths: &Paths, but: &str) -> Error {
    Error::Record {
        path: paths.folder.join(record::FILE_NAME),
        message: format!("missing, although {but}"),
    }
}

fn read_mounts() -> Result<Vec<Mount>, Error> {
    mountinfo::of_self().context("read", Path::new("/proc/self/mountinfo"))
}

/// The mount on top at `point`.
fn top<'a>(mounts: &'a [Mount], point: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|m| m.point == point)
}

/// Is it an overlay that writes to this layer's upper? The id in its path is unique.
///
/// A kernel before 6.13 shows the layers as `/proc/self/fd/N`; there the mount point has the id, unless it is a bind.
fn is_upper_of(mount: &Mount, id: &LayerId) -> bool {
    let shows = |part: &str| mount.options.windows(part.len()).any(|w| w == part.as_bytes());
    let named =
        mount.source.starts_with(SOURCE_PREFIX.as_bytes()) && mount.point.ends_with(Path::new("mnt").join(id.as_str()));
    mount.fs_type == "overlay"
        && (named || shows(&format!("/layers/{id}/upper")) || shows(&format!("/layers/{id}/disk/upper")))
}

fn remove_folder(path: &Path) -> Result<(), Error> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
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
