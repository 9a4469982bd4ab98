//! `dedup` and `analytics`.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::{HELLO, Place, end, text};

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

/// Bytes of the files in some folders of the store, as du(1) counts them.
fn du(place: &Place, folders: &[&str]) -> u64 {
    let mut find = Command::new("find");
    find.args(folders.iter().map(|folder| place.store().join(folder)));
    let found = find.args(["-type", "f", "-print0"]).output().unwrap();
    assert!(found.status.success());
    let mut du = Command::new("du");
    du.args(["--files0-from=-", "--total", "--bytes", "--summarize"]);
    let mut child = du.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&found.stdout).unwrap();
    let text = end(child).text();
    let (total, _) = text.lines().last().unwrap().split_once('\t').unwrap();
    total.parse().unwrap()
}

#[test]
fn after_a_put_that_was_killed_the_figures_are_those_of_du() {
    let place = Place::built();
    place.run_with(&["put"], &vec![7; 300_000]).done();
    let mut child = place.command(&["put"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // What has been written is on the way to the disk when the next megabyte is taken.
    for _ in 0..8 {
        stdin.write_all(&vec![9; 1 << 20]).unwrap();
    }
    assert!(!place.staging_is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    // What opens the store for writing clears up.
    place.run(&["gc"]).done();
    assert!(place.staging_is_empty());
    let found = place.json(&["analytics"]);
    let bytes = |part: &str| found[part]["bytes"].as_u64().unwrap();
    let contents = ["current", "history", "unnamed", "garbage"]
        .map(bytes)
        .iter()
        .sum::<u64>();
    assert_eq!((contents, bytes("garbage")), (du(&place, &["objects"]), 300_000));
    let usage = &place.json(&["stats"])["usage"];
    let stored = |part: &str| usage[part].as_u64().unwrap();
    assert_eq!(stored("blobBytes"), contents);
    assert_eq!(stored("manifestBytes"), du(&place, &["manifests"]));
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
