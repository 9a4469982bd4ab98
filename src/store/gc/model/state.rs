//! What an [`Op`] does, and what must be true after each.

use super::program::Op;
use super::{BLOBS, Mutant, REFS, TREES};

/// Some of a few things, by number.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Set(u8);

impl Set {
    pub const fn of(members: &[u8]) -> Set {
        let (mut set, mut at) = (0, 0);
        while at < members.len() {
            set |= 1 << members[at];
            at += 1;
        }
        Set(set)
    }

    pub fn has(self, member: u8) -> bool {
        self.0 & (1 << member) != 0
    }

    pub fn add(&mut self, member: u8) {
        self.0 |= 1 << member;
    }

    pub fn remove(&mut self, member: u8) {
        self.0 &= !(1 << member);
    }

    pub fn join(self, other: Set) -> Set {
        Set(self.0 | other.0)
    }

    pub fn without(self, other: Set) -> Set {
        Set(self.0 & !other.0)
    }

    pub fn members(self) -> impl Iterator<Item = u8> {
        (0..8).filter(move |member| self.has(*member))
    }
}

impl std::fmt::Debug for Set {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.members()).finish()
    }
}

/// The blobs of some trees.
pub fn blobs_of(trees: Set) -> Set {
    trees
        .members()
        .fold(Set::default(), |all, tree| all.join(TREES[tree as usize]))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RefFile {
    pub current: Option<u8>,
    pub history: Set,
}

impl RefFile {
    fn trees(self) -> Set {
        self.current
            .iter()
            .fold(self.history, |all, tree| all.join(Set::of(&[*tree])))
    }
}

/// What all see: the disk, and what `leases.rs` and the locks hold.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    pub blobs: Set,
    pub manifests: Set,
    pub refs: [RefFile; REFS as usize],
    /// The trees that layers on disk need: what `Holders::held` answers.
    pub holders: Set,
    /// `State::trees`: how many holds each tree has.
    pub holds: [u8; TREES.len()],
    /// `State::sticky`: blobs of builds, and trees, that ended since the mark began.
    pub sticky: Option<(Set, Set)>,
    pub ref_locks: Set,
    pub collecting: bool,
    /// `Shard::leaving`.
    pub leaving: Set,
    /// `State::dropping`.
    pub dropping: Set,
}

impl Shared {
    /// What is left when the process dies.
    pub fn disk(&self) -> Shared {
        Shared {
            blobs: self.blobs,
            manifests: self.manifests,
            refs: self.refs,
            holders: self.holders,
            ..Shared::default()
        }
    }

    /// `Leases::trees`.
    fn held(&self) -> Set {
        let mut held = self.sticky.map(|(_, trees)| trees).unwrap_or_default();
        for (tree, count) in self.holds.iter().enumerate() {
            if *count > 0 {
                held.add(tree as u8);
            }
        }
        held
    }

    fn is_whole(&self, tree: u8) -> bool {
        self.manifests.has(tree) && TREES[tree as usize].without(self.blobs) == Set::default()
    }

    /// What a collection of a new process must leave, if it drops all history.
    pub fn needed(&self) -> Set {
        let current = self.refs.iter().filter_map(|entry| entry.current);
        current.fold(self.holders, |all, tree| all.join(Set::of(&[tree])))
    }
}

impl Shared {
    fn pack(&self, bytes: &mut Vec<u8>) {
        let [one, other] = self.refs;
        let (blobs, trees) = self.sticky.unwrap_or((Set(0xff), Set(0xff)));
        let [a, b, c] = self.holds;
        let sets = [
            self.blobs,
            self.manifests,
            one.history,
            other.history,
            self.holders,
            blobs,
            trees,
            self.ref_locks,
            self.leaving,
            self.dropping,
        ];
        bytes.extend(sets.map(|set| set.0));
        bytes.extend([
            number(one.current),
            number(other.current),
            a,
            b,
            c,
            u8::from(self.collecting),
        ]);
    }
}

