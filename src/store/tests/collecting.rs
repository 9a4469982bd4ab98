use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use crate::store::retention::{Policy, Reason};
use crate::store::testing::*;
use crate::store::*;

pub fn exists(store: &Store, content: &[u8]) -> bool {
    blob_path(store, &digest_of(content)).exists()
}

fn age_blob(store: &Store, content: &[u8], seconds: u64) {
    let file = File::open(blob_path(store, &digest_of(content))).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds))
        .unwrap();
}

#[test]
fn what_a_current_revision_needs_stays_and_the_rest_goes() {
    let (_dir, store) = store();
    publish(&store, "stays", &[("f", b"shared"), ("g", b"kept")]);
    let gone = publish(&store, "goes", &[("f", b"shared"), ("g", b"dropped")]);
    store.forget(&name("goes")).unwrap();
    let report = collect(&store);
    assert_eq!((report.scanned_blobs, report.deleted_blobs), (3, 1));
    assert_eq!(report.blocked, []);
    assert!(exists(&store, b"shared") && exists(&store, b"kept") && !exists(&store, b"dropped"));
    assert!(matches!(store.load(&gone.digest), Err(Error::MissingManifest { .. })));
    assert!(report.freed_bytes > 7, "the blob and the manifest");
    assert_eq!(check_all(&store), 2);
    assert_eq!(store.usage().unwrap().blobs, 2);
    let again = collect(&store);
    assert_eq!((again.deleted_blobs, again.freed_bytes, again.missing_blobs), (0, 0, 0));
}

#[test]
fn a_dry_run_reports_the_same_and_deletes_nothing() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"1")]);
    publish(&store, "a", &[("f", b"2")]);
    store.retire(&name("a"), "uid-1", SystemTime::now()).unwrap();
    let now = SystemTime::now();
    let dry = store.collect(&nothing_kept(), &Trees(vec![]), true, now).unwrap();
    assert!(dry.dry_run && exists(&store, b"1") && exists(&store, b"2"));
    assert_eq!(store.get_ref(&name("a")).unwrap().unwrap().history.len(), 2);
    let wet = store.collect(&nothing_kept(), &Trees(vec![]), false, now).unwrap();
    assert_eq!(
        (dry.deleted_blobs, dry.freed_bytes),
        (wet.deleted_blobs, wet.freed_bytes)
    );
    assert_eq!(dry.decisions, wet.decisions);
    let sorted = |mut history: Vec<DroppedHistory>| {
        history.sort_by_key(|dropped| dropped.digest);
        history
    };
    assert_eq!(sorted(dry.dropped_history), sorted(wet.dropped_history));
    assert_eq!(store.get_ref(&name("a")).unwrap(), None);
    assert_eq!(store.usage().unwrap().blobs, 0);
}

#[test]
fn a_dry_run_promises_no_deletion_that_something_unreadable_would_stop() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"garbage")]);
    store.forget(&name("a")).unwrap();
    publish(&store, "bad", &[("f", b"of the bad ref")]);
    fs::write(store.root().join("refs/test/bad"), "{").unwrap();
    let now = SystemTime::now();
    for dry_run in [true, false] {
        let report = store.collect(&nothing_kept(), &Trees(vec![]), dry_run, now).unwrap();
        assert_eq!(report.blocked.len(), 1);
        assert_eq!((report.deleted_blobs, report.freed_bytes), (0, 0), "dry run: {dry_run}");
        assert_eq!(report.decisions, []);
    }
}

#[test]
fn a_decision_names_some_of_what_went() {
    let (_dir, store) = store();
    let contents: Vec<String> = (0..30).map(|number| format!("content {number}")).collect();
    let files: Vec<(&str, &[u8])> = contents.iter().map(|text| (text.as_str(), text.as_bytes())).collect();
    let revision = publish(&store, "a", &files);
    store.forget(&name("a")).unwrap();
    let now = SystemTime::now();
    let dry = store.collect(&nothing_kept(), &Trees(vec![]), true, now).unwrap();
    let wet = store.collect(&nothing_kept(), &Trees(vec![]), false, now).unwrap();
    assert_eq!(dry.decisions, wet.decisions);
    let [manifests, blobs] = &wet.decisions[..] else {
        panic!("{:?}", wet.decisions);
    };
    assert_eq!(manifests.samples, [revision.digest.to_string()]);
    assert_eq!((blobs.kind, blobs.count, blobs.samples.len()), (Kind::Blob, 30, 5));
    let mut digests: Vec<String> = contents
        .iter()
        .map(|text| digest_of(text.as_bytes()).to_string())
        .collect();
    digests.sort();
    assert_eq!(blobs.samples, digests[..5]);
}

