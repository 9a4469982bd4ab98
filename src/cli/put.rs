//! `put`: contents into the store.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use rustix::fs::{FileType, Mode, OFlags, fstat};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::text::human_size;
use crate::store::{Blob, Build, Error};

/// Most files of one call: as many as one message to an agent can carry.
const MAX_FILES: usize = 200;

/// Store contents and print their digests. No tree names them, so gc takes them when they are a day old.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Put {
    /// Files to store, at most 200. None: stdin.
    #[arg(value_name = "FILE", num_args = 0..=MAX_FILES)]
    #[serde(skip)]
    files: Vec<PathBuf>,
    /// The files' names, for the output.
    #[arg(skip)]
    names: Vec<String>,
}

impl Put {
    pub fn open(&mut self) -> Result<Vec<OwnedFd>, Failure> {
        if self.files.len() > MAX_FILES {
            let message = format!("put takes at most {MAX_FILES} files at once");
            return Err(Failure::new(Exit::Usage, message).hint("call it several times, as `xargs -n 200` does"));
        }
        // A message to an agent is bounded, and these are only for people.
        let shown = |path: &PathBuf| path.display().to_string().chars().take(200).collect();
        self.names = self.files.iter().map(shown).collect();
        self.files.iter().map(open_file).collect()
    }

    pub fn run(self, site: &Site, files: Vec<OwnedFd>, io: &mut Io) -> Result<Exit, Failure> {
        let build = site.store.build()?;
        let mut blobs = Vec::new();
        // Beside what somebody types it would only disturb.
        let bar = match self.names.is_empty() && io.is_stdin_terminal() {
            true => ProgressBar::hidden(),
            false => io.spinner("storing"),
        };
        if self.names.is_empty() {
            let blob = build.put(&mut io.stdin()).map_err(|error| cause(error, "stdin", io))?;
            blobs.push(("-", blob));
        }
        for (name, file) in self.names.iter().zip(files) {
            if io.cancel().load(std::sync::atomic::Ordering::Relaxed) {
                return Err(Failure::cancelled());
            }
            blobs.push((name, put_file(&build, file, name, io)?));
        }
        let added = build.store_contents()?;
        bar.finish_and_clear();
        if io.is_json() {
            let blobs: Vec<_> = blobs
                .iter()
                .map(|(name, blob)| json!({"name": name, "digest": blob.digest, "size": blob.size, "new": blob.new}))
                .collect();
            io.json(&json!({"blobs": blobs, "added": added}))?;
            return Ok(Exit::Done);
        }
        for (name, blob) in blobs {
            let new = if blob.new { "new" } else { "known" };
            io.line(&format!("{}  {}  {new}  {name}", blob.digest, human_size(blob.size)))?;
        }
        Ok(Exit::Done)
    }
}

fn put_file(build: &Build, file: OwnedFd, name: &str, io: &Io) -> Result<Blob, Failure> {
    let file = File::from(file);
    let is_file = fstat(&file).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_file());
    let put = match is_file {
        true => build.put_file(&file),
        // A pipe has no offsets, and perhaps no end soon.
        false => build.put(&mut super::io::Cancellable::new(file.into(), io.cancel())),
    };
    put.map_err(|error| cause(error, name, io))
}

fn open_file(path: &PathBuf) -> Result<OwnedFd, Failure> {
    let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|e| Failure::file("open", path, &e.into()))
}

/// What a failed put was about.
fn cause(error: Error, name: &str, io: &Io) -> Failure {
    match error {
        Error::Source(_) if io.cancel().load(std::sync::atomic::Ordering::Relaxed) => Failure::cancelled(),
        Error::Source(source) => Failure::new(
            Exit::Failed,
            format!("cannot read {name}: {source}; nothing was stored"),
        ),
        error => error.into(),
    }
}