fn number(one: Option<u8>) -> u8 {
    one.unwrap_or(0xff)
}

/// A state in few bytes; two different ones differ in them.
pub fn packed(shared: &Shared, locals: &[Local]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    shared.pack(&mut bytes);
    for local in locals {
        let mark = &local.mark;
        let sets = [
            local.leases.unwrap_or(Set(0xff)),
            local.staged,
            local.looked,
            local.relies,
            local.read.history,
            mark.live,
            mark.history,
            mark.hold_only,
            mark.read,
            mark.orphans,
            mark.free,
            mark.drop,
            mark.first,
            mark.later,
            mark.named_now,
            mark.protected,
            mark.doomed,
            mark.leaving,
            mark.dropping,
        ];
        bytes.extend(sets.map(|set| set.0));
        bytes.extend([
            local.next,
            number(local.keeps),
            number(local.held),
            number(local.read.current),
            u8::from(local.gave_up),
        ]);
    }
    bytes
}

/// One thing at work, and what it has in its variables.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// The next step of its program.
    pub next: u8,
    /// A build's `BuildLeases`, while it is among `State::builds`.
    leases: Option<Set>,
    /// Blobs that this build stages, and those that it has looked for without taking the lease (by a mutant).
    staged: Set,
    looked: Set,
    /// Blobs that must stay there from this build's view.
    relies: Set,
    /// The manifest that this publish keeps.
    keeps: Option<u8>,
    /// A hold by `Store::hold`.
    held: Option<u8>,
    /// It has found nothing to work on: the rest of the program is passed over.
    gave_up: bool,
    /// A ref as it was read under its lock.
    read: RefFile,
    /// A collection's `Marked`, `Plan` and what it looks up again.
    mark: Mark,
}

#[derive(Debug, Clone, Default)]
struct Mark {
    /// Trees that are live, in history, only held; those whose manifest was read; those of nobody.
    live: Set,
    history: Set,
    hold_only: Set,
    read: Set,
    orphans: Set,
    /// Blobs that are there.
    free: Set,
    /// What the plan removes.
    drop: Set,
    first: Set,
    later: Set,
    /// What is looked up again before removing.
    named_now: Set,
    protected: Set,
    /// A blob that is about to go (by a mutant that looks at the leases too early).
    doomed: Set,
    /// The blob, and the manifest, that is being removed.
    leaving: Set,
    dropping: Set,
}

/// A violated rule.
pub type Loss = String;

/// What may happen next at one worker.
pub enum Step {
    /// It waits for a lock.
    Waits,
    /// Every state that may follow.
    To(Vec<(Shared, Local)>),
}

/// Does the operation have nothing to do, so that it is no step of its own?
pub fn is_idle(op: Op, local: &Local) -> bool {
    let mark = &local.mark;
    match op {
        Op::EndBuild | Op::UnlockRef(_) | Op::UnlockCollecting | Op::EndSweep => false,
        _ if local.gave_up => true,
        Op::Claim(blob) | Op::Lease(blob) => local.leases.is_some_and(|leases| leases.has(blob)),
        Op::NameBlob(blob) => !local.staged.has(blob),
        Op::NameManifest(tree) => local.keeps == Some(tree),
        Op::ReadManifest(tree) => !mark.live.join(mark.history).has(tree),
        Op::ListOrphan(tree) => mark.live.join(mark.history).has(tree),
        Op::DropOrphan(tree) => !mark.orphans.has(tree),
        Op::DropPlanned(tree) => !mark.drop.has(tree),
        Op::LookAgain(tree) => mark.read.without(mark.drop).has(tree),
        Op::CheckLeases(blob) => !mark.first.join(mark.later).has(blob),
        Op::SweepFirst(blob) => !mark.first.has(blob) || mark.protected.has(blob),
        Op::SweepLater(blob) => !mark.later.has(blob) || mark.protected.has(blob),
        Op::Unlink(blob) | Op::Left(blob) => !mark.leaving.has(blob),
        Op::UnlinkManifest(tree) | Op::Dropped(tree) => !mark.dropping.has(tree),
        Op::LockHistory(_) | Op::ReadHistory(_) | Op::DropHistory(_) | Op::UnlockHistory(_) => {
            mark.drop == Set::default()
        }
        _ => false,
    }
}

