//! `node.json`: the last spec that the agent saw, so that it works on while the API server is away, also across its own
//! restart.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::api::NodeStoreSpec;
use crate::cluster::Backoff;
use crate::store;

/// The last spec, below the store's root.
pub const SPEC: &str = "node.json";

/// Largest file that is read, in bytes: more than the API server takes of an object.
const MAX_SIZE: u64 = 8 << 20;

/// What the agent remembers of retention, below the store's root.
pub const MEMORY: &str = "runs/state.json";

/// A NodeStore's spec with what identifies it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedSpec {
    pub uid: String,
    pub generation: i64,
    pub spec: NodeStoreSpec,
}

/// Why a file of the agent could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct FileError {
    path: PathBuf,
    source: io::Error,
}

/// Reads a JSON file of the agent; `None` when there is none.
///
/// # Errors
/// When it is there and cannot be read or understood. The agent then waits for the API server instead.
pub fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, FileError> {
    let failed = |source| FileError {
        path: path.to_owned(),
        source,
    };
    match store::read_bounded(path, MAX_SIZE) {
        Ok(bytes) => parse(&bytes).map(Some).map_err(|error| failed(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// What the bytes of such a file say.
pub(crate) fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}

/// Writes a JSON file of the agent: whole and durable, or not at all.
///
/// # Errors
/// When it cannot be written; the file before it stays.
pub fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    let temporary = path.with_extension("json.new");
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|source| {
        // The error that is told is the first; what is left of this is overwritten by the next try.
        let _ = std::fs::remove_file(&temporary);
        FileError {
            path: path.to_owned(),
            source,
        }
    })
}

/// The files that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Files {
    pub spec: bool,
    pub memory: bool,
}

impl Files {
    fn is_empty(self) -> bool {
        !(self.spec || self.memory)
    }
}

/// What is to be saved: one write at a time, and again if it fails.
#[derive(Default)]
pub struct Saving {
    pub wanted: Files,
    under_way: Option<Files>,
    backoff: Backoff,
}

impl Saving {
    /// What to write now, if anything.
    pub fn begin(&mut self, now: Instant) -> Option<Files> {
        if self.wanted.is_empty() || self.under_way.is_some() || self.backoff.due(now).is_some() {
            return None;
        }
        self.under_way = Some(std::mem::take(&mut self.wanted));
        self.under_way
    }

    /// Lets what failed be tried once more, now.
    pub fn hurry(&mut self) {
        self.backoff.succeeded();
    }

    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Notes how it went.
    pub fn end<E>(&mut self, result: &Result<(), E>, now: Instant) {
        let files = self.under_way.take().unwrap_or_default();
        match result {
            Ok(()) => self.backoff.succeeded(),
            Err(_) => {
                self.wanted.spec |= files.spec;
                self.wanted.memory |= files.memory;
                self.backoff.failed(now);
            }
        }
    }

    /// When to try again what failed.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.backoff.due(now).filter(|_| !self.wanted.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_survives_and_a_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.json");
        assert!(load::<SavedSpec>(&path).unwrap().is_none());
        let saved = SavedSpec {
            uid: "u".into(),
            generation: 3,
            spec: NodeStoreSpec::default(),
        };
        save(&path, &saved).unwrap();
        assert_eq!(load(&path).unwrap(), Some(saved));
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "a temporary file stayed"
        );
        std::fs::write(&path, "{").unwrap();
        assert!(load::<SavedSpec>(&path).unwrap_err().to_string().contains("node.json"));
    }

    #[test]
    fn what_could_not_be_saved_is_saved_later_with_what_changed_meanwhile() {
        let start = Instant::now();
        let mut saving = Saving::default();
        assert_eq!(saving.begin(start), None);
        saving.wanted.memory = true;
        let memory = Files {
            spec: false,
            memory: true,
        };
        assert_eq!(saving.begin(start), Some(memory));
        saving.wanted.spec = true;
        assert_eq!(saving.begin(start), None, "one at a time");
        saving.end(&Err("no room"), start);
        assert_eq!(saving.begin(start), None, "not at once");
        let due = saving.due(start).unwrap();
        let both = Files {
            spec: true,
            memory: true,
        };
        assert_eq!(saving.begin(due), Some(both));
        saving.end(&Ok::<_, &str>(()), due);
        assert_eq!((saving.begin(due), saving.due(due)), (None, None));
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_one_before_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        save(&path, &1).unwrap();
        // A folder in the place of the file cannot be replaced by a file.
        let taken = folder.path().join("taken.json");
        std::fs::create_dir(&taken).unwrap();
        assert!(save(&taken, &2).unwrap_err().to_string().contains("taken.json"));
        save(&path, &3).unwrap();
        assert_eq!(load::<u8>(&path).unwrap(), Some(3));
        let mut names: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["state.json", "taken.json"]);
    }
}
