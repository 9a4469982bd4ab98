//! Objects that do not decode: they get an answer, and stop no other.

use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceValidation, JSONSchemaProps,
};
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use crate::support::{Cluster, PATIENCE, Site, eventually, unique, write_files};
use crate::{Controller, lists};

/// The CRDs as an older release might have had them: any spec and status.
fn loose_crds() -> Vec<CustomResourceDefinition> {
    let mut crds = larder::api::crds();
    for crd in &mut crds {
        let anything = || JSONSchemaProps {
            type_: Some("object".to_owned()),
            x_kubernetes_preserve_unknown_fields: Some(true),
            ..Default::default()
        };
        let schema = JSONSchemaProps {
            type_: Some("object".to_owned()),
            properties: Some([("spec".to_owned(), anything()), ("status".to_owned(), anything())].into()),
            ..Default::default()
        };
        let version = &mut crd.spec.versions[0];
        version.schema = Some(CustomResourceValidation {
            open_api_v3_schema: Some(schema),
        });
        version.selectable_fields = None;
    }
    crds
}

async fn apply(cluster: &Cluster, crds: Vec<CustomResourceDefinition>) {
    let api = Api::<CustomResourceDefinition>::all(cluster.client().await);
    for crd in crds {
        let name = crd.metadata.name.clone().unwrap();
        api.patch(&name, &PatchParams::apply("larder-tests").force(), &Patch::Apply(&crd))
            .await
            .unwrap();
    }
}

