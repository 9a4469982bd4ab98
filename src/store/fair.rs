//! A lock that is held for long, and that everybody who waits for it gets in turn.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use super::files;

/// Those who wait get it in the order in which they came. Of a plain [`Mutex`], who lets go of it and wants it again at
/// once has it before any who waited: two callers that collect again and again would keep a verification waiting for ever.
#[derive(Debug, Default)]
pub(super) struct FairLock {
    lock: Mutex<()>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    /// The tickets of those who wait, the next one first.
    queue: VecDeque<u64>,
}

/// A place among those who wait, until it is dropped.
struct Ticket<'a>(&'a FairLock, u64);

impl FairLock {
    /// Takes the lock; `None` if that is cancelled before.
    pub fn lock_unless(&self, cancel: &AtomicBool) -> Option<MutexGuard<'_, ()>> {
        files::point();
        let ticket = self.queue_up();
        loop {
            if ticket.is_next() {
                match self.lock.try_lock() {
                    Ok(guard) => return Some(guard),
                    Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                    Err(TryLockError::WouldBlock) => {}
                }
            }
            if cancel.load(Ordering::Relaxed) {
                return None;
            }
            files::let_others(Duration::from_millis(10));
        }
    }

    /// Takes the lock, however long that takes.
    pub fn lock(&self) -> MutexGuard<'_, ()> {
        let never = AtomicBool::new(false);
        self.lock_unless(&never).expect("nobody cancels")
    }

    /// Whether somebody has it. That may change at any moment.
    pub fn is_held(&self) -> bool {
        matches!(self.lock.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// How many wait for it.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.tickets().queue.len()
    }

    fn queue_up(&self) -> Ticket<'_> {
        let mut waiting = self.tickets();
        waiting.last += 1;
        let number = waiting.last;
        waiting.queue.push_back(number);
        Ticket(self, number)
    }

    /// Held for a moment only, at which no other thread of a test takes its turn.
    fn tickets(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Ticket<'_> {
    fn is_next(&self) -> bool {
        self.0.tickets().queue.front() == Some(&self.1)
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.0.tickets().queue.retain(|number| *number != self.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_until(is: impl Fn() -> bool) {
        let begun = std::time::Instant::now();
        while !is() {
            assert!(begun.elapsed() < Duration::from_secs(60), "still not so");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn who_wants_it_again_comes_after_those_who_waited() {
        let lock = &FairLock::default();
        let order = &Mutex::new(Vec::new());
        let mut mine = lock.lock();
        std::thread::scope(|scope| {
            for number in 1..4 {
                scope.spawn(move || {
                    let _guard = lock.lock();
                    order.lock().unwrap().push(number);
                });
                wait_until(|| lock.waiting() == number);
            }
            drop(mine);
            mine = lock.lock();
            order.lock().unwrap().push(4);
            drop(mine);
        });
        assert_eq!(*order.lock().unwrap(), [1, 2, 3, 4]);
        assert_eq!(lock.waiting(), 0);
    }

    #[test]
    fn who_waits_no_longer_keeps_nobody_waiting() {
        let lock = &FairLock::default();
        let cancel = &AtomicBool::new(false);
        let guard = lock.lock();
        assert!(lock.is_held());
        std::thread::scope(|scope| {
            let cancelled = scope.spawn(|| lock.lock_unless(cancel).is_none());
            wait_until(|| lock.waiting() == 1);
            let other = scope.spawn(|| drop(lock.lock()));
            wait_until(|| lock.waiting() == 2);
            cancel.store(true, Ordering::Relaxed);
            assert!(cancelled.join().unwrap());
            drop(guard);
            other.join().unwrap();
        });
        assert!(!lock.is_held());
    }

    #[test]
    fn a_holder_that_panicked_holds_it_no_more() {
        let lock = &FairLock::default();
        let panicked = std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _guard = lock.lock();
                panic!("as it should");
            });
            holder.join().is_err()
        });
        assert!(panicked && !lock.is_held());
        drop(lock.lock());
    }
}