/// `others`: the leases of the other builds.
pub fn step(op: Op, shared: &Shared, local: &Local, others: Set, mutant: Option<Mutant>) -> Result<Step, Loss> {
    let (mut shared, mut local) = (shared.clone(), local.clone());
    let is = |other| mutant == Some(other);
    match op {
        Op::BeginBuild => local.leases = Some(Set::default()),
        Op::Look(blob) => {
            if shared.blobs.has(blob) {
                local.looked.add(blob);
            }
        }
        Op::Lease(blob) => {
            if local.looked.has(blob) {
                local.relies.add(blob);
            } else {
                local.staged.add(blob);
            }
            local.leases.get_or_insert_default().add(blob);
        }
        Op::Claim(blob) => {
            let found = shared.blobs.has(blob) && (!shared.leaving.has(blob) || is(Mutant::FindLeaving));
            if found {
                local.relies.add(blob);
            } else {
                local.staged.add(blob);
            }
            if !(found && is(Mutant::FindWithoutLease)) {
                local.leases.get_or_insert_default().add(blob);
            }
        }
        Op::NameBlob(blob) => {
            if shared.leaving.has(blob) && !is(Mutant::NameLeaving) {
                return Ok(Step::Waits);
            }
            shared.blobs.add(blob);
            local.relies.add(blob);
        }
        Op::VerifyManifest(tree) => local.keeps = shared.manifests.has(tree).then_some(tree),
        Op::NameManifest(tree) => {
            shared.manifests.add(tree);
            local.keeps = Some(tree);
        }
        Op::LockRef(name) | Op::LockHistory(name) => {
            if shared.ref_locks.has(name) {
                return Ok(Step::Waits);
            }
            shared.ref_locks.add(name);
            local.read = shared.refs[name as usize];
        }
        Op::ReadHistory(name) => local.read = shared.refs[name as usize],
        Op::NameRef {
            tree,
            name,
            keeps_history,
        } => {
            let mut new = local.read;
            if new.current != Some(tree) {
                retire(&mut new);
                new.history.remove(tree);
                new.current = Some(tree);
            }
            if !keeps_history {
                new.history = Set::default();
            }
            write_ref(&mut shared, &local, name, new)?;
        }
        Op::RetireRef(name) => {
            let mut new = local.read;
            retire(&mut new);
            write_ref(&mut shared, &local, name, new)?;
        }
        Op::ForgetRef(name) => write_ref(&mut shared, &local, name, RefFile::default())?,
        Op::UnlockRef(name) | Op::UnlockHistory(name) => shared.ref_locks.remove(name),
        Op::HoldForPublish(tree) | Op::TakeHold(tree) if shared.dropping.has(tree) && !is(Mutant::HoldDropping) => {
            return Ok(Step::Waits);
        }
        Op::HoldForPublish(tree) => shared.holds[tree as usize] += 1,
        Op::FindHeld(tree) => local.gave_up = !shared.manifests.has(tree),
        Op::NoteHold(tree) => {
            shared.holds[tree as usize] += 1;
            local.held = Some(tree);
        }
        Op::TakeHold(tree) => match shared.manifests.has(tree) {
            true => {
                shared.holds[tree as usize] += 1;
                local.held = Some(tree);
            }
            false => local.gave_up = true,
        },
        Op::DropHold(tree) => {
            shared.holds[tree as usize] -= 1;
            local.held = None;
            // In `publish` too: from here on the ref keeps the manifest.
            local.keeps = None;
            if let (Some((_, trees)), false) = (&mut shared.sticky, is(Mutant::NothingSticky)) {
                trees.add(tree);
            }
        }
        Op::EndBuild => {
            let leases = local.leases.take().unwrap_or_default();
            (local.relies, local.looked, local.staged) = Default::default();
            if let (Some((blobs, _)), false) = (&mut shared.sticky, is(Mutant::NothingSticky)) {
                *blobs = blobs.join(leases);
            }
        }
        Op::RecordLayer(tree) => shared.holders.add(tree),
        Op::RemoveLayer(tree) => shared.holders.remove(tree),
        Op::LockCollecting => {
            if shared.collecting && !is(Mutant::NoCollectingLock) {
                return Ok(Step::Waits);
            }
            shared.collecting = true;
        }
        Op::UnlockCollecting => {
            shared.collecting = false;
            local.mark = Mark::default();
        }
        Op::BeginMark => shared.sticky = Some(Default::default()),
        Op::EndSweep => shared.sticky = None,
        _ => return collect(op, shared, local, others, mutant),
    }
    Ok(Step::To(vec![(shared, local)]))
}

