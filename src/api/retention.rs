//! `RetentionPolicy`: what nodes keep that nothing uses, and for how long.

use std::collections::BTreeMap;
use std::time::Duration as StdDuration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Duration, DurationOrZero, InvalidDuration, InvalidSchedule, InvalidSize, Schedule, Size, SizeOrPercent};

/// Keeps the stores of the selected nodes within bounds. What is in use is never touched, whatever the policy.
/// One policy governs a node: the highest priority, then the oldest, then the first by name.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[kube(
    group = "larder.dev",
    version = "v1alpha1",
    kind = "RetentionPolicy",
    plural = "retentionpolicies",
    shortname = "retp",
    category = "larder",
    status = "RetentionPolicyStatus",
    derive = "PartialEq",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Governs", type_ = "integer", json_path = ".status.nodes.governed"),
    printcolumn(name = "Over", type_ = "integer", json_path = ".status.nodes.overLimit"),
    printcolumn(name = "Dry-Run", type_ = "boolean", json_path = ".spec.dryRun"),
    printcolumn(name = "Last-Run", type_ = "date", json_path = ".status.lastRun.time"),
    printcolumn(name = "Deleted", type_ = "integer", json_path = ".status.lastRun.deletedBlobs"),
    printcolumn(name = "Freed", type_ = "string", json_path = ".status.lastRun.freed"),
    printcolumn(name = "Next-Run", type_ = "string", json_path = ".status.nextRun"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub struct RetentionPolicySpec {
    /// Labels of the nodes. Required; `{}` means every node.
    #[schemars(length(max = 16), schema_with = "super::node_store::labels_schema")]
    pub node_selector: BTreeMap<String, String>,

    /// Which policy governs where several select a node: the highest.
    #[serde(default)]
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub priority: i32,

    #[serde(flatten)]
    pub rules: PolicyRules,
}

/// The part of a policy that a node acts on.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRules {
    /// When to run: five cron fields, or `@hourly`, `@daily`, `@weekly`, `@monthly`.
    #[serde(default = "default_schedule")]
    #[schemars(length(max = 128), schema_with = "schedule_schema")]
    pub schedule: String,

    /// Zone of the schedule, such as `Europe/Berlin`. Absent: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 64),
        regex(pattern = "^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}$")
    )]
    pub time_zone: Option<String>,

    /// Longest delay after the scheduled time, drawn once per node, so that nodes do not all run at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<DurationOrZero>,

    /// How long history is kept after its last use. Absent: for ever, within the other bounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Duration>,

    /// Most bytes of the store: contents, manifests and images. `0`: keep only what is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<Size>,

    /// Bytes, or percent of the file system, that stay free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_free: Option<SizeOrPercent>,

    /// Contents with fewer references from stored manifests than this are candidates.
    #[serde(default = "default_copies")]
    #[schemars(range(min = 1, max = 1000), extend("format" = "int32"))]
    pub min_copies: u32,

    /// How long fresh contents stay that nothing refers to yet.
    #[serde(default = "default_grace")]
    pub grace_period: DurationOrZero,

    /// True: report what a run would do, and delete nothing.
    #[serde(default)]
    pub dry_run: bool,

    /// True: no runs.
    #[serde(default)]
    pub suspend: bool,
}

fn default_schedule() -> String {
    "@daily".to_owned()
}

fn default_copies() -> u32 {
    1
}

fn default_grace() -> DurationOrZero {
    DurationOrZero::from("1h")
}

fn schedule_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({"type": "string", "pattern": super::schedule::pattern()})
}

