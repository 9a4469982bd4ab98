//! Images of generated folders, as the kernel shows them with the store's contents behind them, compared by the eye of
//! its own with what was made; and as `fsck.erofs` finds them.

use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::*;
use crate::layer::{LayerId, Mode, Road};

struct Images {
    disk: Disk,
    store: Store,
    layers: Layers,
    road: Road,
}

impl Images {
    fn new(megabytes: u64, options: &[&str], road: Road) -> Images {
        let disk = Disk::new("ext4", megabytes, options);
        let store = Store::open(&disk.path.join("store"), Options::default()).unwrap();
        let options = layer::Options {
            // Setuid bits are shown either way; with this, `look` may read what a mount would keep from it.
            allow_suid: true,
            road: Some(road),
            ..layer::Options::default()
        };
        let layers = Layers::open(store.clone(), options).unwrap();
        Images {
            disk,
            store,
            layers,
            road,
        }
    }

    fn source(&self) -> PathBuf {
        let source = self.disk.path.join("source");
        fs::create_dir(&source).unwrap();
        source
    }

    /// A generated folder, as it was, and its tree.
    fn generated(&self, seed: u64) -> (Looked, crate::store::TreeDigest) {
        let source = self.source();
        make::folder(&source, (0xfff, 0xf_ffff), &mut StdRng::seed_from_u64(seed));
        let (made, tree) = (look(&source), take(&self.store, &source).digest().unwrap());
        remove_all(&source).unwrap();
        (made, tree)
    }

