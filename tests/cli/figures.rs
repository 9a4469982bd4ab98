//! `dedup` and `analytics`.

use std::fs;

use serde_json::json;

use crate::{HELLO, Place, text};

#[test]
fn what_is_saved_is_told_as_a_table_and_as_json() {
    let place = Place::built();
    // Two files of 6 bytes with one content, and one of 3000.
    let found = place.json(&["dedup"]);
    assert_eq!(
        found,
        json!({
            "refs": 1, "manifests": 1, "references": 3, "uniqueBlobs": 2,
            "logicalBytes": 3012, "uniqueBytes": 3006, "savedBytes": 6,
            "savedPercent": 100.0 * (6.0 / 3012.0), "ratio": 3012.0 / 3006.0,
            "incomplete": false, "problems": [],
        })
    );
    let table = place.run(&["dedup"]).done().text();
    assert!(table.contains("distinct contents      2  2.94Ki\n"), "{table}");
    assert!(table.ends_with("saved 6, 0.2 %: a ratio of 1.00\n"), "{table}");
    let empty = Place::with_store();
    assert!(
        empty
            .run(&["dedup"])
            .done()
            .text()
            .ends_with("saved 0, 0.0 %: a ratio of 1.00\n")
    );
    empty.run(&["analytics"]).done();
    // There never was a layer.
    empty.run(&["layers"]).done();
    assert_eq!(empty.json(&["analytics"])["refs"], json!([]));
}

#[test]
fn analytics_tell_what_each_tree_takes_and_which_contents_matter() {
    let place = Place::built();
    let (first, source) = (place.digest("t"), place.path("source"));
    fs::write(source.join("sub/other"), vec![8; 70_000]).unwrap();
    place.run(&["build", text(&source), "--name", "t"]).done();
    let second = place.digest("t");
    place.run_with(&["put"], b"garbage").done();
    let found = place.json(&["analytics", "--top", "1"]);
    assert_eq!(found["current"], json!({"blobs": 2, "bytes": 70_006}));
    assert_eq!(found["history"], json!({"blobs": 1, "bytes": 3000}));
    assert_eq!(found["garbage"], json!({"blobs": 1, "bytes": 7}));
    assert_eq!(found["missing"], json!({"blobs": 0, "bytes": 0}));
    assert_eq!(found["sizes"][0], json!({"below": 1024, "blobs": 1, "bytes": 6}));
    assert_eq!(found["sizes"][4], json!({"below": null, "blobs": 0, "bytes": 0}));
    let name = json!({"name": "local/t", "exclusiveBlobs": 3, "exclusiveBytes": 73_006});
    assert_eq!(found["refs"], json!([name]));
    let trees = found["manifests"].as_array().unwrap();
    assert_eq!(
        (&trees[0]["digest"], &trees[1]["digest"]),
        (&json!(second), &json!(first))
    );
    assert_eq!(
        (&trees[0]["currentOf"], &trees[1]["historyOf"]),
        (&json!(["local/t"]), &json!(["local/t"]))
    );
    assert_eq!(
        (&trees[0]["exclusiveBytes"], &trees[1]["exclusiveBytes"]),
        (&json!(70_000), &json!(3000))
    );
    assert_eq!(found["topSaved"].as_array().unwrap().len(), 1);
    let top = &found["topSaved"][0];
    assert_eq!(
        (&top["digest"], &top["references"], &top["savedBytes"]),
        (&json!(HELLO), &json!(4), &json!(18))
    );
    assert_eq!(top["samples"][0], json!({"manifest": second, "path": "hello"}));
    assert_eq!(found["topSize"][0]["size"], 70_000);

    let tables = place.run(&["analytics"]).done().text();
    for line in [
        "of history only              1  2.93Ki",
        "garbage                      1       7",
        "[local/t]",
        ":sub/other\n",
    ] {
        assert!(tables.contains(line), "{line:?} is not in {tables}");
    }
}

#[test]
fn figures_without_what_cannot_be_read_say_so() {
    let place = Place::built();
    let manifest = place.store().join("manifests").join(&place.digest("t")[7..]);
    fs::remove_file(&manifest).unwrap();
    fs::write(&manifest, "no manifest").unwrap();
    let found = place
        .run(&["dedup", "-o", "json"])
        .failed(6, &["is damaged", "without what could not be read"]);
    assert_eq!(
        (&found.json()["incomplete"], &found.json()["references"]),
        (&json!(true), &json!(0))
    );
}
