//! Who does what in which order: one list of steps per kind of work, in the order of the code that it stands for.

use super::state::all_blobs;
use super::{Mutant, REFS, TREES};

/// What is done at once. Numbers are those of blobs, trees and refs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    // build.rs, publish.rs
    /// `Leases::begin_build`.
    BeginBuild,
    /// `Build::claim` and `Build::find`, under the shard's lock: look for the blob and lease it. One that is leaving
    /// counts as gone.
    Claim(u8),
    /// The two halves of `Claim`, for a mutant.
    Look(u8),
    Lease(u8),
    /// One turn of `Build::name_blobs`, under the shard's lock, when the blob is not leaving.
    NameBlob(u8),
    /// `manifests::verify` in `Build::publish`.
    VerifyManifest(u8),
    /// The `renameat` of the manifest in `Build::publish`.
    NameManifest(u8),
    /// `Inner::name_ref` in `Build::publish`, with what `publish::next` made of the ref.
    NameRef {
        tree: u8,
        name: u8,
        keeps_history: bool,
    },
    /// `Build::drop`: `Leases::end_build`.
    EndBuild,

    // leases.rs
    /// `Hold::take` in `Build::publish`, which needs no manifest yet.
    HoldForPublish(u8),
    /// `Hold::take` in `Store::hold`: under the lock of `Leases` look for the manifest and note the hold.
    TakeHold(u8),
    /// The two halves of `TakeHold`, for a mutant.
    FindHeld(u8),
    NoteHold(u8),
    /// `Hold::drop`.
    DropHold(u8),

    // refs.rs
    /// `Inner::lock_ref`, then `Inner::read_ref`.
    LockRef(u8),
    UnlockRef(u8),
    /// `Inner::write_ref` in `Store::retire`.
    RetireRef(u8),
    /// `Inner::remove_ref` in `Store::forget`.
    ForgetRef(u8),

    // What the store's callers do: `layer.json` is written, and removed.
    RecordLayer(u8),
    RemoveLayer(u8),

    // gc/
    /// `Inner::collecting`.
    LockCollecting,
    UnlockCollecting,
    /// `Leases::begin_mark` and `Leases::end_sweep`.
    BeginMark,
    EndSweep,
    /// `mark`: one ref of `Inner::refs`, `Holders::held`, `Leases::trees`, one `read_manifest`, one name of `orphans`,
    /// one of `scan`.
    ReadRef(u8),
    ReadHolders,
    ReadHolds,
    ReadManifest(u8),
    ListOrphan(u8),
    Scan(u8),
    /// `retention::plan`.
    Plan,
    /// `Run::drop_manifests`: one ref of `Inner::refs`, then one `Leases::unless_held`: a look at the holds under their lock;
    /// the `unlinkat`; the end, under the lock.
    ForgetNamed,
    ReadRefAgain(u8),
    DropOrphan(u8),
    DropPlanned(u8),
    UnlinkManifest(u8),
    Dropped(u8),
    /// `Run::drop_history`: under the ref's lock.
    LockHistory(u8),
    DropHistory(u8),
    UnlockHistory(u8),
    /// Reading the ref without its lock, for a mutant.
    ReadHistory(u8),
    /// `Run::sweep`: one name of `stored_manifests`, then `Run::sweep_some` with one blob: `Inner::leave`, under its
    /// shard's lock; the `unlinkat` of `Leaving::remove`; its drop, under the shard's lock.
    ForgetProtected,
    LookAgain(u8),
    SweepFirst(u8),
    SweepLater(u8),
    Unlink(u8),
    Left(u8),
    /// A look at the leases before the shard's lock is taken, for a mutant.
    CheckLeases(u8),
}

/// What a step is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Thing {
    Blob(u8),
    /// A tree's manifest, its holds and its layers.
    Tree(u8),
    Ref(u8),
}

