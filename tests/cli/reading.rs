//! The commands that only read.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use larder::store::tree::{Leaf, LeafKind, Meta, Tree};
use larder::store::{Options, Publish, RefName, Store};
use serde_json::json;

use crate::{HELLO, NOTHING, Place, text};

#[test]
fn an_empty_store_says_so_in_every_list() {
    let place = Place::with_store();
    assert_eq!(
        place.run(&["ls"]).done().text(),
        "no refs; `larder store build DIR --name NAME` makes one\n"
    );
    assert_eq!(place.run(&["ls", "--manifests"]).done().text(), "no manifests\n");
    assert_eq!(place.run(&["ls", "--blobs"]).done().text(), "no blobs\n");
    assert_eq!(place.json(&["ls"]), json!({"refs": [], "unreadable": []}));
    assert_eq!(
        place.json(&["ls", "--manifests"]),
        json!({"manifests": [], "unreadable": []})
    );
    assert_eq!(place.json(&["ls", "--blobs"]), json!({"blobs": []}));
    let usage = &place.json(&["stats"])["usage"];
    assert_eq!((&usage["blobs"], &usage["manifests"]), (&json!(0), &json!(0)));
    assert_eq!(place.run(&["gc"]).done().text(), "nothing to delete among 0 blobs\n");
}

#[test]
fn refs_trees_and_contents_are_listed() {
    let place = Place::built();
    let digest = place.digest("t");
    let table = place.run(&["ls"]).done().text();
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "TREE", "FILES", "SIZE", "ADDED", "BUILT", "HISTORY"]);
    assert_eq!(lines[1][..4], ["local/t", &digest[7..19], "3", "2.94Ki"]);
    let refs = place.json(&["ls"]);
    let entry = &refs["refs"][0];
    assert_eq!(entry["name"], "local/t");
    assert_eq!(entry["owner"], "larder-store");
    assert_eq!(entry["current"]["digest"], digest);
    assert_eq!(entry["current"]["added"], 3006);
    assert_eq!(entry["source"]["directory"]["path"], text(&place.path("source")));

    let manifests = place.json(&["ls", "--manifests"]);
    assert_eq!(manifests["manifests"][0]["digest"], digest);
    assert_eq!(manifests["manifests"][0]["refs"], json!(["local/t"]));
    let blobs = place.json(&["ls", "--blobs"]);
    let sizes: Vec<_> = blobs["blobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|blob| &blob["size"])
        .collect();
    // Sorted by digest.
    assert_eq!(sizes, [3000, 6]);
    assert_eq!(blobs["blobs"][1]["digest"], HELLO);
    let listed = place.run(&["ls", "--blobs"]).done().text();
    assert!(listed.contains(&format!("\n{HELLO}        6  ")), "{listed}");
    let stats = place.json(&["stats"]);
    assert_eq!(
        (&stats["usage"]["blobs"], &stats["usage"]["blobBytes"]),
        (&json!(2), &json!(3006))
    );
    let table = place.run(&["stats"]).done().text();
    assert!(table.contains("blobs          2  2.94Ki"), "{table}");
}

#[test]
fn a_content_is_found_by_its_digest_with_and_without_prefix() {
    let place = Place::built();
    for digest in [HELLO, &HELLO[7..]] {
        assert_eq!(place.run(&["get", digest]).done().text(), "hello\n");
        place.run(&["exists", digest]).done();
    }
    let path = place.run(&["path", HELLO]).done().text();
    assert_eq!(fs::read(path.trim_end()).unwrap(), b"hello\n");
    assert_eq!(place.json(&["path", HELLO])["size"], 6);
    assert_eq!(
        place.json(&["exists", HELLO]),
        json!({"digest": HELLO, "exists": true, "size": 6})
    );
    let missing = place.run(&["exists", NOTHING, "-o", "json"]).failed(1, &[]);
    assert_eq!(
        missing.json(),
        json!({"digest": NOTHING, "exists": false, "size": null})
    );
    place
        .run(&["get", NOTHING])
        .failed(3, &[NOTHING, "is not in the store"]);
    place.run(&["path", NOTHING]).failed(3, &[NOTHING]);
    place.run(&["get", "sha256:12"]).failed(2, &["is not a digest"]);
}

