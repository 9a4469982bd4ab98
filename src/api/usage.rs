//! What a node's store takes, and what for: a part of the NodeStore's status. docs/store.md defines each figure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the store takes.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct StoreUsage {
    /// Distinct contents.
    pub blobs: i64,
    /// Bytes of the contents.
    pub stored_bytes: i64,
    /// `storedBytes` for people.
    pub stored: String,
}

/// What the store's room is used for. Counted anew a little after the store has changed, so `usage` may be ahead of it.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct StoreAnalytics {
    /// Distinct trees that are stored: current ones, history, those of layers and mounts alone, and those that the next
    /// run takes.
    pub trees: i64,
    /// Regular files of all these trees; the names of one hard-linked file count once.
    pub references: i64,
    /// Distinct contents of them.
    pub unique_blobs: i64,
    /// Bytes of all references: what the trees would take without deduplication.
    pub logical_bytes: i64,
    /// `logicalBytes` for people.
    pub logical: String,
    /// Bytes of the distinct contents.
    pub unique_bytes: i64,
    /// `logicalBytes` less `uniqueBytes`.
    pub saved_bytes: i64,
    /// `savedBytes` for people.
    pub saved: String,
    /// `savedBytes` in per cent of `logicalBytes`, such as `48.7`.
    pub saved_percent: String,
    /// `logicalBytes` over `uniqueBytes`, such as `1.95`.
    pub ratio: String,
    /// Contents that a current tree names.
    pub current: BlobAmount,
    /// Contents that history names, and no current tree.
    pub history: BlobAmount,
    /// Contents that only trees name which are of no manifest: of layers and mounts, or the next run takes them.
    pub unnamed: BlobAmount,
    /// Contents that no stored tree names: of running builds, or runs take them in time.
    pub garbage: BlobAmount,
    /// Contents that a tree names and that are not there: damage. They are among the figures above.
    pub missing: BlobAmount,
    /// The distinct contents by size, the smallest first: below 1 KiB, 64 KiB, 1 MiB, 100 MiB, and the rest.
    #[schemars(length(max = 5), extend("x-kubernetes-list-type" = "atomic"))]
    pub sizes: Vec<SizeBucket>,
    /// The ten manifests with the most bytes for themselves.
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub largest_manifests: Vec<LargestManifest>,
    /// The ten contents whose sharing saves most.
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub most_shared: Vec<SharedBlob>,
    /// Something that is needed could not be read, and the figures are without it; the condition Ready names it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
}

/// So many distinct contents, and their bytes together.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct BlobAmount {
    pub blobs: i64,
    pub size_bytes: i64,
    /// `sizeBytes` for people.
    pub size: String,
}

/// The contents of some sizes.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct SizeBucket {
    /// The sizes are below this, in bytes, and at least that of the bucket before. Absent: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below: Option<i64>,
    pub blobs: i64,
    pub size_bytes: i64,
}

/// A manifest, and what it has for itself.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct LargestManifest {
    #[schemars(length(max = 63))]
    pub namespace: String,
    /// Also of one that is deleted and has history on the node, or that `larder store` named.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Bytes of the contents that only its tree and its history name: what goes when they do.
    pub exclusive_bytes: i64,
    /// `exclusiveBytes` for people.
    pub exclusive: String,
}

/// A content that several files share.
#[derive(JsonSchema, Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct SharedBlob {
    #[schemars(length(max = 71))]
    pub digest: String,
    /// Bytes.
    pub size_bytes: i64,
    /// Files of stored trees that have it.
    pub references: i64,
    /// Stored trees that have it.
    pub trees: i64,
    /// `sizeBytes` times the references beyond the first.
    pub saved_bytes: i64,
    /// `savedBytes` for people.
    pub saved: String,
}
