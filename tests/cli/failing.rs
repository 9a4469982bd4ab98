//! Exit codes, interruptions, and what is left behind.

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode};
use rustix::process::{Pid, Signal, kill_process};

use crate::{HELLO, Place, end, text};

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Waits until something is in the store's staging folder.
fn wait_for_staging(place: &Place) {
    let start = Instant::now();
    while place.staging_is_empty() {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing is staged");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_folder_of_something_else_is_no_store_and_is_left_alone() {
    let place = Place::empty();
    fs::create_dir(place.store()).unwrap();
    fs::write(place.store().join("mine"), "").unwrap();
    for args in [&["ls"][..], &["init"], &["put"]] {
        place.run(args).failed(3, &["is not a store and not empty", "mine"]);
    }
    assert_eq!(fs::read_dir(place.store()).unwrap().count(), 1);
}

#[test]
fn a_store_of_a_later_format_is_neither_read_nor_written() {
    let place = Place::built();
    let config = place.store().join("larder.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    for args in [&["ls"][..], &["init"], &["put"], &["get", HELLO], &["gc"]] {
        place.run(args).failed(6, &["format 2", "format 1", "larder.json"]);
    }
}

#[test]
fn a_store_that_another_process_has_is_read_and_not_written() {
    let place = Place::built();
    let store = larder::store::Store::open(&place.store(), larder::store::Options::default()).unwrap();
    place.run(&["show", "t"]).done();
    assert_eq!(place.run(&["get", HELLO]).done().text(), "hello\n");
    let pid = format!("the process {}", std::process::id());
    place
        .run(&["gc"])
        .failed(4, &["is in use by", &pid, "takes no commands", "nothing was changed"]);
    drop(store);
    place.run(&["gc"]).done();
}

#[test]
fn a_full_disk_is_told_from_other_errors_and_leaves_nothing_staged() {
    let place = Place::empty();
    fs::create_dir(place.store()).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", place.store(), "tmpfs", flags, Some(c"size=2m")).unwrap();
    place.run(&["init"]).done();
    place.run_with(&["put"], b"hello\n").done();
    let big = place.path("big");
    fs::write(&big, vec![1; 4 << 20]).unwrap();
    place.run(&["put", text(&big)]).failed(5, &["the disk is full", "gc"]);
    let source = place.path("source");
    fs::create_dir(&source).unwrap();
    fs::rename(&big, source.join("big")).unwrap();
    place
        .run(&["build", text(&source), "--name", "t"])
        .failed(5, &["the disk is full"]);
    assert!(place.staging_is_empty());
    assert_eq!(place.run(&["get", HELLO]).done().text(), "hello\n");
}

#[test]
fn what_cannot_be_kept_or_read_fails_a_build_and_is_named_and_a_fifo_holds_nothing_up() {
    let place = Place::with_store();
    let source = place.path("source");
    fs::create_dir_all(source.join("nodir")).unwrap();
    let special = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, source.join(name), kind, Mode::from_raw_mode(0o644), device).unwrap();
    };
    special("fifo", FileType::Fifo, 0);
    special("sock", FileType::Socket, 0);
    special("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    fs::write(source.join("ok"), "ok\n").unwrap();
    fs::write(source.join("noread"), "secret\n").unwrap();
    let args = ["build", text(&source), "--name", "t"];
    assert_eq!(place.run(&args).done().text().lines().count(), 2);
    let types = place.json(&["show", "t"]);
    let types: Vec<_> = types["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["type"])
        .collect();
    assert_eq!(
        types,
        ["directory", "fifo", "directory", "file", "charDevice", "file", "socket"]
    );

    let closed = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(source.join(name), fs::Permissions::from_mode(0o000)).unwrap();
    };
    closed("noread");
    closed("nodir");
    special("wh", FileType::CharacterDevice, 0);
    // Root without the two capabilities by which it reads everything.
    let child = Command::new("setpriv")
        .args([
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-dac_override,-dac_read_search",
        ])
        .arg(env!("CARGO_BIN_EXE_larder"))
        .args(["store", "build", text(&source), "--name", "u"])
        .env("LARDER_STORE", place.store())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = [
        "3 entries cannot be read",
        "noread: Permission denied",
        "nodir: Permission denied",
        "wh: ",
        "nothing was stored",
    ];
    end(child).failed(7, &said);
    place.run(&["show", "u"]).failed(3, &[]);
    place.run(&["resolve", "t"]).done();
    assert!(place.staging_is_empty());
}

#[test]
fn an_interrupted_build_ends_with_130_and_leaves_nothing_staged() {
    let place = Place::with_store();
    let source = place.path("source");
    fs::create_dir(&source).unwrap();
    // Enough that the signal comes first.
    for number in 0..20_000u32 {
        fs::write(source.join(number.to_string()), number.to_le_bytes()).unwrap();
    }
    for sent in [Signal::INT, Signal::TERM] {
        let child = place.command(&["build", text(&source), "--name", "t"]).spawn().unwrap();
        wait_for_staging(&place);
        signal(&child, sent);
        let ran = end(child).failed(130, &["cancelled"]);
        assert_eq!(ran.out, b"");
        assert!(place.staging_is_empty());
        place.run(&["show", "t"]).failed(3, &[]);
    }
    assert_eq!(place.json(&["stats"])["usage"]["blobs"], 0);
}

#[test]
fn an_interrupted_put_that_waits_for_its_stdin_ends_at_once() {
    let place = Place::with_store();
    let mut child = place.command(&["put"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"half").unwrap();
    wait_for_staging(&place);
    signal(&child, Signal::INT);
    // stdin stays open until it has ended.
    let stdin = child.stdin.take();
    end(child).failed(130, &["cancelled"]);
    drop(stdin);
    assert!(place.staging_is_empty());
}

#[test]
fn an_interrupted_export_removes_what_it_wrote() {
    let place = Place::with_store();
    let source = place.empty_files("source", 20_000);
    place.run(&["build", text(&source), "--name", "t"]).done();
    let out = place.path("out");
    let interrupted = || {
        let child = place.command(&["export", "t", text(&out)]).spawn().unwrap();
        let start = Instant::now();
        while !out.join("1").exists() {
            assert!(start.elapsed() < Duration::from_secs(30), "nothing is written");
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, Signal::INT);
        end(child)
    };
    let mut ran = interrupted();
    for _ in 0..5 {
        if ran.code == 0 {
            // It was quicker than this test.
            fs::remove_dir_all(&out).unwrap();
            ran = interrupted();
        }
    }
    ran.failed(130, &["cancelled"]);
    assert!(!out.exists());
}

#[test]
fn a_closed_pipe_ends_a_command_without_a_word() {
    let place = Place::with_store();
    let source = place.path("source");
    fs::create_dir(&source).unwrap();
    for number in 0..2000u32 {
        fs::write(source.join(number.to_string()), number.to_le_bytes()).unwrap();
    }
    place.run(&["build", text(&source), "--name", "t"]).done();
    for args in [
        &["show", "t", "--json"][..],
        &["show", "t", "--composefs"],
        &["ls", "--blobs"],
        &["resolve", "t"],
        &["export", "--tar", "t"],
    ] {
        let mut child = place.command(args).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut first = [0; 10];
        stdout.read_exact(&mut first).unwrap();
        drop(stdout);
        let ran = end(child);
        assert_eq!((ran.code, ran.err.as_str()), (141, ""), "{args:?}");
    }
}
