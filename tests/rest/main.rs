//! Rest: an idle cluster writes nothing. In a cluster of its own: a manifest of another test that selects every node
//! would rightly change this node's plan.

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use kube::api::{Api, DynamicObject, ListParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use larder::api::RetentionPolicy;
use serde_json::json;

use support::{PATIENCE, Site, eventually, unique, write_files};

#[tokio::test(flavor = "multi_thread")]
async fn two_minutes_of_rest_change_no_resource_version() {
    let site = Site::start("rest").await;
    write_files(&site.source("tree"), 20, "rest");
    site.create_manifest("tree", json!({"rebuildInterval": "20s"})).await;
    site.create_manifest("failing", json!({"source": {"directory": {"path": "/etc/ssl"}}}))
        .await;
    site.create_manifest("missing", json!({})).await;
    site.create_layer("disk", "tree", json!({})).await;
    site.create_layer("memory", "tree", json!({"mode": "Tmpfs"})).await;
    let policies = Api::<RetentionPolicy>::all(site.cluster.client().await);
    let name = unique("rest");
    let policy = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "RetentionPolicy", "metadata": {"name": name},
        "spec": {"nodeSelector": {"site": site.node}, "schedule": "0 0 1 1 *"}});
    policies
        .create(&PostParams::default(), &serde_json::from_value(policy).unwrap())
        .await
        .unwrap();
    site.manifest_says("tree", "True", "Stored").await;
    site.manifest_says("failing", "False", "SourceNotAllowed").await;
    site.manifest_says("missing", "False", "SourceNotFound").await;
    site.layer_says("disk", "True", "Mounted").await;
    site.layer_says("memory", "True", "Mounted").await;
    eventually(PATIENCE, "the policy governs", async || {
        let status = policies
            .get(&name)
            .await
            .map_err(|error| error.to_string())?
            .status
            .unwrap_or_default();
        match larder::api::conditions::is_true(&status.conditions, "Ready") {
            true => Ok(()),
            false => Err(format!("{status:?}")),
        }
    })
    .await;
    // What is wrong with the store is looked at each minute, and said once.
    let stray = site.root().join("refs/nobodys");
    std::fs::create_dir(&stray).unwrap();
    std::fs::write(stray.join("stray"), "{").unwrap();
    eventually(PATIENCE * 2, "the stray ref is named", async || {
        let status = site.node_store().await.status.unwrap_or_default();
        match larder::api::conditions::is_true(&status.conditions, "Stalled") {
            true => Ok(()),
            false => Err(format!("{:?}", status.conditions)),
        }
    })
    .await;
    // The layers' use is looked at every 30 s, and may have to be told once.
    tokio::time::sleep(Duration::from_secs(35)).await;

    let before = versions(&site, &name).await;
    assert_eq!(before.len(), 7, "{before:?}");
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(versions(&site, &name).await, before);
}

/// Kind and name of the site's objects, with their resource versions.
async fn versions(site: &Site, policy: &str) -> BTreeMap<(String, String), String> {
    let client = site.cluster.client().await;
    let mut versions = BTreeMap::new();
    for (kind, plural) in [
        ("CasManifest", "casmanifests"),
        ("WritableLayer", "writablelayers"),
        ("NodeStore", "nodestores"),
        ("RetentionPolicy", "retentionpolicies"),
    ] {
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("larder.dev", "v1alpha1", kind), plural);
        let list = Api::<DynamicObject>::all_with(client.clone(), &resource)
            .list(&ListParams::default())
            .await
            .unwrap();
        for object in list {
            let name = object.metadata.name.unwrap_or_default();
            let ours =
                object.metadata.namespace.as_ref() == Some(&site.namespace) || name == site.node || name == policy;
            if ours {
                versions.insert(
                    (kind.to_owned(), name),
                    object.metadata.resource_version.unwrap_or_default(),
                );
            }
        }
    }
    versions
}
