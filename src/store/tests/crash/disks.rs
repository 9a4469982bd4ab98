//! Disks that can be cut off, mounted again and made too small. All is undone when they are dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::Unmount;

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
}

/// A folder in memory, where what the kernel has been given is as good as on a disk, and nobody waits for one.
pub struct Ram {
    path: PathBuf,
    _mounted: Unmount,
}

impl Ram {
    pub fn new(dir: &Path) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test mounts file systems: run it as root"
        );
        let path = dir.join("ram");
        fs::create_dir_all(&path).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "larder-test"]).arg(&path));
        let _mounted = Unmount(path.clone());
        Self { path, _mounted }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has it take only so many bytes more, or as many as the memory allows.
    pub fn leave(&self, bytes: Option<u64>) {
        let stat = rustix::fs::statvfs(&self.path).unwrap();
        let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
        let size = bytes.map_or("50%".to_owned(), |bytes| (used + bytes).to_string());
        let option = format!("remount,size={size}");
        run(Command::new("mount").args(["-o", &option]).arg(&self.path));
    }
}

/// A file system in a file.
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
    _mounted: Unmount,
}

impl Disk {
    pub fn new(dir: &Path, kind: &str, megabytes: u64) -> Self {
        let (image, mount) = (dir.join("disk.img"), dir.join("disk"));
        fs::create_dir(&mount).unwrap();
        File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        let options: &[&str] = match kind {
            // Blocks as large as pages: see `write_by_pages`.
            "ext4" => &["-b4096", "-m0", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
            _ => &[],
        };
        run(Command::new(format!("mkfs.{kind}")).arg("-q").args(options).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount));
        let _mounted = Unmount(mount.clone());
        Self { image, mount, _mounted }
    }

    pub fn path(&self) -> &Path {
        &self.mount
    }

    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Unmounts it, whatever state it is in, and mounts it again with what its journal says: nothing is left in
    /// memory.
    pub fn mount_again(&self) {
        self.unmount();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&self.image)
            .arg(&self.mount));
        // A mount namespace that was made meanwhile, as by another test run, keeps what was mounted then: this is the
        // file system that was shut down once more, and says nothing of the disk.
        let synced = File::open(&self.mount).and_then(|folder| folder.sync_all());
        assert!(
            synced.is_ok(),
            "{}: {synced:?}: is it still mounted in another mount namespace?",
            self.mount.display()
        );
    }

    /// Makes all that it holds durable.
    pub fn sync(&self) {
        rustix::fs::syncfs(File::open(&self.mount).unwrap()).unwrap();
    }

    /// Gives back what is below free blocks.
    pub fn trim(&self) {
        self.sync();
        run(Command::new("fstrim").arg(&self.mount));
    }

    /// Has the loop device ask for no more than a page at once, until it is mounted again. A larger write that ends
    /// where the room below it does is short, and the kernel's loop driver takes a short write for a whole one: such
    /// a disk loses data without a word, and nothing that only writes and syncs can know.
    pub fn write_by_pages(&self) {
        let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(&self.mount).unwrap());
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let limit = format!("/sys/dev/block/{major}:{minor}/queue/max_sectors_kb");
        fs::write(limit, "4").unwrap();
    }

    fn unmount(&self) {
        let begun = Instant::now();
        // A process that another test is just starting has our descriptors until it becomes another program.
        while let Err(error) = rustix::mount::unmount(&self.mount, UnmountFlags::empty()) {
            let patient = error == Errno::BUSY && begun.elapsed() < Duration::from_secs(20);
            assert!(patient, "unmounting {}: {error}", self.mount.display());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
