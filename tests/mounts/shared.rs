//! What the layers of one tree, and the trees of one store, have in common.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use larder::layer::Found;

use super::*;

const PAGE: usize = 4096;

/// The number of the page frame that has a file's first page: two files with one frame have one copy in memory.
fn frame(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    // SAFETY: a new mapping of one page, which is read once below and then unmapped.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(mapped, libc::MAP_FAILED, "{path:?}");
    // SAFETY: the page is mapped, and the file is longer than it.
    unsafe { mapped.cast::<u8>().read_volatile() };
    // The kernel's pagemap document: 8 bytes per page, bit 63 "present", the low 55 the frame's number.
    let mut pagemap = File::open("/proc/self/pagemap").unwrap();
    pagemap
        .seek(SeekFrom::Start((mapped as usize / PAGE * 8) as u64))
        .unwrap();
    let mut entry = [0; 8];
    pagemap.read_exact(&mut entry).unwrap();
    // SAFETY: what was mapped above.
    assert_eq!(unsafe { libc::munmap(mapped, PAGE) }, 0);
    let entry = u64::from_ne_bytes(entry);
    assert_eq!(entry >> 63, 1, "the page is not there");
    let frame = entry & ((1 << 55) - 1);
    assert_ne!(frame, 0, "page frames are shown to CAP_SYS_ADMIN only");
    frame
}

fn large() -> Vec<u8> {
    (0..1u32 << 18).flat_map(u32::to_le_bytes).collect()
}

/// A tree with a large file, and another one that differs in all but this file's content.
fn two_trees(site: &Site) -> [TreeDigest; 2] {
    [0o644, 0o600].map(|mode| {
        let build = site.store.build().unwrap();
        let blob = build.put_bytes(&large()).unwrap();
        let meta = |mode| Meta {
            mode,
            ..Meta::default()
        };
        let mut tree = Tree::new(meta(0o755));
        let kind = LeafKind::File {
            digest: blob.digest,
            size: blob.size,
        };
        let leaf = Leaf { meta: meta(mode), kind };
        tree.add_leaf(Tree::ROOT, *b"large", leaf).unwrap();
        publish_tree(build, &tree.finish().unwrap(), &format!("large-{mode}"))
    })
}

