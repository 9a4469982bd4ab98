//! Conditions by the rules of kstatus: `Ready` always; `Reconciling` and `Stalled` only while they are true; each
//! with the generation that the work was based on; `lastTransitionTime` moves only with the status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::{MAX_MESSAGE, truncate};

pub const READY: &str = "Ready";
pub const RECONCILING: &str = "Reconciling";
pub const STALLED: &str = "Stalled";
/// On a NodeStore: the last retention run failed, or something kept it from deleting.
pub const RETENTION_FAILED: &str = "RetentionFailed";
/// On a RetentionPolicy and a NodeStore: live content alone is more than the policy allows.
pub const OVER_LIMIT: &str = "OverLimit";
/// On a RetentionPolicy: another policy governs nodes that this one selects.
pub const SHADOWED: &str = "Shadowed";
/// On a WritableLayer: little of its limit is left.
pub const NEARLY_FULL: &str = "NearlyFull";

/// Every reason that larder writes. `docs/conditions.md` explains each; a test keeps the two together.
pub mod reasons {
    macro_rules! reasons {
        ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
            $($(#[$doc])* pub const $name: &str = $text;)*
            /// All of them.
            pub const ALL: &[&str] = &[$($text),*];
        };
    }

    reasons! {
        /// Every reachable node that should have the tree has it.
        STORED = "Stored";
        /// As `Stored`, but the nodes' trees differ, so there is no one digest.
        DIGESTS_DIFFER = "DigestsDiffer";
        /// Nodes are building the tree, or have not begun.
        BUILDING = "Building";
        /// No node is selected.
        NO_NODES = "NoNodes";
        /// Nodes are selected, and none of them can be reached.
        NODES_UNREACHABLE = "NodesUnreachable";
        /// `spec.suspend` holds up work that is due.
        SUSPENDED = "Suspended";
        /// The object's fields cannot be used.
        INVALID_SPEC = "InvalidSpec";
        /// A selected node holds as many manifests as it may.
        NODE_FULL = "NodeFull";
        /// The source path is outside what the node's agent allows for this namespace.
        SOURCE_NOT_ALLOWED = "SourceNotAllowed";
        /// The source does not exist on the node.
        SOURCE_NOT_FOUND = "SourceNotFound";
        /// Parts of the source could not be read.
        SOURCE_UNREADABLE = "SourceUnreadable";
        /// The source changed while it was read.
        SOURCE_CHANGED = "SourceChanged";
        /// The source holds something that cannot be stored.
        SOURCE_UNSUPPORTED = "SourceUnsupported";
        /// The node's disk has no room.
        DISK_FULL = "DiskFull";
        /// The node's store failed.
        STORE_ERROR = "StoreError";
        /// Contents of trees that are in use are not in the node's store any more.
        CONTENT_MISSING = "ContentMissing";
        /// The WritableLayer to snapshot does not exist or is not ready.
        LAYER_NOT_READY = "LayerNotReady";
        /// A layer is mounted.
        MOUNTED = "Mounted";
        /// A layer's tree is not placed on the layer's node.
        NOT_PLACED = "NotPlaced";
        /// A layer's tree is not yet stored on the node.
        MANIFEST_NOT_READY = "ManifestNotReady";
        /// A layer could not be mounted.
        MOUNT_FAILED = "MountFailed";
        /// A Tmpfs layer lost its content with a reboot and is mounted empty.
        RESET_BY_REBOOT = "ResetByReboot";
        /// Nine tenths of a layer's limit are used.
        SPACE_USED = "SpaceUsed";
        /// Files were written at a layer's path while the layer was not mounted there; an event's only.
        FILES_FOUND = "FilesFound";
        /// A layer's own file system takes no writes any more after an error, and is in use.
        FILE_SYSTEM_STOPPED = "FileSystemStopped";
        /// A layer's own file system had an error, and was checked and mended; an event's only.
        FILE_SYSTEM_CHECKED = "FileSystemChecked";
        /// Nine tenths of the files that a layer can hold are there.
        INODES_USED = "InodesUsed";
        /// The layer's disk was wiped or replaced.
        DATA_LOST = "DataLost";
        /// A deleted layer is still in use.
        IN_USE = "InUse";
        /// A deleted layer is being removed.
        RELEASING = "Releasing";
        /// The layer's node does not answer.
        NODE_UNREACHABLE = "NodeUnreachable";
        /// The layer's node does not exist.
        NODE_NOT_FOUND = "NodeNotFound";
        /// A policy governs the nodes that it selects.
        GOVERNING = "Governing";
        /// Another policy governs the nodes that this one selects.
        SHADOWED_BY = "ShadowedBy";
        /// Live content alone is over the limit.
        LIVE_CONTENT = "LiveContent";
        /// Nodes have not yet taken the policy over.
        APPLYING = "Applying";
        /// A retention run failed on a node, or something unreadable kept it from deleting.
        RUN_FAILED = "RunFailed";
        /// A retention run deleted something; in events.
        RETENTION_RAN = "RetentionRan";
        /// A retention run under a policy with `dryRun` would have deleted something; in events.
        RETENTION_DRY_RUN = "RetentionDryRun";
        /// A store works.
        SERVING = "Serving";
    }

    /// Reasons of a Ready that is not true and needs no warning: ordinary steps on the way.
    pub const EXPECTED: &[&str] = &[BUILDING, APPLYING, RELEASING, MANIFEST_NOT_READY, SUSPENDED];
}

/// One condition before it is joined with what the object has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub kind: &'static str,
    pub status: bool,
    pub reason: &'static str,
    pub message: String,
}

