//! Very many layers, and what is left of them.

use std::fs;
use std::time::{Duration, Instant};

use larder::layer::Mode;

use super::goals::Goals;
use super::trees::{LIMIT, SMALL, Site};

const LAYERS: usize = 1_000;
const AT_ONCE: usize = 100;
const WORKERS: usize = 8;

pub fn bench(site: &Site, goals: &mut Goals) {
    let modes = [Mode::Overlay, Mode::Tmpfs, Mode::ReadOnly];
    let spec = |number: usize| site.spec(site.tree(SMALL), modes[number % modes.len()]);
    let one = |number: usize| {
        let spec = spec(number);
        site.layers.prepare(&spec).expect("mounted");
        site.layers.release(&spec.id, false).expect("released");
    };
    // As many at a time as an agent works on.
    let all_at_once = || {
        let specs: Vec<_> = (0..AT_ONCE).map(spec).collect();
        for release in [false, true] {
            std::thread::scope(|scope| {
                for specs in specs.chunks(AT_ONCE.div_ceil(WORKERS)) {
                    scope.spawn(move || {
                        for spec in specs {
                            match release {
                                false => drop(site.layers.prepare(spec).expect("mounted")),
                                true => site.layers.release(&spec.id, false).expect("released"),
                            }
                        }
                    });
                }
            });
        }
    };
    // What the first ones take stays: threads' stacks, the allocator's arenas.
    (0..20).for_each(one);
    all_at_once();
    let before = resident();
    let start = Instant::now();
    (0..LAYERS).for_each(one);
    let row = start.elapsed();
    let start = Instant::now();
    all_at_once();
    let once = start.elapsed();
    site.layers.unmount_unused(Duration::ZERO).expect("unmounted");
    let after = resident();
    println!(
        "\n{LAYERS} layers of {} MiB in a row: {:.1} ms each; {AT_ONCE} at once: {:.0} ms; memory before {before} KiB, after {after} KiB",
        LIMIT >> 20,
        row.as_secs_f64() * 1000.0 / LAYERS as f64,
        once.as_secs_f64() * 1000.0
    );
    goals.at_most(
        "memory after 1,000 layers to before",
        after as f64 / before as f64,
        1.1,
        "×",
    );
    goals.at_most("left of 1,000 layers", left(site) as f64, 0.0, "");
}

/// Mounts, loop devices and folders that are still there.
fn left(site: &Site) -> usize {
    let store = site.store.root().display().to_string();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let mounts = mounts
        .lines()
        .filter(|line| line.contains(&format!("{store}/")))
        .count();
    let loops = fs::read_dir("/sys/block").expect("devices").filter(|device| {
        let backing = device.as_ref().expect("a device").path().join("loop/backing_file");
        fs::read_to_string(backing).is_ok_and(|file| file.contains(&store))
    });
    let folders = ["layers", "mnt/images", "mnt/trees"].map(|folder| {
        let folder = site.store.root().join(folder);
        fs::read_dir(folder).map_or(0, Iterator::count)
    });
    mounts + loops.count() + folders.iter().sum::<usize>()
}

/// Memory of this process in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let size = line.and_then(|line| line.split_whitespace().next());
    size.expect("a size").parse().expect("a number")
}
