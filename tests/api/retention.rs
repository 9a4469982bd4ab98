//! Retention by itself: for want of room, and what is told of it.

use kube::api::{DeleteParams, Patch, PatchParams};
use larder::api::conditions::{OVER_LIMIT, find};
use serde_json::json;

use crate::support::{PATIENCE, Site, eventually, write_files};

#[tokio::test(flavor = "multi_thread")]
async fn a_store_over_its_size_makes_room_by_itself_and_says_what_it_cannot_free() {
    let site = Site::start("pressure").await;
    write_files(&site.source("base"), 10, "first");
    site.create_manifest("base", json!({"revisionHistoryLimit": 3})).await;
    let first = site.manifest_says("base", "True", "Stored").await.status.unwrap();
    write_files(&site.source("base"), 10, "second");
    site.request("base").await;
    eventually(PATIENCE, "it is built again", async || {
        let status = site.manifests().await.get("base").await.unwrap().status.unwrap();
        match status.digest != first.digest && status.digest.is_some() {
            true => Ok(()),
            false => Err(format!("{status:?}")),
        }
    })
    .await;
    assert_eq!(site.blobs().len(), 20);

    // Its schedule comes on the first of January; but there is to be next to nothing.
    let rules = json!({"schedule": "0 0 1 1 *", "maxSize": "1", "gracePeriod": "0s"});
    let name = site.create_policy("pressure", rules).await;
    let policies = site.policies().await;
    let over = eventually(PATIENCE * 2, "the run and what it could not free", async || {
        let status = site.node_store().await.status.unwrap_or_default();
        find(&status.conditions, OVER_LIMIT)
            .cloned()
            .ok_or(format!("{status:?}"))
    })
    .await;
    assert_eq!(over.status, "True");
    for said in ["of at most 1", "current trees", "base"] {
        assert!(over.message.contains(said), "{}", over.message);
    }
    assert_eq!(site.blobs().len(), 10, "the former tree went, the one in use did not");
    eventually(PATIENCE, "the policy says so", async || {
        let status = policies.get(&name).await.unwrap().status.unwrap_or_default();
        match find(&status.conditions, OVER_LIMIT).is_some() && status.nodes.as_ref().is_some_and(|n| n.over_limit == 1)
        {
            true => Ok(()),
            false => Err(format!("{status:?}")),
        }
    })
    .await;

    // What it did, in an event and on the node.
    let said = eventually(PATIENCE, "the events", async || {
        let events = site.events("default", &site.node);
        let count = |kind: &str, reason: &str| events.iter().filter(|[a, b, _]| a == kind && b == reason).count();
        match (count("Normal", "RetentionRan"), count("Warning", "LiveContent")) {
            (1, 1) => Ok(events),
            (runs, warnings) if runs > 1 || warnings > 1 => panic!("each once: {events:?}"),
            _ => Err(format!("{events:?}")),
        }
    })
    .await;
    let note = &said.iter().find(|[_, reason, _]| reason == "RetentionRan").unwrap()[2];
    assert!(
        note.contains("for want of room") && note.contains("10 contents and 1 revision of history"),
        "{note}"
    );
    let run = site.store_json(&["runs", "last"]);
    assert_eq!(
        (&run["about"]["trigger"], &run["about"]["policy"]["name"]),
        (&json!("pressure"), &json!(name))
    );
    assert_eq!(
        run["items"].as_array().unwrap().len(),
        11,
        "ten contents and a manifest: {run}"
    );
    assert!(note.contains(run["id"].as_str().unwrap()), "{note}");
    // Enough room by the policy, without a run.
    let patch = Patch::Merge(json!({"spec": {"maxSize": "1Gi"}}));
    policies.patch(&name, &PatchParams::default(), &patch).await.unwrap();
    eventually(PATIENCE, "it is over its limit no more", async || {
        let status = site.node_store().await.status.unwrap_or_default();
        match find(&status.conditions, OVER_LIMIT) {
            Some(over) => Err(format!("{over:?}")),
            None => Ok(()),
        }
    })
    .await;
    assert_eq!(site.store_json(&["runs", "last"])["id"], run["id"]);
    site.check_store();
    policies.delete(&name, &DeleteParams::default()).await.unwrap();
}

impl Site {
    /// Has the manifest's source changed, and built.
    async fn rebuild(&self, name: &str, seed: &str) {
        let before = self.manifests().await.get(name).await.unwrap().status.unwrap().digest;
        write_files(&self.source(name), 3, seed);
        self.request(name).await;
        eventually(PATIENCE, "it is built again", async || {
            let status = self.manifests().await.get(name).await.unwrap().status.unwrap();
            match status.digest.is_some() && status.digest != before {
                true => Ok(()),
                false => Err(format!("{status:?}")),
            }
        })
        .await;
    }

    /// How many old trees a manifest has on the node.
    fn revisions(&self, name: &str) -> usize {
        let listed = self.store_json(&["ls"]);
        let name = format!("{}/{name}", self.namespace);
        let entry = listed["refs"]
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["name"] == name);
        entry.unwrap_or_else(|| panic!("{listed}"))["history"]
            .as_array()
            .unwrap()
            .len()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn history_has_no_more_revisions_than_its_limit_and_a_dry_run_says_what_would_go() {
    let site = Site::start("revisions").await;
    write_files(&site.source("tree"), 3, "0");
    site.create_manifest("tree", json!({"revisionHistoryLimit": 2})).await;
    site.manifest_says("tree", "True", "Stored").await;
    for (seed, revisions) in [("1", 1), ("2", 2), ("3", 2), ("4", 2)] {
        site.rebuild("tree", seed).await;
        assert_eq!(site.revisions("tree"), revisions, "after {seed}");
    }
    // A lower limit counts from the next build on.
    let patch = Patch::Merge(json!({"spec": {"revisionHistoryLimit": 1}}));
    let manifests = site.manifests().await;
    manifests.patch("tree", &PatchParams::default(), &patch).await.unwrap();
    site.rebuild("tree", "5").await;
    assert_eq!(site.revisions("tree"), 1);

    let rules = json!({"schedule": "0 0 1 1 *", "maxAge": "1s", "gracePeriod": "0s", "dryRun": true});
    let policy = site.create_policy("revisions", rules).await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let before = site.blobs();
    site.run_policy(&policy).await;
    let event = eventually(PATIENCE, "the event of the dry run", async || {
        let events = site.events("default", &site.node);
        let found = events
            .iter()
            .find(|[_, reason, _]| reason == "RetentionDryRun")
            .cloned();
        found.ok_or(format!("{events:?}"))
    })
    .await;
    // Three contents of each of five old trees, one of which is history.
    assert_eq!(event[0], "Normal");
    assert!(
        event[2].contains("as requested: would delete 15 contents and 1 revision of history"),
        "{}",
        event[2]
    );
    assert_eq!((site.blobs(), site.revisions("tree")), (before, 1));
    site.policies()
        .await
        .delete(&policy, &DeleteParams::default())
        .await
        .unwrap();
}
