//! The commands that write, with the store's lock to themselves.

use std::fs;

use serde_json::json;

use crate::{HELLO, NOTHING, Place, text};

#[test]
fn a_store_is_made_once_and_never_by_a_slip() {
    let place = Place::empty();
    let none = format!("there is no store in {}", place.store().display());
    for args in [
        &["ls"][..],
        &["put"],
        &["build", "/", "--name", "t"],
        &["gc"],
        &["forget", "t"],
        &["rm", HELLO],
        &["get", HELLO],
    ] {
        place.run(args).failed(3, &[&none, "larder store init"]);
    }
    assert!(!place.store().exists());
    let made = place.json(&["init"]);
    assert_eq!(made["created"], true);
    let again = place.json(&["init"]);
    assert_eq!((&again["created"], &again["id"]), (&json!(false), &made["id"]));
    let said = place.run(&["init"]).done().text();
    assert!(said.contains("is a store already"), "{said}");
    // The flag is before the variable.
    let other = place.path("other");
    place.run(&["init", "--store", text(&other)]).done();
    place.run(&["--store", text(&other), "ls"]).done();
}

#[test]
fn contents_are_put_from_stdin_and_files_and_told_new_or_known() {
    let place = Place::with_store();
    let put = place.run_with(&["put"], b"hello\n").done().text();
    assert_eq!(put, format!("{HELLO}  6  new  -\n"));
    let put = place.run_with(&["put", "-o", "json"], b"hello\n").done().json();
    assert_eq!(
        put,
        json!({"added": 0, "blobs": [{"name": "-", "digest": HELLO, "size": 6, "new": false}]})
    );
    let (big, small) = (place.path("big"), place.path("small"));
    fs::write(&big, vec![1; 3 << 20]).unwrap();
    fs::write(&small, "hello\n").unwrap();
    let put = place.json(&["put", text(&big), text(&small), text(&big)]);
    assert_eq!(put["added"], 3 << 20);
    let new: Vec<_> = put["blobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|blob| &blob["new"])
        .collect();
    assert_eq!(new, [true, false, false]);
    let digest = put["blobs"][0]["digest"].as_str().unwrap();
    assert_eq!(place.run(&["get", digest]).done().out, vec![1; 3 << 20]);
    // One that cannot be read stores none of them.
    let other = place.path("small2");
    fs::write(&other, "other").unwrap();
    place
        .run(&["put", text(&other), text(&place.path("nowhere"))])
        .failed(3, &["nowhere"]);
    place
        .run(&["put", text(&other), text(&place.path(""))])
        .failed(7, &["cannot read"]);
    assert_eq!(place.json(&["stats"])["usage"]["blobs"], 2);
    assert!(place.staging_is_empty());
    let many = vec![text(&small); 201];
    place.run(&[&["put"], &many[..]].concat()).failed(2, &[]);
}

#[test]
fn a_put_of_what_was_damaged_heals_it() {
    let place = Place::built();
    let object = place.run(&["path", HELLO]).done().text();
    fs::write(object.trim_end(), "hell").unwrap();
    place.run(&["get", HELLO]).failed(6, &["is damaged"]);
    assert_eq!(
        place.run_with(&["put"], b"hello\n").done().text(),
        format!("{HELLO}  6  new  -\n")
    );
    assert_eq!(place.run(&["get", HELLO]).done().text(), "hello\n");
}

#[test]
fn a_folder_is_built_under_a_name_and_its_former_trees_are_history() {
    let place = Place::with_store();
    let source = place.source("source");
    let built = place.json(&["build", text(&source), "--name", "t", "--history-limit", "1"]);
    assert_eq!(
        (
            &built["name"],
            &built["files"],
            &built["entries"],
            &built["size"],
            &built["unique"],
            &built["added"]
        ),
        (
            &json!("local/t"),
            &json!(3),
            &json!(5),
            &json!(3012),
            &json!(3006),
            &json!(3006)
        )
    );
    let again = place.run(&["build", text(&source), "--name", "t"]).done().text();
    assert!(
        again.starts_with(&format!("local/t  {}\n", built["digest"].as_str().unwrap())),
        "{again}"
    );
    assert!(again.contains("3 files, 2.94Ki; 2.94Ki distinct, 0 added"), "{again}");
    let without = ["--exclude", "sub/**", "--exclude", "sub", "--name", "team-a/t"];
    let without = place.json(&[&["build", text(&source)], &without[..]].concat());
    assert_eq!((&without["name"], &without["entries"]), (&json!("team-a/t"), &json!(1)));
    let refs = place.json(&["ls"]);
    let source_of = &refs["refs"][1]["source"]["directory"];
    assert_eq!(source_of, &json!({"path": text(&source), "exclude": ["sub/**", "sub"]}));

    fs::write(source.join("more"), "").unwrap();
    place.run(&["build", text(&source), "--name", "t"]).done();
    let refs = place.json(&["ls"]);
    assert_eq!(refs["refs"][0]["history"][0]["revision"]["digest"], built["digest"]);
    let shown = place.run(&["show", "t"]).done().text();
    assert!(
        shown.contains(&format!("history  {}", built["digest"].as_str().unwrap())),
        "{shown}"
    );

    place
        .run(&["build", text(&source), "--name", "Not/Valid"])
        .failed(2, &["is not a valid"]);
    place.run(&["build", text(&source)]).failed(2, &["--name"]);
    place
        .run(&["build", text(&source.join("hello")), "--name", "t"])
        .failed(7, &["hello"]);
    place
        .run(&["build", text(&source.join("nowhere")), "--name", "t"])
        .failed(3, &["nowhere"]);
    place
        .run(&["build", text(&source), "--name", "t", "--exclude", "a{"])
        .failed(2, &["exclude"]);
    let store = place.store();
    place
        .run(&["build", text(&store), "--name", "t"])
        .failed(7, &["lies in the store itself"]);
    place
        .run(&["build", text(&place.path("")), "--name", "t"])
        .failed(7, &["the store itself", "--exclude"]);
    assert!(place.staging_is_empty());
}

/// The digest of the one content of that size.
fn digest_of_five_bytes(place: &Place) -> String {
    let blobs = place.json(&["ls", "--blobs"]);
    let mut blobs = blobs["blobs"].as_array().unwrap().iter();
    let found = blobs.find(|blob| blob["size"] == 5).unwrap();
    found["digest"].as_str().unwrap().to_owned()
}

#[test]
fn what_a_tree_names_is_not_removed_and_the_error_says_which() {
    let place = Place::built();
    let tree = place.digest("t");
    place.run_with(&["put"], b"loose").done();
    let loose = place.json(&["put", text(&place.path("source/hello"))]);
    assert_eq!(loose["blobs"][0]["digest"], HELLO);
    let loose = "sha256:1d39e7ab2d90ab4d44ea6b5b29dc6e9f5a8b2cea0a3bb0be6a6ea03fb36d8d6a";
    let found = &digest_of_five_bytes(&place);
    assert_ne!(found, loose);
    place
        .run(&["rm", HELLO, found])
        .failed(4, &[HELLO, "stays: it is needed by", &tree, "local/t"]);
    place.run(&["exists", HELLO]).done();
    place.run(&["exists", found]).failed(1, &[]);
    place.run(&["rm", NOTHING]).failed(3, &[NOTHING, "is not in the store"]);

    // A tree that only a content's history names still needs it; one that nothing names too, while it is stored.
    place.run(&["forget", "t"]).done();
    let needed = place.run(&["rm", HELLO, "-o", "json"]).failed(4, &[]).json();
    assert_eq!(needed["blobs"][0]["state"], "needed");
    assert_eq!(needed["blobs"][0]["neededBy"], json!([format!("the tree {tree}")]));
    place.run(&["gc"]).done();
    let removed = place.json(&["rm", HELLO]);
    assert_eq!(
        removed,
        json!({"blobs": [{"digest": HELLO, "state": "removed", "neededBy": []}]})
    );
}

#[test]
fn nothing_is_removed_while_a_manifest_cannot_be_read() {
    let place = Place::built();
    place.run_with(&["put"], b"loose").done();
    let loose = &digest_of_five_bytes(&place);
    let digest = place.digest("t");
    let manifest = place.store().join("manifests").join(&digest[7..]);
    fs::remove_file(&manifest).unwrap();
    fs::write(&manifest, "LARDER").unwrap();
    place.run(&["rm", loose]).failed(6, &["nothing was removed", &digest]);
    place.run(&["exists", loose]).done();
    place.run(&["show", "t"]).failed(6, &["is damaged", "rebuild"]);
}

#[test]
fn a_name_is_forgotten_and_gc_says_what_went_and_why() {
    let place = Place::built();
    let digest = place.digest("t");
    assert_eq!(place.run(&["forget", "t"]).done().text(), "local/t is forgotten\n");
    place.run(&["forget", "t"]).failed(3, &["there is no ref local/t"]);
    let dry = place
        .run(&["gc", "--dry-run", "--grace", "0s", "--max-age", "0s"])
        .done()
        .text();
    let lines: Vec<Vec<&str>> = dry.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["KIND", "COUNT", "BYTES", "REASON"]);
    assert_eq!(lines[1][..2], ["manifest", "1"]);
    assert_eq!(lines[2][..3], ["blob", "2", "2.94Ki"]);
    assert!(dry.contains("would delete"), "{dry}");
    place.run(&["show", &digest]).done();
    let report = place.json(&["gc", "--grace", "0s", "--max-age", "0s"]);
    assert_eq!((&report["dryRun"], &report["deletedBlobs"]), (&json!(false), &json!(2)));
    assert_eq!(place.json(&["stats"])["usage"]["blobs"], 0);
    place.run(&["show", &digest]).failed(3, &[]);
}

