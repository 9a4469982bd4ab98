//! Reading one entry that is not a folder, so that its metadata and its content belong together.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, FileType, OFlags, Stat, fstat, readlinkat, statat};
use rustix::io::Errno;

use super::error::FailureKind;
use crate::layer::descent::open_beneath;
use crate::layer::xattrs::{Buffers, Xattrs, meta};
use crate::store::tree::{Leaf, LeafKind};
use crate::store::{self, Build};

/// How often an entry that changes while it is read is read again, and the first pause before that.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(5);

/// Why an entry could not be read.
#[derive(Debug)]
pub(super) enum Trouble {
    Errno(Errno),
    /// It changed while it was read.
    Changed,
    /// It is no longer what the walk saw: its folder must be read again.
    Replaced,
    /// It has more bytes now than are read in this turn.
    Large,
    /// Something else is mounted over it.
    MountPoint,
    /// It means something that cannot be made out.
    Kind(FailureKind),
    Cancelled,
    /// Nothing of the tree can be stored.
    Store(store::Error),
}

impl From<FailureKind> for Trouble {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::Changed => Trouble::Changed,
            kind => Trouble::Kind(kind),
        }
    }
}

impl From<Errno> for Trouble {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE => Trouble::Replaced,
            Errno::NODATA => Trouble::Changed,
            Errno::XDEV => Trouble::MountPoint,
            errno => Trouble::Errno(errno),
        }
    }
}

/// Says what an entry with this status and these attributes is, if not what lies there; takes from the attributes what
/// does not belong to the tree.
pub(super) type Other<'a> = dyn Fn(&Stat, &mut Xattrs) -> Result<Option<LeafKind>, FailureKind> + 'a;

/// How entries are read.
pub(super) struct Way<'a> {
    pub build: &'a Build,
    /// Nothing is begun after this is set.
    pub cancel: &'a AtomicBool,
    /// A file that was changed a shorter time ago is left alone once until then. A write moves the file's times first
    /// and then its bytes, so that one that is under way is not to be seen from the times.
    pub settle: Duration,
    /// Bytes of the largest file that is read in this turn.
    pub in_turn: i64,
    /// Bytes of all sparse files that are read: their zeros cost nobody a disk, and would be read for hours.
    pub most: u64,
    /// Bytes of those that were.
    pub sparse: &'a AtomicU64,
}

/// Reads the entry that had the status `seen` when the walk came by, and stores its content unless it has an `other`.
/// Tells also the status that it had before and after being read.
pub(super) fn read(
    folder: &OwnedFd,
    name: &CStr,
    seen: &Stat,
    other: &Other<'_>,
    way: &Way<'_>,
    buffers: &mut Buffers,
) -> Result<(Leaf, Stat), Trouble> {
    let look = || {
        let now = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        // Another inode under the name is as good, unless the walk took the names of this one together.
        let linked = seen.st_nlink > 1 || now.st_nlink > 1;
        let replaced = (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino);
        match file_type(&now) != file_type(seen) || (linked && replaced) {
            true => Err(Trouble::Replaced),
            false => Ok(now),
        }
    };
    let mut before = *seen;
    if file_type(seen) == FileType::RegularFile && let_settle(seen, way.settle) {
        before = look()?;
    }
    let mut tried = 1;
    loop {
        if way.cancel.load(Ordering::Relaxed) {
            return Err(Trouble::Cancelled);
        }
        if file_type(&before) == FileType::RegularFile && before.st_size > way.in_turn {
            return Err(Trouble::Large);
        }
        match read_once(folder, name, &before, other, way, buffers) {
            Err(Trouble::Changed) if tried < TRIES => {
                thread::sleep(PAUSE * (1 << tried));
                tried += 1;
                before = look()?;
            }
            read => return Ok((read?, before)),
        }
    }
}

/// Waits until its last change is that long ago. `false` if there was nothing to wait for.
pub(super) fn let_settle(stat: &Stat, settle: Duration) -> bool {
    let rest = settle.checked_sub(age(stat, SystemTime::now()));
    if let Some(rest) = rest {
        thread::sleep(rest);
    }
    rest.is_some()
}

