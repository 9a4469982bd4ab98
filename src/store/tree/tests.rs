use proptest::prelude::*;

use super::check::EMPTY;
use super::*;
use crate::store::TreeDigest;
use crate::store::testing::{any_steps, digest_of, grow};

fn encoded(tree: &Tree) -> Vec<u8> {
    let mut bytes = Vec::new();
    let digest = tree.encode(&mut bytes).unwrap();
    assert_eq!(
        digest.as_bytes(),
        digest_of(&bytes).as_bytes(),
        "a manifest's name is the digest of its bytes"
    );
    bytes
}

fn at(seconds: i64, mode: u16) -> Meta {
    Meta {
        mode,
        mtime: (seconds, 0),
        ..Meta::default()
    }
}

/// The tree that docs/format.md takes apart.
fn example() -> Tree {
    let mut tree = Tree::new(at(1_700_000_000, 0o755));
    let note = Leaf {
        meta: at(1_700_000_000, 0o644),
        kind: LeafKind::File {
            digest: digest_of(b"hello\n"),
            size: 6,
        },
    };
    let note = tree.add_leaf(Tree::ROOT, *b"a", note).unwrap();
    let dir = Meta {
        uid: 1000,
        gid: 1000,
        ..at(1_699_999_999, 0o755)
    };
    let dir = tree.add_dir(Tree::ROOT, *b"d", dir).unwrap();
    tree.add_link(dir, *b"b", note).unwrap();
    let link = Leaf {
        meta: Meta {
            mode: 0o777,
            mtime: (1_700_000_000, 500),
            xattrs: vec![((*b"trusted.t").into(), (*b"v").into())],
            ..Meta::default()
        },
        kind: LeafKind::Symlink((*b"../a").into()),
    };
    tree.add_leaf(dir, *b"l", link).unwrap();
    tree.finish().unwrap()
}

#[test]
fn the_worked_example_of_the_format_document_is_true() {
    let text = include_str!("../../../docs/format.md");
    let block = text.split("```manifest\n").nth(1).unwrap().split("```").next().unwrap();
    let mut bytes = Vec::new();
    for line in block.lines() {
        let (offset, rest) = line.split_once("  ").unwrap();
        assert_eq!(
            usize::from_str_radix(offset, 16).unwrap(),
            bytes.len(),
            "the offset of {line:?}"
        );
        let digits = rest.split("  ").next().unwrap();
        bytes.extend(
            digits
                .split_whitespace()
                .map(|byte| u8::from_str_radix(byte, 16).unwrap()),
        );
    }
    assert_eq!(bytes, encoded(&example()));
    assert_eq!(Tree::decode(&bytes).unwrap(), example());
    let digest = example().digest().unwrap();
    assert!(text.contains(&digest.to_string()), "the document should say {digest}");
}

#[test]
fn the_digest_of_a_known_tree_never_changes() {
    // A failure here means that every stored tree would get another name: that needs a new format version.
    let expected = "sha256:5d68db0fa5c9be6033aaeca69061d02009f2e0962a96b1a24f675140556adb85";
    let mut tree = example();
    let everything = Meta {
        mode: 0o7777,
        uid: u32::MAX,
        gid: 1,
        mtime: (i64::MIN, 999_999_999),
        xattrs: vec![
            ((*b"security.capability").into(), (*b"\0\x01").into()),
            ((*b"user.x").into(), (*b"").into()),
        ],
    };
    for (name, kind) in [
        ("char", LeafKind::CharDevice { major: 1, minor: 3 }),
        (
            "block",
            LeafKind::BlockDevice {
                major: 0xfff,
                minor: 0xf_ffff,
            },
        ),
        ("fifo", LeafKind::Fifo),
        ("socket", LeafKind::Socket),
        ("empty", LeafKind::File { digest: EMPTY, size: 0 }),
    ] {
        let meta = everything.clone();
        tree.add_leaf(Tree::ROOT, name.as_bytes(), Leaf { meta, kind }).unwrap();
    }
    assert_eq!(tree.finish().unwrap().digest().unwrap().to_string(), expected);
}

