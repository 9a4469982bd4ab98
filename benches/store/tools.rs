//! What keeps trees of files: larder, its peers as Debian has them, and a plain copy.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::disk::sh;

/// A way to keep a folder. What it keeps, and all that it notes for the next time, is in a folder of its own.
pub struct Tool {
    pub name: &'static str,
    pub is_peer: bool,
    /// Makes an empty store in a folder that exists.
    init: fn(&Path) -> Vec<Command>,
    /// Keeps the folder as it is now.
    keep: fn(&Path, &Path) -> Command,
}

impl Tool {
    pub fn init(&self, store: &Path) {
        std::fs::create_dir(store).expect("a folder");
        for mut command in (self.init)(store) {
            sh(&mut command);
        }
    }

    pub fn keep(&self, store: &Path, folder: &Path) -> Command {
        (self.keep)(store, folder)
    }
}

pub const LARDER: Tool = Tool {
    name: "larder",
    is_peer: false,
    init: |store| vec![larder(store, &["init"])],
    keep: |store, folder| with(larder(store, &["build", "--name", "corpus"]), &[folder]),
};

/// Without compression and encryption, as far as they can be; casync always compresses.
pub const TOOLS: &[Tool] = &[
    LARDER,
    Tool {
        name: "restic",
        is_peer: true,
        init: |store| vec![restic(store, &["init", "--repository-version", "2"])],
        keep: |store, folder| with(restic(store, &["backup", "--compression", "off"]), &[folder]),
    },
    Tool {
        name: "borg",
        is_peer: true,
        init: |store| vec![borg(store, &["init", "--encryption", "none"])],
        keep: |store, folder| {
            let name = format!("::{}", archives(store));
            with(borg(store, &["create", "--compression", "none", &name]), &[folder])
        },
    },
    Tool {
        name: "ostree",
        is_peer: true,
        init: |store| vec![ostree(store, &["init", "--mode=bare"])],
        keep: |store, folder| {
            let tree = format!("--tree=dir={}", folder.display());
            ostree(store, &["commit", "--branch=corpus", &tree])
        },
    },
    Tool {
        name: "casync",
        is_peer: true,
        init: |_| Vec::new(),
        keep: |store, folder| {
            let mut command = Command::new("casync");
            command.args(["make", "--compression=zstd"]);
            command.arg(format!("--store={}", store.join("chunks.castr").display()));
            with(command, &[&store.join("corpus.caidx"), folder])
        },
    },
];

/// The program that this bench was built with.
pub fn larder(store: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
    command.arg("store").arg("--store").arg(store).args(args);
    command
}

fn restic(store: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("restic");
    command.env("RESTIC_PASSWORD", "bench");
    command.arg("--repo").arg(store.join("repo"));
    command.arg("--cache-dir").arg(store.join("cache")).args(args);
    command
}

fn borg(store: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("borg");
    command.env("BORG_REPO", store.join("repo"));
    command.env("BORG_BASE_DIR", store.join("base"));
    command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
    command.args(args);
    command
}

/// A name for borg's next archive: how often it was asked for one.
fn archives(store: &Path) -> usize {
    let path: PathBuf = store.join("archives");
    let past = std::fs::read(&path).map_or(0, |past| past.len());
    std::fs::write(path, vec![b'.'; past + 1]).expect("counted");
    past
}

fn ostree(store: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("ostree");
    command
        .arg(format!("--repo={}", store.join("repo").display()))
        .args(args);
    command
}

pub fn copy(from: &Path, to: &Path) -> Command {
    let mut command = Command::new("cp");
    command.arg("-a").arg(from).arg(to);
    command
}

/// Looks at every entry and reads nothing.
pub fn walk(folder: &Path) -> Command {
    let mut command = Command::new("find");
    command.arg(folder).args(["-newermt", "2200-01-01"]);
    command
}

/// Reads and hashes every file, in two processes.
pub fn hash(folder: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "find \"$0\" -type f -print0 | xargs -0 -P 2 -n 500 sha256sum >/dev/null",
    ]);
    command.arg(folder);
    command
}

fn with(mut command: Command, paths: &[&Path]) -> Command {
    command.args(paths);
    command
}
