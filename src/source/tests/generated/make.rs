//! Making folders, with nothing of larder's own code.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, linkat,
    lsetxattr, mkdirat, mknodat, openat, symlinkat, utimensat,
};

/// Times that ext4 and XFS both keep: 1901 to 2446.
const FIRST_TIME: i64 = -2_147_483_648;
const LAST_TIME: i64 = 15_032_385_535;

struct Maker<'a> {
    rng: &'a mut StdRng,
    folders: Vec<OwnedFd>,
    /// Folder and name of everything else.
    leaves: Vec<(usize, Vec<u8>)>,
    used: HashSet<(usize, Vec<u8>)>,
    /// Of a device: major and minor number.
    largest: (u32, u32),
}

/// Fills an empty folder with entries of every type and everything that they can have. `largest`: the largest
/// numbers of a device that the file system keeps.
pub fn folder(root: &Path, largest: (u32, u32), rng: &mut StdRng) {
    let top = openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let mut maker = Maker {
        rng,
        folders: vec![top],
        leaves: Vec::new(),
        used: HashSet::new(),
        largest,
    };
    let steps = maker.rng.random_range(0..40);
    for _ in 0..steps {
        maker.entry();
    }
    if maker.rng.random_ratio(1, 8) {
        maker.abyss();
    }
    for index in 0..maker.leaves.len() {
        maker.attributes_of_leaf(index);
    }
    // Last, and those below first: what is made in a folder moves its time, and a default ACL is inherited.
    for index in (0..maker.folders.len()).rev() {
        maker.attributes_of_folder(index);
    }
}

