//! Collections that are bounded: cut off, slowed down, and with contents that take long to remove.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::store::testing::*;
use crate::store::*;

/// So many small contents that nothing names any more.
fn forgotten(store: &Store, count: usize) {
    let contents: Vec<(String, Vec<u8>)> = (0..count)
        .map(|n| (format!("{n:03}"), format!("{n}").into_bytes()))
        .collect();
    let files: Vec<(&str, &[u8])> = contents.iter().map(|(name, bytes)| (&**name, &**bytes)).collect();
    publish(store, "gone", &files);
    store.forget(&name("gone")).unwrap();
}

#[test]
fn a_cancelled_collection_deletes_no_more_and_the_next_goes_on() {
    let (_dir, store) = store();
    publish(&store, "kept", &[("f", b"kept")]);
    forgotten(&store, 300);
    let cancel = AtomicBool::new(true);
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        // At most a few are gone before the other thread sees it.
        rate: NonZeroU64::new(50),
        cancel: &cancel,
    };
    let run = || store.collect_with(&nothing_kept(), &Trees(vec![]), &how).unwrap();
    // Before it has begun: a plan of half the facts must not be carried out.
    let (report, removals) = run();
    assert!(!report.complete && report.decisions.is_empty() && report.over_limit.is_none() && removals.is_empty());
    assert_eq!(store.blobs().unwrap().0, 301);
    // And on its way.
    cancel.store(false, Ordering::Relaxed);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            while store.blobs().unwrap().0 > 250 {
                std::thread::sleep(Duration::from_millis(1));
            }
            cancel.store(true, Ordering::Relaxed);
        });
        run().0
    });
    assert!(
        !report.complete && (50..300).contains(&report.deleted_blobs),
        "{}",
        report.deleted_blobs
    );
    assert_eq!(store.blobs().unwrap().0, 301 - report.deleted_blobs);
    check_all(&store);
    let rest = collect(&store);
    assert!(rest.complete);
    assert_eq!(rest.deleted_blobs + report.deleted_blobs, 300);
    assert_eq!((collect(&store).deleted_blobs, check_all(&store)), (0, 1));
}

#[test]
fn a_collection_that_waits_for_another_can_be_cancelled() {
    let (_dir, store) = store();
    forgotten(&store, 3);
    let cancel = AtomicBool::new(false);
    let how = Collecting {
        dry_run: true,
        now: SystemTime::now(),
        rate: None,
        cancel: &cancel,
    };
    let other = store.inner.collecting.lock();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.collect_with(&nothing_kept(), &Trees(vec![]), &how).unwrap().0);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        cancel.store(true, Ordering::Relaxed);
        let report = waiting.join().unwrap();
        assert!(!report.complete && report.decisions.is_empty() && report.over_limit.is_none());
    });
    drop(other);
    assert_eq!(collect(&store).deleted_blobs, 3);
}

#[test]
fn what_waits_for_a_slow_collection_can_be_cancelled() {
    let (_dir, store) = store();
    let digest = publish(&store, "t", &[("f", b"1")]).digest;
    let content = digest_of(b"1");
    let verify = |cancel: &AtomicBool| {
        let options = VerifyOptions {
            scope: Scope::All,
            rate: None,
        };
        store.verify(&options, &VerifyProgress::default(), cancel).unwrap()
    };
    let remove = |cancel: &AtomicBool| store.remove_blobs(&[content].into(), &Trees(vec![]), cancel);
    let waits = |work: &(dyn Fn(&AtomicBool) + Sync)| {
        let cancel = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| work(&cancel));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            cancel.store(true, Ordering::Relaxed);
        });
    };
    assert!(!store.is_collecting());
    let other = store.inner.collecting.lock();
    assert!(store.is_collecting());
    waits(&|cancel| assert!(matches!(remove(cancel), Err(Error::Cancelled))));
    waits(&|cancel| {
        let report = verify(cancel);
        assert_eq!((report.complete, report.manifests), (false, 0));
    });
    // What was found, and moved away, is told with what it hurts: that is worth the wait.
    std::fs::write(blob_path(&store, &content), b"2").unwrap();
    let (cancel, progress) = (never(), VerifyProgress::default());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let options = VerifyOptions {
                scope: Scope::All,
                rate: None,
            };
            store.verify(&options, &progress, &cancel).unwrap()
        });
        while progress.blobs.load(Ordering::Relaxed) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        cancel.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(other);
        let report = waiting.join().unwrap();
        assert_eq!((report.hurt.len(), report.hurt[0].digest), (1, digest));
    });
}