#[test]
fn garbage_without_bytes_goes_too() {
    let (_dir, store) = store();
    publish(&store, "a", &[("empty", b"")]);
    publish(&store, "b", &[("f", b"x")]);
    store.forget(&name("a")).unwrap();
    // Cut off by a crash of the disk: as long as nothing needs it, garbage like any other.
    let cut = blob_path(&store, &digest_of(b"never whole"));
    fs::write(&cut, "").unwrap();
    let report = collect(&store);
    assert_eq!((report.scanned_blobs, report.deleted_blobs), (3, 2));
    assert!(!exists(&store, b"") && !cut.exists() && exists(&store, b"x"));
    assert_eq!(store.usage().unwrap().blobs, 1);
}

#[test]
fn the_built_in_policy_keeps_history_and_young_blobs() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"old")]);
    publish(&store, "a", &[("f", b"new")]);
    publish(&store, "b", &[("f", b"young"), ("g", b"aged")]);
    store.forget(&name("b")).unwrap();
    age_blob(&store, b"old", 40 * 24 * 3600);
    age_blob(&store, b"young", 23 * 3600);
    age_blob(&store, b"aged", 25 * 3600);
    let report = store
        .collect(&Policy::built_in(), &Trees(vec![]), false, SystemTime::now())
        .unwrap();
    assert_eq!(report.deleted_blobs, 1);
    assert!(exists(&store, b"old") && exists(&store, b"young") && !exists(&store, b"aged"));
    assert_eq!(
        report.decisions.iter().find(|d| d.kind == Kind::Blob).unwrap().reason,
        Reason::Unreferenced
    );
}

#[test]
fn a_blob_whose_time_lies_in_the_future_counts_as_used_now() {
    let (_dir, store) = store();
    publish(&store, "b", &[("f", b"future")]);
    store.forget(&name("b")).unwrap();
    let file = File::open(blob_path(&store, &digest_of(b"future"))).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(1_000_000_000))
        .unwrap();
    store
        .collect(&Policy::built_in(), &Trees(vec![]), false, SystemTime::now())
        .unwrap();
    assert!(exists(&store, b"future"));
}

#[test]
fn a_tree_that_a_layer_holds_stays_after_its_ref_and_goes_after_the_layer() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"in use")]);
    store.forget(&name("a")).unwrap();
    let held = Trees(vec![revision.digest]);
    for _ in 0..2 {
        let report = store.collect(&nothing_kept(), &held, false, SystemTime::now()).unwrap();
        assert_eq!((report.deleted_blobs, report.freed_bytes), (0, 0));
        assert!(exists(&store, b"in use"));
    }
    assert_eq!(collect(&store).deleted_blobs, 1);
    assert!(!exists(&store, b"in use"));
}

#[test]
fn a_hold_keeps_a_tree_while_it_lives() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"held")]);
    let hold = store.hold(&revision.digest).unwrap();
    store.forget(&name("a")).unwrap();
    collect(&store);
    assert!(exists(&store, b"held"));
    let second = store.hold(hold.tree()).unwrap();
    drop(hold);
    collect(&store);
    assert!(exists(&store, b"held"));
    drop(second);
    collect(&store);
    assert!(!exists(&store, b"held"));
    assert!(matches!(
        store.hold(&revision.digest),
        Err(Error::MissingManifest { .. })
    ));
}

#[test]
fn a_build_keeps_a_tree_until_it_ends() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"held")]);
    let build = store.build().unwrap();
    assert_eq!(build.keep(&revision.digest).unwrap().len(), 1);
    store.forget(&name("a")).unwrap();
    collect(&store);
    assert!(exists(&store, b"held"));
    drop(build);
    collect(&store);
    assert!(!exists(&store, b"held"));
}

