//! Layers whose own file system takes no writes any more, as after an error of the disk below.

use super::support::shut_down;
use super::*;

impl Site {
    /// A layer on disk with the file "mine", which has reached the disk, and where it is mounted.
    fn with_mine(&self) -> (LayerSpec, PathBuf) {
        let spec = self.spec(Mode::Overlay);
        let path = self.layers.prepare(&spec).unwrap().path;
        fs::write(path.join("mine"), "mine").unwrap();
        sync(&path);
        (spec, path)
    }

    fn image(&self, spec: &LayerSpec) -> PathBuf {
        self.root.join("layers").join(spec.id.as_str()).join("disk.img")
    }

    fn disk(&self, spec: &LayerSpec) -> PathBuf {
        self.image(spec).with_file_name("disk")
    }

    /// The name of a layer's loop device. Where images of trees need one, too, it is not the only one.
    fn device(&self, spec: &LayerSpec) -> String {
        let mounts = mountinfo::of_self().unwrap();
        let mount = mounts.iter().find(|mount| mount.point == self.disk(spec)).unwrap();
        let source = String::from_utf8(mount.source.clone()).unwrap();
        source.strip_prefix("/dev/").unwrap().to_owned()
    }

    /// Has the kernel take a layer's file system for damaged, as when it comes upon something that cannot be.
    fn damage(&self, spec: &LayerSpec) {
        let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", self.device(spec));
        fs::write(trigger, "a test").unwrap();
        assert!(self.layers.room(&spec.id).unwrap().stopped);
    }

    /// Unmounts a layer, and changes its image by a command of debugfs.
    fn debugfs(&self, spec: &LayerSpec, commands: &[&str]) {
        self.layers.unmount(&spec.id).unwrap();
        for command in commands {
            let done = Command::new("debugfs")
                .args(["-w", "-R", command])
                .arg(self.image(spec))
                .output()
                .unwrap();
            assert!(done.status.success(), "{done:?}");
        }
    }
}

fn sync(folder: &Path) {
    rustix::fs::syncfs(fs::File::open(folder).unwrap()).unwrap();
}

