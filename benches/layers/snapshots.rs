//! Capturing what was changed in a large tree.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use larder::layer::Mode;
use larder::store::tree::{Leaf, LeafKind, Tree};

use super::flat::{meta, publish_tree};
use super::goals::Goals;
use super::run::median;
use super::trees::{LARGE, Site, path_of};
use super::{MIB, samples};

const CHANGED: usize = 1_000;
const MODES: usize = 10_000;

pub fn bench(site: &Site, goals: &mut Goals) {
    let spec = site.spec(site.tree(LARGE), Mode::Overlay);
    let path = site.layers.prepare(&spec).expect("mounted").path;
    let mut taken = Vec::new();
    for sample in 0..samples() {
        for number in 0..CHANGED {
            let file = path.join(path_of(number * (LARGE / CHANGED)));
            let mut file = fs::File::options().append(true).open(file).expect("a file");
            writeln!(file, "changed {sample}").expect("written");
        }
        let start = Instant::now();
        capture(site, &spec.id, "changed");
        taken.push(start.elapsed().as_secs_f64());
    }
    site.layers.release(&spec.id, false).expect("released");
    let seconds = median(taken);
    println!("\nsnapshot of {CHANGED} changed files in {LARGE}: {seconds:.2} s");
    goals.at_most("snapshot of 1,000 changes in 1,000,000 files", seconds, 1.0, "s");
    modes(site, goals);
}

fn capture(site: &Site, id: &larder::layer::LayerId, name: &str) {
    let build = site.store.build().expect("a build");
    let tree = larder::source::snapshot(&site.layers, id, &build, &AtomicBool::new(false)).expect("a tree");
    publish_tree(build, &tree, name);
}

/// Files of 1 MB whose modes are changed: their data is neither copied nor read.
fn modes(site: &Site, goals: &mut Goals) {
    let build = site.store.build().expect("a build");
    let blob = build.put_bytes(&vec![7; 1_000_000]).expect("stored");
    let mut tree = Tree::new(meta(0o755));
    for file in 0..MODES {
        let leaf = Leaf {
            meta: meta(0o644),
            kind: LeafKind::File {
                digest: blob.digest,
                size: blob.size,
            },
        };
        tree.add_leaf(Tree::ROOT, format!("file-{file:05}").as_bytes(), leaf)
            .expect("a file");
    }
    let tree = publish_tree(build, &tree.finish().expect("a tree"), "modes");
    let spec = site.spec(tree, Mode::Overlay);
    let path = site.layers.prepare(&spec).expect("mounted").path;
    for file in 0..MODES {
        let file = path.join(format!("file-{file:05}"));
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).expect("changed");
    }
    let (before, start) = (bytes_read(), Instant::now());
    capture(site, &spec.id, "modes-changed");
    let read = bytes_read() - before;
    println!(
        "snapshot after chmod of {MODES} files of 1 MB: {:.2} s, {:.1} MiB read",
        start.elapsed().as_secs_f64(),
        read as f64 / MIB
    );
    // Manifests and folders are; of the 10 GB of data a hundredth would show.
    goals.at_most(
        "snapshot after chmod of 10,000 files of 1 MB: read",
        read as f64 / MIB,
        20.0,
        "MiB",
    );
    site.layers.release(&spec.id, false).expect("released");
}

/// What this process has read by system calls so far, from wherever.
fn bytes_read() -> u64 {
    let text = fs::read_to_string("/proc/self/io").expect("counts");
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.expect("a count").parse().expect("a number")
}
