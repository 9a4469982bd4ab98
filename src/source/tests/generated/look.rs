//! Looking at a folder, with nothing of larder's own code but the hash.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, lgetxattr, llistxattr, openat, readlinkat, seek, statat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::store::tree::{LeafId, LeafKind, Node, Tree};

/// All that can be seen of an entry, but for times other than that of its content's last change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// With the type.
    mode: u32,
    pub owner: (u32, u32),
    mtime: (i64, u64),
    device: u64,
    size: i64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    content: Vec<u8>,
    /// The first path of the same inode, and how many names it has.
    inode: (Vec<u8>, u64),
}

/// Entries by path; the root's is empty.
pub type Looked = BTreeMap<Vec<u8>, Entry>;

pub fn look(root: &Path) -> Looked {
    let mut found = Looked::new();
    let mut inodes = HashMap::new();
    visit(root, &mut |folder, name, path| {
        let entry = entry(folder, name, path, &mut inodes);
        found.insert(path.to_vec(), entry);
    });
    found
}

/// The same of a tree in memory, its contents by their digests.
pub fn look_at(tree: &Tree) -> Looked {
    let mut found = Looked::new();
    let mut first: HashMap<LeafId, Vec<u8>> = HashMap::new();
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        let (meta, kind, inode) = match node {
            Node::Dir(dir) => (&tree.dir(dir).meta, FileType::Directory, Vec::new()),
            Node::Leaf(leaf) => (
                &tree.leaf(leaf).meta,
                match tree.leaf(leaf).kind {
                    LeafKind::File { .. } => FileType::RegularFile,
                    LeafKind::Symlink(_) => FileType::Symlink,
                    LeafKind::CharDevice { .. } => FileType::CharacterDevice,
                    LeafKind::BlockDevice { .. } => FileType::BlockDevice,
                    LeafKind::Fifo => FileType::Fifo,
                    LeafKind::Socket => FileType::Socket,
                },
                first.entry(leaf).or_insert(path.to_vec()).clone(),
            ),
        };
        let (device, size, content) = match node {
            Node::Dir(_) => (0, 0, Vec::new()),
            Node::Leaf(leaf) => match &tree.leaf(leaf).kind {
                LeafKind::File { digest, size } => (0, *size as i64, digest.as_bytes().to_vec()),
                LeafKind::Symlink(target) => (0, target.len() as i64, target.to_vec()),
                LeafKind::CharDevice { major, minor } | LeafKind::BlockDevice { major, minor } => {
                    (rustix::fs::makedev(*major, *minor), 0, Vec::new())
                }
                LeafKind::Fifo | LeafKind::Socket => (0, 0, Vec::new()),
            },
        };
        let entry = Entry {
            mode: kind.as_raw_mode() | u32::from(meta.mode),
            owner: (meta.uid, meta.gid),
            mtime: (meta.mtime.0, u64::from(meta.mtime.1)),
            device,
            size,
            xattrs: meta
                .xattrs
                .iter()
                .map(|(name, value)| (name.to_vec(), value.to_vec()))
                .collect(),
            content,
            inode: (inode, 0),
        };
        found.insert(path.to_vec(), entry);
    }
    count_names(&mut found);
    found
}

/// Counts the names that each inode has here: through an overlay, one whose link was broken shows the number below.
pub fn count_names(found: &mut Looked) {
    let mut names: HashMap<Vec<u8>, u64> = HashMap::new();
    for entry in found.values() {
        *names.entry(entry.inode.0.clone()).or_default() += 1;
    }
    for entry in found.values_mut() {
        entry.inode.1 = names[&entry.inode.0];
    }
}

/// Called with a folder, a name in it, and the path of both.
type Visit<'a> = dyn FnMut(&OwnedFd, &[u8], &[u8]) + 'a;

/// Visits every entry, sorted, with a descriptor of its folder: no path is ever too long. The root is "." of itself.
fn visit(root: &Path, each: &mut Visit<'_>) {
    let top = open(CWD, root.as_os_str().as_encoded_bytes());
    each(&top, b".", b"");
    below(&top, b"", each);
}

fn below(folder: &OwnedFd, path: &[u8], each: &mut Visit<'_>) {
    let entries = Dir::read_from(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_owned());
    let mut names: Vec<CString> = entries
        .filter(|name| name.as_c_str() != c"." && name.as_c_str() != c"..")
        .collect();
    names.sort();
    for name in names {
        let name = name.as_bytes();
        let path = match path {
            [] => name.to_vec(),
            _ => [path, b"/", name].concat(),
        };
        each(folder, name, &path);
        let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            below(&open(folder, name), &path, each);
        }
    }
}

