//! What the controller knows, in a compact form, and what a change of it makes due.
//!
//! No I/O: it is fed what the watches say and answers with the keys whose plans have to be made again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::ObjectMeta;

use crate::api::{
    CasManifest, CasManifestSpec, CasManifestStatus, Invalid, LAYER_FINALIZER, NodeStore, NodeStoreSpec,
    NodeStoreStatus, Parsed, RetentionPolicy, RetentionPolicySpec, RetentionPolicyStatus, WritableLayer,
    WritableLayerStatus, conditions, requested_at, selects,
};
use crate::cluster::{HEARTBEAT_DURATION, ObjectKey};

/// Something whose plan has to be made again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The spec of the NodeStore with this name.
    Node(String),
    /// The status of a CasManifest.
    Manifest(ObjectKey),
    /// The status of a RetentionPolicy.
    Policy(String),
    /// The status and finalizer of a WritableLayer whose node may be away.
    Layer(ObjectKey),
}

/// What every watched object has.
#[derive(Debug, Clone, Default)]
pub struct Meta {
    pub uid: String,
    pub resource_version: String,
    pub generation: i64,
    pub created: Timestamp,
    pub requested_at: Option<String>,
    pub deleting: bool,
}

impl Meta {
    fn of(metadata: &ObjectMeta) -> Self {
        Self {
            uid: metadata.uid.clone().unwrap_or_default(),
            resource_version: metadata.resource_version.clone().unwrap_or_default(),
            generation: metadata.generation.unwrap_or_default(),
            created: metadata
                .creation_timestamp
                .as_ref()
                .map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            requested_at: requested_at(metadata),
            deleting: metadata.deletion_timestamp.is_some(),
        }
    }
}

impl Meta {
    /// Whether it is the same object with the same spec and request: whatever else changed concerns no node.
    fn asks_the_same(&self, other: &Self) -> bool {
        (&self.uid, self.generation, &self.requested_at) == (&other.uid, other.generation, &other.requested_at)
    }
}

#[derive(Debug, Clone)]
pub struct NodeFacts {
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    /// The kubelet says that the node is ready.
    pub ready: bool,
}

/// An agent's sign of life, judged by this controller's own clock: clocks of nodes lie.
#[derive(Debug, Clone)]
struct LeaseFacts {
    renewed: Option<Timestamp>,
    seen: Instant,
    alive: bool,
}

#[derive(Debug, Clone)]
pub struct ManifestFacts {
    pub meta: Meta,
    pub spec: Result<CasManifestSpec, Invalid>,
    pub status: CasManifestStatus,
}

impl ManifestFacts {
    /// Whether its status says that this generation and request are done.
    fn is_done(&self) -> bool {
        self.status.observed_generation == self.meta.generation
            && conditions::is_true(&self.status.conditions, conditions::READY)
            && self.status.last_handled_reconcile_at == self.meta.requested_at
    }
}

#[derive(Debug, Clone)]
pub struct PolicyFacts {
    pub meta: Meta,
    pub spec: Result<RetentionPolicySpec, Invalid>,
    pub status: RetentionPolicyStatus,
}

#[derive(Debug, Clone)]
pub struct LayerFacts {
    pub meta: Meta,
    /// Absent in an object that does not decode.
    pub node: Option<String>,
    pub invalid: Option<Invalid>,
    pub held: bool,
    pub status: WritableLayerStatus,
}

#[derive(Debug, Clone)]
pub struct StoreFacts {
    pub meta: Meta,
    pub owner_uid: Option<String>,
    pub spec: NodeStoreSpec,
    pub status: NodeStoreStatus,
}

/// Everything that the controller plans from.
#[derive(Debug, Default)]
pub struct Index {
    pub nodes: HashMap<String, NodeFacts>,
    leases: HashMap<String, LeaseFacts>,
    pub manifests: BTreeMap<ObjectKey, ManifestFacts>,
    pub policies: BTreeMap<String, PolicyFacts>,
    pub layers: BTreeMap<ObjectKey, LayerFacts>,
    pub stores: HashMap<String, StoreFacts>,
    /// Manifests (by UID) that a node has no room for.
    pub refused: HashMap<String, BTreeSet<String>>,
    dirty: BTreeSet<Key>,
}

