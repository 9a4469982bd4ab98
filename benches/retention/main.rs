//! Retention over a million contents of which nothing needs half: how long a plan takes, how fast it is carried out, and
//! what a build beside it has of that. README.md beside this folder has the last run.
//!
//! `ROUNDS=1` is a quick look: it makes rounds fewer, not the store smaller.

#[path = "../support/apart.rs"]
mod apart;
#[path = "../support/disk.rs"]
mod disk;
mod filling;
#[path = "../support/flat.rs"]
mod flat;
#[path = "../support/goals.rs"]
mod goals;
#[path = "../support/run.rs"]
mod run;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use filling::HALF;
use goals::Goals;
use larder::store::{Collecting, Held, Store};
use run::{median, run};

const MIB: f64 = 1024.0 * 1024.0;
/// Contents of a build beside a run.
const BUILD: usize = 5_000;
/// Builds beside one run, at most: they add to the store as fast as a run that gives way takes from it.
const BUILDS: usize = 20;

fn main() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the bench of retention mounts a file system, so it needs root"
    );
    if filling::fill_if_asked() {
        return;
    }
    disk::private_mounts();
    let dir = disk::work_dir("retention");
    let mut goals = Goals::new("retention");
    {
        let disk = disk::Disk::new(&dir, "ext4");
        let store = disk.root.join("store");
        apart::ask(&store);
        planning(&disk.root, &store, &mut goals);
        deleting(&disk.root, &store, &mut goals);
        beside(&disk.root, &store, &mut goals);
    }
    fs::remove_dir_all(&dir).expect("removed");
    goals.finish();
}

fn rounds() -> usize {
    let rounds = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok());
    rounds.unwrap_or(3)
}

fn collect(store: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
    command.args(["store", "gc", "--max-age", "1s", "--grace", "0s"]);
    command.args(more).arg("--store").arg(store);
    command
}

/// A plan reads the manifests and lists all contents, and asks when each that nothing names was last used.
fn planning(root: &Path, store: &Path, goals: &mut Goals) {
    settle(root);
    // Once to warm up.
    count_names(store);
    run(&mut collect(store, &["--dry-run"]), root);
    let (mut scans, mut plans, mut peak) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds() {
        let start = Instant::now();
        assert_eq!(count_names(store), 2 * HALF);
        scans.push(start.elapsed().as_secs_f64());
        let taken = run(&mut collect(store, &["--dry-run"]), root);
        plans.push(taken.seconds);
        peak = peak.max(taken.peak);
    }
    let (scan, plan) = (median(scans), median(plans));
    println!("\na plan over 1,000,000 contents: {plan:.2} s; their names alone: {scan:.2} s");
    goals.at_most("planning to a scan of the names", plan / scan, 5.0, "×");
    goals.at_most("planning, peak memory", peak as f64 / MIB, 300.0, "MiB");
}

/// Lists all contents, and keeps nothing of them.
fn count_names(store: &Path) -> usize {
    let shards = fs::read_dir(store.join("objects")).expect("objects");
    shards
        .map(|shard| fs::read_dir(shard.expect("a shard").path()).expect("a shard").count())
        .sum()
}

/// The paths of all contents.
fn names(store: &Path) -> Vec<PathBuf> {
    let shards = fs::read_dir(store.join("objects")).expect("objects");
    shards
        .flat_map(|shard| fs::read_dir(shard.expect("a shard").path()).expect("a shard"))
        .map(|blob| blob.expect("a blob").path())
        .collect()
}

fn deleting(root: &Path, store: &Path, goals: &mut Goals) {
    let list = root.join("list");
    let (mut ours, mut theirs, mut plans) = (Vec::new(), Vec::new(), Vec::new());
    let mut garbage: Vec<PathBuf> = Vec::new();
    for round in 0..rounds() {
        settle(root);
        plans.push(run(&mut collect(store, &["--dry-run"]), root).seconds);
        let before = if garbage.is_empty() { names(store) } else { Vec::new() };
        ours.push(run(&mut collect(store, &[]), root).seconds);
        if round == 0 {
            let left: HashSet<PathBuf> = names(store).into_iter().collect();
            garbage = before.into_iter().filter(|path| !left.contains(path)).collect();
            assert_eq!((left.len(), garbage.len()), (HALF, HALF));
            let mut file = std::io::BufWriter::new(fs::File::create(&list).expect("a list"));
            for path in &garbage {
                write!(file, "{}\0", path.display()).expect("written");
            }
            file.flush().expect("written");
        }
        apart::ask(store);
        settle(root);
        // As warm as larder had it.
        assert_eq!(names(store).len(), 2 * HALF);
        run(&mut collect(store, &["--dry-run"]), root);
        let mut rm = Command::new("xargs");
        rm.args(["-0", "-a"]).arg(&list).args(["rm", "-f"]);
        theirs.push(run(&mut rm, root).seconds);
        assert_eq!(names(store).len(), HALF);
        apart::ask(store);
    }
    let (ours, theirs, plan) = (median(ours), median(theirs), median(plans));
    println!(
        "{HALF} contents deleted: {ours:.2} s with a plan of {plan:.2} s, so {:.0} in a second; by rm {theirs:.2} s, {:.0} in a second",
        HALF as f64 / (ours - plan),
        HALF as f64 / theirs
    );
    goals.at_most(
        "deleting to rm, without the plan",
        (ours - plan) / theirs,
        1.0 / 0.9,
        "×",
    );
    println!("deleting to rm, with the plan: {:.2} ×", ours / theirs);
}

