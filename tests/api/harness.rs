//! The tests' own tools, tested: what others rely on must not fail quietly.

use std::time::Duration;

use http::Method;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, ResourceExt};

use crate::support::{Answer, Cluster, Faults, Rule, eventually, temp_store_dir, unique};

#[tokio::test]
async fn a_namespace_is_created_and_read_back() {
    let cluster = Cluster::shared().await;
    let name = cluster.namespace("harness").await;
    let namespace = Api::<Namespace>::all(cluster.client().await).get(&name).await.unwrap();
    assert_eq!(namespace.name_any(), name);
    assert_eq!(
        cluster.kubectl_ok(["get", "namespace", &name, "-o", "name"]),
        format!("namespace/{name}\n")
    );
}

#[tokio::test]
async fn a_ready_node_shows_as_ready_and_then_as_not_ready() {
    let cluster = Cluster::shared().await;
    let name = unique("harness-node");
    cluster.node(&name, &[("pool", "build")]).await;
    let jsonpath = r#"jsonpath={.metadata.labels.pool} {.status.conditions[?(@.type=="Ready")].status}"#;
    assert_eq!(cluster.kubectl_ok(["get", "node", &name, "-o", jsonpath]), "build True");
    cluster.set_node_ready(&name, false).await;
    assert_eq!(
        cluster.kubectl_ok(["get", "node", &name, "-o", jsonpath]),
        "build Unknown"
    );
}

#[tokio::test]
async fn a_bound_token_names_the_node_of_its_pod() {
    let cluster = Cluster::shared().await;
    let (namespace, node) = (cluster.namespace("harness").await, unique("harness-node"));
    cluster.node(&node, &[]).await;
    cluster.service_account(&namespace, "agent").await;
    cluster.pod(&namespace, "agent-pod", "agent", &node).await;
    let client = cluster
        .service_account_client(&namespace, "agent", Some("agent-pod"))
        .await;
    let review = Api::<SelfSubjectReview>::all(client)
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .unwrap();
    let user = review.status.and_then(|status| status.user_info).unwrap();
    assert_eq!(
        user.username.as_deref(),
        Some(format!("system:serviceaccount:{namespace}:agent").as_str())
    );
    let extra = user.extra.unwrap();
    assert_eq!(extra["authentication.kubernetes.io/node-name"], [node]);
}

#[tokio::test]
async fn an_injected_fault_hits_the_requests_it_names_and_no_others() {
    let cluster = Cluster::shared().await;
    let namespace = cluster.namespace("harness").await;
    let faults = Faults::new();
    let maps = Api::<ConfigMap>::namespaced(faults.client(cluster.config().await), &namespace);
    let map = |name: &str| ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_string()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let post = |method: &Method, path: &str| method == Method::POST && path.contains("/configmaps");
    faults.add(Rule::new(post, Answer::Refuse(409, "Conflict")).times(2));
    faults.add(Rule::new(post, Answer::Lose).times(1));

    for _ in 0..2 {
        match maps.create(&PostParams::default(), &map("first")).await {
            Err(kube::Error::Api(status)) => assert_eq!((status.code, status.reason.as_str()), (409, "Conflict")),
            other => panic!("{other:?}"),
        }
    }
    assert!(
        maps.get_opt("first").await.unwrap().is_none(),
        "a refused request is not carried out"
    );
    maps.create(&PostParams::default(), &map("second"))
        .await
        .expect_err("its answer is lost");
    assert!(
        maps.get_opt("second").await.unwrap().is_some(),
        "a request whose answer is lost is carried out"
    );
    maps.create(&PostParams::default(), &map("third"))
        .await
        .expect("all rules are used up");
    assert_eq!(faults.count(post), 4);
    assert_eq!(faults.writes().len(), 4);
}

#[tokio::test]
#[should_panic(expected = "the sky turns green: not within 50ms; last seen: it is blue")]
async fn waiting_in_vain_says_what_was_seen_last() {
    eventually::<()>(Duration::from_millis(50), "the sky turns green", async || {
        Err("it is blue".to_string())
    })
    .await;
}

#[test]
fn a_store_folder_leaves_no_mount_and_no_loop_device() {
    let store = temp_store_dir();
    let root = store.path().to_path_buf();
    let (image, point) = (root.join("image"), root.join("a folder"));
    std::fs::create_dir(&point).unwrap();
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let run = |program: &str, args: &[&std::ffi::OsStr]| {
        let output = std::process::Command::new(program).args(args).output().unwrap();
        assert!(
            output.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    run("mkfs.ext4", &["-q".as_ref(), image.as_ref()]);
    run("losetup", &["--find".as_ref(), image.as_ref()]);
    let devices = store.loop_devices();
    assert_eq!(devices.len(), 1);
    run("mount", &[devices[0].as_ref(), point.as_ref()]);
    run(
        "mount",
        &["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), point.as_ref()],
    );
    assert_eq!(store.mounts(), [point.clone(), point.clone()]);

    drop(store);
    assert!(!root.exists());
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mountinfo.contains(root.to_str().unwrap()));
    let backing = std::fs::read_to_string(format!(
        "/sys/block/{}/loop/backing_file",
        devices[0].file_name().unwrap().to_str().unwrap()
    ));
    assert!(!backing.unwrap_or_default().contains(root.to_str().unwrap()));
}
