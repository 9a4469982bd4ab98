//! Going through every order of the steps of some works.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::fmt::Write;

use super::program::{Op, Thing, Work};
use super::state::{Local, Loss, Set, Shared, Step, blobs_of, check, is_idle, leases_of_others, packed, step};
use super::{Mutant, TREES};

type State = (Shared, Vec<Local>);

/// How a state was reached.
struct Reached {
    from: usize,
    worker: usize,
    op: Op,
}

struct Explorer<'a> {
    works: &'a [Work],
    mutant: Option<Mutant>,
    programs: Vec<Vec<Op>>,
    /// What all but one worker come near: see [`Explorer::is_unseen`].
    others: Vec<HashSet<Thing>>,
    ways: Vec<Option<Reached>>,
    /// Disks that a new process was tried on.
    restarted: &'a RefCell<HashSet<Vec<u8>>>,
}

/// Tries every order. Returns how many states there are, or the first loss with the steps that lead there: a shortest
/// way.
///
/// `restarted` remembers between explorations on which disks a new process was tried.
pub fn explore(
    store: &Shared,
    works: &[Work],
    mutant: Option<Mutant>,
    restarted: &RefCell<HashSet<Vec<u8>>>,
) -> Result<usize, Loss> {
    Explorer::new(works, mutant, restarted).run(store)
}

impl<'a> Explorer<'a> {
    fn new(works: &'a [Work], mutant: Option<Mutant>, restarted: &'a RefCell<HashSet<Vec<u8>>>) -> Self {
        let programs: Vec<Vec<Op>> = works.iter().map(|work| work.program(mutant)).collect();
        let others = |worker: usize| {
            let others = (0..works.len()).filter(|other| *other != worker);
            // Of two collections, one has ended when the other begins.
            let both = |other: &usize| works[worker] == Work::Collect && works[*other] == Work::Collect;
            others
                .filter(|other| mutant == Some(Mutant::NoCollectingLock) || !both(other))
                .flat_map(|other| programs[other].iter().flat_map(|op| near(*op)))
                .collect()
        };
        Self {
            works,
            mutant,
            others: (0..works.len()).map(others).collect(),
            programs,
            ways: vec![None],
            restarted,
        }
    }

    fn run(mut self, store: &Shared) -> Result<usize, Loss> {
        let first = (store.clone(), vec![Local::default(); self.works.len()]);
        let mut seen: HashSet<Vec<u8>> = HashSet::from([packed(&first.0, &first.1)]);
        let mut todo = VecDeque::from([(first, 0)]);
        while let Some((state, at)) = todo.pop_front() {
            let locals = &state.1;
            let mut moved = false;
            for (worker, local) in locals.iter().enumerate() {
                let Some(op) = self.programs[worker].get(usize::from(local.next)).copied() else {
                    continue;
                };
                let futures = self
                    .futures(&state, worker)
                    .map_err(|loss| self.told(loss, at, Some((worker, op))))?;
                moved |= !futures.is_empty();
                for future in futures {
                    if seen.insert(packed(&future.0, &future.1)) {
                        todo.push_back((future, self.ways.len()));
                        let from = at;
                        self.ways.push(Some(Reached { from, worker, op }));
                    }
                }
            }
            let ended = |(local, program): (&Local, &Vec<Op>)| usize::from(local.next) == program.len();
            if !moved && !locals.iter().zip(&self.programs).all(ended) {
                return Err(self.told("all wait for each other".to_owned(), at, None));
            }
        }
        Ok(seen.len())
    }

