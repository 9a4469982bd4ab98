//! Looking into a tree.

use super::check::{self, Content};
use super::{Dir, DirId, InvalidTree, Leaf, LeafId, LeafKind, Node, Tree};
use crate::store::Digest;

/// Counts and sizes of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Names of regular files.
    pub files: u64,
    /// Names of every type, without the root.
    pub entries: u64,
    /// Bytes of all regular files; a hard-linked file counts once, as in `du --apparent-size`.
    pub logical: u64,
    /// Bytes of the distinct contents: what a store with nothing in it would take.
    pub distinct: u64,
}

/// Visits every entry before those below it, in the order of the names. Made by [`Tree::walk`].
///
/// Not an `Iterator`, because the path is lent.
pub struct Walk<'a> {
    tree: &'a Tree,
    /// Folder, next entry, length of the folder's path.
    stack: Vec<(DirId, usize, usize)>,
    path: Vec<u8>,
    started: bool,
}

impl<'a> Walk<'a> {
    /// The next path, relative to the root and without a leading slash, and what is there. The root comes first,
    /// with an empty path.
    #[allow(clippy::should_implement_trait)] // A lending `next` is what it is.
    pub fn next(&mut self) -> Option<(&[u8], Node)> {
        if !self.started {
            self.started = true;
            self.tree.dirs.first()?;
            self.stack.push((Tree::ROOT, 0, 0));
            return Some((&[], Node::Dir(Tree::ROOT)));
        }
        loop {
            let (dir, index, length) = self.stack.last_mut()?;
            self.path.truncate(*length);
            let Some(entry) = self.tree.dir(*dir).entries.get(*index) else {
                self.stack.pop();
                continue;
            };
            *index += 1;
            if *length > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&entry.name);
            if let Node::Dir(id) = entry.node {
                self.stack.push((id, 0, self.path.len()));
            }
            return Some((&self.path, entry.node));
        }
    }
}

impl Leaf {
    /// Digest and size of a regular file's content.
    pub fn content(&self) -> Option<(&Digest, u64)> {
        match &self.kind {
            LeafKind::File { digest, size } => Some((digest, *size)),
            _ => None,
        }
    }
}

impl Tree {
    /// The folder with that number. Panics if the number is not of this tree.
    pub fn dir(&self, id: DirId) -> &Dir {
        &self.dirs[id.0 as usize]
    }

    /// The leaf with that number. Panics if the number is not of this tree.
    pub fn leaf(&self, id: LeafId) -> &Leaf {
        &self.leaves[id.0 as usize]
    }

    /// What a path below the root stands for. Empty parts are passed over, so that `/a//b/` is `a/b`; symlinks are not
    /// followed. Needs sorted names.
    pub fn lookup(&self, path: &[u8]) -> Option<Node> {
        let mut node = Node::Dir(Self::ROOT);
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let Node::Dir(dir) = node else { return None };
            node = self.lookup_in(dir, name)?;
        }
        Some(node)
    }

    /// What a name in one folder stands for. Needs sorted names.
    pub fn lookup_in(&self, dir: DirId, name: &[u8]) -> Option<Node> {
        let entries = &self.dir(dir).entries;
        let index = entries.binary_search_by(|entry| (*entry.name).cmp(name)).ok()?;
        Some(entries[index].node)
    }

    /// How many names each leaf has.
    pub fn links(&self) -> Vec<u32> {
        let mut links = vec![0u32; self.leaves.len()];
        for entry in self.dirs.iter().flat_map(|dir| &dir.entries) {
            if let Node::Leaf(id) = entry.node {
                links[id.0 as usize] = links[id.0 as usize].saturating_add(1);
            }
        }
        links
    }

    /// Visits every entry. The tree must be one (a finished, decoded or loaded one is).
    pub fn walk(&self) -> Walk<'_> {
        Walk {
            tree: self,
            stack: Vec::new(),
            path: Vec::new(),
            started: false,
        }
    }

    /// Counts and sizes. The tree must be a finished, decoded or loaded one.
    pub fn stats(&self) -> Stats {
        self.stats_of(&self.sorted_contents())
    }

    /// As [`Tree::stats`], with what [`Tree::sorted_contents`] gives.
    pub(crate) fn stats_of(&self, contents: &[Content]) -> Stats {
        let mut stats = Stats::default();
        for entry in self.dirs.iter().flat_map(|dir| &dir.entries) {
            stats.entries += 1;
            if let Node::Leaf(id) = entry.node
                && matches!(self.leaf(id).kind, LeafKind::File { .. })
            {
                stats.files += 1;
            }
        }
        for content in contents {
            let all = content.size.saturating_mul(content.leaves);
            stats.logical = stats.logical.saturating_add(all);
            stats.distinct = stats.distinct.saturating_add(content.size);
        }
        stats
    }

    /// The contents of all leaves, sorted, each once.
    pub(crate) fn sorted_contents(&self) -> Vec<Content<'_>> {
        check::contents(self.leaves.iter())
    }

    /// Fails if a digest has two sizes, in what [`Tree::sorted_contents`] gives.
    pub(crate) fn check_sizes(contents: &[Content]) -> Result<(), InvalidTree> {
        Ok(check::sizes(contents)?)
    }

    /// Digest and size of every regular file, repeated where contents are equal; a hard-linked file comes once.
    pub fn contents(&self) -> impl Iterator<Item = (&Digest, u64)> {
        self.leaves.iter().filter_map(Leaf::content)
    }
}