#[test]
fn the_digest_does_not_depend_on_the_numbering_in_memory() {
    let tree = example();
    let mut other = tree.clone();
    other.dirs.push(other.dirs[1].clone());
    other.dirs[0].entries[1].node = Node::Dir(DirId(2));
    other.leaves.swap(0, 1);
    for entry in other.dirs.iter_mut().flat_map(|dir| &mut dir.entries) {
        if let Node::Leaf(id) = &mut entry.node {
            id.0 = 1 - id.0;
        }
    }
    assert_eq!(other.digest(), tree.digest());
    assert_eq!(other.finish().unwrap(), tree);
}

#[test]
fn a_hard_link_is_not_an_equal_copy() {
    let mut linked = Tree::new(Meta::default());
    let leaf = Leaf {
        meta: Meta::default(),
        kind: LeafKind::Fifo,
    };
    let mut copied = linked.clone();
    let first = linked.add_leaf(Tree::ROOT, *b"x", leaf.clone()).unwrap();
    linked.add_link(Tree::ROOT, *b"y", first).unwrap();
    copied.add_leaf(Tree::ROOT, *b"x", leaf.clone()).unwrap();
    copied.add_leaf(Tree::ROOT, *b"y", leaf).unwrap();
    assert_ne!(linked.digest(), copied.digest());
}

#[test]
fn invalid_trees_are_refused_with_their_path() {
    let fails = |change: &dyn Fn(&mut Tree), path: &str, what: &str| {
        let mut tree = example();
        change(&mut tree);
        let error = tree.digest().unwrap_err();
        assert_eq!(String::from_utf8_lossy(&error.path), path, "{error}");
        assert!(error.what.contains(what), "{error}");
    };
    fails(
        &|tree| tree.dirs[1].entries[0].name = (*b"a/b").into(),
        "d/a/b",
        "slash",
    );
    fails(&|tree| tree.dirs[1].entries[0].name = (*b"..").into(), "d/..", "\"..\"");
    fails(&|tree| tree.dirs[1].entries[0].name = Name::default(), "d/", "empty");
    fails(&|tree| tree.dirs[1].entries[0].name = (*b"a\0").into(), "d/a\0", "NUL");
    fails(
        &|tree| tree.dirs[1].entries[0].name = vec![b'n'; 256].into(),
        &format!("d/{}", "n".repeat(256)),
        "255",
    );
    fails(&|tree| tree.dirs[1].entries[0].name = (*b"z").into(), "d/l", "sorted");
    fails(&|tree| tree.dirs[1].entries[0].name = (*b"l").into(), "d/l", "twice");
    fails(
        &|tree| tree.dirs[1].entries[0].node = Node::Dir(DirId(0)),
        "d/b",
        "two names",
    );
    fails(
        &|tree| tree.dirs[1].entries[0].node = Node::Dir(DirId(9)),
        "d/b",
        "not exist",
    );
    fails(
        &|tree| tree.dirs[1].entries[0].node = Node::Leaf(LeafId(9)),
        "d/b",
        "not exist",
    );
    fails(&|tree| tree.leaves[1].meta.mode = 0o10000, "d/l", "mode");
    fails(
        &|tree| tree.leaves[1].meta.mtime.1 = 1_000_000_000,
        "d/l",
        "nanoseconds",
    );
    fails(
        &|tree| tree.leaves[1].kind = LeafKind::Symlink(Box::default()),
        "d/l",
        "symlink",
    );
    fails(
        &|tree| tree.leaves[1].kind = LeafKind::CharDevice { major: 0, minor: 0 },
        "d/l",
        "whiteout",
    );
    fails(
        &|tree| tree.leaves[1].kind = LeafKind::BlockDevice { major: 4096, minor: 0 },
        "d/l",
        "range",
    );
    fails(
        &|tree| tree.leaves[1].kind = LeafKind::File { digest: EMPTY, size: 1 },
        "d/l",
        "empty file",
    );
    let other = LeafKind::File {
        digest: digest_of(b"hello\n"),
        size: 7,
    };
    fails(&|tree| tree.leaves[1].kind = other.clone(), "", "two different sizes");
    fails(
        &|tree| tree.leaves[1].meta.xattrs.push(((*b"a").into(), Box::default())),
        "d/l",
        "not sorted",
    );
    fails(&|tree| tree.dirs.clear(), "", "no root");
}

