//! Single contents, by digest.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::collect::await_collection;
use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::text::human_size;
use crate::store::{BlobInfo, Digest, InvalidDigest, Needed, Reader, Removed};

/// Reads a digest with or without its `sha256:`.
fn digest(text: &str) -> Result<Digest, InvalidDigest> {
    match Digest::from_hex(text) {
        Some(digest) => Ok(digest),
        None => text.parse(),
    }
}

/// Write a content to stdout or a file, and check it meanwhile.
#[derive(Args)]
pub struct Get {
    #[arg(value_parser = digest)]
    digest: Digest,
    /// Write to this file, which gets its name when it is whole; an existing one is replaced.
    #[arg(short = 'O', value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Get {
    pub fn writes_a_file(&self) -> bool {
        self.file.is_some()
    }

    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        match &self.file {
            Some(path) => {
                let size = to_file(store, &self.digest, path, io.cancel())?;
                if io.is_json() {
                    let file = path.display().to_string();
                    io.json(&json!({"digest": self.digest, "size": size, "file": file}))?;
                }
            }
            None => {
                store
                    .copy(&self.digest, io.stdout())
                    .map_err(|e| Failure::output(&e))??;
            }
        }
        Ok(Exit::Done)
    }
}

/// Under another name beside it first: nobody finds half a file.
fn to_file(store: &Reader, digest: &Digest, path: &Path, cancel: Arc<AtomicBool>) -> Result<u64, Failure> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let Some(name) = path.file_name() else {
        return Err(Failure::new(Exit::Usage, format!("{} names no file", path.display())));
    };
    let failed = |action: &'static str| move |e: io::Error| Failure::file(action, path, &e);
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = Partial(folder.join(partial));
    let mut file = Guarded {
        file: File::create_new(&partial.0).map_err(failed("create"))?,
        cancel,
    };
    let copied = store
        .copy(digest, &mut file)
        .map_err(|error| match file.is_cancelled() {
            true => Failure::cancelled(),
            false => Failure::file("write", path, &error),
        })?;
    let size = copied?;
    file.file.sync_all().map_err(failed("write"))?;
    std::fs::rename(&partial.0, path).map_err(failed("create"))?;
    Ok(size)
}

/// Removed when dropped; after the rename there is nothing to remove.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Ends a copy when it is cancelled.
struct Guarded {
    file: File,
    cancel: Arc<AtomicBool>,
}

impl Guarded {
    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

impl Write for Guarded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.is_cancelled() {
            true => Err(io::Error::other("cancelled")),
            false => self.file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Print where a content's file is. For reading only: who writes to it or removes it damages the store.
#[derive(Args)]
pub struct PathOf {
    #[arg(value_parser = digest)]
    digest: Digest,
}

impl PathOf {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let Some(blob) = store.blob(&self.digest)? else {
            return Err(crate::store::Error::MissingBlob { digest: self.digest }.into());
        };
        let path = store.path(&self.digest).display().to_string();
        match io.is_json() {
            true => io.json(&json!({"digest": self.digest, "size": blob.size, "path": path}))?,
            false => io.line(&path)?,
        }
        Ok(Exit::Done)
    }
}

/// Exit with 0 if a content is in the store, with 1 if not.
#[derive(Args)]
pub struct Exists {
    #[arg(value_parser = digest)]
    digest: Digest,
}

impl Exists {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let blob = store.blob(&self.digest)?;
        // Some file systems leave so much of a file after a crash: it is not that content.
        let of_nothing = Digest::from_bytes(Sha256::digest([]).into());
        let is_cut = |blob: &BlobInfo| blob.size == 0 && self.digest != of_nothing;
        let blob = blob.filter(|blob| !is_cut(blob));
        if io.is_json() {
            let size = blob.map(|blob| blob.size);
            io.json(&json!({"digest": self.digest, "exists": blob.is_some(), "size": size}))?;
        }
        Ok(if blob.is_some() { Exit::Done } else { Exit::No })
    }
}

/// Remove contents that no stored tree and no running build names.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Rm {
    #[arg(required = true, value_name = "DIGEST", value_parser = digest)]
    digests: Vec<Digest>,
}

impl Rm {
    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let digests: BTreeSet<Digest> = self.digests.into_iter().collect();
        await_collection(site, io);
        let removed = match site.store.remove_blobs(&digests, &site.layers, &io.cancel())? {
            Ok(removed) => removed,
            Err(problems) => {
                for problem in &problems {
                    io.note(&format!("{}: {}", problem.path, problem.message));
                }
                let message = "nothing was removed: what cannot be read may need any content";
                return Err(Failure::new(Exit::Damaged, message)
                    .hint("build the owner again, or `larder store forget` the ref that cannot be read"));
            }
        };
        let mut exit = Exit::Done;
        // The later code is the worse news.
        let mut worse = |other: Exit| {
            if other as u8 > exit as u8 {
                exit = other;
            }
        };
        let mut listed = Vec::new();
        for (digest, outcome) in &removed {
            let (state, by) = match outcome {
                Removed::Gone(size) => {
                    if !io.is_json() {
                        io.line(&format!("removed {digest}, {}", human_size(*size)))?;
                    }
                    ("removed", Vec::new())
                }
                Removed::Missing => {
                    io.note(&format!("{digest} is not in the store"));
                    worse(Exit::NotFound);
                    ("missing", Vec::new())
                }
                Removed::Needed(needed) => {
                    let by = users(needed);
                    io.note(&format!("{digest} stays: it is needed by {}", by.join(", ")));
                    worse(Exit::InUse);
                    ("needed", by)
                }
                Removed::Failed(why) => {
                    io.note(&format!("{digest} is not removed: {why}"));
                    worse(Exit::Failed);
                    ("failed", Vec::new())
                }
            };
            listed.push(json!({"digest": digest, "state": state, "neededBy": by}));
        }
        if io.is_json() {
            io.json(&json!({"blobs": listed}))?;
        }
        Ok(exit)
    }
}

fn users(needed: &Needed) -> Vec<String> {
    let tree = |(tree, names): (&crate::store::TreeDigest, &Vec<String>)| match names.is_empty() {
        true => format!("the tree {tree}"),
        false => format!("the tree {tree} ({})", names.join(", ")),
    };
    let mut by: Vec<String> = needed.trees.iter().map(tree).collect();
    if needed.by_build {
        by.push("a running build".to_owned());
    }
    by
}
