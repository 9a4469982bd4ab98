//! `larder store`, as the program that an admin calls.

#[path = "../support/mod.rs"]
mod support;

mod beside;
mod exporting;
mod failing;
mod figures;
mod layers;
mod reading;
mod retention;
mod terminal;
mod verifying;
mod writing;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::{StoreDir, temp_store_dir};

/// A store and a place for sources.
pub struct Place {
    dir: StoreDir,
}

/// How a command ended.
pub struct Ran {
    pub code: i32,
    pub out: Vec<u8>,
    pub err: String,
}

/// The names of all fields; not those of maps by path, nor what repeats a Kubernetes object.
fn fields_of(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| fields_of(item, into)),
        Value::Object(fields) => {
            for (name, value) in fields {
                into.insert(name.clone());
                let is_by_path = name == "files" && value.is_object();
                if !is_by_path && !["source", "policy"].contains(&&**name) {
                    fields_of(value, into);
                }
            }
        }
        _ => {}
    }
}

impl Place {
    /// With a new store, of nothing.
    pub fn with_store() -> Place {
        let place = Place::empty();
        place.run(&["init"]).done();
        place
    }

    /// Without one yet.
    pub fn empty() -> Place {
        Place { dir: temp_store_dir() }
    }

    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A folder of two files with one content, a third one and a symlink.
    pub fn source(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        std::fs::write(dir.join("hello"), "hello\n").unwrap();
        std::fs::write(dir.join("sub/copy"), "hello\n").unwrap();
        std::fs::write(dir.join("sub/other"), vec![7; 3000]).unwrap();
        std::os::unix::fs::symlink("../hello", dir.join("sub/link")).unwrap();
        dir
    }

    /// A folder of so many empty files, named by numbers from 0 on.
    pub fn empty_files(&self, name: &str, count: u32) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        for number in 0..count {
            std::fs::write(dir.join(number.to_string()), "").unwrap();
        }
        dir
    }

    /// The store with [`Place::source`] built as `local/t`.
    pub fn built() -> Place {
        let place = Place::with_store();
        let source = place.source("source");
        place.run(&["build", text(&source), "--name", "t"]).done();
        place
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
        command
            .arg("store")
            .args(args)
            .env("LARDER_STORE", self.store())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        end(self.command(args).spawn().unwrap())
    }

    pub fn run_with(&self, args: &[&str], stdin: &[u8]) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin).unwrap();
        end(child)
    }

    /// What it prints as JSON, if it ends with 0.
    pub fn json(&self, args: &[&str]) -> Value {
        self.run(&[args, &["-o", "json"]].concat()).done().json()
    }

    /// The digest of a ref's tree.
    pub fn digest(&self, name: &str) -> String {
        self.json(&["show", name])["digest"].as_str().unwrap().to_owned()
    }

    /// What is mounted in the place.
    pub fn mounts(&self) -> Vec<PathBuf> {
        self.dir.mounts()
    }

    pub fn staging_is_empty(&self) -> bool {
        std::fs::read_dir(self.store().join("staging"))
            .unwrap()
            .next()
            .is_none()
    }
}

pub fn end(child: Child) -> Ran {
    let output = child.wait_with_output().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: output.stdout,
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Ran {
    pub fn text(&self) -> String {
        String::from_utf8(self.out.clone()).unwrap()
    }

    /// What was printed, of documented fields alone.
    pub fn json(&self) -> Value {
        let printed: Value =
            serde_json::from_slice(&self.out).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.out)));
        let mut fields = BTreeSet::new();
        fields_of(&printed, &mut fields);
        let docs = include_str!("../../docs/cli.md");
        fields.retain(|field| !docs.contains(&format!("`{field}`")));
        assert_eq!(fields, BTreeSet::new(), "docs/cli.md does not tell of them");
        printed
    }

    /// Fails unless it ended with 0 and complained of nothing.
    #[track_caller]
    pub fn done(self) -> Ran {
        assert_eq!((self.code, self.err.as_str()), (0, ""));
        self
    }

    /// Fails unless it ended with this code and said each of these on stderr.
    #[track_caller]
    pub fn failed(self, code: i32, said: &[&str]) -> Ran {
        assert_eq!(self.code, code, "{}", self.err);
        for said in said {
            assert!(self.err.contains(said), "{said:?} is not in: {}", self.err);
        }
        self
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The SHA-256 of "hello" and a line feed.
pub const HELLO: &str = "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
/// A digest of nothing here.
pub const NOTHING: &str = "sha256:abababababababababababababababababababababababababababababababab";
