//! Each rule of the schemas, on the real API server: a bad object and the refusal, and a good one next to it.

use std::fmt::Display;
use std::time::Duration;

use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::support::{Cluster, repo, unique};

/// A request that takes longer fails its test: nothing that a user sends may keep the API server busy.
const LIMIT: Duration = Duration::from_secs(10);

/// The same for kubectl.
const TIMEOUT: &str = "--request-timeout=10s";

/// The API server's answer to a request, which comes within [`LIMIT`].
pub async fn answer<T>(what: impl Display, request: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, request)
        .await
        .unwrap_or_else(|_| panic!("{what}: no answer within {LIMIT:?}"))
}

/// Untyped, so that a test can send what the types could not hold.
pub fn api(client: &Client, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("larder.dev", "v1alpha1", kind));
    let plural = match kind {
        "RetentionPolicy" => "retentionpolicies".to_string(),
        other => format!("{}s", other.to_lowercase()),
    };
    let resource = ApiResource { plural, ..resource };
    match kind {
        "CasManifest" | "WritableLayer" => Api::namespaced_with(client.clone(), namespace, &resource),
        _ => Api::all_with(client.clone(), &resource),
    }
}

pub fn object(kind: &str, name: &str, spec: &Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
    }))
    .unwrap()
}

/// The smallest good spec of a kind.
pub fn good(kind: &str) -> Value {
    match kind {
        "CasManifest" => json!({"source": {"directory": {"path": "/srv/tree"}}}),
        "WritableLayer" => json!({"manifest": {"name": "tree"}, "nodeName": "node", "sizeLimit": "1Gi"}),
        "RetentionPolicy" => json!({"nodeSelector": {}}),
        "NodeStore" => json!({}),
        other => panic!("{other}"),
    }
}

/// JSON merge patch (RFC 7386): a null removes.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in fields {
        match value {
            Value::Null => {
                target.as_object_mut().unwrap().remove(key);
            }
            value => merge(&mut target[key], value),
        }
    }
}

/// What the API server says to an object, which it checks and does not keep: nothing, or the refusal.
pub async fn verdict(client: &Client, kind: &str, change: &Value) -> Result<(), String> {
    let mut spec = good(kind);
    merge(&mut spec, change);
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let api = api(client, kind, "default");
    let object = object(kind, "checked", &spec);
    match answer(format!("{kind} {change}"), api.create(&dry_run, &object)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 422 => Err(status.message),
        Err(error) => panic!("{kind} {change}: {error}"),
    }
}

/// A change to the good spec of a kind: with no words it is taken, else refused in these words.
type Case = (Value, &'static [&'static str]);

async fn check(kind: &str, cases: &[Case]) {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    let mut wrong = Vec::new();
    for (change, words) in cases {
        let answer = verdict(&client, kind, change).await;
        let right = match &answer {
            Ok(()) => words.is_empty(),
            Err(message) => !words.is_empty() && words.iter().all(|word| message.contains(word)),
        };
        if !right {
            wrong.push(format!("{change}\n  expected {words:?}\n  got {answer:?}"));
        }
    }
    assert!(wrong.is_empty(), "{kind}:\n{}", wrong.join("\n"));
}

const TAKEN: &[&str] = &[];

