//! `verify`.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::beside::agent;
use crate::support::PATIENCE;
use crate::{HELLO, Place, text};

fn blob(place: &Place, digest: &str) -> PathBuf {
    place.store().join("objects").join(&digest[7..9]).join(&digest[9..])
}

/// Puts other bytes of the same length under a content's name.
fn damage(place: &Place, digest: &str) {
    fs::remove_file(blob(place, digest)).unwrap();
    fs::write(blob(place, digest), "HELLO\n").unwrap();
}

#[test]
fn a_sound_store_ends_with_0_and_a_damaged_one_with_1() {
    let place = Place::built();
    let said = place.run(&["verify"]).done().text();
    assert!(said.starts_with("read 2.94Ki of 2 contents in "), "{said}");
    assert!(said.ends_with("; 1 manifest and 1 ref are whole\n"), "{said}");
    damage(&place, HELLO);
    let found = place
        .run(&["verify", "-o", "json"])
        .failed(1, &["the store is damaged", "--repair"])
        .json();
    assert_eq!(
        (&found["sound"], &found["scope"], &found["complete"]),
        (&json!(false), &json!("all"), &json!(true))
    );
    let bad = &found["badBlobs"][0];
    assert_eq!(
        (&bad["digest"], &bad["fault"], &bad["length"]),
        (&json!(HELLO), &json!("damaged"), &json!(6))
    );
    assert_eq!((&bad["files"], &bad["healed"]), (&json!(2), &json!(false)));
    assert_eq!(fs::read(bad["quarantined"].as_str().unwrap()).unwrap(), b"HELLO\n");
    let hurt = &found["hurt"][0];
    assert_eq!((&hurt["currentOf"], &hurt["files"]), (&json!(["local/t"]), &json!(2)));
    assert_eq!(
        hurt["samples"],
        json!([{"path": "hello", "content": HELLO}, {"path": "sub/copy", "content": HELLO}])
    );
    assert_eq!(found["repair"], json!(null));

    let said = place.run(&["verify"]).failed(1, &[]).text();
    assert!(
        said.contains(&format!("{}      2  missing  not there\n", &HELLO[7..19])),
        "{said}"
    );
    assert!(said.contains("      1      2  local/t  hello\n"), "{said}");
    assert!(said.ends_with("in quarantine: 1 file, 6\n"), "{said}");
    // The next build that has it heals it.
    place.run(&["build", text(&place.path("source")), "--name", "t"]).done();
    place.run(&["verify"]).done();
}

#[test]
fn repair_stores_again_what_the_source_or_another_folder_has() {
    let place = Place::built();
    let source = place.path("source");
    damage(&place, HELLO);
    let found = place.json(&["verify", "--repair"]);
    assert_eq!(
        (&found["sound"], &found["badBlobs"][0]["healed"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(
        found["repair"],
        json!({"repaired": 1, "bytes": 6, "lost": [], "rebuild": []})
    );
    assert_eq!(place.run(&["get", HELLO]).done().text(), "hello\n");

    fs::remove_file(blob(&place, HELLO)).unwrap();
    for name in ["hello", "sub/copy"] {
        fs::write(source.join(name), "HELLO\n").unwrap();
    }
    let said = place
        .run(&["verify", "--repair"])
        .failed(1, &["the store is damaged", "--from"])
        .text();
    assert!(
        said.contains("repaired 0 contents, 0\n") && said.contains("/hello: it has other bytes now"),
        "{said}"
    );
    let other = place.source("other");
    let said = place.run(&["verify", "--repair", "--from", text(&other)]).done().text();
    assert!(said.ends_with("repaired 1 content, 6\n"), "{said}");
    place.run(&["verify"]).done();
    assert!(place.staging_is_empty());
}

#[test]
fn manifests_and_refs_that_are_damaged_need_a_build_or_forgetting() {
    let place = Place::built();
    let digest = place.digest("t");
    let manifest = place.store().join("manifests").join(&digest[7..]);
    fs::remove_file(&manifest).unwrap();
    fs::write(&manifest, "no manifest").unwrap();
    fs::write(place.store().join("refs/local/u"), "{").unwrap();
    let found = place
        .run(&["verify", "--repair", "-o", "json"])
        .failed(1, &["only building the trees again"])
        .json();
    assert_eq!(
        (&found["repair"]["rebuild"], &found["manifests"]),
        (&json!([digest]), &json!(0))
    );
    assert_eq!(found["badManifests"][0]["currentOf"], json!(["local/t"]));
    let said = place.run(&["verify"]).failed(1, &["forget"]).text();
    assert!(
        said.contains("rebuild the tree to heal it, of local/t\n") && said.contains("refs/local/u: "),
        "{said}"
    );
    place.run(&["build", text(&place.path("source")), "--name", "t"]).done();
    place.run(&["forget", "u"]).done();
    place.run(&["verify"]).done();
}

#[test]
fn a_part_is_read_when_asked_and_arguments_are_checked() {
    let place = Place::built();
    let none = place.json(&["verify", "--sample", "0"]);
    assert_eq!(
        (&none["scope"], &none["blobs"], &none["passedOver"]),
        (&json!("sample"), &json!(0), &json!(2))
    );
    let all = place.json(&["verify", "--sample", "100%", "--seed", "7", "--rate", "1Gi"]);
    assert_eq!(
        (&all["fraction"], &all["seed"], &all["blobs"]),
        (&json!(1.0), &json!(7), &json!(2))
    );
    // No full one has been: everything has changed.
    assert_eq!(place.json(&["verify", "--changed"])["blobs"], 2);
    for bad in [
        &["--sample", "101"][..],
        &["--sample", "x"],
        &["--sample", "1", "--changed"],
        &["--seed", "1"],
        &["--rate", "0"],
        &["--from", "/tmp"],
    ] {
        place.run(&[&["verify"], bad].concat()).failed(2, &[]);
    }
    place
        .run(&["verify", "--repair", "--from", text(&place.path("nowhere"))])
        .failed(3, &["cannot open"]);
}

#[tokio::test]
async fn it_verifies_and_repairs_beside_an_agent() {
    let place = Place::built();
    let mut agent = agent(&place).await;
    damage(&place, HELLO);
    place.run(&["verify"]).failed(1, &["the store is damaged"]);
    place
        .run(&["verify", "--repair", "--from", text(&place.path("source"))])
        .done();
    place.run(&["resolve", "t"]).done();
    place.run(&["analytics"]).done();
    agent.terminate();
    assert!(agent.wait(PATIENCE).success(), "{}", agent.log_end());
}