#[test]
fn only_the_canonical_form_is_read() {
    let head = b"LARDER\n\x01";
    let refused = |body: &[u8], what: &str| {
        let error = Tree::decode(&[head, body].concat()).unwrap_err().to_string();
        assert!(error.contains(what), "{body:x?}: {error}");
    };
    assert!(
        Tree::decode(&[head.as_slice(), b"\x00\x00"].concat()).is_ok(),
        "an empty root"
    );
    refused(b"", "cut off");
    refused(b"\x00", "cut off");
    refused(b"\x00\x00\x00", "bytes follow");
    refused(b"\x00\x80\x00", "shortest");
    refused(b"\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", "64 bits");
    refused(b"\x05\x00", "root is not a folder");
    refused(b"\x80\x00", "reserved");
    refused(b"\x08\x00\x00", "equals");
    refused(b"\x10\x00\x00\x00", "equals");
    refused(b"\x20\x00\x00\x00", "equals");
    refused(b"\x08\x80\x20\x00", "mode");
    refused(b"\x20\x00\x80\x94\xeb\xdc\x03\x00", "nanoseconds");
    refused(b"\x40\x00\x00", "empty list");
    refused(b"\x40\x02\x01b\x00\x01a\x00\x00", "not sorted");
    refused(b"\x00\x02\x01b\x05\x01a\x05", "sorted");
    refused(b"\x00\x02\x01b\x05\x01b\x05", "twice");
    refused(b"\x00\x01\x00\x05", "empty");
    refused(b"\x00\x01\x02..\x05", "\"..\"");
    refused(b"\x00\x01\x80\x02", "longer");
    refused(b"\x00\x01\x01a\x07\x00", "did not come before");
    refused(b"\x00\x02\x01a\x05\x01b\x0f\x00", "fields of its own");
    refused(b"\x00\x01\x01a\x03\x00\x00", "whiteout");
    refused(b"\x00\x01\x01a\x02\x00", "symlink");
    assert!(matches!(
        Tree::decode(b"LARDER\n\x02\x00\x00"),
        Err(FormatError::Version(2))
    ));
    assert!(matches!(Tree::decode(b"larder\n\x01\x00\x00"), Err(FormatError::Magic)));

    let mut two_sizes = example();
    two_sizes.leaves[1] = Leaf {
        meta: Meta::default(),
        kind: LeafKind::File {
            digest: digest_of(b"other"),
            size: 6,
        },
    };
    let mut bytes = encoded(&two_sizes);
    let (one, other) = (digest_of(b"hello\n"), digest_of(b"other"));
    let find = |bytes: &[u8], digest: &Digest| bytes.windows(32).position(|part| part == digest.as_bytes()).unwrap();
    let at = find(&bytes, &other);
    bytes[at..at + 32].copy_from_slice(one.as_bytes());
    bytes[at - 1] = 7;
    assert!(matches!(Tree::decode(&bytes), Err(FormatError::Sizes(digest)) if digest == one));
}