#[test]
fn a_layer_that_stopped_is_mounted_anew_with_its_data_once_nobody_uses_it() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    fs::write(path.join("mine"), "mine").unwrap();
    fs::remove_file(path.join("folder/other")).unwrap();
    sync(&path);
    assert!(!site.layers.room(&spec.id).unwrap().stopped);
    shut_down(&site.disk(&spec));
    fs::write(path.join("more"), "more").unwrap_err();
    assert!(site.layers.room(&spec.id).unwrap().stopped);

    let shown = path.display();
    for (command, word) in [
        (format!("cd {shown}; echo ready; read _"), "sh"),
        (bound_elsewhere(&path), "mount"),
    ] {
        let holder = Holder::start(&command);
        let error = site.layers.prepare(&spec).unwrap_err();
        let Error::Stopped { waits, .. } = &error else {
            panic!("{error}")
        };
        assert!(waits.contains(word), "{waits}");
        assert!(site.layers.room(&spec.id).unwrap().stopped);
        drop(holder);
    }

    let prepared = site.layers.prepare(&spec).unwrap();
    // What is in its journal is no damage.
    assert_eq!((prepared.reused, prepared.checked), (false, None));
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    assert!(!path.join("folder/other").exists());
    fs::write(path.join("more"), "more").unwrap();
    assert!(!site.layers.room(&spec.id).unwrap().stopped);
    assert!(site.layers.prepare(&spec).unwrap().reused);
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_stopped_layer_can_be_released() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    site.layers.prepare(&spec).unwrap();
    shut_down(&site.disk(&spec));
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn what_the_check_mends_is_told_and_what_it_does_not_mend_is_not_mounted() {
    let site = Site::new();
    let (spec, path) = site.with_mine();
    // The kernel writes into the file system that there was an error, and it is not trusted before a whole check.
    site.damage(&spec);
    let prepared = site.layers.prepare(&spec).unwrap();
    let said = prepared.checked.unwrap();
    assert!(said.contains("check forced"), "{said}");
    assert!(!site.layers.room(&spec.id).unwrap().stopped);
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");

    // "mine" has one name, and says that it has nine.
    let has_errors = "set_super_value state 2";
    site.debugfs(&spec, &["set_inode_field upper/mine links_count 9", has_errors]);
    let said = site.layers.prepare(&spec).unwrap().checked.unwrap();
    assert!(said.contains("ref count is 9, should be 1"), "{said}");
    assert_eq!(fs::metadata(path.join("mine")).unwrap().nlink(), 1);
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");

    // Without its root folder nobody knows what it held.
    site.debugfs(&spec, &["clri <2>", has_errors]);
    for _ in 0..2 {
        let error = site.layers.prepare(&spec).unwrap_err();
        assert!(
            matches!(&error, Error::Command { message, .. } if message.contains("RUN fsck MANUALLY")),
            "{error}"
        );
        assert!(error.to_string().contains("disk.img"), "{error}");
    }
    assert_eq!(site.dir.layer_mounts(), Vec::<PathBuf>::new());
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

/// Fills a file system to the last byte, by a file.
fn fill(file: &Path) {
    let mut file = fs::File::create(file).unwrap();
    for size in [1 << 20, 4096, 1] {
        let part = vec![1; size];
        while file.write_all(&part).is_ok() {}
    }
}

#[test]
fn a_full_disk_stops_a_layer_and_room_brings_it_back() {
    let site = Site::small(48 << 20);
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    // Larger writes would end short where there is no room, and the kernel's loop driver takes those for whole ones.
    let limit = format!("/sys/block/{}/queue/max_sectors_kb", site.device(&spec));
    fs::write(limit, "4").unwrap();
    fs::write(path.join("mine"), "mine").unwrap();
    sync(&path);
    let filler = site.root.with_file_name("filler");
    fill(&filler);
    let mut written = 0;
    while !site.layers.room(&spec.id).unwrap().stopped {
        assert!(written < 10_000, "it goes on");
        // Each sync writes to the journal, sooner or later where it has never been written to.
        let _ = fs::write(path.join(format!("more-{written}")), "more");
        let _ = rustix::fs::syncfs(fs::File::open(&path).unwrap());
        written += 1;
    }
    fs::write(path.join("later"), "later").unwrap_err();

    fs::remove_file(filler).unwrap();
    site.layers.prepare(&spec).unwrap();
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    fs::write(path.join("later"), "later").unwrap();
    sync(&path);
    assert!(!site.layers.room(&spec.id).unwrap().stopped);
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left_but(&[site.root.parent().unwrap()], 1);
}

#[test]
fn a_disk_that_somebody_is_at_work_on_is_neither_checked_nor_mounted() {
    let site = Site::new();
    let spec = site.spec(Mode::Overlay);
    let path = site.layers.prepare(&spec).unwrap().path;
    fs::write(path.join("mine"), "mine").unwrap();
    site.layers.unmount(&spec.id).unwrap();
    let image = site.image(&spec);
    let in_use = |word: &str| {
        let error = site.layers.prepare(&spec).unwrap_err();
        assert!(
            matches!(&error, Error::InUse { by, .. } if by.contains(word)),
            "{error}"
        );
        assert_eq!(site.dir.layer_mounts(), Vec::<PathBuf>::new());
    };
    // As an admin who repairs it, and as a check that outlived its agent.
    let holder = Holder::start(&format!("exec flock {} sh -c 'echo ready; read _'", image.display()));
    in_use("locked");
    drop(holder);
    // Likewise by a loop device.
    let attached = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&image)
        .output()
        .unwrap();
    let device = String::from_utf8(attached.stdout).unwrap();
    in_use(device.trim());
    assert!(
        Command::new("losetup")
            .args(["--detach", device.trim()])
            .status()
            .unwrap()
            .success()
    );
    let path = site.layers.prepare(&spec).unwrap().path;
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_stopped_layer_that_could_not_come_back_stays_as_it_is() {
    let site = Site::new();
    let (spec, path) = site.with_mine();
    site.damage(&spec);
    // Its image is only there as long as it is mounted.
    let (image, away) = (site.image(&spec), site.root.join("away"));
    fs::rename(&image, &away).unwrap();
    let error = site.layers.prepare(&spec).unwrap_err();
    assert!(error.to_string().contains("disk.img"), "{error}");
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    fs::rename(&away, &image).unwrap();
    // Without room below it would stop again.
    let site = site.restart_with(store::Options {
        reserved_free: u64::MAX / 2,
    });
    let error = site.layers.prepare(&spec).unwrap_err();
    assert!(
        matches!(&error, Error::Stopped { waits, .. } if waits.starts_with("room")),
        "{error}"
    );
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    let site = site.restart();
    site.layers.prepare(&spec).unwrap();
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}

#[test]
fn a_layer_in_memory_that_somebody_made_read_only_keeps_what_it_holds() {
    let site = Site::new();
    let spec = site.spec(Mode::Tmpfs);
    let path = site.layers.prepare(&spec).unwrap().path;
    fs::write(path.join("mine"), "mine").unwrap();
    let disk = site.disk(&spec);
    let remounted = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&disk)
        .status()
        .unwrap();
    assert!(remounted.success());
    assert!(!site.layers.room(&spec.id).unwrap().stopped);
    assert!(site.layers.prepare(&spec).unwrap().reused);
    assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
    site.layers.release(&spec.id, false).unwrap();
    site.nothing_is_left();
}