impl Index {
    /// Takes the keys that became due since the last call.
    pub fn take_dirty(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.dirty)
    }

    /// Makes everything due.
    pub fn touch_all(&mut self) {
        self.touch_nodes();
        self.dirty.extend(self.manifests.keys().cloned().map(Key::Manifest));
        self.dirty.extend(self.policies.keys().cloned().map(Key::Policy));
        self.dirty.extend(self.layers.keys().cloned().map(Key::Layer));
    }

    fn touch_nodes(&mut self) {
        self.dirty.extend(self.nodes.keys().cloned().map(Key::Node));
    }

    fn touch_policies(&mut self) {
        self.dirty.extend(self.policies.keys().cloned().map(Key::Policy));
    }

    /// All that a node's presence, labels or health decide.
    fn touch_node(&mut self, name: &str) {
        self.dirty.insert(Key::Node(name.to_owned()));
        self.dirty.extend(self.manifests.keys().cloned().map(Key::Manifest));
        self.touch_policies();
        let on_node = self
            .layers
            .iter()
            .filter(|(_, layer)| layer.node.as_deref() == Some(name));
        self.dirty.extend(on_node.map(|(key, _)| Key::Layer(key.clone())));
    }

    pub fn node(&mut self, object: Parsed<Node>) {
        let name = object.metadata.name.clone().unwrap_or_default();
        // What of a Node does not decode is none of larder's fields; labels are metadata.
        let ready = object
            .object
            .ok()
            .and_then(|node| node.status?.conditions)
            .is_some_and(|conditions| {
                conditions
                    .iter()
                    .any(|condition| condition.type_ == "Ready" && condition.status == "True")
            });
        let facts = NodeFacts {
            uid: object.metadata.uid.unwrap_or_default(),
            labels: object.metadata.labels.unwrap_or_default(),
            ready,
        };
        let old = self.nodes.insert(name.clone(), facts.clone());
        // A Node changes every few seconds in ways that decide nothing here.
        if old.is_none_or(|old| old.uid != facts.uid || old.labels != facts.labels || old.ready != facts.ready) {
            self.touch_node(&name);
        }
    }

    pub fn node_gone(&mut self, name: &str, uid: &str) {
        if self.nodes.get(name).is_some_and(|node| node.uid == uid) {
            self.nodes.remove(name);
            self.touch_node(name);
        }
    }

    pub fn lease(&mut self, object: Parsed<Lease>, now: Instant) {
        let name = object.metadata.name.clone().unwrap_or_default();
        let renewed = object
            .object
            .ok()
            .and_then(|lease| lease.spec?.renew_time)
            .map(|time| time.0);
        let old = self.leases.get(&name);
        if old.is_some_and(|old| old.renewed == renewed) {
            return;
        }
        let was_alive = old.is_some_and(|old| old.alive);
        self.leases.insert(
            name.clone(),
            LeaseFacts {
                renewed,
                seen: now,
                alive: true,
            },
        );
        if !was_alive {
            self.touch_node(&name);
        }
    }

    pub fn lease_gone(&mut self, name: &str) {
        if let Some(lease) = self.leases.get_mut(name) {
            lease.alive = false;
            self.touch_node(name);
        }
    }

    /// Looks which agents have been silent for too long.
    pub fn tick(&mut self, now: Instant) {
        let silent = |lease: &LeaseFacts| now.duration_since(lease.seen) > HEARTBEAT_DURATION;
        let gone_silent: Vec<String> = self
            .leases
            .iter_mut()
            .filter(|(_, lease)| lease.alive && silent(lease))
            .map(|(name, lease)| {
                lease.alive = false;
                name.clone()
            })
            .collect();
        for name in gone_silent {
            self.touch_node(&name);
        }
    }

    pub fn manifest(&mut self, object: Parsed<CasManifest>) {
        let key = ObjectKey::of(&object.metadata);
        let meta = Meta::of(&object.metadata);
        let (spec, status) = match object.object {
            Ok(manifest) => (Ok(manifest.spec), manifest.status.unwrap_or_default()),
            Err(invalid) => (Err(invalid), CasManifestStatus::default()),
        };
        let old = self.manifests.insert(
            key.clone(),
            ManifestFacts {
                meta: meta.clone(),
                spec,
                status,
            },
        );
        self.dirty.insert(Key::Manifest(key));
        // An own status write comes back through the watch; it concerns no node.
        if !old.is_some_and(|old| old.meta.asks_the_same(&meta)) {
            self.touch_nodes();
        }
    }

    pub fn manifest_gone(&mut self, key: &ObjectKey, uid: &str) {
        if self.manifests.get(key).is_some_and(|manifest| manifest.meta.uid == uid) {
            self.manifests.remove(key);
            self.touch_nodes();
        }
    }

    pub fn policy(&mut self, object: Parsed<RetentionPolicy>) {
        let name = object.metadata.name.clone().unwrap_or_default();
        let meta = Meta::of(&object.metadata);
        let (spec, status) = match object.object {
            Ok(policy) => (Ok(policy.spec), policy.status.unwrap_or_default()),
            Err(invalid) => (Err(invalid), RetentionPolicyStatus::default()),
        };
        let old = self.policies.insert(
            name.clone(),
            PolicyFacts {
                meta: meta.clone(),
                spec,
                status,
            },
        );
        self.dirty.insert(Key::Policy(name));
        if !old.is_some_and(|old| old.meta.asks_the_same(&meta)) {
            self.touch_nodes();
            self.touch_policies();
        }
    }

    pub fn policy_gone(&mut self, name: &str, uid: &str) {
        if self.policies.get(name).is_some_and(|policy| policy.meta.uid == uid) {
            self.policies.remove(name);
            self.touch_nodes();
            self.touch_policies();
        }
    }

    pub fn layer(&mut self, object: Parsed<WritableLayer>) {
        let key = ObjectKey::of(&object.metadata);
        let held = object
            .metadata
            .finalizers
            .iter()
            .flatten()
            .any(|finalizer| finalizer == LAYER_FINALIZER);
        let meta = Meta::of(&object.metadata);
        let (node, status, invalid) = match object.object {
            Ok(layer) => (Some(layer.spec.node_name), layer.status.unwrap_or_default(), None),
            Err(invalid) => (None, WritableLayerStatus::default(), Some(invalid)),
        };
        let facts = LayerFacts {
            meta,
            node,
            invalid,
            held,
            status,
        };
        let old = self.layers.insert(key.clone(), facts.clone());
        if old.is_none_or(|old| old.meta.uid != facts.meta.uid || old.node != facts.node) {
            self.touch_snapshots(&key);
        }
        self.dirty.insert(Key::Layer(key));
    }

    pub fn layer_gone(&mut self, key: &ObjectKey, uid: &str) {
        if self.layers.get(key).is_some_and(|layer| layer.meta.uid == uid) {
            self.layers.remove(key);
            self.touch_snapshots(key);
        }
    }

    /// The manifests whose source is this layer, and the nodes that they may be on.
    fn touch_snapshots(&mut self, layer: &ObjectKey) {
        let snapshots = self.manifests.iter().filter(|(key, manifest)| {
            key.namespace == layer.namespace
                && manifest.spec.as_ref().is_ok_and(|spec| {
                    spec.source
                        .layer
                        .as_ref()
                        .is_some_and(|source| source.name == layer.name)
                })
        });
        let snapshots: Vec<Key> = snapshots.map(|(key, _)| Key::Manifest(key.clone())).collect();
        if !snapshots.is_empty() {
            self.dirty.extend(snapshots);
            self.touch_nodes();
        }
    }

    pub fn store(&mut self, object: Parsed<NodeStore>) {
        let name = object.metadata.name.clone().unwrap_or_default();
        let owner = object
            .metadata
            .owner_references
            .iter()
            .flatten()
            .find(|owner| owner.kind == "Node");
        let (spec, status) = match object.object {
            Ok(store) => (store.spec, store.status.unwrap_or_default()),
            // Somebody broke it by hand: keep what was known, and let the next write mend the spec.
            Err(_) => match self.stores.get(&name) {
                Some(old) => (old.spec.clone(), old.status.clone()),
                None => Default::default(),
            },
        };
        let facts = StoreFacts {
            owner_uid: owner.map(|owner| owner.uid.clone()),
            meta: Meta::of(&object.metadata),
            spec,
            status,
        };
        let old = self.stores.insert(name.clone(), facts);
        self.dirty.insert(Key::Node(name.clone()));
        self.touch_stored(&name, old.as_ref());
    }

    pub fn store_gone(&mut self, name: &str, uid: &str) {
        if self.stores.get(name).is_some_and(|store| store.meta.uid == uid) {
            let old = self.stores.remove(name);
            self.dirty.insert(Key::Node(name.to_owned()));
            self.touch_stored(name, old.as_ref());
        }
    }

    /// The manifests and policies whose state on the node is not what it was.
    fn touch_stored(&mut self, name: &str, old: Option<&StoreFacts>) {
        let new = self.stores.get(name);
        let mut dirty = BTreeSet::new();
        let states = |store: Option<&StoreFacts>| -> HashMap<ObjectKey, crate::api::ManifestState> {
            let states = store.into_iter().flat_map(|store| &store.status.manifests);
            states
                .map(|state| (ObjectKey::new(&state.namespace, &state.name), state.clone()))
                .collect()
        };
        let (before, after) = (states(old), states(new));
        let keys: BTreeSet<&ObjectKey> = before.keys().chain(after.keys()).collect();
        for key in keys {
            if before.get(key) != after.get(key) {
                dirty.insert(Key::Manifest(key.clone()));
            }
        }
        let placed = |store: Option<&StoreFacts>| -> BTreeSet<ObjectKey> {
            let placed = store.into_iter().flat_map(|store| &store.spec.manifests);
            placed
                .map(|manifest| ObjectKey::new(&manifest.namespace, &manifest.name))
                .collect()
        };
        dirty.extend(
            placed(old)
                .symmetric_difference(&placed(new))
                .cloned()
                .map(Key::Manifest),
        );
        let retention = |store: Option<&StoreFacts>| {
            store.map(|store| (store.spec.retention.clone(), store.status.retention.clone()))
        };
        if retention(old) != retention(new) {
            dirty.extend(self.policies.keys().cloned().map(Key::Policy));
        }
        self.dirty.extend(dirty);
    }

    /// Marks a manifest as refused by a node, or as not refused any more.
    pub fn set_refused(&mut self, node: &str, refused: BTreeSet<String>) {
        let old = self.refused.insert(node.to_owned(), refused).unwrap_or_default();
        let new = &self.refused[node];
        if old != *new {
            let changed: BTreeSet<&String> = old.symmetric_difference(new).collect();
            let keys = self
                .manifests
                .iter()
                .filter(|(_, manifest)| changed.contains(&manifest.meta.uid));
            self.dirty.extend(keys.map(|(key, _)| Key::Manifest(key.clone())));
        }
    }

    /// Whether a node ever had an agent.
    pub fn has_agent(&self, node: &str) -> bool {
        self.leases.contains_key(node)
            || self
                .stores
                .get(node)
                .is_some_and(|store| store.status.store_id.is_some())
    }

    /// Whether a node's agent shows life and its kubelet says that it is ready.
    pub fn reachable(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|node| node.ready) && self.leases.get(node).is_some_and(|lease| lease.alive)
    }

    /// Whether the manifest belongs on the node. A snapshot belongs where its layer is, and stays where it was taken
    /// when the layer goes.
    pub fn places(&self, key: &ObjectKey, manifest: &ManifestFacts, node: &str) -> bool {
        let already = || {
            let store = self.stores.get(node);
            store.is_some_and(|store| {
                store
                    .spec
                    .manifests
                    .iter()
                    .any(|placed| placed.uid == manifest.meta.uid)
            })
        };
        let Some(facts) = self.nodes.get(node) else {
            return false;
        };
        let Ok(spec) = &manifest.spec else { return already() };
        match &spec.source.layer {
            None => selects(spec.node_selector.as_ref(), &facts.labels),
            // A snapshot that was taken does not move when another layer gets the name.
            Some(_) if manifest.is_done() => already(),
            Some(source) => match self.layers.get(&ObjectKey::new(&key.namespace, &source.name)) {
                Some(LayerFacts {
                    node: Some(layer_node), ..
                }) => layer_node == node,
                _ => already(),
            },
        }
    }

    /// How long until [`Self::tick`] has something to look at.
    pub const TICK: Duration = Duration::from_secs(5);
}
