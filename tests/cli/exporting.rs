//! Trees out of the store, as files and as tar streams.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use larder::store::tree::{Leaf, LeafKind, Meta, Tree};
use larder::store::{Options, Publish, RefName, Store};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use serde_json::json;

use crate::{Place, end, text};

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn xattr(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 1000];
    let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
    value.truncate(length);
    value
}

fn set_mtime(path: &Path, seconds: i64, nanos: u32) {
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: time(0, 0),
        last_modification: time(seconds, nanos.into()),
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// `cap_net_raw+ep`, as the kernel keeps it (linux/capability.h, revision 2).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// `u::rw-,u:1000:r--,g::r--,m::r--,o::---`, as the kernel keeps it (linux/posix_acl_xattr.h).
fn acl_for_user_1000() -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in [
        (1u16, 6u16, NO_ID),
        (2, 4, 1000),
        (4, 4, NO_ID),
        (0x10, 4, NO_ID),
        (0x20, 0, NO_ID),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Everything that an entry can have, on names that not every program likes.
fn rich(place: &Place) -> std::path::PathBuf {
    let dir = place.path("rich");
    let deep = dir.join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&deep).unwrap();
    let own = |path: &Path, uid, gid| std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    let ping = dir.join("ping");
    fs::write(&ping, "ping").unwrap();
    own(&ping, 1234, 3_000_000);
    set_xattr(&ping, "security.capability", &CAPABILITY);
    set_xattr(&ping, "user.k=%", b"v=\0\xff\n");
    set_mtime(&ping, 1_000_000_000, 123_456_789);
    let acl = dir.join("acl");
    fs::write(&acl, "").unwrap();
    set_xattr(&acl, "system.posix_acl_access", &acl_for_user_1000());
    let su = dir.join("su");
    fs::write(&su, "su").unwrap();
    own(&su, 1234, 1234);
    fs::set_permissions(&su, fs::Permissions::from_mode(0o4755)).unwrap();
    set_mtime(&su, -1, 500_000_000);
    let link = dir.join(std::ffi::OsStr::from_bytes(b"l\xff"));
    symlink("x".repeat(150), &link).unwrap();
    own(&link, 7, 8);
    set_xattr(&link, "trusted.l", b"x");
    set_mtime(&link, 5, 6);
    fs::write(deep.join("ü file\nname"), vec![3; 1000]).unwrap();
    fs::hard_link(&ping, deep.join("pong")).unwrap();
    fs::hard_link(&ping, place.path("outside")).unwrap();
    for (name, kind, device) in [
        ("fifo", FileType::Fifo, 0),
        ("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        ("disk", FileType::BlockDevice, rustix::fs::makedev(4000, 1_000_000)),
    ] {
        rustix::fs::mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
    }
    fs::create_dir(dir.join("empty")).unwrap();
    set_xattr(&dir.join("empty"), "trusted.t", b"a\0b");
    set_xattr(&dir, "user.root", b"root");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o2751)).unwrap();
    set_mtime(&dir.join("empty"), 9, 9);
    set_mtime(&dir, 10, 11);
    dir
}

#[test]
fn links_capabilities_owners_and_times_come_back_as_they_were() {
    let place = Place::with_store();
    let source = rich(&place);
    place.run(&["build", text(&source), "--name", "rich"]).done();
    let out = place.path("out");
    let said = place.run(&["export", "rich", text(&out)]).done().text();
    assert_eq!(said, format!("5 files, 1006 in {}\n", out.display()));

    let ping = out.join("ping");
    let stat = fs::metadata(&ping).unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.nlink()), (1234, 3_000_000, 2));
    assert_eq!(xattr(&ping, "security.capability"), CAPABILITY);
    assert_eq!(xattr(&ping, "user.k=%"), b"v=\0\xff\n");
    assert_eq!(fs::metadata(out.join("su")).unwrap().mode() & 0o7777, 0o4755);
    let link = fs::symlink_metadata(out.join(std::ffi::OsStr::from_bytes(b"l\xff"))).unwrap();
    assert_eq!((link.uid(), link.gid(), link.mtime(), link.mtime_nsec()), (7, 8, 5, 6));
    assert_eq!(xattr(&out.join("acl"), "system.posix_acl_access"), acl_for_user_1000());
    let empty = fs::metadata(out.join("empty")).unwrap();
    assert_eq!((empty.mtime(), empty.mtime_nsec()), (9, 9));
    assert_eq!(xattr(&out.join("empty"), "trusted.t"), b"a\0b");
    assert!(fs::metadata(out.join("fifo")).unwrap().file_type().is_fifo());
    let pong = out.join("d".repeat(200)).join("e".repeat(200)).join("pong");
    assert_eq!(fs::metadata(&pong).unwrap().ino(), stat.ino());
    place.run(&["build", text(&out), "--name", "again"]).done();
    place.run(&["diff", "rich", "again"]).done();

    // A writer of the copy writes nothing else.
    fs::write(&pong, "other").unwrap();
    let digest = place.json(&["show", "rich"])["files"]["ping"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(place.run(&["get", &digest]).done().text(), "ping");
    assert_eq!(fs::read_to_string(source.join("ping")).unwrap(), "ping");
}

