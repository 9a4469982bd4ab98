//! Running a program and measuring it: wall time with the sync that makes its work durable, and peak memory.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What one run took.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    pub seconds: f64,
    /// The largest resident set of the process, in bytes.
    pub peak: u64,
}

/// Runs a command to its end and makes the file system durable. Panics with its messages if it fails.
pub fn run(command: &mut Command, sync: &Path) -> Taken {
    let dir: OwnedFd = std::fs::File::open(sync).expect("the file system's root").into();
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let log = sync.join("stderr");
    command.stderr(std::fs::File::create(&log).expect("a log"));
    let start = Instant::now();
    // Waited for below, by a call that also tells the memory.
    #[allow(clippy::zombie_processes)]
    let child = command
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let (status, peak) = wait(child.id());
    if status != 0 {
        let messages = std::fs::read_to_string(&log).unwrap_or_default();
        panic!("{command:?} failed with status {status}:\n{messages}");
    }
    rustix::fs::syncfs(&dir).expect("synced");
    Taken {
        seconds: start.elapsed().as_secs_f64(),
        peak,
    }
}

/// Waits for a child; gives its raw status and its peak memory, which the standard library does not.
fn wait(pid: u32) -> (i32, u64) {
    let mut status = 0;
    // SAFETY: plain old data, filled by the call.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let pid = libc::pid_t::try_from(pid).expect("a pid");
    // SAFETY: both pointers are to live values of the right types.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    assert_eq!(waited, pid, "{}", std::io::Error::last_os_error());
    (status, u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
