//! How long it takes from the creation of a CasManifest until its Ready=True is seen, in one API client, with the real
//! API server, controller and agent. Prints the distribution and the programs' memory.

#[path = "support/goals.rs"]
mod goals;
#[path = "../tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use goals::Goals;
use kube::api::PostParams;
use kube::runtime::watcher::{self, Event};
use kube::{Api, ResourceExt};
use larder::api::CasManifest;
use serde_json::json;
use support::{Cluster, temp_store_dir};

const MANIFESTS: usize = 50;
const FILES: usize = 100;
/// For the median, on two cores.
const LIMIT: Duration = Duration::from_millis(150);
/// For each program, when idle, in MiB.
const MEMORY_LIMIT: f64 = 40.0;

#[tokio::main]
async fn main() {
    let cluster = Cluster::shared().await;
    let controller = cluster.controller_process().await;
    let store = temp_store_dir();
    let sources = store.path().join("sources");
    let namespace = cluster.namespace("bench").await;
    cluster.node("bench-node", &[]).await;
    let root = format!("{}={namespace}", sources.display());
    std::fs::create_dir(&sources).expect("a folder");
    let agent = cluster.agent_process("bench-node", &store, &[root], &[]).await;

    let manifests = Api::<CasManifest>::namespaced(cluster.client().await, &namespace);
    let mut events = Box::pin(watcher::watcher(manifests.clone(), watcher::Config::default()));
    let mut times = Vec::with_capacity(MANIFESTS);
    // The first one also waits for the agent's first look at its NodeStore: it is not counted.
    for number in 0..=MANIFESTS {
        let name = format!("tree-{number}");
        let source = sources.join(&name);
        write_files(&source, number);
        let manifest: CasManifest = serde_json::from_value(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CasManifest", "metadata": {"name": name},
            "spec": {"source": {"directory": {"path": source}}},
        }))
        .expect("a CasManifest");
        let start = Instant::now();
        manifests
            .create(&PostParams::default(), &manifest)
            .await
            .expect("created");
        tokio::time::timeout(Duration::from_secs(60), ready(&mut events, &name))
            .await
            .unwrap_or_else(|_| panic!("{name} is not Ready after 60 s:\n{}", agent.log_end()));
        if number > 0 {
            times.push(start.elapsed());
        }
    }

    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    let (least, median, most) = (at(0.0), at(0.5), at(1.0));
    println!("CasManifest of {FILES} small files, creation to Ready=True, {MANIFESTS} times:");
    println!(
        "  min {least:.1?}  median {median:.1?} (limit {LIMIT:?})  90% {:.1?}  max {most:.1?}",
        at(0.9)
    );
    let mut goals = Goals::new("ready");
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    goals.at_most(
        "creation of a CasManifest to Ready, median",
        milliseconds(median),
        milliseconds(LIMIT),
        "ms",
    );
    for (name, process) in [("controller", controller), ("agent", &agent)] {
        let mebibytes = process.resident_bytes() as f64 / f64::from(1 << 20);
        goals.at_most(format!("memory of an idle {name}"), mebibytes, MEMORY_LIMIT, "MiB");
    }
    goals.finish();
}

/// Small files of different content, so that each has to be stored.
fn write_files(folder: &Path, number: usize) {
    std::fs::create_dir(folder).expect("a folder");
    for file in 0..FILES {
        let text = format!("file {file} of tree {number}\n").repeat(1 + file % 40);
        std::fs::write(folder.join(format!("file-{file}")), text).expect("a file");
    }
}

async fn ready(events: &mut (impl Stream<Item = watcher::Result<Event<CasManifest>>> + Unpin), name: &str) {
    while let Some(event) = events.next().await {
        if let Event::Apply(manifest) | Event::InitApply(manifest) = event.expect("an event")
            && manifest.name_any() == name
            && manifest
                .status
                .is_some_and(|s| s.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
        {
            return;
        }
    }
    panic!("the watch ended");
}
