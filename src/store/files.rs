//! Small things about files that several parts of the store need.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Dir, FileType, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use super::disk::{self, Step};

/// Takes a lock whatever happened to its last holder: what our locks guard is never left half done by a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    #[cfg(test)]
    return super::turns::lock(mutex);
    #[cfg(not(test))]
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits a little for what another thread does.
pub(super) fn let_others(time: Duration) {
    #[cfg(test)]
    if super::turns::pass_on() {
        return;
    }
    std::thread::sleep(time);
}

/// Where a test may let another thread go on.
pub(super) fn point() {
    #[cfg(test)]
    super::turns::point();
}

/// Takes a lock when what it guards is as `is` wants it. Until then it looks again each millisecond: who changes it takes
/// the lock often, and would have it again before one that is woken.
pub(super) fn lock_when<T>(mutex: &Mutex<T>, is: impl Fn(&T) -> bool) -> MutexGuard<'_, T> {
    loop {
        let guard = lock(mutex);
        if is(&guard) {
            return guard;
        }
        drop(guard);
        let_others(Duration::from_millis(1));
    }
}

pub(super) fn open_dir(at: impl AsFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    point();
    disk::open_dir(at, name)
}

/// Makes a folder that only root enters; one that is there already is good.
pub(super) fn ensure_dir(step: Step, at: impl AsFd, name: &str) -> Result<(), Errno> {
    match disk::mkdir(step, at, name) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Names in a folder without `.` and `..`, and their type where the file system tells it.
pub(super) fn names(dir: impl AsFd) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

/// The bytes of a small file that may hold anything by now.
///
/// # Errors
/// Those of opening and reading it, a symlink in its place, and more than `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = disk::open_file(rustix::fs::CWD, path)?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(io::Error::other(format!("it is larger than {limit} bytes"))),
        false => Ok(bytes),
    }
}

pub(super) fn stat(at: impl AsFd, name: impl rustix::path::Arg) -> Result<Option<Stat>, Errno> {
    point();
    match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn is_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

pub(super) fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// The time of the last change of a file's content. One that does not fit counts as 1970, so as old.
pub(super) fn mtime(stat: &Stat) -> SystemTime {
    let nanos = u64::from(stat.st_mtime_nsec as u32 % 1_000_000_000);
    let seconds = Duration::from_secs(stat.st_mtime.unsigned_abs());
    let whole = match stat.st_mtime >= 0 {
        true => UNIX_EPOCH.checked_add(seconds),
        false => UNIX_EPOCH.checked_sub(seconds),
    };
    whole
        .and_then(|time| time.checked_add(Duration::from_nanos(nanos)))
        .unwrap_or(UNIX_EPOCH)
}

/// How long after a change of a file a further one is sure to leave it with another ctime: some file systems keep whole
/// seconds, and the clocks of a network file system's two ends differ a little.
const SETTLED: Duration = Duration::from_secs(2);

/// Whether a file with this status was last changed so long before `now` that any change since then shows in its ctime,
/// which no program can set.
pub fn is_settled(stat: &Stat, now: SystemTime) -> bool {
    let Some(latest) = now.checked_sub(SETTLED) else {
        return false;
    };
    let Ok(latest) = latest.duration_since(UNIX_EPOCH) else {
        return false;
    };
    (stat.st_ctime, stat.st_ctime_nsec) <= (latest.as_secs() as i64, latest.subsec_nanos().into())
}

/// Whether a file with this status has fewer blocks than bytes: it has holes, or is compressed.
pub fn is_sparse(stat: &Stat) -> bool {
    (stat.st_blocks.max(0) as u64).saturating_mul(512) < stat.st_size.max(0) as u64
}

/// Removes a name that is not a folder; one that is gone already is good.
pub(super) fn remove_file(step: Step, at: impl AsFd, name: impl rustix::path::Arg) -> Result<(), Errno> {
    match unlink(step, at, name) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// As [`remove_file`], but a file that is not there is an error.
pub(super) fn unlink(step: Step, at: impl AsFd, name: impl rustix::path::Arg) -> Result<(), Errno> {
    point();
    disk::unlink(step, at, name)
}

/// Sets a file's mtime to now: "last used".
pub(super) fn touch(step: Step, at: impl AsFd, name: impl rustix::path::Arg) -> Result<(), Errno> {
    point();
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        },
    };
    disk::set_times(step, at, name, &times)
}

/// Bytes that an ordinary user could still write to the file system.
pub(super) fn available(fd: impl AsFd) -> Result<u64, Errno> {
    Ok(left(fd)?.0)
}

/// Bytes of the whole file system, without those that it reserves for root.
pub(super) fn total(fd: impl AsFd) -> Result<u64, Errno> {
    let stat = rustix::fs::fstatvfs(fd)?;
    let reserved = stat.f_bfree.saturating_sub(stat.f_bavail);
    Ok(stat.f_blocks.saturating_sub(reserved).saturating_mul(stat.f_frsize))
}

/// Bytes as in [`available`], and inodes. A file system that has no number of these says so by having none in all, and
/// is taken for one that has many left.
pub(super) fn left(fd: impl AsFd) -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::fstatvfs(fd)?;
    let inodes = match stat.f_files {
        0 => u64::MAX,
        _ => stat.f_favail,
    };
    Ok((stat.f_bavail.saturating_mul(stat.f_frsize), inodes))
}

/// Writes all of `bytes` at `offset`, leaving out every whole block of `hole` bytes that is zero (they stay holes of
/// a new file). With `hole` 0 everything is written. The file's length is the caller's business.
pub(super) fn write_at(step: Step, file: BorrowedFd<'_>, bytes: &[u8], offset: u64, hole: usize) -> io::Result<()> {
    if hole == 0 {
        return write_run(step, file, bytes, offset);
    }
    let mut start = 0;
    let mut at = 0;
    while at < bytes.len() {
        let block = &bytes[at..bytes.len().min(at + hole)];
        if block.len() == hole && is_zero(block) {
            write_run(step, file, &bytes[start..at], offset + start as u64)?;
            start = at + hole;
        }
        at += block.len();
    }
    write_run(
        step,
        file,
        bytes.get(start..).unwrap_or_default(),
        offset + start as u64,
    )
}

fn write_run(step: Step, file: BorrowedFd<'_>, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match disk::pwrite(step, file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_zero(block: &[u8]) -> bool {
    // Looking at the first bytes alone settles nearly every block.
    block.iter().take(16).all(|byte| *byte == 0) && block.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_is_read_up_to_its_bound_and_nothing_else_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "12345").unwrap();
        assert_eq!(read_bounded(&at("file"), 5).unwrap(), b"12345");
        let error = read_bounded(&at("file"), 4).unwrap_err();
        assert_eq!(error.to_string(), "it is larger than 4 bytes");
        // As large as any: nothing near its length is set aside.
        std::fs::File::create(at("huge")).unwrap().set_len(1 << 40).unwrap();
        assert!(read_bounded(&at("huge"), 1000).is_err());
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        assert!(read_bounded(&at("link"), 5).is_err());
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert_eq!(read_bounded(&at("fifo"), 5).unwrap(), b"");
        let missing = read_bounded(&at("missing"), 5).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
