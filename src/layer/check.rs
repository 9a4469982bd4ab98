//! Whether a layer's own file system is sound: seen from outside while it is mounted, checked and mended while it is not.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock, major, minor};
use rustix::io::Errno;

use super::error::IoContext;
use super::mountinfo::Mount;
use super::{Error, LayerId, disk, inuse};

const FSCK: &str = "e2fsck";

/// Has a mounted file system stopped taking writes for good? ext4 does after an error that it cannot go on from, as of
/// the disk below. Not every kernel says so in mountinfo, but all of them count the errors (ext4(5), and
/// `Documentation/ABI/testing/sysfs-fs-ext4`), and a check begins to count anew.
pub(super) fn has_stopped(mount: &Mount) -> bool {
    mount.has_stopped() || (mount.fs_type == "ext4" && has_counted_errors(mount).unwrap_or(false))
}

fn has_counted_errors(mount: &Mount) -> Option<bool> {
    let device = std::str::from_utf8(mount.source.strip_prefix(b"/dev/")?).ok()?;
    let count = fs::read_to_string(format!("/sys/fs/ext4/{device}/errors_count")).ok()?;
    Some(count.trim() != "0")
}

/// Fails if [`check`] could not even begin.
pub(super) fn can_begin(image: &Path) -> Result<(), Error> {
    disk::open(image)?;
    // Prints its version.
    disk::run(Command::new(FSCK).arg("-V").stdin(Stdio::null())).map(drop)
}

/// Checks the image's file system if it was not unmounted cleanly or had an error, and mends what can be mended without
/// asking. Returns what `e2fsck` said if there was more to do than a journal's work, and the image, whose lock goes with it:
/// keep it until the file system is mounted. A file system that is mounted somewhere is left alone.
///
/// Fails with [`Error::InUse`] while somebody else is at work on the image: it is locked (flock(2)) by whoever checks it,
/// also by a check that outlived the process that began it.
pub(super) fn check(id: &LayerId, image: &Path) -> Result<(Option<String>, File), Error> {
    let in_use = |by: String| Error::InUse { id: id.clone(), by };
    let file = disk::open(image)?;
    if let Some(device) = disk::device_of(image, &file)? {
        let dev = fs::metadata(&device.path).context("stat", &device.path)?.rdev();
        let dev = (major(dev), minor(dev));
        let mounts = inuse::mounts(Some(dev), Path::new(""), |_| false).context("look for mounts of", image)?;
        if !mounts.is_empty() {
            return Ok((None, file));
        }
        let path = device.path.clone();
        drop(device);
        if disk::is_attached(image)? {
            return Err(in_use(format!(
                "{}, which is over disk.img and not mounted: detach it",
                path.display()
            )));
        }
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Err(in_use("a process that has locked disk.img".to_owned())),
        other => other.context("lock", image)?,
    }
    // The lock is the open file's: with that as its input, e2fsck has the lock too, for as long as it lives.
    let input = file.try_clone().context("open", image)?;
    let output = disk::run(Command::new(FSCK).arg("-p").arg(image).stdin(input))?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let text = lines.collect::<Vec<_>>().join("; ");
    // Its exit code, in e2fsck(8): 1 errors were corrected, 2 and the machine should be started again (for a file system
    // that is mounted), more are none of these.
    match output.status.code() {
        Some(0) => Ok((None, file)),
        Some(1..=3) => Ok((Some(text), file)),
        _ => Err(Error::Command {
            command: format!("{FSCK} -p {}", image.display()),
            message: format!("{}: {text}", output.status),
        }),
    }
}
