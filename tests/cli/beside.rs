//! Beside an agent, which has the store open.

use std::collections::BTreeSet;
use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, recv, sendmsg, socket_with,
};
use rustix::process::{Pid, Signal, Uid, kill_process};
use serde_json::{Value, json};

use crate::support::{LarderProcess, PATIENCE, free_port, larder_process};
use crate::{HELLO, Place, end, text};

/// A real agent over the place's store, with an API server that is never there.
pub async fn agent(place: &Place) -> LarderProcess {
    let kubeconfig = place.path("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "none",
        "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "none", "user": {}}],
        "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
    });
    fs::write(&kubeconfig, config.to_string()).unwrap();
    let port = free_port();
    let (root, listen) = (place.store().display().to_string(), format!("127.0.0.1:{port}"));
    let import = place.path("import").display().to_string();
    let args = [
        "agent",
        "--node-name",
        "node",
        "--root",
        &root,
        "--listen",
        &listen,
        "--import-dir",
        &import,
        "--reserved-free",
        "1Mi",
    ];
    let mut agent = larder_process(&args, Some(&kubeconfig));
    agent.wait_ready(port).await;
    agent
}

#[tokio::test]
async fn every_command_works_beside_an_agent_as_without_one() {
    let place = Place::built();
    let mut agent = agent(&place).await;
    let source = place.path("source");
    let digest = place.digest("t");

    let put = place.run_with(&["put"], b"loose").done().text();
    assert!(put.ends_with("  5  new  -\n"), "{put}");
    let loose = put.split(' ').next().unwrap().to_owned();
    let put = place.json(&["put", text(&source.join("hello"))]);
    assert_eq!(put["blobs"][0]["digest"], HELLO);
    place
        .run(&["rm", HELLO])
        .failed(4, &["stays: it is needed by", "local/t"]);
    place.run(&["rm", &loose]).done();

    fs::write(source.join("more"), "more").unwrap();
    let built = place.json(&["build", text(&source), "--name", "u", "--exclude", "sub"]);
    assert_eq!((&built["files"], &built["added"]), (&json!(2), &json!(4)));
    let refs = place.json(&["ls"]);
    assert_eq!(refs["refs"][1]["source"]["directory"]["path"], text(&source));
    place.run(&["diff", "t", "u"]).failed(1, &[]);
    place.run(&["export", "u", text(&place.path("out"))]).done();
    // Errors and their codes come back too.
    place
        .run(&["build", text(&source), "--name", "Bad"])
        .failed(2, &["is not a valid"]);
    place
        .run(&["build", text(&place.store()), "--name", "v"])
        .failed(7, &["lies in the store"]);
    place
        .run(&["forget", "nowhere"])
        .failed(3, &["there is no ref local/nowhere"]);
    place.run(&["forget", "t"]).done();
    let dry = place.json(&["gc", "--dry-run", "--max-age", "0s", "--grace", "0s"]);
    assert_eq!((&dry["dryRun"], &dry["deletedBlobs"]), (&json!(true), &json!(1)));
    let report = place.json(&["gc", "--max-age", "0s", "--grace", "0s"]);
    assert_eq!(report["deletedBlobs"], 1);
    place.run(&["show", &digest]).failed(3, &[]);
    place.run(&["resolve", "u"]).done();
    assert!(place.staging_is_empty());

    agent.terminate();
    assert!(agent.wait(PATIENCE).success(), "{}", agent.log_end());
    // The socket stays; nobody answers on it, and nobody has the lock.
    assert!(place.store().join("control.sock").exists());
    place.run(&["gc"]).done();
}

#[tokio::test]
async fn a_layer_that_several_ask_for_at_once_is_one() {
    let place = Place::built();
    let mut agent = agent(&place).await;
    let mount = || place.json(&["mount", "t", "--name", "work"])["path"].clone();
    let paths: BTreeSet<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(mount)).collect();
        asked.into_iter().map(|one| one.join().unwrap().to_string()).collect()
    });
    assert_eq!(paths.len(), 1, "{paths:?}");
    assert_eq!(place.json(&["layers"])["layers"].as_array().unwrap().len(), 1);
    place.run(&["umount", "work", "--delete"]).done();
    agent.kill();
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_killed_agent_is_no_obstacle() {
    let place = Place::built();
    let mut first = agent(&place).await;
    first.kill();
    place.run(&["gc"]).done();
    let second = agent(&place).await;
    place.run(&["gc"]).done();
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(place.store().join("control.sock")).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    assert!(second.log().contains("running a command"), "{}", second.log_end());
}

