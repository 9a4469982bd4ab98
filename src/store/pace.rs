//! Reading or removing no faster than is allowed.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What is not used in this time is lost, so that a pause is not made up for by a burst.
const CREDIT: Duration = Duration::from_millis(100);
/// Longest sleep without a look whether to stop.
const SLICE: Duration = Duration::from_millis(50);

pub struct Pace {
    /// Bytes, or whatever is counted, per second.
    rate: Option<NonZeroU64>,
    /// When the next one may be.
    next: Instant,
}

impl Pace {
    pub fn new(rate: Option<NonZeroU64>) -> Self {
        Self {
            rate,
            next: Instant::now(),
        }
    }

    /// How much to read at once, of at most `limit` bytes: no more than a tenth of a second's worth, in whole pages.
    pub fn chunk(&self, limit: usize) -> usize {
        match self.rate {
            Some(rate) => usize::try_from(rate.get() / 10).unwrap_or(limit).clamp(4096, limit) & !4095,
            None => limit,
        }
    }

    /// How many to do between two waits, of at most `limit`: no more than a tenth of a second's worth, but one.
    pub fn batch(&self, limit: usize) -> usize {
        match self.rate {
            Some(rate) => usize::try_from(rate.get() / 10).unwrap_or(limit).clamp(1, limit),
            None => limit,
        }
    }

    /// Waits for as long as so many bytes, or others, should have taken, less what they did take. `false` if cancelled.
    pub fn wait(&mut self, count: u64, cancel: &AtomicBool) -> bool {
        if let Some(rate) = self.rate {
            let cost = Duration::from_secs_f64(count as f64 / rate.get() as f64);
            let now = Instant::now();
            self.next = self.next.max(now.checked_sub(CREDIT).unwrap_or(now)) + cost;
        }
        sleep_until(self.next, cancel)
    }
}

/// `false` if cancelled.
pub(super) fn sleep_until(end: Instant, cancel: &AtomicBool) -> bool {
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if left.is_zero() || cancel.load(Ordering::Relaxed) {
            break;
        }
        thread::sleep(left.min(SLICE));
    }
    !cancel.load(Ordering::Relaxed)
}
