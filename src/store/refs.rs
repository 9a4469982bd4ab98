//! Refs: which tree a name stands for now, and which ones it stood for before.
//!
//! One JSON file per ref at `refs/<namespace>/<name>`, replaced whole. A ref that cannot be read is reported, never
//! taken for absent.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::disk::{self, Step};
use super::error::is_full;
use super::files::{self, lock};
use super::layout::{Folder, Inner, REFS, SPARE};
use super::replace::Steps;
use super::{Error, Problem, Reader, Store, TreeDigest, remove, time};

/// The version of a ref's file.
const VERSION: u32 = 1;
/// No ref is larger: sources are bounded by the API, histories by their limit.
const MAX_REF: u64 = 1 << 20;
/// Room set aside for rewriting a ref on a full disk.
const SPARE_SIZE: usize = 64 << 10;

/// The name of a ref: a namespace (DNS-1123 label) and a name in it (DNS-1123 subdomain), so safe as a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct RefName {
    namespace: String,
    name: String,
}

impl RefName {
    /// Fails with [`Error::InvalidName`] if either is not what Kubernetes takes for a namespace or a name.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Result<Self, Error> {
        let (namespace, name) = (namespace.into(), name.into());
        if !is_label(&namespace, 63) {
            return Err(Error::InvalidName {
                what: "namespace",
                text: namespace.chars().take(300).collect(),
            });
        }
        if name.len() > 253 || !name.split('.').all(|part| is_label(part, 253)) {
            return Err(Error::InvalidName {
                what: "name",
                text: name.chars().take(300).collect(),
            });
        }
        Ok(Self { namespace, name })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn path(&self) -> String {
        format!("{REFS}/{self}")
    }
}

impl fmt::Display for RefName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

fn is_label(text: &str, longest: usize) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=longest).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// One tree that a ref stands for, as its build left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Revision {
    pub digest: TreeDigest,
    /// Names of regular files.
    pub files: u64,
    /// Names of every type, without the root.
    pub entries: u64,
    /// Bytes of all files; a hard-linked file counts once.
    pub size: u64,
    /// Bytes of the distinct contents.
    pub unique: u64,
    /// Bytes that the build added to the store: contents that were not there before.
    pub added: u64,
    #[serde(with = "time")]
    pub built_at: SystemTime,
}

/// A revision that its ref no longer stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Retired {
    pub revision: Revision,
    #[serde(with = "time")]
    pub retired_at: SystemTime,
}

/// What is recorded of a ref.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ref {
    pub name: RefName,
    /// UID of the object that the ref belongs to, or belonged to last.
    pub owner: String,
    /// Generation of the owner's spec that the current revision was built from.
    pub generation: i64,
    /// The rebuild request that the current revision answers, if any.
    pub request: Option<String>,
    /// Where the tree came from, as its owner wrote it.
    pub source: serde_json::Value,
    /// `None` after the owner is gone.
    pub current: Option<Revision>,
    /// Former revisions, the newest first.
    pub history: Vec<Retired>,
    /// How many former revisions are kept at most.
    pub history_limit: u32,
}

/// All refs that could be read, by name, and the files that could not.
#[derive(Debug, Clone, Default)]
pub struct Refs {
    pub refs: Vec<Ref>,
    pub unreadable: Vec<Problem>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    version: u32,
    owner: String,
    generation: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<String>,
    #[serde(default)]
    source: serde_json::Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<Revision>,
    #[serde(default)]
    history: Vec<Retired>,
    history_limit: u32,
}

impl Ref {
    fn parse(name: &RefName, text: &[u8]) -> Result<Ref, String> {
        let stored: Stored = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if stored.version != VERSION {
            return Err(format!(
                "it has version {}; this program reads version {VERSION}",
                stored.version
            ));
        }
        Ok(Ref {
            name: name.clone(),
            owner: stored.owner,
            generation: stored.generation,
            request: stored.request,
            source: stored.source,
            current: stored.current,
            history: stored.history,
            history_limit: stored.history_limit,
        })
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(&Stored {
            version: VERSION,
            owner: self.owner.clone(),
            generation: self.generation,
            request: self.request.clone(),
            source: self.source.clone(),
            current: self.current.clone(),
            history: self.history.clone(),
            history_limit: self.history_limit,
        })
    }

