//! `deploy/`: it renders, the API server takes it, and it allows what larder does and nothing else.

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use larder::api::{NodeStore, WritableLayer};
use serde_json::{Value, json};

use crate::support::{Cluster, SYSTEM_NAMESPACE, repo, unique};

#[tokio::test]
async fn the_api_server_takes_all_of_deploy() {
    let cluster = Cluster::shared().await;
    cluster.ensure_namespace(SYSTEM_NAMESPACE).await;
    let deploy = repo().join("deploy");
    let printed = cluster.kubectl_ok(["apply", "--dry-run=server", "-k", &deploy.to_string_lossy()]);
    for object in [
        "customresourcedefinition.apiextensions.k8s.io/casmanifests.larder.dev",
        "customresourcedefinition.apiextensions.k8s.io/nodestores.larder.dev",
        "customresourcedefinition.apiextensions.k8s.io/retentionpolicies.larder.dev",
        "customresourcedefinition.apiextensions.k8s.io/writablelayers.larder.dev",
        "deployment.apps/larder-controller",
        "daemonset.apps/larder-agent",
        "validatingadmissionpolicy.admissionregistration.k8s.io/larder-agent-own-node",
        "validatingadmissionpolicy.admissionregistration.k8s.io/larder-agent-own-lease",
    ] {
        assert!(
            printed.lines().any(|line| line.starts_with(&format!("{object} "))),
            "{object} is not in\n{printed}"
        );
    }
}

/// Two nodes with an agent each, a layer on each, and what the agent of the first may do.
struct Scene {
    near: String,
    far: String,
    namespace: String,
    agent: Client,
}

async fn scene(cluster: &Cluster) -> Scene {
    cluster.deploy().await;
    let (near, far) = (unique("near"), unique("far"));
    let namespace = cluster.namespace("deploy").await;
    let admin = cluster.client().await;
    for node in [&near, &far] {
        cluster.node(node, &[]).await;
        let store: NodeStore = from(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "NodeStore",
            "metadata": {"name": node}, "spec": {"manifests": []},
        }));
        Api::all(admin.clone())
            .create(&PostParams::default(), &store)
            .await
            .unwrap();
        let layer: WritableLayer = from(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "WritableLayer",
            "metadata": {"name": node, "finalizers": ["example.com/other"], "labels": {"team": "a"}},
            "spec": {"manifest": {"name": "tree"}, "nodeName": node, "mode": "Tmpfs", "sizeLimit": "8Mi"},
        }));
        Api::namespaced(admin.clone(), &namespace)
            .create(&PostParams::default(), &layer)
            .await
            .unwrap();
    }
    let agent = cluster.agent_client(&near).await;
    Scene {
        near,
        far,
        namespace,
        agent,
    }
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// The agent's patches go as server-side apply, as the program sends them.
fn apply() -> PatchParams {
    PatchParams::apply("larder-agent").force()
}

