//! The store against what people would use instead, and against what the disk can do: on fresh file systems on loop
//! devices, with what every clone of this repository has downloaded as the files to keep. Each figure is the median of
//! several rounds and ends with a sync; the files are in the page cache. README.md beside this folder has the last run.
//!
//! `ROUNDS=1` is a quick look, `FILESYSTEMS=ext4` one of the two.

mod corpus;
#[path = "../support/disk.rs"]
mod disk;
#[path = "../support/goals.rs"]
mod goals;
mod large;
mod many;
#[path = "../support/run.rs"]
mod run;
mod tools;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use disk::Disk;
use goals::Goals;
use run::{Taken, median, run};
use tools::{LARDER, TOOLS};

/// Files that are changed between two builds.
const CHANGED: usize = 100;
const MIB: f64 = 1024.0 * 1024.0;

fn main() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the store's bench mounts file systems, so it needs root"
    );
    disk::private_mounts();
    let dir = disk::work_dir("store");
    let mut goals = Goals::new("store");
    let wanted = std::env::var("FILESYSTEMS").unwrap_or_else(|_| "ext4 xfs".to_owned());
    for kind in wanted.split_whitespace() {
        let disk = Disk::new(&dir, kind);
        corpus(&disk, kind, &mut goals);
        large::bench(&disk, kind, &mut goals);
        if kind == "ext4" {
            many::small_files(&disk, &mut goals);
            many::references(&disk, &mut goals);
        }
    }
    fs::remove_dir_all(&dir).expect("removed");
    goals.finish();
}

pub fn rounds() -> usize {
    let rounds = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok());
    rounds.unwrap_or(5)
}

/// What was measured, by what was done and who did it.
#[derive(Default)]
struct Figures(BTreeMap<(usize, String), Vec<Taken>>);

/// In the order of the table.
const WORK: &[&str] = &["floors", "first build", "rebuild", "rebuild, 100 changed", "export"];

impl Figures {
    fn add(&mut self, work: &str, who: &str, taken: Taken) {
        let work = WORK.iter().position(|known| *known == work).expect("known work");
        self.0.entry((work, who.to_owned())).or_default().push(taken);
    }

    fn seconds(&self, work: &str, who: &str) -> f64 {
        let work = WORK.iter().position(|known| *known == work).expect("known work");
        let taken = &self.0[&(work, who.to_owned())];
        median(taken.iter().map(|taken| taken.seconds).collect())
    }

    /// The best median of a peer.
    fn fastest_peer(&self, work: &str) -> f64 {
        let peers = TOOLS.iter().filter(|tool| tool.is_peer);
        peers
            .map(|peer| self.seconds(work, peer.name))
            .fold(f64::INFINITY, f64::min)
    }

    fn peak(&self, who: &str) -> f64 {
        let all = self.0.iter().filter(|((_, name), _)| name == who);
        let peaks = all.flat_map(|(_, taken)| taken.iter().map(|taken| taken.peak));
        peaks.max().unwrap_or(0) as f64 / MIB
    }

    fn print(&self, title: &str) {
        println!("\n{title}\n");
        println!("| work | by | seconds | to `cp -a` | peak MiB |");
        println!("| --- | --- | ---: | ---: | ---: |");
        let copy = self.seconds("floors", "cp -a");
        for ((work, who), taken) in &self.0 {
            let seconds = median(taken.iter().map(|taken| taken.seconds).collect());
            let peak = taken.iter().map(|taken| taken.peak).max().unwrap_or(0) as f64 / MIB;
            let ratio = seconds / copy;
            println!("| {} | {who} | {seconds:.3} | {ratio:.2} | {peak:.0} |", WORK[*work]);
        }
    }
}

