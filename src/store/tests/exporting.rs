use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::store::testing::*;
use crate::store::tree::{Leaf, LeafKind, Meta, Tree};
use crate::store::*;

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 1000];
    match rustix::fs::lgetxattr(path, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Some(value)
        }
        Err(rustix::io::Errno::NODATA) => None,
        Err(error) => panic!("{path:?} {name}: {error}"),
    }
}

/// The names of all extended attributes, sorted; not those that a security module of the host adds to every file.
fn xattr_names(path: &Path) -> Vec<Vec<u8>> {
    let mut list = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut names: Vec<_> = names
        .filter(|name| *name != b"security.selinux")
        .map(<[u8]>::to_vec)
        .collect();
    names.sort();
    names
}

fn full_meta(mode: u16, uid: u32, seconds: i64, xattrs: &[(&str, &[u8])]) -> Meta {
    Meta {
        mode,
        uid,
        gid: uid + 1,
        mtime: (seconds, 123_456_789),
        xattrs: xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().into(), (*value).into()))
            .collect(),
    }
}

/// `cap_net_raw=ep`, as the kernel stores it (VFS_CAP_REVISION_2).
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn everything(build: &Build) -> Tree {
    let mut tree = Tree::new(full_meta(0o2750, 7, 1_000_000_000, &[("user.root", b"r")]));
    let file = |content: &[u8], meta: Meta| {
        let blob = build.put_bytes(content).unwrap();
        let (digest, size) = (blob.digest, blob.size);
        let kind = LeafKind::File { digest, size };
        Leaf { meta, kind }
    };
    let ping = full_meta(
        0o755,
        1234,
        1_100_000_000,
        &[("security.capability", CAPABILITY), ("user.k", b"v\0w")],
    );
    let ping = file(b"ping", ping);
    let su = file(b"su", full_meta(0o6755, 1234, -5, &[]));
    let unreadable = file(b"secret", full_meta(0o000, 0, 1, &[]));
    let large = file(&vec![9; 3 << 20], full_meta(0o644, 0, 2, &[]));
    let empty = file(b"", full_meta(0o644, 0, 3, &[]));
    let ping = tree.add_leaf(Tree::ROOT, *b"ping", ping).unwrap();
    tree.add_leaf(Tree::ROOT, *b"su", su).unwrap();
    tree.add_leaf(Tree::ROOT, *b"unreadable", unreadable).unwrap();
    tree.add_leaf(Tree::ROOT, *b"large", large).unwrap();
    tree.add_leaf(Tree::ROOT, *b"empty", empty).unwrap();
    let acl: &[u8] = &[
        2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
    ];
    let closed = full_meta(
        0o700,
        3,
        4,
        &[("system.posix_acl_default", acl), ("trusted.t", b"a\0b")],
    );
    let closed = tree.add_dir(Tree::ROOT, *b"closed", closed).unwrap();
    let deep = tree
        .add_dir(closed, *b"deep \xff\n", full_meta(0o555, 0, 5, &[]))
        .unwrap();
    tree.add_link(deep, *b"ping2", ping).unwrap();
    tree.add_dir(Tree::ROOT, *b"void", full_meta(0o1777, 0, 6, &[]))
        .unwrap();
    let mut special = |name: &[u8], kind| {
        let xattrs: &[(&str, &[u8])] = &[("trusted.s", b"x")];
        let leaf = Leaf {
            meta: full_meta(0o640, 55, 7, xattrs),
            kind,
        };
        tree.add_leaf(deep, name, leaf).unwrap()
    };
    let link = special(b"link", LeafKind::Symlink((*b"../../nowhere").into()));
    special(b"null", LeafKind::CharDevice { major: 1, minor: 3 });
    special(
        b"disk",
        LeafKind::BlockDevice {
            major: 259,
            minor: 70_000,
        },
    );
    special(b"fifo", LeafKind::Fifo);
    special(b"socket", LeafKind::Socket);
    tree.add_link(Tree::ROOT, *b"link2", link).unwrap();
    tree.finish().unwrap()
}

