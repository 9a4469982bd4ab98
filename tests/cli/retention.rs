//! Retention by hand: plans, policies from files, records of runs, and the recipes of docs/retention.md.

use std::fs;
use std::io::Read;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::beside::agent;
use super::{HELLO, Place, end, text};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// A store on a disk of its own, on which all is free, with a tree that is live and one that is its history.
fn with_history() -> Place {
    let place = Place::empty();
    fs::create_dir(place.store()).unwrap();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64m", "test"])
        .arg(place.store())
        .status();
    assert!(status.unwrap().success(), "this test needs root, to mount a tmpfs");
    place.run(&["init"]).done();
    let source = place.source("source");
    place.run(&["build", text(&source), "--name", "t"]).done();
    fs::write(source.join("hello"), "another\n").unwrap();
    fs::write(source.join("sub/copy"), "another\n").unwrap();
    place
        .run(&["build", text(&source), "--name", "t", "--history-limit", "3"])
        .done();
    place
}

/// Lets everything in the store have been used last so many seconds ago.
fn age(place: &Place, seconds: u64) {
    let then = SystemTime::now() - Duration::from_secs(seconds);
    let set = |path: &std::path::Path| fs::File::open(path).unwrap().set_modified(then).unwrap();
    for shard in fs::read_dir(place.store().join("objects")).unwrap() {
        for blob in fs::read_dir(shard.unwrap().path()).unwrap() {
            set(&blob.unwrap().path());
        }
    }
    for manifest in fs::read_dir(place.store().join("manifests")).unwrap() {
        set(&manifest.unwrap().path());
    }
    let path = place.store().join("refs/local/t");
    let mut entry: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for old in entry["history"].as_array_mut().unwrap() {
        old["retiredAt"] = json!(jiff::Timestamp::try_from(then).unwrap());
    }
    fs::write(&path, entry.to_string()).unwrap();
}

fn policy(place: &Place, spec: &str) -> String {
    let path = place.path("policy.yaml");
    let indented: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    let head = "apiVersion: larder.dev/v1alpha1\nkind: RetentionPolicy\nmetadata:\n  name: nightly\nspec:\n";
    fs::write(&path, format!("{head}{indented}")).unwrap();
    text(&path).to_owned()
}

