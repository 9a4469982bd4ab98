//! What a layer may take, and what it must leave alone.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

/// Kind, mode, owner, size, times and content of everything below a folder.
fn listing(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![folder.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = path.symlink_metadata().unwrap();
        let content = if meta.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        let text = format!(
            "{:o} {}:{} {} {}.{} {content:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            content.len(),
            meta.mtime(),
            meta.mtime_nsec(),
        );
        found.insert(path, text);
    }
    found
}

#[test]
fn whatever_is_done_in_a_layer_its_tree_and_the_contents_stay() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    let folders = [site.store.images_dir(), site.root.join("objects")];
    let before: Vec<_> = folders.iter().map(|folder| listing(folder)).collect();
    // The folder and the image at least; 256 folders and three contents.
    assert!(before[0].len() >= 2 && before[1].len() >= 259);
    // Each of these changes something that the layer has from below.
    let file = path.join("file");
    let mut appended = fs::OpenOptions::new().append(true).open(&file).unwrap();
    appended.write_all(b"more").unwrap();
    drop(appended);
    assert_eq!(fs::read_to_string(&file).unwrap(), "belowmore");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(&file, path.join("folder/link")).unwrap();
    fs::rename(&file, path.join("folder/moved")).unwrap();
    std::os::unix::fs::chown(path.join("folder"), Some(7), Some(7)).unwrap();
    fs::remove_dir_all(path.join("folder")).unwrap();
    fs::create_dir(path.join("folder")).unwrap();
    assert_eq!(fs::read_dir(path.join("folder")).unwrap().count(), 0);
    for (folder, before) in folders.iter().zip(before) {
        let after = listing(folder);
        let changed: Vec<_> = before
            .iter()
            .filter(|(path, was)| after.get(*path) != Some(was))
            .collect();
        assert!(changed.is_empty() && after.len() == before.len(), "{changed:?}");
    }
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_full_layer_takes_no_more_of_the_disk_than_its_limit() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    let image = site.root.join("layers").join(spec.id.as_str()).join("disk.img");
    let taken = || image.metadata().unwrap().blocks() * 512;
    assert!(taken() < SIZE / 8, "a new layer takes next to nothing: {}", taken());
    let mut file = fs::File::create(path.join("large")).unwrap();
    let full = std::io::copy(&mut std::io::repeat(1), &mut file).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    file.sync_all().unwrap();
    assert_eq!(image.metadata().unwrap().len(), SIZE);
    assert!((SIZE / 2..=SIZE).contains(&taken()), "{}", taken());
    // What is removed makes room again, also for those outside.
    drop(file);
    fs::remove_file(path.join("large")).unwrap();
    fs::write(path.join("after"), vec![1; SIZE as usize / 2]).unwrap();
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "below");
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

/// Makes empty files until there is no room for one.
fn fill_with_empty_files(folder: &Path, at_most: u64) -> u64 {
    for made in 0..at_most {
        if let Err(error) = fs::File::create(folder.join(format!("{at_most}-{made}"))) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
            return made;
        }
    }
    panic!("{at_most} empty files fit in");
}