/// What goes on in the process that collects, as in an agent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Builds,
    /// Of what is there: they look for it, and note that it is used.
    Puts,
    /// Then whatever is locked is locked by the run.
    Nothing,
}

fn beside(root: &Path, store: &Path, goals: &mut Goals) {
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    let (mut put_alone, mut put_together) = (Duration::ZERO, Duration::ZERO);
    let (mut locked, mut locked_by_all) = (Duration::ZERO, Duration::ZERO);
    let kinds = [Beside::Builds, Beside::Puts, Beside::Nothing];
    for (round, kind) in kinds.into_iter().cycle().take(rounds().max(kinds.len())).enumerate() {
        let opened = filling::open(store);
        let build = |name: &str| {
            let start = Instant::now();
            let build = opened.build().expect("a build");
            let tree = filling::tree_of(&build, name, BUILD);
            flat::publish_tree(build, &tree, "beside");
            start.elapsed().as_secs_f64()
        };
        let put = |until: &dyn Fn() -> bool| {
            let build = opened.build().expect("a build");
            let mut longest = Duration::ZERO;
            for number in 0.. {
                if until() {
                    break;
                }
                let content = filling::content("kept", number % HALF);
                let start = Instant::now();
                build.put_bytes(&content).expect("stored");
                longest = longest.max(start.elapsed());
            }
            longest
        };
        // From here on it is known.
        opened.blobs().expect("counted");
        settle(root);
        match kind {
            Beside::Builds => alone.extend((0..10).map(|number| build(&format!("alone-{round}-{number}")))),
            Beside::Puts => {
                let start = Instant::now();
                put_alone = put_alone.max(put(&|| start.elapsed() > Duration::from_secs(5)));
            }
            Beside::Nothing => {}
        }

        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let how = Collecting {
                    dry_run: false,
                    now: SystemTime::now(),
                    rate: None,
                    cancel: &AtomicBool::new(false),
                };
                let collected = opened.collect_with(&filling::all(), &Held::default(), &how);
                ended.store(true, Ordering::Relaxed);
                let (report, _) = collected.expect("collected");
                assert!(report.deleted_blobs >= HALF as u64, "{}", report.deleted_blobs);
            });
            let longest = scope.spawn(|| longest_lock(&opened, &ended));
            match kind {
                Beside::Builds => {
                    for number in 0..BUILDS {
                        let seconds = build(&format!("together-{round}-{number}"));
                        if ended.load(Ordering::Relaxed) {
                            break;
                        }
                        together.push(seconds);
                    }
                }
                Beside::Puts => put_together = put_together.max(put(&|| ended.load(Ordering::Relaxed))),
                Beside::Nothing => {}
            }
            let longest = longest.join().expect("no panic");
            match kind {
                Beside::Nothing => locked = locked.max(longest),
                _ => locked_by_all = locked_by_all.max(longest),
            }
        });
        drop(opened);
        apart::ask(store);
    }
    let builds = together.len();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let (alone, together) = (median(alone), median(together));
    println!("a build of {BUILD} small files: {alone:.3} s alone, {together:.3} s beside a run (of {builds})");
    println!(
        "longest put of what is there: {:.1} ms alone, {:.1} ms beside a run",
        ms(put_alone),
        ms(put_together)
    );
    println!(
        "longest that the locks of a put were taken: {:.1} ms by the run, {:.1} ms by it and by builds",
        ms(locked),
        ms(locked_by_all)
    );
    goals.at_most("a build beside a run to one alone", together / alone, 1.5, "×");
    goals.at_most("longest a run holds what a build waits for", ms(locked), 50.0, "ms");
}

/// Longest time for which a lock that a put takes was not to be had. What is counted already takes all of these, one
/// after the other, and nothing besides: the file system is not asked.
fn longest_lock(store: &Store, ended: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !ended.load(Ordering::Relaxed) {
        let start = Instant::now();
        store.blobs().expect("counted");
        longest = longest.max(start.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    longest
}

/// Nothing that was done before is to be paid for by what is measured; and what is a moment old is fresh.
fn settle(root: &Path) {
    disk::sh(Command::new("sync").arg("-f").arg(root));
    std::thread::sleep(Duration::from_millis(2100));
}
