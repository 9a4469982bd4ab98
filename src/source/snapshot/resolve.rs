//! What lies in the upper folder of a layer means what the kernel's overlayfs document says, and what overlayfs itself
//! makes of it where that leaves something open (`fs/overlayfs/namei.c`):
//!
//! - A character device 0/0 is a deletion. All of them are one inode, and no hard links of each other.
//! - A folder shows the entries of a folder below besides its own: that of its name in what its parent shows, or the
//!   one that its `redirect` names, because it was moved. An absolute redirect is a path from the root, a relative one
//!   a name in what the parent shows. A folder that is `opaque` shows nothing below, whatever else it has.
//! - A file with `metacopy` has only metadata; its content is that of the file below that is found in the same way. Its
//!   own bytes read as zeros. Without `metacopy` a file's redirect is one that it has kept and means nothing.
//! - The other attributes `trusted.overlay.…` are the kernel's notes and not part of the tree; what a user called so
//!   has `trusted.overlay.overlay.…` there.
//!
//! Hard links are names of one inode of the upper folder. A name of an inode below that is not in the upper folder stays
//! a name of that inode; which of its names were copied up is not asked, as the kernel breaks the link then, too.
//!
//! overlayfs can also note deletions in attributes (`opaque` with the value `x`, `whiteout`). It does so in no upper
//! folder, and reads them there by halves; a snapshot refuses them.

use rustix::fs::{FileType, Stat};

use crate::layer::unescape;
use crate::layer::xattrs::Xattrs;
use crate::source::error::{FailureKind, shown};
use crate::source::read::{Place, Rules};
use crate::store::tree::{Dir, DirId, LeafKind, Meta, Node, Tree};

const OPAQUE: &str = "trusted.overlay.opaque";
const REDIRECT: &str = "trusted.overlay.redirect";
const METACOPY: &str = "trusted.overlay.metacopy";
const WHITEOUT: &str = "trusted.overlay.whiteout";

/// The rules of an upper folder over a tree that lies in the one under way.
pub(super) struct Upper {
    /// Where the root of the tree below is there.
    root: DirId,
}

impl Upper {
    /// The rules over a tree, and the tree to begin with: the same one with a new root, which shows nothing of it yet.
    pub fn over(mut base: Tree) -> (Upper, Tree) {
        let root = DirId(base.dirs.len() as u32);
        let above = Dir {
            meta: Meta::default(),
            entries: Vec::new(),
        };
        if let Some(first) = base.dirs.first_mut() {
            let below = std::mem::replace(first, above);
            base.dirs.push(below);
        }
        (Upper { root }, base)
    }

    /// What an entry of the upper folder is above.
    fn below(&self, tree: &Tree, at: Place, redirect: Option<&[u8]>) -> Option<Node> {
        match redirect {
            None => tree.lookup_in(at.below?, at.name),
            Some(redirect) => match redirect.strip_prefix(b"/") {
                None => tree.lookup_in(at.below?, redirect),
                Some(path) => {
                    let mut names = path.split(|byte| *byte == b'/');
                    names.try_fold(Node::Dir(self.root), |node, name| match node {
                        Node::Dir(dir) => tree.lookup_in(dir, name),
                        Node::Leaf(_) => None,
                    })
                }
            },
        }
    }
}

impl Rules for Upper {
    fn excludes(&self, _: &[u8]) -> bool {
        false
    }

    fn has_whiteouts(&self) -> bool {
        true
    }

    fn folder(&self, tree: &Tree, at: Option<Place>, xattrs: &mut Xattrs) -> Result<Option<DirId>, FailureKind> {
        let marks = Marks::take(xattrs);
        let opaque = match marks.opaque.as_deref() {
            None => false,
            Some(b"y") => true,
            Some(_) => return Err(strange(OPAQUE)),
        };
        let Some(at) = at else {
            // overlayfs neither hides nor moves what is below the root.
            return match (opaque, marks.redirect) {
                (true, _) => Err(strange(OPAQUE)),
                (_, Some(_)) => Err(strange(REDIRECT)),
                (false, None) => Ok(Some(self.root)),
            };
        };
        if opaque {
            return Ok(None);
        }
        match (self.below(tree, at, marks.redirect.as_deref()), marks.redirect) {
            (Some(Node::Dir(dir)), _) => Ok(Some(dir)),
            // One that is only here, or that is here instead of something else.
            (_, None) => Ok(None),
            (_, Some(redirect)) => Err(FailureKind::Below {
                attribute: REDIRECT,
                path: shown(&redirect),
            }),
        }
    }

    fn leaf(&self, tree: &Tree, at: Place, stat: &Stat, xattrs: &mut Xattrs) -> Result<Option<LeafKind>, FailureKind> {
        let marks = Marks::take(xattrs);
        if marks.whiteout {
            return Err(strange(WHITEOUT));
        }
        // What is no regular file has its own content, whatever its attributes (ovl_check_metacopy_xattr).
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let Some(metacopy) = marks.metacopy.filter(|_| is_file) else {
            return Ok(None);
        };
        // struct ovl_metacopy: version 0, its own length, flags, algorithm and digest of fs-verity. Before 6.6: empty.
        if !(metacopy.is_empty()
            || metacopy.len() >= 4 && metacopy[0] == 0 && usize::from(metacopy[1]) == metacopy.len())
        {
            return Err(strange(METACOPY));
        }
        let below = match self.below(tree, at, marks.redirect.as_deref()) {
            Some(Node::Leaf(leaf)) => Some(&tree.leaf(leaf).kind),
            _ => None,
        };
        match below {
            // overlayfs gives the file the length of the one below; it has another one as soon as it has data.
            Some(kind @ LeafKind::File { size, .. }) if i64::try_from(*size) == Ok(stat.st_size) => {
                Ok(Some(kind.clone()))
            }
            _ => Err(FailureKind::Below {
                attribute: METACOPY,
                path: shown(marks.redirect.as_deref().unwrap_or(at.name)),
            }),
        }
    }
}

fn strange(attribute: &str) -> FailureKind {
    FailureKind::Overlay {
        attribute: attribute.to_owned(),
    }
}

/// overlayfs's own attributes of an entry.
#[derive(Debug, Default)]
struct Marks {
    opaque: Option<Box<[u8]>>,
    redirect: Option<Box<[u8]>>,
    metacopy: Option<Box<[u8]>>,
    whiteout: bool,
}

impl Marks {
    /// Takes them out; those of the user get their own names back.
    fn take(xattrs: &mut Xattrs) -> Marks {
        let mut marks = Marks::default();
        if xattrs.is_empty() {
            return marks;
        }
        let mut kept = Xattrs::new();
        for (name, value) in std::mem::take(xattrs) {
            match (unescape(&name), std::str::from_utf8(&name)) {
                (Some(name), _) => kept.push((name.into(), value)),
                (None, Ok(OPAQUE)) => marks.opaque = Some(value),
                (None, Ok(REDIRECT)) => marks.redirect = Some(value),
                (None, Ok(METACOPY)) => marks.metacopy = Some(value),
                (None, Ok(WHITEOUT)) => marks.whiteout = true,
                (None, _) => {}
            }
        }
        *xattrs = kept;
        marks
    }
}
