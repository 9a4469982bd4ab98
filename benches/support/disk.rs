//! A fresh file system on a loop device, and what lies on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of a file system's image, which is sparse.
const IMAGE: u64 = 40 << 30;

/// From here on, what this process and its children mount is seen by nobody else and is gone with them, however they
/// end; so are the loop devices, which detach themselves.
pub fn private_mounts() {
    // SAFETY: the process has one thread yet.
    let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
    unshared.expect("the store's bench mounts file systems, so it needs root");
    let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).expect("private mounts");
}

/// A mounted file system.
pub struct Disk {
    pub root: PathBuf,
    image: PathBuf,
}

impl Disk {
    pub fn new(dir: &Path, kind: &str) -> Disk {
        let (root, image) = (dir.join(kind), dir.join(format!("{kind}.img")));
        fs::create_dir_all(&root).expect("a folder");
        fs::File::create(&image)
            .and_then(|file| file.set_len(IMAGE))
            .expect("an image");
        let quiet: &[&str] = if kind == "ext4" { &["-q", "-F"] } else { &["-q"] };
        sh(Command::new(format!("mkfs.{kind}")).args(quiet).arg(&image));
        sh(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&root));
        Disk { root, image }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Should one fail, the private mount goes with the process; the image is said to remain.
        let _ = Command::new("umount").arg(&self.root).status();
        if let Err(error) = fs::remove_file(&self.image) {
            eprintln!("cannot remove {}: {error}", self.image.display());
        }
    }
}

/// Runs a command that must not fail.
pub fn sh(command: &mut Command) {
    let out = command
        .output()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let messages = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?} failed:\n{messages}");
}

/// A folder for what a part needs on disk, below `target/`, empty.
pub fn work_dir(part: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{part}"));
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap_or_else(|e| panic!("cannot remove {}: {e}", dir.display()));
    }
    fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("cannot create {}: {e}", dir.display()));
    dir
}
