use std::io;
use std::path::{Path, PathBuf};

use super::LayerId;
use crate::store::{self, TreeDigest};

/// Why something with a layer failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// `kernel` is empty or starts with `: `.
    #[error("cannot mount: {what} at {}: {source}{kernel}", target.display())]
    Mount {
        what: &'static str,
        target: PathBuf,
        source: io::Error,
        kernel: String,
    },
    /// The text is not a UUID in its lower-case form.
    #[error("{0:?} is not a layer's id: expected a UUID in lower case, as in an object's metadata.uid")]
    InvalidId(String),
    #[error("layer {id}: its data is lost: {reason}; delete the layer and make a new one")]
    DataLost { id: LayerId, reason: String },
    #[error("{}: {message}; repair the file, or release the layer to give up its data", path.display())]
    Record { path: PathBuf, message: String },
    #[error("layer {id}: its {field} cannot change: it was made with {recorded}, and {wanted} is asked for")]
    Immutable {
        id: LayerId,
        field: &'static str,
        recorded: String,
        wanted: String,
    },
    #[error("layer {id}: its release has begun and must be finished")]
    Releasing { id: LayerId },
    #[error("layer {id} is in use by {by}")]
    InUse { id: LayerId, by: String },
    /// `waits` names what for.
    #[error(
        "layer {id}: its own file system takes no writes any more after an error, of which the node's kernel log tells; \
         to be checked and mounted anew it waits for {waits}"
    )]
    Stopped { id: LayerId, waits: String },
    #[error("layer {id}: a size can only grow: it is {from} bytes, {to} are asked for")]
    Shrink { id: LayerId, from: u64, to: u64 },
    #[error("layer {id}: {size} bytes are too few: at least {least} are needed")]
    TooSmall { id: LayerId, size: u64, least: u64 },
    #[error("layer {id} was made without a limit, and cannot get one")]
    Unlimited { id: LayerId },
    #[error("layer {id} is read-only: there is nothing that was changed in it")]
    ReadOnly { id: LayerId },
    #[error("layer {id} is not on this node")]
    NotFound { id: LayerId },
    #[error("layer {id} is not mounted: prepare it first")]
    NotMounted { id: LayerId },
    #[error("{} is taken: {source_name:?} is mounted there; unmount it", path.display())]
    Occupied { path: PathBuf, source_name: String },
    #[error("tree {tree}: {} cannot be a lower layer: {reason}", path.display())]
    Unmountable {
        tree: TreeDigest,
        path: PathBuf,
        reason: &'static str,
    },
    #[error("the road {road} does not go to its end here: {message}")]
    Probe { road: super::Road, message: String },
    #[error("{command}: {message}")]
    Command { command: String, message: String },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Error {
        Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// For what the store asks of layers ([`Holders`](store::Holders)).
impl From<Error> for store::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Store(error) => error,
            Error::Io { action, path, source } => store::Error::Io { action, path, source },
            other => store::Error::Io {
                action: "read",
                path: "layers".into(),
                source: io::Error::other(other.to_string()),
            },
        }
    }
}

/// Adds action and path to an I/O error.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error::io(action, path, source))
    }
}

impl<T> IoContext<T> for rustix::io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|errno| Error::io(action, path, errno.into()))
    }
}