#[tokio::test]
async fn casmanifest_rules() {
    let long = |length: usize| "a".repeat(length);
    let path = |path: &str| json!({"source": {"directory": {"path": path}}});
    let exclude = |globs: Value| json!({"source": {"directory": {"exclude": globs}}});
    let labels = |count: usize| {
        let labels: serde_json::Map<String, Value> = (0..count).map(|n| (format!("l{n}"), json!(""))).collect();
        json!({"nodeSelector": labels})
    };
    let layer = json!({"source": {"directory": null, "layer": {"name": "work"}}});
    let mut placed_layer = layer.clone();
    placed_layer["nodeSelector"] = json!({"a": "b"});
    check(
        "CasManifest",
        &[
            (json!({}), TAKEN),
            (layer, TAKEN),
            (json!({"source": null}), &["spec.source", "Required"]),
            (
                json!({"source": {"directory": null}}),
                &["exactly one source must be set"],
            ),
            (
                json!({"source": {"layer": {"name": "work"}}}),
                &["exactly one source must be set"],
            ),
            (
                placed_layer,
                &["spec.nodeSelector", "a snapshot stays on its layer's node"],
            ),
            (
                json!({"source": {"directory": null, "layer": {"name": ""}}}),
                &["spec.source.layer.name"],
            ),
            (
                json!({"source": {"directory": null, "layer": {"name": long(254)}}}),
                &["spec.source.layer.name"],
            ),
            (path("/srv/with space/ünïcode"), TAKEN),
            (path("/srv/..hidden/a..b"), TAKEN),
            (path(&format!("/{}", long(1023))), TAKEN),
            (path(&format!("/{}", long(1024))), &["spec.source.directory.path"]),
            (path("srv/tree"), &["spec.source.directory.path"]),
            (path("/"), &["spec.source.directory.path"]),
            (path(""), &["spec.source.directory.path"]),
            (path("/srv//tree"), &["spec.source.directory.path"]),
            (path("/srv/tree/"), &["spec.source.directory.path"]),
            (path("/srv/../etc"), &["the path may not contain . or .."]),
            (path("/srv/.."), &["the path may not contain . or .."]),
            (path("/srv/./tree"), &["the path may not contain . or .."]),
            (exclude(json!(["**/*.tmp", "target"])), TAKEN),
            (exclude(json!([""])), &["spec.source.directory.exclude[0]"]),
            (exclude(json!([long(128)])), TAKEN),
            (exclude(json!([long(129)])), &["spec.source.directory.exclude[0]"]),
            (exclude(json!(vec!["a"; 16])), TAKEN),
            (exclude(json!(vec!["a"; 17])), &["spec.source.directory.exclude"]),
            (labels(16), TAKEN),
            (labels(17), &["spec.nodeSelector"]),
            (json!({"nodeSelector": {"larder.dev/pool": "build"}}), TAKEN),
            // No node has such a label; a rule on keys would make a stored wrong value unwritable.
            (json!({"nodeSelector": {"not a key": ""}}), TAKEN),
            (json!({"nodeSelector": {"key": "not a value"}}), &["spec.nodeSelector"]),
            (json!({"nodeSelector": {"key": long(63)}}), TAKEN),
            (json!({"nodeSelector": {"key": long(64)}}), &["spec.nodeSelector"]),
            (json!({"rebuildInterval": "1h"}), TAKEN),
            (
                json!({"rebuildInterval": "0s"}),
                &["spec.rebuildInterval", "longer than zero"],
            ),
            (json!({"rebuildInterval": "soon"}), &["spec.rebuildInterval"]),
            (json!({"revisionHistoryLimit": 0}), TAKEN),
            (json!({"revisionHistoryLimit": 100}), TAKEN),
            (json!({"revisionHistoryLimit": 101}), &["spec.revisionHistoryLimit"]),
            (json!({"revisionHistoryLimit": -1}), &["spec.revisionHistoryLimit"]),
            (json!({"suspend": true}), TAKEN),
            (json!({"suspend": "yes"}), &["spec.suspend"]),
        ],
    )
    .await;
}

#[tokio::test]
async fn writablelayer_rules() {
    let limit = |limit: Value| json!({"sizeLimit": limit});
    let owner = |uid: i64, gid: i64| json!({"owner": {"uid": uid, "gid": gid}});
    check(
        "WritableLayer",
        &[
            (json!({}), TAKEN),
            (json!({"manifest": null}), &["spec.manifest", "Required"]),
            (json!({"manifest": {"name": ""}}), &["spec.manifest.name"]),
            (json!({"nodeName": null}), &["spec.nodeName", "Required"]),
            (json!({"nodeName": ""}), &["spec.nodeName"]),
            (json!({"mode": "Overlay"}), TAKEN),
            (json!({"mode": "Tmpfs"}), TAKEN),
            (json!({"mode": "tmpfs"}), &["spec.mode", "Overlay", "Tmpfs"]),
            (limit(Value::Null), TAKEN),
            (limit(json!("4Mi")), TAKEN),
            (limit(json!(4 << 20)), TAKEN),
            (limit(json!((4 << 20) - 1)), &["spec.sizeLimit", "at least 4Mi"]),
            (limit(json!("0")), &["spec.sizeLimit", "at least 4Mi"]),
            (owner(0, 0), TAKEN),
            (owner(4_294_967_294, 4_294_967_294), TAKEN),
            (owner(-1, 0), &["spec.owner.uid"]),
            (owner(0, 4_294_967_295), &["spec.owner.gid"]),
            (json!({"owner": {"uid": 1}}), &["spec.owner.gid", "Required"]),
        ],
    )
    .await;
}

