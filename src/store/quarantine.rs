//! `quarantine/`: blobs that are not what their names say, moved out of `objects/` so that a name there means right
//! bytes again and the next put heals it.
//!
//! Nothing is overwritten and nothing is removed when it is found: what is damaged may be the only copy. Names are
//! `<digest hex>-<seconds since 1970>`, with `.1`, `.2`, … for further ones. A collection removes what has lain for
//! [`QUARANTINE_AGE`].

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use super::disk::{self, Step};
use super::files::{self, lock};
use super::layout::{Inner, QUARANTINE, object_path, shard_path};
use super::{Digest, Error, remove};

/// How long a quarantined blob stays: 30 days.
pub const QUARANTINE_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Device and inode of a file.
pub(super) type FileId = (u64, u64);

/// A blob that was moved away.
#[derive(Debug)]
pub(super) struct Taken {
    /// Where it is now.
    pub path: PathBuf,
    /// Why a crash may bring it back under its name.
    pub not_synced: Option<Error>,
}

/// Moves a blob away if its name still stands for the file that was judged. `None` if it is gone or another file by now.
///
/// Builds that found the blob present lose their lease on it: what they publish must not name it (see `publish.rs`).
pub(super) fn take(store: &Inner, digest: &Digest, judged: FileId, now: SystemTime) -> Result<Option<Taken>, Error> {
    let path = object_path(digest);
    let mut shard = lock(store.shard(digest));
    if shard.is_leaving(digest) {
        return Ok(None);
    }
    let stat = files::stat(&store.dir, path.as_str()).map_err(|e| Error::io("look at", store.path(&path), e))?;
    if stat.is_none_or(|stat| (stat.st_dev, stat.st_ino) != judged) {
        return Ok(None);
    }
    let taken = {
        let mut moved = store.moved_away();
        let taken = move_away(store, digest, &path, now)?;
        *moved += 1;
        for build in store.leases.builds() {
            let mut table = lock(build.table(digest));
            if table.get(digest).is_some_and(|leased| leased.staged == 0) {
                table.remove(digest);
            }
        }
        taken
    };
    // Perhaps it had another length when it was counted.
    shard.counted = None;
    drop(shard);
    // A crash must not bring the name back: whoever finds it takes it for good.
    let mut not_synced = None;
    for folder in [QUARANTINE, &shard_path(digest.as_bytes()[0])] {
        let synced = files::open_dir(&store.dir, folder).and_then(|dir| disk::fsync(Step::QuarantineSync, dir));
        if let Err(error) = synced {
            not_synced.get_or_insert(Error::io("sync", store.path(folder), error));
        }
    }
    Ok(Some(Taken {
        path: store.path(taken),
        not_synced,
    }))
}

fn move_away(store: &Inner, digest: &Digest, from: &str, now: SystemTime) -> Result<String, Error> {
    files::ensure_dir(Step::QuarantineDir, &store.dir, QUARANTINE)
        .map_err(|e| store.write_error(QUARANTINE, 4096, e))?;
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let base = format!("{QUARANTINE}/{}-{seconds}", digest.hex());
    let mut to = base.clone();
    let mut number = 0u32;
    loop {
        match disk::rename_new(Step::BlobQuarantine, &store.dir, from, &store.dir, to.as_str()) {
            Ok(()) => return Ok(to),
            Err(Errno::EXIST) if number < 10_000 => {
                number += 1;
                to = format!("{base}.{number}");
            }
            Err(error) => return Err(store.write_error(from, 4096, error)),
        }
    }
}

/// Something in the quarantine.
pub(super) struct Quarantined {
    pub name: String,
    pub size: u64,
    pub taken: SystemTime,
}

/// When it was moved, if the name is one of ours.
fn taken_at(name: &str) -> Option<SystemTime> {
    let (hex, time) = name.split_once('-')?;
    Digest::from_hex(hex)?;
    let seconds = time.split_once('.').map_or(time, |(seconds, _)| seconds);
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds.parse().ok()?))
}

