//! Names of one leaf: all but the first are told as links to that.

use crate::store::tree::{LeafId, Tree};

/// The first name of each leaf that has several. In a deep tree the paths of all would take a square of the memory.
pub struct Links<P> {
    counts: Vec<u32>,
    first: Vec<Option<P>>,
}

impl<P: Clone> Links<P> {
    pub fn of(tree: &Tree) -> Self {
        let counts = tree.links();
        Self {
            first: vec![None; counts.len()],
            counts,
        }
    }

    /// How many names a leaf has.
    pub fn count(&self, id: LeafId) -> u32 {
        self.counts[id.0 as usize]
    }

    /// The first name, if this is a further one. Else this is the first.
    pub fn first(&mut self, id: LeafId, name: &P) -> Option<P> {
        let first = &mut self.first[id.0 as usize];
        if first.is_none() && self.counts[id.0 as usize] > 1 {
            *first = Some(name.clone());
            return None;
        }
        first.clone()
    }
}