#[tokio::test]
async fn retentionpolicy_rules() {
    let field = |name: &str, value: Value| json!({name: value});
    let mut cases: Vec<Case> = vec![
        (json!({}), TAKEN),
        (json!({"nodeSelector": null}), &["spec.nodeSelector", "Required"]),
        (json!({"nodeSelector": 5}), &["spec.nodeSelector"]),
        (field("priority", json!(-1_000_000)), TAKEN),
        (field("priority", json!(1_000_001)), &["spec.priority"]),
        (field("minCopies", json!(1)), TAKEN),
        (field("minCopies", json!(0)), &["spec.minCopies"]),
        (field("minCopies", json!(1001)), &["spec.minCopies"]),
        (field("gracePeriod", json!("0s")), TAKEN),
        (field("gracePeriod", json!("-1h")), &["spec.gracePeriod"]),
        (field("jitter", json!("10m")), TAKEN),
        (field("jitter", json!("10")), &["spec.jitter"]),
        (field("maxAge", json!("0s")), &["spec.maxAge", "longer than zero"]),
        (field("maxAge", json!({"days": 3})), &["spec.maxAge"]),
        (field("timeZone", json!("Europe/Berlin")), TAKEN),
        (field("timeZone", json!("America/Argentina/Buenos_Aires")), TAKEN),
        (field("timeZone", json!("Etc/GMT+5")), TAKEN),
        (field("timeZone", json!("")), &["spec.timeZone"]),
        (field("timeZone", json!("../etc/passwd")), &["spec.timeZone"]),
        (field("dryRun", json!(1)), &["spec.dryRun"]),
    ];
    for schedule in [
        "@daily",
        "0 3 * * *",
        "*/5 * * * *",
        "0 0-6/2 1,15 JAN-MAR MON-FRI",
        "59 23 31 12 7",
    ] {
        cases.push((field("schedule", json!(schedule)), TAKEN));
    }
    for schedule in [
        "",
        "daily",
        "@yesterday",
        "0 3 * *",
        "0 3 * * * *",
        "60 3 * * *",
        "0 24 * * *",
        "0 3 0 * *",
        "0 3 * 13 *",
    ] {
        cases.push((field("schedule", json!(schedule)), &["spec.schedule"]));
    }
    for share in ["0%", "10%", "100%", "1Gi", "0"] {
        cases.push((field("minFree", json!(share)), TAKEN));
    }
    for share in ["101%", "-1%", "%", "1.5%", "010%", "ten"] {
        cases.push((field("minFree", json!(share)), &["spec.minFree"]));
    }
    check("RetentionPolicy", &cases).await;
}

#[tokio::test]
async fn nodestore_rules() {
    let entry = json!({
        "namespace": "a", "name": "b", "uid": "c", "generation": 1, "source": {"directory": {"path": "/x"}},
        "revisionHistoryLimit": 3,
    });
    check(
        "NodeStore",
        &[
            (json!({"manifests": vec![entry.clone(); 256]}), TAKEN),
            (json!({"manifests": vec![entry; 257]}), &["spec.manifests", "256"]),
        ],
    )
    .await;
}

#[tokio::test]
async fn what_a_layer_stands_on_cannot_be_changed_and_its_limit_only_grows() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    let namespace = cluster.namespace("rules").await;
    let layers = api(&client, "WritableLayer", &namespace);
    let mut spec = good("WritableLayer");
    spec["owner"] = json!({"uid": 1, "gid": 1});
    let plain = json!({"manifest": {"name": "tree"}, "nodeName": "node"});
    for (name, spec) in [("owned", spec), ("plain", plain)] {
        let layer = object("WritableLayer", name, &spec);
        answer(name, layers.create(&PostParams::default(), &layer))
            .await
            .unwrap();
    }

    let cases = [
        (
            "owned",
            json!({"manifest": {"name": "other"}}),
            "manifest cannot be changed",
        ),
        ("owned", json!({"nodeName": "other"}), "nodeName cannot be changed"),
        ("owned", json!({"mode": "Tmpfs"}), "mode cannot be changed"),
        ("owned", json!({"owner": {"uid": 2}}), "owner cannot be changed"),
        ("owned", json!({"owner": null}), "owner cannot be changed"),
        (
            "plain",
            json!({"owner": {"uid": 2, "gid": 2}}),
            "owner cannot be changed",
        ),
        ("owned", json!({"sizeLimit": "1G"}), "sizeLimit may only grow"),
        ("owned", json!({"sizeLimit": null}), "sizeLimit may only grow"),
        ("owned", json!({"sizeLimit": "1024Mi"}), ""),
        ("owned", json!({"sizeLimit": "2Gi"}), ""),
        ("plain", json!({"sizeLimit": "2Gi"}), ""),
    ];
    for (name, change, words) in cases {
        let patch = Patch::Merge(json!({"spec": change}));
        let params = PatchParams::default();
        match answer(format!("{name} {change}"), layers.patch(name, &params, &patch)).await {
            Ok(_) => assert_eq!(words, "", "{name} {change} was taken"),
            Err(kube::Error::Api(status)) => {
                assert_eq!(status.code, 422, "{name} {change}: {}", status.message);
                assert!(
                    !words.is_empty() && status.message.contains(words),
                    "{name} {change}: {}",
                    status.message
                );
            }
            Err(error) => panic!("{name} {change}: {error}"),
        }
    }
}

