//! Opening a store for writing: here, or through the agent that has it open.

use std::os::fd::OwnedFd;
use std::path::Path;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::{Write, control, interrupt};
use crate::layer::{self, Layers};
use crate::store::{Error, Options, Reader, Store};

/// What a writing command works on.
#[derive(Clone)]
pub struct Site {
    pub store: Store,
    /// They say which trees are in use.
    pub layers: Layers,
}

impl Site {
    /// Opens a store that exists, and takes its lock.
    pub fn open(root: &Path) -> Result<Site, Failure> {
        // A slip in the path must not make a store there.
        Reader::open(root)?;
        let store = Store::open(root, Options::default())?;
        let layers = Layers::open(store.clone(), layer::Options::default())?;
        Ok(Site { store, layers })
    }
}

/// Runs a writing command: with the store's lock, or where that is taken through its holder's socket.
pub fn write(root: &Path, mut command: Write, io: &mut Io) -> Result<Exit, Failure> {
    Reader::open(root)?;
    interrupt::watch(io.cancel())?;
    let files: Vec<OwnedFd> = command.open()?;
    match Site::open(root) {
        Ok(site) => command.run(&site, files, io),
        Err(failure) if failure.exit == Exit::InUse => control::ask(root, command, files, io, failure),
        Err(failure) => Err(failure),
    }
}

/// Make a store in a folder that is empty or does not exist.
#[derive(Args)]
pub struct Init {}

impl Init {
    pub fn run(self, root: &Path, io: &mut Io) -> Result<Exit, Failure> {
        let (id, created) = match Reader::open(root) {
            Ok(store) => (store.id().to_owned(), false),
            Err(Error::NoStore { .. }) => (Store::open(root, Options::default())?.id().to_owned(), true),
            Err(error) => return Err(error.into()),
        };
        let shown = root.display();
        match (io.is_json(), created) {
            (true, _) => io.json(&json!({"root": shown.to_string(), "id": id, "created": created}))?,
            (false, true) => io.line(&format!("made the store {id} in {shown}"))?,
            (false, false) => io.line(&format!("{shown} is a store already: {id}"))?,
        }
        Ok(Exit::Done)
    }
}
