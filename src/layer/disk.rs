//! A layer's own file system of a limited size: an ext4 in a sparse file, over a loop device. The kernel keeps the
//! limit, and nobody else's disk is touched when it is reached.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::error::IoContext;
use super::mount::{self, open_folder};
use super::used::Room;
use super::{Error, PAUSE, TRIES, loopdev};

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
    let mut mkfs = Command::new("mkfs.ext4");
    // By itself, mkfs goes by the node's mke2fs.conf. Inodes of 128 bytes would keep no nanoseconds.
    mkfs.args(["-q", "-F", "-m", "0", "-b", block, "-i", "8192", "-I", "256"])
        .args(["-O", "ea_inode", "-J"])
        .arg(format!("size={journal}"))
        // Nothing is zeroed or discarded: the file is new, and holes read as zeros.
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(image)
        .stdin(Stdio::null());
    let output = run(&mut mkfs)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Error::Command {
        command: format!("mkfs.ext4 {}", image.display()),
        message: format!("{}: {}", output.status, text.trim()),
    })
}

pub(super) fn open(image: &Path) -> Result<File, Error> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(image)
        .context("open", image)
}

pub(super) fn device_of(image: &Path, file: &File) -> Result<Option<loopdev::LoopDevice>, Error> {
    loopdev::find(file).context("look for a loop device of", image)
}

/// Whether the image has a loop device, as while its file system is mounted, wherever that is. For a moment it has one
/// also afterwards: whoever looks for a device of their own opens each ([`loopdev::find`]), and the last one detaches it.
pub(super) fn is_attached(image: &Path) -> Result<bool, Error> {
    let file = open(image)?;
    for _ in 0..TRIES {
        if device_of(image, &file)?.is_none() {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(true)
}

/// Runs a program of e2fsprogs.
pub(super) fn run(command: &mut Command) -> Result<Output, Error> {
    let output = command.env("LC_ALL", "C").output();
    output.map_err(|error| Error::Command {
        command: command.get_program().to_string_lossy().into_owned(),
        message: match error.kind() {
            io::ErrorKind::NotFound => "not found; a layer with a limit needs e2fsprogs on the node".to_owned(),
            _ => error.to_string(),
        },
    })
}

/// Mounts the image's file system.
pub(super) fn mount(image: &Path, target: &Path) -> Result<(), Error> {
    let file = open(image)?;
    // Another mount namespace may still have the file system mounted; over the same device, this is one more mount of it.
    let device = match device_of(image, &file)? {
        Some(device) => device,
        None => {
            let sector = sector(&file).context("read", image)?;
            loopdev::attach(&file, image, sector).context("attach a loop device to", image)?
        }
    };
    // The device stays attached until the file system has its own hold on it.
    mount::ext4(&device.path, target)?.attach(target)
}

/// Bytes of a sector of the device below the ext4 in the image, by `s_log_block_size` of its superblock: there are disks whose
/// sectors are of 4096 bytes, and of such there are no blocks of 1024.
fn sector(image: &File) -> io::Result<u32> {
    let mut log = [0; 4];
    image.read_exact_at(&mut log, 1024 + 24)?;
    Ok(if u32::from_le_bytes(log) < 2 { 512 } else { 0 })
}

/// Grows the mounted file system to `size` bytes. Repeating it after an interruption finishes it.
///
/// `device` is the source that mountinfo shows for the mount.
pub(super) fn grow(image: &Path, target: &Path, device: &[u8], size: u64) -> Result<(), Error> {
    let file = open(image)?;
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

/// How full the file system is that is mounted at `target`.
pub(super) fn room(target: &Path) -> Result<Room, Error> {
    let stat = rustix::fs::fstatvfs(open_folder(target)?.as_fd()).context("statvfs", target)?;
    Ok(Room {
        used: stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize),
        // A limit is more than there is for files: ext4 keeps some for its journal, its inodes and for itself.
        bytes_full: percent_gone(stat.f_blocks, stat.f_bavail),
        inodes_full: percent_gone(stat.f_files, stat.f_ffree),
        ..Room::default()
    })
}

/// 0 if there is no limit.
fn percent_gone(all: u64, left: u64) -> u8 {
    let gone = u128::from(all.saturating_sub(left)) * 100;
    u8::try_from(gone.checked_div(u128::from(all)).unwrap_or(0)).unwrap_or(100)
}
