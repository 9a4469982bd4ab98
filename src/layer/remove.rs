//! Removing a folder with all that is in it, however deep it is and whatever a user left there.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::descent::names;

/// Removes `path` and what is below it; a missing one is no error. Follows no link.
///
/// No folder is descended into: a folder in a folder is first moved to the top, so that neither the depth of the tree
/// nor the length of its paths matters, and three descriptors suffice. A file that was made immutable is made
/// removable. After a failure, or when it is interrupted, it can be called again.
pub(crate) fn remove_all(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match openat(CWD, path, flags, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(unlinkat(CWD, path, AtFlags::empty())?),
        Err(e) => return Err(e.into()),
    };
    let mut moved: u64 = 0;
    loop {
        let mut any = false;
        for name in names(top.as_fd())? {
            any = true;
            match remove_entry(top.as_fd(), &name)? {
                Removed::Done => {}
                Removed::FullFolder => {
                    let folder = openat(&top, &name, flags, Mode::empty())?;
                    empty(&top, folder, &mut moved)?;
                    remove_entry(top.as_fd(), &name)?;
                }
            }
        }
        if !any {
            break;
        }
    }
    drop(top);
    Ok(unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

/// Takes everything out of a folder: files are removed, folders that are not empty go to `top`.
fn empty(top: &OwnedFd, folder: OwnedFd, moved: &mut u64) -> io::Result<()> {
    for name in names(folder.as_fd())? {
        if matches!(remove_entry(folder.as_fd(), &name)?, Removed::FullFolder) {
            loop {
                let aside = format!(".removed-{moved}");
                *moved += 1;
                // An earlier, interrupted removal may have used the name: a folder that is not empty is not replaced.
                match renameat(&folder, &name, top, &aside) {
                    Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                    Err(Errno::PERM) => make_mutable(folder.as_fd(), &name)?,
                    other => break other?,
                }
            }
        }
    }
    Ok(())
}

enum Removed {
    Done,
    FullFolder,
}

fn remove_entry(folder: BorrowedFd<'_>, name: &CString) -> io::Result<Removed> {
    let mut tried = false;
    loop {
        let error = match unlinkat(folder, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => match unlinkat(folder, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Removed::FullFolder),
                other => other,
            },
            other => other,
        };
        match error {
            Ok(()) | Err(Errno::NOENT) => return Ok(Removed::Done),
            Err(Errno::PERM) if !tried => {
                tried = true;
                make_mutable(folder, name)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Takes the immutable and append-only flags (chattr(1) `+i` and `+a`) from an entry and from its folder.
fn make_mutable(folder: BorrowedFd<'_>, name: &CString) -> io::Result<()> {
    let clear = |fd: BorrowedFd<'_>| -> rustix::io::Result<()> {
        let flags = rustix::fs::ioctl_getflags(fd)?;
        let wanted = flags - (IFlags::IMMUTABLE | IFlags::APPEND);
        if wanted == flags {
            Ok(())
        } else {
            rustix::fs::ioctl_setflags(fd, wanted)
        }
    };
    clear(folder)?;
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    // Only these two can have the flags, and opening anything else may block.
    if kind.is_file() || kind.is_dir() {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        clear(openat(folder, name, flags, Mode::empty())?.as_fd())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mkdirat;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_deeper_than_any_path_is_removed_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "x").unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        fs::create_dir(root.join(".removed-0")).unwrap();
        fs::write(root.join(".removed-0/file"), "").unwrap();
        let mut folder = openat(CWD, &root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let name = "n".repeat(200);
        for _ in 0..2000 {
            for name in [&name[..], "empty"] {
                mkdirat(&folder, name, Mode::RWXU).unwrap();
            }
            drop(openat(&folder, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap());
            folder = openat(&folder, &name[..], OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        drop(folder);
        remove_all(&root).unwrap();
        assert!(!root.exists());
        assert_eq!(fs::read(outside.join("kept")).unwrap(), b"x");
        remove_all(&root).unwrap();
    }
}