/// The steps that only a collection takes.
fn collect(op: Op, mut shared: Shared, mut local: Local, others: Set, mutant: Option<Mutant>) -> Result<Step, Loss> {
    let is = |other| mutant == Some(other);
    let leased = others.join(shared.sticky.map(|(blobs, _)| blobs).unwrap_or_default());
    let mark = &mut local.mark;
    match op {
        Op::ReadRef(name) => {
            let entry = shared.refs[name as usize];
            mark.live = entry
                .current
                .iter()
                .fold(mark.live, |all, tree| all.join(Set::of(&[*tree])));
            mark.history = mark.history.join(entry.history);
        }
        Op::ReadHolders => mark.live = mark.live.join(shared.holders),
        Op::ReadHolds => {
            mark.hold_only = shared.held().without(mark.live.join(mark.history));
            mark.live = mark.live.join(shared.held());
        }
        Op::ReadManifest(tree) => match shared.manifests.has(tree) {
            true => mark.read.add(tree),
            false if mark.hold_only.has(tree) => {}
            false => return Err(format!("the mark takes tree {tree} for damaged: its manifest is gone")),
        },
        Op::ListOrphan(tree) => {
            if shared.manifests.has(tree) {
                mark.orphans.add(tree);
            }
        }
        Op::Scan(blob) => {
            // The code leaves out what is leased already. It may see that too late, so here it never does.
            if shared.blobs.has(blob) {
                mark.free.add(blob);
            }
        }
        // Which history goes is the policy's business: all of it, or none.
        Op::Plan => {
            let dropped = mark.history.without(mark.live);
            let mut futures = vec![(shared.clone(), planned(&local, dropped))];
            if dropped != Set::default() {
                futures.push((shared, planned(&local, Set::default())));
            }
            return Ok(Step::To(futures));
        }
        Op::ForgetNamed => mark.named_now = Set::default(),
        Op::ReadRefAgain(name) => mark.named_now = mark.named_now.join(shared.refs[name as usize].trees()),
        Op::DropOrphan(tree) | Op::DropPlanned(tree) => {
            let held = shared.held().has(tree) && !is(Mutant::DropHeldManifests);
            if !mark.named_now.has(tree) && !held {
                shared.dropping.add(tree);
                mark.dropping.add(tree);
            }
        }
        Op::UnlinkManifest(tree) => shared.manifests.remove(tree),
        Op::Dropped(tree) => {
            shared.dropping.remove(tree);
            mark.dropping.remove(tree);
        }
        Op::ForgetProtected => mark.protected = Set::default(),
        Op::LookAgain(tree) => {
            if shared.manifests.has(tree) {
                mark.protected = mark.protected.join(TREES[tree as usize]);
            }
        }
        Op::CheckLeases(blob) => match leased.has(blob) {
            true => mark.doomed.remove(blob),
            false => mark.doomed.add(blob),
        },
        Op::SweepFirst(blob) | Op::SweepLater(blob) => {
            let goes = match mutant {
                Some(Mutant::SweepWithoutLeases) => true,
                Some(Mutant::LeasesThenLock) => mark.doomed.has(blob),
                _ => !leased.has(blob),
            };
            if goes {
                shared.leaving.add(blob);
                mark.leaving.add(blob);
            }
        }
        Op::Unlink(blob) => shared.blobs.remove(blob),
        Op::Left(blob) => {
            shared.leaving.remove(blob);
            mark.leaving.remove(blob);
        }
        Op::DropHistory(name) => {
            let mut new = local.read;
            new.history = new.history.without(mark.drop);
            // As the code has it: a ref in which nothing is found to drop is not written.
            if new != local.read {
                write_ref(&mut shared, &local, name, new)?;
            }
        }
        other => unreachable!("{other:?} is no step of a collection"),
    }
    Ok(Step::To(vec![(shared, local)]))
}

