//! A fresh file system on a loop device, and what lies on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of a file system's image, which is sparse.
const IMAGE: u64 = 40 << 30;
const FILES: u64 = 50_000;
const BYTES: u64 = 500_000_000;

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

/// Copies what every clone of this repository has downloaded, until it is as much as a toolchain.
pub fn corpus(to: &Path) -> (u64, u64) {
    fs::create_dir(to).expect("a folder");
    let (mut files, mut bytes) = (0, 0);
    for (number, from) in candidates().iter().enumerate() {
        if files >= FILES && bytes >= BYTES {
            break;
        }
        if !from.is_dir() {
            continue;
        }
        sh(Command::new("cp").arg("-a").arg(from).arg(to.join(number.to_string())));
        let counted = count(&to.join(number.to_string()));
        (files, bytes) = (files + counted.0, bytes + counted.1);
    }
    assert!(
        files >= FILES && bytes >= BYTES,
        "only {files} files and {bytes} bytes found to make a corpus of"
    );
    (files, bytes)
}

fn candidates() -> Vec<PathBuf> {
    let ask = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        Some(PathBuf::from(text.trim()))
    };
    let cargo = std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    let places = [
        ask("go", &["env", "GOMODCACHE"]),
        Some(cargo.join("registry/src")),
        ask("go", &["env", "GOROOT"]),
        ask("rustc", &["--print", "sysroot"]),
    ];
    places.into_iter().flatten().collect()
}

/// Regular files below a folder, and their bytes.
pub fn count(dir: &Path) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(dir).expect("a folder") {
        let entry = entry.expect("an entry");
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            let below = count(&entry.path());
            (files, bytes) = (files + below.0, bytes + below.1);
        } else if kind.is_file() {
            files += 1;
            bytes += entry.metadata().expect("a status").len();
        }
    }
    (files, bytes)
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
