//! Taking contents that the store has lost again from where they came from.
//!
//! Only files that should have a lost content are opened, at the paths that the hurt trees give them, with the same
//! care as in a scan: nothing outside the folder is reached, no link followed, no mount entered, no device opened. A
//! content is kept only if its digest is the lost one. Nothing is published: the trees that name it are whole again.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FileType, OFlags, fstat, statat};
use rustix::io::Errno;
use serde::Serialize;

use super::error::{Error, shown};
use super::leaf::{file_type, same};
use super::roots::SourceDir;
use crate::layer::descent::open_beneath;
use crate::store::{self, Blob, Build, Digest, HurtTree, RefName, Store, TreeDigest, Verification};

/// What is put before it gets its names, in bytes and contents: what a full disk can undo.
const BATCH_BYTES: u64 = 1 << 30;
const BATCH: usize = 1000;
/// Failures that are told of one content.
const SAMPLES: usize = 3;

/// Where contents are looked for.
pub enum Origin<'a> {
    /// In the folder that each hurt tree's ref names as its source. The function opens it, or refuses to.
    Recorded(&'a dyn Fn(&RefName, &str) -> Result<SourceDir, Error>),
    /// In this folder, whatever the refs say.
    Folder(&'a SourceDir),
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Repair {
    /// Contents that are there again, and their bytes.
    pub repaired: u64,
    pub bytes: u64,
    /// Contents that are not, by digest.
    pub lost: Vec<Lost>,
    /// Trees whose manifests are damaged or missing: no content can mend them, only building them again.
    pub rebuild: Vec<TreeDigest>,
}

/// A content that could not be had again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    pub digest: Digest,
    /// Where it was looked for and what was there instead, the first few.
    pub tried: Vec<String>,
}

/// Takes the contents that a verification found damaged or missing again, and marks them as healed in its report.
///
/// Blocks. Ends soon after `cancel` is set; what was taken by then is kept. Fails if the store cannot be written.
pub fn repair(store: &Store, found: &mut Verification, origin: &Origin, cancel: &AtomicBool) -> Result<Repair, Error> {
    // Another file under the same name would be taken for the content, as in any put.
    let stuck = found.bad_blobs.iter().filter_map(|bad| {
        let why = bad.not_moved.as_ref()?;
        let tried = vec![format!("what is wrong is still there: {why}")];
        Some(Lost {
            digest: bad.digest,
            tried,
        })
    });
    let stuck: Vec<Lost> = stuck.collect();
    let repairable = found
        .bad_blobs
        .iter()
        .filter(|bad| !bad.healed && bad.not_moved.is_none());
    let mut work = Work {
        store,
        build: store.build()?,
        pending: Vec::new(),
        pending_bytes: 0,
        healed: BTreeSet::new(),
        bytes: 0,
        lost: repairable.map(|bad| (bad.digest, Vec::new())).collect(),
        cancel,
    };
    for hurt in &found.hurt {
        work.tree(hurt, origin)?;
    }
    work.commit()?;
    for bad in &mut found.bad_blobs {
        bad.healed |= work.healed.contains(&bad.digest);
    }
    let lost = work.lost.into_iter().map(|(digest, tried)| Lost { digest, tried });
    let mut lost: Vec<Lost> = lost.chain(stuck).collect();
    lost.sort_by_key(|one| one.digest);
    Ok(Repair {
        repaired: work.healed.len() as u64,
        bytes: work.bytes,
        lost,
        rebuild: found.bad_manifests.iter().map(|bad| bad.digest).collect(),
    })
}

struct Work<'a> {
    store: &'a Store,
    build: Build,
    /// What was put and has no name yet.
    pending: Vec<Blob>,
    pending_bytes: u64,
    healed: BTreeSet<Digest>,
    bytes: u64,
    /// What is not there yet, and what was tried.
    lost: BTreeMap<Digest, Vec<String>>,
    cancel: &'a AtomicBool,
}