    /// The current revision becomes history.
    pub(super) fn retire(&mut self, now: SystemTime) {
        if let Some(revision) = self.current.take() {
            self.history.retain(|old| old.revision.digest != revision.digest);
            let retired = Retired {
                revision,
                retired_at: now,
            };
            self.history.insert(0, retired);
        }
    }

    pub(super) fn apply_limit(&mut self) {
        // Stable: revisions that were retired at one time stay in their order.
        self.history
            .sort_by_key(|retired| std::cmp::Reverse(retired.retired_at));
        self.history.truncate(self.history_limit as usize);
    }
}

/// Reads the file of a ref and writes what was read, as inputs of tests and fuzz targets.
#[cfg(any(test, fuzzing))]
pub fn parse_ref(text: &[u8]) -> Result<(Ref, Vec<u8>), String> {
    let name = RefName::new("namespace", "name").map_err(|e| e.to_string())?;
    let found = Ref::parse(&name, text)?;
    // Whatever was read can be written.
    let json = found.to_json().unwrap_or_else(|e| panic!("{found:?}: {e}"));
    Ok((found, json))
}

impl Reader {
    /// Every ref, by name. Fails only if a folder of refs cannot be listed.
    pub fn refs(&self) -> Result<Refs, Error> {
        self.folder.refs()
    }

    /// One ref; `None` if there is none. Fails with [`Error::BadRef`] if it is damaged.
    pub fn get_ref(&self, name: &RefName) -> Result<Option<Ref>, Error> {
        self.folder.read_ref(name)
    }
}

impl Store {
    /// The ref's owner is gone: its current revision becomes history, and the ref's limit is applied. A ref without
    /// history goes. `false` if there is no such ref, or it belongs to somebody else by now.
    pub fn retire(&self, name: &RefName, owner: &str, now: SystemTime) -> Result<bool, Error> {
        let store = &self.inner;
        let _guard = store.lock_ref(name);
        let Some(mut found) = store.read_ref(name)? else {
            return Ok(false);
        };
        if found.owner != owner {
            return Ok(false);
        }
        if found.current.is_none() {
            return Ok(true);
        }
        found.retire(now);
        found.apply_limit();
        store.write_ref(&found)?;
        Ok(true)
    }

    /// Removes a ref, also one that cannot be read: its trees go with the next collection unless something else
    /// needs them.
    pub fn forget(&self, name: &RefName) -> Result<(), Error> {
        let _guard = self.inner.lock_ref(name);
        self.inner.remove_ref(name)
    }
}