#[test]
fn everything_that_a_tree_keeps_is_written() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let tree = everything(&build);
    build.publish(&tree, target("a", "uid")).unwrap();
    let into = dir.path().join("out");
    store.export(&tree, &into, None).unwrap();

    let mut walk = tree.walk();
    let mut seen = 0;
    while let Some((path, node)) = walk.next() {
        let at = into.join(std::ffi::OsStr::from_bytes(path));
        let stat = fs::symlink_metadata(&at).unwrap();
        let meta = match node {
            tree::Node::Dir(id) => {
                assert!(stat.is_dir());
                &tree.dir(id).meta
            }
            tree::Node::Leaf(id) => &tree.leaf(id).meta,
        };
        assert_eq!((stat.uid(), stat.gid()), (meta.uid, meta.gid), "{at:?}");
        assert_eq!(
            (stat.mtime(), stat.mtime_nsec()),
            (meta.mtime.0, meta.mtime.1.into()),
            "{at:?}"
        );
        if !stat.is_symlink() {
            assert_eq!(stat.permissions().mode() & 0o7777, u32::from(meta.mode), "{at:?}");
        }
        let expected: Vec<Vec<u8>> = meta.xattrs.iter().map(|(name, _)| name.to_vec()).collect();
        assert_eq!(xattr_names(&at), expected, "{at:?}");
        for (name, value) in &meta.xattrs {
            let name = std::str::from_utf8(name).unwrap();
            assert_eq!(xattr(&at, name).as_deref(), Some(&**value), "{at:?} {name}");
        }
        if let tree::Node::Leaf(id) = node {
            match &tree.leaf(id).kind {
                LeafKind::File { digest, .. } => {
                    assert!(stat.is_file());
                    assert_eq!(digest_of(&fs::read(&at).unwrap()), *digest);
                    let blob = fs::metadata(blob_path(&store, digest)).unwrap();
                    assert_ne!(blob.ino(), stat.ino(), "never a hard link into the store");
                }
                LeafKind::Symlink(target) => {
                    assert_eq!(fs::read_link(&at).unwrap().as_os_str().as_bytes(), &**target);
                }
                LeafKind::CharDevice { major, minor } => {
                    assert!(stat.file_type().is_char_device());
                    assert_eq!(stat.rdev(), rustix::fs::makedev(*major, *minor));
                }
                LeafKind::BlockDevice { major, minor } => {
                    assert!(stat.file_type().is_block_device());
                    assert_eq!(stat.rdev(), rustix::fs::makedev(*major, *minor));
                }
                LeafKind::Fifo => assert!(stat.file_type().is_fifo()),
                LeafKind::Socket => assert!(stat.file_type().is_socket()),
            }
        }
        seen += 1;
    }
    assert_eq!(seen, tree.stats().entries + 1);
    let deep = into.join(std::ffi::OsStr::from_bytes(b"closed/deep \xff\n"));
    for (one, other) in [("ping", "ping2"), ("link2", "link")] {
        let (one, other) = (
            fs::symlink_metadata(into.join(one)),
            fs::symlink_metadata(deep.join(other)),
        );
        assert_eq!(one.as_ref().unwrap().ino(), other.unwrap().ino());
        assert_eq!(one.unwrap().nlink(), 2);
    }
    assert_eq!(xattr(&deep, "system.posix_acl_default"), None, "nothing is inherited");
}

#[test]
fn another_owner_can_be_given() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let tree = everything(&build);
    build.publish(&tree, target("a", "uid")).unwrap();
    let into = dir.path().join("out");
    store.export(&tree, &into, Some((1000, 2000))).unwrap();
    let mut walk = tree.walk();
    while let Some((path, _)) = walk.next() {
        let stat = fs::symlink_metadata(into.join(std::ffi::OsStr::from_bytes(path))).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (1000, 2000));
    }
    assert_eq!(
        xattr(&into.join("ping"), "security.capability").as_deref(),
        Some(CAPABILITY)
    );
    assert_eq!(
        fs::metadata(into.join("su")).unwrap().permissions().mode() & 0o7777,
        0o6755
    );
}

#[test]
fn sparse_contents_stay_sparse() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let file = tempfile::tempfile_in(dir.path()).unwrap();
    file.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"start", 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"middle", 30 << 20).unwrap();
    let blob = build.put_file(&file).unwrap();
    let mut tree = Tree::new(meta(0o755));
    tree.add_leaf(Tree::ROOT, *b"f", testing::file(blob.digest, blob.size))
        .unwrap();
    let tree = tree.finish().unwrap();
    build.publish(&tree, target("a", "uid")).unwrap();
    let into = dir.path().join("out");
    store.export(&tree, &into, None).unwrap();
    let out = fs::metadata(into.join("f")).unwrap();
    assert_eq!(out.len(), 64 << 20);
    assert!(out.blocks() * 512 < 256 << 10, "{} blocks", out.blocks());
    assert_eq!(digest_of(&fs::read(into.join("f")).unwrap()), blob.digest);
}

#[test]
fn a_tree_deeper_than_any_path_is_written_and_removed() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let mut tree = Tree::new(meta(0o755));
    let blob = build.put_bytes(b"x").unwrap();
    let leaf = tree
        .add_leaf(Tree::ROOT, *b"first", testing::file(blob.digest, blob.size))
        .unwrap();
    let mut at = Tree::ROOT;
    for _ in 0..1500 {
        at = tree.add_dir(at, *b"a-folder", meta(0o755)).unwrap();
    }
    tree.add_link(at, *b"linked", leaf).unwrap();
    let leaf = tree
        .add_leaf(at, *b"last", testing::file(blob.digest, blob.size))
        .unwrap();
    tree.add_link(Tree::ROOT, *b"z-linked", leaf).unwrap();
    let tree = tree.finish().unwrap();
    build.publish(&tree, target("a", "uid")).unwrap();
    let into = dir.path().join("out");
    store.export(&tree, &into, None).unwrap();
    assert_eq!(fs::metadata(into.join("first")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(into.join("z-linked")).unwrap().nlink(), 2);
    remove_all(&into).unwrap();
    assert!(!into.exists());
    remove_all(&into).unwrap();
}

