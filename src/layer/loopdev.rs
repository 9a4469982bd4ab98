//! Loop devices and the resizing of ext4: the ioctls that no safe binding exists for. The only `unsafe` code of this
//! module's parent.
//!
//! A device is configured with `LO_FLAGS_AUTOCLEAR`: it detaches itself when its last user closes it, so that a
//! process that is killed between attaching and mounting leaves nothing behind.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;

// linux/loop.h and linux/ext4.h of the kernel's user API.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// `_IOW('f', 16, __u64)`
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
const LOOP_MAJOR: u32 = 7;

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Default for LoopInfo64 {
    fn default() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A loop device that is attached as long as this value or a mount keeps it open.
#[derive(Debug)]
pub struct LoopDevice {
    pub path: PathBuf,
    // Held for its effect: the device detaches when the last opener is gone.
    _device: File,
}

/// The loop device that `image` is attached to already, if there is one. A second device over one image would let its
/// file system be mounted twice, each mount unaware of the other.
pub fn find(image: &File) -> io::Result<Option<LoopDevice>> {
    let stat = rustix::fs::fstat(image)?;
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name();
        let index = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        let (Some(index), true) = (index, entry.path().join("loop/backing_file").exists()) else {
            continue;
        };
        let path = Path::new("/dev").join(&name);
        // Open, it does not detach while we look at it and mount it. Most are somebody else's, perhaps read-only.
        let device = match open_device(OpenOptions::new().read(true), &path, index) {
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => continue,
            other => other?,
        };
        let mut info = LoopInfo64::default();
        // SAFETY: the ioctl writes a `struct loop_info64` through the pointer; `LoopInfo64` has its layout and lives
        // for the whole call.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
        if result < 0 {
            let error = io::Error::last_os_error();
            // Detached meanwhile.
            if error.raw_os_error() == Some(libc::ENXIO) {
                continue;
            }
            return Err(error);
        }
        if (info.device, info.inode) == (stat.st_dev, stat.st_ino) {
            return Ok(Some(LoopDevice { path, _device: device }));
        }
    }
    Ok(None)
}

/// Attaches `image` (open for reading and writing) to a free loop device; `name` is what `losetup` shows.
///
/// `sector`: bytes of the device's own blocks, of which those of the file system in the image must be multiples. 0: as large
/// as the sectors of the disk below, which direct I/O wants.
///
/// Direct I/O is asked for, so that a page is not cached twice, and done without where the file system below cannot.
pub fn attach(image: &File, name: &Path, sector: u32) -> io::Result<LoopDevice> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // Another process may take the free device first; each round asks for another one.
    let mut last = io::Error::from(Errno::BUSY);
    for _ in 0..64 {
        let index = ioctl(&control, LOOP_CTL_GET_FREE, 0)?;
        let path = PathBuf::from(format!("/dev/loop{index}"));
        let device = open_device(OpenOptions::new().read(true).write(true), &path, index as u32)?;
        match configure(&device, image, name, sector, LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO) {
            Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                match configure(&device, image, name, sector, LO_FLAGS_AUTOCLEAR) {
                    Ok(()) => return Ok(LoopDevice { path, _device: device }),
                    Err(e) => last = e,
                }
            }
            Ok(()) => return Ok(LoopDevice { path, _device: device }),
            Err(e) => last = e,
        }
        if last.raw_os_error() != Some(Errno::BUSY.raw_os_error()) {
            break;
        }
    }
    Err(last)
}

/// Tells a loop device that the file behind it has another size now.
pub fn set_capacity(device: &File) -> io::Result<()> {
    ioctl(device, LOOP_SET_CAPACITY, 0).map(drop)
}

/// Grows the mounted ext4 that `folder` (open for reading) lies in to `blocks` blocks of its own block size.
pub fn resize_ext4(folder: &File, blocks: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads one u64 through the pointer, which is valid for the whole call.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// In a container `/dev` may lack nodes of devices that were made after it started.
fn open_device(options: &OpenOptions, path: &Path, index: u32) -> io::Result<File> {
    let open = || options.open(path);
    match open() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let mode = Mode::from_raw_mode(0o600);
            match mknodat(
                CWD,
                path,
                FileType::BlockDevice,
                mode,
                rustix::fs::makedev(LOOP_MAJOR, index),
            ) {
                Ok(()) | Err(Errno::EXIST) => open(),
                Err(e) => Err(e.into()),
            }
        }
        other => other,
    }
}

fn configure(device: &File, image: &File, name: &Path, sector: u32, flags: u32) -> io::Result<()> {
    let mut file_name = [0; 64];
    let bytes = name.as_os_str().as_bytes();
    // The end of a path says more than its start; the last byte stays NUL.
    let tail = &bytes[bytes.len().saturating_sub(file_name.len() - 1)..];
    file_name[..tail.len()].copy_from_slice(tail);
    let config = LoopConfig {
        fd: image.as_raw_fd() as u32,
        block_size: sector,
        info: LoopInfo64 {
            flags,
            file_name,
            ..LoopInfo64::default()
        },
        reserved: [0; 8],
    };
    // SAFETY: the ioctl reads a `struct loop_config` through the pointer; `LoopConfig` has its layout and lives for the
    // whole call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn ioctl(file: &File, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests of this module that go through here take a plain number and touch no memory of ours.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_sizes_of_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
