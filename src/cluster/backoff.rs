//! Exponential back-off with jitter, per object.

use std::time::{Duration, Instant};

/// Counts an object's failures and says when to try again.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
    not_before: Option<Instant>,
}

impl Default for Backoff {
    /// For calls to the API server: 0.25 s after the first failure, doubling, at most 30 s; so at most twelve tries in
    /// two minutes.
    fn default() -> Self {
        Self::new(Duration::from_millis(250), Duration::from_secs(30))
    }
}

impl Backoff {
    /// Waits `first` after the first failure, then doubles, up to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            failures: 0,
            not_before: None,
        }
    }

    /// For work that reads whole trees: 1 s after the first failure, at most 5 minutes.
    pub fn slow() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(300))
    }

    /// Notes a failure and gives the time before which not to try again.
    pub fn failed(&mut self, now: Instant) -> Instant {
        let doubled = self.first.saturating_mul(1 << self.failures.min(16)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        // Up to a fifth more, so that what failed together does not come back together.
        let due = now + doubled.mul_f64(1.0 + rand::random::<f64>() / 5.0);
        self.not_before = Some(due);
        due
    }

    /// Lets the next try be no sooner than that.
    pub fn wait_until(&mut self, due: Instant) {
        self.not_before = self.not_before.max(Some(due));
    }

    /// Notes a success.
    pub fn succeeded(&mut self) {
        (self.failures, self.not_before) = (0, None);
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