#[test]
fn only_an_empty_folder_is_written_into() {
    let (dir, store) = store();
    let tree = Tree::new(meta(0o750)).finish().unwrap();
    let into = dir.path().join("out");
    fs::create_dir(&into).unwrap();
    store.export(&tree, &into, None).unwrap();
    assert_eq!(fs::metadata(&into).unwrap().mtime(), 1_700_000_000);
    fs::write(into.join("mine"), "x").unwrap();
    let error = store.export(&tree, &into, None).unwrap_err();
    assert!(error.to_string().contains("out"), "{error}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/tmp", &link).unwrap();
    assert!(store.export(&tree, &link, None).is_err(), "a symlink is not followed");
}

#[test]
fn what_the_file_system_cannot_keep_is_an_error_with_the_path() {
    let (dir, store) = store();
    let extreme = |seconds| {
        let mut tree = Tree::new(meta(0o755));
        let folder = tree.add_dir(Tree::ROOT, *b"d", meta(0o755)).unwrap();
        let leaf = Leaf {
            meta: Meta {
                mtime: (seconds, 0),
                ..meta(0o644)
            },
            kind: LeafKind::Fifo,
        };
        tree.add_leaf(folder, *b"old", leaf).unwrap();
        tree.finish().unwrap()
    };
    // ext4 keeps 1901 to 2446, XFS a little more.
    store
        .export(&extreme(4_000_000_000), &dir.path().join("fine"), None)
        .unwrap();
    let error = store
        .export(&extreme(i64::MIN), &dir.path().join("a"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("d/old"), "{error}");

    let tmpfs = dir.path().join("tmpfs");
    fs::create_dir(&tmpfs).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&tmpfs)
        .status()
        .unwrap();
    assert!(mounted.success());
    let _guard = super::full_disk::Unmount(tmpfs.clone());
    let mut tree = extreme(5);
    tree.leaves[0].kind = LeafKind::Symlink((*b"x").into());
    tree.leaves[0].meta.xattrs = vec![((*b"user.not-on-symlinks").into(), (*b"v").into())];
    let error = store.export(&tree, &tmpfs.join("a"), None).unwrap_err();
    assert!(
        matches!(&error, Error::Xattr { path, attribute, .. } if path == b"d/old" && attribute == "user.not-on-symlinks"),
        "{error}"
    );

    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("big", &vec![1; 2 << 20])]);
    build.publish(&tree, target("a", "uid")).unwrap();
    let error = store.export(&tree, &tmpfs.join("b"), None).unwrap_err();
    assert!(error.is_disk_full(), "{error}");
}

#[test]
fn a_missing_or_damaged_content_names_the_path() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("f", b"content")]);
    let error = store
        .export(&tree, &dir.path().join("a"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("\"f\"") && error.contains("not in the store"), "{error}");
    build.publish(&tree, target("a", "uid")).unwrap();
    fs::write(blob_path(&store, &digest_of(b"content")), "").unwrap();
    let error = store
        .export(&tree, &dir.path().join("b"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("\"f\"") && error.contains("0 bytes"), "{error}");
}

/// Reads a folder back: path → (type and mode, owner, time, content or target, link group).
fn read_back(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    let mut firsts = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let relative = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let mut names = Vec::new();
        let content = match stat.mode() & libc::S_IFMT {
            libc::S_IFREG => digest_of(&fs::read(&path).unwrap()).to_string(),
            libc::S_IFLNK => format!("{:?}", fs::read_link(&path).unwrap()),
            libc::S_IFDIR => {
                names = fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path())
                    .collect();
                String::new()
            }
            _ => stat.rdev().to_string(),
        };
        let group = firsts.entry(stat.ino()).or_insert_with(Vec::new);
        group.push(relative.clone());
        let text = format!(
            "{:o} {} {} {}.{} {content}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.mtime(),
            stat.mtime_nsec()
        );
        found.insert(relative, text);
        todo.extend(names);
    }
    for (_, mut group) in firsts {
        if group.len() > 1 {
            group.sort();
            let key = [b"links of ", group[0].as_slice()].concat();
            found.insert(key, format!("{group:?}"));
        }
    }
    found
}

#[test]
fn two_exports_of_one_tree_are_alike() {
    let (dir, store) = store();
    let build = store.build().unwrap();
    let tree = everything(&build);
    build.publish(&tree, target("a", "uid")).unwrap();
    let loaded = store.load(&tree.digest().unwrap()).unwrap();
    store.export(&tree, &dir.path().join("one"), None).unwrap();
    store.export(&loaded, &dir.path().join("two"), None).unwrap();
    let one = read_back(&dir.path().join("one"));
    assert_eq!(one, read_back(&dir.path().join("two")));
    assert_eq!(one.keys().filter(|key| key.starts_with(b"links of ")).count(), 2);
}
