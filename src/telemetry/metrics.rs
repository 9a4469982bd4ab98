//! Metrics in the OpenMetrics text format.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What is counted. The controller and the agent each use their part; what a process does not use stays zero.
#[derive(Debug, Default)]
pub struct Metrics {
    /// 1 while this replica leads.
    pub leader: Gauge,
    /// Writes to the API server that were taken.
    pub writes: Counter,
    /// Writes to the API server that failed and are tried again.
    pub write_errors: Counter,
    /// Trees built.
    pub builds: Counter,
    /// Builds that failed.
    pub build_failures: Counter,
    /// Layers mounted by this agent.
    pub layers: Gauge,
    /// Retention runs.
    pub retention_runs: Counter,
    /// Bytes that retention freed.
    pub freed_bytes: Counter,
    /// Distinct contents in the store.
    pub blobs: Gauge,
    /// Bytes of the contents in the store.
    pub stored_bytes: Gauge,
    registry: Registry,
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("larder"),
            ..Self::default()
        };
        let registry = &mut metrics.registry;
        registry.register("leader", "1 while this replica leads", metrics.leader.clone());
        registry.register(
            "api_writes",
            "Writes to the API server that were taken",
            metrics.writes.clone(),
        );
        registry.register(
            "api_write_errors",
            "Writes to the API server that failed",
            metrics.write_errors.clone(),
        );
        registry.register("builds", "Trees built", metrics.builds.clone());
        registry.register("build_failures", "Builds that failed", metrics.build_failures.clone());
        registry.register("layers", "Writable layers that are mounted", metrics.layers.clone());
        registry.register("retention_runs", "Retention runs", metrics.retention_runs.clone());
        registry.register(
            "retention_freed_bytes",
            "Bytes that retention freed",
            metrics.freed_bytes.clone(),
        );
        registry.register("store_blobs", "Distinct contents in the store", metrics.blobs.clone());
        registry.register(
            "store_bytes",
            "Bytes of the contents in the store",
            metrics.stored_bytes.clone(),
        );
        metrics
    }

    /// The text that a scrape gets.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