#[test]
fn one_file_that_cannot_be_removed_keeps_no_other_and_is_told() {
    let (_dir, store) = store();
    forgotten(&store, 100);
    let digests = (0..100).map(|n| digest_of(format!("{n}").as_bytes()));
    let first = blob_path(&store, &digests.min_by_key(|digest| digest.hex()).unwrap());
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        rate: None,
        cancel: &AtomicBool::new(false),
    };
    // No folder can be removed as a file is.
    let hinder = || {
        std::fs::remove_file(&first).unwrap();
        std::fs::create_dir(&first).unwrap();
    };
    let failed = store.collect_and(&nothing_kept(), &Trees(vec![]), &how, &hinder);
    let Err(Unfinished {
        error,
        done: Some(done),
    }) = failed
    else {
        panic!("it ended")
    };
    let (report, removals) = *done;
    assert!(error.to_string().contains(first.to_str().unwrap()), "{error}");
    assert_eq!(report.failed, Some(error.to_string()));
    // The manifest went as well.
    assert_eq!(
        (report.complete, report.deleted_blobs, removals.len()),
        (false, 99, 100)
    );
    let id = store.record_run(&report, &removals, &serde_json::Value::Null).unwrap();
    let mut listed = 0;
    let record = store.run(&id, &mut |_| listed += 1).unwrap();
    assert_eq!((record.report.failed, listed), (report.failed, removals.len()));
    std::fs::remove_dir(&first).unwrap();
    let rest = collect(&store);
    assert!(rest.complete && rest.failed.is_none());
    assert_eq!((collect(&store).deleted_blobs, check_all(&store)), (0, 0));
}

#[test]
fn a_disk_on_which_nothing_can_be_removed_is_not_asked_for_every_file() {
    let (_dir, store) = store();
    forgotten(&store, 200);
    // The hundred first ones by name: no run comes to their end.
    let mut paths: Vec<_> = (0..200)
        .map(|n| blob_path(&store, &digest_of(format!("{n}").as_bytes())))
        .collect();
    paths.sort();
    let hinder = || {
        for path in &paths[..100] {
            std::fs::remove_file(path).unwrap();
            std::fs::create_dir(path).unwrap();
        }
    };
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        rate: None,
        cancel: &never(),
    };
    let ended = store.collect_and(&nothing_kept(), &Trees(vec![]), &how, &hinder);
    let report = ended.err().unwrap().done.unwrap().0;
    assert_eq!((report.complete, report.deleted_blobs), (false, 0));
    assert!(report.failed.unwrap().contains(paths[0].to_str().unwrap()));
}

#[test]
fn no_more_is_removed_in_a_second_than_may_be() {
    const RATE: u64 = 20;
    let (_dir, store) = store();
    forgotten(&store, 15);
    // History, whose manifests go as well.
    for number in 0..15 {
        publish(
            &store,
            &format!("old-{number}"),
            &[("f", format!("old {number}").as_bytes())],
        );
        store
            .retire(&name(&format!("old-{number}")), "uid-1", SystemTime::now())
            .unwrap();
    }
    let how = Collecting {
        dry_run: false,
        now: SystemTime::now(),
        rate: NonZeroU64::new(RATE),
        cancel: &AtomicBool::new(false),
    };
    let left = || {
        let manifests = std::fs::read_dir(store.root().join("manifests")).unwrap().count() as u64;
        store.blobs().unwrap().0 + manifests
    };
    let (begin, before) = (Instant::now(), left());
    assert_eq!(before, 30 + 16);
    let report = std::thread::scope(|scope| {
        let run = scope.spawn(|| store.collect_with(&nothing_kept(), &Trees(vec![]), &how).unwrap().0);
        while !run.is_finished() {
            let gone = before - left();
            // A tenth of a second's worth is credited of the time before, and one is done before its wait; twice that
            // if the count was taken in the middle.
            let most = RATE as f64 * begin.elapsed().as_secs_f64() + 2.0 * (RATE / 10 + 1) as f64;
            assert!((gone as f64) <= most, "{gone} after {:?}", begin.elapsed());
            std::thread::sleep(Duration::from_millis(5));
        }
        run.join().unwrap()
    });
    assert_eq!((report.deleted_blobs, left()), (30, 0));
}

