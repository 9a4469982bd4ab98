//! `export`: a tree as files, or as a tar stream.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::text::{counted, human_size};
use super::trees::{Named, find};
use super::{tar, text};
use crate::store::tree::Tree;
use crate::store::{ExportWatch, Reader, remove_all};

/// Write a tree as files, or as a tar stream.
///
/// Contents, hard links, owners, modes, extended attributes and times are restored; what the file system cannot keep
/// is an error. What was written until then is removed.
#[derive(Args)]
pub struct Export {
    /// A tree: a ref, a digest, or the beginning of one.
    tree: String,
    /// An empty folder, or one that is made.
    #[arg(required_unless_present = "tar")]
    dest: Option<PathBuf>,
    /// Write a tar stream to stdout instead (pax, with SCHILY.xattr records).
    #[arg(long, conflicts_with_all = ["dest", "owner"])]
    tar: bool,
    /// The owner of every entry, instead of the tree's: numbers, as UID:GID.
    #[arg(long, value_name = "UID:GID", value_parser = owner)]
    owner: Option<(u32, u32)>,
}

fn owner(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once(':').and_then(|(uid, gid)| {
        let number = |text: &str| text.parse::<u32>().ok();
        Some((number(uid)?, number(gid)?))
    });
    numbers.ok_or_else(|| "expected two numbers, as in 1000:1000".to_owned())
}

impl Export {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let named = find(store, &self.tree)?;
        let tree = named.load(store)?;
        match self.dest {
            Some(dest) => to_folder(store, &named, &tree, &dest, self.owner, io),
            None => to_tar(store, &tree, io),
        }
    }
}

fn to_folder(
    store: &Reader,
    named: &Named,
    tree: &Tree,
    dest: &Path,
    owner: Option<(u32, u32)>,
    io: &mut Io,
) -> Result<Exit, Failure> {
    let existed = is_ready(dest)?;
    let claim = claim(dest, existed)?;
    let mode = claim.as_ref().and_then(|folder| folder.metadata().ok());
    let stats = tree.stats();
    let watch = Arc::new(ExportWatch {
        cancel: io.cancel(),
        ..ExportWatch::default()
    });
    let bar = io.progress("writing, entries", stats.entries);
    let ended = Arc::new(AtomicBool::new(false));
    if !bar.is_hidden() {
        let (bar, watch, ended) = (bar.clone(), watch.clone(), ended.clone());
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                bar.set_position(watch.entries.load(Ordering::Relaxed));
                std::thread::sleep(Duration::from_millis(200));
            }
        });
    }
    let exported = store.export_watched(tree, dest, owner, &watch);
    ended.store(true, Ordering::Relaxed);
    bar.finish_and_clear();
    if let Err(error) = exported {
        let mut failure = Failure::from(error);
        if failure.exit == Exit::Full {
            failure.message = format!("{}: {}", dest.display(), failure.message);
            failure.hint = Some("free space on the disk of that folder".to_owned());
        }
        let cleared = clear(dest, existed).and_then(|()| match (&claim, mode) {
            // The export made it private.
            (Some(folder), Some(before)) if existed => folder.set_permissions(before.permissions()),
            _ => Ok(()),
        });
        return Err(match cleared {
            Ok(()) => failure,
            Err(left) => failure.hint(format!("the folder could not be made as it was: {left}")),
        });
    }
    match io.is_json() {
        true => io.json(&json!({
            "digest": named.digest,
            "dest": dest.display().to_string(),
            "files": stats.files,
            "entries": stats.entries,
            "size": stats.logical,
        }))?,
        false => {
            let (files, size) = (counted(stats.files, "file", "files"), human_size(stats.logical));
            io.line(&format!("{files}, {size} in {}", dest.display()))?;
        }
    }
    Ok(Exit::Done)
}

/// Does the folder exist? Fails unless it is empty then: nothing of somebody else is removed after a failure.
fn is_ready(dest: &Path) -> Result<bool, Failure> {
    match std::fs::read_dir(dest) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::file("list", dest, &error)),
        Ok(mut entries) => match entries.next() {
            None => Ok(true),
            Some(_) => {
                let message = format!("{} is not empty", dest.display());
                Err(Failure::new(Exit::Failed, message).hint("name an empty folder, or one that does not exist"))
            }
        },
    }
}

/// Keeps other exports out of the folder, until it is dropped: each would remove what the other has written, should it
/// fail.
fn claim(dest: &Path, exists: bool) -> Result<Option<File>, Failure> {
    if !exists && std::fs::create_dir(dest).is_err() && !dest.is_dir() {
        // The export finds out why, and says it better.
        return Ok(None);
    }
    let folder = File::open(dest).map_err(|error| Failure::file("open", dest, &error))?;
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let message = format!("another export writes into {}", dest.display());
            return Err(Failure::new(Exit::InUse, message).hint("name another folder"));
        }
        // Not every file system has locks.
        Err(_) => return Ok(Some(folder)),
    }
    // One may have come to its end since it was looked.
    is_ready(dest)?;
    Ok(Some(folder))
}

fn clear(dest: &Path, keep_folder: bool) -> std::io::Result<()> {
    if !keep_folder {
        return remove_all(dest);
    }
    for entry in std::fs::read_dir(dest)? {
        remove_all(&entry?.path())?;
    }
    Ok(())
}

fn to_tar(store: &Reader, tree: &Tree, io: &mut Io) -> Result<Exit, Failure> {
    if io.is_stdout_terminal() {
        let message = "a tar stream is not for a terminal";
        return Err(Failure::new(Exit::Usage, message).hint("write it to a file or pipe it into a program"));
    }
    let cancel = io.cancel();
    let bar = io.progress("writing, bytes", tree.stats().logical);
    let mut out = Watched {
        out: io.stdout(),
        bar: bar.clone(),
        cancel: cancel.clone(),
    };
    let written = tar::write(store, tree, &mut out);
    bar.finish_and_clear();
    let left_out = match written {
        Ok(left_out) => left_out?,
        Err(_) if cancel.load(Ordering::Relaxed) => return Err(Failure::cancelled()),
        Err(error) => return Err(Failure::output(&error)),
    };
    for path in left_out {
        io.note(&format!("{} is left out: tar has no sockets", text::shown(&path)));
    }
    Ok(Exit::Done)
}

/// Counts what goes through, and ends when it is cancelled.
struct Watched<'a> {
    out: &'a mut dyn Write,
    bar: indicatif::ProgressBar,
    cancel: Arc<AtomicBool>,
}

impl Write for Watched<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("cancelled"));
        }
        let written = self.out.write(bytes)?;
        self.bar.inc(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
