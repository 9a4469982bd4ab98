//! How a layer stands, and what its status says of that.

use std::io::ErrorKind;

use jiff::Timestamp;

use super::layer_plan::Observed;
use crate::api::conditions::{NEARLY_FULL, Verdict, Wanted, merge, reasons};
use crate::api::{WritableLayerStatus, human_size, int64};
use crate::layer::{self, Room};
use crate::store::{self, TreeDigest};

/// How a layer stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Mounted {
        tree: TreeDigest,
        path: String,
        size: Option<u64>,
        lost: bool,
        used: Option<u64>,
        short: Option<Short>,
        /// Why it has not the limit that is asked for; it can be used all the same.
        refused: Option<Box<Outcome>>,
    },
    Waiting {
        reason: &'static str,
        message: String,
    },
    Failed {
        reason: &'static str,
        message: String,
    },
    Stalled {
        reason: &'static str,
        message: String,
    },
    Released,
}

/// Of what a layer has little left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    Bytes,
    Inodes,
    /// The node's disk has none left for the layer, whatever its limit.
    Disk,
}

/// What an error of the layer says of it.
pub(super) fn outcome(error: layer::Error) -> Outcome {
    use layer::Error;
    let message = error.to_string();
    match error {
        Error::DataLost { .. } => Outcome::Stalled {
            reason: reasons::DATA_LOST,
            message,
        },
        Error::InUse { .. } => Outcome::Waiting {
            reason: reasons::IN_USE,
            message,
        },
        Error::Stopped { .. } => Outcome::Waiting {
            reason: reasons::FILE_SYSTEM_STOPPED,
            message,
        },
        Error::Immutable { .. }
        | Error::InvalidId(_)
        | Error::Shrink { .. }
        | Error::TooSmall { .. }
        | Error::Unlimited { .. } => Outcome::Stalled {
            reason: reasons::INVALID_SPEC,
            message,
        },
        // It may be stored anew as it was, which nobody tells.
        Error::Store(store::Error::MissingManifest { .. }) => Outcome::Failed {
            reason: reasons::MANIFEST_NOT_READY,
            message,
        },
        // However often it is tried.
        Error::Unmountable { .. } => Outcome::Stalled {
            reason: reasons::MOUNT_FAILED,
            message,
        },
        Error::Store(error) if error.is_disk_full() => Outcome::Failed {
            reason: reasons::DISK_FULL,
            message,
        },
        // There was no room for the image, or for the layer's own file.
        Error::Io { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Outcome::Failed {
                reason: reasons::DISK_FULL,
                message,
            }
        }
        _ => Outcome::Failed {
            reason: reasons::MOUNT_FAILED,
            message,
        },
    }
}

/// The use to report: it moves in steps of a tenth of the limit (of 64 MiB where there is none), so that a busy layer
/// does not write to the API server all the time.
pub fn threshold(bytes: u64, limit: Option<u64>, reported: Option<u64>) -> Option<u64> {
    let step = limit.map_or(64 << 20, |limit| (limit / 10).max(1));
    match reported {
        Some(reported) if reported / step == bytes / step => Some(reported),
        _ => Some(bytes),
    }
}

/// Of what to say that little is left: from nine tenths on, and until a twentieth less is taken, so that a layer at the
/// mark does not say it again and again.
pub fn short(room: &Room, said: Option<Short>) -> Option<Short> {
    let from = |short| if said == Some(short) { 85 } else { 90 };
    match room {
        Room { disk_full: true, .. } => Some(Short::Disk),
        Room { disk_short: true, .. } if said == Some(Short::Disk) => said,
        Room { bytes_full, .. } if *bytes_full >= from(Short::Bytes) => Some(Short::Bytes),
        Room { inodes_full, .. } if *inodes_full >= from(Short::Inodes) => Some(Short::Inodes),
        _ => None,
    }
}