impl Folder {
    pub fn read_ref(&self, name: &RefName) -> Result<Option<Ref>, Error> {
        let bad = |message: String| Error::BadRef {
            name: name.to_string(),
            message,
        };
        // What is no file is damage. Any other failure may pass: the ref is not to be written over for it.
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(libc::ELOOP | libc::EISDIR | libc::ENXIO) => bad(error.to_string()),
            _ => Error::io("read", self.path(name.path()), error),
        };
        let file = match disk::open_file(&self.dir, name.path()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => other.map_err(|e| failed(e.into()))?,
        };
        let mut text = Vec::new();
        let mut limited = io::Read::take(disk::Reader::new(Step::RefRead, &file), MAX_REF + 1);
        io::Read::read_to_end(&mut limited, &mut text).map_err(failed)?;
        if text.len() as u64 > MAX_REF {
            return Err(bad(format!("it is larger than {MAX_REF} bytes")));
        }
        Ref::parse(name, &text).map(Some).map_err(bad)
    }

    pub fn refs(&self) -> Result<Refs, Error> {
        let mut found = Refs::default();
        let top = files::open_dir(&self.dir, REFS).map_err(|e| Error::io("open", self.path(REFS), e))?;
        for (namespace, _) in files::names(&top).map_err(|e| Error::io("list", self.path(REFS), e))? {
            let path = self.path(REFS).join(std::ffi::OsStr::from_bytes(namespace.to_bytes()));
            let dir = match files::open_dir(&top, namespace.as_c_str()) {
                Ok(dir) => dir,
                // Its last ref has just gone.
                Err(Errno::NOENT) => continue,
                Err(error) => {
                    found.unreadable.push(Problem {
                        path: path.display().to_string(),
                        message: format!(
                            "cannot be listed: {}; remove it if it is not the store's",
                            io::Error::from(error)
                        ),
                    });
                    continue;
                }
            };
            for (name, _) in files::names(&dir).map_err(|e| Error::io("list", &path, e))? {
                let file = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
                let read = match (namespace.to_str(), name.to_str()) {
                    (Ok(namespace), Ok(name)) => RefName::new(namespace, name).and_then(|name| self.read_ref(&name)),
                    _ => Err(Error::InvalidName {
                        what: "name",
                        text: name.to_string_lossy().into_owned(),
                    }),
                };
                match read {
                    Ok(Some(entry)) => found.refs.push(entry),
                    // It has just gone.
                    Ok(None) => {}
                    Err(error) => found.unreadable.push(Problem {
                        path: file.display().to_string(),
                        message: error.to_string(),
                    }),
                }
            }
        }
        found.refs.sort_by(|a, b| a.name.cmp(&b.name));
        found.unreadable.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }
}

