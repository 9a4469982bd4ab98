//! The files that are kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::disk::sh;

const FILES: u64 = 50_000;
const BYTES: u64 = 500_000_000;

/// Copies what every clone of this repository has downloaded, until it is as much as a toolchain.
pub fn copy(to: &Path) -> (u64, u64) {
    fs::create_dir(to).expect("a folder");
    let (mut files, mut bytes) = (0, 0);
    for (number, from) in candidates().iter().enumerate() {
        if files >= FILES && bytes >= BYTES {
            break;
        }
        if !from.is_dir() {
            continue;
        }
        sh(Command::new("cp").arg("-a").arg(from).arg(to.join(number.to_string())));
        let counted = count(&to.join(number.to_string()));
        (files, bytes) = (files + counted.0, bytes + counted.1);
    }
    assert!(
        files >= FILES && bytes >= BYTES,
        "only {files} files and {bytes} bytes found to make a corpus of"
    );
    (files, bytes)
}

fn candidates() -> Vec<PathBuf> {
    let ask = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        Some(PathBuf::from(text.trim()))
    };
    let cargo = std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    let places = [
        ask("go", &["env", "GOMODCACHE"]),
        Some(cargo.join("registry/src")),
        ask("go", &["env", "GOROOT"]),
        ask("rustc", &["--print", "sysroot"]),
    ];
    places.into_iter().flatten().collect()
}

/// Regular files below a folder, and their bytes.
fn count(dir: &Path) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(dir).expect("a folder") {
        let entry = entry.expect("an entry");
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            let below = count(&entry.path());
            (files, bytes) = (files + below.0, bytes + below.1);
        } else if kind.is_file() {
            files += 1;
            bytes += entry.metadata().expect("a status").len();
        }
    }
    (files, bytes)
}
