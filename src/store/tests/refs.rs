use std::fs;

use crate::store::testing::*;
use crate::store::*;

#[test]
fn names_are_those_of_kubernetes() {
    let long = "a".repeat(64);
    for (namespace, text) in [("a", "b"), ("kube-system", "a.b-c.d9"), ("0", &"a".repeat(253))] {
        assert_eq!(
            RefName::new(namespace, text).unwrap().to_string(),
            format!("{namespace}/{text}")
        );
    }
    for (namespace, text) in [
        ("", "a"),
        ("a", ""),
        ("a", "."),
        ("a", ".."),
        ("a", "a/b"),
        ("..", "a"),
        ("a.b", "a"),
        ("A", "a"),
        ("a", "A"),
        ("-a", "a"),
        ("a", "a-"),
        ("a", "a..b"),
        ("a", "a\0"),
        (&long, "a"),
        ("a", &"a".repeat(254)),
        ("a", "é"),
    ] {
        let error = RefName::new(namespace, text).unwrap_err();
        assert!(matches!(error, Error::InvalidName { .. }), "{namespace:?}/{text:?}");
    }
}

fn published(store: &Store, content: &[u8], change: impl FnOnce(&mut Publish)) -> Revision {
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("f", content)]);
    let mut target = target("a", "uid-1");
    change(&mut target);
    build.publish(&tree, target).unwrap()
}

fn digests(entry: &Ref) -> Vec<TreeDigest> {
    entry.history.iter().map(|old| old.revision.digest).collect()
}

#[test]
fn an_equal_tree_keeps_its_revision() {
    let (_dir, store) = store();
    let first = published(&store, b"1", |target| target.now = at(100));
    let second = published(&store, b"1", |target| {
        target.now = at(200);
        target.generation = 7;
        target.request = Some("again".to_owned());
        target.history_limit = 9;
    });
    assert_eq!(second, first);
    let entry = store.get_ref(&name("a")).unwrap().unwrap();
    assert_eq!(
        (entry.generation, entry.request.as_deref(), entry.history_limit),
        (7, Some("again"), 9)
    );
    assert_eq!((entry.current, entry.history), (Some(first), vec![]));
}

#[test]
fn former_revisions_are_history_up_to_the_limit() {
    let (_dir, store) = store();
    let revisions: Vec<Revision> = (0..5u8)
        .map(|i| {
            published(&store, &[i], |target| {
                target.now = at(100 + u64::from(i));
                target.history_limit = 2;
            })
        })
        .collect();
    let entry = store.get_ref(&name("a")).unwrap().unwrap();
    assert_eq!(entry.current.as_ref(), Some(&revisions[4]));
    assert_eq!(digests(&entry), [revisions[3].digest, revisions[2].digest]);
    assert_eq!(entry.history[0].retired_at, at(104));

    // A tree that is current again is not history.
    published(&store, &[2], |target| {
        target.now = at(200);
        target.history_limit = 2;
    });
    let entry = store.get_ref(&name("a")).unwrap().unwrap();
    assert_eq!(entry.current.as_ref().unwrap().digest, revisions[2].digest);
    assert_eq!(digests(&entry), [revisions[4].digest, revisions[3].digest]);

    // A lower limit holds at the next publish, of an equal tree too.
    published(&store, &[2], |target| target.history_limit = 0);
    assert_eq!(store.get_ref(&name("a")).unwrap().unwrap().history, []);
}

#[test]
fn another_owner_takes_the_name_and_the_old_tree_becomes_history() {
    let (_dir, store) = store();
    let old = published(&store, b"old", |target| target.now = at(100));
    let new = published(&store, b"new", |target| {
        target.owner = "uid-2".to_owned();
        target.now = at(200);
    });
    let entry = store.get_ref(&name("a")).unwrap().unwrap();
    assert_eq!((entry.owner.as_str(), entry.current.clone()), ("uid-2", Some(new)));
    assert_eq!(digests(&entry), [old.digest]);
    assert!(
        !store.retire(&name("a"), "uid-1", at(300)).unwrap(),
        "the first owner has no say any more"
    );
    assert_eq!(store.get_ref(&name("a")).unwrap().unwrap(), entry);

    // An equal tree is the new owner's own revision, and not history beside itself.
    let taken = published(&store, b"new", |target| {
        target.owner = "uid-3".to_owned();
        target.now = at(400);
    });
    assert_eq!((taken.built_at, taken.added), (at(400), 0));
    assert_eq!(digests(&store.get_ref(&name("a")).unwrap().unwrap()), [old.digest]);
}

