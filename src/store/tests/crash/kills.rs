//! A process that is killed, and system calls that fail or do less than they were asked.

use rand::Rng;
use rustix::io::Errno;

use super::rounds::{Target, by_patience};
use super::*;

#[test]
fn a_kill_at_any_step_loses_nothing_that_was_published() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let mut rounds = Rounds::new(ram.path(), ram.path(), None);
    for (target, step, time) in rounds.plan(by_patience(2, usize::MAX)) {
        let fault = match rounds.rng.random_bool(0.5) {
            true => Fault::KillBefore,
            false => Fault::KillAfter,
        };
        rounds.strike(&target, (step, time, fault), false);
    }
    println!("{:?}", rounds.ended);
    assert!(rounds.ended["killed"] > 120);
}

/// Steps that move bytes, which a call may do in part.
const READS: &[Step] = &[
    Step::SourceRead,
    Step::StagedRead,
    Step::ManifestRead,
    Step::RefRead,
    Step::ExportRead,
];
const WRITES: &[Step] = &[
    Step::LockWrite,
    Step::ConfigWrite,
    Step::SpareWrite,
    Step::SpareFill,
    Step::BlobWrite,
    Step::ManifestWrite,
    Step::RefWrite,
    Step::ExportCopy,
    Step::ExportWrite,
];

#[test]
fn an_error_at_any_step_spoils_nothing_and_the_same_work_heals_it() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    // The export is to another file system, for which data goes through memory.
    let mut rounds = Rounds::new(ram.path(), dir.path(), None);
    for (target, step, time) in rounds.plan(by_patience(1, usize::MAX)) {
        let full = rounds.rng.random_bool(0.3);
        let error = Fault::Fail(if full { Errno::NOSPC } else { Errno::IO });
        let again = rounds.rng.random_bool(0.5);
        rounds.strike(&target, (step, time, error), again);
        if READS.contains(&step) || WRITES.contains(&step) {
            rounds.strike(&target, (step, time, Fault::Short), again);
        }
        if WRITES.contains(&step) {
            rounds.strike(&target, (step, time, Fault::Nothing), again);
        }
    }
    println!("{:?}", rounds.ended);
    assert!(rounds.ended["failed"] > 10 && rounds.ended["done"] > 10);
}

#[test]
fn a_ref_that_cannot_be_read_for_a_moment_keeps_its_history() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let mut rounds = Rounds::new(ram.path(), ram.path(), None);
    let target = Target {
        new: true,
        detour: Vec::new(),
    };
    // Each read of the three builds that find their ref there.
    for time in 1..=12 {
        rounds.strike(&target, (Step::RefRead, time, Fault::Fail(Errno::IO)), true);
    }
}
