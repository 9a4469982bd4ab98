//! Layers: how long until a tree can be used, what reading through it costs, what writing into it costs, how long a
//! snapshot takes, and what is left of a thousand of them. README.md beside this folder has the last run.
//!
//! `ROUNDS=3` is a quick look: it makes samples fewer, not trees smaller. `PARTS="mounts reading"` runs some of them.

#[path = "../support/apart.rs"]
mod apart;
#[path = "../support/disk.rs"]
mod disk;
#[path = "../support/flat.rs"]
mod flat;
#[path = "../support/goals.rs"]
mod goals;
mod life;
mod mounting;
mod reading;
#[path = "../support/run.rs"]
mod run;
mod snapshots;
mod trees;
mod writing;

use goals::Goals;
use trees::Site;

pub const MIB: f64 = 1024.0 * 1024.0;

const PARTS: &str = "image mounts reading writing snapshots life";

fn main() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the layers' bench mounts file systems, so it needs root"
    );
    if trees::make() {
        return;
    }
    disk::private_mounts();
    let dir = disk::work_dir("layers");
    let mut goals = Goals::new("layers");
    {
        let disk = disk::Disk::new(&dir, "ext4");
        let site = Site::new(&disk.root);
        let wanted = std::env::var("PARTS").unwrap_or_else(|_| PARTS.to_owned());
        for part in wanted.split_whitespace() {
            match part {
                "image" => mounting::image(&site, &mut goals),
                "mounts" => mounting::mounts(&site, &mut goals),
                "reading" => reading::bench(&site, &mut goals),
                "writing" => writing::bench(&site),
                "snapshots" => snapshots::bench(&site, &mut goals),
                "life" => life::bench(&site, &mut goals),
                other => panic!("there is no part {other:?}; there are {PARTS}"),
            }
        }
        site.layers
            .unmount_unused(std::time::Duration::ZERO)
            .expect("unmounted");
    }
    std::fs::remove_dir_all(&dir).expect("removed");
    goals.finish();
}

/// Samples of each figure.
pub fn samples() -> usize {
    let rounds = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok());
    rounds.unwrap_or(20)
}
