//! `larder store` beside an agent that has a cluster to serve.

use std::process::{Command, Output};

use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::support::{PATIENCE, Site, eventually, write_files};

fn larder(site: &Site, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
    command.arg("store").args(args).args(["-o", "json"]);
    command.env("LARDER_STORE", site.root()).output().unwrap()
}

fn json(site: &Site, args: &[&str]) -> Value {
    let output = larder(site, args);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The digest of the manifest `m`, when it is stored.
async fn stored(site: &Site) -> String {
    let manifest = site.manifest_says("m", "True", "Stored").await;
    manifest.status.unwrap().digest.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifests_ref_that_an_admin_forgets_is_built_again_and_the_admins_own_stay() {
    let site = Site::start("admin").await;
    write_files(&site.source("m"), 3, "admin");
    site.create_manifest("m", json!({})).await;
    let digest = stored(&site).await;
    let name = format!("{}/m", site.namespace);
    let source = site.source("m").display().to_string();
    let refused = larder(&site, &["build", &source, "--name", &name]);
    assert_eq!(refused.status.code(), Some(4));
    assert_eq!(json(&site, &["build", &source, "--name", "mine"])["digest"], *digest);

    json(&site, &["forget", &name]);
    eventually(PATIENCE, "the agent builds it again", async || {
        let refs = json(&site, &["ls"]);
        let mut refs = refs["refs"].as_array().unwrap().iter();
        match refs.find(|entry| entry["name"] == *name) {
            Some(entry) if entry["current"]["digest"] == *digest => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // The loop has seen the admin's ref by now, and makes no history of it.
    let refs = json(&site, &["ls"]);
    let mine = refs["refs"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["name"] == "local/mine");
    assert_eq!(mine.unwrap()["current"]["digest"], *digest);
    site.manifest_says("m", "True", "Stored").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_gc_nor_rm_takes_what_a_layer_shows() {
    let site = Site::start("gc-layer").await;
    write_files(&site.source("m"), 3, "gc-layer");
    site.create_manifest("m", json!({})).await;
    site.create_layer("work", "m", json!({"mode": "Tmpfs"})).await;
    site.layer_says("work", "True", "Mounted").await;
    let tree = stored(&site).await;
    site.manifests()
        .await
        .delete("m", &DeleteParams::default())
        .await
        .unwrap();
    eventually(PATIENCE, "the tree is history", async || {
        let refs = json(&site, &["ls"]);
        match refs["refs"][0]["current"].is_null() {
            true => Ok(()),
            false => Err(refs.to_string()),
        }
    })
    .await;
    let limits = ["gc", "--max-age", "0s", "--grace", "0s", "--max-size", "1"];
    let report = json(&site, &limits);
    assert_eq!(report["deletedBlobs"], 0, "{report}");
    let blob = format!("sha256:{}", site.blobs()[0]);
    let kept = larder(&site, &["rm", &blob]);
    assert_eq!(kept.status.code(), Some(4));
    let kept: Value = serde_json::from_slice(&kept.stdout).unwrap();
    let by = kept["blobs"][0]["neededBy"][0].as_str().unwrap();
    let layer = format!("the layer {}/work", site.namespace);
    assert!(by.contains(&tree) && by.contains(&layer), "{by}");
    assert_eq!(report["overLimit"]["largest"][0]["neededBy"][0], layer, "{report}");

    site.delete_layer("work").await;
    eventually(PATIENCE, "the layer is released", async || {
        let report = json(&site, &limits);
        match report["deletedBlobs"] == 3 {
            true => Ok(()),
            false => Err(report.to_string()),
        }
    })
    .await;
    assert_eq!(site.blobs().len(), 0);
}