#[tokio::test]
async fn a_new_object_is_never_taken_for_ready() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    let namespace = cluster.namespace("rules").await;
    for kind in ["CasManifest", "WritableLayer", "RetentionPolicy", "NodeStore"] {
        let new = object(kind, &unique("new"), &good(kind));
        // Only looked at, so that it is in nobody's way.
        let dry_run = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let api = api(&client, kind, &namespace);
        let made = answer(kind, api.create(&dry_run, &new)).await.unwrap();
        assert_eq!(made.data["status"], json!({"observedGeneration": -1}), "{kind}");
    }
}

#[tokio::test]
async fn layers_are_selected_by_their_node_on_the_server() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    let namespace = cluster.namespace("rules").await;
    let layers = api(&client, "WritableLayer", &namespace);
    for node in ["one", "two"] {
        let spec = json!({"manifest": {"name": "tree"}, "nodeName": node});
        let layer = object("WritableLayer", &format!("on-{node}"), &spec);
        answer(node, layers.create(&PostParams::default(), &layer))
            .await
            .unwrap();
    }
    let on_two = ListParams::default().fields("spec.nodeName=two");
    let selected = answer("layers on two", layers.list(&on_two)).await.unwrap();
    let names: Vec<_> = selected
        .items
        .iter()
        .filter_map(|layer| layer.metadata.name.as_deref())
        .collect();
    assert_eq!(names, ["on-two"]);
}

#[tokio::test]
async fn kubectl_shows_each_kind_by_its_short_name_in_columns() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    let namespace = cluster.namespace("rules").await;
    for (kind, short, columns, more) in [
        (
            "CasManifest",
            "casm",
            "NAME READY REASON FILES SIZE UNIQUE SAVED NODES AGE",
            "NAME READY REASON FILES SIZE UNIQUE SAVED NODES AGE EXCLUSIVE DIGEST MESSAGE",
        ),
        (
            "WritableLayer",
            "wl",
            "NAME READY REASON NODE MANIFEST MODE LIMIT AGE",
            "NAME READY REASON NODE MANIFEST MODE LIMIT AGE PATH MESSAGE",
        ),
        (
            "RetentionPolicy",
            "retp",
            "NAME READY REASON GOVERNS OVER DRY-RUN LAST-RUN DELETED FREED NEXT-RUN AGE",
            "NAME READY REASON GOVERNS OVER DRY-RUN LAST-RUN DELETED FREED NEXT-RUN AGE MESSAGE",
        ),
        (
            "NodeStore",
            "nstore",
            "NAME READY REASON BLOBS STORED SAVED POLICY OVER RUN-FAILED LAST-RUN FREED AGE",
            "NAME READY REASON BLOBS STORED SAVED POLICY OVER RUN-FAILED LAST-RUN FREED NEXT-RUN HISTORY GARBAGE ROAD AGENT AGE",
        ),
    ] {
        let api = api(&client, kind, &namespace);
        let name = unique("shown");
        let mut spec = good(kind);
        if matches!(kind, "CasManifest" | "RetentionPolicy") {
            // Without one they are other tests' nodes' as well, and some of these look that all is quiet.
            spec["nodeSelector"] = json!({"shown": name});
        }
        answer(kind, api.create(&PostParams::default(), &object(kind, &name, &spec)))
            .await
            .unwrap();
        for (output, columns) in [(&[][..], columns), (&["-o", "wide"], more)] {
            let get = ["get", short, &name, "-n", &namespace, TIMEOUT];
            let table = cluster.kubectl_ok([&get[..], output].concat());
            let header: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
            assert_eq!(header.join(" "), columns, "{kind}");
        }
        answer(kind, api.delete(&name, &DeleteParams::default())).await.unwrap();
    }
}

/// kubectl prints such a warning to every user who applies a CRD with a field that the server only half understands.
#[tokio::test]
async fn the_api_server_has_no_warnings_about_the_crds() {
    let cluster = Cluster::shared().await;
    let crds = repo().join("crds");
    let dry_run = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        TIMEOUT,
    ];
    let output = cluster.kubectl([&dry_run[..], &["-k", &crds.to_string_lossy()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[tokio::test]
async fn the_examples_are_taken_and_the_mistakes_answered() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    cluster.ensure_namespace("demo").await;
    let apply =
        |path: &std::path::Path| cluster.kubectl(["apply", "--dry-run=server", TIMEOUT, "-f", &path.to_string_lossy()]);
    let examples = repo().join("examples");
    let mut seen = 0;
    for file in std::fs::read_dir(&examples).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let output = apply(&path);
            assert!(
                output.status.success(),
                "{}: {}",
                path.display(),
                String::from_utf8_lossy(&output.stderr)
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 6, "all examples were looked at");
    // A path that no agent allows is a matter of each node, not of the schema.
    assert!(apply(&examples.join("mistakes/outside.yaml")).status.success());
    let output = apply(&examples.join("mistakes/two-sources.yaml"));
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("exactly one source must be set"),
        "{output:?}"
    );
}