/// A rule that cannot be used, by field. A policy with one deletes nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    #[error("spec.{field}: {source}")]
    Duration {
        field: &'static str,
        source: InvalidDuration,
    },
    #[error("spec.{field}: {source}")]
    Size { field: &'static str, source: InvalidSize },
    #[error("spec: {0}")]
    Schedule(#[from] InvalidSchedule),
}

impl Default for PolicyRules {
    /// What a policy without any field means.
    fn default() -> Self {
        Self {
            schedule: default_schedule(),
            time_zone: None,
            jitter: None,
            max_age: None,
            max_size: None,
            min_free: None,
            min_copies: default_copies(),
            grace_period: default_grace(),
            dry_run: false,
            suspend: false,
        }
    }
}

impl PolicyRules {
    /// Looks at every field.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn check(&self) -> Result<Schedule, InvalidPolicy> {
        self.max_age()?;
        self.grace()?;
        self.jitter()?;
        self.max_size()?;
        self.min_free(u64::MAX)?;
        Ok(Schedule::parse(&self.schedule, self.time_zone.as_deref())?)
    }

    /// `maxAge`.
    pub fn max_age(&self) -> Result<Option<StdDuration>, InvalidPolicy> {
        let age = self.max_age.as_ref().map(Duration::get).transpose();
        age.map_err(|source| InvalidPolicy::Duration {
            field: "maxAge",
            source,
        })
    }

    /// `gracePeriod`.
    pub fn grace(&self) -> Result<StdDuration, InvalidPolicy> {
        self.grace_period.get().map_err(|source| InvalidPolicy::Duration {
            field: "gracePeriod",
            source,
        })
    }

    /// `jitter`; none is zero.
    pub fn jitter(&self) -> Result<StdDuration, InvalidPolicy> {
        let jitter = self.jitter.as_ref().map(DurationOrZero::get).transpose();
        Ok(jitter
            .map_err(|source| InvalidPolicy::Duration {
                field: "jitter",
                source,
            })?
            .unwrap_or_default())
    }

    /// `maxSize` in bytes.
    pub fn max_size(&self) -> Result<Option<u64>, InvalidPolicy> {
        let size = self.max_size.as_ref().map(Size::bytes).transpose();
        size.map_err(|source| InvalidPolicy::Size {
            field: "maxSize",
            source,
        })
    }

    /// `minFree` in bytes on a file system of `total` bytes.
    pub fn min_free(&self, total: u64) -> Result<Option<u64>, InvalidPolicy> {
        let size = self.min_free.as_ref().map(|free| free.of(total)).transpose();
        size.map_err(|source| InvalidPolicy::Size {
            field: "minFree",
            source,
        })
    }
}

/// What is known of the policy.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct RetentionPolicyStatus {
    /// Generation of the spec that the status is about.
    pub observed_generation: i64,

    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        extend("x-kubernetes-list-type" = "map"),
        extend("x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,

    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<PolicyNodeCounts>,

    /// Sums over the nodes' last runs under this policy, with the time of the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_run: Option<RunSummary>,

    /// The earliest next run of a node that the policy governs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_run: Option<Time>,

    /// The value of the annotation `larder.dev/requestedAt` that every governed, reachable node has acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
}

impl Default for RetentionPolicyStatus {
    fn default() -> Self {
        Self {
            observed_generation: -1,
            conditions: Vec::new(),
            nodes: None,
            last_run: None,
            next_run: None,
            last_handled_reconcile_at: None,
        }
    }
}

/// How many nodes a policy has to do with.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyNodeCounts {
    /// Nodes that the selector selects.
    pub selected: i64,
    /// Nodes on which this policy is the one in force.
    pub governed: i64,
    /// Governed nodes over their limit with live content alone.
    pub over_limit: i64,
    /// Governed nodes whose last run failed or was kept from deleting.
    pub failed: i64,
}

/// What a run did, or in a dry run would have done.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RunSummary {
    pub time: Time,
    pub scanned_blobs: i64,
    pub deleted_blobs: i64,
    pub freed_bytes: i64,
    /// `freedBytes` for people; of a dry run it says that it is of one.
    pub freed: String,
    /// Revisions of history that were dropped.
    pub dropped_revisions: i64,
    pub dry_run: bool,
}

impl RunSummary {
    /// What `freed` says.
    pub fn freed_text(bytes: u64, dry_run: bool) -> String {
        let size = super::human_size(bytes);
        if dry_run { format!("{size} (dry run)") } else { size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(value: serde_json::Value) -> PolicyRules {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn defaults_are_safe_and_usable() {
        let defaults = rules(serde_json::json!({}));
        assert!(defaults.check().is_ok());
        assert_eq!(defaults.grace(), Ok(StdDuration::from_secs(3600)));
        assert_eq!(defaults.max_age(), Ok(None));
        assert_eq!(defaults.min_copies, 1);
        assert!(!defaults.dry_run && !defaults.suspend);
    }

    #[test]
    fn a_bad_rule_is_named_by_its_field() {
        for (field, value) in [
            ("maxAge", serde_json::json!("soon")),
            ("maxAge", serde_json::json!(30)),
            ("gracePeriod", serde_json::json!("1 h")),
            ("jitter", serde_json::json!("-1s")),
            ("maxSize", serde_json::json!({"a": 1})),
            ("minFree", serde_json::json!("150%")),
        ] {
            let error = rules(serde_json::json!({field: value})).check().expect_err(field);
            assert!(error.to_string().starts_with(&format!("spec.{field}: ")), "{error}");
        }
        let error = rules(serde_json::json!({"schedule": "daily"})).check().unwrap_err();
        assert!(error.to_string().contains("\"daily\""), "{error}");
    }
}
