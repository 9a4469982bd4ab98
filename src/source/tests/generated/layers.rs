//! Snapshots of layers after any sequence of operations (`operate.rs`), compared with the merged view by an eye of its
//! own (`look.rs`). The layers are larder's own, on real mounts.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::look::{count_names, look_at};
use super::operate::Writer;
use super::*;

/// A store on a disk in memory.
fn place(disk: &Disk) -> Rc<Place> {
    let dir = tempfile::tempdir_in(&disk.path).unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let store = Store::open(&dir.path().join("store"), Options::default()).unwrap();
    Rc::new(Place { store, source, dir })
}

fn remount(layer: &Mounted) {
    layer.unmount();
    assert!(!layer.layers.prepare(&layer.spec).unwrap().reused);
}

/// Takes a snapshot and publishes it; it must be what the layer shows.
fn take_snapshot(layer: &Mounted, what: &str) -> crate::store::TreeDigest {
    let build = layer.place.store.build().unwrap();
    let tree = snapshot(&layer.layers, &layer.spec.id, &build, &AtomicBool::new(false));
    let tree = tree.unwrap_or_else(|error| panic!("{what}: {error}"));
    // Mounted anew: until it is looked up again, a name whose hard link was made after its copy-up shows the inode
    // number of the file below, and groups look torn that are whole.
    remount(layer);
    let mut merged = look(&layer.path);
    count_names(&mut merged);
    assert_alike(&merged, &look_at(&tree), what);
    publish(build, &tree, "snapshot")
}

/// What overlayfs wrote into upper folders, by kind: how often.
type Met = std::collections::BTreeMap<&'static str, u64>;

fn look_into(upper: &Path, met: &mut Met) {
    for entry in fs::read_dir(upper).unwrap() {
        let entry = entry.unwrap();
        let (path, meta) = (entry.path(), entry.metadata().unwrap());
        let attribute = |name: &str| {
            let mut value = [0; 300];
            let length = rustix::fs::lgetxattr(&path, format!("trusted.overlay.{name}"), &mut value[..]);
            length.ok().map(|length| value[..length].to_vec())
        };
        let redirect = attribute("redirect").map(|path| path[0] == b'/');
        let kind = match (meta.is_dir(), attribute("metacopy").is_some(), redirect) {
            (false, false, _) if meta.file_type().is_char_device() && meta.rdev() == 0 => "whiteout",
            (false, false, Some(_)) => "file that has kept a redirect",
            (false, true, None) => "metacopy",
            (false, true, Some(true)) if meta.nlink() > 1 => "metacopy with several names",
            (false, true, Some(true)) => "metacopy from elsewhere",
            (false, true, Some(false)) => "metacopy with another name",
            (false, false, None) => "file",
            (true, _, _) if attribute("opaque").is_some() => "opaque folder",
            (true, _, Some(true)) => "folder from elsewhere",
            (true, _, Some(false)) => "folder with another name",
            (true, _, None) => "folder",
        };
        *met.entry(kind).or_default() += 1;
        if meta.is_dir() {
            look_into(&path, met);
        }
    }
}

/// Sequences of operations by these seeds, each over a base of its own; `deep` layers upon each other. Tells what was
/// in the upper folders.
fn sequences(
    seeds: impl Iterator<Item = u64>,
    road: Option<layer::Road>,
    mode: layer::Mode,
    operations: u32,
    deep: u32,
) -> Met {
    let mut met = Met::new();
    let seeds: Vec<u64> = seeds.collect();
    // The store keeps all trees, and there is room for so many.
    for seeds in seeds.chunks(200) {
        let disk = Disk::new("ext4", 256, &["-m0", "-b4096", "-N60000"]);
        let place = place(&disk);
        let options = layer::Options {
            road,
            ..layer::Options::default()
        };
        let layers = Layers::open(place.store.clone(), options).unwrap();
        operate_on(&place, &layers, seeds, (mode, operations, deep), &mut met);
    }
    met
}

fn operate_on(
    place: &Rc<Place>,
    layers: &Layers,
    seeds: &[u64],
    (mode, operations, deep): (layer::Mode, u32, u32),
    met: &mut Met,
) {
    for &seed in seeds {
        let rng = &mut StdRng::seed_from_u64(seed);
        Writer::fill(&place.source, rng);
        let build = place.store.build().unwrap();
        let tree = scan_of(&place.store, &place.source, &[], &build).unwrap();
        let mut tree = publish(build, &tree, "base");
        for depth in 0..deep {
            let layer = Mounted::on(place.clone(), layers.clone(), tree, mode, None);
            Writer::new(&layer.path, rng).work(operations, &|| remount(&layer));
            let upper = layers.upper(&layer.spec.id).unwrap();
            look_into(
                &PathBuf::from(format!("/proc/self/fd/{}", upper.folder.as_raw_fd())),
                met,
            );
            drop(upper);
            tree = take_snapshot(&layer, &format!("LARDER_SEED={seed}, layer {depth}"));
        }
        remove_all(&place.source).unwrap();
        fs::create_dir(&place.source).unwrap();
        // The images, or copies, of the trees.
        for copy in fs::read_dir(place.store.images_dir()).unwrap() {
            remove_all(&copy.unwrap().path()).unwrap();
        }
    }
}

fn seeds(usual: u64) -> impl Iterator<Item = u64> {
    let first = first_seed();
    (0..rounds(usual)).map(move |round| first.wrapping_add(round))
}

#[test]
fn a_snapshot_is_what_a_layer_in_memory_shows_after_any_operations() {
    let met = sequences(seeds(200), None, layer::Mode::Tmpfs, 60, 1);
    // All that there is to be resolved was there.
    eprintln!("{met:?}");
    assert!(met.len() == 11 && met.values().all(|count| *count >= 10), "{met:?}");
}

#[test]
fn a_snapshot_is_what_a_layer_on_disk_shows_after_any_operations() {
    sequences(seeds(10), None, layer::Mode::Overlay, 150, 1);
}

#[test]
fn layers_ten_deep_show_what_was_done_in_all_of_them() {
    sequences(seeds(4), None, layer::Mode::Tmpfs, 40, 10);
}

#[test]
fn a_snapshot_is_what_a_layer_shows_on_the_other_roads_too() {
    for road in [layer::Road::Paths, layer::Road::Copy] {
        sequences(seeds(20), Some(road), layer::Mode::Tmpfs, 60, 2);
        sequences(seeds(2), Some(road), layer::Mode::Overlay, 60, 1);
    }
}