#[tokio::test]
async fn a_client_that_is_interrupted_or_killed_cancels_its_command() {
    let place = Place::with_store();
    let agent = agent(&place).await;
    let staged = || !place.staging_is_empty();
    let eventually = |what: &str, check: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !check() {
            assert!(start.elapsed() < Duration::from_secs(30), "{what}: {}", agent.log_end());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    for sent in [Signal::INT, Signal::KILL] {
        // It waits for the rest of its stdin, which this test keeps open.
        let mut child = place.command(&["put"]).stdin(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        eventually("the agent has begun", &staged);
        kill_process(Pid::from_raw(child.id() as i32).unwrap(), sent).unwrap();
        let ran = end(child);
        if sent == Signal::INT {
            ran.failed(130, &["cancelled"]);
        }
        eventually("nothing is staged any more", &|| place.staging_is_empty());
        drop(stdin);
    }
    place.run_with(&["put"], b"hello\n").done();
}

/// Sends a packet, and gives the answer.
fn send(place: &Place, bytes: &[u8], files: &[OwnedFd]) -> Value {
    send_as(None, place, bytes, files)
}

/// As another user, if one is given: of this thread alone.
fn send_as(user: Option<Uid>, place: &Place, bytes: &[u8], files: &[OwnedFd]) -> Value {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    // A path to a socket may have no more than 107 bytes.
    let folder = fs::File::open(place.store()).unwrap();
    let path = format!(
        "/proc/self/fd/{}/control.sock",
        std::os::fd::AsRawFd::as_raw_fd(&folder)
    );
    if user.is_some() {
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
    }
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    if !files.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    }
    match sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
        // It has refused without reading, and its answer is there.
        Ok(_) | Err(rustix::io::Errno::PIPE) => {}
        Err(error) => panic!("{error}"),
    }
    let mut answer = vec![0; 1 << 16];
    let mut receive = || recv(&socket, &mut answer[..], rustix::net::RecvFlags::empty());
    let (length, _) = match receive() {
        // Told once, before the answer of an agent that refused without reading.
        Err(rustix::io::Errno::CONNRESET) => receive().unwrap(),
        other => other.unwrap(),
    };
    serde_json::from_slice(&answer[..length]).unwrap()
}

#[tokio::test]
async fn whatever_comes_by_the_socket_the_agent_lives_and_says_what_is_wrong() {
    let place = Place::with_store();
    let mut agent = agent(&place).await;
    let null = || OwnedFd::from(fs::File::options().read(true).write(true).open("/dev/null").unwrap());
    let three = || vec![null(), null(), null()];
    let gc = json!({"output": "text", "command": {"gc": {
        "dry_run": true, "max_age": null, "max_size": null, "min_free": null, "min_copies": 1,
        "grace": {"secs": 0, "nanos": 0}}}});
    let refused = |answer: Value, why: &str| {
        let said = answer["refused"]
            .as_str()
            .unwrap_or_else(|| panic!("not refused: {answer}"));
        assert!(said.contains(why), "{said}");
    };
    assert_eq!(send(&place, gc.to_string().as_bytes(), &three()), json!({"exit": 0}));
    refused(send(&place, gc.to_string().as_bytes(), &three()[..2]), "without stdin");
    refused(send(&place, gc.to_string().as_bytes(), &[]), "without stdin");
    refused(send(&place, b"{", &three()), "does not know the command");
    refused(send(&place, &[0xff; 1000], &three()), "does not know the command");
    let unknown = json!({"output": "text", "command": {"format": {}}});
    refused(
        send(&place, unknown.to_string().as_bytes(), &three()),
        "use a larder of its version",
    );
    refused(send(&place, &vec![b' '; 140 << 10], &three()), "too long");
    let many: Vec<OwnedFd> = (0..250).map(|_| null()).collect();
    refused(send(&place, gc.to_string().as_bytes(), &many), "too long");
    // A command without the files that it needs, and one with files that are something else.
    let build = json!({"output": "text", "command": {"build": {
        "name": "t", "exclude": [], "history_limit": 1, "path": "/x"}}});
    assert_eq!(send(&place, build.to_string().as_bytes(), &three()), json!({"exit": 7}));
    let mut with_file = three();
    with_file.push(null());
    assert_eq!(
        send(&place, build.to_string().as_bytes(), &with_file),
        json!({"exit": 7})
    );
    assert!(agent.is_running());
    place.run(&["gc"]).done();
    assert!(place.staging_is_empty());
}

#[tokio::test]
async fn more_clients_than_the_agent_serves_are_told_to_come_back() {
    let place = Place::with_store();
    let _agent = agent(&place).await;
    let mut waiting: Vec<_> = (0..16)
        .map(|_| place.command(&["put"]).stdin(Stdio::piped()).spawn().unwrap())
        .collect();
    let staged = || fs::read_dir(place.store().join("staging")).unwrap().count();
    let start = Instant::now();
    while staged() < 16 {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "{} of 16 are served",
            staged()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    place
        .run(&["gc"])
        .failed(4, &["as many commands as it can", "try again"]);
    // Reading takes nobody's turn.
    place.run(&["ls"]).done();
    for child in &mut waiting {
        drop(child.stdin.take());
    }
    for child in waiting {
        end(child).done();
    }
    place.run(&["gc"]).done();
}

#[tokio::test]
async fn a_user_who_is_not_root_is_refused_even_where_the_folder_lets_everybody_in() {
    let place = Place::with_store();
    let _agent = agent(&place).await;
    let open = |path: &str, mode| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(place.store().join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    open("", 0o755);
    open("control.sock", 0o666);
    let answer = std::thread::scope(|scope| {
        let as_nobody = scope.spawn(|| send_as(Some(Uid::from_raw(65534)), &place, b"{}", &[]));
        as_nobody.join().unwrap()
    });
    assert_eq!(answer, json!({"refused": "it takes commands of root only"}));
}

#[tokio::test]
async fn an_agent_whose_socket_cannot_be_made_works_all_the_same_and_takes_no_commands() {
    let place = Place::with_store();
    fs::create_dir(place.store().join("control.sock")).unwrap();
    let agent = agent(&place).await;
    assert!(
        agent.log().contains("no commands of larder store are taken"),
        "{}",
        agent.log_end()
    );
    let pid = format!("the process {}", agent.pid());
    place
        .run(&["gc"])
        .failed(4, &[&pid, "takes no commands on control.sock"]);
    place.run(&["ls"]).done();
}
