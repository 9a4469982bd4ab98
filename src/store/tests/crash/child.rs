//! The process that is struck: this test program once more, with one test that lives a life.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::io::Errno;

use super::life;
use crate::store::disk::Step;
use crate::store::disk::hook::{self, Fault, Shutdown, Struck};

/// Tells a process what to work on: the store, the folder to export to, and the faults, a line each.
const WORK: &str = "LARDER_TEST_CRASH";
/// Tells it to live once more if its first life fails.
const AGAIN: &str = "LARDER_TEST_CRASH_AGAIN";

/// What a process is to do, and what happens to it meanwhile.
#[derive(Debug, Clone)]
pub struct Work {
    pub store: PathBuf,
    pub out: PathBuf,
    pub faults: Vec<Struck>,
    /// Is it to live once more if its first life fails?
    pub again: bool,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    Done,
    Killed,
    /// The store gave this error.
    Failed(String),
}

/// What a process did.
#[derive(Debug)]
pub struct Life {
    pub ended: Ended,
    /// How often it reached each step; empty if it was killed.
    pub reached: BTreeMap<Step, u64>,
    /// What it said that it does and has done.
    pub said: Vec<String>,
    pub output: String,
}

/// Faults that lead to steps which are not reached otherwise. None is the first.
pub fn detours() -> Vec<Vec<Struck>> {
    let full = Fault::Fail(Errno::NOSPC);
    vec![
        vec![],
        // No room for a ref that is retired: it is written into the spare file.
        vec![(Step::RefWrite, 8, full)],
        vec![(Step::SpareWrite, 1, full)],
        // A blob that cannot be read, and again when it is judged once more: it is quarantined.
        vec![
            (Step::VerifyRead, 1, Fault::Fail(Errno::BADMSG)),
            (Step::VerifyRead, 2, Fault::Fail(Errno::BADMSG)),
        ],
        // The verification ends well, only its time is not recorded.
        vec![(Step::RecordWrite, 1, full)],
        // What was staged of a ref goes.
        vec![(Step::RefSync, 1, Fault::Fail(Errno::IO))],
        // Likewise of a note.
        vec![(Step::NoteRename, 1, Fault::Fail(Errno::IO))],
        // And of a run's record.
        vec![(Step::RunRename, 1, Fault::Fail(Errno::IO))],
        // Blocks cannot be shared: a large file is copied.
        vec![(Step::BlobReflink, 1, Fault::Fail(Errno::OPNOTSUPP))],
    ]
}

const FAULTS: &[(&str, Fault)] = &[
    ("kill-before", Fault::KillBefore),
    ("kill-after", Fault::KillAfter),
    ("cut-before", Fault::CutBefore(Shutdown::Nothing)),
    ("cut-after", Fault::CutAfter(Shutdown::Nothing)),
    ("log-and-cut-before", Fault::CutBefore(Shutdown::FlushLog)),
    ("log-and-cut-after", Fault::CutAfter(Shutdown::FlushLog)),
    ("eio", Fault::Fail(Errno::IO)),
    ("ebadmsg", Fault::Fail(Errno::BADMSG)),
    ("eopnotsupp", Fault::Fail(Errno::OPNOTSUPP)),
    ("enospc", Fault::Fail(Errno::NOSPC)),
    ("short", Fault::Short),
    ("nothing", Fault::Nothing),
];

fn written((step, time, fault): &Struck) -> String {
    let (name, _) = FAULTS.iter().find(|(_, other)| other == fault).unwrap();
    format!("{step:?} {time} {name}")
}

fn read(line: &str) -> Struck {
    let mut words = line.split(' ');
    let step = words.next().unwrap();
    let time = words.next().unwrap().parse().unwrap();
    let fault = words.next().unwrap();
    (
        *Step::ALL.iter().find(|other| format!("{other:?}") == step).unwrap(),
        time,
        FAULTS.iter().find(|(name, _)| *name == fault).unwrap().1,
    )
}

#[test]
#[ignore = "the process that the other tests here start and strike; does nothing by itself"]
fn lives() {
    let Ok(work) = std::env::var(WORK) else { return };
    let mut lines = work.lines();
    let (store, out) = (lines.next().unwrap(), lines.next().unwrap());
    hook::arm(lines.map(read).collect(), Path::new(store));
    let mut say = |what: &str, name: &str, digest: &str| {
        // At once: the next line of code may be the last. The test's harness has begun a line of its own.
        print!("\nsaid {what} {name} {digest}\n");
        std::io::stdout().flush().unwrap();
    };
    let mut lived = life::live(Path::new(store), Path::new(out), &mut say);
    if let (Err(error), true) = (&lived, std::env::var_os(AGAIN).is_some()) {
        println!("\nfailed once: {error}");
        say("failed", "-", "-");
        lived = life::live(Path::new(store), Path::new(out), &mut say);
    }
    let ended = match lived {
        Ok(()) => "done".to_owned(),
        Err(error) => format!("failed: {error}"),
    };
    for (step, count) in hook::reached() {
        println!("\nreached {step:?} {count}");
    }
    println!("\n{ended}");
}

/// The command that starts the process.
pub fn command(work: &Work) -> Command {
    let mut text = vec![work.store.display().to_string(), work.out.display().to_string()];
    text.extend(work.faults.iter().map(written));
    let mut command = Command::new(std::env::current_exe().unwrap());
    if work.again {
        command.env(AGAIN, "");
    }
    command
        .args([
            "--exact",
            "store::tests::crash::child::lives",
            "--ignored",
            "--nocapture",
        ])
        .args(["--test-threads", "1"])
        .env(WORK, text.join("\n"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Has a process live its life, to whatever end.
pub fn live(work: &Work) -> Life {
    outcome(work, &command(work).output().unwrap())
}

/// What a process did, by its output.
pub fn outcome(work: &Work, output: &Output) -> Life {
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let mut reached = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("reached ")) {
        let (step, count) = line.split_once(' ').unwrap();
        let step = Step::ALL.iter().find(|other| format!("{other:?}") == step).unwrap();
        reached.insert(*step, count.parse().unwrap());
    }
    let failed = text.lines().find_map(|line| line.strip_prefix("failed: "));
    let ended = match (output.status.signal(), failed) {
        (Some(9), _) => Ended::Killed,
        (None, Some(error)) => Ended::Failed(error.to_owned()),
        (None, None) if output.status.success() => Ended::Done,
        _ => panic!("{work:?}: {:?}\n{text}", output.status),
    };
    let said = text.lines().filter_map(|line| line.strip_prefix("said "));
    Life {
        ended,
        reached,
        said: said.map(str::to_owned).collect(),
        output: text,
    }
}