#[test]
fn a_content_is_in_memory_once_whoever_reads_it() {
    let site = Site::new();
    let [one, other] = two_trees(&site);
    let copied = site.layers.road().unwrap().road == Road::Copy;
    let mut paths = Vec::new();
    let mut specs = Vec::new();
    for (tree, mode) in [
        (one, Mode::ReadOnly),
        (one, Mode::ReadOnly),
        (one, Mode::Overlay),
        (one, Mode::Tmpfs),
        (other, Mode::Overlay),
        (other, Mode::ReadOnly),
    ] {
        let spec = LayerSpec {
            tree,
            ..site.spec(mode)
        };
        let path = site.layers.prepare(&spec).unwrap().path.join("large");
        assert_eq!(fs::read(&path).unwrap(), large());
        paths.push(path);
        specs.push(spec);
    }
    // Copies share it among the layers of one tree; images, among all.
    let common = if copied { 4 } else { paths.len() };
    let mut frames = Vec::new();
    for _ in 0..3 {
        // The kernel may move a page between two looks.
        frames = paths.iter().map(|path| frame(path)).collect();
        if frames[..common].iter().all(|frame| *frame == frames[0]) {
            break;
        }
    }
    assert!(frames[..common].iter().all(|frame| *frame == frames[0]), "{frames:?}");
    // What is written is the layer's own from then on.
    let changed = site.layers.path(&specs[2].id).join("large");
    fs::OpenOptions::new()
        .write(true)
        .open(&changed)
        .unwrap()
        .write_all(b"x")
        .unwrap();
    assert_ne!(frame(&changed), frames[0]);
    assert_eq!(fs::read(site.layers.path(&specs[0].id).join("large")).unwrap(), large());
    for spec in &specs {
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

#[test]
fn read_only_layers_of_a_tree_are_one_file_system_with_one_set_of_inodes() {
    let site = Site::new();
    let specs = [site.spec(Mode::ReadOnly), site.spec(Mode::ReadOnly)];
    let paths = specs.each_ref().map(|spec| site.layers.prepare(spec).unwrap().path);
    let before = site.dir.mounts().len();
    for name in ["", "file", "folder", "folder/other"] {
        let [one, two] = paths
            .each_ref()
            .map(|path| fs::symlink_metadata(path.join(name)).unwrap());
        assert_eq!((one.dev(), one.ino()), (two.dev(), two.ino()), "{name}");
    }
    // A third one costs one mount.
    let third = site.spec(Mode::ReadOnly);
    site.layers.prepare(&third).unwrap();
    assert_eq!(site.dir.mounts().len(), before + 1);
    // One goes while the others are read.
    let open = File::open(paths[0].join("file")).unwrap();
    site.layers.release(&specs[1].id, false).unwrap();
    let error = site.layers.release(&specs[0].id, false).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(open);
    site.layers.release(&specs[0].id, false).unwrap();
    site.layers.release(&third.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn what_layers_share_stays_while_anybody_shows_it_and_goes_when_nobody_does() {
    let mut site = Site::new();
    let spec = site.spec(Mode::ReadOnly);
    site.layers.prepare(&spec).unwrap();
    let shared = site.dir.mounts().len() - 1;
    assert_eq!(
        site.layers.unmount_unused(Duration::ZERO).unwrap(),
        0,
        "a layer needs it"
    );
    site.layers.release(&spec.id, false).unwrap();
    // Kept for the next layer, for which the tree counts as in use.
    assert_eq!(site.dir.mounts().len(), shared);
    assert!(site.is_mounted(&site.tree));
    let hour = Duration::from_secs(3600);
    assert_eq!(site.layers.unmount_unused(hour).unwrap(), 0);
    // After a restart, and while another namespace has a mount of it.
    site = site.restart();
    let holder = Holder::start("exec unshare --mount --propagation private sh -c 'echo ready; read _'");
    assert_eq!(site.layers.unmount_unused(Duration::ZERO).unwrap(), 0);
    drop(holder);
    assert_eq!(site.layers.unmount_unused(Duration::ZERO).unwrap(), shared);
    assert!(!site.is_mounted(&site.tree));
    site.nothing_is_left();
}

#[test]
fn the_best_road_here_is_by_descriptors() {
    let site = Site::new();
    let layers = Layers::open(site.store.clone(), Options::default()).unwrap();
    let Found { road, closed } = layers.road().unwrap();
    // The machines that test have Linux 6.15 or later.
    assert_eq!(*road, Road::Descriptors, "{closed:?}");
    assert!(closed.is_empty());
    drop(layers);
    site.nothing_is_left();
}

#[test]
fn what_is_mounted_of_a_tree_for_one_owner_goes_while_another_has_it() {
    for keeps_owned in [false, true] {
        let site = Site::new();
        let owned = LayerSpec {
            ids: Some((1000, 2000)),
            ..site.spec(Mode::ReadOnly)
        };
        let plain = site.spec(Mode::ReadOnly);
        for spec in [&plain, &owned] {
            site.layers.prepare(spec).unwrap();
        }
        let (kept, gone) = if keeps_owned {
            (&owned, &plain)
        } else {
            (&plain, &owned)
        };
        site.layers.release(&gone.id, false).unwrap();
        // Its view and, where there is one, its image.
        assert_eq!(site.layers.unmount_unused(Duration::ZERO).unwrap(), 1 + site.shared());
        let path = site.layers.prepare(kept).unwrap();
        assert!(path.reused);
        assert_eq!(fs::read_to_string(path.path.join("file")).unwrap(), "below");
        site.layers.release(&kept.id, false).unwrap();
        site.nothing_is_left();
    }
}

#[test]
fn images_that_are_mounted_over_a_loop_device_share_one_and_leave_none() {
    // As Linux before 6.12 needs it everywhere, and later ones where the image's file system can do no better.
    let mut site = Site::in_memory();
    let options = Options {
        road: Some(Road::Paths),
        ..Options::default()
    };
    site.layers = Layers::open(site.store.clone(), options).unwrap();
    let owned = LayerSpec {
        ids: Some((1000, 2000)),
        ..site.spec(Mode::Overlay)
    };
    let specs = [Mode::Overlay, Mode::Overlay, Mode::Tmpfs, Mode::ReadOnly].map(|mode| site.spec(mode));
    for spec in specs.iter().chain([&owned]) {
        let path = site.layers.prepare(spec).unwrap().path;
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "below");
        if spec.mode != Mode::ReadOnly {
            fs::write(path.join("mine"), "mine").unwrap();
        }
    }
    // Two images, and three layers on disk.
    assert_eq!(site.dir.loop_devices().len(), 2 + 3);
    let images = site.root.join("mnt/images");
    let mounts = mountinfo::of_self().unwrap();
    let mounts: Vec<_> = mounts.iter().filter(|mount| mount.point.starts_with(&images)).collect();
    assert!(
        mounts.len() == 2 && mounts.iter().all(|mount| mount.source.starts_with(b"/dev/loop")),
        "{mounts:?}"
    );
    assert!(site.layers.prepare(&owned).unwrap().reused);
    for spec in specs.iter().chain([&owned]) {
        site.layers.release(&spec.id, false).unwrap();
    }
    // Kept for the next layer of the tree, which mounts it no second time.
    assert_eq!(site.dir.loop_devices().len(), 2);
    site.layers.prepare(&specs[0]).unwrap();
    assert_eq!(site.dir.loop_devices().len(), 3);
    site.layers.release(&specs[0].id, false).unwrap();
    site.nothing_is_left_but(&[site.root.parent().unwrap()], 0);
}
