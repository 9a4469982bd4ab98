//! How a command ends: exit codes, and errors that say what to do next.

use std::io;

use crate::{layer, source, store};

/// A command's exit code. Scripts rely on the numbers: they are documented in docs/cli.md and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or the answer is yes.
    Done = 0,
    /// The answer is no: it does not exist, the trees differ, damage was found.
    No = 1,
    /// The command line is wrong. clap's own number.
    Usage = 2,
    /// No such store, tree, ref, path or content.
    NotFound = 3,
    /// Another process has the store, or something needs what was to be removed.
    InUse = 4,
    /// The disk is full.
    Full = 5,
    /// Something in the store is damaged, or of a format that this program does not know.
    Damaged = 6,
    /// Anything else: a file cannot be read or written, a source changes too fast.
    Failed = 7,
    /// SIGINT or SIGTERM came, as a shell shows SIGINT.
    Cancelled = 130,
    /// Nobody reads stdout any more, as a shell shows SIGPIPE.
    ClosedPipe = 141,
}

impl Exit {
    /// The code that a number stands for; unknown numbers count as failures.
    pub fn of(number: u8) -> Exit {
        let all = [
            Exit::Done,
            Exit::No,
            Exit::Usage,
            Exit::NotFound,
            Exit::InUse,
            Exit::Full,
            Exit::Damaged,
            Exit::Cancelled,
            Exit::ClosedPipe,
        ];
        all.into_iter()
            .find(|exit| *exit as u8 == number)
            .unwrap_or(Exit::Failed)
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure {
            exit,
            message: message.into(),
            hint: None,
        }
    }

    pub fn hint(self, hint: impl Into<String>) -> Failure {
        Failure {
            hint: Some(hint.into()),
            ..self
        }
    }

    pub fn cancelled() -> Failure {
        Failure::new(Exit::Cancelled, "cancelled")
    }

    /// Writing to stdout failed.
    pub fn output(error: &io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::new(Exit::ClosedPipe, ""),
            _ if is_full(error) => Failure::new(Exit::Full, format!("cannot write to stdout: {error}")),
            _ => Failure::new(Exit::Failed, format!("cannot write to stdout: {error}")),
        }
    }

    /// Doing something to a file of the caller's failed.
    pub fn file(action: &str, path: &std::path::Path, error: &io::Error) -> Failure {
        let exit = match error.kind() {
            io::ErrorKind::NotFound => Exit::NotFound,
            _ if is_full(error) => Exit::Full,
            _ => Exit::Failed,
        };
        Failure::new(exit, format!("cannot {action} {}: {error}", path.display()))
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Failure {
        use store::Error;
        let (exit, hint) = match &error {
            Error::NoStore { .. } => (
                Exit::NotFound,
                Some("name another folder by --store or LARDER_STORE, or make a store there with `larder store init`"),
            ),
            Error::NotAStore { .. } => (
                Exit::NotFound,
                Some("name the store's own folder by --store or LARDER_STORE"),
            ),
            Error::MissingBlob { .. } => (
                Exit::NotFound,
                Some("build the tree that had it again, or put its content"),
            ),
            Error::MissingManifest { .. } => (
                Exit::NotFound,
                Some("`larder store ls --manifests` lists what is stored"),
            ),
            Error::Locked { .. } => (Exit::InUse, Some("try again when that process has ended")),
            Error::DiskFull { .. } | Error::NoInodes { .. } | Error::QuotaExceeded => (
                Exit::Full,
                Some("free space on that disk: `larder store gc` may, with --max-age or --max-size"),
            ),
            Error::Config { .. } => (
                Exit::Damaged,
                Some("use a larder of the version that last wrote it, or restore the file"),
            ),
            Error::WrongBlob { .. }
            | Error::WrongLength { .. }
            | Error::BadManifest { .. }
            | Error::WrongManifest { .. }
            | Error::BadRef { .. } => (Exit::Damaged, None),
            Error::ExportBlob { source, .. } => match &**source {
                // The tree is here and lacks a content: that is damage.
                Error::MissingBlob { .. } | Error::WrongLength { .. } | Error::WrongBlob { .. } => {
                    (Exit::Damaged, Some("build the tree again to heal it"))
                }
                _ => (Exit::Failed, None),
            },
            Error::InvalidName { .. } => (Exit::Usage, None),
            Error::Cancelled => (Exit::Cancelled, None),
            _ => (Exit::Failed, None),
        };
        let failure = Failure::new(exit, error.to_string());
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<layer::Error> for Failure {
    fn from(error: layer::Error) -> Failure {
        match error {
            layer::Error::Store(error) => error.into(),
            error => {
                use layer::Error;
                let exit = match error {
                    Error::InUse { .. } | Error::Stopped { .. } | Error::Immutable { .. } | Error::Occupied { .. } => {
                        Exit::InUse
                    }
                    Error::NotFound { .. } => Exit::NotFound,
                    Error::DataLost { .. } | Error::Record { .. } => Exit::Damaged,
                    Error::TooSmall { .. }
                    | Error::Shrink { .. }
                    | Error::Unlimited { .. }
                    | Error::InvalidId(_)
                    | Error::ReadOnly { .. } => Exit::Usage,
                    Error::Io { ref source, .. } if is_full(source) => Exit::Full,
                    _ => Exit::Failed,
                };
                Failure::new(exit, error.to_string())
            }
        }
    }
}

impl From<source::Error> for Failure {
    fn from(error: source::Error) -> Failure {
        use source::Error;
        let (exit, hint) = match error {
            Error::Store(error) => return error.into(),
            Error::Layer(error) => return error.into(),
            Error::Cancelled => (Exit::Cancelled, None),
            Error::InvalidGlob { .. } => (Exit::Usage, None),
            Error::Missing { .. } => (Exit::NotFound, None),
            Error::Unreadable { .. } => (
                Exit::Failed,
                Some("nothing was stored: make them readable, or leave them out by --exclude"),
            ),
            Error::Changed { .. } => (
                Exit::Failed,
                Some("nothing was stored: build again when nobody writes there"),
            ),
            _ => (Exit::Failed, None),
        };
        let failure = Failure::new(exit, error.to_string());
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}
