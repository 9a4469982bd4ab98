//! Extended attributes behind an inode.

use xxhash_rust::xxh32::xxh32;

use crate::store::Digest;
use crate::store::tree::Xattr;

/// Behind each name's prefix stands a number for it; no other prefix has one (`erofs_xattr_prefix` in the kernel).
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];
const TRUSTED: u8 = 4;
const HEADER: usize = 12;
/// What the count of 4-byte units of an inode can say.
const MOST: usize = 65_534 * 4;
/// `EROFS_XATTR_FILTER_SEED`
const FILTER_SEED: u32 = 0x25BB_E08F;

/// The attributes of an inode in their form on disk, one inode after the other.
#[derive(Default)]
pub(super) struct Xattrs {
    bytes: Vec<u8>,
    /// A bit is 0 where there is an attribute whose name has it for a hash.
    filter: u32,
}

impl Xattrs {
    pub fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.resize(HEADER, 0);
        self.filter = u32::MAX;
    }

    /// By which overlayfs takes the data of a file from the folder of contents.
    pub fn data_in(&mut self, digest: &Digest) {
        // Both are short, and so is the first of all there are.
        let _ = self.push(TRUSTED, b"overlay.metacopy", &[]);
        let path = [b"/", crate::store::object_name(digest).as_bytes()].concat();
        let _ = self.push(TRUSTED, b"overlay.redirect", &path);
    }

    /// Fails with why the format cannot hold it.
    pub fn add(&mut self, (name, value): &Xattr) -> Result<(), &'static str> {
        let prefix = |(number, prefix): &(u8, &'static [u8])| Some((*number, name.strip_prefix(*prefix)?));
        let Some((number, rest)) = PREFIXES.iter().find_map(prefix) else {
            return Err("an attribute that is neither user, trusted nor security, nor an ACL, cannot be shown");
        };
        // Those of ACLs are whole names.
        if matches!(number, 2 | 3) != rest.is_empty() {
            return Err("the name of an attribute ends with its prefix, or does not where it should");
        }
        match number == TRUSTED && rest.starts_with(b"overlay.") {
            // Overlayfs would take it for its own; it shows the escaped one under its own name.
            true => self.push(number, &[b"overlay.", rest].concat(), value),
            false => self.push(number, rest, value),
        }
    }

    fn push(&mut self, prefix: u8, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let (Ok(name_length), Ok(value_length)) = (u8::try_from(name.len()), u16::try_from(value.len())) else {
            return Err("an attribute's name has at most 255 bytes, its value 65535");
        };
        self.bytes.push(name_length);
        self.bytes.push(prefix);
        self.bytes.extend(value_length.to_le_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        if self.bytes.len() - HEADER > MOST {
            return Err("the attributes of an inode have at most 262136 bytes together");
        }
        let bit = xxh32(name, FILTER_SEED.wrapping_add(u32::from(prefix))) % 32;
        self.filter &= !(1 << bit);
        self.bytes[..4].copy_from_slice(&self.filter.to_le_bytes());
        Ok(())
    }

    /// Bytes on disk: none without an attribute.
    pub fn bytes(&self) -> &[u8] {
        match self.bytes.len() {
            HEADER => &[],
            _ => &self.bytes,
        }
    }

    pub fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// What the inode says of their length.
    pub fn units(&self) -> u16 {
        match self.bytes.len() - HEADER {
            0 => 0,
            length => (length / 4 + 1) as u16,
        }
    }
}
