//! Threads of a test that take turns, so that an order of steps is chosen by a seed, and can be had again.
//!
//! Only the thread whose turn it is runs. The turn may pass on wherever the store takes a lock or asks the kernel about a
//! file (`files.rs` calls [`point`] there). For threads that belong to no [`take_turns`], all this does nothing.

use std::cell::RefCell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};

/// So many passes in a row of threads that wait for locks are a deadlock.
const PATIENCE: u32 = 100_000;

struct Turns {
    state: Mutex<State>,
    passed: Condvar,
}

struct State {
    rng: StdRng,
    /// How likely each passes its turn on at a point. They differ, so that one is slow while another goes far.
    chances: Vec<f64>,
    turn: usize,
    alive: Vec<bool>,
    waited: u32,
}

thread_local! {
    static MINE: RefCell<Option<(Arc<Turns>, usize)>> = const { RefCell::new(None) };
}

/// Runs all of them, one at a time, in an order that the seed decides. A panic of one is passed on when all have ended.
pub fn take_turns(seed: u64, works: Vec<Box<dyn FnOnce() + Send + '_>>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let state = State {
        chances: works
            .iter()
            .map(|_| [0.3, 0.05, 0.01, 0.002][rng.random_range(0..4)])
            .collect(),
        turn: rng.random_range(0..works.len()),
        alive: vec![true; works.len()],
        waited: 0,
        rng,
    };
    let turns = Arc::new(Turns {
        state: Mutex::new(state),
        passed: Condvar::new(),
    });
    std::thread::scope(|scope| {
        for (me, work) in works.into_iter().enumerate() {
            let turns = turns.clone();
            scope.spawn(move || {
                let _end = End(&turns, me);
                turns.wait(turns.lock(), me);
                MINE.set(Some((turns.clone(), me)));
                work();
            });
        }
    });
}

/// Ends a thread's turns, also when it panics.
struct End<'a>(&'a Turns, usize);

impl Drop for End<'_> {
    fn drop(&mut self) {
        MINE.set(None);
        let mut state = self.0.lock();
        state.alive[self.1] = false;
        state.waited = 0;
        self.0.pass(&mut state, self.1);
    }
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, state: MutexGuard<'_, State>, me: usize) {
        let ours = self.passed.wait_while(state, |state| state.turn != me);
        drop(ours.unwrap_or_else(PoisonError::into_inner));
    }

    /// The others go on, and this one when its turn comes again.
    fn give_up(&self, me: usize) {
        let mut state = self.lock();
        state.waited += 1;
        assert!(state.waited < PATIENCE, "all wait for each other");
        self.pass(&mut state, me);
        self.wait(state, me);
    }

    fn pass(&self, state: &mut State, me: usize) {
        let others = (0..state.alive.len()).filter(|other| *other != me && state.alive[*other]);
        if let Some(other) = others.choose(&mut state.rng) {
            state.turn = other;
            self.passed.notify_all();
        }
    }
}

fn mine() -> Option<(Arc<Turns>, usize)> {
    MINE.with_borrow(|mine| mine.clone())
}

/// Another thread may go on here.
pub fn point() {
    if let Some((turns, me)) = mine() {
        let mut state = turns.lock();
        state.waited = 0;
        let chance = state.chances[me];
        if state.rng.random_bool(chance) {
            turns.pass(&mut state, me);
        }
        turns.wait(state, me);
    }
}

/// Another thread goes on here, for this one waits for it. `false` if this one takes no turns.
pub fn pass_on() -> bool {
    let Some((turns, me)) = mine() else { return false };
    turns.give_up(me);
    true
}

/// Takes a lock; the others go on while it is taken.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    point();
    let Some((turns, me)) = mine() else {
        return mutex.lock().unwrap_or_else(PoisonError::into_inner);
    };
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => turns.give_up(me),
        }
    }
}
