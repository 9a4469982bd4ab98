//! Metrics in the OpenMetrics text format.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

use super::StoreMetrics;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct By {
    road: String,
}

/// What is counted. The controller and the agent each use their part; what a process does not use stays zero.
#[derive(Debug)]
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
    /// Layers with little of their limit left.
    pub layers_nearly_full: Gauge,
    /// Bytes that the mounted layers' changes take.
    pub layer_used_bytes: Gauge,
    /// Seconds from the begin of the work on a layer to its mount.
    pub layer_mount_seconds: Histogram,
    /// Layers that could not be mounted, each try.
    pub layer_mount_failures: Counter,
    /// Seconds from the begin of a snapshot to its published tree.
    pub snapshot_seconds: Histogram,
    /// Bytes of contents that snapshots stored and that were not there before.
    pub snapshot_added_bytes: Counter,
    layer_road: Family<By, Gauge>,
    /// Snapshots that failed.
    pub snapshot_failures: Counter,
    /// Retention runs.
    pub retention_runs: Counter,
    /// Retention runs that failed, or that something unreadable kept from deleting.
    pub retention_failures: Counter,
    /// Bytes that retention freed.
    pub freed_bytes: Counter,
    /// 1 while what is in use alone is more than the policy allows.
    pub over_limit: Gauge,
    /// Distinct contents in the store.
    pub blobs: Gauge,
    /// Bytes of the contents in the store.
    pub stored_bytes: Gauge,
    /// What the store's room is used for.
    pub store: StoreMetrics,
    registry: Registry,
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("larder");
        // From half a millisecond to 16 s, and from 8 ms to 4 min: each twice the one before.
        let mount_seconds = Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        let snapshot_seconds = Histogram::new(exponential_buckets(0.008, 2.0, 16));
        let in_registry = &mut registry;
        Self {
            leader: registered(in_registry, "leader", "1 while this replica leads", Gauge::default()),
            writes: registered(
                in_registry,
                "api_writes",
                "Writes to the API server that were taken",
                Counter::default(),
            ),
            write_errors: registered(
                in_registry,
                "api_write_errors",
                "Writes to the API server that failed",
                Counter::default(),
            ),
            builds: registered(in_registry, "builds", "Trees built", Counter::default()),
            build_failures: registered(in_registry, "build_failures", "Builds that failed", Counter::default()),
            layers: registered(
                in_registry,
                "layers",
                "Writable layers that are mounted",
                Gauge::default(),
            ),
            layers_nearly_full: registered(
                in_registry,
                "layers_nearly_full",
                "Writable layers with at least 90 % of their limit used",
                Gauge::default(),
            ),
            layer_used_bytes: registered(
                in_registry,
                "layer_used_bytes",
                "Bytes that the changes in mounted layers take",
                Gauge::default(),
            ),
            layer_mount_seconds: registered(
                in_registry,
                "layer_mount_seconds",
                "Time to mount a writable layer, with the making of its image where there is none",
                mount_seconds,
            ),
            layer_mount_failures: registered(
                in_registry,
                "layer_mount_failures",
                "Tries to mount a writable layer that failed",
                Counter::default(),
            ),
            snapshot_seconds: registered(
                in_registry,
                "snapshot_seconds",
                "Time to capture a writable layer as a tree",
                snapshot_seconds,
            ),
            snapshot_added_bytes: registered(
                in_registry,
                "snapshot_added_bytes",
                "Bytes that captures of writable layers added to the store",
                Counter::default(),
            ),
            layer_road: registered(
                in_registry,
                "layer_road",
                "1 for the way by which layers are made on this node",
                Family::default(),
            ),
            snapshot_failures: registered(
                in_registry,
                "snapshot_failures",
                "Captures of writable layers that failed",
                Counter::default(),
            ),
            retention_runs: registered(in_registry, "retention_runs", "Retention runs", Counter::default()),
            retention_failures: registered(
                in_registry,
                "retention_failures",
                "Retention runs that failed, or that something unreadable kept from deleting",
                Counter::default(),
            ),
            over_limit: registered(
                in_registry,
                "over_limit",
                "1 while what is in use alone is more than the policy allows",
                Gauge::default(),
            ),
            freed_bytes: registered(
                in_registry,
                "retention_freed_bytes",
                "Bytes that retention freed",
                Counter::default(),
            ),
            blobs: registered(
                in_registry,
                "store_blobs",
                "Distinct contents in the store",
                Gauge::default(),
            ),
            stored_bytes: registered(
                in_registry,
                "store_bytes",
                "Bytes of the contents in the store",
                Gauge::default(),
            ),
            store: StoreMetrics::new(in_registry),
            registry,
        }
    }

    /// Sets the way by which layers are made.
    pub fn layers_are_made_by(&self, road: impl std::fmt::Display) {
        let road = By { road: road.to_string() };
        self.layer_road.get_or_create(&road).set(1);
    }

    /// The text that a scrape gets.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

pub(super) fn registered<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_metric_is_documented_and_no_other() {
        let metrics = Metrics::new();
        // What has labels is told once there is one.
        metrics.store.used("current", 1, 2);
        metrics.layers_are_made_by("Copy");
        metrics.store.below(None, 1, 2);
        metrics.store.largest([("ns", "name", 2)].into_iter());
        let text = metrics.text().unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let mut registered: Vec<String> = types
            .map(|line| match line.split_once(' ') {
                Some((name, "counter")) => format!("{name}_total"),
                Some((name, _)) => name.to_owned(),
                None => panic!("{line}"),
            })
            .collect();
        registered.sort();
        let page = include_str!("../../docs/metrics.md");
        // The table's cells; the examples of alerts name some again.
        let mut documented: Vec<String> = page
            .lines()
            .filter(|line| line.starts_with("| `"))
            .flat_map(|line| line.split('`'))
            .filter(|word| word.starts_with("larder_"))
            .map(|word| word.split('{').next().unwrap_or_default().to_owned())
            .collect();
        documented.sort();
        documented.dedup();
        assert_eq!(registered, documented);
    }
}
