//! What a command reads and writes: three files, which are this process's own or those of a client of the agent.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;

use super::exit::{Exit, Failure};
use super::{Format, table::Table};

/// A command's surroundings.
pub struct Io {
    stdin: Arc<File>,
    stdout: BufWriter<File>,
    stderr: File,
    format: Format,
    cancel: Arc<AtomicBool>,
}

impl Io {
    pub fn new(stdin: File, stdout: File, stderr: File, format: Format, cancel: Arc<AtomicBool>) -> Io {
        Io {
            stdin: Arc::new(stdin),
            stdout: BufWriter::with_capacity(1 << 16, stdout),
            stderr,
            format,
            cancel,
        }
    }

    pub fn of_this_process(format: Format) -> io::Result<Io> {
        let [stdin, stdout, stderr] = standard_files()?.map(File::from);
        Ok(Io::new(stdin, stdout, stderr, format, Arc::default()))
    }

    /// Set when the command is to end early.
    pub fn cancel(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// stdin, whose reading ends with an error when the command is cancelled.
    pub fn stdin(&self) -> Cancellable {
        Cancellable::new(self.stdin.clone(), self.cancel.clone())
    }

    /// Writes a line to stdout.
    pub fn line(&mut self, line: &str) -> Result<(), Failure> {
        writeln!(self.stdout, "{line}").map_err(|e| Failure::output(&e))
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stdout.write_all(bytes).map_err(|e| Failure::output(&e))
    }

    pub fn table(&mut self, table: &Table) -> Result<(), Failure> {
        self.bytes(table.to_string().as_bytes())
    }

    /// Writes a JSON document to stdout.
    pub fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let written = serde_json::to_writer_pretty(&mut self.stdout, value);
        written.map_err(|e| Failure::output(&e.into()))?;
        self.line("")
    }

    pub fn stdout(&mut self) -> &mut dyn Write {
        &mut self.stdout
    }

    pub fn is_stdin_terminal(&self) -> bool {
        self.stdin.is_terminal()
    }

    /// Is stdout a terminal? Then binary data is not for it.
    pub fn is_stdout_terminal(&self) -> bool {
        self.stdout.get_ref().is_terminal()
    }

    /// Writes a line to stderr: a warning, or what is wrong with one of several things. Best effort.
    pub fn note(&mut self, line: &str) {
        let _ = writeln!(self.stderr, "larder: {line}");
    }

    /// A bar on stderr if that is a terminal and people read; else nothing is drawn. `total` 0: how much it will be is
    /// not known.
    pub fn progress(&self, what: &'static str, total: u64) -> ProgressBar {
        let template = match total {
            0 => "{msg} {spinner} {human_pos}, {elapsed}",
            _ => "{msg} {wide_bar} {human_pos}/{human_len}, {elapsed}",
        };
        self.bar(what, Some(total), template)
    }

    /// As a bar, for work of which only can be said that it goes on.
    pub fn spinner(&self, what: &'static str) -> ProgressBar {
        self.bar(what, None, "{msg} {spinner} {elapsed}")
    }

    fn bar(&self, what: &'static str, total: Option<u64>, template: &str) -> ProgressBar {
        let bar = match (self.format, self.stderr.is_terminal(), self.stderr.try_clone()) {
            (Format::Text, true, Ok(stderr)) => {
                let reader = self.stdin.try_clone().or_else(|_| stderr.try_clone());
                let Ok(reader) = reader else {
                    return ProgressBar::hidden();
                };
                let term = console::Term::read_write_pair(reader, stderr);
                ProgressBar::with_draw_target(total, ProgressDrawTarget::term(term, 10))
            }
            _ => return ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }

    /// Writes out what is left and the error if there is one.
    pub fn finish(mut self, result: Result<Exit, Failure>) -> Exit {
        let flushed = self.stdout.flush().map_err(|e| Failure::output(&e));
        let result = result.and_then(|exit| flushed.map(|()| exit));
        match result {
            Ok(exit) => exit,
            Err(failure) => {
                if !failure.message.is_empty() {
                    self.note(&failure.message);
                }
                if let Some(hint) = &failure.hint {
                    let _ = writeln!(self.stderr, "        {hint}");
                }
                failure.exit
            }
        }
    }
}

/// Duplicates of this process's stdin, stdout and stderr. (One that was closed is `/dev/null`: Rust's start-up sees to
/// it.)
pub fn standard_files() -> io::Result<[OwnedFd; 3]> {
    Ok([
        io::stdin().as_fd().try_clone_to_owned()?,
        io::stdout().as_fd().try_clone_to_owned()?,
        io::stderr().as_fd().try_clone_to_owned()?,
    ])
}

/// How often a read that waits looks whether it was cancelled.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A file, perhaps a pipe or terminal, whose reading ends with an error soon after `cancel` is set.
pub struct Cancellable {
    file: Arc<File>,
    cancel: Arc<AtomicBool>,
}

impl Cancellable {
    pub fn new(file: Arc<File>, cancel: Arc<AtomicBool>) -> Self {
        Self { file, cancel }
    }
}

impl Read for Cancellable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(io::Error::other("cancelled"));
            }
            let mut ready = [PollFd::new(&*self.file, PollFlags::IN)];
            match poll(&mut ready, Some(&LOOK)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            match (&*self.file).read(buffer) {
                // Another process made it non-blocking, and one more was faster.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}
