//! Objects for the unit tests of the plans.

use std::time::Instant;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use super::index::Index;
use crate::api::{
    CasManifest, Invalid, NodeStore, NodeStoreSpec, NodeStoreStatus, Parsed, RetentionPolicy, WritableLayer,
};

pub fn now() -> Instant {
    Instant::now()
}

fn time(second: i64) -> String {
    Timestamp::from_second(second).unwrap().to_string()
}

fn parsed<K: serde::de::DeserializeOwned>(value: Value) -> Parsed<K> {
    let object: Parsed<K> = serde_json::from_value(value).unwrap();
    if let Err(error) = &object.object {
        panic!("a test object does not decode: {error}");
    }
    object
}

pub fn node(name: &str, labels: &[(&str, &str)]) -> Parsed<Node> {
    let labels: std::collections::BTreeMap<_, _> = labels.iter().copied().collect();
    parsed(json!({
        "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": labels},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]}
    }))
}

pub fn not_ready(name: &str) -> Parsed<Node> {
    parsed(json!({
        "metadata": {"name": name, "uid": format!("uid-{name}")},
        "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}
    }))
}

pub fn lease(name: &str, renewed: i64) -> Parsed<Lease> {
    parsed(json!({
        "metadata": {"name": name, "namespace": "larder-system"},
        "spec": {"renewTime": Timestamp::from_second(renewed).unwrap().strftime("%Y-%m-%dT%H:%M:%S.000000Z").to_string()}
    }))
}

/// A manifest `ns/NAME` of generation 1; `fields` are joined into the spec.
pub fn manifest(name: &str, created: i64, fields: Value) -> Parsed<CasManifest> {
    let mut spec = json!({"source": {"directory": {"path": "/import/x"}}});
    for (field, value) in fields.as_object().unwrap() {
        spec[field] = value.clone();
    }
    parsed(json!({
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1,
                     "resourceVersion": "1", "creationTimestamp": time(created)},
        "spec": spec
    }))
}

pub fn invalid() -> Invalid {
    Invalid {
        field: "spec.nodeSelector".into(),
        message: "invalid type: integer `5`, expected a map".into(),
    }
}

pub fn undecodable(name: &str) -> Parsed<CasManifest> {
    Parsed {
        object: Err(invalid()),
        ..manifest(name, 1, json!({}))
    }
}

pub fn policy(name: &str, priority: i32, created: i64) -> Parsed<RetentionPolicy> {
    parsed(json!({
        "metadata": {"name": name, "uid": format!("uid-{name}"), "generation": 1, "resourceVersion": "1",
                     "creationTimestamp": time(created)},
        "spec": {"nodeSelector": {}, "priority": priority}
    }))
}

pub fn layer(name: &str, node: &str) -> Parsed<WritableLayer> {
    parsed(json!({
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1, "resourceVersion": "1"},
        "spec": {"manifest": {"name": "m"}, "nodeName": node, "mode": "Overlay"}
    }))
}

pub fn store(name: &str, node_uid: &str, spec: NodeStoreSpec, status: NodeStoreStatus) -> Parsed<NodeStore> {
    parsed(json!({
        "metadata": {"name": name, "uid": format!("uid-store-{name}"), "generation": 1, "resourceVersion": "1",
                     "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": name, "uid": node_uid}]},
        "spec": spec,
        "status": status
    }))
}

/// One ready node `n1` with an agent, and the manifest `ns/m` for every node.
pub fn world() -> Index {
    let mut index = Index::default();
    index.node(node("n1", &[]));
    index.lease(lease("n1", 1), now());
    index.manifest(manifest("m", 1, json!({})));
    index.take_dirty();
    index
}
