//! Exponential back-off with jitter, per object.

use std::time::{Duration, Instant};

/// Counts an object's failures and says when to try again: 0.25 s after the first, doubling, at most 30 s; so at most
/// twelve tries in two minutes.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
    not_before: Option<Instant>,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(30);

    /// Notes a failure and gives the time before which not to try again.
    pub fn failed(&mut self, now: Instant) -> Instant {
        let doubled = Self::FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(Self::LONGEST);
        self.failures = self.failures.saturating_add(1);
        // Up to a fifth more, so that what failed together does not come back together.
        let due = now + doubled.mul_f64(1.0 + rand::random::<f64>() / 5.0);
        self.not_before = Some(due);
        due
    }

    /// Notes a success.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// When the next try may be; `None` is at once.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.not_before.filter(|due| *due > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_minutes_of_failures_are_at_most_fifteen_tries() {
        let (start, mut backoff, mut tries) = (Instant::now(), Backoff::default(), 0);
        let mut now = start;
        while now < start + Duration::from_secs(120) {
            tries += 1;
            now = backoff.failed(now);
        }
        assert!((8..=15).contains(&tries), "{tries}");
        backoff.succeeded();
        assert_eq!(backoff.due(now), None);
        assert!(backoff.failed(now) < now + Duration::from_millis(301));
    }
}
