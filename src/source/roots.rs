//! Which folders of the node a namespace may read.

use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use rustix::io::Errno;

use super::Error;
use crate::layer::descent::BENEATH;
use crate::store::Store;

/// A folder below which some namespaces may name sources: `PATH=NAMESPACE[,NAMESPACE…]`, or `PATH=*` for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRoot {
    path: PathBuf,
    /// `None`: every namespace.
    namespaces: Option<Vec<String>>,
}

impl SourceRoot {
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn allows(&self, namespace: &str) -> bool {
        self.namespaces
            .as_ref()
            .is_none_or(|all| all.iter().any(|n| n == namespace))
    }
}

impl FromStr for SourceRoot {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |reason| Error::InvalidRoot {
            text: text.to_owned(),
            reason,
        };
        // The last `=`, because a path may have one and a namespace not.
        let (path, namespaces) = text.rsplit_once('=').ok_or_else(|| invalid("there is no \"=\""))?;
        let path = clean(Path::new(path)).ok_or_else(|| invalid("the path is not absolute or has a \"..\""))?;
        if namespaces == "*" {
            return Ok(Self { path, namespaces: None });
        }
        // Looked at first: a list of nothing but commas would take far more memory than it is long.
        if !namespaces.split(',').all(is_namespace) {
            return Err(invalid("each namespace must be one, or the only one \"*\""));
        }
        let namespaces: Vec<String> = namespaces.split(',').map(str::to_owned).collect();
        Ok(Self {
            path,
            namespaces: Some(namespaces),
        })
    }
}

/// All roots of a node: `import/<namespace>/`, and those that its admin added.
#[derive(Debug, Clone)]
pub struct Roots {
    import: PathBuf,
    extra: Vec<SourceRoot>,
    store: (u64, u64),
}

impl Roots {
    /// `import_dir` holds a folder per namespace; it must not lie in the store, and need not exist.
    pub fn new(store: &Store, import_dir: PathBuf, extra: Vec<SourceRoot>) -> Result<Roots, Error> {
        let import = clean(&import_dir).ok_or_else(|| Error::InvalidPath {
            path: import_dir.display().to_string(),
        })?;
        Ok(Roots {
            import,
            extra,
            store: store_id(store)?,
        })
    }

    /// Opens the folder that an object in `namespace` names as its source.
    ///
    /// Below the root, no component may be a symlink or a mount point. Fails with [`Error::OutsideRoots`],
    /// [`Error::Missing`], [`Error::Symlink`], [`Error::NotADirectory`], [`Error::MountPoint`] or
    /// [`Error::InsideStore`], naming the path.
    pub fn open(&self, namespace: &str, path: &str) -> Result<SourceDir, Error> {
        let wanted = clean(Path::new(path)).ok_or_else(|| Error::InvalidPath { path: path.to_owned() })?;
        let mut roots: Vec<PathBuf> = self
            .extra
            .iter()
            .filter(|root| root.allows(namespace))
            .map(|root| root.path.clone())
            .collect();
        // The namespace is a component of a path here, so it must be no other thing.
        let own = is_namespace(namespace).then(|| self.import.join(namespace));
        roots.extend(own.clone());
        // The longest root that holds the path: the fewest components are then checked against it.
        let root = roots
            .iter()
            .filter(|root| wanted.starts_with(root))
            .max_by_key(|root| root.components().count());
        let Some(root) = root else {
            roots.sort();
            return Err(Error::OutsideRoots {
                path: path.to_owned(),
                namespace: namespace.to_owned(),
                allowed: roots,
            });
        };
        let mut folder = if Some(root) == own.as_ref() {
            // A namespace's folder may be a mount of its own, but no link to another one's.
            let import = open_root(&self.import)?;
            let resolve = BENEATH.difference(ResolveFlags::NO_XDEV);
            step(&import, OsStr::new(namespace), root, resolve)?
        } else {
            open_root(root)?
        };
        let mut at = root.clone();
        for name in wanted.strip_prefix(root).unwrap_or(Path::new("")).iter() {
            at.push(name);
            folder = step(&folder, name, &at, BENEATH)?;
        }
        SourceDir::new(folder, wanted, self.store)
    }
}

