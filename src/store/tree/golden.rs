//! Fixed trees with the digests that they have for ever, and a second writer of manifests to compare with.
//!
//! A failure here means that every tree that is stored anywhere would get another name. That needs a new version of
//! the format, never new values in this file.

use proptest::prelude::*;

use super::check::EMPTY;
use super::*;
use crate::store::testing::{any_steps, digest_of, grow};

fn meta(mode: u16, owner: (u32, u32), mtime: (i64, u32), xattrs: &[(&[u8], &[u8])]) -> Meta {
    Meta {
        mode,
        uid: owner.0,
        gid: owner.1,
        mtime,
        xattrs: xattrs
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect(),
    }
}

fn plain(mode: u16) -> Meta {
    meta(mode, (0, 0), (1_700_000_000, 0), &[])
}

fn file(meta: Meta, content: &[u8]) -> Leaf {
    let kind = LeafKind::File {
        digest: digest_of(content),
        size: content.len() as u64,
    };
    Leaf { meta, kind }
}

fn every_type() -> Tree {
    let mut tree = Tree::new(plain(0o755));
    let mut add = |name: &[u8], kind| {
        let meta = plain(0o640);
        tree.add_leaf(Tree::ROOT, name, Leaf { meta, kind }).unwrap()
    };
    add(b"block", LeafKind::BlockDevice { major: 0, minor: 0 });
    add(
        b"block-largest",
        LeafKind::BlockDevice {
            major: 0xfff,
            minor: 0xf_ffff,
        },
    );
    add(b"char", LeafKind::CharDevice { major: 0, minor: 1 });
    add(b"char-console", LeafKind::CharDevice { major: 5, minor: 1 });
    add(b"empty", LeafKind::File { digest: EMPTY, size: 0 });
    add(b"fifo", LeafKind::Fifo);
    let largest = digest_of(b"not really");
    add(
        b"largest",
        LeafKind::File {
            digest: largest,
            size: i64::MAX as u64,
        },
    );
    add(b"socket", LeafKind::Socket);
    add(b"symlink", LeafKind::Symlink((*b"x").into()));
    add(b"symlink-longest", LeafKind::Symlink(vec![b'/'; MAX_SYMLINK].into()));
    tree.add_dir(Tree::ROOT, *b"folder", plain(0o700)).unwrap();
    tree.finish().unwrap()
}

fn attributes() -> Tree {
    let many: Vec<(Vec<u8>, Vec<u8>)> = (0..200u8)
        .map(|number| {
            (
                format!("user.{number:03}").into_bytes(),
                vec![number; usize::from(number)],
            )
        })
        .collect();
    let many: Vec<(&[u8], &[u8])> = many.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    let longest = [b"user.".as_slice(), &[b'n'; MAX_XATTR_NAME - 5]].concat();
    let mut tree = Tree::new(meta(0o755, (0, 0), (0, 0), &many));
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let ping: &[(&[u8], &[u8])] = &[(b"security.capability", capability), (b"user.empty", b"")];
    tree.add_leaf(Tree::ROOT, *b"ping", file(meta(0o755, (0, 0), (0, 0), ping), b"ping"))
        .unwrap();
    let large = meta(0o755, (0, 0), (0, 0), &[(&longest, &[7; MAX_XATTR_VALUE])]);
    tree.add_dir(Tree::ROOT, *b"large", large).unwrap();
    let odd: &[(&[u8], &[u8])] = &[(b"\xff\x01 \n", b"\0"), (b"trusted.overlay.opaque", b"y")];
    let kind = LeafKind::Symlink((*b"ping").into());
    let meta = meta(0o777, (0, 0), (0, 0), odd);
    tree.add_leaf(Tree::ROOT, *b"link", Leaf { meta, kind }).unwrap();
    tree.finish().unwrap()
}

fn links() -> Tree {
    let mut tree = Tree::new(plain(0o755));
    let dirs: Vec<DirId> = (0..20)
        .map(|number| {
            tree.add_dir(Tree::ROOT, format!("d{number}").into_bytes(), plain(0o755))
                .unwrap()
        })
        .collect();
    // Two hundred leaves, whose numbers take two bytes, each with a second name in another folder.
    for number in 0..200usize {
        let name = format!("f{number}").into_bytes();
        let leaf = file(plain(0o644), name.as_slice());
        let leaf = tree.add_leaf(dirs[number % 20], name.clone(), leaf).unwrap();
        tree.add_link(dirs[(number * 7 + 3) % 20], [b"l".as_slice(), &name].concat(), leaf)
            .unwrap();
    }
    let fifo = Leaf {
        meta: plain(0o600),
        kind: LeafKind::Fifo,
    };
    let fifo = tree.add_leaf(Tree::ROOT, *b"z", fifo).unwrap();
    for name in [b"zz", b"za", b"aa"] {
        tree.add_link(Tree::ROOT, *name, fifo).unwrap();
    }
    tree.finish().unwrap()
}

