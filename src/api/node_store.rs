//! `NodeStore`: what a node should hold, and what it holds.
//!
//! One per node, named like it and owned by it. The controller writes the spec, the node's agent the status. Every
//! entry is bounded, so that a node with the most manifests allowed stays within the API server's limits.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{Duration, PolicyRules, RunSummary, Source, StoreAnalytics, StoreUsage};

/// The store of one node. Made and written by larder; look, but don't edit.
#[derive(CustomResource, JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Default)]
#[kube(
    group = "larder.dev",
    version = "v1alpha1",
    kind = "NodeStore",
    plural = "nodestores",
    shortname = "nstore",
    category = "larder",
    status = "NodeStoreStatus",
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
    printcolumn(name = "Blobs", type_ = "integer", json_path = ".status.usage.blobs"),
    printcolumn(name = "Stored", type_ = "string", json_path = ".status.usage.stored"),
    printcolumn(name = "Saved", type_ = "string", json_path = ".status.analytics.saved"),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.retention.name"),
    printcolumn(
        name = "Over",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"OverLimit\")].status"
    ),
    printcolumn(
        name = "Run-Failed",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"RetentionFailed\")].status"
    ),
    printcolumn(name = "Last-Run", type_ = "date", json_path = ".status.retention.lastRun.time"),
    printcolumn(name = "Freed", type_ = "string", json_path = ".status.retention.lastRun.freed"),
    printcolumn(
        name = "Next-Run",
        type_ = "string",
        json_path = ".status.retention.nextRun",
        priority = 1
    ),
    printcolumn(
        name = "History",
        type_ = "string",
        json_path = ".status.analytics.history.size",
        priority = 1
    ),
    printcolumn(
        name = "Garbage",
        type_ = "string",
        json_path = ".status.analytics.garbage.size",
        priority = 1
    ),
    printcolumn(name = "Road", type_ = "string", json_path = ".status.road", priority = 1),
    printcolumn(name = "Agent", type_ = "string", json_path = ".status.version", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStoreSpec {
    /// The manifests that the node should hold, sorted by namespace and name.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub manifests: Vec<ProjectedManifest>,

    /// The policy in force; absent: the built-in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<ProjectedPolicy>,
}

/// A CasManifest as a node needs it.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ProjectedManifest {
    #[schemars(length(max = 63))]
    pub namespace: String,
    #[schemars(length(max = 253))]
    pub name: String,
    #[schemars(length(max = 64))]
    pub uid: String,
    pub generation: i64,
    /// The request annotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub requested_at: Option<String>,
    // Checked on the CasManifest; the same CEL over 256 entries would exceed the API server's cost limit.
    #[schemars(schema_with = "opaque_schema")]
    pub source: Source,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "text_schema")]
    pub rebuild_interval: Option<Duration>,
    #[schemars(extend("format" = "int32"))]
    pub revision_history_limit: u32,
    #[serde(default)]
    pub suspend: bool,
}

/// The governing RetentionPolicy as a node needs it.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ProjectedPolicy {
    #[schemars(length(max = 253))]
    pub name: String,
    #[schemars(length(max = 64))]
    pub uid: String,
    pub generation: i64,
    /// The request annotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub requested_at: Option<String>,
    pub rules: PolicyRules,
}

/// What the node's agent says.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct NodeStoreStatus {
    /// Generation of the spec that the agent has taken up.
    pub observed_generation: i64,

    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        extend("x-kubernetes-list-type" = "map"),
        extend("x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,

    /// Identity of the store on the node's disk; a wiped disk has another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_id: Option<String>,

    /// How layers come by their trees on this node: `Descriptors` or `Paths`, from an image whose files have their data
    /// in the store; `Copy`, from a copy of the tree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub road: Option<String>,

    /// Version of the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,

    /// One entry per manifest of the spec that the agent has taken up.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub manifests: Vec<ManifestState>,

    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionState>,

    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<StoreUsage>,

    /// Absent until it is counted for the first time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub analytics: Option<StoreAnalytics>,
}

impl Default for NodeStoreStatus {
    fn default() -> Self {
        Self {
            observed_generation: -1,
            conditions: Vec::new(),
            store_id: None,
            road: None,
            version: None,
            manifests: Vec::new(),
            retention: None,
            usage: None,
            analytics: None,
        }
    }
}

/// Where a manifest stands on a node.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The tree of this generation and request is stored.
    Ready,
    /// It is being built, or waits for its turn.
    Building,
    /// It could not be built; the agent tries again by itself.
    Failed,
    /// It could not be built and will not be until something changes.
    Stalled,
}

/// A manifest on a node. Digest and sizes are those of the stored tree, also while a newer one is built.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ManifestState {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// Generation that the phase is about.
    pub observed_generation: i64,
    /// Request that the phase is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<String>,
    pub phase: Phase,
    /// CamelCase reason of a phase that is not Ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique_bytes: Option<i64>,
    /// Bytes that the build of this tree added to the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub added_bytes: Option<i64>,
    /// Bytes of the contents that only this tree and its history name: what goes when they do. Counted with `analytics`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclusive_bytes: Option<i64>,
}

/// Retention on a node.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct RetentionState {
    /// UID of the policy that the rest is about; absent: the built-in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_uid: Option<String>,
    /// Generation of that policy.
    pub observed_generation: i64,
    /// Request that the last run answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_run: Option<RunSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_run: Option<Time>,
    /// Live content alone is over the limit: bytes per cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub over_limit: Option<String>,
    /// Why the last run failed, or what kept it from deleting.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub problem: Option<String>,
}

/// Labels to select by: keys and values as Kubernetes bounds them.
///
/// No CEL rule on the keys: the API server takes no write, not even of a status, to a stored object whose value a rule
/// cannot be asked about. A key that is none selects no node.
pub(super) fn labels_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
            "pattern": "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$",
        },
    })
}

fn opaque_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

fn text_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "maxLength": 36})
}
