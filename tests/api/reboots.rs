//! What becomes of layers that an agent cannot mount at once, cannot mount again, or may not take away.

use std::path::{Path, PathBuf};

use kube::Api;
use larder::api::NodeStore;
use rustix::mount::{UnmountFlags, unmount};
use serde_json::json;

use crate::support::{PATIENCE, Site, eventually, write_files};

/// Ends the agent and everything that it has mounted, as a reboot does: what was in memory is gone.
fn reboot(site: &mut Site) {
    site.agent.kill();
    for point in site.store.mounts().into_iter().rev() {
        unmount(&point, UnmountFlags::empty()).unwrap();
    }
}

async fn road_is(site: &Site, road: &str) {
    let stores: Api<NodeStore> = Api::all(site.cluster.client().await);
    eventually(PATIENCE, &format!("the road is {road}"), async || {
        let store = stores.get_opt(&site.node).await.map_err(|error| error.to_string())?;
        let said = store.and_then(|store| store.status?.road);
        match said.as_deref() == Some(road) {
            true => Ok(()),
            false => Err(format!("{said:?}")),
        }
    })
    .await;
    assert_eq!(
        site.agent
            .metrics()
            .get(&format!("larder_layer_road{{road=\"{road}\"}}")),
        Some(&1.0)
    );
}

async fn path_of(site: &Site, layer: &str, reason: &str) -> PathBuf {
    let said = site.layer_says(layer, "True", reason).await;
    said.status.unwrap().path.unwrap().into()
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_record_was_repaired_is_the_one_that_it_was() {
    let mut site = Site::start("records").await;
    write_files(&site.source("base"), 3, "base");
    site.create_manifest("base", json!({})).await;
    site.manifest_says("base", "True", "Stored").await;
    site.create_layer("work", "base", json!({})).await;
    let path = path_of(&site, "work", "Mounted").await;
    let before = site.layer_says("work", "True", "Mounted").await.status.unwrap();
    std::fs::write(path.join("mine"), "mine").unwrap();
    site.agent.kill();
    let folders = std::fs::read_dir(site.root().join("layers")).unwrap();
    let record = folders.last().unwrap().unwrap().path().join("layer.json");
    let text_before = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    site.restart_agent().await;
    site.layer_says("work", "False", "MountFailed").await;
    // Meanwhile the manifest gets another tree.
    write_files(&site.source("base"), 4, "another");
    site.request("base").await;
    let rebuilt = site.manifest_says("base", "True", "Stored").await.status.unwrap();
    assert_ne!(rebuilt.digest, before.digest);
    std::fs::write(&record, text_before).unwrap();
    assert_eq!(path_of(&site, "work", "Mounted").await, path);
    let after = site.layer_says("work", "True", "Mounted").await.status.unwrap();
    assert_eq!(after.digest, before.digest);
    assert_eq!(text(&path.join("mine")), "mine");
    // Also when there is no manifest any more.
    site.agent.kill();
    let good = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    site.delete_manifest("base").await;
    site.restart_agent().await;
    site.layer_says("work", "False", "MountFailed").await;
    std::fs::write(&record, good).unwrap();
    site.layer_says("work", "True", "Mounted").await;
    site.delete_layer("work").await;
    assert_eq!(site.store.layer_mounts(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_wait_for_their_tree_come_back_after_a_reboot_and_wait_for_their_users() {
    let mut site = Site::start("reboots").await;
    site.agent.kill();
    site.restart_agent_with(&["--layer-road", "copy"]).await;
    road_is(&site, "Copy").await;

    // Nobody has a manifest of this name, then it has nothing to read, and then it has.
    site.create_layer("work", "base", json!({})).await;
    site.layer_says("work", "False", "NotPlaced").await;
    site.create_manifest("base", json!({})).await;
    site.manifest_says("base", "False", "SourceNotFound").await;
    site.layer_says("work", "False", "ManifestNotReady").await;
    site.create_layer("memory", "base", json!({"mode": "Tmpfs"})).await;
    write_files(&site.source("base"), 3, "base");
    site.request("base").await;
    site.manifest_says("base", "True", "Stored").await;
    let (work, memory) = (
        path_of(&site, "work", "Mounted").await,
        path_of(&site, "memory", "Mounted").await,
    );
    for path in [&work, &memory] {
        std::fs::write(path.join("mine"), "mine").unwrap();
    }

    // After the reboot, the road is another one.
    reboot(&mut site);
    site.restart_agent_with(&["--layer-road", "paths"]).await;
    road_is(&site, "Paths").await;
    assert_eq!(path_of(&site, "memory", "ResetByReboot").await, memory);
    assert!(!memory.join("mine").exists());
    assert_eq!(path_of(&site, "work", "Mounted").await, work);
    eventually(PATIENCE, "both are mounted", async || {
        let metrics = site.agent.metrics();
        let value = |name: &str| metrics[name];
        match (value("larder_layers"), value("larder_layer_mount_seconds_count")) == (2.0, 2.0) {
            true => Ok(()),
            false => Err(format!("{metrics:?}")),
        }
    })
    .await;
    assert_eq!(text(&work.join("mine")), "mine");
    for path in [&work, &memory] {
        assert_eq!(
            text(&path.join("file-00001")),
            text(&site.source("base").join("file-00001"))
        );
    }

    // Who has a file open is waited for, and named.
    let open = std::fs::File::open(memory.join("file-00001")).unwrap();
    let layers = site.layers().await;
    layers.delete("memory", &Default::default()).await.unwrap();
    let said = site.layer_says("memory", "False", "InUse").await.status.unwrap();
    let pid = std::process::id().to_string();
    assert!(
        said.conditions.iter().any(|condition| condition.message.contains(&pid)),
        "{said:?}"
    );
    drop(open);
    eventually(PATIENCE * 2, "the layer is gone", async || {
        match layers.get_opt("memory").await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|layer| layer.and_then(|layer| layer.status)))),
        }
    })
    .await;

    // A disk that was wiped is not made anew in silence.
    assert_eq!(site.agent.metrics()["larder_layer_mount_failures_total"], 0.0);
    reboot(&mut site);
    let folder = std::fs::read_dir(site.root().join("layers"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    std::fs::remove_file(folder.path().join("disk.img")).unwrap();
    site.restart_agent().await;
    let said = site.layer_says("work", "False", "DataLost").await.status.unwrap();
    assert!(
        said.conditions
            .iter()
            .any(|condition| condition.message.contains("disk.img")),
        "{said:?}"
    );
    assert_eq!(site.agent.metrics()["larder_layer_mount_failures_total"], 1.0);
    site.delete_layer("work").await;
    assert_eq!(site.store.layer_mounts(), Vec::<PathBuf>::new());
    site.no_loop_devices().await;
    site.check_store();
}
