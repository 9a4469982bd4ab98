//! Metrics of a node's store: what its room is used for (docs/store.md defines each figure).

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::registered;

/// What distinct contents are needed for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Use {
    r#use: &'static str,
}

/// The sizes of contents, each from the bound before it on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Below {
    below: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Named {
    namespace: String,
    manifest: String,
}

/// Set together, each time the store was looked through.
#[derive(Debug)]
pub struct StoreMetrics {
    /// 1 while something is wrong with the store.
    pub problems: Gauge,
    /// Contents of stored trees that are not there, and their bytes.
    pub missing_blobs: Gauge,
    pub missing_bytes: Gauge,
    /// Distinct trees that are stored.
    pub trees: Gauge,
    /// Regular files of the stored trees.
    pub references: Gauge,
    /// Bytes of the references.
    pub logical_bytes: Gauge,
    /// Bytes of the distinct contents.
    pub unique_bytes: Gauge,
    /// The difference of the two.
    pub saved_bytes: Gauge,
    used_blobs: Family<Use, Gauge>,
    used_bytes: Family<Use, Gauge>,
    below_blobs: Family<Below, Gauge>,
    below_bytes: Family<Below, Gauge>,
    exclusive_bytes: Family<Named, Gauge>,
}

impl StoreMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let mut gauge = |name, help| registered(registry, name, help, Gauge::default());
        let problems = gauge("store_problems", "1 while something is wrong with the store");
        let missing_blobs = gauge("store_missing_blobs", "Contents of stored trees that are not there");
        let missing_bytes = gauge("store_missing_bytes", "Bytes of the contents that are not there");
        let trees = gauge("store_trees", "Distinct trees that are stored");
        let references = gauge("store_references", "Regular files of the stored trees");
        let logical_bytes = gauge("store_logical_bytes", "Bytes of all files of the stored trees");
        let unique_bytes = gauge(
            "store_unique_bytes",
            "Bytes of the distinct contents of the stored trees",
        );
        let saved_bytes = gauge("store_saved_bytes", "Bytes that storing every content once saves");
        Self {
            problems,
            missing_blobs,
            missing_bytes,
            trees,
            references,
            logical_bytes,
            unique_bytes,
            saved_bytes,
            used_blobs: registered(
                registry,
                "store_blobs_by_use",
                "Distinct contents by what needs them: current, history, unnamed, garbage",
                Family::default(),
            ),
            used_bytes: registered(
                registry,
                "store_bytes_by_use",
                "Bytes of the distinct contents by what needs them",
                Family::default(),
            ),
            below_blobs: registered(
                registry,
                "store_blobs_by_size",
                "Distinct contents of stored trees by size: below so many bytes, and not below the bound before",
                Family::default(),
            ),
            below_bytes: registered(
                registry,
                "store_bytes_by_size",
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

    /// Sets what there is for one use.
    pub fn used(&self, by: &'static str, blobs: i64, bytes: i64) {
        self.used_blobs.get_or_create(&Use { r#use: by }).set(blobs);
        self.used_bytes.get_or_create(&Use { r#use: by }).set(bytes);
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
    pub fn largest<'a>(&self, manifests: impl Iterator<Item = (&'a str, &'a str, i64)>) {
        self.exclusive_bytes.clear();
        for (namespace, manifest, bytes) in manifests {
            let (namespace, manifest) = (namespace.to_owned(), manifest.to_owned());
            let named = Named { namespace, manifest };
            self.exclusive_bytes.get_or_create(&named).set(bytes);
        }
    }
}
