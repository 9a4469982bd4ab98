//! Mounts through the kernel's new mount API (fsopen(2), fsconfig(2), fsmount(2), move_mount(2)).
//!
//! Never `mount(2)` with an option string: it is cut at 4095 bytes, and `,`, `:` and `\` in a path change its meaning.
//! Layers are handed over as descriptors, or as `/proc/self/fd/N` to kernels before 6.13, which refuse that. When a call
//! fails, the kernel's own text is read from the file system context and goes into the error.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree, unmount,
};

use super::Error;

/// fsconfig(2) takes strings up to this length, with the zero at their end.
const LONGEST: usize = 256;

/// A file system that is mounted nowhere yet; dropping it unmounts it.
#[derive(Debug)]
pub struct Detached {
    mount: OwnedFd,
    what: &'static str,
}

impl Detached {
    /// Its root folder.
    pub fn folder(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Makes it visible at `target`, an existing folder.
    pub fn attach(self, target: &Path) -> Result<(), Error> {
        move_mount(
            self.mount.as_fd(),
            c"",
            CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(|errno| failed(self.what, target, errno, None))
    }
}

/// What a mount forbids. `nodev` is not a choice: nothing that larder mounts gives access to a device.
#[derive(Debug, Clone, Copy)]
pub struct Flags {
    pub allow_suid: bool,
}

impl Flags {
    fn attributes(self) -> MountAttrFlags {
        let suid = if self.allow_suid {
            MountAttrFlags::empty()
        } else {
            MountAttrFlags::MOUNT_ATTR_NOSUID
        };
        MountAttrFlags::MOUNT_ATTR_NODEV | suid
    }
}

/// How overlayfs is told which folders it merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// By descriptors: Linux 6.13 and later.
    ByDescriptor,
    /// By `/proc/self/fd/N`.
    ByPath,
    /// By descriptors, and where that fails by path.
    Either,
}

/// The folders of an overlay.
#[derive(Debug, Clone, Copy)]
pub struct Overlay<'a> {
    /// What mountinfo shows as the source: it says which tree the mount holds.
    pub source: &'a str,
    /// The topmost first.
    pub lower: &'a [BorrowedFd<'a>],
    /// The folder that files whose data is elsewhere name by `trusted.overlay.redirect`.
    pub data: Option<BorrowedFd<'a>>,
    /// Without it, nothing can be written.
    pub changes: Option<Changes<'a>>,
}

/// The folders that a writable overlay writes to.
#[derive(Debug, Clone, Copy)]
pub struct Changes<'a> {
    pub upper: BorrowedFd<'a>,
    pub work: BorrowedFd<'a>,
}

/// Makes an overlay; `target` is where it will go, for messages.
///
/// `metacopy` and `redirect_dir`, so that a change of a file's mode or a folder's name copies no data; what they leave
/// in `upper` means something only over the tree below. `index=off`, because an index gave wrong snapshots (one mount
/// per upper is the caller's lock).
pub fn overlay(layers: &Overlay<'_>, told: Told, flags: Flags, target: &Path) -> Result<Detached, Error> {
    const OPTIONS: [(&str, &str); 4] = [
        ("redirect_dir", "on"),
        ("metacopy", "on"),
        ("index", "off"),
        ("xino", "auto"),
    ];
    let folders = || {
        let lower = layers.lower.iter().map(|lower| ("lowerdir+", *lower));
        let data = layers.data.map(|data| ("datadir+", data));
        let changes = layers.changes.iter();
        let changes = changes.flat_map(|changes| [("upperdir", changes.upper), ("workdir", changes.work)]);
        lower.chain(data).chain(changes)
    };
    let configure = |context: BorrowedFd<'_>, by_path: bool| -> rustix::io::Result<()> {
        fsconfig_set_string(context, "source", layers.source)?;
        for (key, value) in OPTIONS {
            fsconfig_set_string(context, key, value)?;
        }
        for (key, fd) in folders() {
            if by_path {
                fsconfig_set_string(context, key, path_of(key, fd))?;
            } else {
                fsconfig_set_fd(context, key, fd)?;
            }
        }
        Ok(())
    };
    let mut attributes = flags.attributes();
    if layers.changes.is_none() {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let made = |by_path| create("overlay", attributes, target, |context| configure(context, by_path));
    match told {
        Told::ByDescriptor => made(false),
        Told::ByPath => made(true),
        // What a kernel says that knows no layers by descriptor (EINVAL, EBADF) it may also say for other reasons; the
        // second try then gives the same error again.
        Told::Either => made(false).or_else(|_| made(true)),
    }
}

/// How a folder is told by path. Where its own can be, it is: mountinfo then says what the mount stands on and writes to.
fn path_of(key: &str, fd: BorrowedFd<'_>) -> Vec<u8> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let own = rustix::fs::readlink(&link, Vec::new()).map(std::ffi::CString::into_bytes);
    let can_be = |path: &Vec<u8>| match key {
        "lowerdir+" | "datadir+" => true,
        // In these, overlayfs takes a backslash for the mark of an escape, and mountinfo escapes more than that.
        _ => path
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(byte)),
    };
    own.ok()
        .filter(|path| path.len() < LONGEST && path.starts_with(b"/") && can_be(path))
        .unwrap_or_else(|| link.into_bytes())
}