impl Op {
    /// The one thing that the step looks at or changes; `None` if it is none or several.
    pub fn thing(self) -> Option<Thing> {
        use Op::*;
        match self {
            Claim(blob) | Look(blob) | Lease(blob) | NameBlob(blob) | Scan(blob) | SweepFirst(blob)
            | SweepLater(blob) | Unlink(blob) | Left(blob) | CheckLeases(blob) => Some(Thing::Blob(blob)),
            VerifyManifest(tree) | NameManifest(tree) | HoldForPublish(tree) | TakeHold(tree) | FindHeld(tree)
            | NoteHold(tree) | DropHold(tree) | RecordLayer(tree) | RemoveLayer(tree) | ReadManifest(tree)
            | ListOrphan(tree) | DropOrphan(tree) | DropPlanned(tree) | UnlinkManifest(tree) | Dropped(tree)
            | LookAgain(tree) => Some(Thing::Tree(tree)),
            NameRef { name, .. }
            | LockRef(name)
            | UnlockRef(name)
            | RetireRef(name)
            | ForgetRef(name)
            | ReadRef(name)
            | ReadRefAgain(name)
            | LockHistory(name)
            | DropHistory(name)
            | UnlockHistory(name)
            | ReadHistory(name) => Some(Thing::Ref(name)),
            BeginBuild | EndBuild | LockCollecting | UnlockCollecting | BeginMark | EndSweep | ReadHolders
            | ReadHolds | Plan | ForgetNamed | ForgetProtected => None,
        }
    }
}

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Build {
        tree: u8,
        name: u8,
        /// `history_limit` is not 0.
        keeps_history: bool,
    },
    /// A build that fails after its blobs have their names.
    FailedBuild {
        tree: u8,
    },
    /// `Store::hold`, and its end.
    Hold {
        tree: u8,
    },
    /// A layer that is made and removed: held, recorded, no longer held, no longer recorded.
    Layer {
        tree: u8,
    },
    Retire {
        name: u8,
    },
    Forget {
        name: u8,
    },
    Collect,
}

impl Work {
    pub fn program(self, mutant: Option<Mutant>) -> Vec<Op> {
        match self {
            Work::Build {
                tree,
                name,
                keeps_history,
            } => build(tree, Some((name, keeps_history)), mutant),
            Work::FailedBuild { tree } => build(tree, None, mutant),
            Work::Hold { tree } => [take_hold(tree, mutant), vec![Op::DropHold(tree)]].concat(),
            Work::Layer { tree } => layer(tree, mutant),
            Work::Retire { name } => vec![Op::LockRef(name), Op::RetireRef(name), Op::UnlockRef(name)],
            Work::Forget { name } => vec![Op::LockRef(name), Op::ForgetRef(name), Op::UnlockRef(name)],
            Work::Collect => collect(mutant),
        }
    }
}

/// `Store::build`, the puts, `Build::publish` and `Build::drop`.
fn build(tree: u8, publish: Option<(u8, bool)>, mutant: Option<Mutant>) -> Vec<Op> {
    let is = |other| mutant == Some(other);
    let blobs = || TREES[tree as usize].members();
    let mut ops = vec![Op::BeginBuild];
    for blob in blobs() {
        match is(Mutant::LookThenLease) {
            true => ops.extend([Op::Look(blob), Op::Lease(blob)]),
            false => ops.push(Op::Claim(blob)),
        }
    }
    match is(Mutant::VerifyThenHold) {
        true => ops.extend([Op::VerifyManifest(tree), Op::HoldForPublish(tree)]),
        false => ops.extend([Op::HoldForPublish(tree), Op::VerifyManifest(tree)]),
    }
    if is(Mutant::ManifestBeforeBlobs) {
        ops.push(Op::NameManifest(tree));
    }
    ops.extend(blobs().map(Op::NameBlob));
    let give_up = [Op::DropHold(tree), Op::EndBuild];
    let Some((name, keeps_history)) = publish else {
        ops.extend(give_up);
        return ops;
    };
    ops.push(Op::LockRef(name));
    let name_ref = Op::NameRef {
        tree,
        name,
        keeps_history,
    };
    match mutant {
        Some(Mutant::RefBeforeManifest) => ops.extend([name_ref, Op::NameManifest(tree)]),
        Some(Mutant::LeaseEndsBeforeRef) => {
            ops.push(Op::NameManifest(tree));
            ops.extend(give_up);
            ops.push(name_ref);
        }
        _ => ops.extend([Op::NameManifest(tree), name_ref]),
    }
    ops.push(Op::UnlockRef(name));
    if !is(Mutant::LeaseEndsBeforeRef) {
        ops.extend(give_up);
    }
    ops
}

fn take_hold(tree: u8, mutant: Option<Mutant>) -> Vec<Op> {
    match mutant {
        Some(Mutant::LookThenHold) => vec![Op::FindHeld(tree), Op::NoteHold(tree)],
        _ => vec![Op::TakeHold(tree)],
    }
}