    /// Shows a tree to `see`, as a mount that nobody can write to.
    fn show(&self, tree: &crate::store::TreeDigest, ids: Option<(u32, u32)>, see: impl FnOnce(&Path)) {
        let id: LayerId = uuid::Uuid::new_v4().to_string().parse().unwrap();
        let spec = LayerSpec {
            id: id.clone(),
            owner: LayerOwner::object("ns", "l"),
            tree: *tree,
            mode: Mode::ReadOnly,
            size: None,
            ids,
        };
        see(&self.layers.prepare(&spec).unwrap().path);
        // Another test may be starting a program, which has our descriptors until it is another one.
        let mut tried = 0;
        while let Err(error) = self.layers.release(&id, false) {
            tried += 1;
            assert!(matches!(error, layer::Error::InUse { .. }) && tried < 200, "{error}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        // The view, and the image where there is one.
        let mounts = if self.road == Road::Copy { 1 } else { 2 };
        let mut gone = 0;
        while gone < mounts {
            gone += self.layers.unmount_unused(std::time::Duration::ZERO).unwrap();
            tried += 1;
            assert!(tried < 400, "{gone} of {mounts} mounts went");
            std::thread::sleep(std::time::Duration::from_millis(if gone < mounts { 50 } else { 0 }));
        }
        assert_eq!(gone, mounts);
    }

    /// The one image that there is.
    fn image(&self) -> PathBuf {
        let mut images = fs::read_dir(self.store.images_dir()).unwrap();
        let image = images.next().unwrap().unwrap().path();
        assert!(images.next().is_none());
        image
    }

    /// A folder of some files, its tree, and the bytes of the tree's image.
    fn small(&self) -> (Looked, crate::store::TreeDigest, Vec<u8>) {
        let source = self.source();
        for number in 0..200 {
            fs::write(source.join(format!("file-{number}")), number.to_string()).unwrap();
        }
        let tree = take(&self.store, &source).digest().unwrap();
        self.show(&tree, None, |_| {});
        (look(&source), tree, fs::read(self.image()).unwrap())
    }

    fn check(&self, what: &str) {
        let out = Command::new("fsck.erofs").arg(self.image()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.is_empty(), "{what}: {said}");
    }
}

const OWNER: (u32, u32) = (70_000, 4_000_000_000);

/// The same with an owner.
fn owned(made: &Looked) -> Looked {
    let mut owned = made.clone();
    for entry in owned.values_mut() {
        entry.owner = OWNER;
    }
    owned
}

fn shown(road: Road, usual: u64) {
    let first = first_seed();
    for begin in (0..rounds(usual)).step_by(usual as usize) {
        let images = Images::new(256, &["-m0", "-b4096"], road);
        images.see_all((begin..begin + usual).map(|round| first.wrapping_add(round)));
    }
}

impl Images {
    fn see_all(&self, seeds: impl Iterator<Item = u64>) {
        let images = self;
        for seed in seeds {
            let what = format!("LARDER_SEED={seed}");
            let (made, tree) = images.generated(seed);
            images.show(&tree, None, |path| assert_alike(&made, &look(path), &what));
            images.check(&what);
            let bytes = fs::read(images.image()).unwrap();
            remove_all(&images.image()).unwrap();
            // The same bytes again, and with an owner another image.
            images.show(&tree, None, |_| {});
            assert!(
                fs::read(images.image()).unwrap() == bytes,
                "{what}: the image is another one"
            );
            remove_all(&images.image()).unwrap();
            images.show(&tree, Some(OWNER), |path| {
                assert_alike(&owned(&made), &look(path), &what);
            });
            images.check(&what);
            remove_all(&images.image()).unwrap();
        }
    }
}

#[test]
fn any_folder_is_shown_by_its_image_as_it_is() {
    shown(Road::Descriptors, 100);
}

#[test]
fn any_folder_is_shown_by_its_image_on_the_second_road_too() {
    shown(Road::Paths, 20);
}

#[test]
fn any_folder_is_shown_by_its_copy_as_it_is() {
    let images = Images::new(256, &["-m0", "-b4096"], Road::Copy);
    let first = first_seed();
    for round in 0..rounds(20) {
        let seed = first.wrapping_add(round);
        let what = format!("LARDER_SEED={seed}");
        let (made, tree) = images.generated(seed);
        images.show(&tree, None, |path| assert_alike(&made, &look(path), &what));
        images.show(&tree, Some(OWNER), |path| {
            assert_alike(&owned(&made), &look(path), &what)
        });
        for copy in fs::read_dir(images.store.images_dir()).unwrap() {
            remove_all(&copy.unwrap().path()).unwrap();
        }
    }
}

#[test]
fn a_folder_of_a_hundred_thousand_entries_is_shown_by_its_image() {
    let images = Images::new(512, &["-m0", "-b4096", "-N250000"], Road::Descriptors);
    let source = images.source();
    make::large_folder(&source, 100_000, &mut StdRng::seed_from_u64(1));
    let made = look(&source);
    let tree = take(&images.store, &source).digest().unwrap();
    images.show(&tree, None, |path| assert_alike(&made, &look(path), "large"));
    images.check("large");
}

#[test]
fn an_image_that_is_not_whole_or_not_one_is_made_again() {
    let images = Images::new(64, &["-m0", "-b4096"], Road::Descriptors);
    let (made, tree, whole) = images.small();
    let (mut other_tree, mut unmountable) = (whole.clone(), whole.clone());
    other_tree[1024 + 48] ^= 1;
    // A block size that no kernel takes: only mounting tells.
    unmountable[1024 + 12] = 1;
    let path = images.image();
    for damaged in [
        &whole[..whole.len() - 4096],
        &whole[..100],
        b"",
        &other_tree,
        &unmountable,
    ] {
        fs::write(&path, damaged).unwrap();
        images.show(&tree, None, |path| assert_alike(&made, &look(path), "mended"));
        assert!(fs::read(&path).unwrap() == whole);
    }
}

#[test]
fn a_verification_finds_any_byte_of_an_image_that_is_another() {
    let images = Images::new(64, &["-m0", "-b4096"], Road::Descriptors);
    let (made, tree, whole) = images.small();
    let (path, cancel) = (images.image(), AtomicBool::new(false));
    let verify = || images.layers.verify_images(None, &cancel).unwrap();
    let sound = layer::ImageVerification {
        images: 1,
        ..Default::default()
    };
    assert_eq!(verify(), sound);
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..20 {
        let mut damaged = whole.clone();
        let at = rng.random_range(0..whole.len());
        damaged[at] ^= 1 << rng.random_range(0..8);
        fs::write(&path, damaged).unwrap();
        let found = verify();
        let bad = layer::BadImage {
            path: path.clone(),
            tree,
            mounted: false,
            entry: None,
        };
        assert_eq!((found.images, &found.bad[..]), (1, &[bad][..]), "byte {at}");
        assert!(found.is_sound() && fs::read(&path).unwrap() == whole);
    }
    fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
    assert_eq!(verify().bad.len(), 1);
    // Mounted, and then damaged below the mount: the mount goes on with what it has, and that is said.
    images.show(&tree, None, |shown| {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xff], whole.len() as u64 - 1).unwrap();
        let found = verify();
        assert!(found.bad[0].mounted && !found.is_sound());
        assert!(fs::read(&path).unwrap() == whole);
        assert_eq!(verify(), sound);
        let _ = look(shown);
    });
    images.show(&tree, None, |path| assert_alike(&made, &look(path), "mended"));
    // Without its manifest nobody knows what it should be.
    let manifest = images.store.root().join("manifests").join(tree.hex());
    fs::remove_file(manifest).unwrap();
    let found = verify();
    assert_eq!((found.images, found.passed_over.len()), (0, 1), "{found:?}");
    assert!(found.passed_over[0].message.contains(&tree.to_string()), "{found:?}");
}

