//! Power cuts: the file system is shut down, and mounted again from its journal.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

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

/// Stops a process: none of its threads runs code of its own after this, only calls of the kernel go on.
fn stop(child: &Child) {
    let pid = Pid::from_child(child);
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    // The signal is only sent by now: until a thread has taken it, all of them run on.
    let mut taken = false;
    let asked = Instant::now();
    loop {
        let states: Vec<char> = std::fs::read_dir(&tasks)
            .unwrap()
            .map(|task| state(&task.unwrap().path()))
            .collect();
        // Ended, stopped, or in a call of the kernel at whose end it stops.
        if taken && states.iter().all(|state| "XZTD".contains(*state)) {
            return;
        }
        taken |= states.contains(&'T') || states.iter().all(|state| "XZ".contains(*state));
        assert!(
            asked.elapsed() < Duration::from_secs(60),
            "it does not stop: {states:?}"
        );
        std::thread::yield_now();
    }
}

/// The letter that the kernel gives for what a thread does.
fn state(task: &Path) -> char {
    // Gone meanwhile: it has ended.
    let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
    // It stands after the name, which may hold anything.
    let after = stat.rsplit_once(") ").map_or("X", |(_, rest)| rest);
    after.chars().next().unwrap()
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
        stop(&child);
        shut_down(&folder, how);
        let _ = child.kill();
        let life = outcome(&work, &child.wait_with_output().unwrap());
        if life.ended == Ended::Done {
            // Measured while the machine was slower.
            rounds.lasts = rounds.lasts.min(delay);
        }
        rounds.judge(&target, false, &life);
    }
    println!("{:?}", rounds.ended);
    let cut: u64 = rounds
        .ended
        .iter()
        .filter(|(how, _)| **how != "done")
        .map(|(_, count)| count)
        .sum();
    assert!(cut >= 5, "most lives were over before the cut");
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_published_on_ext4() {
    at_any_moment("ext4", 96);
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_published_on_xfs() {
    at_any_moment("xfs", 320);
}
