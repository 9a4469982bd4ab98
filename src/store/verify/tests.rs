use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::store::testing::*;
use crate::store::tests::full_disk::{disk_of, noise};
use crate::store::tree::Tree;
use crate::store::{Options, Revision};

fn verify_with(store: &Store, scope: Scope) -> Verification {
    let options = VerifyOptions { scope, rate: None };
    store
        .verify(&options, &VerifyProgress::default(), &AtomicBool::new(false))
        .unwrap()
}

fn verify(store: &Store) -> Verification {
    verify_with(store, Scope::All)
}

/// Puts other bytes under a blob's name.
fn damage(store: &Store, digest: &Digest, bytes: &[u8]) {
    let path = blob_path(store, digest);
    fs::remove_file(&path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn only<T>(mut list: Vec<T>) -> T {
    assert_eq!(list.len(), 1);
    list.remove(0)
}

#[test]
fn a_whole_store_is_sound_and_everything_in_it_was_read() {
    let (_dir, store) = store();
    let large = noise(1, 700_001);
    publish(&store, "a", &[("x", b"one"), ("y", &large), ("z", b"")]);
    publish(&store, "a", &[("x", b"two")]);
    publish(&store, "b", &[("x", &noise(2, 1 << 20)), ("y", &noise(3, 4096))]);
    let progress = VerifyProgress::default();
    let options = VerifyOptions {
        scope: Scope::All,
        rate: None,
    };
    let found = store.verify(&options, &progress, &AtomicBool::new(false)).unwrap();
    assert!(found.is_sound() && found.complete, "{found:?}");
    assert_eq!(
        (found.blobs, found.bytes, found.passed_over),
        (6, 6 + 700_001 + (1 << 20) + 4096, 0)
    );
    assert_eq!((found.refs, found.manifests), (2, 3));
    assert_eq!((found.quarantined_blobs, found.hurt.len()), (0, 0));
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!((read(&progress.blobs), read(&progress.total_blobs)), (6, 6));
    assert_eq!(
        (read(&progress.bytes), read(&progress.total_bytes)),
        (found.bytes, found.bytes)
    );
}

/// Makes something wrong under a name.
type Wrong = fn(&Path);

#[test]
fn whatever_is_wrong_with_a_blob_is_found_moved_away_and_healed_by_the_next_put() {
    let right: &[u8] = b"right bytes";
    let digest = digest_of(right);
    let other_bytes = |bytes: &[u8]| Fault::Damaged {
        found: digest_of(bytes),
        length: bytes.len() as u64,
    };
    let cases: [(&str, Wrong, Fault); 5] = [
        (
            "flipped",
            |path| fs::write(path, b"right bytfs").unwrap(),
            other_bytes(b"right bytfs"),
        ),
        (
            "cut off",
            |path| fs::write(path, b"right").unwrap(),
            other_bytes(b"right"),
        ),
        ("empty", |path| fs::write(path, b"").unwrap(), other_bytes(b"")),
        (
            "a folder",
            |path| fs::create_dir_all(path.join("x")).unwrap(),
            Fault::NotAFile,
        ),
        ("a link", |path| symlink("/etc/passwd", path).unwrap(), Fault::NotAFile),
    ];
    for (what, wrong, fault) in cases {
        let (_dir, store) = store();
        let files: [(&str, &[u8]); 2] = [("x", right), ("y", b"other")];
        let tree = publish(&store, "a", &files).digest;
        let path = blob_path(&store, &digest);
        fs::remove_file(&path).unwrap();
        wrong(&path);
        let found = verify(&store);
        assert!(!found.is_sound(), "{what}");
        let bad = only(found.bad_blobs);
        assert_eq!((bad.digest, &bad.fault, &bad.path), (digest, &fault, &path), "{what}");
        let quarantined = bad.quarantined.unwrap();
        assert!(quarantined.starts_with(store.root().join("quarantine")));
        assert!(
            quarantined.symlink_metadata().is_ok() && path.symlink_metadata().is_err(),
            "{what}"
        );
        assert_eq!((bad.not_moved, bad.healed), (None, false));
        assert_eq!(found.quarantined_blobs, 1);
        assert_eq!(only(found.hurt).digest, tree);

        // What is gone stays known until it is there again.
        let again = verify(&store);
        let bad = only(again.bad_blobs);
        assert_eq!((&bad.fault, bad.quarantined), (&Fault::Missing, None));
        publish(&store, "a", &files);
        assert!(verify(&store).is_sound(), "{what}");
        assert_eq!(check_all(&store), 2);
        let count = store.usage().unwrap();
        assert_eq!((count.blobs, count.blob_bytes), (2, 16));
    }
}

#[test]
fn the_report_says_which_refs_trees_and_files_are_hurt() {
    let (_dir, store) = store();
    let many: Vec<String> = (0..8).map(|n| format!("f{n}")).collect();
    let mut files: Vec<(&str, &[u8])> = many.iter().map(|name| (name.as_str(), b"lost".as_slice())).collect();
    files.push(("whole", b"whole"));
    let old = publish(&store, "a", &files).digest;
    let now = publish(&store, "a", &[("x", b"gone"), ("y", b"lost"), ("z", b"whole")]).digest;
    publish(&store, "b", &[("x", b"whole")]);
    damage(&store, &digest_of(b"lost"), b"l0st");
    fs::remove_file(blob_path(&store, &digest_of(b"gone"))).unwrap();
    let found = verify(&store);
    let bad = |content: &[u8]| {
        found
            .bad_blobs
            .iter()
            .find(|bad| bad.digest == digest_of(content))
            .unwrap()
    };
    assert_eq!(found.bad_blobs.len(), 2);
    assert_eq!((&bad(b"gone").fault, bad(b"gone").files), (&Fault::Missing, 1));
    assert_eq!((bad(b"lost").files, bad(b"lost").samples.len()), (9, 5));
    assert_eq!(
        bad(b"lost").samples[0],
        FileOf {
            manifest: now,
            path: "y".to_owned()
        }
    );
    let [first, second] = &found.hurt[..] else {
        panic!("{found:?}")
    };
    assert_eq!(
        (first.digest, &first.current_of[..], first.history_of.len()),
        (now, &["test/a".to_owned()][..], 0)
    );
    assert_eq!((first.blobs, first.files), (2, 2));
    assert_eq!(
        (second.digest, second.current_of.len(), &second.history_of[..]),
        (old, 0, &["test/a".to_owned()][..])
    );
    assert_eq!((second.blobs, second.files, second.samples.len()), (1, 8, 5));
    assert_eq!(second.samples[1].path, "f1");
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["scope"], "all");
    assert_eq!(json["badBlobs"][0]["digest"], found.bad_blobs[0].digest.to_string());
    assert!(
        json["badBlobs"][0]["fault"] == "damaged" || json["badBlobs"][0]["fault"] == "missing",
        "{json}"
    );
}

#[test]
fn damaged_and_missing_manifests_and_refs_are_reported_and_left_where_they_are() {
    let (_dir, store) = store();
    let damaged = publish(&store, "a", &[("x", b"one")]).digest;
    let missing = publish(&store, "b", &[("x", b"two")]).digest;
    publish(&store, "c", &[("x", b"three")]);
    let path = |digest: &TreeDigest| store.root().join("manifests").join(digest.hex());
    let mut bytes = fs::read(path(&damaged)).unwrap();
    bytes[20] ^= 1;
    fs::remove_file(path(&damaged)).unwrap();
    fs::write(path(&damaged), &bytes).unwrap();
    fs::remove_file(path(&missing)).unwrap();
    fs::write(store.root().join("refs/test/c"), "{").unwrap();
    let found = verify(&store);
    assert!(!found.is_sound());
    assert_eq!((found.bad_blobs.len(), found.manifests, found.refs), (0, 1, 2));
    assert!(only(found.bad_refs).path.ends_with("refs/test/c"));
    let [first, second] = &found.bad_manifests[..] else {
        panic!()
    };
    assert_eq!(
        (first.digest, &first.current_of[..]),
        (damaged, &["test/a".to_owned()][..])
    );
    assert_eq!(
        (second.digest, &second.current_of[..]),
        (missing, &["test/b".to_owned()][..])
    );
    assert!(first.message.contains("damaged") && second.message.contains("not in the store"));
    assert_eq!(fs::read(path(&damaged)).unwrap(), bytes);
    // They stop a collection as before.
    let report = collect(&store);
    assert_eq!((report.blocked.len(), report.deleted_blobs), (3, 0));
    publish(&store, "a", &[("x", b"one")]);
    publish(&store, "b", &[("x", b"two")]);
    store.forget(&name("c")).unwrap();
    assert!(verify(&store).is_sound());
}

#[test]
fn a_manifest_that_gives_a_right_content_a_wrong_length_is_what_is_damaged() {
    let (_dir, store) = store();
    publish(&store, "a", &[("x", b"right bytes")]);
    let mut tree = Tree::new(meta(0o755));
    tree.add_leaf(Tree::ROOT, *b"x", file(digest_of(b"right bytes"), 7))
        .unwrap();
    let tree = tree.finish().unwrap();
    let mut bytes = Vec::new();
    let digest = tree.encode(&mut bytes).unwrap();
    fs::write(store.root().join("manifests").join(digest.hex()), bytes).unwrap();
    for scope in [Scope::All, Scope::Changed] {
        let found = verify_with(&store, scope);
        assert_eq!(found.bad_blobs, []);
        let bad = only(found.bad_manifests);
        assert_eq!(bad.digest, digest);
        assert!(bad.message.contains("7 bytes, but that has 11"), "{}", bad.message);
    }
    // The same with only that manifest, and with a blob that is cut off to the length that it gives.
    store.forget(&name("a")).unwrap();
    damage(&store, &digest_of(b"right bytes"), b"right b");
    let found = verify(&store);
    assert!(matches!(only(found.bad_blobs).fault, Fault::Damaged { length: 7, .. }));
}

/// Publishes a tree with a file of each content.
fn publish_each(store: &Store, contents: &[Vec<u8>]) {
    let names: Vec<String> = (0..contents.len()).map(|n| format!("f{n}")).collect();
    let files = names.iter().zip(contents);
    let files: Vec<(&str, &[u8])> = files.map(|(name, content)| (&**name, &**content)).collect();
    publish(store, "a", &files);
}

#[test]
fn what_changed_is_read_and_what_lies_still_is_not() {
    let (_dir, store) = store();
    let contents: Vec<Vec<u8>> = (0..20u8).map(|n| vec![n; 100 + usize::from(n)]).collect();
    publish_each(&store, &contents);
    // With no full verification on record, everything has changed.
    let found = verify_with(&store, Scope::Changed);
    assert_eq!((found.blobs, found.passed_over), (20, 0));
    // File times are the kernel's, and lag behind by at most a second, by which it looks back.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert_eq!(verify(&store).blobs, 20);
    let found = verify_with(&store, Scope::Changed);
    assert_eq!((found.blobs, found.passed_over), (0, 20));
    let (changed, lost) = (digest_of(&contents[3]), digest_of(&contents[4]));
    damage(&store, &changed, &[7; 103]);
    fs::remove_file(blob_path(&store, &lost)).unwrap();
    publish(&store, "b", &[("x", b"new")]);
    let found = verify_with(&store, Scope::Changed);
    assert_eq!((found.blobs, found.passed_over), (2, 18));
    assert_eq!(found.bad_blobs.len(), 2);
    assert!(
        found
            .bad_blobs
            .iter()
            .any(|bad| bad.digest == changed && bad.quarantined.is_some())
    );
    assert!(
        found
            .bad_blobs
            .iter()
            .any(|bad| bad.digest == lost && bad.fault == Fault::Missing)
    );
    // A record of the future means that the clock was set back: nothing is known then.
    let record = store.root().join("runs/verify.json");
    fs::write(&record, r#"{"version": 1, "fullStarted": "2999-01-01T00:00:00Z"}"#).unwrap();
    assert_eq!(verify_with(&store, Scope::Changed).blobs, 19);
    fs::write(&record, "{").unwrap();
    assert_eq!(verify_with(&store, Scope::Changed).blobs, 19);
}

#[test]
fn a_sample_reads_a_part_and_still_misses_nothing_that_is_missing() {
    let (_dir, store) = store();
    let contents: Vec<Vec<u8>> = (0..200u8).map(|n| vec![n; 10]).collect();
    publish_each(&store, &contents);
    let scope = Scope::Sample { fraction: 0.5, seed: 7 };
    let found = verify_with(&store, scope);
    assert!((60..140).contains(&found.blobs), "{}", found.blobs);
    assert_eq!(found.blobs + found.passed_over, 200);
    assert_eq!(found.scope, scope);
    for content in &contents[..3] {
        fs::remove_file(blob_path(&store, &digest_of(content))).unwrap();
    }
    let found = verify_with(&store, Scope::Sample { fraction: 0.0, seed: 7 });
    assert_eq!((found.blobs, found.bad_blobs.len()), (0, 3));
}

#[test]
fn a_cancelled_verification_says_so_and_leaves_no_record() {
    let (_dir, store) = store();
    publish(&store, "a", &[("x", b"one")]);
    let options = VerifyOptions {
        scope: Scope::All,
        rate: None,
    };
    let found = store
        .verify(&options, &VerifyProgress::default(), &AtomicBool::new(true))
        .unwrap();
    assert_eq!((found.complete, found.blobs), (false, 0));
    assert!(!store.root().join("runs/verify.json").exists());
}

#[test]
fn reading_keeps_to_the_rate() {
    let (_dir, store) = store();
    publish(&store, "a", &[("x", &noise(1, 300_000)), ("y", &noise(2, 100_000))]);
    let options = VerifyOptions {
        scope: Scope::All,
        rate: NonZeroU64::new(1_000_000),
    };
    let before = Instant::now();
    let found = store
        .verify(&options, &VerifyProgress::default(), &AtomicBool::new(false))
        .unwrap();
    assert_eq!((found.blobs, found.bytes), (2, 400_000));
    // 0.4 s, less the credit of 0.1 s.
    assert!(before.elapsed().as_secs_f64() >= 0.29, "{:?}", before.elapsed());
}

#[test]
fn a_blob_that_the_disk_cannot_read_is_told_with_its_errno_and_moved() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, _guard) = disk_of(dir.path(), 64, "ext4", &["-m0"]);
    let store = Store::open(&disk.join("store"), Options::default()).unwrap();
    let content = noise(5, 30 << 20);
    publish(&store, "a", &[("x", &content), ("y", b"small")]);
    rustix::fs::syncfs(fs::File::open(&disk).unwrap()).unwrap();
    // A disk that ends before the blob does.
    let image = fs::File::options()
        .write(true)
        .open(dir.path().join("disk.img"))
        .unwrap();
    image.set_len(8 << 20).unwrap();
    let found = verify(&store);
    let bad = found
        .bad_blobs
        .iter()
        .find(|bad| bad.digest == digest_of(&content))
        .expect("it is found");
    assert!(
        matches!(bad.fault, Fault::Unreadable { errno: libc::EIO, .. }),
        "{bad:?}"
    );
    assert!(bad.quarantined.as_ref().is_some_and(|path| path.exists()), "{bad:?}");
    assert!(!blob_path(&store, &digest_of(&content)).exists());
    image.set_len(64 << 20).unwrap();
}

