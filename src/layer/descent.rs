//! Walking a folder tree of any depth by descriptors.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, RawDir, ResolveFlags, SeekFrom, openat, openat2, seek};
use rustix::io::Errno;

/// The deepest folders of the path that stay open.
const OPEN: usize = 32;

/// Nothing outside the folder that a name is looked up in can be reached: no link is followed, no mount entered.
pub(crate) const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A path of open folders from a root down. Neither the length of the path nor the number of descriptors limits its
/// depth: far above the current folder they are closed, and opened again by `..` on the way back, when they must be the
/// same folders as before.
pub(crate) struct Descent {
    path: Vec<Step>,
}

struct Step {
    folder: Option<Arc<OwnedFd>>,
    id: (u64, u64),
}

impl Descent {
    pub fn new(root: OwnedFd) -> io::Result<Self> {
        let id = identity(&root)?;
        Ok(Self {
            path: vec![Step {
                folder: Some(Arc::new(root)),
                id,
            }],
        })
    }

    /// The current folder, open for reading.
    pub fn folder(&self) -> io::Result<&Arc<OwnedFd>> {
        // Every method leaves the last step open; the error stands in for a panic.
        self.path
            .last()
            .and_then(|step| step.folder.as_ref())
            .ok_or_else(|| Errno::BADF.into())
    }

    /// Goes into a folder of the current one; follows no link and enters no mount (`EXDEV`).
    pub fn enter(&mut self, name: &CStr) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = open_beneath(self.folder()?, name, flags)?;
        let id = identity(&folder)?;
        self.path.push(Step {
            folder: Some(Arc::new(folder)),
            id,
        });
        // The root stays open: it is where the way back must end.
        if let Some(far) = self.path.len().checked_sub(OPEN).filter(|far| *far > 0) {
            self.path[far].folder = None;
        }
        Ok(())
    }

    /// Goes back to the parent. `ESTALE` if the folder was moved elsewhere meanwhile.
    pub fn leave(&mut self) -> io::Result<()> {
        let (Some(child), Some(parent)) = (self.path.pop(), self.path.last_mut()) else {
            return Err(Errno::INVAL.into());
        };
        if parent.folder.is_none() {
            let child = child.folder.ok_or(Errno::BADF)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let folder = openat(&child, c"..", flags, Mode::empty())?;
            if identity(&folder)? != parent.id {
                return Err(Errno::STALE.into());
            }
            parent.folder = Some(Arc::new(folder));
        }
        Ok(())
    }
}

/// Opens a name in a folder with [`BENEATH`].
pub(crate) fn open_beneath(folder: impl AsFd, name: &CStr, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    loop {
        match openat2(&folder, name, flags, Mode::empty(), BENEATH) {
            // The kernel could not rule out an escape because of a rename elsewhere (openat2(2)).
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// The names in a folder, sorted by their bytes, without `.` and `..`.
pub(crate) fn names(folder: impl AsFd) -> io::Result<Vec<CString>> {
    // Not `Dir`, which opens the folder once more.
    let mut buffer = Vec::with_capacity(1 << 15);
    seek(&folder, SeekFrom::Start(0))?;
    let mut entries = RawDir::new(folder, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn identity(folder: impl AsFd) -> rustix::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(folder)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn open(path: &std::path::Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    #[test]
    fn the_way_back_leads_through_folders_that_were_closed() {
        let dir = tempfile::tempdir().unwrap();
        let mut descent = Descent::new(open(dir.path())).unwrap();
        let name = CString::new("n".repeat(200)).unwrap();
        let mut seen = Vec::new();
        for _ in 0..200 {
            rustix::fs::mkdirat(descent.folder().unwrap(), &*name, Mode::RWXU).unwrap();
            seen.push(identity(descent.folder().unwrap()).unwrap());
            descent.enter(&name).unwrap();
        }
        assert_eq!(descent.path.iter().filter(|step| step.folder.is_some()).count(), OPEN);
        while let Some(id) = seen.pop() {
            descent.leave().unwrap();
            assert_eq!(identity(descent.folder().unwrap()).unwrap(), id);
        }
        crate::store::remove_all(&dir.path().join(name.to_str().unwrap())).unwrap();
    }

    #[test]
    fn a_folder_that_was_moved_away_is_noticed_on_the_way_back() {
        let dir = tempfile::tempdir().unwrap();
        let deep: std::path::PathBuf = std::iter::repeat_n("a", OPEN + 2).collect();
        fs::create_dir_all(dir.path().join(&deep)).unwrap();
        let mut descent = Descent::new(open(dir.path())).unwrap();
        for _ in 0..OPEN + 2 {
            descent.enter(c"a").unwrap();
        }
        fs::rename(dir.path().join("a/a/a"), dir.path().join("b")).unwrap();
        let error = loop {
            if let Err(e) = descent.leave() {
                break e;
            }
        };
        assert_eq!(error.raw_os_error(), Some(Errno::STALE.raw_os_error()));
    }

    #[test]
    fn a_link_is_not_entered() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/", dir.path().join("link")).unwrap();
        let mut descent = Descent::new(open(dir.path())).unwrap();
        assert!(descent.enter(c"link").is_err());
        assert!(descent.enter(c"..").is_err());
    }
}