impl Work<'_> {
    fn tree(&mut self, hurt: &HurtTree, origin: &Origin) -> Result<(), Error> {
        let store = self.store;
        let (opened, refused) = match origin {
            Origin::Folder(_) => (Vec::new(), Vec::new()),
            Origin::Recorded(open) => recorded(store, hurt, *open),
        };
        let folders: Vec<&SourceDir> = match origin {
            Origin::Folder(folder) => vec![folder],
            Origin::Recorded(_) => opened.iter().collect(),
        };
        let mut failed = None;
        let listed = store.paths(&hurt.digest, &mut |digest, size, path| {
            if !self.lost.contains_key(digest) {
                return true;
            }
            for why in &refused {
                self.note(digest, why.clone());
            }
            for folder in &folders {
                match self.take(folder, path, digest, size) {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(error) => {
                        failed = Some(error);
                        return false;
                    }
                }
            }
            !self.lost.is_empty() && !self.cancel.load(Ordering::Relaxed)
        });
        match listed {
            // Retention has dropped it since: nothing of it is needed any more.
            Err(store::Error::MissingManifest { .. }) => {}
            listed => listed?,
        }
        failed.map_or(Ok(()), Err)
    }

    fn note(&mut self, digest: &Digest, why: String) {
        if let Some(tried) = self.lost.get_mut(digest)
            && tried.len() < SAMPLES
            && !tried.contains(&why)
        {
            tried.push(why);
        }
    }

    /// Puts one file's content if it is the lost one.
    fn take(&mut self, folder: &SourceDir, path: &[u8], digest: &Digest, size: u64) -> Result<bool, Error> {
        let put = match open(&folder.folder, path, size) {
            Ok(file) => match self.build.put_file_until(&file, self.cancel) {
                Ok(blob) if blob.digest == *digest => Ok(blob),
                Ok(other) => {
                    // One that is not new may be what another lost file was put for, and waits for its name.
                    if other.new {
                        self.build.forget(&other)?;
                    }
                    Err("it has other bytes now".to_owned())
                }
                Err(store::Error::Source(error)) => Err(error.to_string()),
                // The next look at the flag ends it all.
                Err(error @ store::Error::Cancelled) => Err(error.to_string()),
                Err(error) => return Err(error.into()),
            },
            Err(why) => Err(why),
        };
        match put {
            Ok(blob) => {
                self.lost.remove(digest);
                self.pending_bytes = self.pending_bytes.saturating_add(blob.size);
                self.pending.push(blob);
                if self.pending.len() >= BATCH || self.pending_bytes >= BATCH_BYTES {
                    self.commit()?;
                }
                Ok(true)
            }
            Err(why) => {
                self.note(digest, format!("{}/{}: {why}", folder.path().display(), shown(path)));
                Ok(false)
            }
        }
    }

    fn commit(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let build = std::mem::replace(&mut self.build, self.store.build()?);
        build.store_contents()?;
        for blob in self.pending.drain(..) {
            self.bytes = self.bytes.saturating_add(blob.size);
            self.healed.insert(blob.digest);
        }
        self.pending_bytes = 0;
        Ok(())
    }
}

/// The folders that a tree's refs name as their sources, and why others are none.
fn recorded(
    store: &Store,
    hurt: &HurtTree,
    open: &dyn Fn(&RefName, &str) -> Result<SourceDir, Error>,
) -> (Vec<SourceDir>, Vec<String>) {
    let (mut folders, mut refused): (Vec<SourceDir>, Vec<String>) = (Vec::new(), Vec::new());
    for name in hurt.current_of.iter().chain(&hurt.history_of) {
        let opened = ref_source(store, name).and_then(|(ref_name, path)| {
            open(&ref_name, &path).map_err(|error| format!("the source of {name}: {error}"))
        });
        match opened {
            Ok(folder) if folders.iter().any(|known| known.path() == folder.path()) => {}
            Ok(folder) => folders.push(folder),
            Err(why) => refused.push(why),
        }
    }
    if hurt.current_of.is_empty() && hurt.history_of.is_empty() {
        refused.push(format!("no ref names the tree {}, so no source is known", hurt.digest));
    }
    (folders, refused)
}

fn ref_source(store: &Store, name: &str) -> Result<(RefName, String), String> {
    let parsed = name
        .split_once('/')
        .map(|(namespace, name)| RefName::new(namespace, name));
    let Some(Ok(ref_name)) = parsed else {
        return Err(format!("{name} is not the name of a ref"));
    };
    let entry = store.get_ref(&ref_name).map_err(|error| error.to_string())?;
    let source = entry.map(|entry| entry.source).unwrap_or_default();
    match source["directory"]["path"].as_str() {
        Some(path) => Ok((ref_name, path.to_owned())),
        None => Err(format!("the source of {name} is no folder: build the tree again")),
    }
}

/// Opens a file below a folder; the text of why there is none to be had is for people.
fn open(root: &OwnedFd, path: &[u8], size: u64) -> Result<File, String> {
    let text = |errno: Errno| match errno {
        Errno::NOENT | Errno::NOTDIR => "it is not there any more".to_owned(),
        Errno::LOOP => "a symbolic link is in the way".to_owned(),
        Errno::XDEV => "another file system is mounted in the way".to_owned(),
        errno => std::io::Error::from(errno).to_string(),
    };
    let mut folder: Option<OwnedFd> = None;
    let mut names = path.split(|byte| *byte == b'/').peekable();
    while let Some(name) = names.next() {
        let name = CString::new(name).map_err(|_| "its name has a NUL byte".to_owned())?;
        let at = folder.as_ref().unwrap_or(root);
        if names.peek().is_some() {
            let place = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            folder = Some(open_beneath(at, &name, place).map_err(text)?);
            continue;
        }
        let seen = statat(at, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(text)?;
        if file_type(&seen) != FileType::RegularFile {
            return Err("it is not a regular file any more".to_owned());
        }
        if u64::try_from(seen.st_size) != Ok(size) {
            return Err(format!("it has {} bytes now instead of {size}", seen.st_size));
        }
        // Should it have become a FIFO since, `O_NONBLOCK` keeps the opening from waiting.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(open_beneath(at, &name, flags).map_err(text)?);
        return match fstat(&file) {
            Ok(now) if same(&seen, &now) => Ok(file),
            Ok(_) => Err("it is changing just now".to_owned()),
            Err(errno) => Err(text(errno)),
        };
    }
    Err("it has no name".to_owned())
}

#[cfg(test)]
mod tests;
