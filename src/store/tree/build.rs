//! Making a tree.

use super::order::{Met, in_order};
use super::{Dir, DirId, Entry, InvalidTree, Leaf, LeafId, Meta, Name, Node, Tree};

const NONE: u32 = u32::MAX;

impl Tree {
    /// The root folder of every tree.
    pub const ROOT: DirId = DirId(0);

    /// A tree that is an empty root folder.
    pub fn new(meta: Meta) -> Tree {
        Tree {
            dirs: vec![Dir {
                meta,
                entries: Vec::new(),
            }],
            leaves: Vec::new(),
        }
    }

    /// Adds an empty folder to `parent`. Names may come in any order: [`Tree::finish`] sorts and checks them.
    ///
    /// Fails if there are 2^32-1 folders already, or `parent` does not exist.
    pub fn add_dir(&mut self, parent: DirId, name: impl Into<Name>, meta: Meta) -> Result<DirId, InvalidTree> {
        let name = name.into();
        let id = DirId(next(self.dirs.len(), &name)?);
        self.add_entry(parent, name, Node::Dir(id))?;
        self.dirs.push(Dir {
            meta,
            entries: Vec::new(),
        });
        Ok(id)
    }

    /// Adds a leaf to `parent`. Fails as [`Tree::add_dir`] does.
    pub fn add_leaf(&mut self, parent: DirId, name: impl Into<Name>, leaf: Leaf) -> Result<LeafId, InvalidTree> {
        let name = name.into();
        let id = LeafId(next(self.leaves.len(), &name)?);
        self.add_entry(parent, name, Node::Leaf(id))?;
        self.leaves.push(leaf);
        Ok(id)
    }

    /// Gives a leaf of this tree a further name (a hard link). Fails if `parent` or `leaf` does not exist.
    pub fn add_link(&mut self, parent: DirId, name: impl Into<Name>, leaf: LeafId) -> Result<(), InvalidTree> {
        let name = name.into();
        if leaf.0 as usize >= self.leaves.len() {
            return Err(InvalidTree::new(
                &*name,
                "a further name for a leaf that does not exist",
            ));
        }
        self.add_entry(parent, name, Node::Leaf(leaf))
    }

    fn add_entry(&mut self, parent: DirId, name: Name, node: Node) -> Result<(), InvalidTree> {
        match self.dirs.get_mut(parent.0 as usize) {
            Some(dir) => {
                dir.entries.push(Entry { name, node });
                Ok(())
            }
            None => Err(InvalidTree::new(&*name, "an entry for a folder that does not exist")),
        }
    }

    /// Sorts names and extended attributes, leaves out what no name reaches, numbers folders and leaves in the order
    /// of the manifest, and checks the whole tree, but for what only encoding and publishing it checks: that each digest
    /// has one size. Two finished trees are equal (`==`) exactly if their manifests are.
    pub fn finish(self) -> Result<Tree, InvalidTree> {
        self.finish_and_tell().map(|(tree, _)| tree)
    }

    /// As [`Tree::finish`]; also tells the former number of each leaf, in their new order.
    pub(crate) fn finish_and_tell(mut self) -> Result<(Tree, Vec<u32>), InvalidTree> {
        for dir in &mut self.dirs {
            dir.entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            dir.meta.xattrs.sort_unstable();
        }
        for leaf in &mut self.leaves {
            leaf.meta.xattrs.sort_unstable();
        }
        let (mut dirs, mut leaves) = (vec![0], Vec::with_capacity(self.leaves.len()));
        let ordinals = in_order(&self, |met| {
            match met {
                Met::Dir { id, .. } => dirs.push(id.0),
                Met::Leaf { id, .. } => leaves.push(id.0),
                Met::Root { .. } | Met::Link { .. } => {}
            }
            Ok::<_, InvalidTree>(())
        })?;
        let mut numbers = vec![NONE; self.dirs.len()];
        for (new, old) in dirs.iter().enumerate() {
            numbers[*old as usize] = new as u32;
        }
        reorder(&mut self.dirs, &dirs);
        reorder(&mut self.leaves, &leaves);
        for entry in self.dirs.iter_mut().flat_map(|dir| &mut dir.entries) {
            entry.node = match entry.node {
                Node::Dir(old) => Node::Dir(DirId(numbers[old.0 as usize])),
                // What a folder with a name names has one.
                Node::Leaf(old) => Node::Leaf(LeafId(ordinals[old.0 as usize].unwrap_or(NONE))),
            };
        }
        Ok((self, leaves))
    }
}

/// Makes what was item `order[i]` item `i`, in place: a second copy of a large tree's leaves is what would take most
/// memory. What `order` does not name goes; it names nothing twice.
pub(crate) fn reorder<T>(items: &mut Vec<T>, order: &[u32]) {
    // Completed to a permutation, which is cycles; each is gone along once.
    let mut named = vec![false; items.len()];
    for old in order {
        named[*old as usize] = true;
    }
    let rest = (0..items.len() as u32).filter(|old| !named[*old as usize]);
    let mut from: Vec<u32> = order.iter().copied().chain(rest).collect();
    for start in 0..items.len() {
        let mut at = start;
        loop {
            let next = std::mem::replace(&mut from[at], at as u32) as usize;
            if next == start {
                break;
            }
            items.swap(at, next);
            at = next;
        }
    }
    items.truncate(order.len());
}

fn next(count: usize, name: &[u8]) -> Result<u32, InvalidTree> {
    match u32::try_from(count) {
        Ok(id) if id != NONE => Ok(id),
        _ => Err(InvalidTree::new(name, "the tree has 2^32-1 folders or leaves already")),
    }
}