#[test]
fn a_build_that_found_a_blob_which_is_then_quarantined_puts_it_again_or_fails() {
    let (_dir, store) = store();
    publish(&store, "a", &[("x", b"right"), ("y", b"other")]);
    damage(&store, &digest_of(b"right"), b"wrong");

    let [finder, healer] = [store.build().unwrap(), store.build().unwrap()];
    // Both take the damaged file for the content: it has the right length.
    let tree = tree_of(&finder, &[("x", b"right")]);
    assert!(!healer.put_bytes(b"right").unwrap().new);
    assert_eq!(only(verify(&store).bad_blobs).digest, digest_of(b"right"));
    let failed = finder.publish(&tree, target("b", "uid-1"));
    assert!(matches!(failed, Err(Error::MissingBlob { digest }) if digest == digest_of(b"right")));
    assert_eq!(store.get_ref(&name("b")).unwrap(), None);

    assert!(
        healer.put_bytes(b"right").unwrap().new,
        "the lease on what was moved away is gone"
    );
    healer.publish(&tree, target("b", "uid-1")).unwrap();
    assert!(verify(&store).is_sound());
    assert_eq!(check_all(&store), 2);
}

/// Publishes trees of few contents, most of which are in the store already.
fn publish_some(store: &Store, rng: &mut StdRng) -> Result<Revision, Error> {
    let files: Vec<(String, Vec<u8>)> = (0..rng.random_range(1..6))
        .map(|n| (format!("f{n}"), vec![rng.random_range(0..12); 50]))
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    let build = store.build().unwrap();
    let tree = tree_of(&build, &files);
    build.publish(&tree, target(&format!("r{}", rng.random_range(0..5)), "uid-1"))
}

