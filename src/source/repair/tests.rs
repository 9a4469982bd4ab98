use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::*;
use crate::source::{ScanOptions, scan};
use crate::store::tree::{LeafKind, Node};
use crate::store::{Fault, Options, Publish, Scope, VerifyOptions, VerifyProgress};

struct Place {
    store: Store,
    source: PathBuf,
    dir: tempfile::TempDir,
}

impl Place {
    /// A store with a tree of these files, and the folder that it was built from.
    fn of(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
        let place = Self { store, source, dir };
        for (path, content) in files {
            let path = place.source.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        place.build("tree", serde_json::json!({"directory": {"path": place.source}}));
        place
    }

    fn build(&self, name: &str, source: serde_json::Value) -> TreeDigest {
        let build = self.store.build().unwrap();
        let folder = SourceDir::open(&self.store, &self.source).unwrap();
        let tree = scan(&folder, &ScanOptions::default(), &build, &AtomicBool::new(false)).unwrap();
        let target = Publish {
            name: RefName::new("test", name).unwrap(),
            owner: "uid-1".to_owned(),
            generation: 1,
            request: None,
            source,
            history_limit: 3,
            now: SystemTime::now(),
        };
        build.publish(&tree, target).unwrap().digest
    }

    fn blob(&self, path: &str) -> PathBuf {
        let name = RefName::new("test", "tree").unwrap();
        let tree = self.store.get_ref(&name).unwrap().unwrap().current.unwrap().digest;
        let tree = self.store.load(&tree).unwrap();
        let Some(Node::Leaf(leaf)) = tree.lookup(path.as_bytes()) else {
            panic!("{path}")
        };
        let LeafKind::File { digest, .. } = tree.leaf(leaf).kind else {
            panic!("{path}")
        };
        let hex = digest.hex();
        self.store.root().join("objects").join(&hex[..2]).join(&hex[2..])
    }

    fn lose(&self, path: &str) {
        fs::remove_file(self.blob(path)).unwrap();
    }

    fn verify(&self) -> Verification {
        let options = VerifyOptions {
            scope: Scope::All,
            rate: None,
        };
        self.store
            .verify(&options, &VerifyProgress::default(), &AtomicBool::new(false))
            .unwrap()
    }

    /// Verifies and repairs from the recorded sources.
    fn repair(&self) -> (Verification, Repair) {
        let mut found = self.verify();
        let open = |_: &RefName, path: &str| SourceDir::open(&self.store, Path::new(path));
        let done = repair(
            &self.store,
            &mut found,
            &Origin::Recorded(&open),
            &AtomicBool::new(false),
        )
        .unwrap();
        (found, done)
    }

    fn blobs(&self) -> u64 {
        self.store.blobs().unwrap().0
    }
}

#[test]
fn what_the_source_still_has_is_taken_again_and_nothing_is_published() {
    let place = Place::of(&[
        ("a", "one"),
        ("deep/er/b", "two"),
        ("c", "lost and there twice"),
        ("d/c", "lost and there twice"),
        ("whole", "whole"),
    ]);
    let blob = place.blob("deep/er/b");
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "tw0").unwrap();
    place.lose("c");
    // The first of its two files is no more.
    fs::remove_file(place.source.join("c")).unwrap();
    // What is not hurt is not looked at, whatever it has become.
    fs::remove_file(place.source.join("whole")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.source.join("whole"),
        FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let before = place.store.refs().unwrap().refs;
    let (found, done) = place.repair();
    assert_eq!((done.repaired, done.bytes), (2, 3 + 20));
    assert_eq!((done.lost, done.rebuild), (vec![], vec![]));
    assert!(found.is_sound() && found.bad_blobs.len() == 2);
    assert_eq!(fs::read_to_string(&blob).unwrap(), "two");
    assert!(place.verify().is_sound());
    assert_eq!(place.store.refs().unwrap().refs, before);
    assert_eq!(place.blobs(), 4);
}

#[test]
fn what_the_source_has_no_more_stays_lost_with_the_reason_and_nothing_else_is_stored() {
    let files = ["changed", "longer", "gone", "link", "linked/x", "folder", "fifo"];
    let contents: Vec<String> = files.iter().map(|name| format!("content of {name}")).collect();
    let named: Vec<(&str, &str)> = files.iter().copied().zip(contents.iter().map(String::as_str)).collect();
    let place = Place::of(&named);
    for name in files {
        place.lose(name);
    }
    let at = |name: &str| place.source.join(name);
    fs::write(at("changed"), "CONTENT of changed").unwrap();
    fs::write(at("longer"), "content of longer and more").unwrap();
    fs::remove_file(at("gone")).unwrap();
    // The right content, but through a link: that could be anybody's.
    let outside = place.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("x"), "content of linked/x").unwrap();
    fs::rename(at("link"), outside.join("link")).unwrap();
    symlink(outside.join("link"), at("link")).unwrap();
    fs::remove_dir_all(at("linked")).unwrap();
    symlink(&outside, at("linked")).unwrap();
    fs::remove_file(at("folder")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    fs::remove_file(at("fifo")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    let (found, done) = place.repair();
    assert_eq!(done.repaired, 0);
    assert_eq!((done.lost.len(), found.bad_blobs.len(), place.blobs()), (7, 7, 0));
    let why = |name: &str| -> &str {
        let path = format!("{}: ", at(name).display());
        let told = done
            .lost
            .iter()
            .flat_map(|lost| &lost.tried)
            .find(|told| told.starts_with(&path));
        &told.unwrap_or_else(|| panic!("{name}: {done:?}"))[path.len()..]
    };
    assert_eq!(why("changed"), "it has other bytes now");
    assert_eq!(why("longer"), "it has 26 bytes now instead of 17");
    assert_eq!(why("gone"), "it is not there any more");
    assert_eq!(why("link"), "it is not a regular file any more");
    assert!(["a symbolic link is in the way", "it is not there any more"].contains(&why("linked/x")));
    assert_eq!(why("folder"), "it is not a regular file any more");
    assert_eq!(why("fifo"), "it is not a regular file any more");
    assert!(!found.is_sound());

    // Another folder may have them.
    let mirror = place.dir.path().join("mirror");
    for (name, content) in named {
        fs::create_dir_all(mirror.join(name).parent().unwrap()).unwrap();
        fs::write(mirror.join(name), content).unwrap();
    }
    let mut found = place.verify();
    let folder = SourceDir::open(&place.store, &mirror).unwrap();
    let cancelled = repair(
        &place.store,
        &mut found,
        &Origin::Folder(&folder),
        &AtomicBool::new(true),
    )
    .unwrap();
    assert!(cancelled.lost.len() >= 6 && !found.is_sound(), "{cancelled:?}");
    let done = repair(
        &place.store,
        &mut found,
        &Origin::Folder(&folder),
        &AtomicBool::new(false),
    )
    .unwrap();
    assert_eq!(done.lost, []);
    assert!(found.is_sound() && place.verify().is_sound());
}

#[test]
fn where_no_folder_is_known_or_a_manifest_is_damaged_it_says_that_only_a_rebuild_helps() {
    let place = Place::of(&[("a", "one")]);
    let layer = place.build("of-a-layer", serde_json::json!({"layer": {"name": "l"}}));
    let forgotten = RefName::new("test", "tree").unwrap();
    let blob = place.blob("a");
    place.store.forget(&forgotten).unwrap();
    fs::remove_file(blob).unwrap();
    let (_, done) = place.repair();
    let [lost] = &done.lost[..] else { panic!("{done:?}") };
    assert_eq!(
        lost.tried,
        ["the source of test/of-a-layer is no folder: build the tree again"]
    );

    fs::write(place.store.root().join("manifests").join(layer.hex()), "not a manifest").unwrap();
    let (found, done) = place.repair();
    assert_eq!(done.rebuild, [layer]);
    assert!(!found.is_sound());
}

#[test]
fn what_could_not_be_moved_away_is_not_taken_for_healed() {
    let place = Place::of(&[("a", "one")]);
    let blob = place.blob("a");
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "0ne").unwrap();
    // Nothing can be moved into a quarantine that is a file.
    fs::write(place.store.root().join("quarantine"), "").unwrap();
    let (found, done) = place.repair();
    let [bad] = &found.bad_blobs[..] else {
        panic!("{found:?}")
    };
    assert!(matches!(bad.fault, Fault::Damaged { length: 3, .. }));
    assert!(bad.not_moved.is_some() && !bad.healed && bad.quarantined.is_none());
    assert_eq!((done.repaired, done.lost.len()), (0, 1));
    assert_eq!(fs::metadata(&blob).unwrap().len(), 3);
    fs::remove_file(place.store.root().join("quarantine")).unwrap();
    let (found, done) = place.repair();
    assert!(found.is_sound() && done.repaired == 1);
    assert!(fs::metadata(&blob).unwrap().nlink() == 1 && place.verify().is_sound());
}

#[test]
fn a_file_that_has_the_bytes_of_another_lost_one_by_now_costs_that_nothing() {
    let place = Place::of(&[("a", "AAAA"), ("b", "BBBB"), ("c", "BBBB")]);
    let blobs = [place.blob("a"), place.blob("b")];
    place.lose("a");
    place.lose("b");
    // Read after `a`, and before `c`.
    fs::write(place.source.join("b"), "AAAA").unwrap();
    let (found, done) = place.repair();
    assert_eq!((done.repaired, done.lost.len()), (2, 0));
    assert!(found.is_sound());
    assert_eq!(blobs.map(|blob| fs::read_to_string(blob).unwrap()), ["AAAA", "BBBB"]);
    assert!(place.verify().is_sound());
}

#[test]
fn a_tree_that_was_dropped_meanwhile_keeps_no_other_from_its_repair() {
    let place = Place::of(&[("a", "one")]);
    fs::write(place.source.join("b"), "two").unwrap();
    let gone = place.build("gone", serde_json::json!({"directory": {"path": place.source}}));
    place.lose("a");
    let mut found = place.verify();
    assert_eq!(found.hurt.len(), 2);
    fs::remove_file(place.store.root().join("manifests").join(gone.hex())).unwrap();
    let open = |_: &RefName, path: &str| SourceDir::open(&place.store, Path::new(path));
    let origin = Origin::Recorded(&open);
    let done = repair(&place.store, &mut found, &origin, &AtomicBool::new(false)).unwrap();
    assert_eq!((done.repaired, done.lost.len()), (1, 0));
}
