//! A folder for a store, from which every mount and loop device is gone at the end.

use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};

use super::tmp_dir;

/// A new folder on a disk, removed on drop with all that was mounted in it or made a loop device from it.
pub struct StoreDir {
    // Taken on drop, after the mounts are gone.
    dir: Option<tempfile::TempDir>,
    path: PathBuf,
}

/// A [`StoreDir`]. Needs root, as all mounts do.
pub fn temp_store_dir() -> StoreDir {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test mounts file systems: run it as root"
    );
    std::fs::create_dir_all(tmp_dir()).expect("the build's folder for tests");
    let dir = tempfile::Builder::new()
        .prefix("store-")
        .tempdir_in(tmp_dir())
        .expect("a folder");
    let path = dir.path().canonicalize().expect("a path");
    StoreDir { dir: Some(dir), path }
}

impl StoreDir {
    /// The folder, without symlinks in its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Mount points at or below the folder, in the order in which they were mounted.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(&self.path)
    }

    /// Those of layers: not what the layers of a tree share, which stays for the next one.
    pub fn layer_mounts(&self) -> Vec<PathBuf> {
        let shared = |path: &PathBuf| {
            let folder = path.parent().unwrap_or(path);
            folder.ends_with("mnt/images") || folder.ends_with("mnt/trees")
        };
        self.mounts().into_iter().filter(|path| !shared(path)).collect()
    }

    /// Loop devices over a file below the folder.
    pub fn loop_devices(&self) -> Vec<PathBuf> {
        loop_devices_below(&self.path)
    }
}

impl Drop for StoreDir {
    fn drop(&mut self) {
        for mount in mounts_below(&self.path).iter().rev() {
            if let Err(error) = unmount(mount.as_path(), UnmountFlags::DETACH) {
                eprintln!("unmounting {}: {error}", mount.display());
            }
        }
        for device in loop_devices_below(&self.path) {
            let detached = Command::new("losetup").arg("--detach").arg(&device).status();
            if !detached.as_ref().is_ok_and(|status| status.success()) {
                eprintln!("detaching {}: {detached:?}", device.display());
            }
        }
        let left = mounts_below(&self.path);
        if left.is_empty() {
            // The folders that layers were mounted at cannot be changed.
            let _ = Command::new("chattr").args(["-R", "-f", "-i"]).arg(&self.path).status();
            drop(self.dir.take());
        } else {
            // Removing the folder would remove what is mounted there.
            eprintln!("still mounted, and so kept: {left:?}");
            if let Some(dir) = self.dir.take() {
                let _ = dir.keep();
            }
        }
    }
}

fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let text = std::fs::read("/proc/self/mountinfo").expect("mountinfo");
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
        .filter(|path| path.starts_with(folder))
        .collect()
}

/// mountinfo writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

fn loop_devices_below(folder: &Path) -> Vec<PathBuf> {
    let mut devices = Vec::new();
    for entry in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(backing) = std::fs::read(entry.path().join("loop/backing_file")) else {
            continue;
        };
        let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
        // A removed file keeps its device, and its name gets this ending.
        let backing = backing.strip_suffix(b" (deleted)").unwrap_or(backing);
        if Path::new(std::ffi::OsStr::from_bytes(backing)).starts_with(folder) {
            devices.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    devices
}

/// Shuts down the file system that a folder is on, which then fails every write, as when its disk is gone.
pub fn shut_down(folder: &Path) {
    const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
    let folder = std::fs::File::open(folder).unwrap();
    let without_writing: u32 = 2;
    // SAFETY: the kernel reads one `u32` through the pointer, which lives until the call returns.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_SHUTDOWN, &raw const without_writing) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