impl Outcome {
    /// What Ready says of it.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Mounted {
                refused: Some(refused), ..
            } => refused.verdict(),
            Self::Mounted { lost: true, .. } => Verdict::Ready {
                reason: reasons::RESET_BY_REBOOT,
                message: "mounted, and empty: what was written before the node's reboot was in memory".to_owned(),
            },
            Self::Mounted { .. } => Verdict::Ready {
                reason: reasons::MOUNTED,
                message: "mounted".to_owned(),
            },
            Self::Waiting { reason, message } | Self::Failed { reason, message } => Verdict::Progressing {
                reason,
                message: message.clone(),
            },
            Self::Stalled { reason, message } => Verdict::Stalled {
                reason,
                message: message.clone(),
            },
            Self::Released => Verdict::Progressing {
                reason: reasons::RELEASING,
                message: "unmounted; its data is removed".to_owned(),
            },
        }
    }

    /// Every condition of it.
    fn conditions(&self) -> Vec<Wanted> {
        let mut conditions = self.verdict().conditions();
        if let Self::Mounted {
            short: Some(short),
            size,
            used,
            ..
        } = self
        {
            let (used, size) = (human_size(used.unwrap_or(0)), human_size(size.unwrap_or(0)));
            let (reason, message) = match short {
                Short::Bytes => (
                    reasons::SPACE_USED,
                    format!(
                        "{used} of {size} are used, and little is left for files; at the limit, writing fails with \
                         ENOSPC: raise spec.sizeLimit or delete files in the layer"
                    ),
                ),
                Short::Inodes => (
                    reasons::INODES_USED,
                    "there are nearly as many files as the layer can hold; at the limit, making or changing a file fails \
                     with ENOSPC although there is room: raise spec.sizeLimit or delete files in the layer"
                        .to_owned(),
                ),
                Short::Disk => (
                    reasons::DISK_FULL,
                    "the node's disk has no more free than is reserved, and when it is full, writing in the layer fails, \
                     with EIO or ENOSPC, whatever its limit: free space on the node"
                        .to_owned(),
                ),
            };
            conditions.push(Wanted {
                kind: NEARLY_FULL,
                status: true,
                reason,
                message,
            });
        }
        conditions
    }

    /// Takes note of how full it is now.
    pub fn note_use(&mut self, room: &Room) {
        if let Self::Mounted {
            used,
            size,
            short: said,
            ..
        } = self
        {
            let now = short(room, *said);
            *used = match now == *said {
                true => threshold(room.used, *size, *used),
                // With the news comes the figure.
                false => Some(room.used),
            };
            *said = now;
        }
    }

    /// Whether the agent is to try again by itself, without a change of the object or its manifest.
    pub fn again(&self) -> bool {
        match self {
            Self::Failed { .. } => true,
            Self::Waiting { reason, .. } => [reasons::IN_USE, reasons::FILE_SYSTEM_STOPPED].contains(reason),
            Self::Mounted {
                refused: Some(refused), ..
            } => refused.again(),
            _ => false,
        }
    }

    /// Did a try to mount it, or to give it another limit, end badly? Waiting for somebody is no try.
    pub fn is_failed_try(&self) -> bool {
        match self {
            Self::Mounted {
                refused: Some(refused), ..
            } => refused.is_failed_try(),
            Self::Failed { reason, .. } | Self::Stalled { reason, .. } => {
                [reasons::MOUNT_FAILED, reasons::DISK_FULL, reasons::DATA_LOST].contains(reason)
            }
            _ => false,
        }
    }

    /// The status that says so. What is known of the data stays until it is known otherwise.
    pub fn status(&self, observed: &Observed, store_id: &str, now: Timestamp) -> WritableLayerStatus {
        let old = &observed.status;
        let conditions = merge(&old.conditions, self.conditions(), observed.generation, now);
        let kept = WritableLayerStatus {
            observed_generation: observed.generation,
            conditions,
            ..old.clone()
        };
        match self {
            Self::Mounted {
                tree, path, size, used, ..
            } => WritableLayerStatus {
                digest: Some(tree.to_string()),
                path: Some(path.clone()),
                size_limit: Some(size.map_or_else(|| "none".to_owned(), human_size)),
                used_bytes: used.map(int64),
                store_id: Some(store_id.to_owned()),
                ..kept
            },
            Self::Released => WritableLayerStatus {
                path: None,
                used_bytes: None,
                ..kept
            },
            _ => kept,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer_plan::tests::{UID, observed};
    use super::*;
    use crate::api::conditions::find;
    use crate::layer::LayerId;
    use serde_json::json;

    #[test]
    fn what_is_tried_again_and_what_waits_for_somebody() {
        let id: LayerId = UID.parse().unwrap();
        let tree = TreeDigest::from_bytes([7; 32]);
        let in_use = layer::Error::InUse {
            id: id.clone(),
            by: "a mount".into(),
        };
        let gone = layer::Error::Store(store::Error::MissingManifest { tree });
        let odd = layer::Error::Unmountable {
            tree,
            path: "f".into(),
            reason: "odd",
        };
        let stopped = layer::Error::Stopped {
            id: id.clone(),
            waits: "the end of a mount".into(),
        };
        let shrunk = layer::Error::Shrink { id, from: 2, to: 1 };
        for (error, reason, again) in [
            (in_use, reasons::IN_USE, true),
            (stopped, reasons::FILE_SYSTEM_STOPPED, true),
            (gone, reasons::MANIFEST_NOT_READY, true),
            (odd, reasons::MOUNT_FAILED, false),
            (shrunk, reasons::INVALID_SPEC, false),
        ] {
            let outcome = outcome(error);
            assert_eq!((outcome.verdict().reason(), outcome.again()), (reason, again));
            assert_eq!(outcome.is_failed_try(), reason == reasons::MOUNT_FAILED, "{reason}");
            let mounted = Outcome::Mounted {
                tree,
                path: "/x".into(),
                size: Some(1 << 30),
                lost: false,
                used: Some(1),
                short: None,
                refused: Some(Box::new(outcome)),
            };
            assert_eq!((mounted.verdict().reason(), mounted.again()), (reason, again));
        }
    }

    #[test]
    fn use_is_reported_in_tenths_of_the_limit() {
        assert_eq!(threshold(5, Some(100), None), Some(5));
        assert_eq!(threshold(9, Some(100), Some(5)), Some(5));
        assert_eq!(threshold(11, Some(100), Some(5)), Some(11));
    }

    #[test]
    fn a_layer_says_when_little_is_left_and_takes_it_back_a_twentieth_later() {
        let mut outcome = Outcome::Mounted {
            tree: TreeDigest::from_bytes([7; 32]),
            path: "/x".into(),
            size: Some(1 << 30),
            lost: false,
            used: Some(1 << 20),
            short: None,
            refused: None,
        };
        let percent = |percent: u64| Room {
            used: (1u64 << 30) / 100 * percent + 99,
            bytes_full: percent as u8,
            ..Room::default()
        };
        let mut observed = observed(json!({}));
        for (used, says) in [
            (89, None),
            (90, Some("922Mi of 1Gi are used")),
            (86, Some("881Mi of 1Gi are used")),
            (84, None),
            (100, Some("1Gi of 1Gi are used")),
        ] {
            outcome.note_use(&percent(used));
            observed.status = outcome.status(&observed, "s", Timestamp::from_second(10).unwrap());
            let full = find(&observed.status.conditions, NEARLY_FULL);
            assert_eq!(full.is_some(), says.is_some(), "{used} percent: {full:?}");
            if let (Some(full), Some(says)) = (full, says) {
                assert_eq!((&*full.status, &*full.reason), ("True", "SpaceUsed"));
                assert!(full.message.starts_with(says), "{used} percent: {}", full.message);
            }
        }
        for (room, reason, says) in [
            (
                Room {
                    inodes_full: 95,
                    ..Room::default()
                },
                "InodesUsed",
                "nearly as many files",
            ),
            (
                Room {
                    disk_full: true,
                    ..percent(95)
                },
                "DiskFull",
                "the node's disk",
            ),
        ] {
            outcome.note_use(&room);
            let status = outcome.status(&observed, "s", Timestamp::from_second(10).unwrap());
            let full = find(&status.conditions, NEARLY_FULL).unwrap();
            assert!(full.reason == reason && full.message.contains(says), "{full:?}");
        }
        assert_eq!(short(&Room::default(), Some(Short::Bytes)), None);
        let hardly = Room {
            disk_short: true,
            ..Room::default()
        };
        assert_eq!(short(&hardly, None), None);
        assert_eq!(short(&hardly, Some(Short::Disk)), Some(Short::Disk));
    }

    #[test]
    fn a_status_from_its_own_outcome_changes_nothing() {
        let outcome = Outcome::Mounted {
            tree: TreeDigest::from_bytes([7; 32]),
            path: "/x".into(),
            size: None,
            lost: false,
            used: Some(1),
            short: None,
            refused: None,
        };
        let mut observed = observed(json!({}));
        let first = outcome.status(&observed, "s", Timestamp::from_second(10).unwrap());
        observed.status = first.clone();
        assert_eq!(
            outcome.status(&observed, "s", Timestamp::from_second(99).unwrap()),
            first
        );
    }
}
