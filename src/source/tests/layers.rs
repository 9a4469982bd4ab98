//! Snapshots of layers whose changes have a trap each.

use super::*;
use crate::store::tree::LeafId;

fn id(tree: &Tree, path: &str) -> LeafId {
    match tree.lookup(path.as_bytes()) {
        Some(Node::Leaf(id)) => id,
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn a_folder_deleted_in_one_layer_and_made_again_in_the_next_shows_nothing_old() {
    let place = Place::new();
    fs::create_dir(place.source.join("d")).unwrap();
    fs::write(place.source.join("d/old"), "old").unwrap();
    let first = Mounted::over(place, layer::Mode::Tmpfs);
    fs::remove_dir_all(first.path.join("d")).unwrap();
    let second = first.stacked();
    assert!(!second.path.join("d").exists());
    fs::create_dir(second.path.join("d")).unwrap();
    fs::write(second.path.join("d/new"), "new").unwrap();
    let (snapshot, merged) = second.both();
    assert_eq!(lines(&snapshot), lines(&merged));
    let third = second.stacked();
    let names: Vec<_> = fs::read_dir(third.path.join("d"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["new"]);
}

#[test]
fn a_whiteout_hides_its_own_path_and_no_other_of_that_name() {
    let place = Place::new();
    fs::create_dir(place.source.join("a")).unwrap();
    fs::write(place.source.join("a/nm"), "1").unwrap();
    fs::write(place.source.join("nm"), "2").unwrap();
    let mounted = Mounted::over(place, layer::Mode::Tmpfs);
    fs::remove_file(mounted.path.join("nm")).unwrap();
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
    assert!(snapshot.lookup(b"a/nm").is_some() && snapshot.lookup(b"nm").is_none());
}

#[test]
fn deletions_are_no_hard_links_and_hard_links_of_an_upper_are() {
    let place = Place::new();
    for folder in ["a", "b"] {
        fs::create_dir(place.source.join(folder)).unwrap();
    }
    for file in ["x", "y", "a/f"] {
        fs::write(place.source.join(file), file).unwrap();
    }
    let mounted = Mounted::over(place, layer::Mode::Overlay);
    let at = |name: &str| mounted.path.join(name);
    fs::remove_file(at("x")).unwrap();
    fs::remove_file(at("y")).unwrap();
    fs::hard_link(at("a/f"), at("b/g")).unwrap();
    fs::write(at("n"), "n").unwrap();
    fs::hard_link(at("n"), at("b/n2")).unwrap();
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
    assert_eq!((snapshot.lookup(b"x"), snapshot.lookup(b"y")), (None, None));
    assert_eq!(id(&snapshot, "a/f"), id(&snapshot, "b/g"));
    assert_eq!(id(&snapshot, "n"), id(&snapshot, "b/n2"));
    assert_ne!(id(&snapshot, "n"), id(&snapshot, "a/f"));
}

#[test]
fn one_name_of_a_group_below_that_is_written_leaves_the_others_as_they_were() {
    let place = Place::new();
    fs::write(place.source.join("p1"), "aaa").unwrap();
    fs::hard_link(place.source.join("p1"), place.source.join("p2")).unwrap();
    fs::hard_link(place.source.join("p1"), place.source.join("p3")).unwrap();
    let mounted = Mounted::over(place, layer::Mode::Overlay);
    fs::write(mounted.path.join("p1"), "bbbb").unwrap();
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
    let size = |name: &str| match leaf(&snapshot, name).kind {
        LeafKind::File { size, .. } => size,
        _ => panic!("{name} is no file"),
    };
    assert_eq!((size("p1"), size("p2")), (4, 3));
    assert_eq!(id(&snapshot, "p2"), id(&snapshot, "p3"));
}

#[test]
fn the_owner_of_a_layer_is_that_of_what_was_not_touched_too() {
    let place = Place::new();
    for folder in ["d", "e"] {
        fs::create_dir(place.source.join(folder)).unwrap();
        fs::write(place.source.join(folder).join("f"), folder).unwrap();
    }
    chown(place.source.join("e/f"), Some(77), Some(77)).unwrap();
    let mounted = Mounted::owned(place, layer::Mode::Overlay, Some((1000, 2000)));
    fs::write(mounted.path.join("d/f"), "changed").unwrap();
    fs::write(mounted.path.join("d/roots"), "made by root").unwrap();
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
    let owner = |path: &str| (leaf(&snapshot, path).meta.uid, leaf(&snapshot, path).meta.gid);
    assert_eq!(
        (owner("d/f"), owner("e/f"), owner("d/roots")),
        ((1000, 2000), (1000, 2000), (0, 0))
    );
}

#[test]
fn attributes_of_an_overlay_in_the_source_stay_those_of_the_user() {
    let place = Place::new();
    fs::create_dir(place.source.join("d")).unwrap();
    fs::write(place.source.join("d/f"), "x").unwrap();
    fs::write(place.source.join("d/untouched"), "x").unwrap();
    let attributes = [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "user.overlay.opaque",
    ];
    for path in ["d", "d/f", "d/untouched"] {
        for name in attributes {
            rustix::fs::setxattr(place.source.join(path), name, b"y", rustix::fs::XattrFlags::empty()).unwrap();
        }
    }
    let mounted = Mounted::over(place, layer::Mode::Overlay);
    fs::write(mounted.path.join("d/f"), "changed").unwrap();
    let (snapshot, merged) = mounted.both();
    assert_eq!(lines(&snapshot), lines(&merged));
    for path in ["d/f", "d/untouched"] {
        let names: Vec<_> = leaf(&snapshot, path)
            .meta
            .xattrs
            .iter()
            .map(|(name, _)| &**name)
            .collect();
        assert_eq!(names, attributes.map(str::as_bytes), "{path}");
    }
}

#[test]
fn a_layer_without_changes_is_the_tree_that_it_is_over() {
    let place = Place::new();
    fs::create_dir(place.source.join("d")).unwrap();
    fs::write(place.source.join("d/f"), "x").unwrap();
    fs::hard_link(place.source.join("d/f"), place.source.join("g")).unwrap();
    let mounted = Mounted::over(place, layer::Mode::Tmpfs);
    let (snapshot, _) = mounted.both();
    assert_eq!(snapshot.digest().unwrap(), mounted.spec.tree);
}

#[test]
fn a_layer_that_is_not_there_has_no_snapshot() {
    let place = Place::new();
    let layers = Layers::open(place.store.clone(), layer::Options::default()).unwrap();
    let id: LayerId = uuid::Uuid::new_v4().to_string().parse().unwrap();
    let build = place.store.build().unwrap();
    let error = snapshot(&layers, &id, &build, &AtomicBool::new(false)).unwrap_err();
    assert!(
        matches!(error, Error::Layer(layer::Error::NotFound { .. })),
        "{error:?}"
    );
}

#[test]
fn a_file_of_a_layer_that_never_stays_the_same_is_named() {
    use std::io::Write;
    use std::sync::atomic::Ordering;
    let place = Place::new();
    let mounted = Mounted::over(place, layer::Mode::Tmpfs);
    let mut file = fs::File::create(mounted.path.join("busy")).unwrap();
    file.set_len(super::edges::LONG).unwrap();
    let build = mounted.place.store.build().unwrap();
    let stop = AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                file.write_all(b"m").unwrap();
            }
        });
        let result = snapshot(&mounted.layers, &mounted.spec.id, &build, &AtomicBool::new(false));
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap();
        result.unwrap_err()
    });
    drop(file);
    assert!(matches!(error, Error::Changed { count: 1, .. }), "{error:?}");
    assert!(error.to_string().contains("busy: it changed"), "{error}");
}
