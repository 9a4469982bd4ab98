//! The main job, end to end: trees, layers, snapshots, retention, mistakes.

use std::os::unix::fs::MetadataExt;

use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use larder::api::CasManifest;
use larder::api::conditions::{NEARLY_FULL, STALLED, find, is_true};
use serde_json::json;

use crate::support::{PATIENCE, Site, eventually, shut_down, write_files};

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_trees_are_stored_once_and_say_what_they_saved() {
    let site = Site::start("overlap").await;
    write_files(&site.source("whole").join("part"), 50, "overlap");
    write_files(&site.source("whole").join("rest"), 30, "more");
    site.create_manifest("whole", json!({})).await;
    let whole = site.manifest_says("whole", "True", "Stored").await.status.unwrap();
    let blobs = site.blobs();
    assert_eq!((whole.files, blobs.len()), (Some(80), 80));
    assert_eq!(whole.saved_bytes, Some(0), "nothing was there before");
    assert_eq!(whole.unique_bytes, whole.size_bytes);
    assert_eq!(whole.nodes.unwrap().summary, "1/1");

    let part = json!({"source": {"directory": {"path": site.source("whole").join("part")}}});
    site.create_manifest("part", part).await;
    let part = site.manifest_says("part", "True", "Stored").await.status.unwrap();
    assert_eq!(part.files, Some(50));
    assert_eq!(part.saved_bytes, part.size_bytes, "all of it was there");
    assert_eq!(site.blobs(), blobs);
    assert_ne!(part.digest, whole.digest);
    site.check_store();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_changed_and_its_snapshot_is_a_tree_that_stays() {
    let site = Site::start("layers").await;
    write_files(&site.source("base"), 10, "layers");
    site.create_manifest("base", json!({})).await;
    // The layer may come before its tree is there.
    site.create_layer("work", "base", json!({})).await;
    site.create_layer("memory", "base", json!({"mode": "Tmpfs"})).await;
    let base = site.manifest_says("base", "True", "Stored").await.status.unwrap();
    let blobs = site.blobs();

    for layer in ["work", "memory"] {
        let status = site.layer_says(layer, "True", "Mounted").await.status.unwrap();
        assert_eq!(status.digest, base.digest);
        let path = std::path::PathBuf::from(status.path.unwrap());
        assert_eq!(
            std::fs::read(path.join("file-00003")).unwrap(),
            std::fs::read(site.source("base").join("file-00003")).unwrap()
        );
        std::fs::write(path.join("file-00001"), "changed").unwrap();
        std::fs::remove_file(path.join("file-00002")).unwrap();
        std::fs::create_dir(path.join("new")).unwrap();
        std::fs::write(path.join("new/one"), "one").unwrap();
        std::fs::hard_link(path.join("new/one"), path.join("new/two")).unwrap();
        let full = std::fs::write(path.join("too-much"), vec![1u8; 80 << 20]).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC), "{layer}: the limit is 64Mi");
        std::fs::remove_file(path.join("too-much")).unwrap();
    }
    assert_eq!(
        site.blobs(),
        blobs,
        "nothing that was done in a layer reaches the store"
    );

    site.create_manifest("snap", json!({"source": {"layer": {"name": "work"}}}))
        .await;
    let snap = site.manifest_says("snap", "True", "Stored").await.status.unwrap();
    // Ten, less the deleted one, and two names of a new one.
    assert_eq!(snap.files, Some(11));
    assert_ne!(snap.digest, base.digest);
    site.create_manifest("snap-of-memory", json!({"source": {"layer": {"name": "memory"}}}))
        .await;
    site.manifest_says("snap-of-memory", "True", "Stored").await;
    // And the same again.
    site.request("snap").await;
    site.manifest_says("snap", "True", "Stored").await;
    let metrics = site.agent.metrics();
    assert_eq!(metrics["larder_snapshot_seconds_count"], 3.0);
    let added = "changed".len() + "one".len();
    assert_eq!(
        metrics["larder_snapshot_added_bytes_total"], added as f64,
        "the others have the same contents"
    );

    // What a second layer over the snapshot shows is what the first one had.
    site.create_layer("again", "snap", json!({"owner": {"uid": 1234, "gid": 4321}}))
        .await;
    let again = site.layer_says("again", "True", "Mounted").await.status.unwrap();
    let path = std::path::PathBuf::from(again.path.unwrap());
    assert_eq!(std::fs::read_to_string(path.join("file-00001")).unwrap(), "changed");
    assert!(!path.join("file-00002").exists());
    let (one, two) = (
        path.join("new/one").metadata().unwrap(),
        path.join("new/two").metadata().unwrap(),
    );
    assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
    assert_eq!((one.uid(), one.gid()), (1234, 4321));

    for layer in ["work", "memory", "again"] {
        site.delete_layer(layer).await;
    }
    assert_eq!(site.store.layer_mounts(), Vec::<std::path::PathBuf>::new());
    site.no_loop_devices().await;
    assert_eq!(std::fs::read_dir(site.root().join("layers")).unwrap().count(), 0);
    let after = site.manifest_says("snap", "True", "Stored").await.status.unwrap();
    assert_eq!(after.digest, snap.digest, "a snapshot stays when its layer goes");
    site.check_store();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_fills_up_says_so_and_takes_it_back() {
    let site = Site::start("nearly-full").await;
    write_files(&site.source("base"), 3, "nearly full");
    site.create_manifest("base", json!({})).await;
    site.create_layer("work", "base", json!({"mode": "Tmpfs", "sizeLimit": "16Mi"}))
        .await;
    let status = site.layer_says("work", "True", "Mounted").await.status.unwrap();
    let large = std::path::PathBuf::from(status.path.unwrap()).join("large");
    let layers = site.layers().await;
    let says = async |full: bool| {
        // The agent looks twice a minute.
        eventually(PATIENCE * 2, &format!("nearly full: {full}"), async || {
            let status = layers.get("work").await.unwrap().status.unwrap_or_default();
            let condition = find(&status.conditions, NEARLY_FULL).cloned();
            match condition.as_ref().is_some_and(|condition| condition.status == "True") == full {
                true => Ok((condition, status)),
                false => Err(format!("{:?}", status.conditions)),
            }
        })
        .await
    };

    std::fs::write(&large, vec![1u8; 15 << 20]).unwrap();
    let (condition, status) = says(true).await;
    let message = condition.unwrap().message;
    assert!(message.contains("16.0Mi") || message.contains("16Mi"), "{message}");
    assert!(status.used_bytes >= Some(15 << 20), "{:?}", status.used_bytes);
    let ready = find(&status.conditions, "Ready").unwrap();
    assert_eq!(ready.status, "True", "it can be used all the same");
    let warnings = eventually(PATIENCE, "the event", async || {
        let mut events = site.events(&site.namespace, "work");
        events.retain(|[kind, reason, _]| kind == "Warning" && reason == "SpaceUsed");
        match events.len() {
            0 => Err("not yet".to_owned()),
            count => Ok(count),
        }
    })
    .await;
    assert_eq!(warnings, 1);

    std::fs::remove_file(&large).unwrap();
    says(false).await;
    site.delete_layer("work").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_file_system_stopped_says_so_and_comes_back_when_nobody_uses_it() {
    let site = Site::start("stopped").await;
    write_files(&site.source("base"), 3, "stopped");
    site.create_manifest("base", json!({})).await;
    let layer = site.create_layer("work", "base", json!({"sizeLimit": "16Mi"})).await;
    let status = site.layer_says("work", "True", "Mounted").await.status.unwrap();
    let path = std::path::PathBuf::from(status.path.clone().unwrap());
    let kept = std::fs::File::create(path.join("kept")).unwrap();
    kept.sync_all().unwrap();
    let disk = site
        .root()
        .join("layers")
        .join(layer.metadata.uid.unwrap())
        .join("disk");
    shut_down(&disk);

    let stopped = site
        .layer_says("work", "False", "FileSystemStopped")
        .await
        .status
        .unwrap();
    let ready = find(&stopped.conditions, "Ready").unwrap();
    let user = format!("process {}", std::process::id());
    assert!(ready.message.contains(&user), "{}", ready.message);
    assert!(!is_true(&stopped.conditions, STALLED));
    assert_eq!(stopped.path, status.path);
    eventually(PATIENCE, "the event", async || {
        let events = site.events(&site.namespace, "work");
        let is_it = |[kind, reason, _]: &[String; 3]| kind == "Warning" && reason == "FileSystemStopped";
        events.iter().any(is_it).then_some(()).ok_or(format!("{events:?}"))
    })
    .await;

    drop(kept);
    site.layer_says("work", "True", "Mounted").await;
    assert!(path.join("kept").exists());
    std::fs::write(path.join("more"), "more").unwrap();
    site.delete_layer("work").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_cannot_be_is_refused_and_a_layer_with_a_damaged_record_can_be_deleted() {
    let site = Site::start("odd-layers").await;
    write_files(&site.source("base"), 3, "odd layers");
    site.create_manifest("base", json!({})).await;
    // In memory, for not every kernel lets an agent grow a file system on disk.
    site.create_layer("work", "base", json!({"mode": "Tmpfs", "sizeLimit": null}))
        .await;
    let status = site.layer_says("work", "True", "Mounted").await.status.unwrap();
    let path = std::path::PathBuf::from(status.path.unwrap());
    let layers = site.layers().await;
    let limit = async |size: &str| {
        let patch = Patch::Merge(json!({"spec": {"sizeLimit": size}}));
        layers.patch("work", &PatchParams::default(), &patch).await.unwrap();
    };
    // It was made with the agent's default.
    limit("1Gi").await;
    let status = site.layer_says("work", "False", "InvalidSpec").await.status.unwrap();
    let message = &find(&status.conditions, STALLED).unwrap().message;
    assert!(message.contains("can only grow"), "{message}");
    assert_eq!(status.size_limit.as_deref(), Some("10Gi"));
    std::fs::write(path.join("new"), "it can be used").unwrap();
    limit("11Gi").await;
    let status = site.layer_says("work", "True", "Mounted").await.status.unwrap();
    assert_eq!(status.size_limit.as_deref(), Some("11Gi"));
    assert_eq!(std::fs::read_to_string(path.join("new")).unwrap(), "it can be used");

    site.create_layer("disk", "base", json!({})).await;
    site.layer_says("disk", "True", "Mounted").await;
    for layer in ["work", "disk"] {
        let uid = layers.get(layer).await.unwrap().metadata.uid.unwrap();
        let folder = site.root().join("layers").join(uid);
        std::fs::write(folder.join("layer.json"), "{").unwrap();
        site.delete_layer(layer).await;
        assert!(!folder.exists());
    }
    assert_eq!(site.store.layer_mounts(), Vec::<std::path::PathBuf>::new());
    site.no_loop_devices().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_removes_what_nothing_needs_and_nothing_else() {
    let site = Site::start("retain").await;
    write_files(&site.source("keep"), 20, "kept");
    write_files(&site.source("drop"), 15, "dropped");
    // Shared content stays with the tree that stays.
    std::fs::copy(
        site.source("keep").join("file-00000"),
        site.source("drop").join("shared"),
    )
    .unwrap();
    site.create_manifest("keep", json!({})).await;
    site.create_manifest("drop", json!({"revisionHistoryLimit": 3})).await;
    site.create_manifest(
        "layered",
        json!({"source": {"directory": {"path": site.source("drop")}}}),
    )
    .await;
    site.manifest_says("keep", "True", "Stored").await;
    site.manifest_says("drop", "True", "Stored").await;
    site.manifest_says("layered", "True", "Stored").await;
    let all = site.blobs();
    assert_eq!(all.len(), 35);

    let rules = json!({"schedule": "0 0 1 1 *", "maxAge": "1s", "gracePeriod": "0s"});
    let name = site.create_policy("retain", rules).await;
    let policies = site.policies().await;
    // One of the two manifests over the folder goes: everything is still needed.
    site.delete_manifest("drop").await;
    site.dropped("drop").await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let status = site.run_policy(&name).await.status.unwrap();
    assert_eq!(status.last_run.unwrap().deleted_blobs, 0);
    assert_eq!(site.blobs(), all);

    // The other goes too, but a layer is over its tree.
    site.create_layer("user", "layered", json!({"mode": "Tmpfs"})).await;
    let layer = site.layer_says("user", "True", "Mounted").await.status.unwrap();
    site.delete_manifest("layered").await;
    site.dropped("layered").await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(
        site.run_policy(&name)
            .await
            .status
            .unwrap()
            .last_run
            .unwrap()
            .deleted_blobs,
        0
    );
    assert_eq!(site.blobs(), all);
    assert!(std::path::Path::new(&layer.path.unwrap()).join("file-00014").exists());

    site.delete_layer("user").await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let done = site.run_policy(&name).await.status.unwrap().last_run.unwrap();
    assert_eq!((done.scanned_blobs, done.deleted_blobs), (35, 15));
    assert_eq!(site.blobs().len(), 20);
    let freed: u64 = (0..15)
        .map(|i| {
            site.source("drop")
                .join(format!("file-{i:05}"))
                .metadata()
                .unwrap()
                .len()
        })
        .sum();
    assert!(
        done.freed_bytes as u64 >= freed,
        "{} freed, the contents alone had {freed}",
        done.freed_bytes
    );
    site.check_store();
    policies.delete(&name, &DeleteParams::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_get_an_answer_that_says_what_is_wrong() {
    let site = Site::start("mistakes").await;
    let message = |manifest: &CasManifest| {
        let status = manifest.status.as_ref().unwrap();
        larder::api::conditions::find(&status.conditions, "Ready")
            .unwrap()
            .message
            .clone()
    };

    site.create_manifest("outside", json!({"source": {"directory": {"path": "/etc/ssl"}}}))
        .await;
    let outside = site.manifest_says("outside", "False", "SourceNotAllowed").await;
    assert!(is_true(&outside.status.as_ref().unwrap().conditions, STALLED));
    let text = message(&outside);
    let root = site.store.path().join("sources");
    assert!(
        text.contains("/etc/ssl") && text.contains(&root.display().to_string()),
        "{text}"
    );
    assert_eq!(outside.status.unwrap().failures[0].node, site.node);

    let missing = site.create_manifest("missing", json!({})).await;
    assert!(
        missing.status.is_some_and(|status| status.observed_generation == -1),
        "a new object is never taken for ready"
    );
    let text = message(&site.manifest_says("missing", "False", "SourceNotFound").await);
    assert!(text.contains("does not exist"), "{text}");
    // It is tried again by itself.
    write_files(&site.source("missing"), 3, "late");
    site.manifest_says("missing", "True", "Stored").await;

    // Another namespace's folder is not to be had by a link to it.
    std::os::unix::fs::symlink("/etc/ssl", site.source("link")).unwrap();
    site.create_manifest("link", json!({})).await;
    let text = message(&site.manifest_says("link", "False", "SourceNotAllowed").await);
    assert!(text.contains("symbolic link"), "{text}");

    site.create_manifest("nowhere", json!({"nodeSelector": {"site": "none"}}))
        .await;
    site.manifest_says("nowhere", "False", "NoNodes").await;
    site.create_layer("early", "nowhere", json!({})).await;
    site.layer_says("early", "False", "NotPlaced").await;

    let refused = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "CasManifest", "metadata": {"name": "two"},
        "spec": {"source": {"directory": {"path": "/x"}, "layer": {"name": "y"}}}});
    let refused = site
        .manifests()
        .await
        .create(&PostParams::default(), &serde_json::from_value(refused).unwrap())
        .await;
    assert!(refused.unwrap_err().to_string().contains("exactly one source"));
}
