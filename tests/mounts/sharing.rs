//! Who else uses a layer or its tree.

use rustix::mount::{UnmountFlags, unmount};

use super::*;

#[test]
fn a_program_that_runs_from_a_layer_is_named() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    let program = path.join("holds-it");
    fs::copy("/bin/cat", &program).unwrap();
    // Nothing of the layer is open in it: no descriptor, no folder.
    let mut child = Command::new(&program)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let error = site.layers.release(&spec.id, false).unwrap_err();
    let pid = format!("process {} (holds-it)", child.id());
    // Ended before anything is checked, so that a failure leaves no process.
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(
        matches!(&error, Error::InUse { by, .. } if by.contains(&pid)),
        "{error}; expected {pid}"
    );
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_layer_that_only_another_namespace_has_mounted_is_neither_mounted_twice_nor_lost() {
    for mode in MODES {
        let mut site = Site::new();
        let spec = site.spec(mode);
        let path = site.layers.prepare(&spec).unwrap().path;
        fs::write(path.join("mine"), "mine").unwrap();
        let holder = Holder::start("exec unshare --mount --propagation private sh -c 'echo ready; read _'");
        unmount(&path, UnmountFlags::empty()).unwrap();
        unmount(
            site.root.join("layers").join(spec.id.as_str()).join("disk"),
            UnmountFlags::empty(),
        )
        .unwrap();
        site = site.restart();
        let error = site.layers.prepare(&spec).unwrap_err();
        assert!(
            matches!(&error, Error::InUse { by, .. } if by.contains("mount namespace")),
            "{error}"
        );
        assert_eq!(site.layers.record(&spec.id).unwrap().unwrap().lost, None, "{mode:?}");
        drop(holder);
        let prepared = site.layers.prepare(&spec).unwrap();
        match mode {
            Mode::Overlay => assert_eq!(fs::read_to_string(prepared.path.join("mine")).unwrap(), "mine"),
            Mode::Tmpfs => assert_eq!(prepared.lost, Some(Lost::Reboot)),
            Mode::ReadOnly => unreachable!("it has no upper"),
        }
        site.layers.release(&spec.id, false).unwrap();
        site.nothing_is_left();
    }
}

#[test]
fn a_layer_that_is_only_bound_elsewhere_is_neither_mounted_twice_nor_removed() {
    for mode in MODES {
        let site = Site::new();
        let spec = site.spec(mode);
        let path = site.layers.prepare(&spec).unwrap().path;
        fs::write(path.join("mine"), "mine").unwrap();
        // As a pod has it, while somebody unmounts ours by hand.
        let elsewhere = site.dir.path().join("pod");
        fs::create_dir(&elsewhere).unwrap();
        let holder = Holder::start(&format!(
            "exec unshare --mount --propagation private sh -c 'mount --bind {} {} && umount {} && echo ready && read _'",
            path.display(),
            elsewhere.display(),
            path.display(),
        ));
        unmount(&path, UnmountFlags::empty()).unwrap();
        let in_use = |error: Error| match error {
            Error::InUse { by, .. } => assert!(by.contains("a mount at") && by.contains("/pod"), "{by}"),
            other => panic!("{other}"),
        };
        in_use(site.layers.prepare(&spec).unwrap_err());
        in_use(site.layers.release(&spec.id, false).unwrap_err());
        drop(holder);
        let path = site.layers.prepare(&spec).unwrap().path;
        assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine", "{mode:?}");
        site.layers.release(&spec.id, false).unwrap();
        fs::remove_dir(&elsewhere).unwrap();
        site.nothing_is_left();
    }
}

#[test]
fn a_disk_that_another_namespace_still_has_mounted_gets_no_second_loop_device() {
    let mut site = Site::new();
    // Somebody else's device, which nobody may open for writing.
    let other = site.dir.path().join("other.img");
    fs::write(&other, vec![0; 1 << 20]).unwrap();
    let attached = Command::new("losetup")
        .args(["--find", "--read-only"])
        .arg(&other)
        .status();
    assert!(attached.unwrap().success());
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    fs::write(path.join("mine"), "mine").unwrap();
    // There, the overlay is gone and only the file system below it is left.
    let holder = Holder::start(&format!(
        "exec unshare --mount --propagation private sh -c 'umount {} && echo ready && read _'",
        path.display()
    ));
    unmount(&path, UnmountFlags::empty()).unwrap();
    let disk = site.root.join("layers").join(spec.id.as_str()).join("disk");
    unmount(&disk, UnmountFlags::empty()).unwrap();
    site = site.restart();
    let path = site.layers.prepare(&spec).unwrap().path;
    assert_eq!(site.dir.loop_devices().len(), 2);
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    fs::write(path.join("later"), "later").unwrap();
    drop(holder);
    for device in site.dir.loop_devices() {
        let backing = fs::read_to_string(
            Path::new("/sys/block")
                .join(device.file_name().unwrap())
                .join("loop/backing_file"),
        );
        if backing.unwrap().trim_end() == other.to_str().unwrap() {
            assert!(
                Command::new("losetup")
                    .arg("--detach")
                    .arg(&device)
                    .status()
                    .unwrap()
                    .success()
            );
        }
    }
    site = site.reboot();
    let path = site.layers.prepare(&spec).unwrap().path;
    for name in ["mine", "later"] {
        assert_eq!(fs::read_to_string(path.join(name)).unwrap(), name);
    }
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn many_at_once_make_one_copy_of_a_tree_and_one_mount_of_a_layer() {
    let site = Site::new();
    let specs: Vec<_> = (0..4).map(|at| site.spec(MODES[at % 2])).collect();
    std::thread::scope(|scope| {
        for spec in specs.iter().chain(&specs) {
            scope.spawn(|| site.layers.prepare(spec).unwrap());
        }
    });
    // Each has its own file system, and the overlay over it.
    assert_eq!(site.dir.mounts().len(), 2 * specs.len() + site.shared());
    assert_eq!(fs::read_dir(site.store.images_dir()).unwrap().count(), 1);
    assert_eq!(site.layers.list().unwrap().0.len(), specs.len());
    std::thread::scope(|scope| {
        for spec in specs.iter().chain(&specs) {
            scope.spawn(|| site.layers.release(&spec.id, false).unwrap());
        }
    });
    site.nothing_is_left();
}

#[test]
fn a_layer_that_is_being_read_is_not_released() {
    let site = Site::new();
    let spec = site.spec(Mode::Tmpfs);
    site.layers.prepare(&spec).unwrap();
    let upper = site.layers.upper(&spec.id).unwrap();
    for detach in [false, true] {
        let error = site.layers.release(&spec.id, detach).unwrap_err();
        assert!(
            matches!(&error, Error::InUse { by, .. } if by.contains("snapshot")),
            "{error}"
        );
    }
    drop(upper);
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}
