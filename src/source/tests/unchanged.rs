//! Folders that are built again: what has not changed is not read, what has changed is.

use super::*;
use crate::store::Revision;

/// Longer than the time for which a change is too young to be told from a later one.
const SETTLED: Duration = Duration::from_millis(2_100);
const SIZE: usize = 400_000;

impl Place {
    fn build(&self) -> Revision {
        self.try_build().unwrap()
    }

    fn try_build(&self) -> Result<Revision, Error> {
        let target = Publish {
            name: RefName::new("test", "tree").unwrap(),
            owner: "uid".to_owned(),
            generation: 1,
            request: None,
            source: serde_json::Value::Null,
            history_limit: 0,
            now: SystemTime::now(),
        };
        let folder = SourceDir::open(&self.store, &self.source)?;
        build_directory(
            &self.store,
            &folder,
            &ScanOptions::default(),
            target,
            &AtomicBool::new(false),
        )
    }

    /// Builds, and counts the bytes that were read from files meanwhile.
    fn build_and_count(&self) -> (Revision, u64) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| {
            let before = bytes_read();
            let revision = self.build();
            (revision, bytes_read() - before)
        })
    }

    /// The digest of the folder read as a whole.
    fn digest(&self) -> crate::store::TreeDigest {
        self.scan().unwrap().digest().unwrap()
    }
}

/// By this thread, so far.
fn bytes_read() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").unwrap();
    let line = text.lines().find(|line| line.starts_with("rchar: ")).unwrap();
    line["rchar: ".len()..].parse().unwrap()
}

/// Bytes that belong to this seed alone.
fn content(seed: usize) -> Vec<u8> {
    (0..SIZE).map(|at| (at * 31 + at / 256 + seed * 7919) as u8).collect()
}

/// Some folders with files, links and attributes.
fn fill(source: &Path) {
    for folder in ["a", "a/deep", "b"] {
        fs::create_dir_all(source.join(folder)).unwrap();
        for number in 0..4 {
            let path = source.join(folder).join(format!("file-{number}"));
            fs::write(&path, content(folder.len() * 10 + number)).unwrap();
        }
    }
    fs::hard_link(source.join("a/file-0"), source.join("b/linked")).unwrap();
    symlink("file-0", source.join("a/link")).unwrap();
    device(&source.join("fifo"), FileType::Fifo, 0, 0);
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(source.join("b/file-1"), "user.k", b"v", none).unwrap();
}

#[test]
fn what_has_not_changed_is_not_read_again() {
    let place = Place::new();
    fill(&place.source);
    std::thread::sleep(SETTLED);
    let (first, read) = place.build_and_count();
    assert!(read >= 12 * SIZE as u64, "{read} bytes read");
    assert_eq!(first.digest, place.digest());

    let (second, read) = place.build_and_count();
    assert_eq!(second, first);
    // The manifest and the note.
    assert!(read < 20_000, "{read} bytes read");

    fs::write(place.source.join("b/file-2"), content(99)).unwrap();
    let (third, read) = place.build_and_count();
    assert!((SIZE as u64..SIZE as u64 + 20_000).contains(&read), "{read} bytes read");
    assert_ne!(third.digest, first.digest);
    assert_eq!(third.digest, place.digest());
}

#[test]
fn a_file_that_was_changed_just_before_it_was_read_is_read_again() {
    let place = Place::new();
    let first = loop {
        let begun = std::time::Instant::now();
        fs::write(place.source.join("file"), content(1)).unwrap();
        let first = place.build();
        // Later it would have been old when it was read.
        if begun.elapsed() < SETTLED / 2 {
            break first;
        }
    };
    let (second, read) = place.build_and_count();
    assert_eq!(second, first);
    assert!(read >= SIZE as u64, "{read} bytes read");
}