/// How long ago it was changed. What was changed in the future, by the clock, was long ago.
fn age(stat: &Stat, now: SystemTime) -> Duration {
    let since = Duration::new(stat.st_ctime.max(0) as u64, stat.st_ctime_nsec as u32);
    now.duration_since(SystemTime::UNIX_EPOCH + since)
        .unwrap_or(Duration::MAX)
}

fn read_once(
    folder: &OwnedFd,
    name: &CStr,
    before: &Stat,
    other: &Other<'_>,
    way: &Way<'_>,
    buffers: &mut Buffers,
) -> Result<Leaf, Trouble> {
    if file_type(before) == FileType::RegularFile {
        return read_file(folder, name, before, other, way, buffers);
    }
    // A place, which opens no device and no FIFO. All that follows is about this one inode, and it is no mount's: the
    // status alone would be that of what is mounted there.
    let place = open_beneath(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)?;
    let kind = match file_type(before) {
        FileType::Symlink => LeafKind::Symlink(readlinkat(&place, c"", Vec::new())?.into_bytes().into()),
        FileType::CharacterDevice => {
            let (major, minor) = device(before);
            LeafKind::CharDevice { major, minor }
        }
        FileType::BlockDevice => {
            let (major, minor) = device(before);
            LeafKind::BlockDevice { major, minor }
        }
        FileType::Fifo => LeafKind::Fifo,
        FileType::Socket => LeafKind::Socket,
        // A type that did not exist when this was written.
        _ => return Err(Trouble::Errno(Errno::NOTSUP)),
    };
    let mut xattrs = buffers.at(&place)?;
    let kind = other(before, &mut xattrs)?.unwrap_or(kind);
    if !same(before, &fstat(&place)?) {
        return Err(Trouble::Changed);
    }
    Ok(Leaf {
        meta: meta(before, xattrs),
        kind,
    })
}

fn read_file(
    folder: &OwnedFd,
    name: &CStr,
    before: &Stat,
    other: &Other<'_>,
    way: &Way<'_>,
    buffers: &mut Buffers,
) -> Result<Leaf, Trouble> {
    // The type was looked at before, and should it have changed since, `O_NONBLOCK` keeps a FIFO from blocking.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(open_beneath(folder, name, flags)?);
    if !same(before, &fstat(&file)?) {
        return Err(Trouble::Changed);
    }
    let mut xattrs = buffers.of(&file)?;
    let kind = match other(before, &mut xattrs)? {
        Some(kind) => kind,
        None => put(&file, before, way)?,
    };
    if !same(before, &fstat(&file)?) {
        return Err(Trouble::Changed);
    }
    Ok(Leaf {
        meta: meta(before, xattrs),
        kind,
    })
}

fn put(file: &File, before: &Stat, way: &Way<'_>) -> Result<LeafKind, Trouble> {
    // What has its bytes fills the disk soon enough, and that is told then.
    if store::is_sparse(before) {
        let size = u64::try_from(before.st_size).unwrap_or(0);
        let size = way.sparse.fetch_add(size, Ordering::Relaxed).saturating_add(size);
        if size > way.most {
            return Err(Trouble::Kind(FailureKind::TooLarge { size, disk: way.most }));
        }
    }
    let blob = way
        .build
        .put_file_until(file, way.cancel)
        .map_err(|error| match error {
            store::Error::Cancelled => Trouble::Cancelled,
            store::Error::Source(e) => match Errno::from_io_error(&e) {
                Some(errno) => Trouble::from(errno),
                None => Trouble::Errno(Errno::IO),
            },
            other => Trouble::Store(other),
        })?;
    if i64::try_from(blob.size) != Ok(before.st_size) {
        return Err(Trouble::Changed);
    }
    Ok(LeafKind::File {
        digest: blob.digest,
        size: blob.size,
    })
}

/// Equal in everything but the time of the last access.
pub(super) fn same(a: &Stat, b: &Stat) -> bool {
    let key = |s: &Stat| {
        (
            (
                s.st_dev, s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_rdev, s.st_size,
            ),
            (s.st_mtime, s.st_mtime_nsec, s.st_ctime, s.st_ctime_nsec),
        )
    };
    key(a) == key(b)
}

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Major and minor number of a device.
pub(super) fn device(stat: &Stat) -> (u32, u32) {
    (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev))
}
