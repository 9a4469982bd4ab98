//! `WritableLayer`: a copy-on-write folder over a tree, on one node.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::Rule;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Size;
use super::size::cel_has_form;

/// A writable folder over the tree of a CasManifest, on one node. The tree itself never changes.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[kube(
    group = "larder.dev",
    version = "v1alpha1",
    kind = "WritableLayer",
    plural = "writablelayers",
    shortname = "wl",
    category = "larder",
    namespaced,
    selectable = ".spec.nodeName",
    status = "WritableLayerStatus",
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
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Manifest", type_ = "string", json_path = ".spec.manifest.name"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Limit", type_ = "string", json_path = ".status.sizeLimit"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Path", type_ = "string", json_path = ".status.path", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.owner) == has(oldSelf.owner) && (!has(self.owner) || self.owner == oldSelf.owner)")
        .message("owner cannot be changed")
        .field_path(".owner"),
    validation = limit_only_grows(),
    validation = limit_is_large_enough()
)]
pub struct WritableLayerSpec {
    /// The CasManifest whose tree is below. The layer keeps the tree that was current when it was made.
    #[x_kube(validation = Rule::new("self == oldSelf").message("manifest cannot be changed"))]
    pub manifest: ManifestRef,

    /// Name of the node.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName cannot be changed"))]
    pub node_name: String,

    /// Where what is written goes: `Overlay`, to disk; `Tmpfs`, to memory.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("mode cannot be changed"))]
    pub mode: LayerMode,

    /// How much may be written, kept by the kernel; at least 4Mi. Absent: the agent's default. May only grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<Size>,

    /// Owner of everything in the tree, for workloads that are not root. Absent: the owners in the tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
}

/// Where one of the limits is no size there is nothing to compare: the field's own schema refuses a new one, and a stored
/// one that an older schema let in must be correctable.
fn limit_only_grows() -> Rule {
    let (new, old) = (cel_has_form("self.sizeLimit"), cel_has_form("oldSelf.sizeLimit"));
    Rule::new(format!(
        "!has(oldSelf.sizeLimit) || (has(self.sizeLimit) && (!({new}) || !({old}) || \
         !quantity(string(self.sizeLimit)).isLessThan(quantity(string(oldSelf.sizeLimit)))))"
    ))
    .message("sizeLimit may only grow")
    .field_path(".sizeLimit")
}

/// Likewise, what is no size is left to the field's own schema.
fn limit_is_large_enough() -> Rule {
    let has_form = cel_has_form("self.sizeLimit");
    Rule::new(format!(
        "!has(self.sizeLimit) || !({has_form}) || !quantity(string(self.sizeLimit)).isLessThan(quantity('4Mi'))"
    ))
    .message("sizeLimit must be at least 4Mi")
    .field_path(".sizeLimit")
}

/// A CasManifest in the same namespace.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ManifestRef {
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Where a layer's changes are kept.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LayerMode {
    /// On disk: survives a reboot.
    #[default]
    Overlay,
    /// In memory: empty after a reboot.
    Tmpfs,
}

/// A user and a group by number.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    #[schemars(range(min = 0, max = 4294967294u32), extend("format" = "int64"))]
    pub uid: u32,
    #[schemars(range(min = 0, max = 4294967294u32), extend("format" = "int64"))]
    pub gid: u32,
}

/// What the layer's agent says of it.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct WritableLayerStatus {
    /// Generation of the spec that the status is about.
    pub observed_generation: i64,

    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        extend("x-kubernetes-list-type" = "map"),
        extend("x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,

    /// Digest of the tree below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,

    /// Folder on the node where the layer is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,

    /// The limit in force, for people; `none` where the agent's default is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<String>,

    /// Bytes that the layer takes, as of the last change of ten percent of its limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<i64>,

    /// The store that holds the layer's data. Another one under the same node means that the data is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_id: Option<String>,
}

impl Default for WritableLayerStatus {
    fn default() -> Self {
        Self {
            observed_generation: -1,
            conditions: Vec::new(),
            digest: None,
            path: None,
            size_limit: None,
            used_bytes: None,
            store_id: None,
        }
    }
}
