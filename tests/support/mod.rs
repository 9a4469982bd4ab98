//! What the integration tests share. Each test binary takes it in by `#[path = "../support/mod.rs"] mod support;`.
//!
//! - [`cluster`]: a real API server, one per test binary, and the objects that a test needs in it.
//! - [`faults`]: a client whose requests are counted, and refused or held up where a test wants it.
//! - [`process`]: the program `larder` itself, as a process that never outlives the test.
//! - [`site`]: a node with an agent at work, and what a test does with it.
//! - [`store`]: a folder for a store, with nothing left mounted in it afterwards.
//! - [`tables`]: what is a size or a duration, and what is none.
//!
//! A test that needs root or a program says so by failing, never by passing without having looked.

// Each test binary uses a part of it.
#![allow(dead_code, unused_imports)]

mod cluster;
mod faults;
mod process;
mod site;
mod store;
pub mod tables;

pub use cluster::{Cluster, SYSTEM_NAMESPACE};
pub use faults::{Answer, Faults, Rule};
pub use process::{LarderProcess, free_port, http_status, larder_process};
pub use site::{PATIENCE, Site, write_files};
pub use store::{StoreDir, shut_down, temp_store_dir};

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A name that no other test of this run has, valid as the name of any Kubernetes object.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Asks `check` until it gives a value, every 20 ms, and fails the test with `what` and its last refusal when `timeout`
/// is over.
pub async fn eventually<T>(timeout: Duration, what: &str, mut check: impl AsyncFnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        let refusal = match check().await {
            Ok(value) => return value,
            Err(refusal) => refusal,
        };
        assert!(
            start.elapsed() < timeout,
            "{what}: not within {timeout:?}; last seen: {refusal}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How much of something that takes long by nature: `short` in `make test`, `long` in `make soak`.
pub fn by_patience<T>(short: T, long: T) -> T {
    if std::env::var_os("LARDER_SOAK").is_some() {
        long
    } else {
        short
    }
}

/// The root of the repository.
pub fn repo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A folder under the build's own for files of this test binary.
fn tmp_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}
