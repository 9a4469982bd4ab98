//! Several policies on one node: which governs, what the others say, and that nothing goes back and forth.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Site, by_patience, eventually, write_files};

impl Site {
    /// Waits until `kubectl get` prints these cells of an object, among others.
    async fn prints(&self, kind: &str, name: &str, cells: &[(&str, &str)]) {
        eventually(PATIENCE, &format!("{kind} {name} prints {cells:?}"), async || {
            let columns = self.columns(kind, name);
            match cells.iter().all(|(column, cell)| columns[*column] == *cell) {
                true => Ok(()),
                false => Err(format!("{columns:?}")),
            }
        })
        .await;
    }

    async fn edit_policy(&self, name: &str, spec: Value) {
        let patch = Patch::Merge(json!({"spec": spec}));
        let patched = self.policies().await.patch(name, &PatchParams::default(), &patch).await;
        patched.expect("patched");
    }

    async fn label_node(&self, label: &str, value: Option<&str>) {
        let patch = Patch::Merge(json!({"metadata": {"labels": {label: value}}}));
        let nodes = Api::<Node>::all(self.cluster.client().await);
        nodes
            .patch(&self.node, &PatchParams::default(), &patch)
            .await
            .expect("labelled");
    }

    fn runs(&self) -> usize {
        self.store_json(&["runs"])["runs"].as_array().expect("runs").len()
    }

    async fn versions(&self, policies: &[&str]) -> Vec<Option<String>> {
        let api = self.policies().await;
        let mut versions = vec![self.node_store().await.metadata.resource_version];
        for policy in policies {
            versions.push(api.get(policy).await.unwrap().metadata.resource_version);
        }
        versions
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_policy_governs_a_node_whatever_becomes_of_the_others() {
    let site = Site::start("govern").await;
    write_files(&site.source("tree"), 3, "tree");
    site.create_manifest("tree", json!({})).await;
    site.manifest_says("tree", "True", "Stored").await;
    let governed = [("READY", "True"), ("REASON", "Governing"), ("GOVERNS", "1")];
    let shadowed = [("READY", "True"), ("REASON", "ShadowedBy"), ("GOVERNS", "0")];
    let nobody = [("READY", "False"), ("REASON", "NoNodes"), ("GOVERNS", "0")];

    // Applied: it governs, and its run is told in the columns of both.
    let low = site
        .create_policy("low", json!({"schedule": "0 0 1 1 *", "maxAge": "30d"}))
        .await;
    site.prints("retp", &low, &governed).await;
    site.prints(
        "nstore",
        &site.node,
        &[("POLICY", &low), ("READY", "True"), ("OVER", "")],
    )
    .await;
    site.run_policy(&low).await;
    site.prints("retp", &low, &[("DELETED", "0"), ("FREED", "0"), ("OVER", "0")])
        .await;
    site.prints("nstore", &site.node, &[("FREED", "0"), ("BLOBS", "3")])
        .await;
    assert_eq!(site.runs(), 1);

    // Another with a higher priority, for nodes of a tier that this one is not of.
    // It is the younger one: the API server tells the time of a creation in whole seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let rules = json!({"schedule": "0 0 1 1 *", "priority": 10, "dryRun": true});
    let high = site.create_policy("high", rules).await;
    site.prints("retp", &high, &governed).await;
    site.prints("retp", &low, &shadowed).await;
    site.edit_policy(&high, json!({"nodeSelector": {"site": site.node, "tier": "gold"}}))
        .await;
    site.prints("retp", &high, &nobody).await;
    site.prints("retp", &low, &governed).await;
    site.prints("nstore", &site.node, &[("POLICY", &low)]).await;

    // The node joins the tier.
    site.label_node("tier", Some("gold")).await;
    site.prints("retp", &high, &governed).await;
    site.prints("retp", &low, &shadowed).await;
    site.prints("nstore", &site.node, &[("POLICY", &high)]).await;
    site.run_policy(&high).await;
    site.prints(
        "retp",
        &high,
        &[("DRY-RUN", "true"), ("DELETED", "0"), ("FREED", "0 (dry run)")],
    )
    .await;
    assert_eq!(site.runs(), 2);

    // Edited: first below the other, then above it and suspended, which keeps the node from all runs.
    site.edit_policy(&high, json!({"priority": -1})).await;
    site.prints("retp", &high, &shadowed).await;
    site.prints("retp", &low, &governed).await;
    site.edit_policy(&high, json!({"priority": 10, "suspend": true})).await;
    site.prints(
        "retp",
        &high,
        &[("READY", "True"), ("REASON", "Suspended"), ("NEXT-RUN", "")],
    )
    .await;
    site.prints("retp", &low, &shadowed).await;
    site.request_run(&high).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(
        site.runs(),
        2,
        "neither what the one was asked for lately nor what the other was before"
    );

    // The label flaps; each policy comes to govern again and again, and none repeats a run that it made on request.
    site.edit_policy(&high, json!({"suspend": false})).await;
    eventually(PATIENCE, "what was held up is made up", async || match site.runs() {
        3 => Ok(()),
        runs => Err(format!("{runs} runs")),
    })
    .await;
    for _ in 0..3 {
        site.label_node("tier", None).await;
        site.prints("nstore", &site.node, &[("POLICY", &low)]).await;
        site.prints("retp", &low, &governed).await;
        site.label_node("tier", Some("gold")).await;
        site.prints("nstore", &site.node, &[("POLICY", &high)]).await;
        site.prints("retp", &high, &governed).await;
    }
    assert_eq!(site.runs(), 3);

    // Of two alike the older one governs, and then all is quiet.
    site.edit_policy(&high, json!({"priority": 0})).await;
    site.prints("retp", &low, &governed).await;
    site.prints("retp", &high, &shadowed).await;
    site.prints("nstore", &site.node, &[("POLICY", &low)]).await;
    let mut before = site.versions(&[&low, &high]).await;
    eventually(PATIENCE, "all is written", async || {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = site.versions(&[&low, &high]).await;
        match std::mem::replace(&mut before, now.clone()) == now {
            true => Ok(()),
            false => Err(format!("{now:?}")),
        }
    })
    .await;
    // Longer than whatever the agent and the controller do by the clock.
    tokio::time::sleep(by_patience(Duration::from_secs(8), Duration::from_mins(6))).await;
    assert_eq!(
        site.versions(&[&low, &high]).await,
        before,
        "written with nothing to say"
    );

    // Deleted: the next takes over, and in the end the built-in one.
    let policies = site.policies().await;
    policies.delete(&low, &DeleteParams::default()).await.unwrap();
    site.prints("retp", &high, &governed).await;
    policies.delete(&high, &DeleteParams::default()).await.unwrap();
    site.prints("nstore", &site.node, &[("POLICY", ""), ("READY", "True")])
        .await;
    eventually(PATIENCE, "the node runs by the built-in policy", async || {
        let state = site.node_store().await.status.unwrap().retention.unwrap_or_default();
        match state.policy_uid.is_none() && state.next_run.is_some() {
            true => Ok(()),
            false => Err(format!("{state:?}")),
        }
    })
    .await;
    assert_eq!(site.runs(), 3);
}
