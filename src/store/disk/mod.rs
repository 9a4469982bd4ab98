//! The system calls that change the disk, and the reads of what the store holds: nothing else in `store/` makes them.
//!
//! Each takes the [`Step`] that it is made for. In the program that is a name and nothing more. In the unit tests'
//! program a hook stands before and after each call, by which the crash kit kills the process there, or has the call
//! fail or do less than it was asked.

#[cfg(test)]
pub mod hook;
mod step;

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{
    Advice, AtFlags, Dev, FileType, Gid, IFlags, Mode, OFlags, RenameFlags, Timestamps, Uid, XattrFlags, fadvise,
};
use rustix::io::Errno;
use rustix::path::Arg;

pub use step::Step;

/// Makes the call. A seam for the tests and nothing else.
#[cfg(not(test))]
fn at<T>(_: Step, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    call()
}

#[cfg(test)]
use hook::at;

/// How many of `length` bytes the call is asked for: all.
#[cfg(not(test))]
fn length(_: Step, length: usize) -> usize {
    length
}

#[cfg(test)]
use hook::length;

/// Opens a folder for reading; a symlink is none.
pub fn open_dir(dir: impl AsFd, name: impl Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// Opens a folder by a path that an admin gave, through symlinks.
pub fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Opens a file for reading: no symlink, and never waiting for the other end of a FIFO.
pub fn open_file(dir: impl AsFd, name: impl Arg) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::openat(dir, name, flags, Mode::empty()).map(File::from)
}

/// As [`open_file`], to be read past the page cache; `EINVAL` where the file system cannot do that.
pub fn open_direct(dir: impl AsFd, name: impl Arg) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::DIRECT;
    rustix::fs::openat(dir, name, flags, Mode::empty()).map(File::from)
}

/// Opens a file that is there for writing.
pub fn open_for_writing(dir: impl AsFd, name: impl Arg) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty()).map(File::from)
}

/// Opens a file, making it if it is not there. `flags` says for what, and whether it may be there (`EXCL`, `TRUNC`).
pub fn create(step: Step, dir: impl AsFd, name: impl Arg, flags: OFlags, mode: u32) -> Result<File, Errno> {
    let flags = flags | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    at(step, || {
        rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(mode)).map(File::from)
    })
}

pub fn pread(step: Step, file: impl AsFd, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let length = length(step, buffer.len());
    at(step, || rustix::io::pread(file, &mut buffer[..length], offset))
}

pub fn pwrite(step: Step, file: impl AsFd, bytes: &[u8], offset: u64) -> Result<usize, Errno> {
    let length = length(step, bytes.len());
    at(step, || rustix::io::pwrite(file, &bytes[..length], offset))
}

/// Copies within the kernel, moving both offsets on.
pub fn copy(
    step: Step,
    from: &File,
    from_at: &mut u64,
    to: &File,
    to_at: &mut u64,
    bytes: usize,
) -> Result<usize, Errno> {
    let length = length(step, bytes);
    at(step, || {
        rustix::fs::copy_file_range(from, Some(from_at), to, Some(to_at), length)
    })
}

/// Has `to` share all blocks of `from`. After an error `to` is empty, or has been left as it was.
pub fn reflink(step: Step, to: impl AsFd, from: impl AsFd) -> Result<(), Errno> {
    at(step, || rustix::fs::ioctl_ficlone(&to, &from))?;
    check_shared(to, from)
}

/// Kernels have said that all went well when a disk was full, or failed, in the midst of a file: XFS told how much it had
/// shared, and the call did not look.
pub fn check_shared(to: impl AsFd, from: impl AsFd) -> Result<(), Errno> {
    if rustix::fs::fstat(&to)?.st_size == rustix::fs::fstat(from)?.st_size {
        return Ok(());
    }
    // What is there must not show through where a copy leaves a hole.
    rustix::fs::ftruncate(to, 0)?;
    Err(Errno::IO)
}

pub fn truncate(step: Step, file: impl AsFd, length: u64) -> Result<(), Errno> {
    at(step, || rustix::fs::ftruncate(file, length))
}

/// Makes a folder and those above it, for root alone.
pub fn mkdir_all(step: Step, path: &Path) -> Result<(), Errno> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    // The builder makes system calls and nothing else, so the error has a number.
    at(step, || {
        builder
            .create(path)
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
    })
}

/// Makes a folder for root alone.
pub fn mkdir(step: Step, dir: impl AsFd, name: impl Arg) -> Result<(), Errno> {
    at(step, || rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)))
}

pub fn symlink(step: Step, target: &[u8], dir: impl AsFd, name: impl Arg) -> Result<(), Errno> {
    at(step, || rustix::fs::symlinkat(target, dir, name))
}

pub fn mknod(step: Step, dir: impl AsFd, name: impl Arg, kind: FileType, mode: Mode, device: Dev) -> Result<(), Errno> {
    at(step, || rustix::fs::mknodat(dir, name, kind, mode, device))
}

