//! The socket of the process that has a store open, by which other processes have it run their writing commands.
//!
//! `control.sock` lies in the store's folder, which only root enters, has the mode 0600, and takes peers of uid 0 only.
//! A client sends one packet: its command as JSON, and with it (SCM_RIGHTS) its stdin, stdout and stderr and the files
//! that the command reads, opened where the client sees them. The holder runs the very function that the client would
//! have run, on a thread of its own with its own open store, and answers with one packet: the exit code. A client that
//! shuts its side down, or is gone, cancels its command.

mod client;
mod message;
mod server;

#[cfg(any(test, fuzzing))]
pub(crate) use message::Request;
pub use server::Control;

pub(super) use client::ask;

/// The socket's name in the store's folder.
const NAME: &str = "control.sock";
