//! Fixed trees with the images that they have, by their digests.
//!
//! A failure here means that images which lie on nodes are not those that this larder writes: if that is meant, `LABEL`
//! gets another number, so that they are made again, and then these values are new ones.

use sha2::{Digest as _, Sha256};

use super::*;
use crate::layer::image::write;
use crate::store::testing::digest_of;
use crate::store::tree::{DirId, Reader, Tree};

fn meta(mode: u16, seconds: i64) -> Meta {
    Meta {
        mode,
        uid: 1000,
        gid: 70_000,
        mtime: (seconds, 999_999_999),
        xattrs: Vec::new(),
    }
}

fn every_type() -> Tree {
    let mut tree = Tree::new(meta(0o755, 1_700_000_000));
    let folder = tree.add_dir(Tree::ROOT, *b"folder", meta(0o2711, -1)).unwrap();
    let mut add = |parent: DirId, name: &str, kind: LeafKind| {
        let mut meta = meta(0o640, 1_600_000_000);
        if name.starts_with("with-") {
            meta.xattrs = vec![
                ((*b"trusted.overlay.opaque").into(), (*b"y").into()),
                ((*b"user.long").into(), vec![7; 300].into()),
            ];
        }
        tree.add_leaf(parent, name.as_bytes(), Leaf { meta, kind }).unwrap()
    };
    let file = |content: &[u8]| LeafKind::File {
        digest: digest_of(content),
        size: content.len() as u64,
    };
    let linked = add(folder, "linked", file(b"some"));
    add(folder, "with-attributes", file(b"some"));
    add(Tree::ROOT, "empty", file(b""));
    add(Tree::ROOT, "fifo", LeafKind::Fifo);
    add(Tree::ROOT, "with-a-link", LeafKind::Symlink((*b"folder/linked").into()));
    add(Tree::ROOT, "char", LeafKind::CharDevice { major: 5, minor: 1 });
    add(
        Tree::ROOT,
        "block",
        LeafKind::BlockDevice {
            major: 259,
            minor: 70_000,
        },
    );
    let digest = digest_of(b"larger than a chunk");
    add(
        Tree::ROOT,
        "huge",
        LeafKind::File {
            digest,
            size: i64::MAX as u64,
        },
    );
    tree.add_link(Tree::ROOT, *b"further", linked).unwrap();
    tree.finish().unwrap()
}

/// A folder whose names take several blocks.
fn many_names() -> Tree {
    let mut tree = Tree::new(Meta::default());
    for number in 0..2_000 {
        let leaf = Leaf {
            meta: Meta::default(),
            kind: LeafKind::Fifo,
        };
        tree.add_leaf(Tree::ROOT, format!("pipe-{number:05}").into_bytes(), leaf)
            .unwrap();
    }
    tree.finish().unwrap()
}

/// SHA-256 and length of a tree's image.
fn image(tree: &Tree, ids: Option<(u32, u32)>) -> (String, u64) {
    let mut manifest = Vec::new();
    let digest = tree.encode(&mut manifest).unwrap();
    let file = tempfile::tempfile().unwrap();
    let all = |visit: &mut dyn FnMut(Record)| {
        let mut reader = Reader::new(&manifest[..]);
        while let Some(record) = reader.next_record().unwrap() {
            visit(record);
        }
        Ok(())
    };
    write(&file, &digest, ids, all).unwrap();
    let length = file.metadata().unwrap().len();
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    (hex::encode(Sha256::digest(bytes)), length)
}

#[test]
fn the_images_of_fixed_trees_have_the_bytes_that_they_always_had() {
    let found = [
        image(&every_type(), None),
        image(&every_type(), Some((0, 0))),
        image(&many_names(), None),
        image(&Tree::new(Meta::default()), None),
    ];
    let known = [
        (
            "d385675c174f06867a6de2e268685909192d90d6dd96a55f075c35874e9ee6eb",
            4_202_496,
        ),
        (
            "3e866d04f039b48011d7fe386499bf7f47adc54621e3c8107a5d44c3b3b2d6af",
            4_202_496,
        ),
        (
            "8940cc3a7abe85af032296ffe181f92f7068986d7be096dbece3675e7d33c39d",
            176_128,
        ),
        (
            "aff8dfcfb900f43a87f63c9047ff9503cde474aa18f5551ac26e65b0fe80649d",
            8_192,
        ),
    ];
    assert_eq!(found, known.map(|(digest, length)| (digest.to_owned(), length)));
}