impl Inner {
    pub fn lock_ref(&self, name: &RefName) -> MutexGuard<'_, ()> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let locks: &[Mutex<()>] = &self.ref_locks;
        lock(&locks[(hasher.finish() % locks.len() as u64) as usize])
    }

    /// Writes a ref's new content to a name in staging; [`Inner::name_ref`] puts it in place. The caller syncs
    /// between the two.
    ///
    /// With `spare`, where there is no room it is written into the spare file. That is for what makes room, not for a
    /// publish: it would leave none for dropping history on a disk that is full then.
    pub fn stage_ref(&self, entry: &Ref, staged: &str, spare: bool) -> Result<File, Error> {
        let text = entry
            .to_json()
            .map_err(|e| Error::io("write", self.path(entry.name.path()), io::Error::from(e)))?;
        // It could not be read again, and a ref that cannot be read loses its history.
        if text.len() as u64 > MAX_REF {
            let most = format!("it would be larger than {MAX_REF} bytes: keep less history, or exclude by fewer globs");
            let error = io::Error::new(io::ErrorKind::InvalidInput, most);
            return Err(Error::io("write", self.path(entry.name.path()), error));
        }
        match self.write_new([Step::RefCreate, Step::RefWrite], staged, &text) {
            // History must be droppable on a full disk, where dropping it is what makes room.
            Err(error) if spare && is_full(&error) && self.write_spare(staged, &text)? => self.reopen(staged),
            Err(error) => Err(self.write_error(staged, text.len() as u64, error)),
            Ok(file) => Ok(file),
        }
    }

    fn reopen(&self, name: &str) -> Result<File, Error> {
        disk::open_for_writing(&self.dir, name).map_err(|e| self.write_error(name, 4096, e))
    }

    /// Writes into the blocks of the spare file, so that none have to be free. `false` if there is no spare, or the
    /// text is too long for it.
    fn write_spare(&self, name: &str, text: &[u8]) -> Result<bool, Error> {
        if text.len() > SPARE_SIZE {
            return Ok(false);
        }
        match disk::rename(Step::SpareTake, &self.dir, SPARE, &self.dir, name) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(self.write_error(SPARE, text.len() as u64, error)),
        }
        let file = self.reopen(name)?;
        files::write_at(Step::SpareFill, file.as_fd(), text, 0, 0)
            .and_then(|()| Ok(disk::truncate(Step::SpareTruncate, &file, text.len() as u64)?))
            .map_err(|e| self.write_error(name, text.len() as u64, e))?;
        Ok(true)
    }

    /// Sets aside the room that a ref needs. On a full disk there is none to be had, which is no error.
    pub fn ensure_spare(&self) -> Result<(), Error> {
        let stat = files::stat(&self.dir, SPARE).map_err(|e| Error::io("look at", self.path(SPARE), e))?;
        if stat.is_some_and(|stat| stat.st_size == SPARE_SIZE as i64) {
            return Ok(());
        }
        let steps = Steps {
            create: Step::SpareCreate,
            write: Step::SpareWrite,
            sync: Some(Step::SpareSync),
            rename: Step::SpareRename,
            discard: Step::SpareDiscard,
        };
        match self.replace(&steps, SPARE, &[0; SPARE_SIZE]) {
            Err(error) if error.is_disk_full() => Ok(()),
            other => other,
        }
    }

    pub fn name_ref(&self, name: &RefName, staged: &str) -> Result<(), Error> {
        let namespace = format!("{REFS}/{}", name.namespace);
        let error = |e: Errno| self.write_error(name.path(), 4096, e);
        // A namespace's folder goes with its last ref, perhaps between these two calls.
        for _ in 0..100 {
            files::ensure_dir(Step::NamespaceDir, &self.dir, &namespace).map_err(error)?;
            match disk::rename(Step::RefRename, &self.dir, staged, &self.dir, name.path()) {
                Ok(()) => return Ok(()),
                Err(Errno::NOENT) if matches!(files::stat(&self.dir, namespace.as_str()), Ok(None)) => {}
                Err(other) => return Err(error(other)),
            }
        }
        Err(error(Errno::NOENT))
    }

    /// Writes a ref durably, or removes it if it stands for nothing. Call with its lock held.
    pub fn write_ref(&self, entry: &Ref) -> Result<(), Error> {
        if entry.current.is_none() && entry.history.is_empty() {
            return self.remove_ref(&entry.name);
        }
        let staged = self.staging_name("ref");
        let written = self.stage_ref(entry, &staged, true).and_then(|file| {
            disk::fsync(Step::RefSync, &file).map_err(|e| self.write_error(&staged, 4096, e))?;
            self.name_ref(&entry.name, &staged)?;
            self.sync_namespace(&entry.name)
        });
        if written.is_err() {
            // Nothing to add to the error that is being reported; the next start empties staging.
            let _ = files::remove_file(Step::RefDiscard, &self.dir, staged.as_str());
        }
        written
    }

    /// Removes a ref durably, readable or not. Needs no free space. Call with its lock held.
    pub fn remove_ref(&self, name: &RefName) -> Result<(), Error> {
        self.remove_note(name)?;
        match files::remove_file(Step::RefRemove, &self.dir, name.path()) {
            Ok(()) => {}
            // Something that no store makes, in a ref's place.
            Err(Errno::ISDIR) => remove::remove_tree(&self.dir, name.path().as_str())
                .map_err(|e| Error::io("remove", self.path(name.path()), e))?,
            Err(Errno::NOTDIR) => return Ok(()),
            Err(error) => return Err(Error::io("remove", self.path(name.path()), error)),
        }
        self.sync_namespace(name)?;
        let namespace = format!("{REFS}/{}", name.namespace);
        match disk::rmdir(Step::NamespaceRemove, &self.dir, namespace.as_str()) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
            Err(error) => Err(Error::io("remove", self.path(namespace), error)),
        }
    }

    fn sync_namespace(&self, name: &RefName) -> Result<(), Error> {
        let namespace = format!("{REFS}/{}", name.namespace);
        let error = |e| Error::io("sync", self.path(&namespace), e);
        match files::open_dir(&self.dir, namespace.as_str()) {
            Ok(dir) => disk::fsync(Step::NamespaceSync, dir).map_err(error),
            // Gone with its last ref, whose removal the next sync makes durable.
            Err(Errno::NOENT) => Ok(()),
            Err(other) => Err(error(other)),
        }
    }
}
