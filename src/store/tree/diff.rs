//! What is different between two trees.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::{LeafId, LeafKind, Meta, Node, Tree};

/// One path that is not the same in both trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Relative to the root; empty for the root itself.
    pub path: Vec<u8>,
    pub change: Change,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Only the second tree has it.
    Added,
    /// Only the first tree has it.
    Removed,
    /// Both have it; what of it is different is never empty.
    Changed(Vec<What>),
}

/// A part of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// A folder, file, symlink, device, …; then content, target and device are not compared.
    Type,
    /// The bytes of a file.
    Content,
    /// Where a symlink leads.
    Target,
    /// Numbers of a device.
    Device,
    Mode,
    Owner,
    Mtime,
    Xattrs,
    /// Which other names the inode has.
    Links,
}

/// Every path that is not the same in both trees, in the order of a walk. Empty exactly if the trees are equal.
/// What is below a folder that was added or removed is listed too.
pub fn diff(a: &Tree, b: &Tree) -> Vec<Difference> {
    let (a_links, b_links) = (first_names(a), first_names(b));
    let (mut a_walk, mut b_walk) = (a.walk(), b.walk());
    let own = |next: Option<(&[u8], Node)>| next.map(|(path, node)| (path.to_vec(), node));
    let (mut left, mut right) = (own(a_walk.next()), own(b_walk.next()));
    let mut found = Vec::new();
    loop {
        let order = match (&left, &right) {
            (None, None) => return found,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => in_walk(a, b),
        };
        let change = match (order, &left, &right) {
            (Ordering::Less, ..) => Some(Change::Removed),
            (Ordering::Greater, ..) => Some(Change::Added),
            (Ordering::Equal, Some((path, in_a)), Some((_, in_b))) => {
                let mut what = compare(a, *in_a, b, *in_b);
                if let (Node::Leaf(in_a), Node::Leaf(in_b)) = (in_a, in_b) {
                    let first = |links: &HashMap<LeafId, Vec<u8>>, leaf| links.get(leaf).unwrap_or(path).clone();
                    if first(&a_links, in_a) != first(&b_links, in_b) {
                        what.push(What::Links);
                    }
                }
                (!what.is_empty()).then_some(Change::Changed(what))
            }
            (Ordering::Equal, ..) => None,
        };
        let path = if order == Ordering::Greater { &right } else { &left };
        if let (Some(change), Some((path, _))) = (change, path) {
            let path = path.clone();
            found.push(Difference { path, change });
        }
        if order != Ordering::Greater {
            left = own(a_walk.next());
        }
        if order != Ordering::Less {
            right = own(b_walk.next());
        }
    }
}

/// The order of a walk: a folder, all that is in it, then the next name.
fn in_walk(a: &[u8], b: &[u8]) -> Ordering {
    // The root comes before everything; as a path it is one empty name, which is less than any other.
    a.split(|byte| *byte == b'/').cmp(b.split(|byte| *byte == b'/'))
}

/// The first name of each leaf that has several.
fn first_names(tree: &Tree) -> HashMap<LeafId, Vec<u8>> {
    let mut names = vec![0u8; tree.leaves.len()];
    for entry in tree.dirs.iter().flat_map(|dir| &dir.entries) {
        if let Node::Leaf(id) = entry.node {
            let count = &mut names[id.0 as usize];
            *count = count.saturating_add(1);
        }
    }
    let mut first = HashMap::new();
    if names.iter().all(|count| *count < 2) {
        return first;
    }
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        if let Node::Leaf(id) = node
            && names[id.0 as usize] > 1
        {
            first.entry(id).or_insert_with(|| path.to_vec());
        }
    }
    first
}

