//! How often the agent writes its node's status.
//!
//! Thousands of agents share one API server, and a full NodeStore is large. A change is written at once while there is
//! credit; credit comes back at one write in two seconds. What waits is written together.

use std::time::{Duration, Instant};

const CREDIT: f64 = 60.0;
const PERIOD: Duration = Duration::from_secs(2);

/// A token bucket.
#[derive(Debug)]
pub struct Throttle {
    credit: f64,
    at: Instant,
}

impl Throttle {
    pub fn new(now: Instant) -> Self {
        Self {
            credit: CREDIT,
            at: now,
        }
    }

    /// Takes one write's credit; without any, says when there will be some.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() / PERIOD.as_secs_f64();
        self.credit = (self.credit + gained).min(CREDIT);
        self.at = now;
        if self.credit >= 1.0 {
            self.credit -= 1.0;
            return Ok(());
        }
        Err(now + PERIOD.mul_f64(1.0 - self.credit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_written_at_once_and_a_flood_every_two_seconds() {
        let start = Instant::now();
        let mut throttle = Throttle::new(start);
        for _ in 0..CREDIT as usize {
            assert_eq!(throttle.take(start), Ok(()));
        }
        let next = throttle.take(start).unwrap_err();
        assert!(next > start + PERIOD - Duration::from_millis(1) && next <= start + PERIOD);
        let writes = (0..6000)
            .filter(|tick| throttle.take(start + Duration::from_millis(tick * 10)).is_ok())
            .count();
        assert!((29..=30).contains(&writes), "{writes} writes in a minute of flood");
    }
}