/// All that is in the quarantine, by name. Other names in the folder are left alone.
pub(super) fn list(store: &Inner) -> Result<Vec<Quarantined>, Error> {
    let error = |e: Errno| Error::io("list", store.path(QUARANTINE), e);
    let dir = match files::open_dir(&store.dir, QUARANTINE) {
        // Something else has the name: nothing could be moved there.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
        other => other.map_err(error)?,
    };
    let mut found = Vec::new();
    for (name, _) in files::names(&dir).map_err(error)? {
        let Ok(name) = name.into_string() else { continue };
        if let (Some(taken), Some(stat)) = (taken_at(&name), files::stat(&dir, name.as_str()).map_err(error)?) {
            let size = stat.st_size.max(0) as u64;
            found.push(Quarantined { name, size, taken });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// What has lain long enough. A time in the future counts as now.
pub(super) fn old(store: &Inner, now: SystemTime) -> Result<Vec<Quarantined>, Error> {
    let mut found = list(store)?;
    found.retain(|one| now.duration_since(one.taken).is_ok_and(|age| age >= QUARANTINE_AGE));
    Ok(found)
}

pub(super) fn discard(store: &Inner, one: &Quarantined) -> Result<(), Error> {
    let path = format!("{QUARANTINE}/{}", one.name);
    remove::remove_tree(&store.dir, path.as_str()).map_err(|e| Error::io("remove", store.path(&path), e))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::retention::{Policy, Reason};
    use crate::store::testing::*;
    use crate::store::{Kind, Store};

    fn id(store: &Store, digest: &Digest) -> FileId {
        use std::os::unix::fs::MetadataExt;
        let found = fs::metadata(blob_path(store, digest)).unwrap();
        (found.dev(), found.ino())
    }

    #[test]
    fn an_earlier_quarantined_file_is_never_overwritten() {
        let (_dir, store) = store();
        let digest = digest_of(b"right");
        let mut taken = Vec::new();
        for wrong in ["wrong", "also wrong", "wrong once more"] {
            fs::write(blob_path(&store, &digest), wrong).unwrap();
            let judged = id(&store, &digest);
            taken.push(take(&store.inner, &digest, judged, at(1000)).unwrap().unwrap().path);
            assert!(!blob_path(&store, &digest).exists());
        }
        let names = ["-1000", "-1000.1", "-1000.2"].map(|end| format!("{}{end}", digest.hex()));
        for ((path, name), content) in taken.iter().zip(names).zip(["wrong", "also wrong", "wrong once more"]) {
            assert_eq!(*path, store.root().join("quarantine").join(name));
            assert_eq!(fs::read_to_string(path).unwrap(), content);
        }
        assert_eq!(list(&store.inner).unwrap().len(), 3);
    }

    #[test]
    fn a_file_that_was_healed_since_it_was_judged_stays() {
        let (_dir, store) = store();
        let digest = digest_of(b"right");
        fs::write(blob_path(&store, &digest), "wrong").unwrap();
        let judged = id(&store, &digest);
        let new = store.root().join("staging/new");
        fs::write(&new, "right").unwrap();
        fs::rename(&new, blob_path(&store, &digest)).unwrap();
        assert!(take(&store.inner, &digest, judged, at(1000)).unwrap().is_none());
        assert_eq!(fs::read(blob_path(&store, &digest)).unwrap(), b"right");
        fs::remove_file(blob_path(&store, &digest)).unwrap();
        assert!(take(&store.inner, &digest, judged, at(1000)).unwrap().is_none());
    }

    #[test]
    fn a_collection_removes_what_has_lain_for_thirty_days_and_nothing_else() {
        let (_dir, store) = store();
        let digest = digest_of(b"right");
        let day = Duration::from_secs(24 * 60 * 60);
        for days in [0, 29, 31] {
            fs::write(blob_path(&store, &digest), "wrong").unwrap();
            take(&store.inner, &digest, id(&store, &digest), at(0) + day * days).unwrap();
        }
        let folder = store.root().join("quarantine");
        fs::write(folder.join("an admin's note"), "x").unwrap();
        let now = at(0) + day * 30;
        for dry_run in [true, false] {
            let report = store
                .collect(&Policy::built_in(), &Trees(Vec::new()), dry_run, now)
                .unwrap();
            let [decision] = &report.decisions[..] else {
                panic!("{report:?}")
            };
            assert_eq!(
                (decision.kind, decision.reason),
                (Kind::Quarantined, Reason::QuarantineAge)
            );
            assert_eq!((decision.count, decision.bytes), (1, 5));
            assert_eq!(decision.samples, [format!("{}-0", digest.hex())]);
            assert_eq!((report.freed_bytes, report.deleted_blobs), (5, 0));
            assert_eq!(fs::read_dir(&folder).unwrap().count(), if dry_run { 4 } else { 3 });
        }
    }
}