/// The spec of a recipe in the docs.
fn recipe(title: &str) -> String {
    let docs = include_str!("../../docs/retention.md");
    let part = docs
        .split(&format!("**{title}.**"))
        .nth(1)
        .expect("a recipe of that title");
    let yaml = part
        .split("```yaml\nspec:\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    yaml.lines().map(|line| format!("{}\n", line.trim_start())).collect()
}

/// Reasons for which the plan of a policy drops manifests.
fn dropped(place: &Place, policy: &str) -> Vec<String> {
    let plan = place.json(&["plan", "--policy", policy]);
    assert_eq!((&plan["dryRun"], &plan["overLimit"]), (&json!(true), &Value::Null));
    let dropped = plan["droppedHistory"].as_array().unwrap().iter();
    dropped.map(|one| one["reason"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_plan_is_what_a_run_then_does_and_leaves_nothing() {
    let place = with_history();
    age(&place, 2 * DAY);
    let policy = policy(&place, "nodeSelector: {}\nmaxAge: 1d");
    let plan = place.json(&["plan", "--policy", &policy]);
    assert_eq!(plan["droppedHistory"][0]["name"], "local/t");
    assert_eq!(plan["deletedBlobs"], 1, "{plan}");
    let kinds = plan["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["kind"].as_str().unwrap());
    assert_eq!(kinds.collect::<Vec<_>>(), ["manifest", "blob"]);
    assert_eq!(place.json(&["runs"])["runs"], json!([]), "a plan is no run");
    assert_eq!(
        place.json(&["gc", "--dry-run", "--policy", &policy])["items"],
        plan["items"]
    );
    let ran = place.json(&["gc", "--policy", &policy]);
    for field in [
        "droppedHistory",
        "decisions",
        "deletedBlobs",
        "freedBytes",
        "scannedBlobs",
    ] {
        assert_eq!(ran[field], plan[field], "{field}");
    }
    assert_eq!(place.json(&["runs", "last"])["items"], plan["items"]);
    let again = place.json(&["gc", "--policy", &policy]);
    assert_eq!((&again["deletedBlobs"], &again["freedBytes"]), (&json!(0), &json!(0)));
    place.run(&["resolve", "t"]).done();
}

#[test]
fn a_run_says_afterwards_what_went_and_why() {
    let place = with_history();
    age(&place, 2 * DAY);
    place.run(&["runs", "last"]).failed(3, &["there was no run yet"]);
    let policy = policy(&place, "nodeSelector: {}\nmaxAge: 1d");
    place.run(&["gc", "--policy", &policy, "--rate", "1000"]).done();
    let runs = place.json(&["runs"]);
    let run = &runs["runs"][0];
    assert_eq!(
        (&run["about"]["trigger"], &run["about"]["policy"]["name"]),
        (&json!("admin"), &json!("nightly"))
    );
    assert_eq!(run["about"]["policy"]["rules"]["maxAge"], "1d");
    let id = run["id"].as_str().unwrap();
    for name in [id, "last"] {
        let shown = place.json(&["runs", name]);
        let items = shown["items"].as_array().unwrap();
        let kinds: Vec<&str> = items.iter().map(|item| item["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["manifest", "blob"]);
        assert_eq!(
            (&items[0]["reason"], &items[1]["reason"]),
            (&json!("maxAge"), &json!("unreferenced"))
        );
        assert!(items.iter().all(|item| item["bytes"].as_u64() > Some(0)), "{items:?}");
        let used: jiff::Timestamp = items[1]["lastUsed"].as_str().unwrap().parse().unwrap();
        let days = jiff::Timestamp::now().duration_since(used).as_secs() / DAY as i64;
        assert_eq!(days, 2);
    }
    let list = place.run(&["runs"]).done().text();
    assert!(
        list.contains(id) && list.contains("nightly") && list.contains("done"),
        "{list}"
    );
    let shown = place.run(&["runs", id]).done().text();
    assert!(
        shown.contains("by admin") && shown.contains("not used for maxAge"),
        "{shown}"
    );
    place
        .run(&["runs", "20000101T000000.000Z"])
        .failed(3, &["there is no run", "lists them"]);
    place.run(&["runs", "yesterday"]).failed(2, &["yesterday"]);
}

#[tokio::test]
async fn an_interrupted_collection_ends_with_130_and_the_next_goes_on_alone_and_beside_an_agent() {
    const CONTENTS: usize = 200;
    let place = Place::with_store();
    let args = ["gc", "--grace", "0s", "--max-age", "0s"];
    let blobs = || place.json(&["stats"])["usage"]["blobs"].as_u64().unwrap() as usize;
    for beside in [false, true] {
        let _agent = match beside {
            true => Some(agent(&place).await),
            false => None,
        };
        let files: Vec<String> = (0..CONTENTS)
            .map(|number| {
                let path = place.path(&format!("{number}"));
                fs::write(&path, format!("garbage {number}")).unwrap();
                text(&path).to_owned()
            })
            .collect();
        let put: Vec<&str> = ["put"].into_iter().chain(files.iter().map(String::as_str)).collect();
        place.run(&put).done();
        let child = place.command(&[&args[..], &["--rate", "2"]].concat()).spawn().unwrap();
        let start = Instant::now();
        while blobs() == CONTENTS {
            assert!(start.elapsed() < Duration::from_secs(30), "nothing goes");
        }
        // Another one says that it waits, and need not.
        let mut waiting = place.command(&["gc", "--dry-run"]).spawn().unwrap();
        if beside {
            let (mut said, stderr) = (Vec::new(), waiting.stderr.as_mut().unwrap());
            while !String::from_utf8_lossy(&said).contains("waiting for a retention run") {
                let mut byte = [0];
                stderr.read_exact(&mut byte).unwrap();
                said.push(byte[0]);
            }
            interrupt(&waiting);
            end(waiting).failed(130, &["cancelled"]);
        } else {
            end(waiting).failed(4, &[]);
        }
        interrupt(&child);
        let ran = end(child).failed(130, &["cancelled", "the next collection goes on from there"]);
        let left = blobs();
        assert!(ran.text().contains(&format!("{}", CONTENTS - left)), "{}", ran.text());
        assert!((1..CONTENTS).contains(&left), "{left}");
        let run = place.json(&["runs", "last"]);
        assert_eq!(
            (&run["complete"], run["deletedBlobs"].as_u64()),
            (&json!(false), Some((CONTENTS - left) as u64))
        );
        let rest = place.json(&args);
        assert_eq!(
            (&rest["complete"], rest["deletedBlobs"].as_u64()),
            (&json!(true), Some(left as u64))
        );
    }
}

fn interrupt(child: &Child) {
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::INT).unwrap();
}

#[test]
fn a_policy_that_the_api_server_would_refuse_is_refused() {
    let place = with_history();
    for (spec, said) in [
        ("nodeSelector: {}\nmaxAge: soon", "spec.maxAge"),
        ("nodeSelector: {}\nmaxage: 1d", "spec.maxage: there is no such field"),
        ("maxAge: 1d", "nodeSelector"),
    ] {
        let policy = policy(&place, spec);
        for command in ["plan", "gc"] {
            place
                .run(&[command, "--policy", &policy])
                .failed(2, &[said, "policy.yaml"]);
        }
    }
    place
        .run(&["plan", "--policy", "/nowhere/at/all"])
        .failed(3, &["/nowhere/at/all"]);
    place.run(&["gc", "--policy", "x", "--max-age", "1d"]).failed(2, &[]);
    assert_eq!(place.json(&["stats"])["usage"]["blobs"], 3);
}

/// The recipe keeps history for so long, and no longer.
fn keeps_history(title: &str, for_just: u64, but_not: u64) -> (Place, String) {
    let place = with_history();
    let policy = policy(&place, &recipe(title));
    for (seconds, reasons) in [(for_just, &[][..]), (but_not, &["maxAge"])] {
        age(&place, seconds);
        assert_eq!(dropped(&place, &policy), reasons, "{seconds}");
    }
    (place, policy)
}

#[test]
fn the_recipe_for_a_ci_cache_keeps_trees_for_three_days() {
    let (place, policy) = keeps_history("A CI cache", 71 * HOUR, 73 * HOUR);
    // The disk fills: what is unused goes before its time.
    age(&place, 10 * HOUR);
    let ballast = place.store().join("mnt/ballast");
    fs::write(&ballast, vec![1; 58 << 20]).unwrap();
    let plan = place.json(&["plan", "--policy", &policy]);
    assert_eq!(plan["droppedHistory"][0]["reason"], "minFree", "{plan}");
    fs::remove_file(ballast).unwrap();
    // More than the 200Gi: one content of history is, all holes, as large.
    let content = place.json(&["path", HELLO]);
    let path = content["path"].as_str().unwrap();
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(201 << 30)
        .unwrap();
    age(&place, 10 * HOUR);
    assert_eq!(dropped(&place, &policy), ["maxSize"]);
}

#[test]
fn the_recipe_for_a_model_store_keeps_old_versions_for_ninety_days() {
    let (place, policy) = keeps_history("A model store", 89 * DAY, 91 * DAY);
    // The disk fills: what is unused goes before its time.
    age(&place, 10 * DAY);
    fs::write(place.store().join("mnt/ballast"), vec![1; 62 << 20]).unwrap();
    let plan = place.json(&["plan", "--policy", &policy]);
    assert_eq!(plan["droppedHistory"][0]["reason"], "minFree", "{plan}");
}

#[test]
fn the_recipe_for_an_edge_node_keeps_what_is_in_use_and_little_else() {
    let place = with_history();
    let policy = policy(&place, &recipe("An edge node with a small disk"));
    for (seconds, reasons) in [(5 * 60, &[][..]), (20 * 60, &["maxAge"])] {
        age(&place, seconds);
        // No node is over a limit because it needs something.
        assert_eq!(dropped(&place, &policy), reasons, "{seconds}");
    }
    fs::write(place.store().join("mnt/ballast"), vec![1; 62 << 20]).unwrap();
    let plan = place.json(&["plan", "--policy", &policy]);
    let over = &plan["overLimit"];
    assert!(over["minFree"].as_u64() > Some(6 << 20), "{plan}");
    let others = over["others"].as_u64().unwrap() >> 20;
    assert!((61..64).contains(&others), "{plan}");
    let said = String::from_utf8(place.run(&["plan", "--policy", &policy]).done().out).unwrap();
    assert!(said.contains("and others on the disk 6"), "{said}");
    assert_eq!(plan["overLimit"]["largest"][0]["neededBy"], json!(["local/t"]));
}