fn odd_names() -> Tree {
    let mut tree = Tree::new(plain(0o755));
    for byte in 1..=255u8 {
        // Alone, in the middle, and as the whole of a longest name.
        for name in [vec![byte], vec![b'm', byte, b'm'], vec![byte; MAX_NAME]] {
            if !name.contains(&b'/') && name != b"." {
                tree.add_leaf(Tree::ROOT, name, file(plain(0o644), b"x")).unwrap();
            }
        }
    }
    for name in [
        b"...".as_slice(),
        b" ",
        b"..a",
        b".\n",
        "ä".as_bytes(),
        "a\u{308}".as_bytes(),
        b"-rf",
    ] {
        tree.add_dir(Tree::ROOT, [b"dir ".as_slice(), name].concat(), plain(0o755))
            .unwrap();
    }
    tree.finish().unwrap()
}

fn extremes() -> Tree {
    let mut tree = Tree::new(meta(0, (u32::MAX, 0), (i64::MIN, 999_999_999), &[]));
    let times = [
        (0, 0),
        (0, 1),
        (-1, 999_999_999),
        (1, 0),
        (i64::MAX, 0),
        (i64::MIN, 0),
        // What ext4 keeps: 1901 to 2446.
        (-2_147_483_648, 0),
        (15_032_385_535, 999_999_999),
        (63, 5),
        (-64, 5),
    ];
    for (number, mtime) in times.into_iter().enumerate() {
        let owner = (u32::MAX >> number, (1 << (3 * number)) - 1);
        let mode = [0o7777, 0, 0o4711, 0o2750, 0o1777][number % 5];
        let leaf = file(meta(mode, owner, mtime, &[]), b"t");
        tree.add_leaf(Tree::ROOT, format!("t{number}").into_bytes(), leaf)
            .unwrap();
    }
    tree.finish().unwrap()
}

fn thousands() -> Tree {
    let mut tree = Tree::new(plain(0o755));
    let mut parent = Tree::ROOT;
    for folder in 0..50u32 {
        parent = match folder % 10 {
            0 => Tree::ROOT,
            _ => parent,
        };
        parent = tree
            .add_dir(parent, format!("folder-{folder}").into_bytes(), plain(0o755))
            .unwrap();
        for number in 0..100u32 {
            let mtime = (
                1_600_000_000 + i64::from(number * 977),
                number * 1_000_003 % 1_000_000_000,
            );
            let meta = meta(0o600 + (number % 8) as u16, (folder, number % 3), mtime, &[]);
            let content = (folder * number).to_be_bytes();
            tree.add_leaf(parent, format!("file {number}").into_bytes(), file(meta, &content))
                .unwrap();
        }
    }
    tree.finish().unwrap()
}

#[test]
fn known_trees_have_the_digests_that_they_have_always_had() {
    let cases: [(&str, Tree, usize, &str); 7] = [
        (
            "empty",
            Tree::new(Meta::default()).finish().unwrap(),
            10,
            "4437805741aa2483f5bd7a2b3c2d81fe8dc024c90bd372468c92d46f4830e3e0",
        ),
        (
            "every type",
            every_type(),
            4315,
            "ed3124b7437d6cb870726208350eb88a65f7ae4834d5d184d467b1ed967c6480",
        ),
        (
            "attributes",
            attributes(),
            87932,
            "ae684a0ee1e7348cad1474013c50bba097d1b4b80b1dbf9f6f8f918a2bb93886",
        ),
        (
            "links",
            links(),
            9459,
            "1773a9cbb065f928a2fa4f7075587a5727b2bbadf983a919543e79763c064704",
        ),
        (
            "odd names",
            odd_names(),
            92765,
            "e2bcef10e529834a364b5352bf5a69ba58224fcab1688e5647673e5c98c999bc",
        ),
        (
            "extremes",
            extremes(),
            545,
            "1d3eac14512bb76ef2999f5290472b75f71d529ede9f38b1548d0c695489c25d",
        ),
        (
            "thousands",
            thousands(),
            260145,
            "ea02caa89cc996ef6b993c59b32981dc12f2f7248ffac9be87e3b679886372c3",
        ),
    ];
    let found = cases.each_ref().map(|(name, tree, ..)| {
        let mut bytes = Vec::new();
        let digest = tree.encode(&mut bytes).unwrap();
        assert_eq!(Tree::decode(&bytes).unwrap(), *tree, "{name}");
        assert_eq!(bytes, second_writer(tree), "{name}");
        (*name, bytes.len(), digest.hex())
    });
    let expected = cases
        .each_ref()
        .map(|(name, _, length, hex)| (*name, *length, (*hex).to_owned()));
    assert_eq!(found, expected);
}

