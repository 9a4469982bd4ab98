//! Status writes that fail are tried again with back-off, and the last word is written in the end.

use std::time::Duration;

use http::Method;
use serde_json::json;

use crate::Controller;
use crate::support::{Answer, Cluster, Rule, Site, by_patience, write_files};

#[tokio::test(flavor = "multi_thread")]
async fn refused_status_writes_back_off_and_the_last_word_is_written() {
    let cluster = Cluster::shared().await;
    let controller = Controller::start(cluster).await;
    let site = Site::start_in(cluster, "refused").await;
    for (name, code, reason) in [("large", 413, "RequestEntityTooLarge"), ("contended", 409, "Conflict")] {
        write_files(&site.source(name), 3, name);
        let path = format!("/namespaces/{}/casmanifests/{name}/status", site.namespace);
        let is_write = move |method: &Method, url: &str| {
            *method == Method::PATCH && url.split('?').next() == Some(&format!("/apis/larder.dev/v1alpha1{path}"))
        };
        controller
            .faults
            .add(Rule::new(is_write.clone(), Answer::Refuse(code, reason)));
        site.create_manifest(name, json!({})).await;
        // Fifteen in two minutes is the bound; the first seconds hold most of them.
        let (time, most) = by_patience((Duration::from_secs(30), 11), (Duration::from_secs(120), 15));
        tokio::time::sleep(time).await;
        let tries = controller.faults.count(is_write);
        assert!((3..=most).contains(&tries), "{tries} tries in {time:?} with {code}");
        controller.faults.clear();
        site.manifest_says(name, "True", "Stored").await;
    }
    controller.stop().await;
}
