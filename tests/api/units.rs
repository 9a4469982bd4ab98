//! Sizes and durations: the API server and larder read the same text alike or refuse it alike, and at once.

use std::time::{Duration, Instant};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{CustomResourceExt, GroupVersionKind};
use kube::{Api, Client};
use larder::api::{DurationOrZero, Size, WritableLayer, parse_duration, parse_size};
use serde_json::{Value, json};

use crate::rules::{answer, object, verdict};
use crate::support::tables::{DURATIONS, ENDLESS_SIZES, NO_DURATIONS, NO_SIZES, SIZES};
use crate::support::{Cluster, eventually};

/// Kind and path of every field that is a size, and the spec that has it.
fn sized(value: &Value) -> [(&'static str, &'static str, Value); 5] {
    let rules = |field: &str| json!({"retention": {"name": "n", "uid": "u", "generation": 1, "rules": {field: value}}});
    [
        ("RetentionPolicy", "spec.maxSize", json!({"maxSize": value})),
        ("RetentionPolicy", "spec.minFree", json!({"minFree": value})),
        ("NodeStore", "spec.retention.rules.maxSize", rules("maxSize")),
        ("NodeStore", "spec.retention.rules.minFree", rules("minFree")),
        ("WritableLayer", "spec.sizeLimit", json!({"sizeLimit": value})),
    ]
}

#[tokio::test]
async fn sizes_mean_what_kubernetes_means_or_are_refused() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;

    let numbers = [0, 1, 123_456, i64::MAX as u64 - 1].map(|number| (json!(number), number));
    let texts = SIZES.map(|(text, bytes)| (json!(text), bytes));
    for (value, bytes) in texts.iter().chain(&numbers) {
        let size: Size = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(size.bytes(), Ok(*bytes), "{value}");
        for (kind, path, change) in sized(value) {
            let verdict = verdict(&client, kind, &change).await;
            if kind == "WritableLayer" && *bytes < 4 << 20 {
                let refusal = verdict.expect_err(&format!("{path}: {value} was taken"));
                assert!(refusal.contains("sizeLimit must be at least 4Mi"), "{value}: {refusal}");
            } else {
                assert_eq!(verdict, Ok(()), "{path}: {value}");
            }
        }
    }

    let others = [
        json!(-1),
        json!(i64::MAX),
        json!(1.5),
        json!(true),
        json!({"a": 1}),
        json!([1]),
    ];
    for value in NO_SIZES.map(|text| json!(text)).iter().chain(&others) {
        let size: Size = serde_json::from_value(value.clone()).unwrap();
        size.bytes().expect_err(&value.to_string());
        for (kind, path, change) in sized(value) {
            if value == "10%" && path.ends_with("minFree") {
                assert_eq!(verdict(&client, kind, &change).await, Ok(()), "{path}");
                continue;
            }
            let refusal = verdict(&client, kind, &change).await;
            let refusal = refusal.expect_err(&format!("{path}: {value} was taken"));
            assert!(refusal.contains(path), "{value}: {refusal}");
        }
    }
    assert_eq!(parse_size("10Gi"), Ok(10 << 30), "command lines follow the same rules");
}

#[tokio::test]
async fn durations_are_exact_or_refused() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    let fields = |text: &str| {
        [
            ("RetentionPolicy", "spec.maxAge", json!({"maxAge": text})),
            ("RetentionPolicy", "spec.gracePeriod", json!({"gracePeriod": text})),
            ("RetentionPolicy", "spec.jitter", json!({"jitter": text})),
            ("CasManifest", "spec.rebuildInterval", json!({"rebuildInterval": text})),
        ]
    };
    for (text, seconds) in DURATIONS {
        assert_eq!(parse_duration(text).unwrap().as_secs(), seconds, "{text}");
        for (kind, path, change) in fields(text) {
            assert_eq!(verdict(&client, kind, &change).await, Ok(()), "{path}: {text}");
        }
    }
    for text in NO_DURATIONS {
        parse_duration(text).expect_err(text);
        for (kind, path, change) in fields(text) {
            let refusal = verdict(&client, kind, &change).await;
            let refusal = refusal.expect_err(&format!("{path}: {text:?} was taken"));
            assert!(refusal.contains(path), "{text:?}: {refusal}");
        }
    }
    // No age and no interval at all are slips; no grace and no delay are choices.
    let zero: DurationOrZero = serde_json::from_value(json!("0s")).unwrap();
    assert!(zero.get().unwrap().is_zero());
    for (kind, path, change) in fields("0s") {
        let verdict = verdict(&client, kind, &change).await;
        if ["spec.maxAge", "spec.rebuildInterval"].contains(&path) {
            let refusal = verdict.expect_err(path);
            assert!(refusal.contains("must be longer than zero"), "{refusal}");
        } else {
            assert_eq!(verdict, Ok(()), "{path}");
        }
    }
}

/// The answer, which comes within a second: in one of three tries, as other tests keep the machine busy.
async fn at_once<T>(what: &str, request: impl AsyncFn() -> T) -> T {
    let mut took = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        let answered = answer(what, request()).await;
        took.push(start.elapsed());
        if start.elapsed() < Duration::from_secs(1) {
            return answered;
        }
    }
    panic!("{what}: took {took:?}");
}

