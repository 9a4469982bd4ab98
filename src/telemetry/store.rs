//! Metrics of a node's store: what its room is used for (docs/store.md defines each figure).

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::registered;

/// What distinct contents are needed for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    of: &'static str,
}

/// The sizes of contents, each from the bound before it on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Below {
    below: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Named {
    manifest: String,
}

/// Set together, each time the store was looked through.
#[derive(Debug)]
pub struct StoreMetrics {
    /// Distinct trees that are stored.
    pub manifests: Gauge,
    /// Regular files of the stored trees.
    pub references: Gauge,
    /// Bytes of the references.
    pub logical_bytes: Gauge,
    /// Bytes of the distinct contents.
    pub unique_bytes: Gauge,
    /// The difference of the two.
    pub saved_bytes: Gauge,
    of_blobs: Family<Of, Gauge>,
    of_bytes: Family<Of, Gauge>,
    below_blobs: Family<Below, Gauge>,
    below_bytes: Family<Below, Gauge>,
    exclusive_bytes: Family<Named, Gauge>,
}

impl StoreMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let mut gauge = |name, help| registered(registry, name, help, Gauge::default());
        let manifests = gauge("store_manifests", "Distinct trees that are stored");
        let references = gauge("store_references", "Regular files of the stored trees");
        let logical_bytes = gauge("store_logical_bytes", "Bytes of all files of the stored trees");
        let unique_bytes = gauge(
            "store_unique_bytes",
            "Bytes of the distinct contents of the stored trees",
        );
        let saved_bytes = gauge("store_saved_bytes", "Bytes that storing every content once saves");
        Self {
            manifests,
            references,
            logical_bytes,
            unique_bytes,
            saved_bytes,
            of_blobs: registered(
                registry,
                "store_content_blobs",
                "Distinct contents by what they are for: current, history, unnamed, garbage; or that are missing",
                Family::default(),
            ),
            of_bytes: registered(
                registry,
                "store_content_bytes",
                "Bytes of the distinct contents by what they are for",
                Family::default(),
            ),
            below_blobs: registered(
                registry,
                "store_size_blobs",
                "Distinct contents of stored trees by size: below so many bytes, and not below the bound before",
                Family::default(),
            ),
            below_bytes: registered(
                registry,
                "store_size_bytes",
                "Bytes of the distinct contents of stored trees by size",
                Family::default(),
            ),
            exclusive_bytes: registered(
                registry,
                "store_manifest_exclusive_bytes",
                "Bytes that only this manifest and its history need, of the ten manifests with most",
                Family::default(),
            ),
        }
    }

    /// Sets what there is of one purpose.
    pub fn of(&self, of: &'static str, blobs: i64, bytes: i64) {
        self.of_blobs.get_or_create(&Of { of }).set(blobs);
        self.of_bytes.get_or_create(&Of { of }).set(bytes);
    }

    /// Sets what there is of one size; `None`: of those above all bounds.
    pub fn below(&self, below: Option<i64>, blobs: i64, bytes: i64) {
        let below = Below {
            below: below.map_or("+Inf".to_owned(), |below| below.to_string()),
        };
        self.below_blobs.get_or_create(&below).set(blobs);
        self.below_bytes.get_or_create(&below).set(bytes);
    }

    /// Names the manifests with most for themselves, in the place of those before.
    pub fn largest<'a>(&self, manifests: impl Iterator<Item = (&'a str, i64)>) {
        self.exclusive_bytes.clear();
        for (manifest, bytes) in manifests {
            let manifest = manifest.to_owned();
            self.exclusive_bytes.get_or_create(&Named { manifest }).set(bytes);
        }
    }
}
