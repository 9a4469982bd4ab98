//! Filling a store in a process of its own: its memory would count as that of the programs that the bench starts, for what
//! a process has had before it becomes another program counts as that one's.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Set for that process, to the store.
const APART: &str = "LARDER_BENCH_APART";

/// The store to fill, if this process was started for that.
pub fn asked() -> Option<PathBuf> {
    std::env::var_os(APART).map(PathBuf::from)
}

/// Starts this program again for the store at `root`, and waits for it.
pub fn ask(root: &Path) {
    let program = std::env::current_exe().expect("this program");
    super::disk::sh(Command::new(program).env(APART, root));
}
