//! What cannot be read keeps everything that it could need, is named, and ends by a rebuild or by giving it up.

use std::path::{Path, PathBuf};

use kube::api::DeleteParams;
use larder::api::RetentionState;
use larder::api::conditions::{READY, find};
use serde_json::json;

use crate::support::{PATIENCE, Site, eventually, write_files};

impl Site {
    /// Waits until the NodeStore's Ready has this status and reason and says this; gives what the node says of retention.
    async fn store_says(&self, status: &str, reason: &str, said: &str) -> RetentionState {
        // While something is wrong it is looked each minute whether it still is.
        let what = format!("the NodeStore says {status}/{reason}: {said}");
        eventually(PATIENCE * 2, &what, async || {
            let store = self.node_store().await.status.unwrap_or_default();
            let ready = find(&store.conditions, READY).cloned().ok_or("no Ready yet")?;
            match ready.status == status && ready.reason == reason && ready.message.contains(said) {
                true => Ok(store.retention.unwrap_or_default()),
                false => Err(format!("{ready:?}")),
            }
        })
        .await
    }

    async fn store_serves(&self) {
        self.store_says("True", "Serving", "").await;
    }

    /// The NodeStore names it, and a look at the store does not make the policy forget what kept its run from deleting.
    async fn store_names(&self, path: &Path) {
        let path = path.display().to_string();
        let retention = self.store_says("False", "StoreError", &path).await;
        assert!(
            retention.problem.as_ref().is_some_and(|said| said.contains(&path)),
            "{retention:?}"
        );
    }

    /// Puts a content that the next run should delete.
    async fn put_loose(&self, content: &str) {
        let path = self.store.path().join("garbage");
        std::fs::write(&path, content).unwrap();
        self.does(&["put", &path.display().to_string()]);
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    }

    /// A run deletes nothing, though there is garbage, and the policy says which file kept it from that.
    async fn run_is_blocked_by(&self, policy: &str, path: &Path) {
        let before = self.blobs();
        let said = self.run_policy(policy).await.status.unwrap();
        let ready = find(&said.conditions, READY).unwrap();
        assert_eq!((&*ready.status, &*ready.reason), ("False", "RunFailed"));
        assert!(ready.message.contains(&path.display().to_string()), "{}", ready.message);
        assert_eq!(
            (said.last_run.unwrap().deleted_blobs, said.nodes.unwrap().failed),
            (0, 1)
        );
        assert_eq!(self.blobs(), before);
    }

    async fn policy_is_ready(&self, policy: &str) {
        eventually(PATIENCE, "the policy is ready again", async || {
            let said = self.policies().await.get(policy).await.unwrap().status.unwrap();
            match find(&said.conditions, READY) {
                Some(ready) if ready.status == "True" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    /// The policy and the NodeStore name what was damaged, and nothing is deleted.
    async fn is_blocked_by(&self, policy: &str, path: &Path) {
        self.run_is_blocked_by(policy, path).await;
        self.store_names(path).await;
    }

    /// Neither names anything any more, and the run that was kept from it has deleted all but so many contents.
    async fn is_mended(&self, policy: &str, left: usize) {
        self.store_serves().await;
        self.policy_is_ready(policy).await;
        eventually(PATIENCE, "the run is made up for", async || match self.blobs().len() {
            count if count == left => Ok(()),
            count => Err(format!("{count} blobs")),
        })
        .await;
    }

    fn does(&self, args: &[&str]) {
        let output = self.larder_store(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn manifest_file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        self.root().join("manifests").join(hex)
    }

    /// The file of the current tree of a manifest.
    async fn tree_file(&self, name: &str) -> PathBuf {
        let status = self.manifests().await.get(name).await.unwrap().status.unwrap();
        self.manifest_file(&status.digest.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_deletes_nothing_until_it_is_built_again_or_given_up() {
    let site = Site::start("damage").await;
    write_files(&site.source("keep"), 10, "kept");
    write_files(&site.source("drop"), 5, "dropped");
    site.create_manifest("keep", json!({})).await;
    site.create_manifest("drop", json!({})).await;
    site.manifest_says("keep", "True", "Stored").await;
    site.manifest_says("drop", "True", "Stored").await;
    site.delete_manifest("drop").await;
    site.dropped("drop").await;
    let rules = json!({"schedule": "0 0 1 1 *", "maxAge": "1s", "gracePeriod": "0s"});
    let policy = site.create_policy("damage", rules).await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;

    // A manifest: building its owner again writes it anew.
    let tree = site.tree_file("keep").await;
    let mut bytes = std::fs::read(&tree).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&tree).unwrap();
    std::fs::write(&tree, &bytes).unwrap();
    site.is_blocked_by(&policy, &tree).await;
    site.request("keep").await;
    site.manifest_says("keep", "True", "Stored").await;
    site.is_mended(&policy, 10).await;

    // A manifest that only an admin named: it is given up.
    site.put_loose("two").await;
    std::fs::create_dir(site.source("mine")).unwrap();
    std::fs::copy(site.source("drop").join("file-00000"), site.source("mine").join("file")).unwrap();
    site.does(&[
        "build",
        "--name",
        "other/mine",
        &site.source("mine").display().to_string(),
    ]);
    let shown = site.store_json(&["show", "other/mine"]);
    let tree = site.manifest_file(shown["digest"].as_str().unwrap());
    std::fs::remove_file(&tree).unwrap();
    std::fs::write(&tree, &bytes).unwrap();
    site.is_blocked_by(&policy, &tree).await;
    site.does(&["forget", "other/mine"]);
    site.is_mended(&policy, 10).await;

    // A ref of nobody: it is forgotten.
    site.put_loose("three").await;
    let folder = site.root().join("refs").join("other");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("stray"), "{").unwrap();
    site.is_blocked_by(&policy, &folder.join("stray")).await;
    site.does(&["forget", "other/stray"]);
    site.is_mended(&policy, 10).await;

    // The ref of a manifest that exists: building it again writes it anew.
    site.put_loose("four").await;
    let own = site.root().join("refs").join(&site.namespace).join("keep");
    std::fs::write(&own, "{").unwrap();
    site.is_blocked_by(&policy, &own).await;
    site.request("keep").await;
    site.manifest_says("keep", "True", "Stored").await;
    site.is_mended(&policy, 10).await;

    // A layer's record: only what was written in the layer is lost with it, so nobody but an admin gives it up.
    site.put_loose("five").await;
    let layer = site.root().join("layers").join("0f8fad5b-d9cb-469f-a165-70867728950e");
    std::fs::create_dir(&layer).unwrap();
    std::fs::write(layer.join("layer.json"), "{\"version\":").unwrap();
    site.is_blocked_by(&policy, &layer).await;
    std::fs::rename(&layer, site.store.path().join("moved-away")).unwrap();

    site.is_mended(&policy, 10).await;

    // A content of a tree that is gone is damage that keeps nothing; a build stores it again.
    let lost = site.blobs()[0].clone();
    let path = site.root().join("objects").join(&lost[..2]).join(&lost[2..]);
    std::fs::remove_file(&path).unwrap();
    site.run_policy(&policy).await;
    site.store_says("False", "ContentMissing", "1 content of trees in use is missing")
        .await;
    site.request("keep").await;
    site.manifest_says("keep", "True", "Stored").await;
    site.store_serves().await;
    assert_eq!(site.blobs().len(), 10);
    site.check_store();
    site.policies()
        .await
        .delete(&policy, &DeleteParams::default())
        .await
        .unwrap();
}
