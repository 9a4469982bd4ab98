//! Every tree that is stored or that a ref names, and by which refs: where a pass over all manifests begins.

use std::collections::BTreeMap;

use super::layout::Folder;
use super::{Error, Problem, TreeDigest, gc};

/// Who needs a tree. The first that applies counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Current,
    History,
    Unnamed,
}

/// Ordered by what it is used for, then by the names of its refs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stored {
    pub class: Class,
    /// Refs that stand for it now, sorted.
    pub current_of: Vec<String>,
    /// Refs in whose history it is, sorted.
    pub history_of: Vec<String>,
    pub tree: TreeDigest,
}

pub(super) struct AllStored {
    /// The names of the refs that could be read, sorted.
    pub refs: Vec<String>,
    pub unreadable: Vec<Problem>,
    /// Sorted. Also those that refs name and that are not there.
    pub trees: Vec<Stored>,
}

/// With no collection running, what a ref names and is not there is missing. Else it may have gone since the ref was
/// read.
pub(super) fn all(store: &Folder) -> Result<AllStored, Error> {
    let refs = store.refs()?;
    let mut names: Vec<String> = Vec::with_capacity(refs.refs.len());
    let mut trees: BTreeMap<TreeDigest, (Vec<String>, Vec<String>)> = BTreeMap::new();
    // After the refs: a publish names its manifest before its ref.
    for manifest in gc::stored_manifests(store)? {
        trees.entry(manifest.tree).or_default();
    }
    for entry in &refs.refs {
        let name = entry.name.to_string();
        if let Some(current) = &entry.current {
            trees.entry(current.digest).or_default().0.push(name.clone());
        }
        for old in &entry.history {
            let history = &mut trees.entry(old.revision.digest).or_default().1;
            // A history may have one tree more than once.
            if history.last() != Some(&name) {
                history.push(name.clone());
            }
        }
        names.push(name);
    }
    names.sort_unstable();
    let stored = |(tree, (current_of, history_of)): (TreeDigest, (Vec<String>, Vec<String>))| Stored {
        class: match (current_of.is_empty(), history_of.is_empty()) {
            (false, _) => Class::Current,
            (true, false) => Class::History,
            (true, true) => Class::Unnamed,
        },
        current_of,
        history_of,
        tree,
    };
    let mut trees: Vec<Stored> = trees.into_iter().map(stored).collect();
    trees.sort_unstable();
    Ok(AllStored {
        refs: names,
        unreadable: refs.unreadable,
        trees,
    })
}
