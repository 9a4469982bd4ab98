//! SIGKILL at any moment of a layer's life.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use rand::Rng;

use super::support::by_patience;
use super::*;

/// What the process that is killed works on: the store's root, the layer's id, the tree, the mode.
const WORK: &str = "LARDER_TEST_KILLED";

#[test]
#[ignore = "the process that a_kill_at_any_moment_leaves_nothing_that_is_not_finished kills; does nothing by itself"]
fn prepares_and_releases_until_it_is_killed() {
    let Ok(work) = std::env::var(WORK) else { return };
    let work: Vec<_> = work.split('\n').collect();
    let (store, layers) = open(Path::new(work[0]));
    let spec = LayerSpec {
        id: work[1].parse().unwrap(),
        owner: LayerOwner::object("ns", "layer"),
        tree: work[2].parse().unwrap(),
        mode: if work[3] == "Overlay" {
            Mode::Overlay
        } else {
            Mode::Tmpfs
        },
        size: Some(SIZE),
        ids: None,
    };
    println!("at work");
    loop {
        let path = layers.prepare(&spec).unwrap().path;
        fs::write(path.join("mine"), "mine").unwrap();
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
    for round in 0..by_patience(40, 1000) {
        let spec = site.spec(MODES[round % 2]);
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
            .env(
                WORK,
                format!("{}\n{}\n{tree}\n{:?}", root.display(), spec.id, spec.mode),
            )
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
        let context = format!("round {round}, {:?}, killed after {delay:?}", spec.mode);
        let (records, problems) = site.layers.list().unwrap();
        assert!(problems.is_empty(), "{context}: {problems:?}");
        let staged = fs::read_dir(site.root.join("staging")).map_or(0, Iterator::count);
        assert_eq!(staged, 0, "{context}");
        let mounted = site.dir.mounts().len();
        *seen
            .entry((records.first().map(|record| format!("{:?}", record.stage)), mounted))
            .or_default() += 1;
        match site.layers.prepare(&spec) {
            Ok(prepared) => {
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
                assert_eq!(site.dir.mounts().len(), 2 + site.shared(), "{context}");
            }
            Err(error) => assert!(matches!(error, Error::Releasing { .. }), "{context}: {error}"),
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
    println!("(stage on disk, mounts) after the kills: {seen:?}");
    assert!(seen.len() > 3, "the kills hit too few states to say anything: {seen:?}");
}