#[test]
fn a_retired_ref_keeps_its_tree_as_history() {
    let (_dir, store) = store();
    let revision = published(&store, b"x", |_| {});
    assert!(store.retire(&name("a"), "uid-1", at(500)).unwrap());
    let entry = store.get_ref(&name("a")).unwrap().unwrap();
    assert_eq!(entry.current, None);
    let retired = Retired {
        revision,
        retired_at: at(500),
    };
    assert_eq!(entry.history, std::slice::from_ref(&retired));
    assert!(store.retire(&name("a"), "uid-1", at(900)).unwrap(), "twice is once");
    assert_eq!(store.get_ref(&name("a")).unwrap().unwrap().history, [retired]);
    assert!(!store.retire(&name("b"), "uid-1", at(500)).unwrap());
}

#[test]
fn a_ref_without_history_goes_when_it_is_retired() {
    let (_dir, store) = store();
    published(&store, b"x", |target| target.history_limit = 0);
    assert!(store.retire(&name("a"), "uid-1", at(500)).unwrap());
    assert_eq!(store.get_ref(&name("a")).unwrap(), None);
    assert_eq!(
        fs::read_dir(store.root().join("refs")).unwrap().count(),
        0,
        "nor does its namespace stay"
    );
}

#[test]
fn an_unreadable_ref_is_reported_forgotten_or_healed_by_its_owner() {
    let (_dir, store) = store();
    published(&store, b"x", |_| {});
    publish(&store, "good", &[]);
    let path = store.root().join("refs/test/a");
    let damages: [&[u8]; 4] = [
        b"",
        b"{",
        br#"{"version":9,"owner":"u","generation":1,"historyLimit":1}"#,
        b"\xff",
    ];
    for damage in damages {
        fs::write(&path, damage).unwrap();
        let refs = store.refs().unwrap();
        assert_eq!(refs.refs.len(), 1);
        assert_eq!(refs.refs[0].name, name("good"));
        assert_eq!(refs.unreadable.len(), 1);
        assert_eq!(refs.unreadable[0].path, path.display().to_string());
        let error = store.get_ref(&name("a")).unwrap_err();
        assert!(
            error.to_string().contains("test/a") && error.to_string().contains("forget"),
            "{error}"
        );
        assert!(matches!(
            store.retire(&name("a"), "uid-1", at(1)),
            Err(Error::BadRef { .. })
        ));
    }
    published(&store, b"x", |_| {});
    assert_eq!(store.refs().unwrap().unreadable, []);

    fs::write(&path, "{").unwrap();
    store.forget(&name("a")).unwrap();
    assert_eq!(store.get_ref(&name("a")).unwrap(), None);
    assert_eq!(store.refs().unwrap().unreadable, []);
    store.forget(&name("a")).unwrap();
}

#[test]
fn what_is_no_ref_at_all_is_reported() {
    let (_dir, store) = store();
    let refs = store.root().join("refs");
    fs::create_dir_all(refs.join("test/a-folder")).unwrap();
    fs::write(refs.join("a-file"), "x").unwrap();
    fs::write(refs.join("test/BAD"), "x").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", refs.join("test/link")).unwrap();
    let unreadable: Vec<String> = store
        .refs()
        .unwrap()
        .unreadable
        .into_iter()
        .map(|problem| problem.path)
        .collect();
    let expected = ["a-file", "test/BAD", "test/a-folder", "test/link"];
    assert_eq!(unreadable, expected.map(|path| refs.join(path).display().to_string()));
    store.forget(&name("a-folder")).unwrap();
    store.forget(&name("link")).unwrap();
    assert!(fs::exists("/etc/passwd").unwrap());
    assert_eq!(store.refs().unwrap().unreadable.len(), 2);
}

#[test]
fn a_ref_that_could_not_be_read_again_is_not_written() {
    let (_dir, store) = store();
    let before = publish(&store, "a", &[("f", b"1")]).digest;
    let build = store.build().unwrap();
    let tree = tree_of(&build, &[("f", b"2")]);
    let large = Publish {
        source: serde_json::json!({"directory": {"exclude": ["x".repeat(1 << 20)]}}),
        ..target("a", "uid-1")
    };
    let error = build.publish(&tree, large).unwrap_err().to_string();
    assert!(
        error.contains("refs/test/a") && error.contains("larger than 1048576"),
        "{error}"
    );
    let entry = store.get_ref(&name("a")).unwrap().unwrap();
    assert_eq!(entry.current.map(|revision| revision.digest), Some(before));
}