#[test]
fn gc_keeps_what_a_name_stands_for_whatever_the_limits() {
    let place = Place::built();
    let limits = [
        "--max-age",
        "0s",
        "--max-size",
        "1",
        "--min-free",
        "1Ei",
        "--min-copies",
        "9",
        "--grace",
        "0s",
    ];
    let over = place.run(&[&["gc"], &limits[..]].concat()).done().text();
    assert!(over.contains("still over the limit"), "{over}");
    assert!(over.contains("current trees 2.94Ki"), "{over}");
    place.run(&["resolve", "t"]).done();
    for bad in [["--max-age", "1y"], ["--max-size", "10GB"], ["--min-copies", "-1"]] {
        place.run(&[&["gc"], &bad[..]].concat()).failed(2, &[]);
    }
}

#[test]
fn a_ref_of_the_cluster_is_not_built_over() {
    use larder::store::{Options, Publish, RefName, Store};
    let place = Place::built();
    {
        let store = Store::open(&place.store(), Options::default()).unwrap();
        let tree = store.load(&place_digest(&store)).unwrap();
        let target = Publish {
            name: RefName::new("team-a", "m").unwrap(),
            owner: "uid-of-a-manifest".to_owned(),
            generation: 1,
            request: None,
            source: json!({}),
            history_limit: 0,
            now: std::time::SystemTime::now(),
        };
        store.build().unwrap().publish(&tree, target).unwrap();
    }
    let source = place.path("source");
    place
        .run(&["build", text(&source), "--name", "team-a/m"])
        .failed(4, &["team-a/m", "uid-of-a-manifest", "choose another name"]);
    place.run(&["forget", "team-a/m"]).done();
    place.run(&["build", text(&source), "--name", "team-a/m"]).done();
}

fn place_digest(store: &larder::store::Store) -> larder::store::TreeDigest {
    store.manifests().unwrap()[0].tree
}