#[test]
fn history_is_young_as_long_as_it_was_held_lately() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"held")]);
    store.retire(&name("a"), "uid-1", at(1000)).unwrap();
    let manifest = File::open(store.root().join("manifests").join(revision.digest.hex())).unwrap();
    manifest.set_modified(at(1000)).unwrap();
    drop(store.hold(&revision.digest).unwrap());
    let policy = Policy {
        max_age: Some(Duration::from_secs(3600)),
        ..Policy::built_in()
    };
    let now = SystemTime::now();
    let report = store.collect(&policy, &Trees(vec![]), false, now).unwrap();
    assert_eq!(report.dropped_history, []);
    let report = store
        .collect(&policy, &Trees(vec![]), false, now + Duration::from_secs(3700))
        .unwrap();
    assert_eq!(report.dropped_history.len(), 1);
    assert_eq!(report.dropped_history[0].reason, Reason::MaxAge);
    assert_eq!(report.deleted_blobs, 1);
}

#[test]
fn a_running_build_keeps_what_it_put_and_what_it_found() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"found"), ("g", b"neither")]);
    let build = store.build().unwrap();
    assert!(build.find(&digest_of(b"found")).unwrap().is_some());
    let tree = tree_of(&build, &[("f", b"found"), ("h", b"put")]);
    store.forget(&name("a")).unwrap();
    collect(&store);
    assert!(exists(&store, b"found") && !exists(&store, b"neither"));
    build.publish(&tree, target("b", "uid")).unwrap();
    collect(&store);
    assert_eq!(check_all(&store), 2);
}

#[test]
fn an_unreadable_ref_stops_all_deletion_until_it_is_forgotten() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"garbage")]);
    store.forget(&name("a")).unwrap();
    publish(&store, "bad", &[("f", b"of the bad ref")]);
    let path = store.root().join("refs/test/bad");
    fs::write(&path, "{\"version\":1,").unwrap();
    let report = collect(&store);
    assert_eq!((report.deleted_blobs, report.freed_bytes), (0, 0));
    assert_eq!(report.blocked.len(), 1);
    assert_eq!(report.blocked[0].path, path.display().to_string());
    assert!(exists(&store, b"garbage") && exists(&store, b"of the bad ref"));
    store.forget(&name("bad")).unwrap();
    let report = collect(&store);
    assert_eq!((report.blocked.len(), report.deleted_blobs), (0, 2));
}

#[test]
fn a_cut_manifest_stops_all_deletion_until_its_tree_is_rebuilt() {
    let (_dir, store) = store();
    publish(&store, "garbage", &[("f", b"garbage")]);
    store.forget(&name("garbage")).unwrap();
    let revision = publish(&store, "a", &[("f", b"one"), ("g", b"two")]);
    let path = store.root().join("manifests").join(revision.digest.hex());
    for damage in ["cut", "missing"] {
        match damage {
            "cut" => File::options().write(true).open(&path).unwrap().set_len(40).unwrap(),
            _ => fs::remove_file(&path).unwrap(),
        }
        let report = collect(&store);
        assert_eq!(report.deleted_blobs, 0);
        assert_eq!(report.blocked.len(), 1, "{damage}");
        assert_eq!(report.blocked[0].path, path.display().to_string());
        assert!(
            report.blocked[0].message.contains("test/a"),
            "{}",
            report.blocked[0].message
        );
        assert!(exists(&store, b"one") && exists(&store, b"garbage"));
        // Other trees work.
        publish(&store, "other", &[("f", b"three")]);
        publish(&store, "a", &[("f", b"one"), ("g", b"two")]);
        assert_eq!(check_all(&store), 3);
    }
    assert_eq!(collect(&store).deleted_blobs, 1);
    assert!(!exists(&store, b"garbage"));
}

#[test]
fn who_needs_a_tree_now_is_named_before_its_history() {
    let (_dir, store) = store();
    let tree = publish(&store, "a", &[("f", b"x")]).digest;
    store.retire(&name("a"), "uid-1", SystemTime::now()).unwrap();
    let layers = (0..5).map(|n| HeldTree::by_layer(tree, format!("default/work-{n}")));
    let mount = HeldTree::by_mount(tree, std::path::Path::new("/srv/x"));
    let held = Held {
        // In no order, and one twice.
        trees: [mount.clone(), mount].into_iter().chain(layers.rev()).collect(),
        unreadable: vec![],
    };
    let policy = Policy {
        max_size: Some(1),
        ..nothing_kept()
    };
    let report = store.collect(&policy, &held, false, SystemTime::now()).unwrap();
    let over = report.over_limit.unwrap();
    assert_eq!(over.largest.len(), 1);
    let named = [
        "the layer default/work-0",
        "the layer default/work-1",
        "the layer default/work-2",
        "2 more layers",
        "the mount at /srv/x",
        "the history of test/a",
    ];
    assert_eq!(over.largest[0].needed_by, named);
    assert!(over.causes.layers > 0 && over.causes.in_use == 0, "{:?}", over.causes);
}

