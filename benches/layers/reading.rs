//! Reading through a mount, against the same tree as plain files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use larder::layer::Mode;

use super::goals::Goals;
use super::mounting::mkdir;
use super::run::median;
use super::samples;
use super::trees::{MIDDLE, Site};

pub fn bench(site: &Site, goals: &mut Goals) {
    let tree = site.tree(MIDDLE);
    let spec = site.spec(tree, Mode::ReadOnly);
    let layer = site.layers.prepare(&spec).expect("mounted").path;
    let plain = mkdir(&site.root.join("plain"));
    let whole = site.store.load(&tree).expect("a tree");
    site.store.export(&whole, &plain, None).expect("exported");
    // What an overlay costs whatever is below it.
    let overlay = Overlay::of(&plain, site);
    println!("\n| {MIDDLE} files, warm | layer, ms | an overlay of the plain ones, ms | plain, ms | ratio |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let work = [
        ("a stat of every file", stat_all as fn(&Path) -> u64, 3.0),
        ("reading all", read_all, 1.4),
    ];
    for (name, work, limit) in work {
        let (mut through, mut covered, mut beside) = (Vec::new(), Vec::new(), Vec::new());
        // The first of each warms the caches.
        for sample in 0..=samples() {
            for (folder, taken) in [
                (&layer, &mut through),
                (&overlay.0, &mut covered),
                (&plain, &mut beside),
            ] {
                let start = Instant::now();
                std::hint::black_box(work(folder));
                if sample > 0 {
                    taken.push(start.elapsed().as_secs_f64() * 1000.0);
                }
            }
        }
        let (through, covered, beside) = (median(through), median(covered), median(beside));
        let ratio = through / beside;
        println!("| {name} | {through:.0} | {covered:.0} | {beside:.0} | {ratio:.2} |");
        goals.at_most(format!("{name} through the mount, to plain files"), ratio, limit, "×");
    }
    site.layers.release(&spec.id, false).expect("released");
    drop(overlay);
    fs::remove_dir_all(&plain).expect("removed");
}

/// A mounted overlay of a folder and an empty one. The bench's mounts are its own, so none outlives it.
struct Overlay(PathBuf);

impl Overlay {
    fn of(folder: &Path, site: &Site) -> Overlay {
        let (empty, point) = (mkdir(&site.root.join("empty")), mkdir(&site.root.join("overlay")));
        let lower = format!("ro,lowerdir={}:{}", folder.display(), empty.display());
        let mount = Command::new("mount")
            .args(["-t", "overlay", "-o", &lower, "overlay"])
            .arg(&point)
            .status();
        assert!(
            mount.expect("mount starts").success(),
            "no overlay of {}",
            folder.display()
        );
        Overlay(point)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // What is left of it ends with the process.
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Looks at every entry; the sum keeps the work from being left out.
fn stat_all(folder: &Path) -> u64 {
    walk(folder, &|path| fs::symlink_metadata(path).expect("a status").size())
}

fn read_all(folder: &Path) -> u64 {
    walk(folder, &|path| fs::read(path).expect("a file").len() as u64)
}

fn walk(folder: &Path, visit: &dyn Fn(&Path) -> u64) -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        sum += match entry.file_type().expect("a type").is_dir() {
            true => walk(&entry.path(), visit),
            false => visit(&entry.path()),
        };
    }
    sum
}