/// A folder that may be read as a source.
#[derive(Debug)]
pub struct SourceDir {
    /// Open for reading.
    pub(super) folder: OwnedFd,
    pub(super) path: PathBuf,
    /// Device and inode of the store's root.
    pub(super) store: (u64, u64),
}

impl SourceDir {
    /// Opens any folder, for a caller who may read the whole node anyway.
    pub fn open(store: &Store, path: &Path) -> Result<SourceDir, Error> {
        SourceDir::new(open_root(path)?, path.to_owned(), store_id(store)?)
    }

    /// A folder that such a caller has opened; `path` is for messages.
    pub fn of(store: &Store, folder: OwnedFd, path: &Path) -> Result<SourceDir, Error> {
        SourceDir::new(folder, path.to_owned(), store_id(store)?)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn new(place: OwnedFd, path: PathBuf, store: (u64, u64)) -> Result<SourceDir, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(&place, c".", flags, Mode::empty()).map_err(|e| Error::io("open", &path, e))?;
        let source = SourceDir { folder, path, store };
        source.refuse_inside_store()?;
        Ok(source)
    }

    /// Goes up to the root of the file systems, and must not meet the store.
    fn refuse_inside_store(&self) -> Result<(), Error> {
        let error = |e: Errno| Error::io("look above", &self.path, e);
        let id = |folder: &OwnedFd| fstat(folder).map(|s| (s.st_dev, s.st_ino)).map_err(error);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut folder = openat(&self.folder, c".", flags, Mode::empty()).map_err(error)?;
        let mut here = id(&folder)?;
        loop {
            if here == self.store {
                return Err(Error::InsideStore {
                    path: self.path.clone(),
                });
            }
            folder = openat(&folder, c"..", flags, Mode::empty()).map_err(error)?;
            let above = id(&folder)?;
            if above == here {
                return Ok(());
            }
            here = above;
        }
    }
}

/// Device and inode of the store's root.
fn store_id(store: &Store) -> Result<(u64, u64), Error> {
    let stat = rustix::fs::stat(store.root()).map_err(|e| Error::io("stat", store.root(), e))?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Opens a root, which its admin may have reached through links.
fn open_root(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => Error::Missing { path: path.to_owned() },
        Errno::NOTDIR => Error::NotADirectory { path: path.to_owned() },
        errno => Error::io("open", path, errno),
    })
}

/// Opens a folder in a folder; `path` is its whole path, for messages.
fn step(folder: &OwnedFd, name: &OsStr, path: &Path, resolve: ResolveFlags) -> Result<OwnedFd, Error> {
    let owned = || path.to_owned();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let name = CString::new(name.as_bytes()).map_err(|_| Error::Missing { path: owned() })?;
    let opened = loop {
        match openat2(folder, &*name, flags, Mode::empty(), resolve) {
            // The kernel could not rule out an escape because of a rename elsewhere (openat2(2)).
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => break other,
        }
    };
    let opened = opened.map_err(|errno| match errno {
        Errno::NOENT => Error::Missing { path: owned() },
        Errno::LOOP => Error::Symlink { path: owned() },
        Errno::NOTDIR => Error::NotADirectory { path: owned() },
        Errno::XDEV => Error::MountPoint { path: owned() },
        errno => Error::io("open", path, errno),
    })?;
    let stat = fstat(&opened).map_err(|e| Error::io("stat", path, e))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(opened),
        FileType::Symlink => Err(Error::Symlink { path: owned() }),
        _ => Err(Error::NotADirectory { path: owned() }),
    }
}

/// The path without `.`, doubled and trailing `/`; `None` unless it is absolute and has no `..` and no NUL.
fn clean(path: &Path) -> Option<PathBuf> {
    if !path.is_absolute() || path.as_os_str().as_bytes().contains(&0) {
        return None;
    }
    path.components()
        .all(|c| c != Component::ParentDir)
        .then(|| path.components().collect())
}

/// A DNS-1123 label, which is what a namespace's name is.
fn is_namespace(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || b.is_ascii_lowercase() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}