fn corpus(disk: &Disk, kind: &str, goals: &mut Goals) {
    let root = &disk.root;
    let folder = root.join("corpus");
    let (files, bytes) = corpus::copy(&folder);
    read_all(root, &folder);
    let changing = some_files(&folder, CHANGED);
    let mut figures = Figures::default();
    for round in 0..rounds() {
        let place = |tool: &str| root.join(format!("store-{tool}"));
        // Each begins a round once.
        let order = (0..TOOLS.len()).map(|at| &TOOLS[(round + at) % TOOLS.len()]);
        figures.add("floors", "stat-only walk", run(&mut tools::walk(&folder), root));
        figures.add("floors", "sha256sum, 2 processes", run(&mut tools::hash(&folder), root));
        let copy = root.join("copy");
        figures.add("floors", "cp -a", run(&mut tools::copy(&folder, &copy), root));
        remove(root, &copy);
        for tool in order {
            let store = place(tool.name);
            tool.init(&store);
            settle(root);
            figures.add("first build", tool.name, run(&mut tool.keep(&store, &folder), root));
            figures.add("rebuild", tool.name, run(&mut tool.keep(&store, &folder), root));
        }
        for path in &changing {
            let mut file = fs::File::options().append(true).open(path).expect("a file");
            writeln!(file, "round {round}").expect("written");
        }
        settle(root);
        for tool in TOOLS {
            let store = place(tool.name);
            let work = "rebuild, 100 changed";
            figures.add(work, tool.name, run(&mut tool.keep(&store, &folder), root));
        }
        export(&mut figures, root, &folder, &place(LARDER.name), round);
        for tool in TOOLS {
            remove(root, &place(tool.name));
        }
    }
    let size = bytes as f64 / MIB;
    figures.print(&format!("{kind}: {files} files, {size:.0} MiB, {} rounds", rounds()));

    let copy = figures.seconds("floors", "cp -a");
    let first = figures.seconds("first build", LARDER.name);
    let rebuild = figures.seconds("rebuild", LARDER.name);
    let walk = figures.seconds("floors", "stat-only walk");
    let peer = if kind == "ext4" { 1.0 } else { 0.8 };
    let mut goal = |name: &str, figure: f64, limit: f64| goals.at_most(format!("{kind}: {name}"), figure, limit, "×");
    goal(
        "first build to the fastest peer",
        first / figures.fastest_peer("first build"),
        peer,
    );
    if kind == "ext4" {
        goal("first build to cp -a and sync", first / copy, 1.25);
    }
    goal(
        "rebuild to the fastest peer",
        rebuild / figures.fastest_peer("rebuild"),
        0.15,
    );
    goal("rebuild to a stat-only walk", rebuild / walk, 3.0);
    let changed = figures.seconds("rebuild, 100 changed", LARDER.name);
    goal("rebuild after 100 changes to a rebuild", changed / rebuild, 1.5);
    let plain = figures.seconds("export", "cp -a");
    goal("export to cp -a", figures.seconds("export", LARDER.name) / plain, 1.2);
    goals.at_most(format!("{kind}: peak memory"), figures.peak(LARDER.name), 150.0, "MiB");
    remove(root, &folder);
}

/// Writes the tree as files, beside a plain copy of the folder: at the same time, and with both sources in the page cache.
fn export(figures: &mut Figures, root: &Path, folder: &Path, store: &Path, round: usize) {
    read_all(root, folder);
    read_all(root, &store.join("objects"));
    let out = root.join("out");
    for turn in 0..2 {
        settle(root);
        // Each begins a round.
        if (round + turn).is_multiple_of(2) {
            figures.add("export", "cp -a", run(&mut tools::copy(folder, &out), root));
        } else {
            let mut export = tools::larder(store, &["export", "local/corpus"]);
            figures.add("export", LARDER.name, run(export.arg(&out), root));
            if round == 0 {
                disk::sh(
                    Command::new("diff")
                        .args(["-r", "--no-dereference"])
                        .arg(folder)
                        .arg(&out),
                );
            }
        }
        remove(root, &out);
    }
}

/// Files spread over a folder: always the same ones.
fn some_files(folder: &Path, count: usize) -> Vec<PathBuf> {
    let listed = Command::new("find")
        .arg(folder)
        .args(["-type", "f", "-print0"])
        .output()
        .expect("listed");
    let mut all: Vec<PathBuf> = listed
        .stdout
        .split(|byte| *byte == 0)
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
        .collect();
    all.sort();
    let step = all.len() / count;
    all.into_iter().step_by(step).take(count).collect()
}

/// Brings a folder into the page cache.
pub fn read_all(root: &Path, folder: &Path) {
    settle(root);
    disk::sh(
        Command::new("sh")
            .args(["-c", "tar -cf - \"$0\" | cat >/dev/null"])
            .arg(folder),
    );
}

/// Nothing that was done before is to be paid for by what is measured; and what is a moment old when it is read must be
/// read again.
pub fn settle(root: &Path) {
    disk::sh(Command::new("sync").arg("-f").arg(root));
    std::thread::sleep(std::time::Duration::from_millis(2100));
}

pub fn remove(root: &Path, what: &Path) {
    disk::sh(Command::new("rm").arg("-rf").arg(what));
    disk::sh(Command::new("sync").arg("-f").arg(root));
}