#[test]
fn a_change_that_hides_behind_size_and_time_is_seen() {
    let place = Place::new();
    let at = |name: &str| place.source.join(name);
    fill(&place.source);
    fs::write(at("other"), content(50)).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5);
    let set_time = |path: &Path| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(time).unwrap();
    };
    for name in ["a/file-1", "a/file-2", "a/file-3", "other", "b/file-0", "b/file-3"] {
        set_time(&at(name));
    }
    std::thread::sleep(SETTLED);
    place.build();

    // The same size and time, other bytes.
    fs::write(at("a/file-1"), content(51)).unwrap();
    set_time(&at("a/file-1"));
    // Another inode under the name.
    fs::rename(at("other"), at("a/file-2")).unwrap();
    // Another type.
    fs::remove_file(at("a/file-3")).unwrap();
    symlink("somewhere", at("a/file-3")).unwrap();
    // Only metadata.
    fs::set_permissions(at("b/file-0"), fs::Permissions::from_mode(0o4711)).unwrap();
    rustix::fs::setxattr(at("b/file-3"), "user.k", b"w", rustix::fs::XattrFlags::empty()).unwrap();
    // A folder whose files have moved, and one that another has the name of.
    fs::rename(at("a/deep"), at("c")).unwrap();
    fs::create_dir(at("a/deep")).unwrap();
    // A hard link fewer.
    fs::remove_file(at("b/linked")).unwrap();

    let revision = place.build();
    assert_eq!(revision.digest, place.digest());
    let tree = place.store.load(&revision.digest).unwrap();
    let size = content(51).len() as u64;
    let digest = crate::store::Digest::from_bytes(<sha2::Sha256 as sha2::Digest>::digest(content(51)).into());
    assert_eq!(leaf(&tree, "a/file-1").kind, LeafKind::File { digest, size });
    assert_eq!(leaf(&tree, "b/file-0").meta.mode, 0o4711);
}

#[test]
fn what_is_gone_from_the_store_is_read_again() {
    let place = Place::new();
    fill(&place.source);
    std::thread::sleep(SETTLED);
    let first = place.build();
    let tree = place.store.load(&first.digest).unwrap();
    let (digest, _) = leaf(&tree, "b/file-3").content().unwrap();
    let hex = digest.hex();
    let blob = place.store.root().join("objects").join(&hex[..2]).join(&hex[2..]);
    let damage: [fn(&Path); 2] = [
        |blob| fs::remove_file(blob).unwrap(),
        |blob| fs::write(blob, "short").unwrap(),
    ];
    for damage in damage {
        damage(&blob);
        let second = place.build();
        assert_eq!(second.digest, first.digest);
        assert_eq!(fs::read(&blob).unwrap(), content(13));
    }
}

#[test]
fn a_note_that_cannot_be_used_is_as_good_as_none() {
    let place = Place::new();
    fill(&place.source);
    std::thread::sleep(SETTLED);
    let first = place.build();
    let folder = place.store.root().join("cache");
    let note = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let good = fs::read(&note).unwrap();
    let mut bad = vec![Vec::new(), b"rubbish".to_vec(), good[..good.len() - 1].to_vec()];
    for at in [0, 16, 20, 60, good.len() - 40, good.len() - 1] {
        let mut note = good.clone();
        note[at] ^= 1;
        bad.push(note);
    }
    for bad in bad {
        fs::write(&note, bad).unwrap();
        let (revision, read) = place.build_and_count();
        assert_eq!(revision.digest, first.digest);
        assert!(read >= 12 * SIZE as u64, "{read} bytes read");
        assert_eq!(fs::read(&note).unwrap(), good, "it is noted again");
    }

    // A tree that is gone, as after a collection.
    fs::remove_file(place.store.root().join("manifests").join(first.digest.hex())).unwrap();
    let (revision, read) = place.build_and_count();
    assert_eq!(revision.digest, first.digest);
    assert!(read >= 12 * SIZE as u64, "{read} bytes read");
}

#[test]
fn a_note_goes_with_its_ref() {
    let place = Place::new();
    fs::write(place.source.join("file"), "content").unwrap();
    place.build();
    let notes = || fs::read_dir(place.store.root().join("cache")).unwrap().count();
    assert_eq!(notes(), 1);
    place.store.forget(&RefName::new("test", "tree").unwrap()).unwrap();
    assert_eq!(notes(), 0);
}
