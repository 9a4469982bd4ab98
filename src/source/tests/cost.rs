//! What a snapshot of a large layer costs. Prints figures; ignored, because it takes minutes and asserts no time.

use std::time::Instant;

use rayon::prelude::*;

use super::*;
use crate::store::testing::{blob_path, digest_of};
use crate::store::tree::{Leaf, Meta};

/// Files of the tree in folders of a thousand, and how many of them are changed.
const FILES: u32 = 1_000_000;
const CHANGED: u32 = 1000;

fn path(number: u32) -> String {
    format!("{:03}/file-{number:07}", number % 1000)
}

fn seconds<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let done = work();
    eprintln!("{what}: {:.3} s", begin.elapsed().as_secs_f64());
    done
}

#[test]
#[ignore = "figures of a tree of a million files: cargo test --release --lib cost -- --ignored --nocapture"]
fn a_snapshot_after_a_thousand_changes_among_a_million_files() {
    let files: u32 = std::env::var("FILES").map_or(FILES, |text| text.parse().unwrap());
    let place = Place::new();
    let mut tree = Tree::new(Meta::default());
    let folders: Vec<_> = (0..1000)
        .map(|number| {
            let name = format!("{number:03}").into_bytes();
            tree.add_dir(Tree::ROOT, name, Meta::default()).unwrap()
        })
        .collect();
    for number in 0..files {
        let kind = LeafKind::File {
            digest: digest_of(&number.to_be_bytes()),
            size: 100,
        };
        let meta = Meta {
            mode: 0o644,
            mtime: (1_700_000_000 + i64::from(number), number),
            ..Meta::default()
        };
        let name = format!("file-{number:07}").into_bytes();
        tree.add_leaf(folders[number as usize % 1000], name, Leaf { meta, kind })
            .unwrap();
    }
    // Blobs that have the right length, which is all that a publish looks at; and a copy of the tree that has only what
    // will be changed.
    for byte in 0..=255u8 {
        fs::create_dir_all(place.store.root().join("objects").join(hex::encode([byte]))).unwrap();
    }
    (0..files).into_par_iter().for_each(|number| {
        let path = blob_path(&place.store, &digest_of(&number.to_be_bytes()));
        fs::File::create(path).unwrap().set_len(100).unwrap();
    });
    let build = place.store.build().unwrap();
    let digest = seconds("publish of the base", || {
        publish(build, &tree.finish().unwrap(), "base")
    });
    let copy = place.store.images_dir().join(format!("{}.tree", digest.hex()));
    let changed = || (0..files).step_by((files / CHANGED) as usize + 1);
    for number in changed() {
        let path = copy.join(path(number));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, [0; 100]).unwrap();
    }
    let layers = Layers::open(place.store.clone(), layer::Options::default()).unwrap();
    let layer = Mounted::on(Rc::new(place), layers, digest, layer::Mode::Tmpfs, None);
    for number in changed() {
        fs::write(layer.path.join(path(number)), format!("new {number}").repeat(100)).unwrap();
    }
    let store = &layer.place.store;
    for _ in 0..5 {
        let all = Instant::now();
        let build = store.build().unwrap();
        let cancel = AtomicBool::new(false);
        let tree = seconds("  snapshot", || {
            snapshot(&layer.layers, &layer.spec.id, &build, &cancel).unwrap()
        });
        seconds("  publish", || publish(build, &tree, "snapshot"));
        eprintln!("both: {:.3} s", all.elapsed().as_secs_f64());
    }
    let loaded = seconds("load", || store.load(&digest).unwrap());
    seconds("keep", || store.build().unwrap().keep(&digest).unwrap());
    let finished = seconds("finish", || loaded.finish().unwrap());
    seconds("digest", || finished.digest().unwrap());
    seconds("stats", || finished.stats());
}
