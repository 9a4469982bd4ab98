//! Absence is not deletion.

use std::time::Duration;

use kube::Api;
use kube::api::DeleteParams;
use larder::api::NodeStore;
use serde_json::json;

use crate::support::{Answer, Cluster, PATIENCE, Rule, Site, eventually, write_files};
use crate::{Controller, reads};

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_fails_or_comes_back_empty_takes_nothing_from_a_node() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let site = Site::start_in(cluster, "absence").await;
    write_files(&site.source("tree"), 5, "absence");
    site.create_manifest("tree", json!({})).await;
    site.manifest_says("tree", "True", "Stored").await;
    let before = site.node_store().await;

    // A new leader to whom the server says that there is nothing.
    let faults = controller.faults.clone();
    controller.stop().await;
    for plural in ["casmanifests", "nodes", "writablelayers", "retentionpolicies"] {
        faults.add(Rule::new(reads(plural), Answer::EmptyList));
    }
    let controller = Controller::start_with(cluster, faults.clone()).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after = site.node_store().await;
    assert_eq!(
        (after.metadata.uid, after.spec),
        (before.metadata.uid.clone(), before.spec.clone())
    );

    // One that knows better, and then is told so, or is told nothing.
    faults.clear();
    site.create_manifest(
        "second",
        json!({"source": {"directory": {"path": site.source("tree")}}}),
    )
    .await;
    let known = eventually(PATIENCE, "the controller has read the cluster again", async || {
        let store = site.node_store().await;
        if store.spec.manifests.len() == 2 {
            Ok(store)
        } else {
            Err(format!("{:?}", store.spec))
        }
    })
    .await;
    for answer in [
        Answer::EmptyList,
        Answer::Refuse(403, "Forbidden"),
        Answer::Refuse(410, "Expired"),
    ] {
        faults.add(Rule::new(reads("casmanifests"), answer.clone()));
        faults.add(Rule::new(reads("nodes"), answer.clone()));
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(site.node_store().await.spec, known.spec, "after {answer:?}");
        faults.clear();
    }
    site.check_store();

    // A real deletion is seen all the same.
    site.delete_manifest("second").await;
    site.dropped("second").await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_store_that_somebody_deletes_is_made_anew_and_costs_no_tree() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let site = Site::start_in(cluster, "nodestore").await;
    write_files(&site.source("tree"), 5, "nodestore");
    site.create_manifest("tree", json!({})).await;
    let digest = site
        .manifest_says("tree", "True", "Stored")
        .await
        .status
        .unwrap()
        .digest;
    let refs = site.root().join("refs").join(&site.namespace).join("tree");
    let stored = std::fs::metadata(&refs).unwrap().modified().unwrap();
    let uid = site.node_store().await.metadata.uid;

    let stores = Api::<NodeStore>::all(cluster.client().await);
    stores.delete(&site.node, &DeleteParams::default()).await.unwrap();
    eventually(PATIENCE, "a new NodeStore with the tree's state", async || {
        let store = stores.get(&site.node).await.map_err(|error| error.to_string())?;
        let states = store.status.clone().unwrap_or_default().manifests;
        match store.metadata.uid != uid && states.iter().any(|state| state.digest == digest) {
            true => Ok(()),
            false => Err(format!("{store:?}")),
        }
    })
    .await;
    site.manifest_says("tree", "True", "Stored").await;
    assert_eq!(
        std::fs::metadata(&refs).unwrap().modified().unwrap(),
        stored,
        "the tree was built again"
    );
    controller.stop().await;
}
