//! What the tests' program does at a step: nothing, unless [`arm`] has been called in this process.

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
    /// A read finds the end, a write does nothing.
    Nothing,
    /// The process stops (SIGSTOP) before the call, for its parent to do something to the disk.
    StopBefore,
    StopAfter,
}

/// A fault, and when: at which step, and which time that it is reached (from 1).
pub type Struck = (Step, u64, Fault);

struct Hook {
    faults: Vec<Struck>,
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
pub fn arm(faults: Vec<Struck>) {
    let reached = Step::ALL.iter().map(|_| AtomicU64::new(0)).collect();
    assert!(HOOK.set(Hook { faults, reached }).is_ok(), "armed twice");
}

/// How often each step has been reached since [`arm`].
pub fn reached() -> Vec<(Step, u64)> {
    let hook = HOOK.get().expect("armed");
    let counts = hook.reached.iter().map(|count| count.load(Ordering::Relaxed));
    Step::ALL.iter().copied().zip(counts).collect()
}

fn signal(signal: Signal) {
    kill_process(getpid(), signal).unwrap();
    if signal == Signal::KILL {
        // Until it is delivered to this thread.
        loop {
            std::thread::park();
        }
    }
}

pub fn at<T>(step: Step, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let Some(hook) = HOOK.get() else { return call() };
    let count = 1 + hook.reached[step as usize].fetch_add(1, Ordering::Relaxed);
    let fault = hook.find(step, count);
    match fault {
        Some(Fault::KillBefore) => signal(Signal::KILL),
        Some(Fault::StopBefore) => signal(Signal::STOP),
        Some(Fault::Fail(errno)) => return Err(errno),
        _ => {}
    }
    let result = call();
    match fault {
        Some(Fault::KillAfter) => signal(Signal::KILL),
        Some(Fault::StopAfter) => signal(Signal::STOP),
        _ => {}
    }
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
