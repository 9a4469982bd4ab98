//! What the tests' program does at a step: nothing, unless [`arm`] has been called in this process.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};

use super::Step;

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    KillBefore,
    KillAfter,
    /// The call is not made and this is its result.
    Fail(Errno),
    /// A read or write does one byte, and goes on as if nothing were amiss.
    Short,
    /// A write does nothing.
    Nothing,
    /// The store's file system is shut down before the call, as by a power cut, and the process killed.
    CutBefore(Shutdown),
    CutAfter(Shutdown),
}

/// A fault, and when: at which step, and which time that it is reached (from 1).
pub type Struck = (Step, u64, Fault);

struct Hook {
    faults: Vec<Struck>,
    store: PathBuf,
    /// How often each step was reached, by its place in [`Step::ALL`].
    reached: Vec<AtomicU64>,
}

impl Hook {
    fn find(&self, step: Step, time: u64) -> Option<Fault> {
        let struck = self.faults.iter().find(|(at, when, _)| (*at, *when) == (step, time));
        struck.map(|(_, _, fault)| *fault)
    }
}

static HOOK: OnceLock<Hook> = OnceLock::new();

/// From now on steps are counted, and faults happen. For a process of its own: other tests would be struck too.
pub fn arm(faults: Vec<Struck>, store: &Path) {
    let hook = Hook {
        faults,
        store: store.to_owned(),
        reached: Step::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
    };
    assert!(HOOK.set(hook).is_ok(), "armed twice");
}

/// How often each step has been reached since [`arm`].
pub fn reached() -> Vec<(Step, u64)> {
    let hook = HOOK.get().expect("armed");
    let counts = hook.reached.iter().map(|count| count.load(Ordering::Relaxed));
    Step::ALL.iter().copied().zip(counts).collect()
}

fn die() -> ! {
    kill_process(getpid(), Signal::KILL).unwrap();
    // Until it reaches this thread.
    loop {
        std::thread::park();
    }
}

/// How much a file system may still write when it is shut down: `FS_IOC_SHUTDOWN` of the kernel's `linux/fs.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// All that it holds.
    Flush = 0,
    /// What is in its journal, so names, but not the data of files: as if the power were cut just after it did so by
    /// itself.
    FlushLog = 1,
    /// Nothing: a power cut.
    Nothing = 2,
}

/// Shuts down the file system that a folder is on; it fails everything until it is mounted anew.
pub fn shut_down(folder: &Path, how: Shutdown) {
    const FS_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
    let folder = std::fs::File::open(folder).unwrap();
    let how = how as u32;
    // SAFETY: the kernel reads one `u32` through the pointer, which lives until the call returns.
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), FS_IOC_SHUTDOWN, &raw const how) };
    assert_eq!(result, 0, "FS_IOC_SHUTDOWN: {}", std::io::Error::last_os_error());
}

fn strike(hook: &Hook, fault: Option<Fault>, after: bool) {
    match (fault, after) {
        (Some(Fault::KillBefore), false) | (Some(Fault::KillAfter), true) => die(),
        (Some(Fault::CutBefore(how)), false) | (Some(Fault::CutAfter(how)), true) => {
            // Before it is made, the store has no folder of its own.
            let folder = hook.store.ancestors().find(|folder| folder.exists()).unwrap();
            shut_down(folder, how);
            die()
        }
        _ => {}
    }
}

pub fn at<T>(step: Step, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let Some(hook) = HOOK.get() else { return call() };
    let count = 1 + hook.reached[step as usize].fetch_add(1, Ordering::Relaxed);
    let fault = hook.find(step, count);
    strike(hook, fault, false);
    if let Some(Fault::Fail(errno)) = fault {
        return Err(errno);
    }
    let result = call();
    strike(hook, fault, true);
    result
}

/// How many of the bytes that a read or write was asked for it does. Comes before [`at`] of the same call.
pub fn length(step: Step, asked: usize) -> usize {
    let Some(hook) = HOOK.get() else { return asked };
    let next = 1 + hook.reached[step as usize].load(Ordering::Relaxed);
    match hook.find(step, next) {
        Some(Fault::Short) => asked.min(1),
        Some(Fault::Nothing) => 0,
        _ => asked,
    }
}
