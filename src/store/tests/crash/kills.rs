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

/// Is it a step that moves bytes, of which a call may do a part? Their names say so.
fn reads(step: Step) -> bool {
    format!("{step:?}").ends_with("Read")
}

fn writes(step: Step) -> bool {
    let name = format!("{step:?}");
    ["Write", "Copy", "Fill"].iter().any(|end| name.ends_with(end))
}

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
        if reads(step) || writes(step) {
            rounds.strike(&target, (step, time, Fault::Short), again);
        }
        if writes(step) {
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

#[test]
fn a_blob_that_was_quarantined_but_perhaps_not_for_good_is_told_as_that() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    let unreadable = Fault::Fail(Errno::BADMSG);
    for (failed, said) in [(None, "moved durable "), (Some(2), "moved volatile ")] {
        let mut faults = vec![(Step::VerifyRead, 1, unreadable), (Step::VerifyRead, 2, unreadable)];
        faults.extend(failed.map(|time| (Step::QuarantineSync, time, Fault::Fail(Errno::IO))));
        let store = ram.path().join(format!("store-{failed:?}"));
        let life = live(&Work {
            out: store.with_extension("out"),
            store: store.clone(),
            faults,
            again: false,
        });
        assert_eq!(life.ended, Ended::Done, "{}", life.output);
        assert!(life.said.iter().any(|line| line.starts_with(said)), "{:?}", life.said);
        // A verification of what changed since would not look at what may come back.
        let full = store.join("runs/verify.json");
        assert_eq!(full.exists(), failed.is_none(), "{full:?}");
    }
}
