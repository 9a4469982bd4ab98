//! The node-local content-addressed store. Knows no Kubernetes and no mounts.

mod digest;
pub mod tree;

pub use digest::{Digest, InvalidDigest, TreeDigest};
