//! SIGKILL at any moment of a layer's life.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use rand::Rng;

use super::support::by_patience;
use super::*;

/// What the process that is killed works on: the store's root, the layer's id, the tree, the kind.
const WORK: &str = "LARDER_TEST_KILLED";

/// What it says while the layer has something to lose.
const WRITTEN: &str = "written";

/// Mode and limit.
const KINDS: [(Mode, Option<u64>); 4] = [
    (Mode::Overlay, Some(SIZE)),
    (Mode::Tmpfs, Some(SIZE)),
    (Mode::ReadOnly, None),
    (Mode::Overlay, None),
];

#[test]
#[ignore = "the process that a_kill_at_any_moment_leaves_nothing_that_is_not_finished kills; does nothing by itself"]
fn prepares_and_releases_until_it_is_killed() {
    let Ok(work) = std::env::var(WORK) else { return };
    let work: Vec<_> = work.split('\n').collect();
    let (store, layers) = open(Path::new(work[0]));
    let (mode, size) = KINDS[work[3].parse::<usize>().unwrap()];
    let spec = LayerSpec {
        id: work[1].parse().unwrap(),
        owner: LayerOwner::object("ns", "layer"),
        tree: work[2].parse().unwrap(),
        mode,
        size,
        ids: None,
    };
    println!("at work");
    loop {
        let path = layers.prepare(&spec).unwrap().path;
        if mode != Mode::ReadOnly {
            fs::write(path.join("mine"), "mine").unwrap();
            println!("{WRITTEN}");
        }
        match mode {
            Mode::ReadOnly => {}
            Mode::Tmpfs => {
                layers.grow(&spec.id, 2 * SIZE).unwrap();
            }
            Mode::Overlay => {
                layers.unmount(&spec.id).unwrap();
                layers.prepare(&spec).unwrap();
                assert_eq!(fs::read_to_string(path.join("mine")).unwrap(), "mine");
            }
        }
        println!("gone from here on");
        layers.release(&spec.id, false).unwrap();
        // So that the making of what layers share is interrupted too.
        layers.unmount_unused(Duration::ZERO).unwrap();
        let scratch = store.scratch().unwrap();
        for copy in fs::read_dir(store.images_dir()).unwrap() {
            let copy = copy.unwrap();
            fs::rename(copy.path(), scratch.path().join(copy.file_name())).unwrap();
        }
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_kill_at_any_moment_leaves_nothing_that_is_not_finished() {
    let mut site = Site::new();
    let mut seen = std::collections::BTreeMap::<_, u32>::new();
    let mut written = 0;
    for round in 0..by_patience(400, 1000) {
        // On a machine that is slow just now, kills hit one state more often.
        if round >= by_patience(40, 1000) && seen.len() > 3 && written > 0 {
            break;
        }
        let kind = round % KINDS.len();
        let (mode, size) = KINDS[kind];
        let spec = LayerSpec {
            size,
            ..site.spec(mode)
        };
        let Site {
            store,
            layers,
            tree,
            dir,
            root,
            turn,
        } = site;
        drop((store, layers));
        let name = "kills::prepares_and_releases_until_it_is_killed";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env(WORK, format!("{}\n{}\n{tree}\n{kind}", root.display(), spec.id))
            .stdout(Stdio::piped())
            .spawn()
            .map(Killed)
            .unwrap();
        let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().ends_with("at work")),
            "it ended by itself"
        );
        let delay = Duration::from_micros(rand::rng().random_range(0..150_000));
        std::thread::sleep(delay);
        assert_eq!(child.0.try_wait().unwrap(), None, "it ended by itself");
        drop(child);
        let said = lines.map_while(Result::ok).last();
        let is_written = said.as_deref() == Some(WRITTEN);
        written += u32::from(is_written);

        // A program that it was starting has its lock until the exec.
        let start = Instant::now();
        while matches!(
            Store::open(&root, store::Options::default()),
            Err(store::Error::Locked { .. })
        ) {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "the dead process has the lock"
            );
        }
        let (store, layers) = open(&root);
        site = Site {
            store,
            layers,
            tree,
            dir,
            root,
            turn,
        };
        let context = format!("round {round}, {mode:?} {size:?}, killed after {delay:?}");
        let (records, problems) = site.layers.list().unwrap();
        assert!(problems.is_empty(), "{context}: {problems:?}");
        let staged = fs::read_dir(site.root.join("staging")).map_or(0, Iterator::count);
        assert_eq!(staged, 0, "{context}");
        let mounted = site.dir.mounts().len();
        *seen
            .entry((records.first().map(|record| format!("{:?}", record.stage)), mounted))
            .or_default() += 1;
        let start = Instant::now();
        let prepared = loop {
            match site.layers.prepare(&spec) {
                // A check that it had begun goes on, and has the disk until it ends.
                Err(Error::InUse { by, .. }) if by.contains("locked") && start.elapsed() < Duration::from_secs(60) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => break other,
            }
        };
        match prepared {
            Ok(prepared) => {
                let mine = fs::read_to_string(prepared.path.join("mine"));
                assert!(
                    !is_written || prepared.lost.is_none() && mine.is_ok_and(|mine| mine == "mine"),
                    "{context}: what was written is gone"
                );
                assert_eq!(
                    fs::read_to_string(prepared.path.join("file")).unwrap(),
                    "below",
                    "{context}"
                );
                assert_eq!(
                    fs::read_to_string(prepared.path.join("folder/other")).unwrap(),
                    "other",
                    "{context}"
                );
                // A layer whose tmpfs was unmounted by the killed release is told to have lost its data; a disk
                // brings it back.
                assert!(prepared.lost.is_none() || spec.mode == Mode::Tmpfs, "{context}");
                // The layer, its file system or, of one that is only read, what all of a tree share; and the image.
                let own = if spec.mode == Mode::Overlay && spec.size.is_none() {
                    1
                } else {
                    2
                };
                assert_eq!(site.dir.mounts().len(), own + site.shared(), "{context}");
            }
            Err(error) => assert!(
                !is_written && matches!(error, Error::Releasing { .. }),
                "{context}: {error}"
            ),
        }
        site.layers
            .release(&spec.id, false)
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        let start = Instant::now();
        // A loop device goes when its last user is gone, and a killed mkfs may take a moment.
        while !site.dir.loop_devices().is_empty() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        site.nothing_is_left();
    }
    println!("(stage on disk, mounts) after the kills: {seen:?}; {written} of them with something written");
    assert!(written > 0, "no kill hit a layer with something written");
    assert!(seen.len() > 3, "the kills hit too few states to say anything: {seen:?}");
}
