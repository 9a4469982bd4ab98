//! The protocol between builds, holds and collections as a model that is small enough to try **every** interleaving.
//!
//! A store of two blobs, three trees and two refs. What works on it is a list of [`Op`]s, each of which stands for
//! what the code does at once: one call of the kernel, or all that it does under one taking of a lock. `program.rs`
//! has the lists, to be held side by side with the functions that they name; `state.rs` says what an `Op` does and
//! what must be true after each; `explore.rs` goes through all orders. A change of the order or of a lock in
//! `build.rs`, `publish.rs`, `leases.rs`, `leaving.rs`, `refs.rs` or `gc/` belongs here too.
//!
//! What must be true after every step:
//! - whatever a ref, a layer or a [`Hold`](crate::store::Hold) names has its manifest and all its blobs;
//! - what a running build has found, named or decided to keep is still there;
//! - no change of a ref is lost, and no collection takes a tree for damaged;
//! - should the process die here, a collection of the next one leaves exactly what is needed. (Of a power cut the model
//!   knows nothing: what is durable when is `publish.rs`'s business and that of its tests.)
//!
//! That the model can fail is shown by [`Mutant`]s: each takes one rule away, and the explorer must find a loss.
//! Some rules are missing there because others stand behind them, so that nothing is lost without one of them alone: a
//! collection reads the refs again before it drops manifests (but a publish holds its tree until the ref is named), and
//! its mark asks for the holds (but nothing that is held is dropped, and what is not dropped is not swept).

mod explore;
mod program;
mod state;

use std::cell::RefCell;

use explore::explore;
use program::Work;
use state::{RefFile, Set, Shared};

/// Trees by number, and the blobs of each.
const TREES: [Set; 3] = [Set::of(&[0]), Set::of(&[0, 1]), Set::of(&[1])];
const BLOBS: u8 = 2;
const REFS: u8 = 2;

/// A rule that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mutant {
    /// What ends during a collection is forgotten at once.
    NothingSticky,
    /// The mark reads refs, holders and holds before nothing is forgotten any more.
    MarkBeginsLate,
    /// What ended is forgotten before the sweep.
    SweepAfterTheEnd,
    /// Two collections run at once.
    NoCollectingLock,
    /// A blob that is found present is not leased.
    FindWithoutLease,
    /// A build looks for its blob, lets the shard go, and leases the blob then.
    LookThenLease,
    /// The sweep does not look at the leases.
    SweepWithoutLeases,
    /// The sweep looks at the leases before it takes the shard's lock.
    LeasesThenLock,
    /// A blob that is leaving is found.
    FindLeaving,
    /// A blob gets its name while the old one is leaving.
    NameLeaving,
    /// The sweep trusts the mark about which manifests there are.
    NoSecondLook,
    /// Blobs are swept before the manifests that name them are dropped.
    BlobsFirst,
    /// Manifests are dropped before the history that names them.
    ManifestsFirst,
    /// History is dropped without the ref's lock.
    HistoryWithoutRefLock,
    /// A manifest is dropped whoever holds it.
    DropHeldManifests,
    /// A hold is taken on a tree whose manifest is being removed.
    HoldDropping,
    /// A hold looks for the manifest, lets the lock go, and is noted then.
    LookThenHold,
    /// A publish looks whether the manifest is there before it holds it.
    VerifyThenHold,
    /// A build gives up its leases and hold before its ref is named.
    LeaseEndsBeforeRef,
    /// The ref is named before the manifest.
    RefBeforeManifest,
    /// The manifest is named before the blobs.
    ManifestBeforeBlobs,
    /// A layer lets its hold go before it has recorded what it needs.
    LayerHoldEndsEarly,
    /// Holders are asked before the mark begins.
    HoldersBeforeMark,
}

/// Each with works that show what is lost without the rule.
fn mutants() -> Vec<(Mutant, Vec<Work>)> {
    let build = |tree, name| Work::Build {
        tree,
        name,
        keeps_history: true,
    };
    let (hold, layer, collect) = (Work::Hold { tree: 1 }, Work::Layer { tree: 1 }, Work::Collect);
    vec![
        (Mutant::NothingSticky, vec![build(0, 0), collect]),
        (Mutant::MarkBeginsLate, vec![layer, collect]),
        (Mutant::SweepAfterTheEnd, vec![build(0, 0), collect]),
        (Mutant::NoCollectingLock, vec![build(0, 0), collect, collect]),
        (Mutant::FindWithoutLease, vec![build(0, 0), collect]),
        (Mutant::LookThenLease, vec![build(0, 0), collect]),
        (Mutant::SweepWithoutLeases, vec![build(0, 0), collect]),
        (Mutant::LeasesThenLock, vec![build(0, 0), collect]),
        (Mutant::FindLeaving, vec![build(0, 0), collect]),
        (Mutant::NameLeaving, vec![build(0, 0), collect]),
        (Mutant::NoSecondLook, vec![hold, collect]),
        (Mutant::BlobsFirst, vec![hold, collect]),
        (Mutant::ManifestsFirst, vec![collect]),
        (Mutant::HistoryWithoutRefLock, vec![build(0, 0), collect]),
        (Mutant::DropHeldManifests, vec![hold, collect]),
        (Mutant::HoldDropping, vec![hold, collect]),
        (Mutant::LookThenHold, vec![hold, collect]),
        (Mutant::VerifyThenHold, vec![build(1, 0), collect]),
        (Mutant::LeaseEndsBeforeRef, vec![build(0, 0), collect]),
        (Mutant::RefBeforeManifest, vec![build(0, 0)]),
        (Mutant::ManifestBeforeBlobs, vec![build(1, 0), hold]),
        (Mutant::LayerHoldEndsEarly, vec![layer, collect]),
        (Mutant::HoldersBeforeMark, vec![layer, collect]),
    ]
}

