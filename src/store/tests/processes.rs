//! Two processes at one store: this test program, started a second time.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::store::testing::*;
use crate::store::*;

/// Tells the second process which store to open. It ends when its input does, so also when the first one dies.
const STORE: &str = "LARDER_TEST_STORE";

/// Starts a second process that tries to open a store. Returns the line that it says about it.
fn second_process(root: &Path) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::tests::processes::one_process_at_a_time_has_a_store",
            "--nocapture",
        ])
        .env(STORE, root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let said = lines
        .filter_map(|line| line.split_once("larder: ").map(|(_, said)| said.to_owned()))
        .next();
    (child, said.expect("the second process said nothing"))
}

fn be_the_second_process(root: &Path) {
    let store = Store::open(root, Options::default());
    // With something under way, which the process takes along when it is killed.
    let build = store.as_ref().ok().map(|store| {
        let build = store.build().unwrap();
        build.put_bytes(b"never published").unwrap();
        build
    });
    match &store {
        Ok(_) => println!("larder: open"),
        Err(error) => println!("larder: {error}"),
    }
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(build);
}

#[test]
fn one_process_at_a_time_has_a_store() {
    if let Some(root) = std::env::var_os(STORE) {
        return be_the_second_process(Path::new(&root));
    }
    let (_dir, store) = store();
    let root = store.root().to_owned();
    let (revision, id) = (publish(&store, "kept", &[("f", b"content")]), store.id().to_owned());

    let (mut child, said) = second_process(&root);
    child.kill().unwrap();
    child.wait().unwrap();
    let expected = format!(
        "the store {} is in use by the process {}",
        root.display(),
        std::process::id()
    );
    assert_eq!(said, expected);

    // Another one may have it when we are done, and then it is we who are kept out, with its number.
    drop(store);
    let (mut child, said) = second_process(&root);
    assert_eq!(said, "open");
    let error = Store::open(&root, Options::default()).err().unwrap();
    assert!(
        matches!(error, Error::Locked { pid: Some(pid), .. } if pid == child.id()),
        "{error}"
    );
    assert!(std::fs::read_dir(root.join("staging")).unwrap().next().is_some());

    // Killed in the midst of a build, it is no obstacle, and leaves nothing.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(root.join("lock").exists());
    let store = Store::open(&root, Options::default()).unwrap();
    assert_eq!(store.id(), id);
    assert!(staging_is_empty(&store));
    assert_eq!(check_all(&store), 1);
    assert!(store.load(&revision.digest).is_ok());
    // It works, and says that it is ours now.
    publish(&store, "more", &[("g", b"more")]);
    assert_eq!(
        std::fs::read_to_string(root.join("lock")).unwrap().trim(),
        std::process::id().to_string()
    );
}