#[test]
fn a_verification_finds_anything_of_a_copy_that_is_another() {
    use std::os::unix::fs::{chown, symlink};
    let images = Images::new(64, &["-m0", "-b4096"], Road::Copy);
    let source = images.source();
    fs::create_dir(source.join("folder")).unwrap();
    for name in ["file", "folder/one", "folder/two"] {
        fs::write(source.join(name), name).unwrap();
    }
    fs::hard_link(source.join("folder/one"), source.join("folder/same")).unwrap();
    symlink("file", source.join("link")).unwrap();
    let (made, tree) = (look(&source), take(&images.store, &source).digest().unwrap());
    let cancel = AtomicBool::new(false);
    let verify = || images.layers.verify_images(None, &cancel).unwrap();
    let sound = layer::ImageVerification {
        images: 1,
        ..Default::default()
    };
    let keep_time = |path: &Path, change: &dyn Fn(&Path)| {
        let modified = path.metadata().unwrap().modified().unwrap();
        change(path);
        fs::File::open(path).unwrap().set_modified(modified).unwrap();
    };
    // Each in a folder whose time stays, so that nothing but the change is seen.
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let damages: [Damage; 9] = [
        ("file", &|at| {
            keep_time(&at.join("file"), &|file| fs::write(file, "filf").unwrap())
        }),
        ("file", &|at| {
            fs::File::open(at.join("file"))
                .unwrap()
                .set_modified(SystemTime::now())
                .unwrap()
        }),
        ("folder/two", &|at| {
            fs::set_permissions(at.join("folder/two"), fs::Permissions::from_mode(0o600)).unwrap()
        }),
        ("folder/two", &|at| chown(at.join("folder/two"), Some(1), None).unwrap()),
        ("folder/one", &|at| {
            rustix::fs::setxattr(at.join("folder/one"), "user.x", b"y", rustix::fs::XattrFlags::empty()).unwrap();
        }),
        ("folder", &|at| {
            keep_time(&at.join("folder"), &|folder| {
                fs::write(folder.join("zero"), "").unwrap()
            })
        }),
        ("folder", &|at| {
            keep_time(&at.join("folder"), &|folder| {
                fs::remove_file(folder.join("two")).unwrap()
            })
        }),
        ("folder/one", &|at| {
            keep_time(&at.join("folder"), &|folder| {
                let (same, modified) = (
                    folder.join("same"),
                    folder.join("one").metadata().unwrap().modified().unwrap(),
                );
                fs::remove_file(&same).unwrap();
                fs::write(&same, "folder/one").unwrap();
                fs::File::open(&same).unwrap().set_modified(modified).unwrap();
            });
        }),
        ("link", &|at| {
            keep_time(at, &|root| {
                fs::remove_file(root.join("link")).unwrap();
                symlink("filf", root.join("link")).unwrap();
            });
        }),
    ];
    for (entry, damage) in damages {
        images.show(&tree, None, |path| assert_alike(&made, &look(path), entry));
        assert_eq!(verify(), sound, "before {entry}");
        let copy = images.image();
        damage(&copy);
        let found = verify();
        let bad = layer::BadImage {
            path: copy.clone(),
            tree,
            mounted: false,
            entry: Some(entry.to_owned()),
        };
        assert_eq!((found.images, &found.bad[..]), (1, &[bad][..]));
        assert!(found.is_sound() && !copy.exists());
    }
    // With an owner of its own, and while a layer stands on it.
    images.show(&tree, Some(OWNER), |_| {
        assert_eq!(verify(), sound);
        let copy = images.image();
        fs::set_permissions(copy.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
        let found = verify();
        assert!(found.bad[0].mounted && !found.is_sound() && copy.exists(), "{found:?}");
    });
    assert!(!verify().bad[0].mounted);
    assert_eq!(verify(), layer::ImageVerification::default());
}

#[test]
fn images_are_compared_no_faster_than_asked_and_no_longer_than_wanted() {
    let images = Images::new(64, &["-m0", "-b4096"], Road::Descriptors);
    let (_, _, whole) = images.small();
    let never = AtomicBool::new(false);
    // Made anew and read: twice its bytes, in half a second.
    let rate = NonZeroU64::new(4 * whole.len() as u64);
    let begun = Instant::now();
    assert_eq!(images.layers.verify_images(rate, &never).unwrap().images, 1);
    // What was not used before the first wait counts.
    assert!(begun.elapsed() > Duration::from_millis(350), "{:?}", begun.elapsed());
    let slow = NonZeroU64::new(whole.len() as u64 / 600);
    let cancel = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let found = scope.spawn(|| images.layers.verify_images(slow, cancel).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        cancel.store(true, Ordering::Relaxed);
        assert_eq!(found.join().unwrap(), layer::ImageVerification::default());
    });
    assert!(begun.elapsed() < Duration::from_secs(300));
    assert!(fs::read(images.image()).unwrap() == whole);
}

