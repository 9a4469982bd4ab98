//! Scheduled runs: under no policy, without the API server, after the agent was away, and when one fails.

use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use kube::api::Patch;
use larder::api::conditions::{RETENTION_FAILED, find};
use serde_json::{Value, json};

use crate::support::{LarderProcess, PATIENCE, Site, eventually, write_files};

/// `path` in the store, with a time of so long ago as its last use.
fn age(path: &std::path::Path, by: Duration) {
    let file = std::fs::File::open(path).unwrap();
    file.set_modified(SystemTime::now() - by).unwrap();
}

impl Site {
    /// Puts contents that nothing names and nobody has used for two days.
    fn put_garbage(&self, count: usize) {
        let folder = self.store.path().join("garbage");
        write_files(&folder, count, "garbage");
        let before = self.blobs();
        let mut args = vec!["put".to_owned()];
        args.extend((0..count).map(|n| folder.join(format!("file-{n:05}")).display().to_string()));
        let output = self.larder_store(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for blob in self.blobs().iter().filter(|blob| !before.contains(blob)) {
            let path = self.root().join("objects").join(&blob[..2]).join(&blob[2..]);
            age(&path, Duration::from_secs(2 * 24 * 3600));
        }
    }

    /// Lets the agent, which does not run, have been away for two days.
    fn was_away(&self) {
        let mut memory = self.memory().unwrap();
        for time in ["since", "tried"] {
            if let Some(known) = memory[time].as_str() {
                let known: Timestamp = known.parse().unwrap();
                memory[time] = json!(known - SignedDuration::from_hours(48));
            }
        }
        std::fs::write(self.memory_file(), memory.to_string()).unwrap();
    }

    /// Waits until so many runs are on record.
    async fn has_recorded(&self, runs: usize) {
        eventually(PATIENCE, "the run is recorded", async || match self.recorded().len() {
            count if count == runs => Ok(()),
            count => Err(format!("{count} runs")),
        })
        .await;
    }

    /// Asserts that the agent has noted on its disk that the last run deleted so many contents.
    fn has_noted(&self, deleted: u64) {
        let memory = self.memory().unwrap();
        assert_eq!(memory["state"]["lastRun"]["deletedBlobs"], json!(deleted), "{memory}");
    }

    /// Waits until the agent has noted that.
    async fn notes(&self, deleted: u64) {
        eventually(PATIENCE, "the agent notes the run", async || match self.memory()? {
            memory if memory["state"]["lastRun"]["deletedBlobs"] == json!(deleted) => Ok(()),
            memory => Err(memory.to_string()),
        })
        .await;
    }

    fn memory_file(&self) -> std::path::PathBuf {
        self.root().join("runs/state.json")
    }

    /// What the agent has on its disk of retention.
    fn memory(&self) -> Result<Value, String> {
        let text = std::fs::read(self.memory_file()).map_err(|e| e.to_string())?;
        serde_json::from_slice(&text).map_err(|e| e.to_string())
    }

    /// Waits until what the agent would need after a restart is on its disk: since when it has been under this policy.
    async fn saved(&self, policy: Option<&str>) {
        eventually(PATIENCE, "the agent has saved what it remembers", async || {
            let memory = self.memory()?;
            match memory["since"].is_string() && memory["state"]["policyUid"].as_str() == policy {
                true => Ok(()),
                false => Err(memory.to_string()),
            }
        })
        .await;
    }

    fn recorded(&self) -> Vec<Value> {
        self.store_json(&["runs"])["runs"].as_array().unwrap().clone()
    }

    async fn has_blobs(&self, what: &str, agent: Option<&LarderProcess>, is_right: impl Fn(usize) -> bool) {
        eventually(PATIENCE * 2, what, async || match self.blobs().len() {
            count if is_right(count) => Ok(()),
            count => Err(format!("{count} blobs; {}", agent.unwrap_or(&self.agent).log_end())),
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_under_no_policy_makes_up_for_a_missed_run_and_tells_when_one_fails() {
    let mut site = Site::start("builtin").await;
    write_files(&site.source("tree"), 3, "tree");
    site.create_manifest("tree", json!({})).await;
    site.manifest_says("tree", "True", "Stored").await;
    site.saved(None).await;
    site.agent.kill();
    site.put_garbage(2);
    site.was_away();
    let stray = site.root().join("refs/other/stray");
    std::fs::create_dir_all(stray.parent().unwrap()).unwrap();
    std::fs::write(&stray, "{").unwrap();
    site.restart_agent().await;

    let failed = eventually(PATIENCE, "the NodeStore says that the run failed", async || {
        let status = site.node_store().await.status.unwrap_or_default();
        find(&status.conditions, RETENTION_FAILED)
            .cloned()
            .ok_or(format!("{:?}", status.conditions))
    })
    .await;
    assert_eq!((&*failed.status, &*failed.reason), ("True", "RunFailed"));
    assert!(
        failed.message.contains(&stray.display().to_string()),
        "{}",
        failed.message
    );
    assert_eq!(site.columns("nstore", &site.node)["RUN-FAILED"], "True");
    assert_eq!(site.blobs().len(), 5);
    let event = eventually(PATIENCE, "the event", async || {
        let events = site.events("default", &site.node);
        let found = events.iter().find(|[_, reason, _]| reason == "RunFailed").cloned();
        found.ok_or(format!("{events:?}"))
    })
    .await;
    assert_eq!((&*event[0], event[2].contains("refs/other/stray")), ("Warning", true));

    // Mended: the run is made up for at once, not a day later.
    let forgotten = site.larder_store(&["forget", "other/stray"]);
    assert!(
        forgotten.status.success(),
        "{}",
        String::from_utf8_lossy(&forgotten.stderr)
    );
    let status = eventually(PATIENCE * 2, "the run is made up for", async || {
        let status = site.node_store().await.status.unwrap_or_default();
        let ran = status.retention.clone().unwrap_or_default().last_run;
        let is_told = find(&status.conditions, RETENTION_FAILED).is_some();
        match ran.is_some_and(|ran| ran.deleted_blobs == 2) && !is_told {
            true => Ok(status),
            false => Err(format!("{status:?}")),
        }
    })
    .await;
    assert_eq!(site.blobs().len(), 3);
    let retention = status.retention.unwrap();
    assert_eq!((retention.policy_uid, retention.problem), (None, None));
    assert!(retention.next_run.unwrap().0 > Timestamp::now());
    let runs = site.recorded();
    let last = runs.last().unwrap();
    assert_eq!(
        (
            runs.len(),
            &last["about"]["trigger"],
            &last["about"]["policy"],
            &last["deletedBlobs"]
        ),
        (2, &json!("retry"), &Value::Null, &json!(2))
    );

    // It is not made up for again.
    site.notes(2).await;
    site.agent.terminate();
    assert!(site.agent.wait(PATIENCE).success());
    site.restart_agent().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(site.recorded().len(), 2);
    // A run that deletes nothing is not always recorded, but it is noted.
    site.has_noted(2);
    site.check_store();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduled_run_needs_no_api_server_and_goes_on_where_it_was_cut_off() {
    let mut site = Site::start("night").await;
    write_files(&site.source("tree"), 3, "tree");
    site.create_manifest("tree", json!({})).await;
    site.manifest_says("tree", "True", "Stored").await;
    // Not soon, and missed by an agent that was away for two days.
    let minute = (Timestamp::now().as_second() / 60 + 30) % 60;
    let rules = json!({"schedule": format!("{minute} * * * *"), "maxAge": "1d", "gracePeriod": "0s"});
    let policy = site.create_policy("night", rules).await;
    let uid = site.policies().await.get(&policy).await.unwrap().metadata.uid;
    eventually(PATIENCE, "the node has taken the policy up", async || {
        let retention = site.node_store().await.status.unwrap_or_default().retention;
        match retention.clone().unwrap_or_default().policy_uid == uid {
            true => Ok(()),
            false => Err(format!("{retention:?}")),
        }
    })
    .await;
    let saved = site.root().join("node.json");
    eventually(
        PATIENCE,
        "the agent has saved the spec",
        async || match std::fs::read_to_string(&saved).map_err(|e| e.to_string())? {
            text if text.contains(&policy) => Ok(()),
            text => Err(text),
        },
    )
    .await;
    site.saved(uid.as_deref()).await;
    site.agent.kill();
    const GARBAGE: usize = 60;
    site.put_garbage(GARBAGE);
    site.was_away();

    // It takes some seconds, at this rate, and the agent is stopped meanwhile.
    let mut slow = site.offline_agent(&["--max-removals-per-second", "5"]).await;
    site.has_blobs("the run is under way", Some(&slow), |count| count < GARBAGE)
        .await;
    slow.terminate();
    assert!(slow.wait(PATIENCE).success(), "{}", slow.log_end());
    let left = site.blobs().len();
    assert!((4..GARBAGE).contains(&left), "{left} of {GARBAGE} and 3");
    let runs = site.recorded();
    assert_eq!(
        (runs.len(), &runs[0]["complete"], runs[0]["deletedBlobs"].as_u64()),
        (1, &json!(false), Some((GARBAGE + 3 - left) as u64)),
        "{runs:?}"
    );

    site.has_noted((GARBAGE + 3 - left) as u64);

    // It was cut off, so the run is still due, and goes on.
    let mut offline = site.offline_agent(&[]).await;
    site.has_blobs("the run goes on", Some(&offline), |count| count == 3)
        .await;
    site.has_recorded(2).await;
    // Or the next one would make a run of nothing.
    site.notes(left as u64 - 3).await;
    offline.terminate();
    assert!(offline.wait(PATIENCE).success());
    let runs = site.recorded();
    let last = runs.last().unwrap();
    assert_eq!(
        (&last["about"]["trigger"], &last["about"]["policy"]["name"]),
        (&json!("retry"), &json!(policy))
    );
    assert_eq!(
        (&last["complete"], last["deletedBlobs"].as_u64()),
        (&json!(true), Some(left as u64 - 3))
    );

    // Back in the cluster, it tells of it.
    site.restart_agent().await;
    eventually(PATIENCE, "the policy tells of the run", async || {
        let status = site
            .policies()
            .await
            .get(&policy)
            .await
            .unwrap()
            .status
            .unwrap_or_default();
        match status
            .last_run
            .clone()
            .is_some_and(|run| run.deleted_blobs == left as i64 - 3)
        {
            true => Ok(()),
            false => Err(format!("{status:?}")),
        }
    })
    .await;
    assert_eq!(site.recorded().len(), 2);
    site.check_store();
    site.policies()
        .await
        .delete(&policy, &Default::default())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_ends_when_its_policy_is_suspended_edited_or_deleted() {
    let mut site = Site::start("stopped").await;
    site.agent.kill();
    // More than three minutes' work, if nothing ends it.
    site.restart_agent_with(&["--max-removals-per-second", "1"]).await;
    const GARBAGE: usize = 200;
    site.put_garbage(GARBAGE);
    let rules = json!({"schedule": "0 0 1 1 *", "maxAge": "1d", "gracePeriod": "0s"});
    let policy = site.create_policy("stopped", rules).await;
    let policies = site.policies().await;
    let edit = async |spec: Value| {
        let patch = Patch::Merge(json!({"spec": spec}));
        policies.patch(&policy, &Default::default(), &patch).await.unwrap();
    };
    let is_quiet = async || {
        let count = site.blobs().len();
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(site.blobs().len(), count, "it goes on: {}", site.agent.log_end());
        count
    };

    // Suspended, because somebody saw that it deletes what it should not.
    let request = site.request_run(&policy).await;
    site.has_blobs("the run is under way", None, |count| count < GARBAGE)
        .await;
    edit(json!({"suspend": true})).await;
    site.has_recorded(1).await;
    let left = is_quiet().await;
    assert!((1..GARBAGE).contains(&left), "{left}");
    let run = site.recorded().pop().unwrap();
    assert_eq!(
        (&run["complete"], run["deletedBlobs"].as_u64()),
        (&json!(false), Some((GARBAGE - left) as u64))
    );
    eventually(PATIENCE, "the policy says so", async || {
        match &*site.columns("retp", &policy)["REASON"] {
            "Suspended" => Ok(()),
            reason => Err(reason.to_owned()),
        }
    })
    .await;

    // Edited: what was asked for is done by the new rules, which keep it all.
    edit(json!({"suspend": false, "maxAge": "30d"})).await;
    eventually(PATIENCE, "the request is answered", async || {
        let status = policies.get(&policy).await.unwrap().status.unwrap_or_default();
        match status.last_handled_reconcile_at.as_ref() == Some(&request) {
            true => Ok(()),
            false => Err(format!("{status:?}")),
        }
    })
    .await;
    assert_eq!(site.blobs().len(), left);
    site.has_recorded(2).await;
    let run = site.recorded().pop().unwrap();
    assert_eq!(
        (
            &run["about"]["trigger"],
            &run["about"]["policy"]["rules"]["maxAge"],
            &run["deletedBlobs"]
        ),
        (&json!("request"), &json!("30d"), &json!(0))
    );

    // Deleted while it runs.
    edit(json!({"maxAge": "1d"})).await;
    site.request_run(&policy).await;
    site.has_blobs("the next run is under way", None, |count| count < left)
        .await;
    policies.delete(&policy, &Default::default()).await.unwrap();
    eventually(PATIENCE, "the node is told", async || {
        match site.node_store().await.spec.retention {
            None => Ok(()),
            Some(policy) => Err(format!("{policy:?}")),
        }
    })
    .await;
    site.has_recorded(3).await;
    let end = is_quiet().await;
    assert!((1..left).contains(&end), "{end}");
    site.check_store();
}
