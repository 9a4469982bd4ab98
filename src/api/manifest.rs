//! `CasManifest`: a tree that nodes keep.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Duration, MAX_REVISIONS};

/// A tree of files that every selected node stores once, by content, and offers to layers and volumes.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[kube(
    group = "larder.dev",
    version = "v1alpha1",
    kind = "CasManifest",
    plural = "casmanifests",
    shortname = "casm",
    category = "larder",
    namespaced,
    status = "CasManifestStatus",
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
    printcolumn(name = "Files", type_ = "integer", json_path = ".status.files"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size"),
    printcolumn(name = "Unique", type_ = "string", json_path = ".status.unique"),
    printcolumn(name = "Saved", type_ = "string", json_path = ".status.saved"),
    printcolumn(name = "Nodes", type_ = "string", json_path = ".status.nodes.summary"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Exclusive", type_ = "string", json_path = ".status.exclusive", priority = 1),
    printcolumn(name = "Digest", type_ = "string", json_path = ".status.digest", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.source.layer) || !has(self.nodeSelector)")
    .message("a snapshot stays on its layer's node: nodeSelector cannot be set with source.layer")
    .field_path(".nodeSelector"))]
pub struct CasManifestSpec {
    /// Where the tree comes from: exactly one of the fields.
    pub source: Source,

    /// Labels of the nodes that store the tree, and may mount it. Absent or empty: every node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), schema_with = "super::node_store::labels_schema")]
    pub node_selector: Option<BTreeMap<String, String>>,

    /// How often the source is read again, such as `1h`. Absent: once per generation, and on request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuild_interval: Option<Duration>,

    /// How many earlier trees of this manifest a node keeps as history.
    #[serde(default = "default_history")]
    #[schemars(range(min = 0, max = MAX_REVISIONS), extend("format" = "int32"))]
    pub revision_history_limit: u32,

    /// True: no new builds. What is stored stays, and stays usable.
    #[serde(default)]
    pub suspend: bool,
}

fn default_history() -> u32 {
    3
}

/// Where a tree comes from.
#[derive(KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Default)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.directory), has(self.layer)].filter(x, x).size() == 1")
    .message("exactly one source must be set: directory or layer"))]
pub struct Source {
    /// A folder on each selected node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<DirectorySource>,

    /// A snapshot of a WritableLayer in the same namespace, taken on the layer's node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<LayerSource>,
}

/// A folder on the node, below a root that the node's agent allows for the manifest's namespace.
#[derive(KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct DirectorySource {
    /// Absolute path without `.`, `..` and symbolic links.
    #[schemars(length(min = 2, max = 1024), regex(pattern = "^(/[^/]+)+$"))]
    #[x_kube(validation = Rule::new("!self.split('/').exists(part, part == '.' || part == '..')")
        .message("the path may not contain . or .."))]
    pub path: String,

    /// Globs of paths below the folder that are left out, such as `**/*.tmp`; a folder that matches is left out whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 128)), extend("x-kubernetes-list-type" = "atomic"))]
    pub exclude: Vec<String>,
}

/// A WritableLayer by name.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LayerSource {
    /// Name of the WritableLayer.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What is known of the tree.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct CasManifestStatus {
    /// Generation of the spec that the status is about.
    pub observed_generation: i64,

    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        extend("x-kubernetes-list-type" = "map"),
        extend("x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,

    /// Digest of the tree; absent while there is none or the nodes' trees differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,

    /// Regular files in the tree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<i64>,

    /// Sum of the files' sizes, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,

    /// Sum of the files' sizes in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,

    /// Sum of the sizes of the distinct contents, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique: Option<String>,

    /// Sum of the sizes of the distinct contents in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique_bytes: Option<i64>,

    /// `exclusiveBytes` for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclusive: Option<String>,

    /// Bytes of the contents that only this manifest's tree and its history name, on the node where they are most: what
    /// goes at most once the manifest is deleted, retention has taken its history, and no layer shows it. Counted a
    /// little after a node's store has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclusive_bytes: Option<i64>,

    /// What storing the tree did not cost, for people: its size less the bytes that its build added to the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved: Option<String>,

    /// What storing the tree did not cost in bytes, on the node that saved least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved_bytes: Option<i64>,

    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeCounts>,

    /// The first failures, at most ten.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub failures: Vec<Failure>,

    /// The value of the annotation `larder.dev/requestedAt` that every reachable node has acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
}

impl Default for CasManifestStatus {
    fn default() -> Self {
        Self {
            observed_generation: -1,
            conditions: Vec::new(),
            digest: None,
            files: None,
            size: None,
            size_bytes: None,
            unique: None,
            unique_bytes: None,
            exclusive: None,
            exclusive_bytes: None,
            saved: None,
            saved_bytes: None,
            nodes: None,
            failures: Vec::new(),
            last_handled_reconcile_at: None,
        }
    }
}

/// How many nodes are where.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeCounts {
    /// Selected nodes that ever had an agent.
    pub desired: i64,
    /// Nodes that have the current tree.
    pub ready: i64,
    /// Nodes that tried and could not.
    pub failed: i64,
    /// Nodes whose agent is silent or that are NotReady; they do not hold up Ready.
    pub unreachable: i64,
    /// `ready/desired`, for the printed column.
    pub summary: String,
}

/// What went wrong on a node.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Failure {
    pub node: String,
    pub reason: String,
    pub message: String,
}