fn layer(tree: u8, mutant: Option<Mutant>) -> Vec<Op> {
    let mut ops = take_hold(tree, mutant);
    match mutant {
        Some(Mutant::LayerHoldEndsEarly) => ops.extend([Op::DropHold(tree), Op::RecordLayer(tree)]),
        _ => ops.extend([Op::RecordLayer(tree), Op::DropHold(tree)]),
    }
    ops.push(Op::RemoveLayer(tree));
    ops
}

/// `Store::collect`: `mark`, `plan`, `Run::execute`.
fn collect(mutant: Option<Mutant>) -> Vec<Op> {
    let is = |other| mutant == Some(other);
    let (trees, refs) = (0..TREES.len() as u8, 0..REFS);
    let mut ops = vec![Op::LockCollecting];
    if is(Mutant::HoldersBeforeMark) {
        ops.push(Op::ReadHolders);
    }
    if !is(Mutant::MarkBeginsLate) {
        ops.push(Op::BeginMark);
    }
    ops.extend(refs.clone().map(Op::ReadRef));
    if !is(Mutant::HoldersBeforeMark) {
        ops.push(Op::ReadHolders);
    }
    ops.push(Op::ReadHolds);
    if is(Mutant::MarkBeginsLate) {
        ops.push(Op::BeginMark);
    }
    ops.extend(trees.clone().map(Op::ReadManifest));
    ops.extend(trees.clone().map(Op::ListOrphan));
    ops.extend(all_blobs().map(Op::Scan));
    ops.push(Op::Plan);
    if is(Mutant::SweepAfterTheEnd) {
        ops.push(Op::EndSweep);
    }

    let drop_orphans = drop_manifests(Op::DropOrphan);
    let sweep_first = sweep(Op::SweepFirst, mutant);
    match is(Mutant::BlobsFirst) {
        // Without its second look, which the manifests that are still there would answer.
        true => ops.extend(
            all_blobs()
                .flat_map(|blob| remove(Op::SweepFirst(blob)))
                .chain(drop_orphans),
        ),
        false => ops.extend(drop_orphans.into_iter().chain(sweep_first)),
    }
    let mut drop_history = Vec::new();
    for name in refs {
        match is(Mutant::HistoryWithoutRefLock) {
            true => drop_history.extend([Op::ReadHistory(name), Op::DropHistory(name)]),
            false => drop_history.extend([Op::LockHistory(name), Op::DropHistory(name), Op::UnlockHistory(name)]),
        }
    }
    let drop_planned = drop_manifests(Op::DropPlanned);
    match is(Mutant::ManifestsFirst) {
        // Without reading the refs again, which still name them.
        true => ops.extend(
            [Op::ForgetNamed]
                .into_iter()
                .chain(trees.flat_map(|tree| drop_manifest(Op::DropPlanned, tree)))
                .chain(drop_history),
        ),
        false => ops.extend(drop_history.into_iter().chain(drop_planned)),
    }
    ops.extend(sweep(Op::SweepLater, mutant));
    if !is(Mutant::SweepAfterTheEnd) {
        ops.push(Op::EndSweep);
    }
    ops.push(Op::UnlockCollecting);
    ops
}

fn drop_manifests(drop: fn(u8) -> Op) -> Vec<Op> {
    let mut ops = vec![Op::ForgetNamed];
    ops.extend((0..REFS).map(Op::ReadRefAgain));
    ops.extend((0..TREES.len() as u8).flat_map(|tree| drop_manifest(drop, tree)));
    ops
}

fn drop_manifest(drop: fn(u8) -> Op, tree: u8) -> [Op; 3] {
    [drop(tree), Op::UnlinkManifest(tree), Op::Dropped(tree)]
}

fn sweep(sweep: fn(u8) -> Op, mutant: Option<Mutant>) -> Vec<Op> {
    let mut ops = vec![Op::ForgetProtected];
    if mutant != Some(Mutant::NoSecondLook) {
        ops.extend((0..TREES.len() as u8).map(Op::LookAgain));
    }
    for blob in all_blobs() {
        if mutant == Some(Mutant::LeasesThenLock) {
            ops.push(Op::CheckLeases(blob));
        }
        ops.extend(remove(sweep(blob)));
    }
    ops
}

/// `Inner::leave` and `Leaving::remove`.
fn remove(leave: Op) -> Vec<Op> {
    let (Op::SweepFirst(blob) | Op::SweepLater(blob)) = leave else {
        unreachable!("{leave:?} has no blob leave")
    };
    vec![leave, Op::Unlink(blob), Op::Left(blob)]
}