/// `retention::plan` with no age kept, which deletes all that it ever may, if it drops `dropped`.
fn planned(local: &Local, dropped: Set) -> Local {
    let mut local = local.clone();
    let mark = &mut local.mark;
    mark.drop = dropped;
    let goes = mark.free.without(blobs_of(mark.read.without(dropped)));
    // `Run::execute`: what no manifest of the mark names goes first.
    let named = blobs_of(mark.read);
    mark.first = goes.without(named);
    mark.later = goes.without(mark.first);
    local
}

fn retire(entry: &mut RefFile) {
    if let Some(tree) = entry.current.take() {
        entry.history.add(tree);
    }
}

fn write_ref(shared: &mut Shared, local: &Local, name: u8, new: RefFile) -> Result<(), Loss> {
    let entry = &mut shared.refs[name as usize];
    if *entry != local.read {
        return Err(format!(
            "a change of ref {name} is lost: {entry:?} was {:?} when it was read",
            local.read
        ));
    }
    *entry = new;
    Ok(())
}

/// The rules, after a step.
pub fn check(shared: &Shared, locals: &[Local]) -> Result<(), Loss> {
    let not_whole = |trees: Set| trees.members().find(|tree| !shared.is_whole(*tree));
    let lost = |tree: u8, by: String| Err(format!("tree {tree} is not whole: it is named by {by}"));
    for (name, entry) in shared.refs.iter().enumerate() {
        if let Some(tree) = not_whole(entry.trees()) {
            return lost(tree, format!("ref {name}"));
        }
    }
    if let Some(tree) = not_whole(shared.holders) {
        return lost(tree, "a layer".to_owned());
    }
    for (worker, local) in locals.iter().enumerate() {
        if let Some(tree) = local.held.filter(|tree| !shared.is_whole(*tree)) {
            return lost(tree, format!("the hold of worker {worker}"));
        }
        if let Some(tree) = local.keeps.filter(|tree| !shared.manifests.has(*tree)) {
            return Err(format!(
                "the manifest of tree {tree} is gone, which worker {worker} publishes"
            ));
        }
        let lost = local.relies.without(shared.blobs);
        if lost != Set::default() {
            return Err(format!(
                "blobs {lost:?} are gone, which the build of worker {worker} needs"
            ));
        }
    }
    Ok(())
}

/// The leases of every build but one.
pub fn leases_of_others(locals: &[Local], worker: usize) -> Set {
    let others = locals.iter().enumerate().filter(|(other, _)| *other != worker);
    others
        .filter_map(|(_, local)| local.leases)
        .fold(Set::default(), Set::join)
}

/// Every blob by number.
pub fn all_blobs() -> std::ops::Range<u8> {
    0..BLOBS
}