/// Writes a manifest as docs/format.md says it, as simply as can be: by recursion, and with none of the other writer's
/// code. For finished trees that are not deep.
fn second_writer(tree: &Tree) -> Vec<u8> {
    let mut out = b"LARDER\n\x01".to_vec();
    let mut before = (0, (0, 0), (0, 0));
    let mut numbers = std::collections::HashMap::new();
    inode(tree, Node::Dir(Tree::ROOT), &mut before, &mut numbers, &mut out);
    out
}

type Before = (u16, (u32, u32), (i64, u32));

fn inode(
    tree: &Tree,
    node: Node,
    before: &mut Before,
    numbers: &mut std::collections::HashMap<LeafId, u64>,
    out: &mut Vec<u8>,
) {
    if let Node::Leaf(id) = node {
        if let Some(number) = numbers.get(&id) {
            out.push(7);
            return number_to(out, (*number).into());
        }
        numbers.insert(id, numbers.len() as u64);
    }
    let (meta, kind) = match node {
        Node::Dir(id) => (&tree.dirs[id.0 as usize].meta, 0),
        Node::Leaf(id) => {
            let leaf = &tree.leaves[id.0 as usize];
            let kind = match leaf.kind {
                LeafKind::File { .. } => 1,
                LeafKind::Symlink(_) => 2,
                LeafKind::CharDevice { .. } => 3,
                LeafKind::BlockDevice { .. } => 4,
                LeafKind::Fifo => 5,
                LeafKind::Socket => 6,
            };
            (&leaf.meta, kind)
        }
    };
    let now = (meta.mode, (meta.uid, meta.gid), meta.mtime);
    let differs = [
        now.0 != before.0,
        now.1 != before.1,
        now.2 != before.2,
        !meta.xattrs.is_empty(),
    ];
    let flags: u8 = (0..4).map(|bit| u8::from(differs[bit]) << (bit + 3)).sum();
    out.push(flags | kind);
    if differs[0] {
        number_to(out, now.0.into());
    }
    if differs[1] {
        number_to(out, now.1.0.into());
        number_to(out, now.1.1.into());
    }
    if differs[2] {
        let difference = (i128::from(now.2.0) - i128::from(before.2.0)) as i64;
        let zigzag = match difference >= 0 {
            true => 2 * i128::from(difference),
            false => -2 * i128::from(difference) - 1,
        };
        number_to(out, zigzag as u128);
        number_to(out, now.2.1.into());
    }
    *before = now;
    if differs[3] {
        number_to(out, meta.xattrs.len() as u128);
        for (name, value) in &meta.xattrs {
            string_to(out, name);
            string_to(out, value);
        }
    }
    match node {
        Node::Dir(id) => {
            let entries = &tree.dirs[id.0 as usize].entries;
            number_to(out, entries.len() as u128);
            for entry in entries {
                string_to(out, &entry.name);
                inode(tree, entry.node, before, numbers, out);
            }
        }
        Node::Leaf(id) => match &tree.leaves[id.0 as usize].kind {
            LeafKind::File { digest, size } => {
                number_to(out, (*size).into());
                out.extend(digest.as_bytes());
            }
            LeafKind::Symlink(target) => string_to(out, target),
            LeafKind::CharDevice { major, minor } | LeafKind::BlockDevice { major, minor } => {
                number_to(out, (*major).into());
                number_to(out, (*minor).into());
            }
            LeafKind::Fifo | LeafKind::Socket => {}
        },
    }
}

fn number_to(out: &mut Vec<u8>, mut number: u128) {
    while number >= 128 {
        out.push((number % 128) as u8 + 128);
        number /= 128;
    }
    out.push(number as u8);
}

fn string_to(out: &mut Vec<u8>, bytes: &[u8]) {
    number_to(out, bytes.len() as u128);
    out.extend(bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn two_writers_of_the_format_agree_on_any_tree((root, steps) in any_steps()) {
        let tree = grow(&root, &steps).finish().unwrap();
        let mut bytes = Vec::new();
        tree.encode(&mut bytes).unwrap();
        prop_assert_eq!(bytes, second_writer(&tree));
    }
}
