//! Operations of a writer on a folder, with nothing of larder's own code: all that changes an entry, its name or its
//! place. What cannot be done (a name is of another type, not empty, gone meanwhile) is left.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, XattrFlags, linkat, lremovexattr, lsetxattr, mknodat, openat,
    renameat_with,
};

use super::make::set_mtime;

const NAMES: [&str; 9] = ["a", "b", "c", "d", "e", "f", "ü", "x,y:z\\", "new\nline"];
const XATTRS: [&str; 6] = [
    "user.one",
    "user.overlay.opaque",
    "trusted.two",
    "trusted.overlay.opaque",
    "trusted.overlay.redirect",
    "trusted.overlay.metacopy",
];

pub struct Writer<'a> {
    pub root: &'a Path,
    pub rng: &'a mut StdRng,
    folders: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

impl<'a> Writer<'a> {
    pub fn new(root: &'a Path, rng: &'a mut StdRng) -> Self {
        let mut writer = Self {
            root,
            rng,
            folders: Vec::new(),
            others: Vec::new(),
        };
        writer.look_round();
        writer
    }

    /// Fills an empty folder with what an operation needs: folders three deep, files, hard links.
    pub fn fill(root: &'a Path, rng: &'a mut StdRng) {
        let mut writer = Self::new(root, rng);
        for _ in 0..8 {
            let path = writer.new_path();
            let _ = fs::create_dir(path);
            writer.look_round();
        }
        for _ in 0..25 {
            writer.create();
        }
        writer.look_round();
        for _ in 0..6 {
            writer.link();
        }
        for _ in 0..20 {
            writer.attribute();
        }
    }

    /// So many operations. `between` is called now and then.
    pub fn work(&mut self, count: u32, between: &dyn Fn()) {
        for done in 0..count {
            if done % 4 == 0 {
                self.look_round();
            }
            self.operate();
            if self.rng.random_ratio(1, 40) {
                between();
            }
        }
    }