fn open(at: impl std::os::fd::AsFd, name: &[u8]) -> OwnedFd {
    openat(
        at,
        name,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

fn entry(folder: &OwnedFd, name: &[u8], path: &[u8], inodes: &mut HashMap<(u64, u64), Vec<u8>>) -> Entry {
    let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_folder = kind == FileType::Directory;
    let content = match kind {
        FileType::RegularFile => hash(&mut File::from(open(folder, name))),
        FileType::Symlink => readlinkat(folder, name, Vec::new()).unwrap().into_bytes(),
        _ => Vec::new(),
    };
    let place = [format!("/proc/self/fd/{}/", folder.as_raw_fd()).as_bytes(), name].concat();
    Entry {
        mode: stat.st_mode,
        owner: (stat.st_uid, stat.st_gid),
        mtime: (stat.st_mtime, stat.st_mtime_nsec),
        device: if matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) {
            stat.st_rdev
        } else {
            0
        },
        // That of a folder is the file system's own business, and so is how many folders are in it.
        size: if is_folder { 0 } else { stat.st_size },
        xattrs: xattrs(&place),
        content,
        inode: match is_folder {
            true => (Vec::new(), 0),
            false => (
                inodes
                    .entry((stat.st_dev, stat.st_ino))
                    .or_insert(path.to_vec())
                    .clone(),
                stat.st_nlink,
            ),
        },
    }
}

fn hash(file: &mut File) -> Vec<u8> {
    let mut hash = Sha256::new();
    let mut buffer = [0; 1 << 14];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hash.finalize().to_vec(),
            read => hash.update(&buffer[..read]),
        }
    }
}

fn xattrs(path: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = [0; 4096];
    let length = llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|byte| *byte == 0);
    // A label that a security module of the host gives to every file belongs to the host.
    let names = names.filter(|name| !name.is_empty() && *name != b"security.selinux");
    let value = |name: &[u8]| {
        let mut value = [0; 4096];
        let length = lgetxattr(path, name, &mut value[..]).unwrap();
        value[..length].to_vec()
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// Where a file has data: begin and end of each run.
fn data(file: &OwnedFd, size: u64) -> Vec<(u64, u64)> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => panic!("{error}"),
        };
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        runs.push((start, at.min(size)));
    }
    runs
}

/// Every hole of a file is a hole of its copy. Not one in the last block if that is no whole one, and not a single
/// block: a file that takes as many blocks as it is long, one of them for its attributes, is taken for one without. And
/// not if an equal content, of zeros alone, was stored from a file that has them written: `zeros` are the lengths of such.
pub fn holes_are_kept(source: &Path, copy: &Path, zeros: &mut BTreeSet<u64>, what: &str) {
    let files = |root: &Path| {
        let mut found = BTreeMap::new();
        visit(root, &mut |folder, name, path| {
            let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                let length = stat.st_size as u64 / 4096 * 4096;
                found.insert(path.to_vec(), (length, data(&open(folder, name), length)));
            }
        });
        found
    };
    let (before, after) = (files(source), files(copy));
    visit(source, &mut |folder, name, path| {
        let written = before.get(path).is_some_and(|(_, data)| !data.is_empty());
        let content = || {
            let mut content = Vec::new();
            File::from(open(folder, name)).read_to_end(&mut content).unwrap();
            content
        };
        if written
            && let content = content()
            && content.iter().all(|byte| *byte == 0)
        {
            zeros.insert(content.len() as u64);
        }
    });
    for (path, (length, copied)) in after {
        let had = &before[&path].1;
        let taken: u64 = had.iter().map(|(start, end)| end - start).sum();
        let is_zeros_of_another = had.is_empty() && zeros.iter().any(|zeros| zeros / 4096 * 4096 == length);
        if length - taken <= 4096 || is_zeros_of_another {
            continue;
        }
        let inside = |run: &(u64, u64)| had.iter().any(|had| had.0 <= run.0 && run.1 <= had.1);
        assert!(
            copied.iter().all(inside),
            "{what}: {} has data at {copied:?}, but had it at {had:?} only",
            path.escape_ascii()
        );
    }
}
