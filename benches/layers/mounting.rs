//! From the call to a mount that can be used.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use larder::layer::Mode;

use super::disk::sh;
use super::goals::Goals;
use super::run::{median, run};
use super::trees::{LARGE, MIDDLE, SMALL, Site, path_of};
use super::{MIB, samples};

/// Writes the largest tree's image, in a process of its own that then mounts it: on a copy of the store, for the bench has
/// the other one open.
pub fn image(site: &Site, goals: &mut Goals) {
    let copy = site.root.join("copy");
    sh(Command::new("cp").arg("-a").arg(site.store.root()).arg(&copy));
    let larder = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
        command.arg("store").arg("--store").arg(&copy).args(args);
        command
    };
    let (mut seconds, mut peak) = (Vec::new(), 0);
    let mut bytes = 0;
    for _ in 0..samples() {
        sh(Command::new("sync").arg("-f").arg(&site.root));
        let name = format!("local/files-{LARGE}");
        let taken = run(
            &mut larder(&["mount", &name, "--mode", "read-only", "--name", "image"]),
            &site.root,
        );
        seconds.push(taken.seconds);
        peak = peak.max(taken.peak);
        sh(&mut larder(&["umount", "image"]));
        for image in fs::read_dir(copy.join("images")).expect("images") {
            let image = image.expect("an image").path();
            bytes = image.metadata().expect("a status").len();
            fs::remove_file(image).expect("removed");
        }
    }
    let seconds = median(seconds);
    let size = bytes as f64 / MIB;
    println!("\nimage of {LARGE} files, with the mount and a sync: {seconds:.2} s, {size:.0} MiB on disk");
    goals.at_most("image of 1,000,000 files", seconds, 1.5, "s");
    goals.at_most("image of 1,000,000 files, peak memory", peak as f64 / MIB, 200.0, "MiB");
    fs::remove_dir_all(&copy).expect("removed");
}

pub fn mounts(site: &Site, goals: &mut Goals) {
    println!("\n| tree | mode | ms, median | ms, most |\n| ---: | --- | ---: | ---: |");
    let mut medians = Vec::new();
    for (files, tree) in &site.trees {
        for mode in [Mode::ReadOnly, Mode::Tmpfs, Mode::Overlay] {
            let once = || {
                let spec = site.spec(*tree, mode);
                let start = Instant::now();
                let path = site.layers.prepare(&spec).expect("mounted").path;
                fs::read(path.join(path_of(files / 2))).expect("a file");
                let took = start.elapsed();
                site.layers.release(&spec.id, false).expect("released");
                // The next one is to mount the image too.
                site.layers.unmount_unused(Duration::ZERO).expect("unmounted");
                took.as_secs_f64() * 1000.0
            };
            once();
            let taken: Vec<f64> = (0..samples()).map(|_| once()).collect();
            let most = taken.iter().copied().fold(0.0, f64::max);
            let typical = median(taken);
            println!("| {files} | {mode:?} | {typical:.2} | {most:.2} |");
            medians.push((*files, mode, typical));
        }
    }
    let of = |files: usize, mode: Mode| {
        let found = medians.iter().find(|(f, m, _)| (*f, *m) == (files, mode));
        found.expect("measured").2
    };
    for (mode, limit) in [(Mode::ReadOnly, 5.0), (Mode::Tmpfs, 5.0), (Mode::Overlay, 100.0)] {
        let worst = site.trees.iter().map(|(files, _)| of(*files, mode)).fold(0.0, f64::max);
        goals.at_most(format!("{mode:?}: from call to usable mount"), worst, limit, "ms");
        let ratio = of(LARGE, mode) / of(SMALL, mode);
        goals.at_most(format!("{mode:?}: 1,000,000 files to 1,000"), ratio, 10.0, "×");
    }
    peers(site);
}

/// What people do instead, once each.
fn peers(site: &Site) {
    println!("\n| tree | by | ms |\n| ---: | --- | ---: |");
    for files in [SMALL, MIDDLE] {
        let (plain, out, repo) = (site.root.join("plain"), site.root.join("out"), site.root.join("repo"));
        site.store
            .export(
                &site.store.load(&site.tree(files)).expect("a tree"),
                &mkdir(&plain),
                None,
            )
            .expect("exported");
        let ostree = |args: &[&str]| {
            let mut command = Command::new("ostree");
            command.arg(format!("--repo={}", repo.display())).args(args);
            command
        };
        fs::create_dir(&repo).expect("a folder");
        sh(&mut ostree(&["init", "--mode=bare"]));
        sh(ostree(&["commit", "--branch=tree"]).arg(format!("--tree=dir={}", plain.display())));
        let copy = |option: &str| {
            let mut command = Command::new("cp");
            command.args(["-a", option]).arg(&plain).arg(&out);
            command
        };
        let mut checkout = ostree(&["checkout", "-H", "tree"]);
        checkout.arg(&out);
        for (name, mut command) in [
            ("ostree checkout -H", checkout),
            ("cp -a --reflink=auto", copy("--reflink=auto")),
            ("hard links (cp -al)", copy("-l")),
        ] {
            let mut taken = Vec::new();
            for _ in 0..3 {
                sh(Command::new("sync").arg("-f").arg(&site.root));
                let start = Instant::now();
                sh(&mut command);
                taken.push(start.elapsed().as_secs_f64() * 1000.0);
                fs::remove_dir_all(&out).expect("removed");
            }
            println!("| {files} | {name} | {:.0} |", median(taken));
        }
        for folder in [&plain, &repo] {
            fs::remove_dir_all(folder).expect("removed");
        }
    }
}

pub fn mkdir(path: &Path) -> std::path::PathBuf {
    fs::create_dir(path).expect("a folder");
    path.to_owned()
}