fn compare(a: &Tree, in_a: Node, b: &Tree, in_b: Node) -> Vec<What> {
    let mut what = Vec::new();
    let (a_meta, b_meta) = (meta(a, in_a), meta(b, in_b));
    match (in_a, in_b) {
        (Node::Dir(_), Node::Dir(_)) => {}
        (Node::Leaf(in_a), Node::Leaf(in_b)) => {
            let (a, b) = (&a.leaf(in_a).kind, &b.leaf(in_b).kind);
            if std::mem::discriminant(a) != std::mem::discriminant(b) {
                what.push(What::Type);
            } else if a != b {
                what.push(match a {
                    LeafKind::File { .. } => What::Content,
                    LeafKind::Symlink(_) => What::Target,
                    _ => What::Device,
                });
            }
        }
        _ => what.push(What::Type),
    }
    let parts = [
        (a_meta.mode != b_meta.mode, What::Mode),
        ((a_meta.uid, a_meta.gid) != (b_meta.uid, b_meta.gid), What::Owner),
        (a_meta.mtime != b_meta.mtime, What::Mtime),
        (a_meta.xattrs != b_meta.xattrs, What::Xattrs),
    ];
    what.extend(parts.iter().filter(|(differs, _)| *differs).map(|(_, what)| *what));
    what
}

fn meta(tree: &Tree, node: Node) -> &Meta {
    match node {
        Node::Dir(id) => &tree.dir(id).meta,
        Node::Leaf(id) => &tree.leaf(id).meta,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::testing::{any_steps, digest_of, file, grow, meta};
    use crate::store::tree::Leaf;

    fn add(tree: &mut Tree, name: &str, content: &[u8]) -> LeafId {
        let leaf = file(digest_of(content), content.len() as u64);
        tree.add_leaf(Tree::ROOT, name.as_bytes(), leaf).unwrap()
    }

    #[test]
    fn every_part_of_an_entry_is_compared() {
        let (mut a, mut b) = (Tree::new(meta(0o755)), Tree::new(meta(0o700)));
        let (one, two) = (add(&mut a, "f", b"1"), add(&mut b, "f", b"2"));
        b.leaves[two.0 as usize].meta = Meta {
            mode: 0o600,
            uid: 7,
            gid: 0,
            mtime: (5, 6),
            xattrs: vec![((*b"user.a").into(), (*b"v").into())],
        };
        a.add_link(Tree::ROOT, *b"link", one).unwrap();
        add(&mut b, "link", b"1");
        let link = |target: &[u8]| Leaf {
            meta: meta(0o777),
            kind: LeafKind::Symlink(target.into()),
        };
        a.add_leaf(Tree::ROOT, *b"s", link(b"x")).unwrap();
        b.add_leaf(Tree::ROOT, *b"s", link(b"y")).unwrap();
        add(&mut a, "t", b"1");
        let dir = b.add_dir(Tree::ROOT, *b"t", a.leaves[0].meta.clone()).unwrap();
        b.add_leaf(dir, *b"below", link(b"x")).unwrap();
        add(&mut a, "only-a", b"1");
        let (a, b) = (a.finish().unwrap(), b.finish().unwrap());
        let changed = |path: &str, what: &[What]| Difference {
            path: path.into(),
            change: Change::Changed(what.to_vec()),
        };
        use What::*;
        let expected = [
            changed("", &[Mode]),
            changed("f", &[Content, Mode, Owner, Mtime, Xattrs]),
            changed("link", &[Links]),
            Difference {
                path: (*b"only-a").into(),
                change: Change::Removed,
            },
            changed("s", &[Target]),
            changed("t", &[Type]),
            Difference {
                path: (*b"t/below").into(),
                change: Change::Added,
            },
        ];
        assert_eq!(diff(&a, &b), expected);
        assert_eq!(diff(&b, &a).len(), expected.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn trees_differ_exactly_if_their_digests_do((root, one) in any_steps(), (other_root, other) in any_steps()) {
            let a = grow(&root, &one).finish().unwrap();
            prop_assert_eq!(diff(&a, &a), []);
            for b in [grow(&other_root, &other), grow(&root, &one[..one.len() / 2])] {
                let b = b.finish().unwrap();
                prop_assert_eq!(diff(&a, &b).is_empty(), a.digest() == b.digest());
            }
        }
    }
}
