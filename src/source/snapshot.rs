//! A layer as a tree: what was changed in it, over the tree below.
//!
//! Only the changes are read; what was not touched comes from the manifest of the tree below. The meaning of what lies
//! in an upper folder is that of the kernel's overlayfs document: character devices 0/0 are deletions, and
//! `trusted.overlay.opaque` on a folder hides what lies below it.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::error::{Error, FailureKind};
use super::read::{Reading, Rules, read};
use super::xattrs::Xattrs;
use crate::layer::{LayerId, Layers, own, unescape};
use crate::store::tree::{DirId, LeafId, Node, Tree};
use crate::store::{self, Build};

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// What larder's own mounts never make, and what changes an entry's meaning: where else its name or its data is.
const UNRESOLVED: [&[u8]; 2] = [b"trusted.overlay.redirect", b"trusted.overlay.metacopy"];

/// Reads the layer's tree as it is now, and its new contents into a build. The layer stays in use meanwhile; what
/// changes while it is read is read again.
///
/// # Errors
/// As [`super::scan`], and those of [`Layers::upper`].
pub fn snapshot(layers: &Layers, id: &LayerId, build: &Build, cancel: &AtomicBool) -> Result<Tree, Error> {
    let upper = layers.upper(id)?;
    // Until the build is published, also when the layer is released before.
    build.keep(&upper.record.tree)?;
    let mut base = layers.store().load(&upper.record.tree)?;
    if let Some(ids) = upper.record.ids {
        own(&mut base, ids);
    }
    let io = |source: rustix::io::Errno| Error::io("sync", "the layer".as_ref(), source);
    rustix::fs::syncfs(&upper.folder).map_err(io)?;
    let folder: OwnedFd = upper
        .folder
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| Error::io("open", "the layer".as_ref(), source))?;
    let reading = Reading {
        build,
        cancel,
        store: None,
        known: None,
        progress: &AtomicU64::new(0),
    };
    let rules = || Over {
        base: &base,
        leaves: HashMap::new(),
    };
    Ok(read(&folder, rules, &reading)?.0)
}

struct Over<'a> {
    base: &'a Tree,
    /// Leaves of the base that have a place in the result, so that hard links among them stay together.
    leaves: HashMap<LeafId, LeafId>,
}

impl Rules for Over<'_> {
    fn excludes(&self, _: &[u8]) -> bool {
        false
    }

    fn has_whiteouts(&self) -> bool {
        true
    }

    fn take_marks(&self, xattrs: &mut Xattrs) -> Result<bool, FailureKind> {
        let mut opaque = false;
        for (name, value) in xattrs.iter() {
            let unresolved = UNRESOLVED.contains(&&**name) || (**name == *OPAQUE && **value != *b"y");
            if unresolved {
                return Err(FailureKind::Overlay {
                    attribute: String::from_utf8_lossy(name).into_owned(),
                });
            }
            opaque |= **name == *OPAQUE;
        }
        let kept = std::mem::take(xattrs).into_iter();
        *xattrs = kept
            .filter_map(|(name, value)| Some((unescape(&name)?.into(), value)))
            .collect();
        Ok(opaque)
    }

    fn below_root(&self) -> Option<DirId> {
        Some(Tree::ROOT)
    }

    fn below(&self, parent: DirId, name: &[u8]) -> Option<DirId> {
        match self.base.lookup_in(parent, name) {
            Some(Node::Dir(dir)) => Some(dir),
            _ => None,
        }
    }

    fn merge(&mut self, tree: &mut Tree, below: DirId, dir: DirId, hidden: &[CString]) -> Result<(), store::Error> {
        let mut folders = Vec::new();
        for entry in &self.base.dir(below).entries {
            if hidden
                .binary_search_by(|name| name.to_bytes().cmp(&entry.name))
                .is_err()
            {
                self.copy(tree, dir, &entry.name, entry.node, &mut folders)?;
            }
        }
        while let Some((below, dir)) = folders.pop() {
            for entry in &self.base.dir(below).entries {
                self.copy(tree, dir, &entry.name, entry.node, &mut folders)?;
            }
        }
        Ok(())
    }
}

impl Over<'_> {
    /// Copies one entry of the base; what is in a folder comes later.
    fn copy(
        &mut self,
        tree: &mut Tree,
        dir: DirId,
        name: &[u8],
        node: Node,
        folders: &mut Vec<(DirId, DirId)>,
    ) -> Result<(), store::Error> {
        match node {
            Node::Dir(below) => {
                let copy = tree.add_dir(dir, name, self.base.dir(below).meta.clone())?;
                folders.push((below, copy));
            }
            Node::Leaf(leaf) => match self.leaves.get(&leaf) {
                Some(copy) => tree.add_link(dir, name, *copy)?,
                None => {
                    let copy = tree.add_leaf(dir, name, self.base.leaf(leaf).clone())?;
                    self.leaves.insert(leaf, copy);
                }
            },
        }
        Ok(())
    }
}