#[test]
fn gnu_tar_restores_a_stream_to_the_very_same_tree() {
    let place = Place::with_store();
    let source = rich(&place);
    place.run(&["build", text(&source), "--name", "rich"]).done();
    let tar = place.run(&["export", "--tar", "rich"]).done().out;
    assert_eq!(tar.len() % 512, 0);
    let file = place.path("rich.tar");
    fs::write(&file, &tar).unwrap();
    let out = place.path("out");
    fs::create_dir(&out).unwrap();
    let untar = Command::new("tar")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-xpf",
            text(&file),
            "-C",
            text(&out),
        ])
        .env("LC_ALL", "C")
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(untar.success());
    place.run(&["build", text(&out), "--name", "again"]).done();
    place.run(&["diff", "rich", "again"]).done();
    assert_eq!(place.digest("rich"), place.digest("again"));
}

#[test]
fn a_stream_promises_no_content_that_is_not_as_long_as_its_tree_says() {
    let place = Place::with_store();
    let store = Store::open(&place.store(), Options::default()).unwrap();
    let build = store.build().unwrap();
    let blob = build.put_bytes(b"x").unwrap();
    let mut tree = Tree::new(Meta::default());
    let leaf = Leaf {
        meta: Meta::default(),
        kind: LeafKind::File {
            digest: blob.digest,
            size: blob.size,
        },
    };
    tree.add_leaf(Tree::ROOT, *b"f", leaf).unwrap();
    let target = Publish {
        name: RefName::new("local", "t").unwrap(),
        owner: "larder-store".to_owned(),
        generation: 0,
        request: None,
        source: json!(null),
        history_limit: 0,
        now: std::time::SystemTime::now(),
    };
    let revision = build.publish(&tree.finish().unwrap(), target).unwrap();
    drop(store);
    fs::write(
        place.run(&["path", &blob.digest.to_string()]).done().text().trim_end(),
        "xx",
    )
    .unwrap();
    let cut = place
        .run(&["export", "--tar", &revision.digest.to_string()])
        .failed(6, &[&blob.digest.to_string(), "2 bytes"]);
    assert_eq!(cut.out.len(), 512, "the root's header and nothing more");
}

#[test]
fn sockets_are_named_when_a_stream_lacks_them() {
    let place = Place::with_store();
    let source = place.source("source");
    let socket = source.join("sock");
    rustix::fs::mknodat(CWD, &socket, FileType::Socket, Mode::from_raw_mode(0o600), 0).unwrap();
    place.run(&["build", text(&source), "--name", "t"]).done();
    let ran = place
        .run(&["export", "--tar", "t"])
        .failed(0, &["sock is left out: tar has no sockets"]);
    assert!(!ran.out.is_empty());
    place.run(&["export", "t", text(&place.path("out"))]).done();
    assert!(
        fs::symlink_metadata(place.path("out/sock"))
            .unwrap()
            .file_type()
            .is_socket()
    );
}