#[test]
fn a_holder_that_cannot_be_read_stops_all_deletion() {
    struct Broken;
    impl Holders for Broken {
        fn held(&self) -> Result<Held, Error> {
            Ok(Held {
                trees: vec![],
                unreadable: vec![Problem {
                    path: "layers/x/layer.json".to_owned(),
                    message: "cut".to_owned(),
                }],
            })
        }
    }
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"x")]);
    store.forget(&name("a")).unwrap();
    let report = store
        .collect(&nothing_kept(), &Broken, false, SystemTime::now())
        .unwrap();
    assert_eq!((report.deleted_blobs, report.blocked.len()), (0, 1));
    assert!(exists(&store, b"x"));
    let gone = Trees(vec![TreeDigest::from_bytes([7; 32])]);
    let report = store.collect(&nothing_kept(), &gone, false, SystemTime::now()).unwrap();
    assert_eq!((report.deleted_blobs, report.blocked.len()), (0, 1));
    assert!(
        report.blocked[0].message.contains("needed by the mount at /mnt"),
        "{}",
        report.blocked[0].message
    );
}

#[test]
fn an_image_goes_with_its_tree_but_not_while_it_is_used() {
    let (_dir, store) = store();
    let revision = publish(&store, "a", &[("f", b"x")]);
    let hex = revision.digest.hex();
    let folder = store.images_dir().join(format!("{hex}-u1.tree"));
    let file = store.images_dir().join(format!("{hex}.erofs"));
    let unknown = store.images_dir().join("notes.txt");
    fs::create_dir_all(folder.join("sub")).unwrap();
    for path in [&folder.join("sub/f"), &file, &unknown] {
        fs::write(path, "xyz").unwrap();
    }
    collect(&store);
    assert!(folder.exists() && file.exists(), "the tree is current");
    store.forget(&name("a")).unwrap();
    let hold = store.hold(&revision.digest).unwrap();
    collect(&store);
    assert!(folder.exists() && file.exists(), "the tree is held");
    drop(hold);
    let report = collect(&store);
    assert!(!folder.exists() && !file.exists() && unknown.exists());
    let images = report
        .decisions
        .iter()
        .find(|decision| decision.kind == Kind::Image)
        .unwrap();
    assert_eq!((images.count, images.bytes, images.reason), (2, 6, Reason::Orphaned));
    assert!(staging_is_empty(&store));
}

#[test]
fn of_two_images_that_one_stays_which_was_used_last() {
    let (_dir, store) = store();
    let [old, new] = ["old", "new"].map(|name| {
        let tree = publish(&store, name, &[("f", name.as_bytes())]).digest;
        let image = store.images_dir().join(format!("{}.erofs", tree.hex()));
        fs::write(&image, vec![1; 100_000]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        (tree, image)
    });
    // The one that was made first is used while a collection looks.
    let modified = |path: &std::path::Path| fs::metadata(path).unwrap().modified().unwrap();
    let made = modified(&old.1);
    store
        .collect(&Policy::built_in(), &Trees(vec![old.0]), false, SystemTime::now())
        .unwrap();
    assert_eq!(modified(&old.1), made, "nothing of it is another");
    let policy = Policy {
        max_size: Some(150_000),
        ..Policy::built_in()
    };
    let report = store
        .collect(&policy, &Trees(vec![]), false, SystemTime::now())
        .unwrap();
    assert_eq!(report.over_limit, None);
    assert_eq!((old.1.exists(), new.1.exists()), (true, false));
}

#[test]
fn a_store_over_its_size_loses_images_then_the_longest_unused() {
    let (_dir, store) = store();
    let big = vec![1u8; 100_000];
    let mut current = None;
    for (age, content) in [(300, 2u8), (200, 3), (100, 4), (60, 1)] {
        let build = store.build().unwrap();
        let tree = tree_of(&build, &[("f", &vec![content; 100_000])]);
        let mut target = target("a", "uid-1");
        target.now = SystemTime::now() - Duration::from_secs(age);
        let revision = build.publish(&tree, target).unwrap();
        let manifest = File::open(store.root().join("manifests").join(revision.digest.hex())).unwrap();
        manifest
            .set_modified(SystemTime::now() - Duration::from_secs(age))
            .unwrap();
        age_blob(&store, &vec![content; 100_000], age);
        current = Some(revision);
    }
    let current = current.unwrap();
    let image = store.images_dir().join(format!("{}.tree", current.digest.hex()));
    fs::create_dir(&image).unwrap();
    fs::write(image.join("f"), &big).unwrap();
    let run = |max_size| {
        let policy = Policy {
            max_size: Some(max_size),
            grace: Duration::from_secs(50),
            ..Policy::built_in()
        };
        store
            .collect(&policy, &Trees(vec![]), false, SystemTime::now())
            .unwrap()
    };
    assert_eq!(run(600_000).freed_bytes, 0);
    assert_eq!((run(410_000).freed_bytes, image.exists()), (100_000, false));
    let report = run(310_000);
    assert_eq!((report.deleted_blobs, report.dropped_history.len()), (1, 1));
    assert!(!exists(&store, &[2; 100_000]) && exists(&store, &[3; 100_000]));
    assert_eq!(report.dropped_history[0].reason, Reason::MaxSize);
    let report = run(10);
    assert_eq!(report.deleted_blobs, 2);
    let over = report.over_limit.unwrap();
    assert_eq!(
        (over.causes.current, over.causes.history, over.max_size),
        (100_000, 0, Some(10))
    );
    assert_eq!(over.size, over.causes.current + over.causes.manifests);
    assert_eq!(check_all(&store), 1);
}

#[test]
fn a_missing_blob_is_counted() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"x"), ("g", b"y")]);
    fs::remove_file(blob_path(&store, &digest_of(b"x"))).unwrap();
    assert_eq!(collect(&store).missing_blobs, 1);
}

