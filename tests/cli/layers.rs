//! `mount`, `umount`, `snapshot`, `layers`. Needs root.

use std::io::Read;

use serde_json::json;

use super::*;
use crate::support::shut_down;

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// A process that has a file open. Not this one: what it has open, another test's program has, too, until its exec.
struct User(Child);

impl User {
    fn of(file: &Path) -> User {
        let mut child = Command::new("sh")
            .args(["-c", "exec 3<\"$0\"; echo; read _; true"])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        User(child)
    }

    fn shown(&self) -> String {
        format!("process {} (sh)", self.0.id())
    }

    fn ends(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

#[test]
fn a_tree_is_mounted_changed_captured_unmounted_and_comes_back_with_its_changes() {
    let place = Place::built();
    let path = place
        .run(&["mount", "t", "--name", "work", "--size", "64Mi"])
        .done()
        .text();
    let path = PathBuf::from(path.trim_end());
    assert!(path.starts_with(place.store().join("mnt")), "{path:?}");
    assert_eq!(read(&path.join("sub/copy")), "hello\n");
    std::fs::write(path.join("new"), "new\n").unwrap();
    std::fs::rename(path.join("sub"), path.join("moved")).unwrap();

    // A second mount is the same one.
    let again = place.json(&["mount", "t", "--name", "work", "--size", "64Mi"]);
    assert_eq!((&again["path"], &again["reused"]), (&json!(path), &json!(true)));
    let id = again["id"].as_str().unwrap();

    let captured = place.json(&["snapshot", "work", "--name", "s"]);
    assert_eq!(captured["files"], 4);
    place.run(&["export", "s", text(&place.path("out"))]).done();
    assert_eq!(read(&place.path("out/new")), "new\n");
    assert_eq!(read(&place.path("out/moved/copy")), "hello\n");
    assert!(!place.path("out/sub").exists());

    let listed = place.json(&["layers"])["layers"][0].clone();
    let expected = json!({
        "id": id,
        "kind": "Admin",
        "namespace": "local",
        "name": "work",
        "digest": place.digest("t"),
        "mode": "Overlay",
        "owner": null,
        "sizeLimit": 64 << 20,
        "usedBytes": listed["usedBytes"],
        "state": "mounted",
        "path": path,
    });
    assert_eq!(listed, expected);
    assert!(listed["usedBytes"].as_u64().unwrap() > 0);

    // Unmounted, not deleted: what was changed comes back.
    assert_eq!(place.run(&["umount", "work"]).done().text(), "work is unmounted\n");
    assert!(!path.join("new").exists());
    assert_eq!(place.json(&["layers"])["layers"][0]["state"], "unmounted");
    let back = place.json(&["mount", "t", "--name", "work", "--size", "64Mi"]);
    assert_eq!(back["path"], json!(path));
    assert_eq!(read(&path.join("new")), "new\n");

    place.run(&["umount", &id[..8], "--delete"]).done();
    assert_eq!(place.json(&["layers"]), json!({"layers": [], "problems": []}));
    place
        .run(&["umount", "work"])
        .failed(3, &["there is no layer \"work\""]);
    assert!(place.mounts().is_empty(), "{:?} is left", place.mounts());
}

#[test]
fn a_read_only_mount_shows_the_tree_to_all_and_gives_nobody_a_way_to_write() {
    let place = Place::built();
    let mount = |name: &str| {
        let mounted = place.json(&["mount", "t", "--mode", "read-only", "--name", name]);
        PathBuf::from(mounted["path"].as_str().unwrap())
    };
    let (one, two) = (mount("one"), mount("two"));
    assert_eq!(read(&one.join("hello")), "hello\n");
    assert_eq!(read(&two.join("sub/link")), "hello\n");
    let error = std::fs::write(one.join("hello"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    // In use, however old: no gc takes it.
    place.run(&["forget", "t"]).done();
    place.run(&["gc", "--max-age", "0s", "--grace", "0s"]).done();
    assert_eq!(read(&two.join("hello")), "hello\n");
    place
        .run(&["snapshot", "one", "--name", "s"])
        .failed(2, &["is read-only", "nothing that was changed"]);
    place.run(&["umount", "one"]).done();
    assert_eq!(read(&two.join("hello")), "hello\n");
    place.run(&["umount", "two"]).done();
    assert!(place.mounts().is_empty(), "{:?} is left", place.mounts());
    let report = place.json(&["gc", "--max-age", "0s", "--grace", "0s"]);
    assert_eq!(report["deletedBlobs"], 2, "{report}");
}

#[test]
fn a_layer_whose_record_is_damaged_is_named_and_can_be_given_up() {
    let place = Place::built();
    let mounted = place.json(&["mount", "t", "--name", "work", "--size", "64Mi"]);
    let id = mounted["id"].as_str().unwrap();
    let record = place.store().join("layers").join(id).join("layer.json");
    std::fs::write(&record, "{").unwrap();
    let named = text(&record).to_owned();
    place.run(&["layers"]).failed(6, &[&named]);
    place.run(&["umount", id]).failed(6, &[&named, "--delete"]);
    place.run(&["umount", "work"]).failed(3, &["there is no layer"]);
    let deleted = place.json(&["umount", id, "--delete"]);
    assert_eq!(deleted, json!({"id": id, "name": null, "state": "deleted"}));
    assert_eq!(place.json(&["layers"]), json!({"layers": [], "problems": []}));
    assert!(place.mounts().is_empty(), "{:?} is left", place.mounts());
}

#[test]
fn a_layer_that_takes_no_writes_any_more_is_told_as_that_and_comes_back_by_mounting_it() {
    let place = Place::built();
    let mount = ["mount", "t", "--name", "work", "--size", "64Mi"];
    let mounted = place.json(&mount);
    let path = Path::new(mounted["path"].as_str().unwrap());
    let layer = place.store().join("layers").join(mounted["id"].as_str().unwrap());
    std::fs::write(path.join("mine"), "mine").unwrap();
    std::fs::File::open(path.join("mine")).unwrap().sync_all().unwrap();
    let user = User::of(&path.join("mine"));
    shut_down(&layer.join("disk"));
    assert_eq!(place.json(&["layers"])["layers"][0]["state"], "stopped");
    place
        .run(&mount)
        .failed(4, &["takes no writes any more", &user.shown()]);
    user.ends();
    assert_eq!(place.json(&mount)["reused"], false);
    assert_eq!(place.json(&["layers"])["layers"][0]["state"], "mounted");
    assert_eq!(read(&path.join("mine")), "mine");

    // What had to be mended is said, too.
    place.run(&["umount", "work"]).done();
    let damaged = Command::new("debugfs")
        .args(["-w", "-R", "set_super_value state 2"])
        .arg(layer.join("disk.img"))
        .output()
        .unwrap();
    assert!(damaged.status.success(), "{damaged:?}");
    place.run(&mount).failed(0, &["was checked", "check forced"]);
    place.run(&["umount", "work", "--delete"]).done();
}

#[test]
fn owner_and_mode_are_as_asked_and_mistakes_are_named() {
    let place = Place::built();
    let mounted = place.json(&[
        "mount",
        "t",
        "--mode",
        "tmpfs",
        "--size",
        "16Mi",
        "--owner",
        "1000:2000",
    ]);
    let path = PathBuf::from(mounted["path"].as_str().unwrap());
    // The same with another limit is grown.
    place.json(&[
        "mount",
        "t",
        "--mode",
        "tmpfs",
        "--size",
        "32Mi",
        "--owner",
        "1000:2000",
    ]);
    assert_eq!(place.json(&["layers"])["layers"][0]["sizeLimit"], 32 << 20);
    assert_eq!(mounted["name"], "local/t");
    let owner = std::os::unix::fs::MetadataExt::uid(&path.join("sub/other").symlink_metadata().unwrap());
    assert_eq!(owner, 1000);
    place
        .run(&["mount", "t", "--mode", "tmpfs"])
        .failed(4, &["owner", "1000:2000"]);
    place.run(&["umount", "local/t"]).failed(4, &["in memory", "--delete"]);
    let user = User::of(&path.join("hello"));
    place
        .run(&["umount", "local/t", "--delete"])
        .failed(4, &["is in use by", &user.shown()]);
    user.ends();
    place.run(&["umount", "local/t", "--delete"]).done();
    place.run(&["mount", "nothing"]).failed(3, &["there is no tree"]);
    place.run(&["mount", "t", "--owner", "root"]).failed(2, &["UID:GID"]);
    place.run(&["mount", "t", "--size", "1Ki"]).failed(2, &["too few"]);
    place
        .run(&["snapshot", "none", "--name", "x"])
        .failed(3, &["there is no layer"]);
    // What was made without a limit has none, whatever is asked for later.
    place.run(&["mount", "t", "--name", "free"]).done();
    place
        .run(&["mount", "t", "--name", "free", "--size", "64Mi"])
        .failed(2, &["without a limit"]);
    place.run(&["umount", "free", "--delete"]).done();
    assert_eq!(place.json(&["layers"])["layers"], json!([]));
    assert!(place.mounts().is_empty(), "{:?} is left", place.mounts());
}
