//! Nodes that are gone, down, or back; and who leads.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::support::{Answer, Cluster, Faults, PATIENCE, Rule, SYSTEM_NAMESPACE, Site, eventually, write_files};
use crate::{Controller, reads};

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_on_a_node_that_is_gone_can_be_deleted_and_others_keep_their_finalizers() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let mut site = Site::start_in(cluster, "gone").await;
    write_files(&site.source("tree"), 3, "gone");
    site.create_manifest("tree", json!({})).await;
    site.create_layer("doomed", "tree", json!({"mode": "Tmpfs"})).await;
    site.create_layer("foreign", "tree", json!({"mode": "Tmpfs"})).await;
    site.layer_says("doomed", "True", "Mounted").await;
    site.layer_says("foreign", "True", "Mounted").await;
    let layers = site.layers().await;
    let foreign = json!({"metadata": {"finalizers": ["larder.dev/layer", "example.com/other"]}});
    layers
        .patch("foreign", &PatchParams::default(), &Patch::Merge(foreign))
        .await
        .unwrap();

    site.agent.kill();
    cluster.set_node_ready(&site.node, false).await;
    site.layer_says("doomed", "False", "NodeUnreachable").await;
    site.manifest_says("tree", "False", "NodesUnreachable").await;
    for layer in ["doomed", "foreign"] {
        layers.delete(layer, &DeleteParams::default()).await.unwrap();
    }

    // A node that is down, or that a failed or empty list does not show, is not gone.
    controller.faults.add(Rule::new(reads("nodes"), Answer::EmptyList));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let held = layers.get("doomed").await.unwrap().metadata.finalizers;
    assert_eq!(held, Some(vec!["larder.dev/layer".to_owned()]));
    controller.faults.clear();

    Api::<Node>::all(cluster.client().await)
        .delete(&site.node, &DeleteParams::default())
        .await
        .unwrap();
    let start = Instant::now();
    eventually(PATIENCE, "the layer is gone", async || {
        match layers.get_opt("doomed").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(start.elapsed() < Duration::from_secs(60));
    eventually(PATIENCE, "only the other's finalizer is left", async || {
        let left = layers
            .get("foreign")
            .await
            .map_err(|error| error.to_string())?
            .metadata
            .finalizers;
        if left == Some(vec!["example.com/other".to_owned()]) {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .await;
    layers
        .patch(
            "foreign",
            &PatchParams::default(),
            &Patch::Merge(json!({"metadata": {"finalizers": null}})),
        )
        .await
        .unwrap();
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_finishes_what_was_deleted_meanwhile() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let mut site = Site::start_in(cluster, "back").await;
    write_files(&site.source("tree"), 3, "back");
    site.create_manifest("tree", json!({})).await;
    site.create_layer("work", "tree", json!({})).await;
    site.create_layer("stays", "tree", json!({})).await;
    site.layer_says("work", "True", "Mounted").await;
    site.layer_says("stays", "True", "Mounted").await;
    site.agent.kill();
    cluster.set_node_ready(&site.node, false).await;
    site.layers()
        .await
        .delete("work", &DeleteParams::default())
        .await
        .unwrap();
    site.layer_says("work", "False", "NodeUnreachable").await;
    site.layer_says("stays", "False", "NodeUnreachable").await;

    cluster.set_node_ready(&site.node, true).await;
    site.restart_agent().await;
    let layers = site.layers().await;
    eventually(PATIENCE, "the layer is gone", async || {
        match layers.get_opt("work").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // The agent takes its word back from the controller.
    site.layer_says("stays", "True", "Mounted").await;
    assert_eq!(
        site.store.layer_mounts().len(),
        2,
        "one layer with its file system: {:?}",
        site.store.layer_mounts()
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_made_anew_under_its_name_gets_a_node_store_of_its_own() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let site = Site::start_in(cluster, "anew").await;
    write_files(&site.source("tree"), 3, "anew");
    site.create_manifest("tree", json!({})).await;
    site.manifest_says("tree", "True", "Stored").await;
    let before = site.node_store().await.metadata.uid;
    Api::<Node>::all(cluster.client().await)
        .delete(&site.node, &DeleteParams::default())
        .await
        .unwrap();
    let node = cluster.node(&site.node, &[("site", &site.node)]).await;
    eventually(PATIENCE, "a NodeStore of the new Node", async || {
        let stores = Api::<larder::api::NodeStore>::all(cluster.client().await);
        let store = stores.get(&site.node).await.map_err(|error| error.to_string())?;
        let owner = store
            .metadata
            .owner_references
            .iter()
            .flatten()
            .next()
            .map(|owner| owner.uid.clone());
        if store.metadata.uid != before && owner == node.metadata.uid {
            Ok(())
        } else {
            Err(format!("{:?}", store.metadata))
        }
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_ends_hands_over_at_once() {
    let cluster = Cluster::shared().await;
    let first = Controller::start(cluster).await;
    let site = Site::start_in(cluster, "lead").await;
    write_files(&site.source("one"), 3, "lead");
    site.create_manifest("one", json!({})).await;
    site.manifest_says("one", "True", "Stored").await;
    let turn = first.end().await;
    let leases: Api<Lease> = Api::namespaced(cluster.client().await, SYSTEM_NAMESPACE);
    let lease = leases.get("larder-controller").await.unwrap().spec.unwrap();
    assert!(
        lease.holder_identity.as_deref().is_none_or(str::is_empty),
        "it was not released: {lease:?}"
    );
    let second = Controller::start_in_turn(cluster, Faults::new(), turn).await;
    write_files(&site.source("two"), 3, "lead");
    site.create_manifest("two", json!({})).await;
    site.manifest_says("two", "True", "Stored").await;
    second.stop().await;
}
