//! What is drawn on a terminal while long work goes on.

use std::fs;
use std::process::{Command, Stdio};

use super::{Place, text};

/// Runs a command whose stderr is a terminal: what it drew there, and what it wrote to stdout, which is a file.
fn drawn(place: &Place, args: &[&str]) -> (String, String) {
    let out = place.path("stdout");
    let larder = env!("CARGO_BIN_EXE_larder");
    let command = format!("{larder} store {} </dev/null >{}", args.join(" "), text(&out));
    // script(1) gives the command a terminal.
    let mut script = Command::new("script");
    script.args(["-qec", &command, "/dev/null"]);
    script.env("LARDER_STORE", place.store()).env("TERM", "xterm");
    let output = script.stdin(Stdio::null()).output().unwrap();
    let drawn = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{args:?}: {drawn}");
    (drawn, fs::read_to_string(&out).unwrap())
}

#[test]
fn long_work_shows_on_a_terminal_that_it_goes_on_and_nowhere_else() {
    let place = Place::built();
    let source = place.path("source");
    let (out, file) = (place.path("out"), place.path("file"));
    fs::write(&file, "x".repeat(3 << 20)).unwrap();
    let works: [(&[&str], &str); 8] = [
        (&["build", text(&source), "--name", "u"], "reading, entries"),
        (&["put", text(&file)], "storing"),
        (&["export", "t", text(&out)], "writing, entries"),
        (&["verify"], "reading"),
        (&["verify"], "comparing images"),
        (&["dedup"], "reading manifests"),
        (&["analytics"], "reading manifests"),
        (&["gc", "--dry-run"], "collecting"),
    ];
    for (args, message) in works {
        let _ = fs::remove_dir_all(&out);
        let (shown, written) = drawn(&place, args);
        assert!(shown.contains(message), "{args:?} drew {shown:?}");
        // What is drawn is cleared again: no line of it stays.
        assert!(!shown.contains('\n'), "{args:?} left {shown:?}");
        assert!(!written.contains('\x1b'), "{args:?} wrote {written:?}");
        let _ = fs::remove_dir_all(&out);
        let (shown, written) = drawn(&place, &[args, &["-o", "json"]].concat());
        assert_eq!(shown, "", "{args:?}");
        serde_json::from_str::<serde_json::Value>(&written).unwrap_or_else(|e| panic!("{args:?}: {e}: {written}"));
        // Here stderr is a pipe.
        let _ = fs::remove_dir_all(&out);
        place.run(args).done();
    }
}
