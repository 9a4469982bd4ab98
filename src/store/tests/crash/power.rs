//! Power cuts: the file system is shut down, and mounted again from its journal.

use rand::Rng;
use rustix::process::{Pid, Signal};

use super::child::{command, outcome};
use super::rounds::{Target, by_patience};
use super::*;
use crate::store::disk::hook::{Shutdown, shut_down};

fn at_steps(kind: &str, megabytes: u64) {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let disk = Disk::new(ram.path(), kind, megabytes);
    let folder = disk.path().to_owned();
    let mut rounds = Rounds::new(&folder, ram.path(), Some(disk));
    // Each time when the journal has just been written by itself: the names are durable, what a sync was left out for
    // is not. Of the first builds, and of the first that finds its ref there.
    let target = Target {
        new: true,
        detour: Vec::new(),
    };
    for step in [Step::BlobRename, Step::ManifestRename, Step::RefRename] {
        for time in [1, 2, 5] {
            rounds.strike(&target, (step, time, Fault::CutAfter(Shutdown::FlushLog)), false);
        }
    }
    let mut plan = rounds.plan(by_patience(1, 20));
    plan.truncate(by_patience(30, usize::MAX));
    for (target, step, time) in plan {
        let how = match rounds.rng.random_bool(0.5) {
            true => Shutdown::Nothing,
            false => Shutdown::FlushLog,
        };
        let fault = match rounds.rng.random_bool(0.5) {
            true => Fault::CutBefore(how),
            false => Fault::CutAfter(how),
        };
        rounds.strike(&target, (step, time, fault), false);
    }
    println!("{:?}", rounds.ended);
    assert!(rounds.ended["killed"] > 30);
}

#[test]
fn a_power_cut_at_a_step_loses_nothing_that_was_published_on_ext4() {
    at_steps("ext4", 96);
}

#[test]
fn a_power_cut_at_a_step_loses_nothing_that_was_published_on_xfs() {
    at_steps("xfs", 320);
}

/// The disk is cut off at a moment that the process knows nothing of, while it works or waits for a sync.
fn at_any_moment(kind: &str, megabytes: u64) {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let disk = Disk::new(ram.path(), kind, megabytes);
    let folder = disk.path().to_owned();
    let mut rounds = Rounds::new(&folder, ram.path(), Some(disk));
    for round in 0..by_patience(20, 1000) {
        let target = Target {
            new: round % 2 == 0,
            detour: Vec::new(),
        };
        let delay = rounds.lasts.mul_f64(rounds.rng.random());
        let how = match rounds.rng.random_range(0..6) {
            0 => Shutdown::Flush,
            1 => Shutdown::FlushLog,
            _ => Shutdown::Nothing,
        };
        let _context = rounds.begin(&format!("{how:?} after {delay:?} of {target:?}"), &target);
        let work = rounds.work(&target, None, false);
        let mut child = command(&work).spawn().unwrap();
        std::thread::sleep(delay);
        // A call of the kernel goes on, but nothing is said after it: XFS lets a folder's sync end well when the file
        // system has been shut down meanwhile, which no process sees when the power goes.
        rustix::process::kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
        shut_down(&folder, how);
        let _ = child.kill();
        let life = outcome(&work, &child.wait_with_output().unwrap());
        rounds.judge(&target, false, &life);
    }
    println!("{:?}", rounds.ended);
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_published_on_ext4() {
    at_any_moment("ext4", 96);
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_published_on_xfs() {
    at_any_moment("xfs", 320);
}