#[test]
fn empty_files_do_not_escape_the_limit_of_a_layer_in_memory() {
    let site = Site::new();
    let spec = LayerSpec {
        size: Some(4 << 20),
        ..site.spec(Mode::Tmpfs)
    };
    let path = site.layers.prepare(&spec).unwrap().path;
    let made = fill_with_empty_files(&path, 1100);
    assert!(made > 900, "{made}");
    // A larger layer may have more of them.
    site.layers.grow(&spec.id, 8 << 20).unwrap();
    let more = fill_with_empty_files(&path, 1200);
    assert!(more > 900, "{more}");
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_layer_of_any_size_is_nearly_full_before_it_is_full() {
    let site = Site::new();
    let limits = [4 << 20, 24 << 20, 64 << 20, 96 << 20];
    for (mode, limit) in MODES.into_iter().flat_map(|mode| limits.map(|limit| (mode, limit))) {
        let spec = LayerSpec {
            size: Some(limit),
            ..site.spec(mode)
        };
        let path = site.layers.prepare(&spec).unwrap().path;
        let room = || site.layers.room(&spec.id).unwrap();
        let empty = room();
        // The tree below takes nothing.
        assert!(
            empty.bytes_full < 15 && empty.inodes_full < 15,
            "{mode:?} {limit}: {empty:?}"
        );
        let mut file = fs::File::create(path.join("large")).unwrap();
        let part = vec![1; (limit / 200) as usize];
        let mut before = empty;
        let full = loop {
            match file.write_all(&part).and_then(|()| file.sync_all()) {
                Ok(()) => before = room(),
                Err(error) => break error,
            }
        };
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC), "{mode:?} {limit}");
        assert!((95..=100).contains(&before.bytes_full), "{mode:?} {limit}: {before:?}");
        assert!(before.used <= limit, "{mode:?} {limit}: {before:?}");
        drop(file);
        fs::remove_file(path.join("large")).unwrap();
        fill_with_empty_files(&path, limit / 1024);
        let full = room();
        assert!(
            full.inodes_full >= 95 && full.bytes_full < 85,
            "{mode:?} {limit}: {full:?}"
        );
        assert!(!full.disk_full);
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

#[test]
fn no_layer_on_disk_is_made_where_less_is_free_than_is_reserved() {
    let site = Site::new();
    let overlay = site.spec(Mode::Overlay);
    site.layers.prepare(&overlay).unwrap();
    let site = site.restart_with(store::Options {
        reserved_free: u64::MAX / 2,
    });
    // What there is stays, and says so.
    site.layers.prepare(&overlay).unwrap();
    assert!(site.layers.room(&overlay.id).unwrap().disk_full);
    let another = site.spec(Mode::Overlay);
    let refused = site.layers.prepare(&another).unwrap_err();
    assert!(
        matches!(&refused, Error::Store(error) if error.is_disk_full()),
        "{refused}"
    );
    assert_eq!(site.layers.record(&another.id).unwrap(), None);
    let in_memory = site.spec(Mode::Tmpfs);
    site.layers.prepare(&in_memory).unwrap();
    assert!(!site.layers.room(&in_memory.id).unwrap().disk_full);
    for spec in [&overlay, &in_memory] {
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

#[test]
fn a_limit_too_small_for_anything_is_refused_and_leaves_nothing() {
    let site = Site::new();
    for mode in MODES {
        let spec = LayerSpec {
            size: Some(4096),
            ..site.spec(mode)
        };
        let error = site.layers.prepare(&spec).unwrap_err();
        assert!(matches!(error, Error::TooSmall { size: 4096, .. }), "{error}");
        assert_eq!(site.layers.record(&spec.id).unwrap(), None);
    }
    site.nothing_is_left();
}

#[test]
fn a_disk_of_large_sectors_has_layers_of_any_limit() {
    let site = Site::of_large_sectors();
    for size in [4 << 20, SIZE, 128 << 20] {
        let spec = LayerSpec {
            size: Some(size),
            ..site.spec(Mode::Overlay)
        };
        let path = site.layers.prepare(&spec).unwrap().path;
        fs::write(path.join("mine"), "mine").unwrap();
        site.layers.unmount(&spec.id).unwrap();
        let path = site.layers.prepare(&spec).unwrap().path;
        assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine", "{size}");
        site.layers.release(&spec.id, false).unwrap();
    }
}

#[test]
fn a_layer_without_a_limit_has_none_but_the_disks() {
    let mut site = Site::new();
    let spec = LayerSpec {
        size: None,
        ..site.spec(Mode::Overlay)
    };
    let prepared = site.layers.prepare(&spec).unwrap();
    assert_eq!(prepared.size, None);
    fs::write(prepared.path.join("large"), vec![1; 2 * SIZE as usize]).unwrap();
    assert!(site.layers.room(&spec.id).unwrap().used >= 2 * SIZE);
    let grown = site.layers.grow(&spec.id, SIZE);
    assert!(matches!(grown, Err(Error::Unlimited { .. })));
    assert_eq!(site.dir.loop_devices(), Vec::<PathBuf>::new());
    site = site.reboot();
    let path = site.layers.prepare(&spec).unwrap().path;
    assert_eq!(path.join("large").metadata().unwrap().len(), 2 * SIZE);
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_layer_in_memory_without_a_limit_says_what_it_holds() {
    let site = Site::new();
    let spec = LayerSpec {
        size: None,
        ..site.spec(Mode::Tmpfs)
    };
    let path = site.layers.prepare(&spec).unwrap().path;
    fs::write(path.join("large"), vec![1; SIZE as usize]).unwrap();
    let room = site.layers.room(&spec.id).unwrap();
    assert!((SIZE..SIZE + (1 << 20)).contains(&room.used), "{room:?}");
    assert_eq!((room.bytes_full, room.inodes_full), (0, 0));
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn what_others_mounted_inside_a_layer_is_named_and_not_unmounted() {
    let site = Site::new();
    for mode in MODES {
        let spec = site.spec(mode);
        let path = site.layers.prepare(&spec).unwrap().path;
        let foreign = site.dir.path().join("foreign");
        fs::create_dir_all(&foreign).unwrap();
        fs::write(foreign.join("kept"), "kept").unwrap();
        fs::create_dir(path.join("inside")).unwrap();
        let point = path.join("inside");
        rustix::mount::mount_bind(&foreign, &point).unwrap();
        // Also when patience has ended.
        for detach in [false, true] {
            let error = site.layers.release(&spec.id, detach).unwrap_err();
            let named = |by: &str| by.contains(&*point.to_string_lossy());
            assert!(matches!(&error, Error::InUse { by, .. } if named(by)), "{error}");
            assert_eq!(fs::read_to_string(point.join("kept")).unwrap(), "kept");
        }
        rustix::mount::unmount(&point, rustix::mount::UnmountFlags::empty()).unwrap();
        site.layers.release(&spec.id, false).unwrap();
    }
    assert_eq!(
        fs::read_to_string(site.dir.path().join("foreign/kept")).unwrap(),
        "kept"
    );
    site.nothing_is_left();
}

#[test]
fn a_store_in_a_very_long_path_has_layers_too() {
    // More than the 255 bytes that the kernel takes for an option that is text.
    let site = Site::at(&["n".repeat(200), "m".repeat(200)].join("/"));
    for mode in MODES {
        let spec = site.spec(mode);
        let path = site.layers.prepare(&spec).unwrap().path;
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "below");
        fs::write(path.join("new"), "new").unwrap();
        site.layers.release(&spec.id, false).unwrap();
    }
    site.nothing_is_left();
}

#[test]
fn what_others_mounted_inside_a_layers_folder_is_not_removed_with_it() {
    let site = Site::new();
    let spec = LayerSpec {
        size: None,
        ..site.spec(Mode::Overlay)
    };
    site.layers.prepare(&spec).unwrap();
    let foreign = site.dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("kept"), "kept").unwrap();
    let point = site.root.join("layers").join(spec.id.as_str()).join("work");
    rustix::mount::mount_bind(&foreign, &point).unwrap();
    let error = site.layers.release(&spec.id, true).unwrap_err();
    assert!(
        matches!(&error, Error::Occupied { path, .. } if *path == point),
        "{error}"
    );
    assert_eq!(fs::read_to_string(foreign.join("kept")).unwrap(), "kept");
    rustix::mount::unmount(&point, rustix::mount::UnmountFlags::empty()).unwrap();
    site.layers.release(&spec.id, false).unwrap();
    assert_eq!(fs::read_to_string(foreign.join("kept")).unwrap(), "kept");
    site.nothing_is_left();
}