/// Stores to begin with: nothing, garbage, orphans, history, current trees, and mixtures.
fn stores() -> Vec<Shared> {
    let store = |manifests: &[u8], blobs: &[u8], refs: [RefFile; REFS as usize]| Shared {
        manifests: Set::of(manifests),
        blobs: Set::of(blobs),
        refs,
        ..Shared::default()
    };
    let none = RefFile::default();
    let current = |tree, history: &[u8]| RefFile {
        current: Some(tree),
        history: Set::of(history),
    };
    let history = |trees: &[u8]| RefFile {
        current: None,
        history: Set::of(trees),
    };
    vec![
        store(&[], &[], [none, none]),
        store(&[], &[0, 1], [none, none]),
        store(&[1], &[0, 1], [none, none]),
        store(&[0], &[0, 1], [current(0, &[]), none]),
        store(&[1, 2], &[0, 1], [current(2, &[1]), none]),
        store(&[1], &[0, 1], [history(&[1]), none]),
        store(&[0, 1], &[0, 1], [current(1, &[]), history(&[0])]),
        store(&[0, 2], &[0, 1], [current(0, &[]), none]),
    ]
}

/// Everything that may work on a store beside collections.
fn works() -> Vec<Work> {
    let build = |tree, name, keeps_history| Work::Build {
        tree,
        name,
        keeps_history,
    };
    vec![
        build(0, 0, true),
        build(1, 0, true),
        build(2, 1, false),
        Work::FailedBuild { tree: 1 },
        Work::Hold { tree: 1 },
        Work::Layer { tree: 1 },
        Work::Retire { name: 0 },
        Work::Forget { name: 0 },
    ]
}

/// Every pair of works with one collection, and every work with two.
fn scenarios() -> Vec<Vec<Work>> {
    let works = works();
    let mut found = Vec::new();
    for (index, one) in works.iter().enumerate() {
        found.push(vec![*one, Work::Collect, Work::Collect]);
        for other in &works[index..] {
            found.push(vec![*one, *other, Work::Collect]);
        }
    }
    found
}

/// Three works with a collection, and two with two.
fn long_scenarios() -> Vec<Vec<Work>> {
    let works = works();
    let mut found = Vec::new();
    for (first, one) in works.iter().enumerate() {
        for (second, two) in works.iter().enumerate().skip(first) {
            found.push(vec![*one, *two, Work::Collect, Work::Collect]);
            for three in &works[second..] {
                found.push(vec![*one, *two, *three, Work::Collect]);
            }
        }
    }
    found
}

/// Every scenario on some of the stores; for the night the long ones too, and each on every store.
#[test]
fn no_order_of_steps_loses_what_is_needed() {
    let long = std::env::var_os("LARDER_SOAK").is_some();
    let mut scenarios = scenarios();
    if long {
        scenarios.extend(long_scenarios());
    }
    let (mut tried, mut states, restarted) = (0, 0, RefCell::default());
    for (number, works) in scenarios.iter().enumerate() {
        for (index, store) in stores().iter().enumerate() {
            if !long && index % 4 != number % 4 {
                continue;
            }
            tried += 1;
            match explore(store, works, None, &restarted) {
                Ok(count) => states += count,
                Err(loss) => panic!("{works:?} on {store:?}:\n{loss}"),
            }
        }
    }
    println!("{tried} explorations, {states} states");
    assert!(states > 100_000, "hardly anything was tried: {states} states");
}

#[test]
fn every_rule_that_is_left_out_loses_something() {
    let (mut missed, restarted) = (Vec::new(), RefCell::default());
    for (mutant, works) in mutants() {
        let stores = stores();
        match stores
            .iter()
            .find_map(|store| explore(store, &works, Some(mutant), &restarted).err())
        {
            Some(loss) => println!("{mutant:?}: {loss}"),
            None => missed.push(mutant),
        }
        // The same works lose nothing with the rule.
        for store in &stores {
            explore(store, &works, None, &restarted).unwrap_or_else(|loss| panic!("{works:?}: {loss}"));
        }
    }
    assert_eq!(missed, [], "the model cannot tell what these rules are for");
}