/// What Ready says: yes, not yet, or no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Ready=True.
    Ready { reason: &'static str, message: String },
    /// Ready=False, Reconciling=True: larder is working on it or will try again by itself.
    Progressing { reason: &'static str, message: String },
    /// Ready=False, Stalled=True: somebody has to change something.
    Stalled { reason: &'static str, message: String },
}

impl Verdict {
    /// The reason in Ready.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Ready { reason, .. } | Self::Progressing { reason, .. } | Self::Stalled { reason, .. } => reason,
        }
    }

    /// The message in Ready.
    pub fn message(&self) -> &str {
        match self {
            Self::Ready { message, .. } | Self::Progressing { message, .. } | Self::Stalled { message, .. } => message,
        }
    }

    /// Whether Ready is true.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready { .. })
    }

    /// The conditions that say so.
    pub fn conditions(&self) -> Vec<Wanted> {
        let condition = |kind, status| Wanted {
            kind,
            status,
            reason: self.reason(),
            message: self.message().to_owned(),
        };
        match self {
            Self::Ready { .. } => vec![condition(READY, true)],
            Self::Progressing { .. } => vec![condition(READY, false), condition(RECONCILING, true)],
            Self::Stalled { .. } => vec![condition(READY, false), condition(STALLED, true)],
        }
    }
}

/// Joins what should be said with what was said before: a condition whose status is unchanged keeps its time.
pub fn merge(existing: &[Condition], wanted: Vec<Wanted>, generation: i64, now: Timestamp) -> Vec<Condition> {
    wanted
        .into_iter()
        .map(|new| {
            let status = if new.status { "True" } else { "False" };
            let since = existing
                .iter()
                .find(|old| old.type_ == new.kind && old.status == status)
                .map_or(Time(whole_seconds(now)), |old| old.last_transition_time.clone());
            Condition {
                type_: new.kind.to_owned(),
                status: status.to_owned(),
                reason: new.reason.to_owned(),
                message: truncate(&new.message, MAX_MESSAGE),
                observed_generation: Some(generation),
                last_transition_time: since,
            }
        })
        .collect()
}

/// The API server keeps seconds; a finer time would differ from its own echo.
pub fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// The condition of this type.
pub fn find<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// Whether the condition of this type is true.
pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    find(conditions, kind).is_some_and(|condition| condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_transition_time_moves_only_with_the_status() {
        let building = Verdict::Progressing {
            reason: reasons::BUILDING,
            message: "0 of 3".into(),
        };
        let first = merge(&[], building.conditions(), 1, at(100));
        assert_eq!(first.len(), 2);
        let more = Verdict::Progressing {
            reason: reasons::BUILDING,
            message: "2 of 3".into(),
        };
        let second = merge(&first, more.conditions(), 1, at(200));
        assert_eq!(second[0].last_transition_time.0, at(100));
        assert_eq!(second[0].message, "2 of 3");
        let ready = Verdict::Ready {
            reason: reasons::STORED,
            message: String::new(),
        };
        let third = merge(&second, ready.conditions(), 2, at(300));
        assert_eq!(third.len(), 1, "Reconciling must go when it is no longer true");
        assert_eq!(
            (third[0].status.as_str(), third[0].last_transition_time.0),
            ("True", at(300))
        );
        assert_eq!(third[0].observed_generation, Some(2));
    }

    #[test]
    fn messages_are_bounded() {
        let long = Verdict::Stalled {
            reason: reasons::INVALID_SPEC,
            message: "x".repeat(5000),
        };
        assert!(
            merge(&[], long.conditions(), 1, at(0))
                .iter()
                .all(|c| c.message.len() <= MAX_MESSAGE)
        );
    }

    #[test]
    fn every_reason_is_explained() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/conditions.md")).unwrap();
        for reason in reasons::ALL {
            assert!(
                text.contains(&format!("| `{reason}` |")),
                "docs/conditions.md does not explain {reason}"
            );
        }
        for row in text.lines().filter_map(|line| line.strip_prefix("| `")) {
            let reason = row.split('`').next().unwrap_or_default();
            assert!(
                reasons::ALL.contains(&reason),
                "docs/conditions.md explains {reason}, which is no reason"
            );
        }
    }

    #[test]
    fn reasons_are_camel_case_and_unique() {
        let mut seen = std::collections::BTreeSet::new();
        for reason in reasons::ALL {
            assert!(seen.insert(reason), "{reason} twice");
            assert!(reason.starts_with(|c: char| c.is_ascii_uppercase()));
            assert!(reason.chars().all(|c| c.is_ascii_alphanumeric()));
        }
    }
}
