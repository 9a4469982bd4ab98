//! Upper folders made by hand, also such as overlayfs makes none. Needs root, for devices and attributes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, mknodat};

use super::*;
use crate::source::Failure;
use crate::source::error::FailureKind;
use crate::store::testing::digest_of;
use crate::store::tree::{DirId, Leaf, LeafId, LeafKind, Meta, Node};
use crate::store::{Options, Store};

const OPAQUE: &str = "trusted.overlay.opaque";
const REDIRECT: &str = "trusted.overlay.redirect";
const METACOPY: &str = "trusted.overlay.metacopy";

/// An empty upper folder over
/// ```text
/// a/b/c/deep  a/b/f  a/one = a/two (a hard link)  d/f  file (of 5 bytes)  link -> file
/// ```
struct Made {
    dir: tempfile::TempDir,
    store: Store,
    base: Tree,
}

/// The content that a file of the base is said to have. It is in no store: nothing may look for it.
fn content(name: &str) -> LeafKind {
    LeafKind::File {
        digest: digest_of(name.as_bytes()),
        size: 5,
    }
}

impl Made {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("upper")).unwrap();
        let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
        let mut base = Tree::new(Meta::default());
        let folder = |base: &mut Tree, parent: DirId, name: &str| {
            base.add_dir(parent, name.as_bytes(), Meta::default()).unwrap()
        };
        let file = |base: &mut Tree, parent: DirId, name: &str, kind: LeafKind| {
            let meta = Meta::default();
            base.add_leaf(parent, name.as_bytes(), Leaf { meta, kind }).unwrap()
        };
        let a = folder(&mut base, Tree::ROOT, "a");
        let b = folder(&mut base, a, "b");
        let c = folder(&mut base, b, "c");
        file(&mut base, c, "deep", content("a/b/c/deep"));
        file(&mut base, b, "f", content("a/b/f"));
        let one = file(&mut base, a, "one", content("a/one"));
        base.add_link(a, *b"two", one).unwrap();
        let d = folder(&mut base, Tree::ROOT, "d");
        file(&mut base, d, "f", content("d/f"));
        file(&mut base, Tree::ROOT, "file", content("file"));
        file(&mut base, Tree::ROOT, "link", LeafKind::Symlink((*b"file").into()));
        let base = base.finish().unwrap();
        Self { dir, store, base }
    }

    /// Another one, in the same place.
    fn again(self) -> Self {
        crate::store::remove_all(&self.at("")).unwrap();
        fs::create_dir(self.at("")).unwrap();
        self
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("upper").join(path)
    }

    fn folder(&self, path: &str, attributes: &[(&str, &str)]) {
        fs::create_dir(self.at(path)).unwrap();
        set(&self.at(path), attributes);
    }

    /// As overlayfs makes one of which only the metadata was changed.
    fn metacopy(&self, path: &str, attributes: &[(&str, &str)]) {
        fs::File::create_new(self.at(path)).unwrap().set_len(5).unwrap();
        set(&self.at(path), &[(METACOPY, "")]);
        set(&self.at(path), attributes);
    }

    fn whiteout(&self, path: &str) {
        mknodat(CWD, self.at(path), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }

    fn read(&self) -> Result<Tree, Error> {
        let build = self.store.build().unwrap();
        let reading = Reading {
            build: &build,
            cancel: &AtomicBool::new(false),
            store: None,
            known: None,
            settle: Duration::ZERO,
            notes: false,
            progress: &AtomicU64::new(0),
        };
        let upper = fs::File::open(self.at("")).unwrap();
        over(&upper.into(), || Ok(self.base.clone()), &reading)
    }

    /// The one failure of the reading.
    fn failure(&self) -> Failure {
        match self.read() {
            Err(Error::Unreadable { count: 1, mut first }) => first.remove(0),
            other => panic!("{other:?}"),
        }
    }
}

fn set(path: &Path, attributes: &[(&str, &str)]) {
    for (name, value) in attributes {
        lsetxattr(path, *name, value.as_bytes(), XattrFlags::empty()).unwrap();
    }
}

/// Paths and contents.
fn shown(tree: &Tree) -> Vec<(String, Option<LeafKind>)> {
    let mut found = Vec::new();
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        let path = String::from_utf8(path.to_vec()).unwrap();
        found.push(match node {
            Node::Dir(_) => (path + "/", None),
            Node::Leaf(leaf) => (path, Some(tree.leaf(leaf).kind.clone())),
        });
    }
    found
}

