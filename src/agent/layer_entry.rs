//! A layer's turn: what is known of its object, what came of the work on it, and when it is worked on again.

use std::time::{Duration, Instant};

use super::layer_outcome::Outcome;
use super::layer_plan::Observed;
use crate::api::conditions::reasons;
use crate::cluster::{Backoff, Said};
use crate::layer::Room;

/// A layer's object and its turn.
pub(super) struct Entry {
    pub observed: Observed,
    pub outcome: Option<Outcome>,
    pub at_work: bool,
    pub due: bool,
    pub backoff: Backoff,
    pub writing: bool,
    pub write_backoff: Backoff,
    /// The disk was asked for its record, and has none.
    pub is_new: bool,
    /// What the last event said.
    pub announced: Option<Said>,
    pub announced_full: Option<Said>,
    /// When the deletion was first held up by somebody who uses the layer.
    pub in_use_since: Option<Instant>,
    /// How often its own file system stopped taking writes, and when it may be brought back again.
    stops: Backoff,
    /// When it was last seen like that.
    stopped: Option<Instant>,
}

/// After so long without it, a stop is the first again.
const STOPS_FORGOTTEN: Duration = Duration::from_secs(2 * 3600);

impl Entry {
    pub fn new(observed: Observed) -> Self {
        Self {
            observed,
            outcome: None,
            at_work: false,
            due: true,
            backoff: Backoff::new(Duration::from_millis(250), Duration::from_secs(60)),
            writing: false,
            write_backoff: Backoff::default(),
            is_new: false,
            announced: None,
            announced_full: None,
            in_use_since: None,
            stops: Backoff::new(Duration::from_secs(60), Duration::from_secs(3600)),
            stopped: None,
        }
    }

    pub fn settle(&mut self, outcome: Outcome, now: Instant) {
        if outcome.again() {
            self.due = true;
            self.backoff.failed(now);
        } else {
            self.backoff.succeeded();
        }
        let in_use = self.observed.deleting && outcome.verdict().reason() == reasons::IN_USE;
        self.in_use_since = in_use.then(|| self.in_use_since.unwrap_or(now));
        if matches!(outcome, Outcome::Released) {
            // The next step drops the finalizer.
            self.due = true;
        }
        self.outcome = Some(outcome);
    }

    pub fn is_mounted(&self) -> bool {
        !self.observed.deleting && matches!(self.outcome, Some(Outcome::Mounted { .. }))
    }

    pub fn waits_for_tree(&self) -> bool {
        self.outcome.as_ref().is_some_and(|outcome| {
            [reasons::NOT_PLACED, reasons::MANIFEST_NOT_READY].contains(&outcome.verdict().reason())
        })
    }

    pub fn note_use(&mut self, room: &Room, now: Instant) {
        if let Some(outcome) = &mut self.outcome {
            outcome.note_use(room);
        }
        if room.stopped && !self.at_work {
            self.bring_back(now);
        }
    }

    /// Has a layer prepared again whose own file system takes no writes any more, which mends it; and if that was tried a
    /// moment ago, later: a check reads much of a disk that is not well, and each ends with who used the layer having to
    /// start again.
    fn bring_back(&mut self, now: Instant) {
        if self
            .stopped
            .is_none_or(|before| now.duration_since(before) > STOPS_FORGOTTEN)
        {
            self.stops.succeeded();
        }
        self.stopped = Some(now);
        self.due = true;
        match self.stops.due(now) {
            None => drop(self.stops.failed(now)),
            Some(due) => {
                self.backoff.wait_until(due);
                // The one after that.
                self.stops.failed(due);
                let message = "its own file system takes no writes any more, again, after it was checked and mounted anew \
                               not long ago; the node's kernel log tells of the error. It is tried again within the hour";
                self.outcome = Some(Outcome::Waiting {
                    reason: reasons::FILE_SYSTEM_STOPPED,
                    message: message.to_owned(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::layer_plan::tests::observed;
    use super::*;
    use crate::store::TreeDigest;

    #[test]
    fn a_layer_that_stops_again_and_again_is_brought_back_less_and_less_often() {
        let mounted = || Outcome::Mounted {
            tree: TreeDigest::from_bytes([7; 32]),
            path: "/x".into(),
            size: Some(1 << 30),
            lost: false,
            used: Some(1),
            short: None,
            refused: None,
        };
        let stopped = Room {
            stopped: true,
            ..Room::default()
        };
        let mut entry = Entry::new(observed(json!({})));
        let start = Instant::now();
        let mut now = start;
        let mut tries = Vec::new();
        entry.due = false;
        entry.settle(mounted(), now);
        while now < start + Duration::from_secs(6 * 3600) {
            now += Duration::from_secs(30);
            if entry.is_mounted() {
                entry.note_use(&stopped, now);
            }
            if entry.due && entry.backoff.due(now).is_none() {
                tries.push(now);
                entry.due = false;
                entry.settle(mounted(), now);
            } else if entry.due {
                let verdict = entry.outcome.as_ref().unwrap().verdict();
                assert_eq!(verdict.reason(), reasons::FILE_SYSTEM_STOPPED);
            }
        }
        assert_eq!(tries[0], start + Duration::from_secs(30), "the first time at once");
        assert!((8..=12).contains(&tries.len()), "{}", tries.len());

        // Much later it is the first time again.
        now += STOPS_FORGOTTEN + Duration::from_secs(3600);
        entry.settle(mounted(), now);
        entry.due = false;
        entry.note_use(&Room::default(), now);
        assert!(!entry.due && entry.is_mounted());
        entry.note_use(&stopped, now);
        assert!(entry.due && entry.backoff.due(now).is_none());
    }
}