#[test]
fn a_count_that_lies_takes_no_memory() {
    // 2^63 entries and 2^63 attributes are announced; there is nothing behind.
    for body in [b"\x00".as_slice(), b"\x40"] {
        let bytes = [b"LARDER\n\x01", body, b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"].concat();
        assert!(matches!(Tree::decode(&bytes), Err(FormatError::Truncated { .. })));
    }
}

#[test]
fn a_deep_tree_needs_no_stack() {
    let mut tree = Tree::new(Meta::default());
    let mut dir = Tree::ROOT;
    for _ in 0..200_000 {
        dir = tree.add_dir(dir, *b"d", Meta::default()).unwrap();
    }
    let tree = tree.finish().unwrap();
    let bytes = encoded(&tree);
    assert_eq!(Tree::decode(&bytes).unwrap(), tree);
    let mut walk = tree.walk();
    let mut longest = 0;
    while let Some((path, _)) = walk.next() {
        longest = longest.max(path.len());
    }
    assert_eq!(longest, 200_000 * 2 - 1);
}

#[test]
fn an_entry_takes_little_more_than_its_digest() {
    let mut tree = Tree::new(at(1_700_000_000, 0o755));
    for number in 0..100_000u32 {
        let leaf = Leaf {
            meta: Meta {
                mtime: (1_700_000_000 + i64::from(number % 7), number * 1000),
                ..at(0, 0o644)
            },
            kind: LeafKind::File {
                digest: digest_of(&number.to_be_bytes()),
                size: 4,
            },
        };
        tree.add_leaf(Tree::ROOT, format!("file-{number}").into_bytes(), leaf)
            .unwrap();
    }
    let length = encoded(&tree.finish().unwrap()).len();
    assert!(
        length < 100_000 * 55,
        "{} bytes an entry, 32 of them the digest",
        length / 100_000
    );
}

#[test]
fn paths_are_looked_up_and_walked_in_order() {
    let tree = example();
    assert_eq!(tree.lookup(b""), Some(Node::Dir(Tree::ROOT)));
    assert_eq!(tree.lookup(b"/d//b/"), Some(Node::Leaf(LeafId(0))));
    assert_eq!(tree.lookup(b"a"), Some(Node::Leaf(LeafId(0))));
    assert_eq!(tree.lookup(b"a/b"), None);
    assert_eq!(tree.lookup(b"d/missing"), None);
    let mut paths = Vec::new();
    let mut walk = tree.walk();
    while let Some((path, _)) = walk.next() {
        paths.push(String::from_utf8(path.to_vec()).unwrap());
    }
    assert_eq!(paths, ["", "a", "d", "d/b", "d/l"]);
    assert_eq!(walk.next(), None);
}

#[test]
fn statistics_count_names_and_distinct_bytes() {
    let mut tree = example();
    let copy = Leaf {
        meta: Meta::default(),
        kind: LeafKind::File {
            digest: digest_of(b"hello\n"),
            size: 6,
        },
    };
    tree.add_leaf(Tree::ROOT, *b"copy", copy).unwrap();
    let expected = Stats {
        files: 3,
        entries: 5,
        logical: 12,
        distinct: 6,
    };
    assert_eq!(tree.finish().unwrap().stats(), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_tree_survives_its_manifest((root, steps) in any_steps()) {
        let tree = grow(&root, &steps).finish().unwrap();
        let bytes = encoded(&tree);
        let read = Tree::decode(&bytes).unwrap();
        prop_assert_eq!(&read, &tree);
        prop_assert_eq!(encoded(&read), bytes.clone());
        let digests: Result<Vec<_>, _> = Digests::new(bytes.as_slice()).collect();
        let expected: Vec<_> = tree.contents().map(|(digest, size)| (*digest, size)).collect();
        prop_assert_eq!(digests.unwrap(), expected);
    }

    #[test]
    fn changed_bytes_never_panic_and_never_read_as_two_trees(
        (root, steps) in any_steps(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encoded(&grow(&root, &steps).finish().unwrap());
        prop_assert!(Tree::decode(&bytes[..cut.index(bytes.len())]).is_err(), "a part of a manifest was read");
        for (index, byte) in changes {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        // What is read at all is the canonical form of what was read.
        if let Ok(tree) = Tree::decode(&bytes) {
            prop_assert_eq!(encoded(&tree), bytes.clone());
        }
        let _ = Digests::new(bytes.as_slice()).count();
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let with_head = [b"LARDER\n\x01".as_slice(), &bytes].concat();
        if let Ok(tree) = Tree::decode(&with_head) {
            prop_assert_eq!(encoded(&tree), with_head);
        }
        prop_assert!(Tree::decode(&bytes).is_err());
    }
}

#[test]
fn a_tree_digest_is_not_a_blob_digest() {
    // Kept apart by type; this is the one place where the bytes may be equal.
    let bytes = encoded(&example());
    assert_eq!(
        example().digest().unwrap(),
        TreeDigest::from_bytes(*digest_of(&bytes).as_bytes())
    );
}

#[test]
fn leaves_are_put_in_order_in_place() {
    for (order, expected) in [
        (&[][..], &[][..]),
        (&[0, 1, 2, 3, 4], &[10, 11, 12, 13, 14]),
        (&[4, 0, 3, 2, 1], &[14, 10, 13, 12, 11]),
        (&[2, 0, 1], &[12, 10, 11]),
        (&[4], &[14]),
        (&[3, 1], &[13, 11]),
    ] {
        let mut items = vec![10, 11, 12, 13, 14];
        super::build::reorder(&mut items, order);
        assert_eq!(items, expected, "{order:?}");
    }
}
