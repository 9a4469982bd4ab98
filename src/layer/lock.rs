//! Locks by name, so that work on one layer does not wait for work on another.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A mutex per key; a key that nobody locks takes no memory.
#[derive(Debug)]
pub(super) struct Locks<K>(Mutex<HashMap<K, Arc<Mutex<()>>>>);

impl<K> Default for Locks<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone> Locks<K> {
    /// Runs `work` while nobody else works under the same key.
    pub fn with<T>(&self, key: &K, work: impl FnOnce() -> T) -> T {
        let lock = relock(&self.0).entry(key.clone()).or_default().clone();
        let result = {
            // The lock guards files, not memory: a thread that panicked left nothing half-written that the next
            // one would not look at anyway.
            let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            work()
        };
        let mut all = relock(&self.0);
        drop(lock);
        if all.get(key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            all.remove(key);
        }
        result
    }
}

/// Locks a mutex whose data is whole at any moment, whoever panicked while holding it.
pub(super) fn relock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    #[test]
    fn one_key_is_locked_once_and_forgotten_afterwards() {
        let locks = Locks::default();
        let inside = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        locks.with(&"a", || {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        locks.with(&"a", || locks.with(&"b", || ()));
        assert!(relock(&locks.0).is_empty());
    }
}