pub fn link(step: Step, from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg) -> Result<(), Errno> {
    at(step, || rustix::fs::linkat(from, old, to, new, AtFlags::empty()))
}

/// Renames; what has the new name is replaced.
pub fn rename(step: Step, from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg) -> Result<(), Errno> {
    at(step, || rustix::fs::renameat(from, old, to, new))
}

/// Renames, unless something has the new name.
pub fn rename_new(step: Step, from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg) -> Result<(), Errno> {
    at(step, || {
        rustix::fs::renameat_with(from, old, to, new, RenameFlags::NOREPLACE)
    })
}

pub fn unlink(step: Step, dir: impl AsFd, name: impl Arg) -> Result<(), Errno> {
    at(step, || rustix::fs::unlinkat(dir, name, AtFlags::empty()))
}

pub fn rmdir(step: Step, dir: impl AsFd, name: impl Arg) -> Result<(), Errno> {
    at(step, || rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR))
}

/// Sets the times of an entry, of a symlink itself.
pub fn set_times(step: Step, dir: impl AsFd, name: impl Arg, times: &Timestamps) -> Result<(), Errno> {
    at(step, || {
        rustix::fs::utimensat(dir, name, times, AtFlags::SYMLINK_NOFOLLOW)
    })
}

pub fn set_file_times(step: Step, file: impl AsFd, times: &Timestamps) -> Result<(), Errno> {
    at(step, || rustix::fs::futimens(file, times))
}

pub fn chown(step: Step, dir: impl AsFd, name: impl Arg, owner: (Option<Uid>, Option<Gid>)) -> Result<(), Errno> {
    at(step, || {
        rustix::fs::chownat(dir, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
    })
}

pub fn fchown(step: Step, file: impl AsFd, owner: (Option<Uid>, Option<Gid>)) -> Result<(), Errno> {
    at(step, || rustix::fs::fchown(file, owner.0, owner.1))
}

pub fn chmod(step: Step, dir: impl AsFd, name: impl Arg, mode: Mode) -> Result<(), Errno> {
    at(step, || rustix::fs::chmodat(dir, name, mode, AtFlags::empty()))
}

pub fn fchmod(step: Step, file: impl AsFd, mode: Mode) -> Result<(), Errno> {
    at(step, || rustix::fs::fchmod(file, mode))
}

/// Sets an attribute of what a path leads to, of a symlink itself.
pub fn set_xattr(step: Step, path: impl Arg, name: &[u8], value: &[u8]) -> Result<(), Errno> {
    at(step, || rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()))
}

pub fn set_file_xattr(step: Step, file: impl AsFd, name: &[u8], value: &[u8]) -> Result<(), Errno> {
    at(step, || rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()))
}

pub fn remove_xattr(step: Step, file: impl AsFd, name: &str) -> Result<(), Errno> {
    at(step, || rustix::fs::fremovexattr(file, name))
}

pub fn set_flags(step: Step, file: impl AsFd, flags: IFlags) -> Result<(), Errno> {
    at(step, || rustix::fs::ioctl_setflags(file, flags))
}

/// Makes all of the file system durable. What could not be written since the descriptor was opened is reported by it
/// once.
pub fn syncfs(step: Step, dir: impl AsFd) -> Result<(), Errno> {
    at(step, || rustix::fs::syncfs(dir))
}

/// Makes one file, or the names in one folder, durable.
pub fn fsync(step: Step, file: impl AsFd) -> Result<(), Errno> {
    at(step, || rustix::fs::fsync(file))
}

/// Reads a file from an offset of its own, whatever the descriptor's position.
pub struct Reader<'a> {
    pub step: Step,
    pub file: BorrowedFd<'a>,
    pub offset: u64,
}

impl<'a> Reader<'a> {
    pub fn new(step: Step, file: &'a impl AsFd) -> Self {
        Self {
            step,
            file: file.as_fd(),
            offset: 0,
        }
    }
}

impl io::Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = pread(self.step, self.file, buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// Writes a new file from its beginning.
pub struct Writer {
    step: Step,
    file: File,
    offset: u64,
    /// The disk was asked to begin with what is before this.
    begun: u64,
}

/// After so many bytes the disk begins to write, so that a later sync does not find everything still to be done.
const PART: u64 = 1 << 20;

impl Writer {
    pub fn new(step: Step, file: File) -> Self {
        Self {
            step,
            file,
            offset: 0,
            begun: 0,
        }
    }
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = pwrite(self.step, &self.file, bytes, self.offset)?;
        self.offset += written as u64;
        if self.offset - self.begun >= PART {
            // What is written is "not needed" in memory: Linux begins to write it, and keeps what is not written yet. It
            // is only a hint.
            let part = NonZeroU64::new(self.offset - self.begun);
            let _ = fadvise(&self.file, self.begun, part, Advice::DontNeed);
            self.begun = self.offset;
        }
        Ok(written)
    }

    /// Nothing is held back here; durable it is after a sync.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
