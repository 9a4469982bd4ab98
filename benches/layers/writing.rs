//! What writing into a layer costs a tool, as ratios to the same work in a plain folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use larder::layer::{LayerSpec, Mode};
use larder::store::TreeDigest;

use super::disk::sh;
use super::mounting::mkdir;
use super::run::median;
use super::trees::{MIDDLE, Site, path_of};

const FILES: usize = 30_000;
/// Each is seconds of work.
const ROUNDS: usize = 5;

pub fn bench(site: &Site) {
    println!("\n| work | layer, s | plain, s | ratio |\n| --- | ---: | ---: | ---: |");
    unpack(site);
    checkout(site);
    hard_links(site);
}

/// Prepares both places anew for each round, runs the work in both, and prints the medians.
fn compare(site: &Site, name: &str, tree: TreeDigest, plain_of: &Path, work: &dyn Fn(&Path)) {
    let (mut layered, mut plain) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for turn in 0..2 {
            if (round + turn) % 2 == 0 {
                let spec = LayerSpec {
                    size: Some(4 << 30),
                    ..site.spec(tree, Mode::Overlay)
                };
                let path = site.layers.prepare(&spec).expect("mounted").path;
                layered.push(time(site, work, &path));
                site.layers.release(&spec.id, false).expect("released");
            } else {
                let path = site.root.join("plain-work");
                sh(Command::new("cp").arg("-a").arg(plain_of).arg(&path));
                plain.push(time(site, work, &path));
                fs::remove_dir_all(&path).expect("removed");
            }
        }
    }
    let (layered, plain) = (median(layered), median(plain));
    println!("| {name} | {layered:.2} | {plain:.2} | {:.2} |", layered / plain);
}

fn time(site: &Site, work: &dyn Fn(&Path), path: &Path) -> f64 {
    sh(Command::new("sync").arg("-f").arg(&site.root));
    let start = Instant::now();
    work(path);
    sh(Command::new("sync").arg("-f").arg(path));
    start.elapsed().as_secs_f64()
}

fn exported(site: &Site, files: usize) -> PathBuf {
    let out = mkdir(&site.root.join(format!("plain-{files}")));
    let tree = site.store.load(&site.tree(files)).expect("a tree");
    site.store.export(&tree, &out, None).expect("exported");
    out
}

fn unpack(site: &Site) {
    let archive = site.root.join("archive.tar");
    let from = exported(site, MIDDLE);
    let list = site.root.join("list");
    let names: String = (0..FILES).map(|file| path_of(file) + "\n").collect();
    fs::write(&list, names).expect("written");
    sh(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(&from)
        .arg("-T")
        .arg(&list));
    fs::remove_dir_all(&from).expect("removed");
    let small = exported(site, super::trees::SMALL);
    let tree = site.tree(super::trees::SMALL);
    compare(site, "unpacking 30,000 small files", tree, &small, &|path| {
        let to = mkdir(&path.join("new"));
        sh(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&to));
    });
    for path in [archive, list] {
        fs::remove_file(path).expect("removed");
    }
    fs::remove_dir_all(&small).expect("removed");
}

/// Two revisions that differ in a third of 30,000 files.
fn checkout(site: &Site) {
    let work = mkdir(&site.root.join("git"));
    let git = |folder: &Path, args: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(folder);
        command.args([
            "-c",
            "user.name=bench",
            "-c",
            "user.email=bench@localhost",
            "-c",
            "gc.auto=0",
        ]);
        sh(command.args(["-c", "safe.directory=*"]).args(args));
    };
    git(&work, &["init", "-q"]);
    for revision in ["one", "two"] {
        for file in (0..FILES).filter(|file| revision == "one" || file % 3 == 0) {
            let path = work.join(path_of(file));
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(&path, format!("{revision} {file}\n").repeat(100)).expect("written");
        }
        git(&work, &["add", "."]);
        git(&work, &["commit", "-q", "-m", revision]);
        git(&work, &["tag", revision]);
    }
    let folder = larder::source::SourceDir::of(&site.store, fs::File::open(&work).expect("a folder").into(), &work)
        .expect("a source");
    let build = site.store.build().expect("a build");
    let scanned = larder::source::scan(
        &folder,
        &larder::source::ScanOptions::default(),
        &build,
        &std::sync::atomic::AtomicBool::new(false),
    );
    let tree = super::flat::publish_tree(build, &scanned.expect("a tree"), "git");
    compare(
        site,
        "git checkout of a revision that differs in 10,000 files",
        tree,
        &work,
        &|path| {
            git(path, &["checkout", "-q", "one"]);
        },
    );
    fs::remove_dir_all(&work).expect("removed");
}

/// As a package manager installs from a cache: the cache is in the tree.
fn hard_links(site: &Site) {
    let plain = exported(site, MIDDLE);
    let tree = site.tree(MIDDLE);
    let install = |how: &'static str| {
        move |path: &Path| {
            let to = mkdir(&path.join("install"));
            for folder in 0..FILES / 100 {
                let from = path.join(format!("folder-{folder:05}"));
                sh(Command::new("cp").arg(how).arg("-r").arg(from).arg(&to));
            }
        }
    };
    compare(
        site,
        "an install that hard-links 30,000 files",
        tree,
        &plain,
        &install("-l"),
    );
    compare(site, "the same by symlinks", tree, &plain, &install("-s"));
    compare(site, "the same by copies", tree, &plain, &install("--reflink=auto"));
    fs::remove_dir_all(&plain).expect("removed");
}
