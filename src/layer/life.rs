//! A layer's life: made, mounted, grown, released; each step so that it can be interrupted and done again.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use super::error::IoContext;
use super::lock::relock;
use super::mounted::fail_if_shown_elsewhere;
use super::mountinfo::{self, Mount};
use super::record::{self, sync_folder};
use super::{
    Error, Inner, LayerId, LayerRecord, LayerSpec, Lost, Mode, Paths, Prepared, SOURCE_PREFIX, Stage, check, disk,
    has_disk, lower, make_point, make_private, mount,
};
use crate::store::remove_all;

impl Inner {
    pub(super) fn prepare(&self, spec: &LayerSpec) -> Result<Prepared, Error> {
        let paths = self.paths(&spec.id);
        let found = LayerRecord::read(&paths.folder, &spec.id)?;
        if let Some(record) = &found {
            self.check(record, spec)?;
        }
        let mut mounts = read_mounts()?;
        if top(&mounts, &paths.disk).is_some_and(check::has_stopped) {
            self.take_down_stopped(&spec.id, &paths)?;
            mounts = read_mounts()?;
        }
        let source = format!("{SOURCE_PREFIX}{}", spec.tree);
        let prepared = |record: &LayerRecord, reused| Prepared {
            path: paths.mount.clone(),
            reused,
            lost: record.lost,
            size: record.size,
            found: None,
            checked: None,
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
        let (mounted, checked) = match record.mode {
            Mode::ReadOnly => {
                let view = self.view(&spec.tree, spec.ids)?;
                record.made(&paths.folder)?;
                (mount::again(&view, &paths.mount)?, None)
            }
            Mode::Overlay | Mode::Tmpfs => self.merge(&mut record, &paths, &source, &mounts)?,
        };
        let found = self.set_aside(&spec.id, &paths)?;
        make_point(&paths.mount)?;
        mounted.attach(&paths.mount)?;
        Ok(Prepared {
            found,
            checked,
            ..prepared(&record, false)
        })
    }

    /// Unmounts a layer whose file system has stopped taking writes, wherever it is mounted: only then it is read anew.
    fn take_down_stopped(&self, id: &LayerId, paths: &Paths) -> Result<(), Error> {
        let stopped = |waits: String| Error::Stopped { id: id.clone(), waits };
        // It can be read as it is: not before it can come back.
        check::can_begin(&paths.image)?;
        match self.store.check_room(0) {
            Err(error) if error.is_disk_full() => return Err(stopped(format!("room on the disk below: {error}"))),
            other => other?,
        }
        match self.take_down(id, paths, false) {
            Err(Error::InUse { by, .. }) => Err(stopped(format!("the end of its users: {by}"))),
            Ok(()) if disk::is_attached(&paths.image)? => {
                Err(stopped("the end of a mount of disk.img elsewhere".to_owned()))
            }
            other => other,
        }
    }

    /// Mounts the merged view of a tree and what was changed, nowhere yet. Also returns what a check of the
    /// layer's own file system said.
    fn merge(
        &self,
        record: &mut LayerRecord,
        paths: &Paths,
        source: &str,
        mounts: &[Mount],
    ) -> Result<(mount::Detached, Option<String>), Error> {
        let lower = self.lower(&record.tree, record.ids)?;
        let checked = self.bring_up(record, paths, &lower.path, mounts)?;
        let changes = paths.changes(record);
        let upper = mount::open_folder(&changes.join("upper"))?;
        let work = mount::open_folder(&changes.join("work"))?;
        let layers = mount::Overlay {
            source,
            lower: &[lower.tree.as_fd()],
            data: lower.data.as_ref().map(AsFd::as_fd),
            changes: Some(mount::Changes {
                upper: upper.as_fd(),
                work: work.as_fd(),
            }),
        };
        let flags = mount::Flags {
            allow_suid: self.options.allow_suid,
        };
        let mounted = mount::overlay(&layers, self.road()?.told(), flags, &paths.mount)?;
        Ok((mounted, checked))
    }

    /// Unmounts a layer on disk, which stays.
    pub(super) fn unmount(&self, id: &LayerId) -> Result<(), Error> {
        let paths = self.paths(id);
        self.take_down(id, &paths, false)?;
        self.remove_point(id, &paths)
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
        let size = match spec.mode {
            Mode::ReadOnly => None,
            Mode::Overlay | Mode::Tmpfs => spec.size.or(self.options.default_size).map(whole_pages),
        };
        check_size(&spec.id, spec.mode, size)?;
        if spec.mode == Mode::Overlay {
            self.store.check_room(disk::LEAST)?;
        }
        // Held first, so that no collection takes the tree away between the look at it and the record.
        self.hold(&spec.id, &spec.tree)?;
        let begun = make_private(&paths.folder).and_then(|()| {
            if !record::has_no_data(&paths.folder)? {
                return Err(missing_record(paths, "the layer has data"));
            }
            let record = LayerRecord::new(spec, size, self.store.id());
            record.write(&paths.folder)?;
            if record.is_durable() {
                sync_folder(&self.root.join("layers"))?;
            }
            Ok(record)
        });
        if begun.is_err() {
            relock(&self.holds).remove(&spec.id);
        }
        begun
    }

    /// Makes or mounts the folders that overlayfs writes to. Returns what a check of the layer's own file system said.
    fn bring_up(
        &self,
        record: &mut LayerRecord,
        paths: &Paths,
        lower: &Path,
        mounts: &[Mount],
    ) -> Result<Option<String>, Error> {
        let disk_is_up = top(mounts, &paths.disk).is_some();
        if record.stage == Stage::Made {
            // What this process does not see mounted may still be mounted where it does not look: a second mount of one
            // upper would damage it, and a layer in memory that is in use there is not lost.
            fail_if_shown_elsewhere(&record.id, &paths.mount, None)?;
        }
        if record.stage == Stage::Made && record.mode == Mode::Tmpfs && !disk_is_up {
            // Recorded before anything is made anew, so that it is told even if we die in between.
            record.lost = Some(Lost::Reboot);
            record.stage = Stage::Making;
            record.write(&paths.folder)?;
        }
        if record.stage == Stage::Making {
            return make(record, paths, lower, mounts).map(|()| None);
        }
        let mut checked = None;
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
            // Locked until it is mounted, which everybody else sees.
            let (said, _locked) = check::check(&record.id, &paths.image)?;
            checked = said;
            disk::mount(&paths.image, &paths.disk)?;
        }
        let changes = paths.changes(record);
        for folder in ["upper", "work"].map(|name| changes.join(name)) {
            if !folder.try_exists().context("stat", &folder)? {
                return Err(lost("its upper or work folder is gone"));
            }
        }
        Ok(checked)
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
            Mode::ReadOnly => return Err(Error::Unlimited { id: id.clone() }),
        }
        // Recorded last: until then, the caller finds the old size and does it again.
        record.size = Some(size);
        record.write(&paths.folder)
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
        (Mode::ReadOnly, _) => return record.made(&paths.folder),
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
    record.made(&paths.folder)
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
        Mode::ReadOnly => return Ok(()),
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

pub(super) fn read_mounts() -> Result<Vec<Mount>, Error> {
    mountinfo::of_self().context("read", Path::new("/proc/self/mountinfo"))
}

/// The mount on top at `point`.
pub(super) fn top<'a>(mounts: &'a [Mount], point: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|m| m.point == point)
}