#[test]
fn a_file_gets_its_name_only_when_it_is_whole() {
    let place = Place::built();
    let (file, there) = (place.path("file"), place.path("there"));
    fs::write(&there, "old").unwrap();
    assert_eq!(place.run(&["get", HELLO, "-O", text(&file)]).done().out, b"");
    place.run(&["get", HELLO, "-O", text(&there)]).done();
    assert_eq!(fs::read(&file).unwrap(), b"hello\n");
    assert_eq!(fs::read(&there).unwrap(), b"hello\n");
    let answer = place.json(&["get", HELLO, "-O", text(&file)]);
    assert_eq!(answer, json!({"digest": HELLO, "size": 6, "file": text(&file)}));

    let object = place.run(&["path", HELLO]).done().text();
    fs::write(object.trim_end(), "jello\n").unwrap();
    fs::remove_file(&file).unwrap();
    place
        .run(&["get", HELLO, "-O", text(&file)])
        .failed(6, &[HELLO, "is damaged"]);
    place.run(&["get", HELLO, "-O", text(&there)]).failed(6, &[]);
    assert!(!file.exists());
    assert_eq!(fs::read(&there).unwrap(), b"hello\n");
    let left: Vec<_> = fs::read_dir(place.path("")).unwrap().collect();
    assert_eq!(left.len(), 3, "the store, the source and one file: {left:?}");
}

#[test]
fn a_tree_is_named_by_a_ref_a_digest_or_the_beginning_of_one() {
    let place = Place::built();
    let digest = place.digest("t");
    for name in ["t", "local/t", &digest, &digest[7..], &digest[7..15], &digest[..20]] {
        assert_eq!(place.digest(name), digest, "{name}");
    }
    for name in ["u", "other/t", &digest[7..14], "ABCDEF0123", NOTHING, "../t", ""] {
        place.run(&["show", name]).failed(3, &["there is no tree"]);
    }
}

#[test]
fn a_beginning_that_two_trees_share_names_neither() {
    let place = Place::built();
    let digest = place.digest("t");
    // Another manifest with the same first digits; that it has other bytes does not matter for its name.
    let manifests = place.store().join("manifests");
    let twin = format!("{}{}", &digest[7..20], "0".repeat(51));
    fs::copy(manifests.join(&digest[7..]), manifests.join(&twin)).unwrap();
    place
        .run(&["show", &digest[7..19]])
        .failed(3, &["several that begin so"]);
    place.run(&["show", &digest]).done();
    place.run(&["show", &twin]).failed(6, &["is damaged"]);
}

/// Every type of entry, odd names, and hard links, in a store at `place`.
fn odd_tree(place: &Place) {
    let store = Store::open(&place.store(), Options::default()).unwrap();
    let build = store.build().unwrap();
    let hello = build.put_bytes(b"hello\n").unwrap();
    let empty = build.put_bytes(b"").unwrap();
    let meta = |mode: u16, mtime: (i64, u32)| Meta {
        mode,
        uid: 1,
        gid: 4_000_000_000,
        mtime,
        xattrs: Vec::new(),
    };
    let leaf = |kind: LeafKind| Leaf {
        meta: meta(0o644, (1_700_000_000, 5)),
        kind,
    };
    let file = |blob: larder::store::Blob| {
        leaf(LeafKind::File {
            digest: blob.digest,
            size: blob.size,
        })
    };
    let mut tree = Tree::new(meta(0o755, (0, 0)));
    let mut first = file(hello);
    first.meta.mode = 0o4755;
    first.meta.xattrs = vec![
        ((*b"user.a=b").into(), (*b"x=\0\xff y").into()),
        ((*b"user.empty").into(), Box::default()),
    ];
    let id = tree.add_leaf(Tree::ROOT, *b"a b\\=\n", first).unwrap();
    let dir = tree
        .add_dir(Tree::ROOT, *b"d", meta(0o1777, (-1, 999_999_999)))
        .unwrap();
    tree.add_link(dir, *b"\xff", id).unwrap();
    tree.add_leaf(Tree::ROOT, *b"empty", file(empty)).unwrap();
    let mut add = |name: &[u8], kind| tree.add_leaf(Tree::ROOT, name, leaf(kind)).unwrap();
    add(b"dash", LeafKind::Symlink((*b"-").into()));
    add(b"link", LeafKind::Symlink((*b"to \xe4").into()));
    add(b"char", LeafKind::CharDevice { major: 1, minor: 3 });
    add(b"block", LeafKind::BlockDevice { major: 8, minor: 300 });
    add(b"pipe", LeafKind::Fifo);
    add(b"sock", LeafKind::Socket);
    let target = Publish {
        name: RefName::new("local", "odd").unwrap(),
        owner: "larder-store".to_owned(),
        generation: 0,
        request: None,
        source: serde_json::Value::Null,
        history_limit: 1,
        now: std::time::UNIX_EPOCH,
    };
    build.publish(&tree.finish().unwrap(), target).unwrap();
}

