//! Removing a folder with all that is in it, however deep it is and whatever a user left there.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, IFlags};
use rustix::io::Errno;

use super::disk::{self, Step};
use super::files;

/// Removes a file, or a folder with everything below it, however deep; nothing there is good.
///
/// Follows no symlink and holds few descriptors: a folder that is not empty is first moved up to the top one, so that
/// neither its depth nor the length of its path matters. A file that was made immutable is made removable. After a
/// failure, or when it is interrupted, it can be called again.
pub fn remove_all(path: &Path) -> io::Result<()> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the path has no last component");
    let name = path.file_name().ok_or_else(invalid)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = match disk::open_root(parent) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    Ok(remove_tree(&parent, name)?)
}

pub(super) fn remove_tree(at: impl AsFd, name: impl rustix::path::Arg) -> Result<(), Errno> {
    let name = name.into_c_str()?;
    let name: &CStr = &name;
    let unlink = || disk::unlink(Step::TreeUnlink, &at, name);
    let removed = match unlink() {
        // The flags of the folder that it is in are not ours to change.
        Err(Errno::PERM) => clear_entry(at.as_fd(), name).and_then(|()| unlink()),
        other => other,
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    let top = files::open_dir(&at, name)?;
    let mut moved = 0u64;
    let mut pending = vec![None::<CString>];
    while let Some(dir) = pending.pop() {
        match dir {
            None => empty_dir(&top, &top, &mut moved, &mut pending)?,
            Some(dir) => {
                empty_dir(&files::open_dir(&top, dir.as_c_str())?, &top, &mut moved, &mut pending)?;
                disk::rmdir(Step::TreeRmdir, &top, dir.as_c_str())?;
            }
        }
    }
    disk::rmdir(Step::TreeRmdir, &at, name)
}

/// Takes every name out of `dir`: removed, or as a folder that is not empty moved to `top` and noted in `pending`.
fn empty_dir(dir: &OwnedFd, top: &OwnedFd, moved: &mut u64, pending: &mut Vec<Option<CString>>) -> Result<(), Errno> {
    for (name, _) in files::names(dir)? {
        let name: &CStr = &name;
        let removed = mutably(dir, name, || match disk::unlink(Step::TreeUnlink, dir, name) {
            Err(Errno::ISDIR) => disk::rmdir(Step::TreeRmdir, dir, name),
            other => other,
        });
        match removed {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        // An earlier, interrupted removal may have used the name: then the next number is tried.
        loop {
            let target = CString::new(format!(".removing-{moved}")).map_err(|_| Errno::INVAL)?;
            *moved += 1;
            let rename = || disk::rename_new(Step::TreeMove, dir, name, top, &target);
            match mutably(dir, name, rename) {
                Ok(()) => {
                    pending.push(Some(target));
                    break;
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Does something to an entry; if that is not permitted, once more with the flags gone that forbid it.
fn mutably(dir: &OwnedFd, name: &CStr, act: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    match act() {
        Err(Errno::PERM) => {
            make_mutable(dir.as_fd(), name)?;
            act()
        }
        other => other,
    }
}

/// Takes the immutable and append-only flags (chattr(1) `+i` and `+a`) from an entry and from its folder.
fn make_mutable(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    clear(folder)?;
    clear_entry(folder, name)
}

fn clear_entry(folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    // Only these two can have the flags, and opening anything else may block.
    if kind.is_file() || kind.is_dir() {
        clear(disk::open_file(folder, name)?.as_fd())?;
    }
    Ok(())
}

fn clear(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = rustix::fs::ioctl_getflags(fd)?;
    let wanted = flags - (IFlags::IMMUTABLE | IFlags::APPEND);
    if wanted == flags {
        Ok(())
    } else {
        disk::set_flags(Step::TreeFlags, fd, wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
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
        fs::create_dir(root.join(".removing-0")).unwrap();
        fs::write(root.join(".removing-0/file"), "").unwrap();
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

    #[test]
    fn what_was_made_immutable_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("folder/full")).unwrap();
        for file in ["fixed", "folder/full/fixed"] {
            fs::write(root.join(file), "x").unwrap();
        }
        for path in ["fixed", "folder/full/fixed", "folder/full", "folder", ""] {
            let file = fs::File::open(root.join(path)).unwrap();
            let flags = rustix::fs::ioctl_getflags(&file).unwrap();
            rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE).unwrap();
        }
        assert!(fs::remove_file(root.join("fixed")).is_err());
        remove_all(&root).unwrap();
        assert!(!root.exists());
    }
}