fn status(kind: &str) -> Patch<Value> {
    Patch::Apply(json!({"apiVersion": "larder.dev/v1alpha1", "kind": kind, "status": {"observedGeneration": 1}}))
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: kube::Result<T>, words: &[&str]) {
    match result {
        Err(kube::Error::Api(status)) => {
            assert_eq!(status.code, 403, "{}", status.message);
            for word in words {
                assert!(status.message.contains(word), "{word:?} is not in {:?}", status.message);
            }
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn an_agent_writes_the_status_of_its_own_store_and_of_no_other() {
    let cluster = Cluster::shared().await;
    let scene = scene(cluster).await;
    let stores = Api::<NodeStore>::all(scene.agent.clone());
    stores
        .patch_status(&scene.near, &apply(), &status("NodeStore"))
        .await
        .unwrap();
    refused(
        stores.patch_status(&scene.far, &apply(), &status("NodeStore")).await,
        &[&scene.near, &scene.far],
    );

    let spec = Patch::Merge(json!({"spec": {"manifests": []}}));
    refused(
        stores.patch(&scene.near, &PatchParams::default(), &spec).await,
        &["cannot patch", "nodestores"],
    );
    refused(
        stores.delete(&scene.near, &DeleteParams::default()).await,
        &["cannot delete"],
    );
}

#[tokio::test]
async fn an_agent_writes_the_status_and_the_finalizer_of_its_own_layers_and_nothing_else() {
    let cluster = Cluster::shared().await;
    let scene = scene(cluster).await;
    let layers = Api::<WritableLayer>::namespaced(scene.agent.clone(), &scene.namespace);
    layers
        .patch_status(&scene.near, &apply(), &status("WritableLayer"))
        .await
        .unwrap();
    refused(
        layers
            .patch_status(&scene.far, &apply(), &status("WritableLayer"))
            .await,
        &[&scene.near, &scene.far],
    );

    let uid = layers.get(&scene.near).await.unwrap().uid().unwrap();
    let own = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "WritableLayer",
        "metadata": {"uid": uid, "finalizers": ["larder.dev/layer"]},
    });
    let patched = layers.patch(&scene.near, &apply(), &Patch::Apply(own)).await.unwrap();
    assert_eq!(patched.finalizers(), ["example.com/other", "larder.dev/layer"]);
    let none = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "WritableLayer", "metadata": {"uid": uid, "finalizers": []},
    });
    let patched = layers.patch(&scene.near, &apply(), &Patch::Apply(none)).await.unwrap();
    assert_eq!(
        patched.finalizers(),
        ["example.com/other"],
        "its finalizer is dropped by giving it up"
    );

    let only = ["nothing of a WritableLayer but its status and its finalizer"];
    for patch in [
        json!({"metadata": {"finalizers": ["larder.dev/layer"]}}),
        json!({"metadata": {"labels": {"team": "b"}}}),
        json!({"metadata": {"annotations": {"larder.dev/requestedAt": "now"}}}),
        json!({"metadata": {"ownerReferences": [{
            "apiVersion": "v1", "kind": "Node", "name": scene.near, "uid": "00000000-0000-0000-0000-000000000000",
        }]}}),
        json!({"spec": {"sizeLimit": "16Mi"}}),
    ] {
        println!("{patch}");
        refused(
            layers
                .patch(&scene.near, &PatchParams::default(), &Patch::Merge(patch))
                .await,
            &only,
        );
    }
    let finalizer = Patch::Merge(json!({"metadata": {"finalizers": ["example.com/other", "larder.dev/layer"]}}));
    let far = layers.patch(&scene.far, &PatchParams::default(), &finalizer).await;
    refused(far, &["may not write a WritableLayer of node", &scene.far]);
    refused(
        layers.delete(&scene.near, &DeleteParams::default()).await,
        &["cannot delete"],
    );
}