#[test]
fn the_composefs_dump_of_every_type_of_entry_is_as_its_manual_says() {
    let place = Place::with_store();
    odd_tree(&place);
    let object = "58/91b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
    let xattrs = r"user.a\x3db=x\x3d\x00\xff\x20y user.empty=";
    let expected = [
        "/ 0 40755 3 1 4000000000 0 0.0 - - -".to_owned(),
        format!(r"/a\x20b\\=\n 6 104755 2 1 4000000000 0 1700000000.5 {object} - - {xattrs}"),
        // Minor 300 is 44 in the low byte and 1 above bit 20 (makedev(3)).
        "/block 0 60644 1 1 4000000000 1050668 1700000000.5 - - -".to_owned(),
        "/char 0 20644 1 1 4000000000 259 1700000000.5 - - -".to_owned(),
        "/d 0 41777 2 1 4000000000 0 -1.999999999 - - -".to_owned(),
        format!(r"/d/\xff 6 @104755 2 1 4000000000 0 1700000000.5 /a\x20b\\=\n - - {xattrs}"),
        r"/dash 1 120644 1 1 4000000000 0 1700000000.5 \x2d - -".to_owned(),
        "/empty 0 100644 1 1 4000000000 0 1700000000.5 - - -".to_owned(),
        r"/link 4 120644 1 1 4000000000 0 1700000000.5 to\x20\xe4 - -".to_owned(),
        "/pipe 0 10644 1 1 4000000000 0 1700000000.5 - - -".to_owned(),
        "/sock 0 140644 1 1 4000000000 0 1700000000.5 - - -".to_owned(),
    ];
    let dump = place.run(&["show", "odd", "--composefs"]).done().text();
    assert_eq!(dump.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn the_json_of_a_tree_has_every_detail_and_loses_no_byte_of_a_name() {
    let place = Place::with_store();
    odd_tree(&place);
    let tree = place.run(&["show", "odd", "--json"]).done().json();
    assert_eq!(place.json(&["show", "odd"]), tree);
    assert_eq!(tree["name"], "local/odd");
    assert_eq!(tree["created_at"], "1970-01-01T00:00:00Z");
    let files = json!({"a b\\\\=\n": HELLO, "d/\\xff": HELLO, "empty": tree["files"]["empty"]});
    assert_eq!(tree["files"], files);
    let entries = tree["entries"].as_array().unwrap();
    let paths: Vec<_> = entries.iter().map(|entry| entry["path"].as_str().unwrap()).collect();
    let expected = [
        "",
        "a b\\\\=\n",
        "block",
        "char",
        "d",
        "d/\\xff",
        "dash",
        "empty",
        "link",
        "pipe",
        "sock",
    ];
    assert_eq!(paths, expected);
    let common = json!({"uid": 1, "gid": 4_000_000_000_u32, "mtime": {"seconds": 1_700_000_000, "nanoseconds": 5}});
    let with = |fields: serde_json::Value| {
        let mut entry = common.clone();
        entry
            .as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        entry
    };
    let xattrs = json!([
        {"name": "user.a=b", "value": "x=\0\\xff y"},
        {"name": "user.empty", "value": ""}
    ]);
    let linked = json!({
        "path": "d/\\xff", "type": "file", "sha256": HELLO, "size": 6, "mode": "4755",
        "xattrs": xattrs, "linkTo": "a b\\\\=\n"
    });
    assert_eq!(entries[5], with(linked));
    let block = json!({"path": "block", "type": "blockDevice", "major": 8, "minor": 300, "mode": "0644"});
    assert_eq!(entries[2], with(block));
    let link = json!({"path": "link", "type": "symlink", "target": "to \\xe4", "mode": "0644"});
    assert_eq!(entries[8], with(link));
    assert_eq!(entries[4]["mtime"], json!({"seconds": -1, "nanoseconds": 999_999_999}));
    let summary = place.run(&["show", "odd"]).done().text();
    assert!(summary.contains("holds    3 files, 10 entries in all"), "{summary}");
    // What would write to the terminal is shown escaped.
    let resolved = place.run(&["resolve", "odd"]).done().text();
    assert!(resolved.contains("a b\\\\=\\n\n"), "{resolved}");
}

#[test]
fn a_path_is_resolved_to_its_contents_and_the_missing_ones_are_named() {
    let place = Place::built();
    let all = place.run(&["resolve", "t"]).done().text();
    assert_eq!(all.lines().count(), 3);
    assert!(all.starts_with(&format!("{HELLO}        6  hello\n")), "{all}");
    let sub = place.json(&["resolve", "t", "/sub//copy"]);
    assert_eq!(sub["path"], "sub/copy");
    assert_eq!(sub["files"][0]["digest"], HELLO);
    let object = sub["files"][0]["object"].as_str().unwrap();
    assert_eq!(
        place.json(&["resolve", "t", "sub"])["files"].as_array().unwrap().len(),
        2
    );
    // No name that only begins alike.
    assert_eq!(place.json(&["resolve", "t", "sub/link"])["files"], json!([]));
    place.run(&["resolve", "t", "su"]).failed(3, &["\"su\""]);

    fs::remove_file(object).unwrap();
    let missing = place
        .run(&["resolve", "t"])
        .failed(6, &["hello: the content", HELLO, "is missing", "sub/copy"]);
    assert_eq!(missing.text().lines().count(), 1);
    let missing = place
        .run(&["resolve", "t", "hello", "-o", "json"])
        .failed(6, &[])
        .json();
    assert_eq!(
        (&missing["missing"], &missing["files"][0]["state"]),
        (&json!(1), &json!("missing"))
    );
}

#[test]
fn two_trees_are_compared_as_diff_does() {
    let place = Place::built();
    let source = place.path("source");
    fs::write(source.join("new"), "").unwrap();
    fs::remove_file(source.join("hello")).unwrap();
    fs::write(source.join("sub/other"), "changed").unwrap();
    place.run(&["build", text(&source), "--name", "u"]).done();
    place.run(&["diff", "t", "t"]).done();
    let found = place.run(&["diff", "t", "u"]).failed(1, &[]).text();
    assert_eq!(found, "~ .: mtime\n- hello\n+ new\n~ sub/other: content, mtime\n");
    let found = place.run(&["diff", "t", "u", "-o", "json"]).failed(1, &[]).json();
    assert_eq!(
        (&found["equal"], &found["added"], &found["removed"]),
        (&json!(false), &json!(["new"]), &json!(["hello"]))
    );
    assert_eq!(
        found["changed"][1],
        json!({"path": "sub/other", "what": ["content", "mtime"]})
    );
    place.run(&["diff", "t", "nowhere"]).failed(3, &["nowhere"]);
}

#[test]
fn a_ref_that_cannot_be_read_is_named_and_the_others_are_listed() {
    let place = Place::built();
    let bad = place.store().join("refs/local/bad");
    fs::write(&bad, "{").unwrap();
    let listed = place.run(&["ls"]).failed(6, &[text(&bad)]);
    assert!(listed.text().contains("local/t"));
    let listed = place.run(&["ls", "-o", "json"]).failed(6, &[]).json();
    assert_eq!(listed["unreadable"][0]["path"], text(&bad));
    place.run(&["show", "bad"]).failed(6, &["local/bad", "forget"]);
    place.run(&["gc"]).failed(6, &["local/bad", "forget"]);
    place.run(&["forget", "bad"]).done();
    place.run(&["gc"]).done();
}

#[test]
fn reading_commands_change_nothing_on_disk() {
    let place = Place::built();
    let digest = place.digest("t");
    let before = times(&place.store());
    for args in [
        &["ls"][..],
        &["ls", "--manifests"],
        &["ls", "--blobs"],
        &["show", "t", "--json"],
        &["resolve", &digest],
        &["diff", "t", &digest],
        &["stats"],
        &["get", HELLO],
        &["path", HELLO],
        &["exists", HELLO],
        &["export", "t", text(&place.path("out"))],
        &["export", "--tar", "t"],
    ] {
        place.run(args).done();
    }
    assert_eq!(times(&place.store()), before);
}

/// Path, mtime and ctime of everything.
fn times(dir: &std::path::Path) -> Vec<(Vec<u8>, i64, i64, i64, i64)> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let name = path.as_os_str().as_bytes().to_vec();
            found.push((name, stat.mtime(), stat.mtime_nsec(), stat.ctime(), stat.ctime_nsec()));
            if stat.is_dir() {
                dirs.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn completions_know_the_commands_of_the_store() {
    let place = Place::empty();
    for (shell, word) in [("bash", "composefs"), ("zsh", "composefs"), ("fish", "composefs")] {
        let script = place.run(&["completions", shell]).done().text();
        assert!(script.contains(word) && script.contains("larder"), "{shell}");
    }
}

#[test]
fn a_content_that_was_cut_to_nothing_does_not_exist() {
    let place = Place::built();
    let path = place.json(&["path", HELLO])["path"].as_str().unwrap().to_owned();
    fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap();
    place.run(&["exists", HELLO]).failed(1, &[]);
    let nothing = place.run_with(&["put"], b"").done().text();
    place.run(&["exists", nothing.split(' ').next().unwrap()]).done();
    // Putting it again heals it.
    place.run_with(&["put"], b"hello\n").done();
    place.run(&["exists", HELLO]).done();
}