/// What the tree shows of each folder (`name/`) and file (`name = path of the content in the base`).
fn expected(paths: &[&str]) -> Vec<(String, Option<LeafKind>)> {
    let mut all = vec![("/".to_owned(), None)];
    all.extend(paths.iter().map(|path| match path.split_once(" = ") {
        Some((path, "")) => (path.to_owned(), Some(LeafKind::Symlink((*b"file").into()))),
        Some((path, below)) => (path.to_owned(), Some(content(below))),
        None => ((*path).to_owned(), None),
    }));
    all
}

fn leaf(tree: &Tree, path: &str) -> LeafId {
    match tree.lookup(path.as_bytes()) {
        Some(Node::Leaf(leaf)) => leaf,
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn an_empty_upper_folder_changes_the_root_alone() {
    let made = Made::new();
    fs::set_permissions(made.at(""), fs::Permissions::from_mode(0o1751)).unwrap();
    let tree = made.read().unwrap();
    assert_eq!(tree.dir(Tree::ROOT).meta.mode, 0o1751);
    assert_eq!(shown(&tree), shown(&made.base));
    assert_eq!(tree.leaves, made.base.leaves);
    assert_eq!(leaf(&tree, "a/one"), leaf(&tree, "a/two"));
}

#[test]
fn moved_folders_are_found_through_moved_folders() {
    let made = Made::new();
    // a → d/x, then within it b → y, then c → the root's z, then y/f changed; d is merged, its f deleted.
    made.folder("d", &[]);
    made.whiteout("a");
    made.whiteout("d/f");
    made.folder("d/x", &[(REDIRECT, "/a")]);
    made.whiteout("d/x/b");
    made.folder("d/x/y", &[(REDIRECT, "b")]);
    made.whiteout("d/x/y/c");
    made.metacopy("d/x/y/f", &[]);
    made.folder("z", &[(REDIRECT, "/a/b/c")]);
    made.metacopy("z/deeper", &[(REDIRECT, "deep")]);
    made.whiteout("z/deep");
    let tree = made.read().unwrap();
    let right = [
        "d/",
        "d/x/",
        "d/x/one = a/one",
        "d/x/two = a/one",
        "d/x/y/",
        "d/x/y/f = a/b/f",
        "file = file",
        "link = ",
        "z/",
        "z/deeper = a/b/c/deep",
    ];
    assert_eq!(shown(&tree), expected(&right));
    assert_eq!(leaf(&tree, "d/x/one"), leaf(&tree, "d/x/two"));
}

#[test]
fn two_folders_that_changed_places_have_each_others_entries() {
    let made = Made::new();
    made.folder("a", &[(REDIRECT, "d")]);
    made.folder("d", &[(REDIRECT, "a")]);
    made.folder("d/b", &[]);
    fs::write(made.at("d/b/new"), "").unwrap();
    let tree = made.read().unwrap();
    assert_eq!(
        tree.lookup(b"a/f").map(|_| leaf(&tree, "a/f")),
        Some(leaf(&tree, "a/f"))
    );
    assert_eq!(tree.leaf(leaf(&tree, "a/f")).kind, content("d/f"));
    assert_eq!(tree.leaf(leaf(&tree, "d/b/c/deep")).kind, content("a/b/c/deep"));
    assert!(tree.lookup(b"d/b/new").is_some() && tree.lookup(b"d/f").is_none() && tree.lookup(b"a/b").is_none());
}

#[test]
fn below_an_opaque_folder_only_absolute_redirects_lead_to_the_base() {
    let made = Made::new();
    // Opaque wins over a redirect of the same folder.
    made.folder("a", &[(OPAQUE, "y"), (REDIRECT, "/d")]);
    made.folder("a/b", &[]);
    made.folder("a/moved", &[(REDIRECT, "/a/b/c")]);
    made.metacopy("a/f", &[(REDIRECT, "/d/f")]);
    let tree = made.read().unwrap();
    let right = [
        "a/",
        "a/b/",
        "a/f = d/f",
        "a/moved/",
        "a/moved/deep = a/b/c/deep",
        "d/",
        "d/f = d/f",
        "file = file",
        "link = ",
    ];
    assert_eq!(shown(&tree), expected(&right));
}

#[test]
fn a_file_replaces_a_folder_and_a_folder_a_file() {
    let made = Made::new();
    fs::write(made.at("a"), "now a file").unwrap();
    made.folder("file", &[]);
    made.folder("link", &[]);
    let tree = made.read().unwrap();
    let paths: Vec<String> = shown(&tree).into_iter().map(|(path, _)| path).collect();
    assert_eq!(paths, ["/", "a", "d/", "d/f", "file/", "link/"]);
}

#[test]
fn a_file_of_which_only_the_metadata_was_changed_has_the_content_below_and_its_own_metadata() {
    let made = Made::new();
    made.metacopy("file", &[("user.mine", "1"), ("trusted.overlay.origin", "x")]);
    let path = made.at("file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4711)).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(7, 9);
    fs::File::open(&path).unwrap().set_modified(time).unwrap();
    std::os::unix::fs::chown(&path, Some(11), Some(12)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4711)).unwrap();
    // A further name of the same inode, whose redirect is absolute then.
    made.folder("d", &[]);
    set(&path, &[(REDIRECT, "/file")]);
    fs::hard_link(&path, made.at("d/linked")).unwrap();
    let tree = made.read().unwrap();
    let id = leaf(&tree, "file");
    assert_eq!(leaf(&tree, "d/linked"), id);
    let meta = Meta {
        mode: 0o4711,
        uid: 11,
        gid: 12,
        mtime: (7, 9),
        xattrs: vec![((*b"user.mine").into(), (*b"1").into())],
    };
    assert_eq!((&tree.leaf(id).meta, &tree.leaf(id).kind), (&meta, &content("file")));
}

#[test]
fn a_name_of_a_hard_link_below_that_was_copied_is_a_file_of_its_own() {
    let made = Made::new();
    made.folder("a", &[]);
    made.metacopy("a/one", &[]);
    let tree = made.read().unwrap();
    assert_ne!(leaf(&tree, "a/one"), leaf(&tree, "a/two"));
    assert_eq!(tree.leaf(leaf(&tree, "a/one")).kind, content("a/one"));
    assert_eq!(tree.leaf(leaf(&tree, "a/two")).kind, content("a/one"));
}

#[test]
fn whiteouts_that_share_an_inode_only_delete() {
    let made = Made::new();
    made.whiteout("a");
    for name in ["d", "file", "new"] {
        fs::hard_link(made.at("a"), made.at(name)).unwrap();
    }
    assert_eq!(shown(&made.read().unwrap()), expected(&["link = "]));
}

#[test]
fn the_notes_of_overlayfs_are_left_out_and_those_of_a_user_have_their_own_names() {
    let made = Made::new();
    let attributes = [
        ("trusted.overlay.origin", "x"),
        ("trusted.overlay.impure", "y"),
        ("trusted.overlay.nlink", "U+1"),
        ("trusted.overlay.uuid", "x"),
        ("trusted.overlay.protattr", "i"),
        ("trusted.overlay.overlay.opaque", "y"),
        ("trusted.overlay.overlay.overlay.metacopy", "x"),
        ("trusted.overlayer", "z"),
    ];
    made.folder("d", &attributes);
    fs::write(made.at("d/new"), "").unwrap();
    set(&made.at("d/new"), &attributes);
    // It was copied whole later and has kept the redirect.
    set(&made.at("d/new"), &[(REDIRECT, "/nowhere")]);
    let tree = made.read().unwrap();
    let Some(Node::Dir(d)) = tree.lookup(b"d") else {
        panic!()
    };
    for meta in [&tree.dir(d).meta, &tree.leaf(leaf(&tree, "d/new")).meta] {
        let pairs: Vec<(&[u8], &[u8])> = meta.xattrs.iter().map(|(name, value)| (&**name, &**value)).collect();
        let right: [(&[u8], &[u8]); 3] = [
            (b"trusted.overlay.opaque", b"y"),
            (b"trusted.overlay.overlay.metacopy", b"x"),
            (b"trusted.overlayer", b"z"),
        ];
        assert_eq!(pairs, right);
    }
    assert!(tree.lookup(b"d/f").is_some());
}

#[test]
fn what_leads_nowhere_is_named_with_its_attribute() {
    type Case<'a> = (&'a str, Box<dyn Fn(&Made)>, &'static str, &'a str);
    let folder = |redirect: &'static str| move |made: &Made| made.folder("x", &[(REDIRECT, redirect)]);
    let file = |redirect: &'static str| move |made: &Made| made.metacopy("x", &[(REDIRECT, redirect)]);
    let cases: [Case; 14] = [
        ("x", Box::new(folder("/a/none")), REDIRECT, "/a/none"),
        ("x", Box::new(folder("none")), REDIRECT, "none"),
        ("x", Box::new(folder("/file")), REDIRECT, "/file"),
        ("x", Box::new(folder("/file/x")), REDIRECT, "/file/x"),
        ("x", Box::new(folder("/")), REDIRECT, "/"),
        ("x", Box::new(folder("/a//b")), REDIRECT, "/a//b"),
        ("x", Box::new(folder("a/b")), REDIRECT, "a/b"),
        ("x", Box::new(folder("/a/..")), REDIRECT, "/a/.."),
        ("x", Box::new(|made| made.metacopy("x", &[])), METACOPY, "x"),
        ("x", Box::new(file("/a/none")), METACOPY, "/a/none"),
        // No regular file, and no file that a link leads to.
        ("x", Box::new(file("a")), METACOPY, "a"),
        ("x", Box::new(file("link")), METACOPY, "link"),
        (
            "n/file",
            Box::new(|made| {
                // Nothing below the folder that it is in.
                made.folder("n", &[]);
                made.metacopy("n/file", &[(REDIRECT, "file")]);
            }),
            METACOPY,
            "file",
        ),
        (
            "file",
            Box::new(|made| {
                // It has data of its own, and nobody knows which is right.
                made.metacopy("file", &[]);
                fs::write(made.at("file"), "longer").unwrap();
            }),
            METACOPY,
            "file",
        ),
    ];
    let mut made = Made::new();
    for (path, make, attribute, leads) in cases {
        made = made.again();
        make(&made);
        let failure = made.failure();
        let kind = FailureKind::Below {
            attribute,
            path: leads.to_owned(),
        };
        assert_eq!((&*failure.path, &failure.kind), (path, &kind));
        let text = failure.to_string();
        assert!(
            text.contains(path) && text.contains(attribute) && text.contains(leads),
            "{text}"
        );
    }
}

#[test]
fn what_no_mount_of_larder_makes_is_refused() {
    let cases: [(&str, &[(&str, &str)]); 4] = [
        ("d", &[(OPAQUE, "x")]),
        ("d", &[(OPAQUE, "")]),
        ("", &[(OPAQUE, "y")]),
        ("", &[(REDIRECT, "/d")]),
    ];
    let mut made = Made::new();
    for (path, attributes) in cases {
        made = made.again();
        fs::create_dir_all(made.at(path)).unwrap();
        set(&made.at(path), attributes);
        let failure = made.failure();
        let attribute = attributes[0].0.to_owned();
        assert_eq!(failure.kind, FailureKind::Overlay { attribute });
        assert_eq!(failure.path, if path.is_empty() { "." } else { path });
    }
    // An attribute that says "deleted", and versions of `metacopy` that are not known.
    for (attribute, value) in [
        ("trusted.overlay.whiteout", &b"y"[..]),
        (METACOPY, b"y"),
        (METACOPY, b"\x01\x04\0\0"),
        (METACOPY, b"\0\x05\0\0"),
    ] {
        made = made.again();
        fs::File::create(made.at("file")).unwrap().set_len(5).unwrap();
        lsetxattr(made.at("file"), attribute, value, XattrFlags::empty()).unwrap();
        let attribute = attribute.to_owned();
        assert_eq!(made.failure().kind, FailureKind::Overlay { attribute });
    }
    let made = made.again();
    fs::File::create(made.at("file")).unwrap().set_len(5).unwrap();
    lsetxattr(made.at("file"), METACOPY, b"\0\x04\0\0", XattrFlags::empty()).unwrap();
    assert_eq!(shown(&made.read().unwrap()), shown(&made.base));
}

#[test]
fn a_folder_below_in_two_places_is_named() {
    let made = Made::new();
    made.folder("x", &[(REDIRECT, "/a")]);
    let error = made.read().unwrap_err();
    assert!(error.to_string().contains("x/b"), "{error}");
}