#[test]
fn no_tree_lacks_a_blob_unsaid_when_blobs_are_damaged_verified_built_and_collected_at_once() {
    let seed = rand::rng().random::<u64>();
    println!("seed {seed}");
    let (_dir, store) = store();
    let rounds = match std::env::var_os("LARDER_SOAK") {
        Some(_) => 3000,
        None => 40,
    };
    let done = AtomicBool::new(false);
    let (published, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut hurt: std::collections::HashSet<TreeDigest> = Default::default();
    let mut quarantined = 0;
    /// Also when the thread panics, so that the others end.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (store, done, published, refused) = (&store, &done, &published, &refused);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed ^ thread);
                while !done.load(Ordering::Relaxed) {
                    match publish_some(store, &mut rng) {
                        Ok(_) => published.fetch_add(1, Ordering::Relaxed),
                        Err(Error::MissingBlob { .. }) => refused.fetch_add(1, Ordering::Relaxed),
                        Err(error) => panic!("{error}"),
                    };
                }
            });
        }
        let (collecting, done) = (&store, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(collect(collecting).blocked, []);
            }
        });
        let _done = Done(done);
        let mut rng = StdRng::seed_from_u64(!seed);
        for round in 0..rounds {
            let digest = digest_of(&[rng.random_range(0..12u8); 50]);
            // As a rename, so that no reader sees half of it; perhaps the blob is not there just now.
            let staged = store.root().join(format!("staging/wrong-{round}"));
            fs::write(&staged, [99; 50]).unwrap();
            if rng.random_bool(0.8) && blob_path(&store, &digest).exists() {
                fs::rename(&staged, blob_path(&store, &digest)).unwrap();
            }
            let found = verify(&store);
            assert_eq!((found.bad_manifests.len(), found.bad_refs.len()), (0, 0));
            assert!(found.bad_blobs.iter().all(|bad| bad.not_moved.is_none()));
            quarantined += found.bad_blobs.iter().filter(|bad| bad.quarantined.is_some()).count();
            hurt.extend(found.hurt.iter().map(|tree| tree.digest));
        }
    });
    println!(
        "{published:?} published, {refused:?} refused, {quarantined} quarantined, {} hurt",
        hurt.len()
    );
    assert!(
        published.into_inner() > 50 && quarantined > 5,
        "hardly anything happened"
    );
    // Whatever lacks a blob now was said to: no publish slipped through between a quarantine and its report.
    for entry in store.refs().unwrap().refs {
        let history = entry.history.iter().map(|old| &old.revision);
        for revision in entry.current.iter().chain(history) {
            let tree = store.load(&revision.digest).unwrap();
            let whole = tree.contents().all(|(digest, _)| blob_path(&store, digest).exists());
            assert!(
                whole || hurt.contains(&revision.digest),
                "{} lacks a blob",
                revision.digest
            );
        }
    }
    let found = verify(&store);
    for bad in &found.bad_blobs {
        assert_eq!(bad.fault, Fault::Missing, "a wrong blob was left under its name");
    }
}