    /// Every state that may follow when one worker takes its next step, and those after it that nobody sees. None if it
    /// waits.
    fn futures(&self, (shared, locals): &State, worker: usize) -> Result<Vec<State>, Loss> {
        let program = &self.programs[worker];
        let mut found = Vec::new();
        let mut under_way = vec![(shared.clone(), locals.clone())];
        let mut first = true;
        while let Some((shared, locals)) = under_way.pop() {
            let local = &locals[worker];
            let next = program.get(usize::from(local.next)).copied();
            let Some(op) = next.filter(|op| first || self.is_unseen(worker, *op)) else {
                found.push((shared, locals));
                continue;
            };
            let futures = match step(op, &shared, local, leases_of_others(&locals, worker), self.mutant)? {
                // Only a first step takes a lock.
                Step::Waits => return Ok(Vec::new()),
                Step::To(futures) => futures,
            };
            first = false;
            for (shared, mut local) in futures {
                advance(program, &mut local);
                let mut locals = locals.clone();
                locals[worker] = local;
                check(&shared, &locals)?;
                self.restart(&shared)?;
                under_way.push((shared, locals));
            }
        }
        Ok(found)
    }

    /// Should the process die now, a new one finds its way.
    fn restart(&self, shared: &Shared) -> Result<(), Loss> {
        let disk = shared.disk();
        match self.mutant.is_none() && self.restarted.borrow_mut().insert(packed(&disk, &[])) {
            true => restart(disk),
            false => Ok(()),
        }
    }

    /// Can nobody else tell when the step is taken? Then it belongs to the one before: that is what keeps the number of
    /// orders small. So it is with what is about a thing that no other worker comes near, with giving up a lock (what
    /// the others do while they wait for it, they can do after), and with a worker's own variables.
    fn is_unseen(&self, worker: usize, op: Op) -> bool {
        match op {
            Op::UnlockRef(_) | Op::UnlockHistory(_) | Op::UnlockCollecting | Op::ForgetNamed | Op::ForgetProtected => {
                true
            }
            Op::LockRef(_) | Op::LockHistory(_) | Op::LockCollecting => false,
            op => op.thing().is_some_and(|thing| !self.others[worker].contains(&thing)),
        }
    }

    /// A loss and the way to it.
    fn told(&self, loss: Loss, mut at: usize, last: Option<(usize, Op)>) -> Loss {
        let mut steps: Vec<(usize, Op)> = last.into_iter().collect();
        while let Some(reached) = &self.ways[at] {
            steps.push((reached.worker, reached.op));
            at = reached.from;
        }
        let mut text = loss;
        for (worker, op) in steps.into_iter().rev() {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  worker {worker} ({:?}): {op:?}", self.works[worker]);
        }
        text
    }
}

/// What a step comes near: whoever names a tree relies on its blobs.
fn near(op: Op) -> Vec<Thing> {
    let mut things: Vec<Thing> = op.thing().into_iter().collect();
    if let Some(Thing::Tree(tree)) = op.thing() {
        things.extend(TREES[usize::from(tree)].members().map(Thing::Blob));
    }
    things
}

/// To the next step that does anything.
fn advance(program: &[Op], local: &mut Local) {
    local.next += 1;
    while program
        .get(usize::from(local.next))
        .is_some_and(|op| is_idle(*op, local))
    {
        local.next += 1;
    }
}

/// A new process after the old one has died: its collection leaves exactly what is needed.
fn restart(disk: Shared) -> Result<(), Loss> {
    let needed = disk.needed();
    let program = Work::Collect.program(None);
    let (mut shared, mut local) = (disk, Local::default());
    while let Some(op) = program.get(usize::from(local.next)) {
        match step(*op, &shared, &local, Set::default(), None)? {
            Step::Waits => return Err("a collection alone waits for something".to_owned()),
            // The first future drops all the history that it may.
            Step::To(futures) => (shared, local) = futures.into_iter().next().ok_or("no future")?,
        }
        advance(&program, &mut local);
        check(&shared, std::slice::from_ref(&local))?;
    }
    match (shared.manifests, shared.blobs) == (needed, blobs_of(needed)) {
        true => Ok(()),
        false => Err(format!(
            "a collection after a restart leaves {shared:?}, but trees {needed:?} are needed"
        )),
    }
}
