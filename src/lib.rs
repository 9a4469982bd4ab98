//! larder keeps file trees on Kubernetes nodes: each distinct file once, by the SHA-256 of its bytes.
//!
//! The map; arrows between modules go one way: `agent → cli → source → layer → store`, `agent, controller → cluster →
//! api`, and everybody may use `telemetry`. `store` and `api` import none of the others.
//!
//! - [`store`]: the node-local content-addressed store. Knows no Kubernetes and no mounts.
//! - [`layer`]: mounts and writable layers over a tree, and reading back what was changed in one.
//! - [`source`]: where a tree comes from: a directory, a layer.
//! - [`policy`]: a RetentionPolicy's rules as a store takes them.
//! - [`agent`]: one per node: what the node should hold, into the store and its layers.
//! - [`cli`]: `larder store`, for an admin; and the socket by which an agent runs its commands.
//! - [`api`]: the custom resources: types, defaults, validation, conditions. No I/O.
//! - [`cluster`]: talking to the API server: following, writing, events, leases.
//! - [`controller`]: one per cluster: resources to nodes, and the nodes' answers back.
//! - `inputs`: what is read from disks and users, as fuzz targets and tests call it.
//! - [`telemetry`]: logs, health, metrics.

pub mod agent;
pub mod api;
pub mod cli;
pub mod cluster;
pub mod controller;
#[cfg(any(test, fuzzing))]
pub mod inputs;
pub mod layer;
pub mod policy;
pub mod source;
pub mod store;
pub mod telemetry;
