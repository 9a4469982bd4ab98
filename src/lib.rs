//! larder keeps file trees on Kubernetes nodes: each distinct file once, by the SHA-256 of its bytes.
//!
//! The map; arrows between modules go one way: `cli, agent → source → layer → store` and
//! `agent, controller, cli → api`. `store` and `api` import none of the others.
//!
//! - [`store`]: the node-local content-addressed store. Knows no Kubernetes and no mounts.
//! - [`layer`]: mounts and writable layers over a tree, and reading back what was changed in one.
//! - [`source`]: where a tree comes from: a directory, a layer.

pub mod api;
pub mod layer;
pub mod source;
pub mod store;