#[test]
fn what_an_image_cannot_show_is_named() {
    let images = Images::new(64, &["-m0", "-b4096"], Road::Descriptors);
    let build = images.store.build().unwrap();
    let mut tree = Tree::new(crate::store::tree::Meta::default());
    let folder = tree
        .add_dir(Tree::ROOT, *b"folder", crate::store::tree::Meta::default())
        .unwrap();
    // The format has 16 bits for the length.
    let leaf = crate::store::tree::Leaf {
        meta: crate::store::tree::Meta {
            xattrs: vec![((*b"user.large").into(), vec![0; 65_536].into())],
            ..Default::default()
        },
        kind: crate::store::tree::LeafKind::Fifo,
    };
    tree.add_leaf(folder, *b"pipe", leaf).unwrap();
    let tree = publish(build, &tree.finish().unwrap(), "large");
    let spec = LayerSpec {
        id: uuid::Uuid::new_v4().to_string().parse().unwrap(),
        owner: LayerOwner::object("ns", "l"),
        tree,
        mode: Mode::ReadOnly,
        size: None,
        ids: None,
    };
    let error = images.layers.prepare(&spec).unwrap_err().to_string();
    assert!(error.contains("folder/pipe") && error.contains("65535"), "{error}");
    assert_eq!(fs::read_dir(images.store.images_dir()).unwrap().count(), 0);
    images.layers.release(&spec.id, false).unwrap();
}
