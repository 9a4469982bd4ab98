//! Asking the process that has the store.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown, socket_with};

use super::NAME;
use super::message::{Answer, MAX_BYTES, Request, receive, send};
use crate::cli::Write;
use crate::cli::exit::{Exit, Failure};
use crate::cli::io::{Io, standard_files};

/// How often an interruption is looked for while the command runs.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Has the holder of the store run the command. `locked` says who it is, for when it does not answer.
pub fn ask(root: &Path, command: Write, files: Vec<OwnedFd>, io: &mut Io, locked: Failure) -> Result<Exit, Failure> {
    let broken = |what: &str, error: Errno| {
        let message = format!("{}, but cannot {what} its {NAME}: {error}", locked.message);
        Failure::new(Exit::InUse, message).hint("look whether that process still runs, and try again")
    };
    let socket = match connect_to(root) {
        Ok(socket) => socket,
        Err(Errno::NOENT | Errno::CONNREFUSED) => {
            return Err(Failure::new(
                Exit::InUse,
                format!("{}, which takes no commands on {NAME}", locked.message),
            )
            .hint("try again when that process has ended; nothing was changed"));
        }
        Err(error) => return Err(broken("connect to", error)),
    };
    let request = Request {
        output: io.format(),
        command,
    };
    let bytes = serde_json::to_vec(&request)
        .map_err(|e| Failure::new(Exit::Failed, format!("cannot write the command as JSON: {e}")))?;
    if bytes.len() > MAX_BYTES {
        let message = format!(
            "the command has {} bytes; one to an agent may have {MAX_BYTES}",
            bytes.len()
        );
        return Err(Failure::new(Exit::Usage, message).hint("name fewer things at once"));
    }
    let standard = standard_files()
        .map_err(|e| Failure::new(Exit::Failed, format!("cannot open stdin, stdout and stderr: {e}")))?;
    let all: Vec<BorrowedFd<'_>> = standard.iter().chain(&files).map(AsFd::as_fd).collect();
    match send(&socket, &bytes, &all) {
        // It has refused without reading, and its answer is there.
        Ok(()) | Err(Errno::PIPE) => {}
        Err(error) => return Err(broken("write to", error)),
    }
    // Their ends are the holder's now: a pipe that it closes is closed.
    drop((standard, files));
    wait(&socket, io).map_err(|e| broken("read from", e))?;
    let answer = match receive(&socket) {
        // Told once, before the answer of one that refused without reading.
        Err(Errno::CONNRESET) => receive(&socket),
        other => other,
    };
    let (bytes, _) = answer.map_err(|e| broken("read from", e))?;
    match serde_json::from_slice(&bytes) {
        Ok(Answer::Exit(code)) => Ok(Exit::of(code)),
        Ok(Answer::Refused(why)) => Err(Failure::new(Exit::InUse, format!("{}: {why}", locked.message))),
        // An empty packet among others.
        Err(_) => Err(Failure::new(
            Exit::Failed,
            format!("{}, which ended before the command did", locked.message),
        )
        .hint("what it had not finished is not in the store; run the command again")),
    }
}

/// Waits for the answer. An interruption is passed on, and its answer waited for: it says what became of the command.
fn wait(socket: &OwnedFd, io: &Io) -> Result<(), Errno> {
    let cancel = io.cancel();
    let mut told = false;
    loop {
        let mut ready = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut ready, Some(&LOOK)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error),
        }
        if cancel.load(Ordering::Relaxed) && !told {
            shutdown(socket, Shutdown::Write)?;
            told = true;
        }
    }
}

/// By the folder's descriptor, because a socket's path may have no more than 107 bytes.
fn connect_to(root: &Path) -> Result<OwnedFd, Errno> {
    let folder = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{NAME}", folder.as_raw_fd()))?;
    connect(&socket, &address)?;
    Ok(socket)
}