    fn look_round(&mut self) {
        self.folders = vec![self.root.to_owned()];
        self.others.clear();
        let mut at = 0;
        while let Some(folder) = self.folders.get(at).cloned() {
            at += 1;
            let mut entries: Vec<_> = fs::read_dir(&folder).unwrap().map(Result::unwrap).collect();
            // The order of a folder is the file system's; the same seed must do the same.
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                match entry.file_type().unwrap().is_dir() {
                    true => self.folders.push(entry.path()),
                    false => self.others.push(entry.path()),
                }
            }
        }
    }

    fn folder(&mut self) -> PathBuf {
        self.folders.choose(self.rng).unwrap().clone()
    }

    fn other(&mut self) -> PathBuf {
        match self.others.choose(self.rng) {
            Some(path) => path.clone(),
            None => self.new_path(),
        }
    }

    /// Anything but the root.
    fn any(&mut self) -> PathBuf {
        match self.folders[1..].choose(self.rng) {
            Some(folder) if self.rng.random_bool(0.5) => folder.clone(),
            _ => self.other(),
        }
    }

    /// A name that may be taken.
    fn new_path(&mut self) -> PathBuf {
        let folder = self.folder();
        folder.join(NAMES.choose(self.rng).unwrap())
    }

    fn place(&mut self) -> PathBuf {
        match self.rng.random_bool(0.3) {
            true => self.any(),
            false => self.new_path(),
        }
    }

    fn content(&mut self) -> Vec<u8> {
        let length = match self.rng.random_range(0..6) {
            0 => 0,
            1 => 70_000,
            _ => self.rng.random_range(1..6000),
        };
        let mut bytes = vec![0; length];
        self.rng.fill(&mut bytes[..]);
        bytes
    }

    fn operate(&mut self) {
        match self.rng.random_range(0..32) {
            0..3 => self.create(),
            3..6 => self.write(),
            6..12 => self.attribute(),
            12..14 => self.link(),
            14 => {
                let path = self.new_path();
                self.special(&path);
            }
            15..21 => {
                let (from, to) = (self.any(), self.place());
                self.rename(&from, &to, RenameFlags::empty());
            }
            21..23 => {
                // To where it has been, or to another name in the same folder.
                let from = self.any();
                let to = from.with_file_name(NAMES.choose(self.rng).unwrap());
                self.rename(&from, &to, RenameFlags::empty());
            }
            23..25 => {
                let (one, other) = (self.any(), self.any());
                self.rename(&one, &other, RenameFlags::EXCHANGE);
            }
            25 => {
                let _ = fs::remove_file(self.other());
            }
            26 => {
                let path = self.any();
                let _ = fs::remove_dir_all(path);
            }
            27 => {
                let _ = fs::create_dir(self.new_path());
            }
            28 => {
                // A folder for a file.
                let path = self.other();
                let _ = fs::remove_file(&path).and_then(|()| fs::create_dir(&path));
            }
            29 => {
                // A file, a link or nothing for a folder, or the same folder empty: opaque.
                if let Some(path) = self.folders[1..].choose(self.rng).cloned() {
                    let _ = fs::remove_dir_all(&path);
                    match self.rng.random_range(0..3) {
                        0 => self.put(&path),
                        1 => self.special(&path),
                        _ => {
                            let _ = fs::create_dir(&path);
                        }
                    }
                }
            }
            30 => {
                // A new file for an old one, as editors write them.
                let (new, old) = (self.new_path(), self.other());
                self.put(&new);
                self.rename(&new, &old, RenameFlags::empty());
            }
            _ => self.nameless(),
        }
    }

    fn rename(&self, from: &Path, to: &Path, flags: RenameFlags) {
        let _ = renameat_with(CWD, from, CWD, to, flags);
    }

    /// Writes a new file, or an old one anew.
    fn put(&mut self, path: &Path) {
        let content = self.content();
        // Not into a FIFO or a device, and not through a link.
        let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags.bits() as i32)
            .open(path);
        if let Ok(mut file) = file
            && file.metadata().unwrap().is_file()
        {
            file.write_all(&content).unwrap();
        }
    }

    fn create(&mut self) {
        let path = self.new_path();
        match self.rng.random_ratio(1, 6) {
            true => self.special(&path),
            false => self.put(&path),
        }
    }

    fn special(&mut self, path: &Path) {
        let _ = match self.rng.random_range(0..5) {
            0 => symlink("a/target", path),
            1 => mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).map_err(Into::into),
            2 => mknodat(CWD, path, FileType::Socket, Mode::RWXU, 0).map_err(Into::into),
            3 => mknodat(
                CWD,
                path,
                FileType::CharacterDevice,
                Mode::RWXU,
                rustix::fs::makedev(1, 3),
            )
            .map_err(Into::into),
            // A block device may be 0/0.
            _ => mknodat(CWD, path, FileType::BlockDevice, Mode::RWXU, 0).map_err(Into::into),
        };
    }

    fn link(&mut self) {
        let (from, to) = (self.other(), self.new_path());
        let _ = fs::hard_link(from, to);
    }

    /// Changes the data of an old file.
    fn write(&mut self) {
        let path = self.other();
        if !path.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            return;
        }
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        match self.rng.random_range(0..5) {
            0 => self.put(&path),
            1 => file.set_len(self.rng.random_range(0..=length + 100)).unwrap(),
            2 => file.write_all_at(b"appended", length).unwrap(),
            3 => file.write_all_at(b"over", self.rng.random_range(0..=length)).unwrap(),
            // Only opened for writing, which copies it whole.
            _ => {}
        }
    }

    fn attribute(&mut self) {
        let path = match self.rng.random_ratio(1, 12) {
            true => self.root.to_owned(),
            false => self.any(),
        };
        let xattr = *XATTRS.choose(self.rng).unwrap();
        let number = self.rng.random_range(0..4u32);
        match self.rng.random_range(0..5) {
            0 if !path.is_symlink() => {
                let mode = self.rng.random_range(0..=0o7777);
                let _ = fs::set_permissions(&path, fs::Permissions::from_mode(mode));
            }
            1 => {
                let _ = lchown(&path, Some(number), Some(1000 + number));
            }
            2 if path.symlink_metadata().is_ok() => {
                set_mtime(&path, i64::from(number) * 1_000_000_007, 123_456_789);
            }
            3 => {
                let value = [b'y', number as u8];
                let _ = lsetxattr(
                    &path,
                    xattr,
                    &value[..self.rng.random_range(0..=2)],
                    XattrFlags::empty(),
                );
            }
            _ => {
                let _ = lremovexattr(&path, xattr);
            }
        }
    }

    /// A file that gets its name only when it is written.
    fn nameless(&mut self) {
        use std::os::fd::AsRawFd;
        let (folder, path, content) = (self.folder(), self.new_path(), self.content());
        let Ok(file) = openat(
            CWD,
            &folder,
            OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
            Mode::RWXU,
        ) else {
            return;
        };
        let mut file = File::from(file);
        file.write_all(&content).unwrap();
        let place = format!("/proc/self/fd/{}", file.as_raw_fd());
        let _ = linkat(CWD, place, CWD, &path, AtFlags::SYMLINK_FOLLOW);
    }
}
