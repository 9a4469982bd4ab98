//! A layer's own file system of a limited size: an ext4 in a sparse file, over a loop device. The kernel keeps the
//! limit, and nobody else's disk is touched when it is reached.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::error::IoContext;
use super::mount::{self, open_folder};
use super::{Error, loopdev};

const MIB: u64 = 1 << 20;
/// The smallest image that mkfs makes something usable of.
pub(super) const LEAST: u64 = 4 * MIB;

/// Makes the image anew, `size` bytes, of which next to none are allocated. Not durable before a sync.
pub(super) fn make(image: &Path, size: u64) -> Result<(), Error> {
    match fs::remove_file(image) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", image, e)),
        _ => {}
    }
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(image)
        .and_then(|file| file.set_len(size))
        .context("create", image)?;
    // A 4 KiB block needs a journal of at least 4 MiB, a 1 KiB block 1 MiB.
    let (block, least_journal) = if size < 64 * MIB { ("1024", 1) } else { ("4096", 4) };
    let journal = (size / MIB / 64).clamp(least_journal, 64);
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-b", block, "-i", "8192", "-O", "ea_inode", "-J"])
        .arg(format!("size={journal}"))
        // Nothing is zeroed or discarded: the file is new, and holes read as zeros.
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(image)
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output();
    let failed = |message: String| Error::Command {
        command: format!("mkfs.ext4 {}", image.display()),
        message,
    };
    let output = output.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => failed("not found; a layer with a limit needs e2fsprogs on the node".to_owned()),
        _ => failed(e.to_string()),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("{}: {}", output.status, text.trim())))
}

/// Mounts the image's file system.
pub(super) fn mount(image: &Path, target: &Path) -> Result<(), Error> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(image)
        .context("open", image)?;
    // Another mount namespace may still have the file system mounted; over the same device, this is one more mount of it.
    let found = loopdev::find(&file).context("look for a loop device of", image)?;
    let device = match found {
        Some(device) => device,
        None => loopdev::attach(&file, image).context("attach a loop device to", image)?,
    };
    // The device stays attached until the file system has its own hold on it.
    mount::ext4(&device.path, target)?.attach(target)
}

/// Grows the mounted file system to `size` bytes. Repeating it after an interruption finishes it.
///
/// `device` is the source that mountinfo shows for the mount.
pub(super) fn grow(image: &Path, target: &Path, device: &[u8], size: u64) -> Result<(), Error> {
    let file = File::options()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(image)
        .context("open", image)?;
    if file.metadata().context("stat", image)?.len() < size {
        // Durable before the file system inside counts on it.
        file.set_len(size)
            .and_then(|()| file.sync_all())
            .context("grow", image)?;
    }
    loopdev::set_capacity(&mount::open_device(device)?).context("grow the loop device of", image)?;
    let folder = File::open(target).context("open", target)?;
    let block = rustix::fs::fstatvfs(&folder).context("statvfs", target)?.f_bsize;
    match loopdev::resize_ext4(&folder, size / block.max(1)) {
        Err(errno) if errno.raw_os_error() == Some(libc::EPERM) => Err(Error::Command {
            command: format!("growing the file system at {}", target.display()),
            message: "the kernel allows it only with CAP_SYS_RESOURCE, which the agent does not have here".to_owned(),
        }),
        result => result.context("grow the file system at", target),
    }
}

/// Bytes in use on the file system that is mounted at `target`.
pub(super) fn used(target: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::fstatvfs(open_folder(target)?.as_fd()).context("statvfs", target)?;
    Ok(stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize))
}