impl Maker<'_> {
    fn entry(&mut self) {
        let folder = self.rng.random_range(0..self.folders.len());
        let name = self.name();
        if !self.used.insert((folder, name.clone())) {
            return;
        }
        let mode = Mode::from_raw_mode(0o600);
        match self.rng.random_range(0..20) {
            0..5 => {
                mkdirat(&self.folders[folder], &name[..], Mode::RWXU).unwrap();
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let made = openat(&self.folders[folder], &name[..], flags, Mode::empty()).unwrap();
                self.folders.push(made);
                return;
            }
            5..11 => self.file(folder, &name),
            11 => self.sparse_file(folder, &name),
            12..14 => {
                let length = if self.rng.random_ratio(1, 6) { 1000 } else { 12 };
                let target = self.bytes(1..=length, |byte| byte != 0);
                symlinkat(&target[..], &self.folders[folder], &name[..]).unwrap();
            }
            14 => {
                // Not 0/0, which is refused.
                let device = rustix::fs::makedev(
                    self.rng.random_range(1..=self.largest.0),
                    self.rng.random_range(0..=self.largest.1),
                );
                mknodat(
                    &self.folders[folder],
                    &name[..],
                    FileType::CharacterDevice,
                    mode,
                    device,
                )
                .unwrap();
            }
            15 => {
                let device = rustix::fs::makedev(
                    self.rng.random_range(0..=self.largest.0),
                    self.rng.random_range(0..=self.largest.1),
                );
                mknodat(&self.folders[folder], &name[..], FileType::BlockDevice, mode, device).unwrap();
            }
            16 => mknodat(&self.folders[folder], &name[..], FileType::Fifo, mode, 0).unwrap(),
            17 => mknodat(&self.folders[folder], &name[..], FileType::Socket, mode, 0).unwrap(),
            _ => match self.leaves.choose(self.rng) {
                // A further name, wherever the first one is.
                Some((other, first)) => {
                    let (from, to) = (&self.folders[*other], &self.folders[folder]);
                    linkat(from, &first[..], to, &name[..], AtFlags::empty()).unwrap();
                    return;
                }
                None => return,
            },
        }
        self.leaves.push((folder, name));
    }

    /// Folders in folders, until the path is longer than any call takes, and something at the end.
    fn abyss(&mut self) {
        let mut folder = self.rng.random_range(0..self.folders.len());
        for level in 0..25u8 {
            let name = [b'a' + level; 200];
            mkdirat(&self.folders[folder], &name[..], Mode::RWXU).unwrap();
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let made = openat(&self.folders[folder], &name[..], flags, Mode::empty()).unwrap();
            self.folders.push(made);
            folder = self.folders.len() - 1;
        }
        self.file(folder, b"ground");
        self.leaves.push((folder, b"ground".to_vec()));
        if let Some((other, first)) = self.leaves.first() {
            let (from, to) = (&self.folders[*other], &self.folders[folder]);
            linkat(from, &first[..], to, &b"linked"[..], AtFlags::empty()).unwrap();
        }
    }

    fn create(&mut self, folder: usize, name: &[u8]) -> File {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        File::from(openat(&self.folders[folder], name, flags, Mode::RWXU).unwrap())
    }

    fn file(&mut self, folder: usize, name: &[u8]) {
        let content = match self.rng.random_range(0..10) {
            0..2 => Vec::new(),
            // A few that come again and again.
            2..5 => vec![self.rng.random_range(0..4); 1000],
            5 => self.random_bytes(1 << 17),
            6 if self.rng.random_ratio(1, 4) => self.random_bytes((1 << 20) + 1),
            // Written out as zeros.
            7 => vec![0; self.rng.random_range(1..100_000)],
            _ => {
                let length = self.rng.random_range(1..5000);
                self.random_bytes(length)
            }
        };
        self.create(folder, name).write_all_at(&content, 0).unwrap();
    }

    /// A file with holes anywhere: at the begin, in the middle, at the end, or nothing but one.
    fn sparse_file(&mut self, folder: usize, name: &[u8]) {
        let file = self.create(folder, name);
        let unit = *[4096, 1 << 16, 300_000, 1 << 20].choose(self.rng).unwrap();
        let mut length = 0;
        for _ in 0..self.rng.random_range(1..6) {
            if self.rng.random_bool(0.5) {
                let data = self.random_bytes(unit.min(70_000));
                file.write_all_at(&data, length).unwrap();
            }
            length += unit as u64;
        }
        // Not always to the end of a block.
        file.set_len(length + self.rng.random_range(0..3)).unwrap();
    }

    fn attributes_of_leaf(&mut self, index: usize) {
        let (folder, name) = self.leaves[index].clone();
        let folder = rustix::io::dup(&self.folders[folder]).unwrap();
        let stat = rustix::fs::statat(&folder, &name[..], AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let kind = FileType::from_raw_mode(stat.st_mode);
        self.owner(&folder, &name);
        if kind != FileType::Symlink {
            let mode = Mode::from_raw_mode(self.mode());
            chmodat(&folder, &name[..], mode, AtFlags::empty()).unwrap();
        }
        let path = [format!("/proc/self/fd/{}/", folder.as_raw_fd()).as_bytes(), &name].concat();
        self.xattrs(&path, kind);
        self.time(&folder, &name);
    }

    fn attributes_of_folder(&mut self, index: usize) {
        let folder = rustix::io::dup(&self.folders[index]).unwrap();
        self.owner(&folder, b".");
        chmodat(&folder, ".", Mode::from_raw_mode(self.mode()), AtFlags::empty()).unwrap();
        let path = format!("/proc/self/fd/{}/.", folder.as_raw_fd());
        self.xattrs(path.as_bytes(), FileType::Directory);
        self.time(&folder, b".");
    }

    fn owner(&mut self, folder: &OwnedFd, name: &[u8]) {
        let mut id = || match self.rng.random_range(0..4) {
            0 => 0,
            1 => 1000,
            2 => u32::MAX - 1,
            _ => self.rng.random_range(0..u32::MAX),
        };
        let (uid, gid) = (Uid::from_raw(id()), Gid::from_raw(id()));
        chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }

    fn mode(&mut self) -> u32 {
        match self.rng.random_bool(0.5) {
            true => *[0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o6711, 0]
                .choose(self.rng)
                .unwrap(),
            false => self.rng.random_range(0..=0o7777),
        }
    }

    fn xattrs(&mut self, path: &[u8], kind: FileType) {
        let is_file = kind == FileType::RegularFile;
        let is_dir = kind == FileType::Directory;
        let set = |name: &[u8], value: &[u8]| {
            lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
        };
        // Small enough that an inode of ext4 has room for all of them.
        for _ in 0..self.rng.random_range(0..3u8) {
            let kind = match (is_file || is_dir) && self.rng.random_bool(0.5) {
                true => "user.",
                false => "trusted.",
            };
            let name = match self.rng.random_range(0..5) {
                // What means something to overlayfs, where it is overlayfs's own.
                4 => format!(
                    "trusted.overlay.{}",
                    ["opaque", "redirect", "metacopy", "overlay.origin"]
                        .choose(self.rng)
                        .unwrap()
                ),
                0 => format!("{kind}{}", "n".repeat(200)),
                1 => format!("{kind}ü\n"),
                _ => format!("{kind}{}", self.rng.random_range(0..4)),
            };
            let length = *[0, 1, 20, 300].choose(self.rng).unwrap();
            let value: Vec<u8> = (0..length).map(|_| self.rng.random()).collect();
            set(name.as_bytes(), &value);
        }
        if is_file && self.rng.random_ratio(1, 4) {
            // linux/capability.h: a revision with its "effective" bit, permitted and inheritable sets; the third
            // revision has the user of a namespace besides.
            let mut capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
            if self.rng.random_bool(0.5) {
                capability[3] = 3;
                capability.extend(100_000u32.to_le_bytes());
            }
            set(b"security.capability", &capability);
        }
        if kind != FileType::Symlink && self.rng.random_ratio(1, 4) {
            set(b"system.posix_acl_access", &acl(self.rng));
        }
        if is_dir && self.rng.random_ratio(1, 4) {
            set(b"system.posix_acl_default", &acl(self.rng));
        }
    }

    fn time(&mut self, folder: &OwnedFd, name: &[u8]) {
        let seconds = match self.rng.random_range(0..8) {
            0 => 0,
            1 => -1,
            2 => FIRST_TIME,
            3 => LAST_TIME,
            4 => self.rng.random_range(FIRST_TIME..=LAST_TIME),
            _ => self.rng.random_range(1_000_000_000..1_800_000_000),
        };
        let nanos = *[0, 1, 999_999_999, 123_456_789].choose(self.rng).unwrap();
        utimensat(folder, name, &times(seconds, nanos), AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }

    fn name(&mut self) -> Vec<u8> {
        loop {
            let longest = if self.rng.random_ratio(1, 10) { 255 } else { 6 };
            let name = self.bytes(1..=longest, |byte| byte != 0 && byte != b'/');
            if name != b"." && name != b".." {
                return name;
            }
        }
    }

    fn bytes(&mut self, length: std::ops::RangeInclusive<usize>, takes: impl Fn(u8) -> bool) -> Vec<u8> {
        let length = match length.end() {
            // All of the length, so that the bound itself is tried.
            100.. => *length.end(),
            _ => self.rng.random_range(length),
        };
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let byte = self.rng.random();
            if takes(byte) {
                bytes.push(byte);
            }
        }
        bytes
    }

    fn random_bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.rng.fill(&mut bytes[..]);
        bytes
    }
}

