//! Metadata of anything, its extended attributes too, without opening what must not be opened.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{Stat, fgetxattr, flistxattr, getxattr, listxattr};
use rustix::io::Errno;

use crate::store::tree::Meta;

/// The kernel's limit for a list of names and for a value (xattr(7)).
const LIMIT: usize = 65536;

/// SELinux labels belong to the node's policy, not to the tree.
const NOT_KEPT: &[u8] = b"security.selinux";

pub(crate) type Xattrs = Vec<(Box<[u8]>, Box<[u8]>)>;

/// What a tree keeps of an inode with this status and these attributes.
pub(crate) fn meta(stat: &Stat, xattrs: Xattrs) -> Meta {
    Meta {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        xattrs,
    }
}

/// Buffers to read attributes into, for one thread.
pub(crate) struct Buffers {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl Buffers {
    pub fn new() -> Self {
        Self {
            names: vec![0; LIMIT],
            value: vec![0; LIMIT],
        }
    }

    /// The attributes of an open file or folder, sorted by name. `ENODATA` if they changed meanwhile.
    pub fn of(&mut self, file: impl AsFd) -> Result<Xattrs, Errno> {
        let file = file.as_fd();
        self.read(
            |names| flistxattr(file, names),
            |name, value| fgetxattr(file, name, value),
        )
    }

    /// The same of a place (`O_PATH`), which may be a symlink.
    pub fn at(&mut self, place: impl AsFd) -> Result<Xattrs, Errno> {
        // The calls on descriptors refuse a place. This name leads to the inode itself, and no further if it is a link.
        let path = format!("/proc/self/fd/{}", place.as_fd().as_raw_fd());
        let path = &path[..];
        self.read(
            |names| listxattr(path, names),
            |name, value| getxattr(path, name, value),
        )
    }

    fn read(
        &mut self,
        list: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
        get: impl Fn(&[u8], &mut [u8]) -> Result<usize, Errno>,
    ) -> Result<Xattrs, Errno> {
        let length = match list(&mut self.names) {
            Ok(length) => length,
            // The file system has no attributes.
            Err(Errno::NOTSUP) => 0,
            Err(e) => return Err(e),
        };
        let mut found = Xattrs::new();
        for name in self.names[..length]
            .split(|b| *b == 0)
            .filter(|name| !name.is_empty() && *name != NOT_KEPT)
        {
            let length = get(name, &mut self.value)?;
            found.push((name.into(), self.value[..length].into()));
        }
        found.sort_unstable();
        Ok(found)
    }
}