#[test]
fn links_that_lead_out_are_restored_and_never_followed() {
    let place = Place::with_store();
    let (source, outside) = (place.path("source"), place.path("outside"));
    fs::create_dir_all(source.join("usr/bin")).unwrap();
    fs::create_dir_all(source.join("var")).unwrap();
    fs::create_dir(&outside).unwrap();
    symlink("/run", source.join("var/run")).unwrap();
    symlink("usr/bin", source.join("bin")).unwrap();
    symlink(&outside, source.join("out")).unwrap();
    symlink("../../../../../../etc", source.join("up")).unwrap();
    fs::write(source.join("usr/bin/sh"), "2").unwrap();
    place.run(&["build", text(&source), "--name", "t"]).done();
    let out = place.path("restored");
    place.run(&["export", "t", text(&out)]).done();
    for (link, target) in [
        ("var/run", Path::new("/run")),
        ("bin", Path::new("usr/bin")),
        ("out", &outside),
        ("up", Path::new("../../../../../../etc")),
    ] {
        assert_eq!(fs::read_link(out.join(link)).unwrap(), target);
    }
    assert_eq!(fs::read(out.join("bin/sh")).unwrap(), b"2");
    assert!(fs::read_dir(&outside).unwrap().next().is_none());
    // The destination itself is no link either.
    let link = place.path("link");
    symlink(&outside, &link).unwrap();
    place.run(&["export", "t", text(&link)]).failed(7, &["link"]);
    assert!(fs::read_dir(&outside).unwrap().next().is_none());
}

#[test]
fn a_folder_that_holds_something_is_not_written_into_and_a_failed_export_leaves_nothing() {
    let place = Place::built();
    let full = place.path("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "").unwrap();
    place
        .run(&["export", "t", text(&full)])
        .failed(7, &["full is not empty"]);
    assert!(full.join("mine").exists());

    let object = place.run(&["path", crate::HELLO]).done().text();
    fs::remove_file(object.trim_end()).unwrap();
    let (new, empty) = (place.path("new"), place.path("empty"));
    fs::create_dir(&empty).unwrap();
    fs::set_permissions(&empty, fs::Permissions::from_mode(0o1775)).unwrap();
    for dest in [&new, &empty] {
        place
            .run(&["export", "t", text(dest)])
            .failed(6, &["cannot export \"hello\"", crate::HELLO, "build the tree again"]);
    }
    assert!(!new.exists());
    assert!(fs::read_dir(&empty).unwrap().next().is_none());
    assert_eq!(fs::metadata(&empty).unwrap().permissions().mode() & 0o7777, 0o1775);
    place.run(&["export", "--tar", "t"]).failed(6, &[crate::HELLO]);
}

#[test]
fn an_owner_can_be_given_to_everything() {
    let place = Place::built();
    let out = place.path("out");
    let report = place.json(&["export", "t", text(&out), "--owner", "12:34"]);
    assert_eq!(
        (&report["files"], &report["entries"], &report["size"]),
        (&json!(3), &json!(5), &json!(3012))
    );
    let stat = fs::symlink_metadata(out.join("sub/link")).unwrap();
    assert_eq!((stat.uid(), stat.gid()), (12, 34));
    place
        .run(&["export", "t", text(&out), "--owner", "root"])
        .failed(2, &["1000:1000"]);
    place.run(&["export", "t"]).failed(2, &["DEST"]);
    place.run(&["export", "t", text(&out), "--tar"]).failed(2, &["--tar"]);
}

#[test]
fn of_two_exports_into_one_folder_one_is_refused_and_spoils_nothing() {
    let place = Place::with_store();
    let source = place.empty_files("source", 20_000);
    place.run(&["build", text(&source), "--name", "t"]).done();
    for exists in [false, true] {
        let out = place.path(&format!("out-{exists}"));
        if exists {
            fs::create_dir(&out).unwrap();
        }
        let first = place.command(&["export", "t", text(&out)]).spawn().unwrap();
        while !out.join("1").exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let second = place.run(&["export", "t", text(&out)]);
        assert!(second.code == 4 || second.code == 7, "{}", second.err);
        end(first).done();
        place.run(&["export", "t", text(&out)]).failed(7, &["is not empty"]);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 20_000);
    }
}

#[test]
fn a_name_whose_tree_is_gone_from_the_store_is_damage() {
    let place = Place::built();
    let hex = place.digest("t");
    let hex = hex.strip_prefix("sha256:").unwrap();
    fs::remove_file(place.store().join("manifests").join(hex)).unwrap();
    for args in [&["show", "t"][..], &["export", "t", text(&place.path("out"))]] {
        place
            .run(args)
            .failed(6, &["local/t stands for the tree", "build the tree again"]);
    }
    place.run(&["show", hex]).failed(3, &[]);
    assert!(!place.path("out").exists());
}
