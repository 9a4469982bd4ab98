//! The names in a folder, in their form on disk: blocks, each with its names' numbers and types first, then the names.

use super::{BLOCK, Kind};

/// Bytes of a name's entry, without the name.
const ENTRY: usize = 12;

/// The names of a folder while they are read.
#[derive(Default)]
pub(super) struct Names {
    text: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    length: u8,
    kind: u8,
    nid: u64,
}

/// All names of a folder, in their order.
pub(super) struct Laid {
    names: Names,
    /// The entries of each block.
    blocks: Vec<std::ops::Range<usize>>,
    size: usize,
}

impl Names {
    /// `false` if there is no room for it: a name has at most 255 bytes, all together have at most 4 GiB.
    #[must_use]
    pub fn add(&mut self, name: &[u8], kind: u8, nid: u64) -> bool {
        let (Ok(start), Ok(length)) = (u32::try_from(self.text.len()), u8::try_from(name.len())) else {
            return false;
        };
        self.text.extend_from_slice(name);
        self.entries.push(Entry {
            start,
            length,
            kind,
            nid,
        });
        true
    }

    fn of(&self, entry: &Entry) -> &[u8] {
        &self.text[entry.start as usize..][..usize::from(entry.length)]
    }

    /// Adds `.` and `..`, sorts by the names' bytes, and divides into blocks.
    pub fn lay(mut self) -> Laid {
        for name in [&b"."[..], b".."] {
            // Room for these is always left.
            let _ = self.add(name, Kind::Folder as u8, 0);
        }
        let mut entries = std::mem::take(&mut self.entries);
        // As good as sorted: the manifest has them in this order, and these two come somewhere between.
        entries.sort_by(|a, b| self.of(a).cmp(self.of(b)));
        self.entries = entries;
        let mut blocks = Vec::new();
        let (mut begin, mut size) = (0, 0);
        for (at, entry) in self.entries.iter().enumerate() {
            let length = ENTRY + usize::from(entry.length);
            if size + length > BLOCK as usize {
                blocks.push(begin..at);
                (begin, size) = (at, 0);
            }
            size += length;
        }
        let size = blocks.len() * BLOCK as usize + size;
        blocks.push(begin..self.entries.len());
        Laid {
            names: self,
            blocks,
            size,
        }
    }
}

impl Laid {
    /// Bytes on disk, up to the end of the last name.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// The bytes, with the folder's own number for `.` and 0 for `..`; and where in them that is.
    pub fn bytes(&self, own: u64) -> (Vec<u8>, u64) {
        let mut bytes = Vec::with_capacity(self.size);
        let mut parent_at = 0;
        for (number, block) in self.blocks.iter().enumerate() {
            bytes.resize(number * BLOCK as usize, 0);
            let entries = &self.names.entries[block.clone()];
            let mut name_at = ENTRY * entries.len();
            for entry in entries {
                let nid = match self.names.of(entry) {
                    b"." => own,
                    b".." => {
                        parent_at = bytes.len() as u64;
                        0
                    }
                    _ => entry.nid,
                };
                bytes.extend(nid.to_le_bytes());
                bytes.extend((name_at as u16).to_le_bytes());
                bytes.extend([entry.kind, 0]);
                name_at += usize::from(entry.length);
            }
            for entry in entries {
                bytes.extend_from_slice(self.names.of(entry));
            }
        }
        (bytes, parent_at)
    }
}
