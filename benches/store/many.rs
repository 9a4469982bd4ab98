//! Very many files, and very many references.

use std::fs;
use std::path::Path;

use super::disk::{Disk, sh};
use super::goals::Goals;
use super::run::run;
use super::tools::{self, LARDER};
use super::{MIB, remove, settle};

const FOLDERS: usize = 1000;
const FILES: usize = 1000;
const MANIFESTS: usize = 100;

/// A tree of 1,000,000 files, each with bytes of its own.
pub fn small_files(disk: &Disk, goals: &mut Goals) {
    let root = &disk.root;
    let (folder, store) = (root.join("many"), root.join("store"));
    fs::create_dir(&folder).expect("a folder");
    for number in 0..FOLDERS {
        fill(&folder.join(format!("folder-{number:03}")), FILES, |file| {
            format!("content {number} {file}")
        });
    }
    LARDER.init(&store);
    settle(root);
    let first = run(&mut LARDER.keep(&store, &folder), root);
    let again = run(&mut LARDER.keep(&store, &folder), root);
    remove(root, &store);
    remove(root, &folder);
    println!(
        "\n1,000,000 files: first build {:.1} s, {:.0} MiB; rebuild {:.1} s, {:.0} MiB",
        first.seconds,
        first.peak as f64 / MIB,
        again.seconds,
        again.peak as f64 / MIB
    );
    let peak = first.peak.max(again.peak) as f64 / MIB;
    // 400 MB.
    goals.at_most("peak memory with 1,000,000 files", peak, 400e6 / MIB, "MiB");
}

/// 100 trees with 10,000 references each; every tree shares nine files of ten with the one before.
pub fn references(disk: &Disk, goals: &mut Goals) {
    let root = &disk.root;
    let (folder, store) = (root.join("tree"), root.join("store"));
    LARDER.init(&store);
    fs::create_dir(&folder).expect("a folder");
    let folders = 10;
    for tree in 0..MANIFESTS {
        for number in 0..folders {
            // One folder of the ten is another one in each tree.
            if tree == 0 || tree % folders == number {
                let place = folder.join(format!("folder-{number}"));
                let _ = fs::remove_dir_all(&place);
                fill(&place, FILES, |file| format!("content {tree} {number} {file}"));
            }
        }
        let name = format!("tree-{tree}");
        sh(tools::larder(&store, &["build", "--name", &name]).arg(&folder));
    }
    remove(root, &folder);
    // Once to warm up.
    let work: [(&str, &[&str]); 2] = [("analytics", &["analytics"]), ("dry gc", &["gc", "--dry-run"])];
    for (name, args) in work {
        run(&mut tools::larder(&store, args), root);
        let taken = run(&mut tools::larder(&store, args), root);
        let peak = taken.peak as f64 / MIB;
        goals.at_most(format!("1,000,000 references: {name}"), taken.seconds, 5.0, "s");
        goals.at_most(format!("1,000,000 references: {name}, peak memory"), peak, 300.0, "MiB");
    }
    remove(root, &store);
}

fn fill(folder: &Path, files: usize, content: impl Fn(usize) -> String) {
    fs::create_dir(folder).expect("a folder");
    for file in 0..files {
        fs::write(folder.join(format!("file-{file:03}")), content(file)).expect("a file");
    }
}
