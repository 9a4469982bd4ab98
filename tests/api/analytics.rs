//! What a NodeStore and a CasManifest say of the store's room, against what the test itself has stored.

use larder::api::{BlobAmount, NodeStoreStatus, StoreAnalytics, human_size};
use serde_json::json;

use crate::support::{PATIENCE, Site, eventually, write_files};

/// Waits until the store was looked through in this state.
async fn analysed(site: &Site, what: &str, is_so: impl Fn(&StoreAnalytics) -> bool) -> NodeStoreStatus {
    eventually(PATIENCE, what, async || {
        let status = site.node_store().await.status.unwrap_or_default();
        match status.analytics.as_ref().is_some_and(&is_so) {
            true => Ok(status),
            false => Err(format!("{:?}", status.analytics)),
        }
    })
    .await
}

fn amount(blobs: i64, bytes: u64) -> BlobAmount {
    BlobAmount {
        blobs,
        size_bytes: bytes as i64,
        size: human_size(bytes),
    }
}

fn bytes_in(folder: &std::path::Path) -> u64 {
    let files = std::fs::read_dir(folder).unwrap();
    files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_what_its_room_is_used_for_and_a_manifest_what_deleting_it_would_free() {
    let mut site = Site::start("analytics").await;
    write_files(&site.source("base"), 10, "base");
    write_files(&site.source("more"), 5, "more");
    let own = bytes_in(&site.source("more"));
    for file in std::fs::read_dir(site.source("base")).unwrap() {
        let file = file.unwrap();
        let copy = site.source("more").join("of-base").join(file.file_name());
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        std::fs::copy(file.path(), copy).unwrap();
    }
    let shared = bytes_in(&site.source("base"));
    site.create_manifest("base", json!({})).await;
    site.create_manifest("more", json!({})).await;
    site.manifest_says("base", "True", "Stored").await;
    site.manifest_says("more", "True", "Stored").await;

    let status = analysed(&site, "both trees are counted", |found| found.trees == 2).await;
    let found = status.analytics.unwrap();
    let (logical, unique) = (2 * shared + own, shared + own);
    assert_eq!((found.references, found.unique_blobs), (25, 15));
    assert_eq!(
        (found.logical_bytes, found.unique_bytes, found.saved_bytes),
        (logical as i64, unique as i64, shared as i64)
    );
    assert_eq!(
        (&found.logical, &found.saved),
        (&human_size(logical), &human_size(shared))
    );
    assert_eq!(found.ratio, format!("{:.2}", logical as f64 / unique as f64));
    assert_eq!(
        found.saved_percent,
        format!("{:.1}", 100.0 * shared as f64 / logical as f64)
    );
    assert_eq!(
        (
            &found.current,
            &found.history,
            &found.unnamed,
            &found.garbage,
            &found.missing
        ),
        (
            &amount(15, unique),
            &amount(0, 0),
            &amount(0, 0),
            &amount(0, 0),
            &amount(0, 0)
        )
    );
    let bounds: Vec<Option<i64>> = found.sizes.iter().map(|bucket| bucket.below).collect();
    assert_eq!(
        bounds,
        [Some(1 << 10), Some(1 << 16), Some(1 << 20), Some(100 << 20), None]
    );
    assert_eq!((found.sizes[0].blobs, found.sizes[0].size_bytes), (15, unique as i64));
    assert_eq!(found.largest_manifests.len(), 1, "base has nothing for itself");
    let largest = &found.largest_manifests[0];
    assert_eq!((&largest.namespace, &*largest.name), (&site.namespace, "more"));
    assert_eq!(largest.exclusive_bytes, own as i64);
    assert_eq!(found.most_shared.len(), 10);
    let biggest = site.source("base").join("file-00009");
    let first = &found.most_shared[0];
    let digest = {
        use sha2::Digest;
        hex::encode(sha2::Sha256::digest(std::fs::read(&biggest).unwrap()))
    };
    assert_eq!(first.digest, format!("sha256:{digest}"));
    assert_eq!(
        (first.references, first.trees, first.saved_bytes),
        (2, 2, first.size_bytes)
    );

    // The same on the command line and for a scrape.
    let printed = site.store_json(&["analytics"]);
    assert_eq!(printed["dedup"]["uniqueBytes"], json!(unique));
    assert_eq!(
        printed["refs"][1],
        json!({"name": format!("{}/more", site.namespace), "exclusiveBlobs": 5, "exclusiveBytes": own})
    );
    let metrics = site.agent.metrics();
    for (name, value) in [
        ("larder_store_saved_bytes".to_owned(), shared),
        ("larder_store_bytes_by_use{use=\"current\"}".to_owned(), unique),
        ("larder_store_blobs_by_use{use=\"garbage\"}".to_owned(), 0),
        ("larder_store_blobs_by_size{below=\"1024\"}".to_owned(), 15),
        (
            format!(
                "larder_store_manifest_exclusive_bytes{{namespace=\"{}\",manifest=\"more\"}}",
                site.namespace
            ),
            own,
        ),
    ] {
        assert_eq!(metrics.get(&name), Some(&(value as f64)), "{name}: {metrics:?}");
    }
    let exclusive = async |site: &Site, name: &str, expected: u64| {
        eventually(PATIENCE, "what it has for itself", async || {
            let status = site.manifests().await.get(name).await.unwrap().status.unwrap();
            match (status.exclusive_bytes, status.exclusive) == (Some(expected as i64), Some(human_size(expected))) {
                true => Ok(()),
                false => Err(format!("{:?}", status.exclusive_bytes)),
            }
        })
        .await;
    };
    exclusive(&site, "more", own).await;
    exclusive(&site, "base", 0).await;

    // A restart shows the same until it has counted again.
    site.agent.kill();
    site.restart_agent().await;
    site.request("base").await;
    site.manifest_says("base", "True", "Stored").await;
    let status = site.node_store().await.status.unwrap();
    assert_eq!(status.analytics, Some(found));
    assert!(
        status
            .manifests
            .iter()
            .all(|manifest| manifest.exclusive_bytes.is_some())
    );

    // Deleted, it is history, and still what takes the room.
    site.delete_manifest("more").await;
    let status = analysed(&site, "its tree is history", |found| found.history.blobs > 0).await;
    let found = status.analytics.unwrap();
    assert_eq!((&found.current, &found.history), (&amount(10, shared), &amount(5, own)));
    assert_eq!(found.largest_manifests[0].name, "more");
    let policy = site
        .create_policy("analytics", json!({"maxAge": "1s", "gracePeriod": "0s"}))
        .await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    site.run_policy(&policy).await;
    let status = analysed(&site, "it is gone", |found| found.trees == 1).await;
    let found = status.analytics.unwrap();
    assert_eq!(
        (found.saved_bytes, found.ratio.as_str(), found.history.blobs),
        (0, "1.00", 0)
    );
    assert_eq!(found.largest_manifests[0].name, "base");
    exclusive(&site, "base", shared).await;
    site.policies()
        .await
        .delete(&policy, &Default::default())
        .await
        .unwrap();
}
