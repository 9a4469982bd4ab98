//! What a build may note beside a ref to be faster the next time. Nothing depends on it: it may be gone or old at any
//! time, so it is written without a sync, and its owner checks what it reads.

use std::io::Read;

use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::disk::{self, Step};
use super::layout::CACHE;
use super::replace::Steps;
use super::{Error, RefName, Store, files, layout};

/// No note is larger: room for those of 25 million files.
const MAX: u64 = 512 << 20;

const STEPS: Steps = Steps {
    create: Step::NoteCreate,
    write: Step::NoteWrite,
    sync: None,
    rename: Step::NoteRename,
    discard: Step::NoteDiscard,
};

impl Store {
    /// What was noted beside the ref last, if anything.
    pub fn read_note(&self, name: &RefName) -> Result<Option<Vec<u8>>, Error> {
        let path = path(name);
        let error = |e: std::io::Error| Error::io("read", self.inner.path(&path), e);
        let file = match disk::open_file(&self.inner.dir, path.as_str()) {
            Err(Errno::NOENT) => return Ok(None),
            other => other.map_err(|e| error(e.into()))?,
        };
        let size = file.metadata().map_err(error)?.len();
        if size > MAX {
            return Ok(None);
        }
        let mut note = Vec::with_capacity(size as usize);
        file.take(MAX).read_to_end(&mut note).map_err(error)?;
        Ok(Some(note))
    }

    /// Notes something beside a ref, in the place of what was noted before. It goes with the ref.
    pub fn write_note(&self, name: &RefName, note: &[u8]) -> Result<(), Error> {
        let store = &self.inner;
        if note.len() as u64 > MAX {
            return Ok(());
        }
        store.reserve(note.len() as u64)?;
        files::ensure_dir(Step::CacheDir, &store.dir, CACHE).map_err(|e| store.write_error(CACHE, 4096, e))?;
        store.replace(&STEPS, &path(name), note)
    }
}

impl layout::Inner {
    /// Removes what was noted beside a ref that goes.
    pub fn remove_note(&self, name: &RefName) -> Result<(), Error> {
        let path = path(name);
        match files::remove_file(Step::NoteRemove, &self.dir, path.as_str()) {
            Ok(()) | Err(Errno::NOTDIR) => Ok(()),
            Err(error) => Err(Error::io("remove", self.path(path), error)),
        }
    }
}

/// A hash, because namespace and name together may be longer than a file's name.
fn path(name: &RefName) -> String {
    let hash = Sha256::digest(name.to_string());
    format!("{CACHE}/{}", hex::encode(hash))
}
