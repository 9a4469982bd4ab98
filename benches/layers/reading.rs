//! Reading through a mount, against the same tree as plain files.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use larder::layer::Mode;
use larder::store::TreeDigest;

use super::flat::{publish_tree, tree_of};
use super::goals::Goals;
use super::mounting::mkdir;
use super::run::median;
use super::samples;
use super::trees::{FOLDER, MIDDLE, Site};

/// How large the files of a root file system are: so many thousandths of them have at most so many bytes. From Debian's `/usr`
/// with compilers (130,917 files, 42 KiB in the mean): four of five have up to 8 KiB, and together 4 % of the bytes.
const SIZES: [(f64, f64); 17] = [
    (0.0, 1.0),
    (50.0, 187.0),
    (100.0, 359.0),
    (200.0, 664.0),
    (300.0, 1_006.0),
    (400.0, 1_348.0),
    (500.0, 1_903.0),
    (600.0, 2_930.0),
    (700.0, 4_788.0),
    (800.0, 9_590.0),
    (900.0, 23_309.0),
    (950.0, 51_360.0),
    (980.0, 126_033.0),
    (990.0, 255_944.0),
    (995.0, 567_296.0),
    (999.0, 5_287_018.0),
    (999.9, 57_326_248.0),
];

type Work = (&'static str, fn(&Path) -> u64);
const STAT_ALL: Work = ("a stat of every file", stat_all);
const READ_ALL: Work = ("reading all", read_all);

pub fn bench(site: &Site, goals: &mut Goals) {
    println!("\n| {MIDDLE} files, warm | MiB | layer, ms | an overlay of the plain ones, ms | plain, ms | ratio |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    let tree = root_file_system(site);
    let [stat, read] = compare(site, tree, "as of a root file system", [STAT_ALL, READ_ALL]);
    goals.at_most("a stat of every file through the mount, to plain files", stat, 3.0, "×");
    goals.at_most("reading all through the mount, to plain files", read, 1.4, "×");
    // What costs is opening, so small files cost the most.
    let [small] = compare(site, site.tree(MIDDLE), "small", [READ_ALL]);
    goals.at_most(
        "reading all small files through the mount, to plain files",
        small,
        1.4,
        "×",
    );
}

/// Does the work in a layer of the tree and beside it; gives the ratios.
fn compare<const N: usize>(site: &Site, tree: TreeDigest, sizes: &str, work: [Work; N]) -> [f64; N] {
    let spec = site.spec(tree, Mode::ReadOnly);
    let layer = site.layers.prepare(&spec).expect("mounted").path;
    let plain = mkdir(&site.root.join("plain"));
    let whole = site.store.load(&tree).expect("a tree");
    site.store.export(&whole, &plain, None).expect("exported");
    let size = whole.stats().logical as f64 / super::MIB;
    // What an overlay costs whatever is below it.
    let overlay = Overlay::of(&plain, site);
    let ratios = work.map(|(name, work)| {
        let mut taken = [&layer, &overlay.point, &plain].map(|folder| (folder, Vec::new()));
        // The first of each warms the caches.
        for sample in 0..=samples() {
            for (folder, taken) in &mut taken {
                let start = Instant::now();
                std::hint::black_box(work(folder));
                if sample > 0 {
                    taken.push(start.elapsed().as_secs_f64() * 1000.0);
                }
            }
        }
        let [through, covered, beside] = taken.map(|(_, taken)| median(taken));
        let ratio = through / beside;
        println!("| {name}, {sizes} | {size:.0} | {through:.0} | {covered:.0} | {beside:.0} | {ratio:.2} |");
        ratio
    });
    site.layers.release(&spec.id, false).expect("released");
    drop(overlay);
    fs::remove_dir_all(&plain).expect("removed");
    ratios
}

/// A tree of files that are as large as a root file system's, hardly any two with the same content.
fn root_file_system(site: &Site) -> TreeDigest {
    let build = site.store.build().expect("a build");
    let tree = tree_of(MIDDLE, FOLDER, |file| {
        let number = u32::try_from(file).expect("a number of 32 bits").to_le_bytes();
        let content: Vec<u8> = number.into_iter().cycle().take(size_of(file)).collect();
        build.put_bytes(&content).expect("stored")
    });
    publish_tree(build, &tree, "root-file-system")
}

/// Between two of the table, sizes grow by the same factor from one to the next. Neighbours are not alike.
fn size_of(file: usize) -> usize {
    let (last, _) = SIZES[SIZES.len() - 1];
    let rank = (file * 7919 % MIDDLE) as f64 / MIDDLE as f64 * last;
    let above = SIZES
        .iter()
        .position(|(share, _)| rank < *share)
        .expect("below the last");
    let ((from, small), (to, large)) = (SIZES[above - 1], SIZES[above]);
    (small * (large / small).powf((rank - from) / (to - from))) as usize
}

/// A mounted overlay of a folder and an empty one. The bench's mounts are its own, so none outlives it.
struct Overlay {
    empty: PathBuf,
    point: PathBuf,
}

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
        Overlay { empty, point }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // What is left of it ends with the process.
        let _ = Command::new("umount").arg(&self.point).status();
        for folder in [&self.point, &self.empty] {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Looks at every entry; the sum keeps the work from being left out.
fn stat_all(folder: &Path) -> u64 {
    walk(folder, &mut |path| fs::symlink_metadata(path).expect("a status").size())
}

/// As coreutils read, with a status first and a buffer of their size.
fn read_all(folder: &Path) -> u64 {
    let mut buffer = vec![0; 128 << 10];
    walk(folder, &mut |path| {
        let mut file = fs::File::open(path).expect("a file");
        let size = file.metadata().expect("a status").size();
        let mut read = 0;
        while let length @ 1.. = file.read(&mut buffer).expect("data") {
            read += length as u64;
        }
        assert_eq!(read, size, "of {}", path.display());
        read
    })
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path) -> u64) -> u64 {
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