#[tokio::test]
async fn an_agent_writes_the_lease_of_its_own_node_and_no_other() {
    let cluster = Cluster::shared().await;
    let scene = scene(cluster).await;
    let leases = Api::<Lease>::namespaced(scene.agent.clone(), SYSTEM_NAMESPACE);
    let lease = |name: &str| {
        from::<Lease>(json!({"metadata": {"name": name}, "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}}))
    };
    leases
        .create(&PostParams::default(), &lease(&scene.near))
        .await
        .unwrap();
    let renew = |name: &str| {
        Patch::Apply(json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": name}, "spec": {"renewTime": "2026-01-01T00:00:00.000000Z"},
        }))
    };
    leases.patch(&scene.near, &apply(), &renew(&scene.near)).await.unwrap();

    let words = ["may not write Lease", scene.far.as_str()];
    refused(leases.create(&PostParams::default(), &lease(&scene.far)).await, &words);
    refused(leases.patch(&scene.far, &apply(), &renew(&scene.far)).await, &words);
    refused(
        leases.create(&PostParams::default(), &lease("larder-controller")).await,
        &["may not write Lease"],
    );

    // One that exists, such as that of the controller's election.
    let admin = Api::<Lease>::namespaced(cluster.client().await, SYSTEM_NAMESPACE);
    admin.create(&PostParams::default(), &lease(&scene.far)).await.unwrap();
    refused(leases.patch(&scene.far, &apply(), &renew(&scene.far)).await, &words);
    refused(
        leases.delete(&scene.near, &DeleteParams::default()).await,
        &["cannot delete"],
    );
    let elsewhere = Api::<Lease>::namespaced(scene.agent, "kube-node-lease");
    refused(
        elsewhere.create(&PostParams::default(), &lease(&scene.near)).await,
        &["cannot create"],
    );
}

#[tokio::test]
async fn a_token_of_the_agents_account_that_is_bound_to_no_node_writes_nothing() {
    let cluster = Cluster::shared().await;
    let scene = scene(cluster).await;
    let client = cluster
        .service_account_client(SYSTEM_NAMESPACE, "larder-agent", None)
        .await;
    let stores = Api::<NodeStore>::all(client.clone());
    refused(
        stores.patch_status(&scene.near, &apply(), &status("NodeStore")).await,
        &["not bound to a node"],
    );
    let layers = Api::<WritableLayer>::namespaced(client, &scene.namespace);
    refused(
        layers
            .patch_status(&scene.near, &apply(), &status("WritableLayer"))
            .await,
        &["not bound to a node"],
    );
}

#[tokio::test]
async fn the_policies_leave_everyone_else_alone() {
    let cluster = Cluster::shared().await;
    let scene = scene(cluster).await;
    let stores = Api::<NodeStore>::all(cluster.client().await);
    stores
        .patch_status(&scene.far, &apply(), &status("NodeStore"))
        .await
        .unwrap();
    let layers = Api::<WritableLayer>::namespaced(cluster.controller_client().await, &scene.namespace);
    let drop_all = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    layers
        .patch(&scene.far, &PatchParams::default(), &drop_all)
        .await
        .unwrap();
}

/// The whole of what an account may do is asked for, so that a right which is added later has to be added here.
#[tokio::test]
async fn neither_account_may_do_more_than_its_work() {
    let cluster = Cluster::shared().await;
    cluster.deploy().await;
    let node = unique("node");
    cluster.node(&node, &[]).await;
    let controller = cluster.controller_client().await;
    let agent = cluster.agent_client(&node).await;
    let verbs = [
        "get",
        "list",
        "watch",
        "create",
        "update",
        "patch",
        "delete",
        "deletecollection",
    ];
    // group, resource, namespace, what the controller may, what the agent may
    let table = [
        ("", "nodes", "", "get list watch", ""),
        ("", "nodes/status", "", "", ""),
        ("", "pods", "default", "", ""),
        ("", "secrets", "default", "", ""),
        ("", "secrets", SYSTEM_NAMESPACE, "", ""),
        ("", "configmaps", SYSTEM_NAMESPACE, "", ""),
        ("", "serviceaccounts/token", SYSTEM_NAMESPACE, "", ""),
        ("larder.dev", "casmanifests", "default", "get list watch", ""),
        ("larder.dev", "casmanifests/status", "default", "patch", ""),
        ("larder.dev", "retentionpolicies", "", "get list watch", ""),
        ("larder.dev", "retentionpolicies/status", "", "patch", ""),
        (
            "larder.dev",
            "writablelayers",
            "default",
            "get list watch patch",
            "get list watch patch",
        ),
        ("larder.dev", "writablelayers/status", "default", "patch", "patch"),
        (
            "larder.dev",
            "nodestores",
            "",
            "get list watch create patch delete",
            "get list watch",
        ),
        ("larder.dev", "nodestores/status", "", "get", "patch"),
        ("apiextensions.k8s.io", "customresourcedefinitions", "", "", ""),
        ("events.k8s.io", "events", "default", "create patch", "create patch"),
        (
            "coordination.k8s.io",
            "leases",
            SYSTEM_NAMESPACE,
            "get list watch create update patch",
            "get create update patch",
        ),
        ("coordination.k8s.io", "leases", "kube-system", "", ""),
    ];
    for (group, resource, namespace, of_controller, of_agent) in table {
        for (who, client, expected) in [("controller", &controller, of_controller), ("agent", &agent, of_agent)] {
            let mut allowed = Vec::new();
            for verb in verbs {
                if may(client, verb, group, resource, namespace).await {
                    allowed.push(verb);
                }
            }
            assert_eq!(
                allowed.join(" "),
                expected,
                "{who}: {resource}.{group} in {namespace:?}"
            );
        }
    }
}

async fn may(client: &Client, verb: &str, group: &str, resource: &str, namespace: &str) -> bool {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let some = |text: &str| (!text.is_empty()).then(|| text.to_string());
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                verb: some(verb),
                group: some(group),
                resource: some(resource),
                subresource: some(subresource),
                namespace: some(namespace),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let answer = Api::all(client.clone())
        .create(&PostParams::default(), &review)
        .await
        .unwrap();
    answer.status.unwrap().allowed
}