/// Mounts an image of a tree, without a block device.
///
/// Fails with `ENOTBLK` on Linux before 6.12; there [`erofs_on`] a loop device works.
pub fn erofs(image: BorrowedFd<'_>, target: &Path) -> Result<Detached, Error> {
    erofs_on(Path::new(&format!("/proc/self/fd/{}", image.as_raw_fd())), target)
}

/// Mounts the image on a block device.
pub fn erofs_on(device: &Path, target: &Path) -> Result<Detached, Error> {
    let attributes = Flags { allow_suid: false }.attributes() | MountAttrFlags::MOUNT_ATTR_RDONLY;
    create("erofs", attributes, target, |context| {
        fsconfig_set_flag(context, "ro")?;
        fsconfig_set_string(context, "source", device)
    })
}

/// Another mount of what is mounted at `path`, with the same flags.
pub fn again(path: &Path, target: &Path) -> Result<Detached, Error> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(CWD, path, flags).map_err(|errno| failed("a bind", target, errno, None))?;
    Ok(Detached { mount, what: "a bind" })
}

/// Files and folders that a tmpfs of `size` bytes may hold. An empty one takes no block but about 1 KiB of the kernel's
/// memory, and by default a tmpfs may hold as many as half of the machine's memory has pages, whatever its size
/// (tmpfs(5)).
fn inodes(size: u64) -> u64 {
    (size / 4096).max(1024)
}

/// Makes a tmpfs of at most `size` bytes (no limit but the memory without it).
pub fn tmpfs(size: Option<u64>, source: &str, target: &Path) -> Result<Detached, Error> {
    create("tmpfs", Flags { allow_suid: false }.attributes(), target, |context| {
        fsconfig_set_string(context, "source", source)?;
        fsconfig_set_string(context, "mode", "0700")?;
        match size {
            Some(bytes) => {
                fsconfig_set_string(context, "size", bytes.to_string())?;
                fsconfig_set_string(context, "nr_inodes", inodes(bytes).to_string())
            }
            None => fsconfig_set_string(context, "size", "0"),
        }
    })
}

/// Gives the tmpfs that is mounted at `target` another size in bytes.
pub fn resize_tmpfs(target: &Path, size: u64) -> Result<(), Error> {
    let context = fspick(
        CWD,
        target,
        FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_NO_AUTOMOUNT,
    )
    .map_err(|errno| failed("tmpfs", target, errno, None))?;
    fsconfig_set_string(context.as_fd(), "size", size.to_string())
        .and_then(|()| fsconfig_set_string(context.as_fd(), "nr_inodes", inodes(size).to_string()))
        .and_then(|()| fsconfig_reconfigure(context.as_fd()))
        .map_err(|errno| failed("tmpfs", target, errno, Some(context.as_fd())))
}

/// Mounts the ext4 on a block device.
///
/// `discard` gives back to the disk below what is deleted; `noinit_itable` keeps the kernel from filling a sparse image
/// with inode tables that are zero anyway.
pub fn ext4(device: &Path, target: &Path) -> Result<Detached, Error> {
    create("ext4", Flags { allow_suid: false }.attributes(), target, |context| {
        fsconfig_set_string(context, "source", device)?;
        fsconfig_set_string(context, "errors", "remount-ro")?;
        fsconfig_set_flag(context, "noinit_itable")?;
        fsconfig_set_flag(context, "discard")
    })
}

/// Unmounts what is on top at `target`. `Ok(false)` if it is busy; with `detach`, it vanishes from sight at once and
/// ends when its last user is gone. Nothing mounted there is no error.
pub fn detach_at(target: &Path, detach: bool) -> Result<bool, Error> {
    let flags = if detach {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    match unmount(target, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(errno) => Err(failed("the unmounting", target, errno, None)),
    }
}

/// Opens a folder for handing it to a mount.
pub fn open_folder(path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| Error::io("open", path, errno.into()))
}

fn create(
    what: &'static str,
    attributes: MountAttrFlags,
    target: &Path,
    configure: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<()>,
) -> Result<Detached, Error> {
    let context = fsopen(what, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| failed(what, target, errno, None))?;
    let mount = configure(context.as_fd())
        .and_then(|()| fsconfig_create(context.as_fd()))
        .and_then(|()| fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes))
        .map_err(|errno| failed(what, target, errno, Some(context.as_fd())))?;
    Ok(Detached { mount, what })
}

fn failed(what: &'static str, target: &Path, errno: Errno, context: Option<BorrowedFd<'_>>) -> Error {
    Error::Mount {
        what,
        target: target.to_owned(),
        source: errno.into(),
        kernel: context.map(kernel_text).unwrap_or_default(),
    }
}

/// What the kernel wrote into the file system context: messages such as `e overlay: …`, one per read.
fn kernel_text(context: BorrowedFd<'_>) -> String {
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        let message = String::from_utf8_lossy(&buffer[..length]);
        let message = message.trim_end();
        let message = message
            .strip_prefix("e ")
            .or(message.strip_prefix("w "))
            .unwrap_or(message);
        text.push_str(if text.is_empty() { ": " } else { "; " });
        text.push_str(message);
    }
    text
}

/// The block device below a mounted file system, from mountinfo's source.
pub fn open_device(source: &[u8]) -> Result<File, Error> {
    use std::os::unix::ffi::OsStrExt;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(source));
    File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open", &path, e))
}