#[test]
fn large_shards_are_looked_through_alike_by_one_thread_and_by_two() {
    const SHARDS: u64 = 8;
    const BLOBS: u64 = 400;
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"x")]);
    // A plan looks at names and times, and at no content.
    for shard in 0..SHARDS {
        let folder = store.root().join(format!("objects/{shard:02x}"));
        fs::create_dir_all(&folder).unwrap();
        for blob in 0..BLOBS {
            let file = File::create(folder.join(format!("{blob:062x}"))).unwrap();
            file.set_modified(at(1000)).unwrap();
        }
    }
    let now = SystemTime::now();
    let plan = || store.collect(&nothing_kept(), &Trees(vec![]), true, now).unwrap();
    let by_two = plan();
    // While there is a build, it is left a processor.
    let build = store.build().unwrap();
    let by_one = plan();
    drop(build);
    for report in [&by_one, &by_two] {
        assert_eq!(
            (report.scanned_blobs, report.deleted_blobs, report.missing_blobs),
            (SHARDS * BLOBS + 1, SHARDS * BLOBS, 0)
        );
    }
    assert_eq!(by_one.decisions, by_two.decisions);
}

#[test]
fn a_report_is_json_with_times_and_reasons() {
    let (_dir, store) = store();
    publish(&store, "a", &[("f", b"x")]);
    store.retire(&name("a"), "uid-1", at(1000)).unwrap();
    let json = serde_json::to_value(collect(&store)).unwrap();
    assert_eq!(json["deletedBlobs"], 1);
    assert_eq!(json["droppedHistory"][0]["name"], "test/a");
    assert_eq!(json["droppedHistory"][0]["reason"], "maxAge");
    assert!(json["started"].as_str().unwrap().ends_with('Z'));
    assert_eq!(json["decisions"][0]["kind"], "manifest");
}

#[test]
fn a_manifest_that_nothing_names_is_told_with_its_last_use() {
    let (_dir, store) = store();
    let tree = publish(&store, "gone", &[("f", b"1")]).digest;
    store.forget(&name("gone")).unwrap();
    let file = std::fs::File::open(store.root().join("manifests").join(tree.hex())).unwrap();
    file.set_modified(at(1_000_000)).unwrap();
    for dry_run in [true, false] {
        let how = Collecting {
            dry_run,
            now: SystemTime::now(),
            rate: None,
            cancel: &never(),
        };
        let (_, removals) = store.collect_with(&nothing_kept(), &Trees(vec![]), &how).unwrap();
        let gone = removals.iter().find(|gone| gone.kind == Kind::Manifest).unwrap();
        assert_eq!((gone.reason, gone.last_used), (Reason::Orphaned, at(1_000_000)));
    }
}
