//! Going through a tree in the order of its manifest, and checking on the way all that makes it valid but the sizes.

use super::{Dir, DirId, InvalidTree, Leaf, LeafId, Node, Tree, check};

/// What is met.
pub(super) enum Met<'a> {
    /// The first.
    Root { dir: &'a Dir },
    /// A folder; what is in it follows.
    Dir { name: &'a [u8], id: DirId, dir: &'a Dir },
    /// The first name of a leaf.
    Leaf { name: &'a [u8], id: LeafId, leaf: &'a Leaf },
    /// Another name of the leaf that was met as that one, counted from 0.
    Link { name: &'a [u8], ordinal: u32 },
}

/// A folder that was begun: which, and how many of its entries were met.
struct Open {
    dir: DirId,
    done: usize,
}

/// Shows every entry to `show`, until that fails. Returns for each leaf as which one it was met; `None`: it has no name.
///
/// Fails if the tree is not valid (a bad or unsorted name, a folder with two names, …). That each digest has one size is
/// not checked.
pub(super) fn in_order<'a, E: From<InvalidTree>>(
    tree: &'a Tree,
    mut show: impl FnMut(Met<'a>) -> Result<(), E>,
) -> Result<Vec<Option<u32>>, E> {
    let dir = tree
        .dirs
        .first()
        .ok_or_else(|| InvalidTree::new(*b"", "there is no root folder"))?;
    let mut dirs_met = vec![false; tree.dirs.len()];
    let mut ordinals = vec![None; tree.leaves.len()];
    let mut leaves = 0u32;

    check::meta(&dir.meta).map_err(|what| InvalidTree::new(*b"", what))?;
    dirs_met[0] = true;
    show(Met::Root { dir })?;

    let mut stack = vec![Open { dir: DirId(0), done: 0 }];
    while let Some(open) = stack.last_mut() {
        let entries = &tree.dirs[open.dir.0 as usize].entries;
        let Some(entry) = entries.get(open.done) else {
            stack.pop();
            continue;
        };
        let previous = open.done.checked_sub(1).map(|i| &entries[i].name);
        let sorted = previous.is_none_or(|name| **name < *entry.name);
        open.done += 1;
        let invalid = |stack: &[Open], what: &'static str| InvalidTree::new(path(tree, stack), what);

        let name: &[u8] = &entry.name;
        check::name(name).map_err(|what| invalid(&stack, what))?;
        if !sorted {
            return Err(invalid(&stack, "the names are not sorted by their bytes, or one is there twice").into());
        }
        match entry.node {
            Node::Dir(id) => {
                let (Some(dir), Some(met)) = (tree.dirs.get(id.0 as usize), dirs_met.get_mut(id.0 as usize)) else {
                    return Err(invalid(&stack, "the entry stands for a folder that does not exist").into());
                };
                if std::mem::replace(met, true) {
                    return Err(invalid(&stack, "the folder has two names").into());
                }
                check::meta(&dir.meta).map_err(|what| invalid(&stack, what))?;
                show(Met::Dir { name, id, dir })?;
                stack.push(Open { dir: id, done: 0 });
            }
            Node::Leaf(id) => {
                let (Some(leaf), Some(ordinal)) = (tree.leaves.get(id.0 as usize), ordinals.get_mut(id.0 as usize))
                else {
                    return Err(invalid(&stack, "the entry stands for a leaf that does not exist").into());
                };
                if let Some(ordinal) = *ordinal {
                    show(Met::Link { name, ordinal })?;
                } else {
                    check::meta(&leaf.meta).map_err(|what| invalid(&stack, what))?;
                    check::kind(&leaf.kind).map_err(|what| invalid(&stack, what))?;
                    *ordinal = Some(leaves);
                    leaves += 1;
                    show(Met::Leaf { name, id, leaf })?;
                }
            }
        }
    }
    Ok(ordinals)
}

/// The path of the entry that was looked at last, for a message.
fn path(tree: &Tree, stack: &[Open]) -> Vec<u8> {
    let names = stack
        .iter()
        .filter_map(|open| tree.dirs[open.dir.0 as usize].entries.get(open.done.wrapping_sub(1)));
    names.map(|entry| &*entry.name).collect::<Vec<_>>().join(&b'/')
}
