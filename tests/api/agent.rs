//! The agent's own life: kills, an API server that is away, signals.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{
    PATIENCE, Site, by_patience, eventually, free_port, http_status, larder_process, temp_store_dir, write_files,
};

/// From the sequence of a xorshift generator: the same moments for the same seed.
struct Moments(u64);

impl Moments {
    fn next(&mut self, below: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_micros(self.0 % below.as_micros() as u64)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_at_any_moment_finishes_after_its_restart() {
    const FILES: usize = 5000;
    let seed = std::env::var("LARDER_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(0x1a2b_3c4d_5e6f_u64);
    eprintln!("LARDER_SEED={seed}");
    let mut moments = Moments(seed);
    let mut site = Site::start("kills").await;
    write_files(&site.source("tree"), FILES, "kills");
    // How long a build takes when nothing kills the agent, and the digest that it must always have.
    let start = Instant::now();
    site.create_manifest("tree", json!({})).await;
    let digest = site
        .manifest_says("tree", "True", "Stored")
        .await
        .status
        .unwrap()
        .digest;
    let whole = start.elapsed();
    assert!(digest.is_some());

    for round in 0..by_patience(50, 500) {
        // Everything is to be stored anew, and the answer to be about it.
        site.agent.kill();
        for folder in ["objects", "manifests", "refs"] {
            let folder = site.root().join(folder);
            std::fs::remove_dir_all(&folder).unwrap();
            std::fs::create_dir(&folder).unwrap();
        }
        site.request("tree").await;
        site.restart_agent().await;
        tokio::time::sleep(moments.next(whole)).await;
        site.agent.kill();
        site.restart_agent().await;
        let status = site.manifest_says("tree", "True", "Stored").await.status.unwrap();
        assert_eq!(
            (status.digest.as_ref(), status.files),
            (digest.as_ref(), Some(FILES as i64)),
            "round {round}"
        );
        assert_eq!(site.blobs().len(), FILES, "round {round}");
        site.check_store();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_build_holds_up_no_other_work() {
    let site = Site::start("slow").await;
    write_files(&site.source("quick"), 5, "quick");
    // All holes: it takes no room and many seconds to hash.
    std::fs::create_dir(site.source("slow")).unwrap();
    let file = std::fs::File::create(site.source("slow").join("huge")).unwrap();
    file.set_len(24 << 30).unwrap();
    site.create_manifest("slow", json!({})).await;
    site.manifest_says("slow", "False", "Building").await;
    site.create_manifest("quick", json!({})).await;
    site.create_layer("work", "quick", json!({"mode": "Tmpfs"})).await;
    site.manifest_says("quick", "True", "Stored").await;
    site.layer_says("work", "True", "Mounted").await;
    site.delete_layer("work").await;
    let slow = site.manifests().await.get("slow").await.unwrap().status.unwrap();
    let ready = larder::api::conditions::find(&slow.conditions, "Ready").unwrap();
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_str()),
        ("False", "Building"),
        "it was not slow enough to tell"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_stay_mounted_while_the_agent_is_away_and_are_not_mounted_twice() {
    let mut site = Site::start("away").await;
    write_files(&site.source("base"), 5, "away");
    site.create_manifest("base", json!({})).await;
    site.create_layer("work", "base", json!({})).await;
    let path = site
        .layer_says("work", "True", "Mounted")
        .await
        .status
        .unwrap()
        .path
        .unwrap();
    std::fs::write(format!("{path}/mine"), "kept").unwrap();
    let mounts = site.store.mounts();
    site.agent.kill();
    assert_eq!(std::fs::read_to_string(format!("{path}/mine")).unwrap(), "kept");
    site.restart_agent().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(site.store.mounts(), mounts);
    assert_eq!(std::fs::read_to_string(format!("{path}/mine")).unwrap(), "kept");
    // Deleted while the agent is away, it goes when the agent is back.
    site.agent.kill();
    let layers = site.layers().await;
    layers.delete("work", &Default::default()).await.unwrap();
    site.restart_agent().await;
    eventually(PATIENCE, "the layer is gone", async || {
        match layers.get_opt("work").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(site.store.layer_mounts().is_empty());
    site.no_loop_devices().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_works_on_from_its_last_spec_without_the_api_server() {
    let mut site = Site::start("offline").await;
    site.create_manifest("late", json!({})).await;
    site.manifest_says("late", "False", "SourceNotFound").await;
    let saved = site.root().join("node.json");
    eventually(PATIENCE, "the agent has saved the spec", async || {
        let text = std::fs::read_to_string(&saved).map_err(|e| e.to_string())?;
        text.contains("late").then_some(()).ok_or(text)
    })
    .await;
    site.agent.kill();

    write_files(&site.source("late"), 7, "offline");
    let mut offline = site.offline_agent(&[]).await;
    let entry = site.root().join("refs").join(&site.namespace).join("late");
    eventually(
        PATIENCE,
        "the tree is stored without an API server",
        async || match entry.exists() {
            true => Ok(()),
            false => Err(offline.log_end()),
        },
    )
    .await;
    assert_eq!(site.blobs().len(), 7);
    offline.terminate();
    assert!(offline.wait(PATIENCE).success());

    // A spec from before that, as an agent leaves that was killed before it had saved the next one, retires nothing.
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    assert_eq!(spec["spec"]["manifests"].as_array().unwrap().len(), 1);
    spec["spec"]["manifests"] = json!([]);
    std::fs::write(&saved, spec.to_string()).unwrap();
    let stored = std::fs::read_to_string(&entry).unwrap();
    let mut offline = site.offline_agent(&[]).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(std::fs::read_to_string(&entry).unwrap(), stored);
    offline.terminate();
    assert!(offline.wait(PATIENCE).success());

    site.restart_agent().await;
    site.manifest_says("late", "True", "Stored").await;
    assert_eq!(std::fs::read_to_string(&entry).unwrap(), stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_over_the_same_store_is_refused_by_name_of_the_first() {
    let site = Site::start("twice").await;
    let (port, root) = (free_port(), site.root().display().to_string());
    let listen = format!("127.0.0.1:{port}");
    let kubeconfig = site.cluster.agent_kubeconfig(&site.node).await;
    let mut second = larder_process(
        &["agent", "--node-name", &site.node, "--root", &root, "--listen", &listen],
        Some(&kubeconfig),
    );
    assert!(!second.wait(PATIENCE).success());
    let log = second.log();
    assert!(
        log.contains("in use by") && log.contains(&site.agent.pid().to_string()),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_are_served_and_sigterm_ends_cleanly() {
    let cluster = crate::support::Cluster::shared().await;
    cluster.node("health-node", &[]).await;
    let store = temp_store_dir();
    let (port, root) = (free_port(), store.path().join("store").display().to_string());
    let listen = format!("127.0.0.1:{port}");
    let kubeconfig = cluster.agent_kubeconfig("health-node").await;
    let args = [
        "agent",
        "--node-name",
        "health-node",
        "--root",
        &root,
        "--listen",
        &listen,
        "--log-format",
        "json",
    ];
    let mut agent = larder_process(&args, Some(&kubeconfig));
    agent.wait_ready(port).await;
    for (path, status) in [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/other", 404)] {
        assert_eq!(http_status(port, path).unwrap(), status, "{path}");
    }
    agent.terminate();
    // What the kubelet gives it.
    assert!(agent.wait(Duration::from_secs(30)).success());
    for line in agent.log().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
        assert!(line["level"].is_string() && line["message"].is_string(), "{line}");
    }
}