/// Texts that no rule may hand to the API server's quantity parser.
fn poison() -> Vec<String> {
    let mut texts: Vec<String> = ENDLESS_SIZES.map(str::to_owned).into();
    // As long as a request may have, nearly.
    texts.push("1".repeat(1_000_000));
    texts.push(format!("{}Gi", "9".repeat(1_000_000)));
    texts
}

/// For messages.
fn short(text: &str) -> String {
    text.chars().take(32).collect()
}

#[tokio::test]
async fn a_size_that_keeps_a_quantity_parser_busy_is_refused_at_once() {
    let cluster = Cluster::shared().await;
    cluster.larder_crds().await;
    let client = cluster.client().await;
    for text in poison() {
        for (kind, path, change) in sized(&json!(text)) {
            let what = format!("{path}: {}", short(&text));
            let refusal = at_once(&what, async || verdict(&client, kind, &change).await).await;
            let refusal = refusal.expect_err(&format!("{what} was taken"));
            assert!(refusal.contains(path), "{what}: {refusal}");
        }
    }
}

/// The CRD of layers under a group of this test's own, so that its schema is in nobody's way.
fn layers_of_another_group() -> CustomResourceDefinition {
    let mut crd = WritableLayer::crd();
    crd.spec.group = "old.larder.test".to_owned();
    crd.spec.names.short_names = None;
    crd.spec.names.categories = None;
    crd.metadata.name = Some(format!("{}.{}", crd.spec.names.plural, crd.spec.group));
    crd
}

/// The same as it might have been in an older release: a size limit was any text.
fn without_rules(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    let schema = crd.spec.versions[0].schema.as_mut().unwrap();
    let properties = schema.open_api_v3_schema.as_mut().unwrap().properties.as_mut().unwrap();
    let spec = properties.get_mut("spec").unwrap();
    spec.x_kubernetes_validations = None;
    let limit = spec.properties.as_mut().unwrap().get_mut("sizeLimit").unwrap();
    limit.x_kubernetes_validations = None;
    limit.pattern = None;
    limit.max_length = None;
    crd
}

fn layers(client: &Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("old.larder.test", "v1alpha1", "WritableLayer");
    let resource = ApiResource::from_gvk_with_plural(&kind, "writablelayers");
    Api::namespaced_with(client.clone(), "default", &resource)
}

fn layer(name: &str, limit: &str) -> DynamicObject {
    let spec = json!({"manifest": {"name": "tree"}, "nodeName": "node", "sizeLimit": limit});
    let mut layer = object("WritableLayer", name, &spec);
    layer.types.as_mut().unwrap().api_version = "old.larder.test/v1alpha1".to_owned();
    layer
}

/// Rules that compare with what is stored ask about that, too.
#[tokio::test]
async fn a_stored_size_that_keeps_a_quantity_parser_busy_can_be_corrected_at_once() {
    let cluster = Cluster::shared().await;
    let client = cluster.client().await;
    let layers = layers(&client);
    let real = layers_of_another_group();
    cluster.install_crds(vec![without_rules(real.clone())]).await;
    let create = PostParams::default();
    for (number, text) in poison().iter().enumerate() {
        let old = layer(&format!("old-{number}"), text);
        answer(short(text), layers.create(&create, &old)).await.unwrap();
    }
    let crds = Api::<CustomResourceDefinition>::all(client.clone());
    let name = real.metadata.name.clone().unwrap();
    let force = PatchParams::apply("larder-tests").force();
    answer(&name, crds.patch(&name, &force, &Patch::Apply(&real)))
        .await
        .unwrap();
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    eventually(
        Duration::from_secs(20),
        "the real schema is in force",
        async || match answer("new", layers.create(&dry_run, &layer("new", "1 Gi"))).await {
            Err(error) if error.to_string().contains("spec.sizeLimit") => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await;

    let unset = PatchParams::default();
    for (number, text) in poison().iter().enumerate() {
        let name = format!("old-{number}");
        let patch = async |what: &str, patch: Value| {
            let what = format!("{} {what}", short(text));
            let patch = Patch::Merge(patch);
            at_once(&what, async || layers.patch(&name, &unset, &patch).await).await
        };
        // Taken or not: the answer comes.
        let _ = patch("keeps its size", json!({"metadata": {"labels": {"a": "b"}}})).await;
        let _ = patch("keeps its size, spec", json!({"spec": {"manifest": {"name": "other"}}})).await;
        for other in poison() {
            let refusal = patch("gets another", json!({"spec": {"sizeLimit": format!("{other}0")}}))
                .await
                .expect_err("another one was taken");
            assert!(refusal.to_string().contains("spec.sizeLimit"), "{refusal}");
        }
        let refusal = patch("gets none", json!({"spec": {"sizeLimit": null}}))
            .await
            .expect_err("none was taken");
        assert!(refusal.to_string().contains("sizeLimit may only grow"), "{refusal}");
        let refusal = patch("gets too little", json!({"spec": {"sizeLimit": "1Mi"}}))
            .await
            .expect_err("too little was taken");
        assert!(refusal.to_string().contains("at least 4Mi"), "{refusal}");
        patch("gets a good one", json!({"spec": {"sizeLimit": "1Gi"}}))
            .await
            .unwrap();
        let refusal = patch("shrinks", json!({"spec": {"sizeLimit": "1G"}}))
            .await
            .expect_err("less was taken");
        assert!(refusal.to_string().contains("sizeLimit may only grow"), "{refusal}");
    }
}