/// Waits until the API server takes a bad object, or does not: it takes a new schema up a moment after it has accepted it.
async fn takes(api: &Api<DynamicObject>, bad: &DynamicObject, wanted: bool) {
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let mut probe = bad.clone();
    probe.metadata.name = Some(unique("probe"));
    eventually(PATIENCE, &format!("{probe:?} is taken: {wanted}"), async || {
        match api.create(&dry_run, &probe).await {
            Ok(_) if wanted => Ok(()),
            Err(kube::Error::Api(status)) if !wanted && status.code == 422 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn raw(cluster: &Cluster, kind: &str, plural: &str, namespace: Option<&str>) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("larder.dev", "v1alpha1", kind), plural);
    match namespace {
        Some(namespace) => Api::namespaced_with(cluster.client().await, namespace, &resource),
        None => Api::all_with(cluster.client().await, &resource),
    }
}

fn object(kind: &str, name: &str, spec: Value) -> DynamicObject {
    let object = json!({"apiVersion": "larder.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    serde_json::from_value(object).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_objects_that_are_stored_are_named_and_stop_no_others() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let site = Site::start_in(cluster, "poison").await;
    write_files(&site.source("good"), 3, "poison");
    write_files(&site.source("later"), 3, "poison");
    let policy = unique("poison");
    let manifests = raw(cluster, "CasManifest", "casmanifests", Some(&site.namespace)).await;
    let layers = raw(cluster, "WritableLayer", "writablelayers", Some(&site.namespace)).await;
    let policies = raw(cluster, "RetentionPolicy", "retentionpolicies", None).await;

    apply(cluster, loose_crds()).await;
    let source = json!({"directory": {"path": site.source("good")}});
    let create = PostParams::default();
    let layer = |name: &str, size: Value| {
        let spec = json!({"manifest": {"name": "good"}, "nodeName": site.node, "sizeLimit": size});
        object("WritableLayer", name, spec)
    };
    let bad = [
        (
            &manifests,
            object("CasManifest", "bad", json!({"source": source, "nodeSelector": 5})),
        ),
        (
            &policies,
            object(
                "RetentionPolicy",
                &policy,
                json!({"nodeSelector": {"site": site.node}, "maxAge": "soon"}),
            ),
        ),
        (&layers, layer("bad", json!("1 Gi"))),
        (&layers, layer("worse", json!({"a": 1}))),
    ];
    for (api, object) in &bad {
        takes(api, object, true).await;
        api.create(&create, object).await.unwrap();
    }
    apply(cluster, larder::api::crds()).await;
    for (api, object) in &bad {
        takes(api, object, false).await;
    }

    // The good ones, made before and after the real schema was put back, work.
    site.create_manifest("good", json!({})).await;
    site.create_layer("good", "good", json!({"mode": "Tmpfs"})).await;
    site.manifest_says("good", "True", "Stored").await;
    site.layer_says("good", "True", "Mounted").await;

    // The bad ones get an answer with field and value.
    for (api, name, words) in [
        (&manifests, "bad", ["spec.nodeSelector", "5"]),
        (&layers, "bad", ["spec.sizeLimit", "1 Gi"]),
        (&policies, &policy, ["spec.maxAge", "soon"]),
    ] {
        eventually(PATIENCE, &format!("{name} says what is wrong with it"), async || {
            let object = api.get(name).await.map_err(|error| error.to_string())?;
            let conditions = object.data["status"]["conditions"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let said = conditions.iter().any(|condition| {
                let message = condition["message"].as_str().unwrap_or_default();
                condition["type"] == "Ready"
                    && condition["status"] == "False"
                    && condition["reason"] == "InvalidSpec"
                    && words.iter().all(|word| message.contains(word))
            });
            if said {
                Ok(())
            } else {
                Err(format!("{:?}", object.data["status"]))
            }
        })
        .await;
    }
    // The API server takes no write at all to an object whose value its rules cannot even be asked about, so that the
    // answer is an event.
    let events = Api::<Event>::namespaced(cluster.client().await, &site.namespace);
    eventually(PATIENCE, "an event about the worst", async || {
        let list = events
            .list(&ListParams::default())
            .await
            .map_err(|error| error.to_string())?;
        let said = list.items.iter().any(|event| {
            let note = event.note.as_deref().unwrap_or_default();
            event
                .regarding
                .as_ref()
                .is_some_and(|about| about.name.as_deref() == Some("worse"))
                && event.reason.as_deref() == Some("InvalidSpec")
                && note.contains("spec.sizeLimit")
        });
        if said {
            Ok(())
        } else {
            Err(format!("{:?}", list.items.iter().map(|e| &e.note).collect::<Vec<_>>()))
        }
    })
    .await;
    // A bad retention value deletes nothing, not even what the built-in policy would; and no kind is listed over and over.
    let garbage = site.store.path().join("garbage");
    std::fs::write(&garbage, "garbage").unwrap();
    site.store_json(&["put", &garbage.display().to_string()]);
    let old = std::time::SystemTime::now() - Duration::from_secs(3 * 24 * 3600);
    for blob in site.blobs() {
        let path = site.root().join("objects").join(&blob[..2]).join(&blob[2..]);
        std::fs::File::open(path).unwrap().set_modified(old).unwrap();
    }
    let request = json!({"metadata": {"annotations": {"larder.dev/requestedAt": unique("run")}}});
    policies
        .patch(&policy, &PatchParams::default(), &Patch::Merge(request))
        .await
        .unwrap();
    let before = site.blobs();
    assert_eq!(before.len(), 4);
    let counts: Vec<usize> = ["casmanifests", "writablelayers", "retentionpolicies"]
        .map(|plural| controller.faults.count(lists(plural)))
        .to_vec();
    tokio::time::sleep(Duration::from_secs(15)).await;
    site.create_manifest("later", json!({})).await;
    site.manifest_says("later", "True", "Stored").await;
    for (plural, count) in ["casmanifests", "writablelayers", "retentionpolicies"]
        .iter()
        .zip(counts)
    {
        let more = controller.faults.count(lists(plural)) - count;
        assert!(more <= 1, "{plural} were listed {more} times in 15 s");
    }
    assert!(before.iter().all(|blob| site.blobs().contains(blob)));

    for name in ["bad", "worse"] {
        layers.delete(name, &DeleteParams::default()).await.unwrap();
    }
    manifests.delete("bad", &DeleteParams::default()).await.unwrap();
    policies.delete(&policy, &DeleteParams::default()).await.unwrap();
    controller.stop().await;
}
