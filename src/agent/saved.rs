//! `node.json`: the last spec that the agent saw, so that it works on while the API server is away, also across its own
//! restart.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::api::NodeStoreSpec;
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
    write().map_err(|source| FileError {
        path: path.to_owned(),
        source,
    })
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
}