#[test]
fn a_large_content_goes_like_any_other() {
    let (_dir, store) = store();
    let large = vec![7; 3 << 20];
    publish(&store, "gone", &[("large", &large)]);
    store.forget(&name("gone")).unwrap();
    let report = collect(&store);
    assert_eq!(report.deleted_blobs, 1);
    assert!(
        report.freed_bytes > 3 << 20 && !blob_path(&store, &digest_of(&large)).exists() && staging_is_empty(&store)
    );
    publish(&store, "again", &[("large", &large)]);
    assert_eq!(check_all(&store), 1);
}

/// A file that the kernel tells us of when anybody else opens it (fcntl(2), "Leases").
struct Watched(File);

impl Watched {
    fn new(path: &Path) -> Watched {
        let file = File::options().read(true).write(true).open(path).unwrap();
        // SAFETY: plain calls on a descriptor that is open. Telling is by a signal that would end this process.
        unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(taken, 0, "{}", std::io::Error::last_os_error());
        Watched(file)
    }

    fn was_opened(&self) -> bool {
        // SAFETY: as above.
        let held = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
        held != libc::F_WRLCK
    }
}

#[test]
fn a_collection_opens_no_content_neither_what_stays_nor_what_goes() {
    let (_dir, store) = store();
    publish(&store, "kept", &[("f", b"kept"), ("g", b"kept too")]);
    forgotten(&store, 10);
    let watch = || -> Vec<Watched> {
        let shards = std::fs::read_dir(store.root().join("objects")).unwrap();
        let blobs = shards.flat_map(|shard| std::fs::read_dir(shard.unwrap().path()).unwrap());
        blobs.map(|blob| Watched::new(&blob.unwrap().path())).collect()
    };
    let watched = watch();
    assert_eq!(watched.len(), 12);
    assert!(!watched.iter().any(Watched::was_opened));
    assert_eq!(collect(&store).deleted_blobs, 10);
    assert!(!watched.iter().any(Watched::was_opened));
    drop(watched);

    // That it would be seen.
    let watched = watch();
    let path = blob_path(&store, &digest_of(b"kept"));
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    assert_eq!(opened.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(watched.iter().any(Watched::was_opened));
}

/// A removal that waits for the disk holds up nothing but the name of the same content.
#[test]
fn puts_go_on_while_a_content_is_being_removed() {
    let (_dir, store) = store();
    let (gone, size) = (digest_of(b"gone"), 4);
    // Behind the same lock.
    let neighbour = (0..)
        .map(|number: u32| number.to_string().into_bytes())
        .find(|bytes| digest_of(bytes).as_bytes()[0] == gone.as_bytes()[0])
        .unwrap();
    publish(&store, "dropped", &[("f", b"gone")]);
    store.forget(&name("dropped")).unwrap();
    assert_eq!(store.blobs().unwrap(), (1, size));

    let leaving = store.inner.leave(&gone).unwrap();
    let build = store.build().unwrap();
    assert!(build.put_bytes(&neighbour).unwrap().new);
    assert_eq!(build.find(&gone).unwrap(), None);
    assert!(build.put_bytes(b"gone").unwrap().new);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stored = scope.spawn(|| {
            let added = build.store_contents();
            ended.store(true, Ordering::Relaxed);
            added.unwrap()
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(
            !ended.load(Ordering::Relaxed),
            "it was named while the old one was leaving"
        );
        assert!(leaving.remove(size).unwrap());
        assert_eq!(stored.join().unwrap(), size + neighbour.len() as u64);
    });
    assert_eq!(std::fs::read(blob_path(&store, &gone)).unwrap(), b"gone");
    assert_eq!(store.blobs().unwrap(), (2, size + neighbour.len() as u64));

    // What a build has leased does not leave; and what was given up before its end stays.
    let build = store.build().unwrap();
    assert!(!build.put_bytes(b"gone").unwrap().new);
    assert!(store.inner.leave(&gone).is_none());
    drop(build);
    drop(store.inner.leave(&gone).unwrap());
    assert_eq!(store.build().unwrap().find(&gone).unwrap(), Some(size));
}
