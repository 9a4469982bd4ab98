//! When the last full verification began, in `runs/verify.json`. Best effort: without it, all blobs are read.

use std::io::Read;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::store::disk::{self, Step};
use crate::store::layout::{Inner, RUNS};
use crate::store::replace::Steps;
use crate::store::{Error, files, time};

const VERSION: u32 = 1;
const NAME: &str = "runs/verify.json";
/// The kernel's file times lag behind the clock, by a tick of it.
const LAG: Duration = Duration::from_secs(1);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    version: u32,
    #[serde(with = "time")]
    full_started: SystemTime,
}

/// What changed at this time or later was not seen by the last full verification. `None` if there was none that is
/// known, or it is said to be of the future: then the clock was set back, and changes since may look older than it.
pub(super) fn last_full(store: &Inner, now: SystemTime) -> Option<SystemTime> {
    let file = disk::open_file(&store.dir, NAME).ok()?;
    let mut text = Vec::new();
    file.take(4096).read_to_end(&mut text).ok()?;
    let record: Record = serde_json::from_slice(&text).ok()?;
    let known = record.version == VERSION && record.full_started <= now;
    known.then(|| record.full_started.checked_sub(LAG)).flatten()
}

/// Should the disk be full, the record that is there stays: it is older, so more is read than need be.
pub(super) fn write_full(store: &Inner, started: SystemTime) -> Result<(), Error> {
    let record = Record {
        version: VERSION,
        full_started: started,
    };
    let text =
        serde_json::to_vec(&record).map_err(|e| Error::io("write", store.path(NAME), std::io::Error::from(e)))?;
    let steps = Steps {
        create: Step::RecordCreate,
        write: Step::RecordWrite,
        sync: Some(Step::RecordSync),
        rename: Step::RecordRename,
        discard: Step::RecordDiscard,
    };
    let written = files::ensure_dir(Step::RunsDir, &store.dir, RUNS)
        .map_err(|e| store.write_error(RUNS, 4096, e))
        .and_then(|()| store.replace(&steps, NAME, &text));
    match written {
        Err(error) if error.is_disk_full() => Ok(()),
        other => other,
    }
}
