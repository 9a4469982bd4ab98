//! No change of the disk without a step's name, and no name without a change.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::*;
use crate::store::disk::hook::Fault;

/// Functions about files, of rustix and of the standard library, that change nothing.
const LOOKING: &[&str] = &[
    "statat",
    "fstat",
    "fstatvfs",
    "seek",
    "makedev",
    "flock",
    "ioctl_getflags",
    "read_to_string",
];

/// What code of the store outside `disk/` may call by these paths, because it changes nothing.
const HARMLESS: &[(&str, &[&str])] = &[
    ("rustix::fs::", LOOKING),
    ("rustix::io::", &[]),
    ("std::fs::", LOOKING),
    ("fs::", LOOKING),
    ("File::", &["from"]),
    ("libc::", &[]),
];

/// Methods of files that change the disk. A tree is encoded, and a content copied, into whatever writer is given.
const CHANGING: &[(&str, &[&str])] = &[
    (".write_all(", &["tree/write.rs", "reader.rs", "cache.rs", "runs.rs"]),
    (".write(", &[]),
    ("writeln!(", &[]),
    (".set_len(", &[]),
    (".sync_all(", &[]),
    (".sync_data(", &[]),
    (".set_permissions(", &[]),
    (".set_times(", &[]),
    (".set_modified(", &[]),
];

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        match path.is_dir() {
            true if !["disk", "tests"].contains(&name) => sources(&path, into),
            false if !["tests.rs", "testing.rs"].contains(&name) => into.push(path),
            _ => {}
        }
    }
}

/// The code without comments and without the tests at its end.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn only_the_disk_module_changes_the_disk() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 15, "{files:?}");
    let mut wrong = Vec::new();
    for file in files {
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let code = code(&fs::read_to_string(&file).unwrap());
        for (path, harmless) in HARMLESS {
            for (at, _) in code.match_indices(path) {
                let called = &code[at + path.len()..];
                let called = called.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let longer = code[..at].ends_with(|c: char| c.is_alphanumeric());
                // Types and constants begin with a capital letter.
                if !longer && called.starts_with(|c: char| c.is_lowercase()) && !harmless.contains(&called) {
                    wrong.push(format!("{name}: {path}{called}"));
                }
            }
        }
        // A function that is imported by name would not be seen above.
        for (at, _) in code.match_indices("use rustix::") {
            let names = code[at..].split(';').next().unwrap();
            let names = names.split(|c: char| !c.is_alphanumeric() && c != '_');
            let known = ["use", "rustix", "fs", "io", "path", "process"];
            wrong.extend(
                names
                    .filter(|word| word.starts_with(|c: char| c.is_lowercase()) && !known.contains(word))
                    .map(|word| format!("{name}: imports {word}")),
            );
        }
        for (method, but_in) in CHANGING {
            if code.contains(method) && !but_in.contains(&&*name) {
                wrong.push(format!("{name}: {method}"));
            }
        }
    }
    assert!(wrong.is_empty(), "these calls belong into store/disk: {wrong:#?}");
}

#[test]
fn every_step_is_reached_by_the_work_that_is_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let ram = Ram::new(dir.path());
    // Where blocks can be shared, and the tree is written to another file system.
    let disk = Disk::new(ram.path(), "xfs", 320);
    let mut reached: BTreeMap<Step, u64> = BTreeMap::new();
    for (number, faults) in detours().into_iter().enumerate() {
        let work = Work {
            store: disk.path().join(format!("store-{number}")),
            out: dir.path().join(format!("out-{number}")),
            faults: faults.clone(),
            again: false,
        };
        let life = live(&work);
        // A full disk is got round, a disk with errors is not.
        let broken = faults.iter().any(|(_, _, fault)| *fault == Fault::Fail(Errno::IO));
        assert_eq!(life.ended == Ended::Done, !broken, "{faults:?}: {}", life.output);
        for (step, count) in life.reached {
            *reached.entry(step).or_default() += count;
        }
    }
    let missed: Vec<_> = Step::ALL.iter().filter(|step| reached.get(step) == Some(&0)).collect();
    assert!(missed.is_empty(), "no work of the crash tests reaches {missed:?}");
    assert_eq!(reached.len(), Step::ALL.len());
}