/// An access list as the kernel takes it (linux/posix_acl_xattr.h): version 2, then tag, rights and id of each entry.
fn acl(rng: &mut StdRng) -> Vec<u8> {
    const ANY: u32 = u32::MAX;
    // Owner, two users, group, a group, mask, others; or the three that the mode has too.
    let full: &[(u16, u32)] = &[
        (1, ANY),
        (2, 1000),
        (2, u32::MAX - 1),
        (4, ANY),
        (8, 50),
        (16, ANY),
        (32, ANY),
    ];
    let entries = match rng.random_bool(0.8) {
        true => full,
        false => &[(1, ANY), (4, ANY), (32, ANY)],
    };
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(rng.random_range(0..8u16).to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

fn times(seconds: i64, nanos: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

pub fn set_mtime(path: &Path, seconds: i64, nanos: i64) {
    utimensat(CWD, path, &times(seconds, nanos), AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// One folder with so many entries: mostly files, empty or of few contents, some with two names.
pub fn large_folder(root: &Path, count: u32, rng: &mut StdRng) {
    let folder = openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let mut linked = None;
    for number in 0..count {
        let name = format!("{number:x}-{}", "n".repeat(rng.random_range(0..30)));
        match (number % 100, &linked) {
            (0, _) => mkdirat(&folder, &name[..], Mode::RWXU).unwrap(),
            (1, _) => symlinkat(&name[..], &folder, &name[..]).unwrap(),
            (2, Some(first)) => linkat(&folder, first, &folder, &name[..], AtFlags::empty()).unwrap(),
            _ => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let file = File::from(openat(&folder, &name[..], flags, Mode::RUSR).unwrap());
                if number % 8 == 0 {
                    file.write_all_at(&vec![1; number as usize % 50], 0).unwrap();
                }
                linked = Some(name.clone());
            }
        }
        let time = times(1_600_000_000 + i64::from(number), i64::from(number));
        utimensat(&folder, &name[..], &time, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}
