//! The rules of a RetentionPolicy as a store takes them: between `api`, which knows no store, and `store`, which knows no
//! resources.

use std::io;

use crate::api::{InvalidPolicy, PolicyRules};
use crate::store::Reader;
use crate::store::retention::Policy;

/// Why a policy has no meaning for a store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] InvalidPolicy),
    #[error("cannot tell the size of the store's disk, of which minFree is a part: {0}")]
    Disk(io::Error),
}

/// What the rules mean for this store: a part of the disk depends on its size.
pub fn limits(rules: &PolicyRules, store: &Reader) -> Result<Policy, Error> {
    Ok(limits_of(rules, disk_size(store).map_err(Error::Disk)?)?)
}

/// Bytes of the file system that a store is on.
pub fn disk_size(store: &Reader) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(store.root())?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// What the rules mean on a file system of `total` bytes.
pub fn limits_of(rules: &PolicyRules, total: u64) -> Result<Policy, InvalidPolicy> {
    Ok(Policy {
        max_age: rules.max_age()?,
        max_size: rules.max_size()?,
        min_free: rules.min_free(total)?,
        min_copies: rules.min_copies,
        grace: rules.grace()?,
    })
}
