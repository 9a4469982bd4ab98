//! What happens while a collection is under way.

use std::fs;
use std::time::SystemTime;

use super::collecting::exists;
use crate::store::testing::*;
use crate::store::*;

/// Asked after the mark began: acts then.
struct Meanwhile<F: Fn()>(F);

impl<F: Fn()> Holders for Meanwhile<F> {
    fn held(&self) -> Result<Held, Error> {
        (self.0)();
        Ok(Held::default())
    }
}

#[test]
fn a_hold_or_lease_that_ended_during_a_collection_still_counts() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"held shortly")]);
    publish(&store, "b", &[("f", b"leased shortly")]);
    store.forget(&name("a")).unwrap();
    store.forget(&name("b")).unwrap();
    let act = Meanwhile(|| {
        drop(store.hold(&revision.digest).unwrap());
        assert!(
            store
                .build()
                .unwrap()
                .find(&digest_of(b"leased shortly"))
                .unwrap()
                .is_some()
        );
    });
    store.collect(&nothing_kept(), &act, false, SystemTime::now()).unwrap();
    assert!(exists(&store, b"held shortly") && exists(&store, b"leased shortly"));
    assert_eq!(collect(&store).deleted_blobs, 2, "not for ever");
}

#[test]
fn a_tree_that_is_published_during_a_collection_is_safe() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"old blob")]);
    store.forget(&name("a")).unwrap();
    let act = Meanwhile(|| {
        publish(&store, "new", &[("f", b"old blob"), ("g", b"new blob")]);
    });
    store.collect(&nothing_kept(), &act, false, SystemTime::now()).unwrap();
    assert_eq!(check_all(&store), 2);
}

/// A collection in which something happens between the plan and its execution.
fn collect_and(store: &Store, after_plan: &dyn Fn()) -> Report {
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        rate: None,
        cancel: &false.into(),
    };
    let collected = store.collect_and(&nothing_kept(), &Trees(vec![]), &how, after_plan);
    collected.unwrap().0
}

#[test]
fn a_hold_on_history_that_is_about_to_go_keeps_its_blobs() {
    for forgotten in [false, true] {
        let (_dir, store) = store();
        let revision = publish(&store, "a", &[("f", b"x"), ("g", b"y")]);
        match forgotten {
            true => store.forget(&name("a")).unwrap(),
            false => assert!(store.retire(&name("a"), "uid-1", SystemTime::now()).unwrap()),
        }
        let hold = std::cell::OnceCell::new();
        let report = collect_and(&store, &|| hold.set(store.hold(&revision.digest).unwrap()).unwrap());
        assert_eq!(report.deleted_blobs, 0);
        let tree = store.load(&revision.digest).unwrap();
        assert!(tree.contents().all(|(digest, _)| store.read(digest).is_ok()));
        drop(hold);
        assert_eq!(collect(&store).deleted_blobs, 2);
    }
}

#[test]
fn a_hold_on_a_tree_keeps_its_image_that_was_about_to_go() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"x")]);
    store.forget(&name("a")).unwrap();
    let image = store.images_dir().join(format!("{}.erofs", revision.digest.hex()));
    fs::write(&image, "x").unwrap();
    collect_and(&store, &|| drop(store.hold(&revision.digest).unwrap()));
    assert!(image.exists(), "held at some time since the mark began");
    collect(&store);
    assert!(!image.exists());
}

#[test]
fn a_blob_that_is_found_when_it_is_about_to_go_stays() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"found"), ("g", b"not found")]);
    store.forget(&name("a")).unwrap();
    let build = store.build().unwrap();
    let report = collect_and(&store, &|| {
        assert_eq!(build.find(&digest_of(b"found")).unwrap(), Some(5));
        // A build that begins and ends between counts as well.
        assert!(!store.build().unwrap().put_bytes(b"found").unwrap().new);
    });
    assert_eq!(report.deleted_blobs, 1);
    let tree = tree_of(&build, &[("f", b"found")]);
    build.publish(&tree, target("b", "uid")).unwrap();
    assert_eq!(check_all(&store), 1);
}

#[test]
fn a_tree_that_is_published_again_when_its_history_is_about_to_go_stays() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"1")]);
    publish(&store, "a", &[("f", b"2")]);
    let report = collect_and(&store, &|| {
        publish(&store, "a", &[("f", b"1")]);
        publish(&store, "other", &[("f", b"1")]);
    });
    assert_eq!((report.dropped_history.len(), report.deleted_blobs), (0, 0));
    assert_eq!(check_all(&store), 2);
    assert_eq!(collect(&store).deleted_blobs, 1);
    assert_eq!(check_all(&store), 1);
}
