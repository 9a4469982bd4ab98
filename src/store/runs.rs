//! Records of collections in `runs/`: what each did, by which policy, and everything that went, with the reason.
//!
//! A record is a file of lines, each a JSON object: the first is the [`RunRecord`], each further one a [`Gone`]. Records
//! are for people and take a bounded part of the disk: the oldest go first, and of a run that removed more than fits
//! only so much is listed. They are not synced: after a crash one may be cut.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::str::FromStr;
use std::time::SystemTime;

use jiff::Timestamp;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::disk::{self, Step};
use super::gc::{Gone, Removals, Report};
use super::layout::{Folder, RUNS};
use super::{Error, Problem, Reader, Store, files};

const VERSION: u32 = 1;
const SUFFIX: &str = ".jsonl";
/// Records that are kept, at most …
const MOST: usize = 100;
/// … and their bytes together, at most, the newest one's among them: also no more than a 500th of the file system. Of a
/// run no more is listed than a 20th of what is free on it, but for that no older record goes: a disk that was full is when
/// they are read.
const MOST_BYTES: u64 = 256 << 20;
/// Longest first line that is read, in bytes: it names dropped history.
const MAX_HEAD: u64 = 16 << 20;
/// Longest other line.
const MAX_LINE: u64 = 4096;

/// The name of a record: the time at which the run began, in UTC, as `20261128T030000.000Z`. Their order is that of time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct RunId(String);

impl RunId {
    fn of(time: SystemTime) -> RunId {
        let time = Timestamp::try_from(time).unwrap_or_default();
        RunId(time.strftime("%Y%m%dT%H%M%S%.3fZ").to_string())
    }
}

impl FromStr for RunId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<RunId, &'static str> {
        let form = b"00000000T000000.000Z";
        let digit_or = |(byte, form): (u8, &u8)| byte == *form || (*form == b'0' && byte.is_ascii_digit());
        match text.len() == form.len() && text.bytes().zip(form).all(digit_or) {
            true => Ok(RunId(text.to_owned())),
            false => Err("not the name of a run, such as 20261128T030000.000Z"),
        }
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The records that there are.
#[derive(Debug, Default)]
pub struct Runs {
    /// The oldest first.
    pub runs: Vec<(RunId, RunRecord)>,
    pub unreadable: Vec<Problem>,
}

/// What a run did.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunRecord {
    version: u32,
    /// Who asked, and the policy, as whoever ran it tells.
    pub about: serde_json::Value,
    /// How many of the things that went are listed.
    pub listed: u64,
    pub went: u64,
    #[serde(flatten)]
    pub report: Report,
}

impl Store {
    /// Keeps the record of a run. `about` says who asked for it and by which policy.
    ///
    /// Fails on a full disk, for one: the run itself is over then and has done what it did.
    pub fn record_run(&self, report: &Report, removals: &Removals, about: &serde_json::Value) -> Result<RunId, Error> {
        let store = &self.inner;
        let failed = |e: io::Error| store.write_error(RUNS, 4096, e);
        files::ensure_dir(Step::RunsDir, &store.dir, RUNS).map_err(|e| failed(e.into()))?;
        let (budget, most) = budgets(store).map_err(failed)?;
        let staged = store.staging_name("run");
        let written = self.write_run(&staged, report, removals, about, most);
        let named = written.and_then(|()| {
            let mut id = RunId::of(report.started);
            // Two runs in one millisecond: the later one is named after a later time.
            for more in 1..1000 {
                let path = path_of(&id);
                match disk::rename_new(Step::RunRename, &store.dir, staged.as_str(), &store.dir, path.as_str()) {
                    Ok(()) => return Ok(id),
                    Err(Errno::EXIST) => id = RunId::of(report.started + std::time::Duration::from_millis(more)),
                    Err(error) => return Err(error.into()),
                }
            }
            Err(Errno::EXIST.into())
        });
        let id = named.map_err(|e| {
            // Nothing to add to the error that is being reported; the next start empties staging.
            let _ = files::remove_file(Step::RunDiscard, &store.dir, staged.as_str());
            failed(e)
        })?;
        prune(store, MOST, budget)?;
        Ok(id)
    }

    fn write_run(
        &self,
        staged: &str,
        report: &Report,
        removals: &Removals,
        about: &serde_json::Value,
        budget: u64,
    ) -> Result<(), io::Error> {
        let flags = OFlags::WRONLY | OFlags::EXCL;
        let file = disk::create(Step::RunCreate, &self.inner.dir, staged, flags, 0o600)?;
        let mut out = BufWriter::with_capacity(1 << 20, disk::Writer::new(Step::RunWrite, file));
        // The first line says how many follow: so they are counted before they are written.
        let mut lines = Vec::new();
        let (mut listed, mut size) = (0, 0u64);
        for gone in removals.iter() {
            lines.clear();
            serde_json::to_writer(&mut lines, &gone)?;
            size += lines.len() as u64 + 1;
            if size > budget {
                break;
            }
            listed += 1;
        }
        let record = RunRecord {
            version: VERSION,
            about: about.clone(),
            listed,
            went: removals.len() as u64,
            report: report.clone(),
        };
        serde_json::to_writer(&mut out, &record)?;
        out.write_all(b"\n")?;
        for gone in removals.iter().take(listed as usize) {
            serde_json::to_writer(&mut out, &gone)?;
            out.write_all(b"\n")?;
        }
        out.flush()
    }
}

fn path_of(id: &RunId) -> String {
    format!("{RUNS}/{id}{SUFFIX}")
}

/// How many bytes all records may take, and the list of a new one.
fn budgets(store: &Folder) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstatvfs(&store.dir)?;
    let total = stat.f_blocks.saturating_mul(stat.f_frsize);
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let all = MOST_BYTES.min(total / 500);
    Ok((all, all.min(free / 20)))
}

/// Removes the oldest records until there are at most so many, of at most so many bytes. The newest stays.
fn prune(store: &Folder, most: usize, budget: u64) -> Result<(), Error> {
    let failed = |e: Errno| Error::io("remove a record from", store.path(RUNS), e);
    let dir = files::open_dir(&store.dir, RUNS).map_err(failed)?;
    let mut size = 0u64;
    for (number, id) in names(store)?.into_iter().rev().enumerate() {
        let name = format!("{id}{SUFFIX}");
        let stat = files::stat(&dir, name.as_str()).map_err(failed)?;
        size = size.saturating_add(stat.map_or(0, |stat| stat.st_size.max(0) as u64));
        if number >= most || (number > 0 && size > budget) {
            files::remove_file(Step::RunRemove, &dir, name.as_str()).map_err(failed)?;
        }
    }
    Ok(())
}

/// All records, the oldest first. Other names are left alone.
fn names(store: &Folder) -> Result<Vec<RunId>, Error> {
    let failed = |e: Errno| Error::io("list", store.path(RUNS), e);
    let dir = match files::open_dir(&store.dir, RUNS) {
        Err(Errno::NOENT) => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found: Vec<RunId> = files::names(&dir)
        .map_err(failed)?
        .into_iter()
        .filter_map(|(name, _)| name.to_str().ok()?.strip_suffix(SUFFIX)?.parse().ok())
        .collect();
    found.sort();
    Ok(found)
}

impl Reader {
    /// The records of all runs.
    pub fn runs(&self) -> Result<Runs, Error> {
        let mut found = Runs::default();
        for id in names(&self.folder)? {
            match self.open_run(&id) {
                Ok((record, _)) => found.runs.push((id, record)),
                Err(error) => found.unreadable.push(Problem {
                    path: self.folder.path(path_of(&id)).display().to_string(),
                    message: error.to_string(),
                }),
            }
        }
        Ok(found)
    }

    /// The record of a run, and all that is listed in it, shown to `visit` one by one in the order in which it went.
    ///
    /// Fails with an error of the kind `NotFound` if there is no such record.
    pub fn run(&self, id: &RunId, visit: &mut dyn FnMut(Gone)) -> Result<RunRecord, Error> {
        let failed = |e: io::Error| Error::io("read", self.folder.path(path_of(id)), e);
        let (record, mut lines) = self.open_run(id).map_err(failed)?;
        while let Some(gone) = line(&mut lines, MAX_LINE).map_err(failed)? {
            visit(gone);
        }
        Ok(record)
    }

    fn open_run(&self, id: &RunId) -> io::Result<(RunRecord, BufReader<File>)> {
        let mut lines = BufReader::new(disk::open_file(&self.folder.dir, path_of(id))?);
        Ok((head(&mut lines)?, lines))
    }
}

fn head(lines: &mut impl BufRead) -> io::Result<RunRecord> {
    let record: RunRecord = line(lines, MAX_HEAD)?.ok_or_else(|| invalid("it is empty".to_owned()))?;
    match record.version {
        VERSION => Ok(record),
        other => Err(invalid(format!(
            "it has the version {other}; this program reads {VERSION}"
        ))),
    }
}

/// Reads a whole record; tells how many things it lists.
#[cfg(any(test, fuzzing))]
pub fn parse_run(mut bytes: &[u8]) -> io::Result<(RunRecord, u64)> {
    let record = head(&mut bytes)?;
    let mut listed = 0;
    while line::<Gone>(&mut bytes, MAX_LINE)?.is_some() {
        listed += 1;
    }
    Ok((record, listed))
}

/// The next line of at most so many bytes; `None` at the end.
fn line<T: serde::de::DeserializeOwned>(lines: &mut impl BufRead, most: u64) -> io::Result<Option<T>> {
    let mut text = Vec::new();
    lines.by_ref().take(most).read_until(b'\n', &mut text)?;
    if text.is_empty() {
        return Ok(None);
    }
    if text.last() != Some(&b'\n') {
        return Err(invalid("it is cut off, or has a line that is too long".to_owned()));
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| invalid(e.to_string()))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;
    use crate::store::testing::*;
    use crate::store::{Collecting, Kind, Options};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn run(store: &Store, dry_run: bool, now: SystemTime) -> (Report, Removals) {
        let how = Collecting {
            dry_run,
            now,
            rate: None,
            cancel: &false.into(),
        };
        store.collect_with(&nothing_kept(), &Trees(Vec::new()), &how).unwrap()
    }

    #[test]
    fn a_run_is_recorded_with_everything_that_went() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Options::default()).unwrap();
        publish(&store, "gone", &[("one", b"1"), ("two", b"22")]);
        store.retire(&name("gone"), "uid-1", SystemTime::now()).unwrap();
        assert_eq!(store.runs().unwrap().runs.len(), 0);
        let now = SystemTime::now() + Duration::from_secs(10);
        let about = serde_json::json!({"trigger": "test"});
        let mut ids = Vec::new();
        for dry_run in [true, false] {
            let (report, removals) = run(&store, dry_run, now);
            let all: Vec<Gone> = removals.iter().collect();
            assert_eq!((report.complete, all.len()), (true, 3), "{all:?}");
            let id = store.record_run(&report, &removals, &about).unwrap();
            let mut listed = Vec::new();
            let record = store.run(&id, &mut |gone| listed.push(gone)).unwrap();
            // Times of files are finer than what is written.
            assert_eq!(listed, all);
            assert_eq!((record.listed, record.went, &record.about), (3, 3, &about));
            assert_eq!(record.report.dry_run, dry_run);
            let kinds: Vec<Kind> = listed.iter().map(|gone| gone.kind).collect();
            assert_eq!(kinds.iter().filter(|kind| **kind == Kind::Blob).count(), 2);
            assert_eq!(listed.iter().map(|gone| gone.bytes).sum::<u64>(), report.freed_bytes);
            ids.push(id);
        }
        assert!(ids[0] < ids[1], "two in one millisecond: {ids:?}");
        let Runs { runs, unreadable } = store.runs().unwrap();
        assert_eq!(runs.iter().map(|(id, _)| id).collect::<Vec<_>>(), [&ids[0], &ids[1]]);
        assert!(unreadable.is_empty() && staging_is_empty(&store));
    }

    #[test]
    fn the_oldest_records_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Options::default()).unwrap();
        let about = serde_json::Value::Null;
        let mut newest = None;
        for number in 0..MOST as u64 + 5 {
            let (report, removals) = run(&store, true, at(1_000_000 + number));
            newest = Some(store.record_run(&report, &removals, &about).unwrap());
        }
        let runs = store.runs().unwrap().runs;
        assert_eq!((runs.len(), runs.last().map(|(id, _)| id.clone())), (MOST, newest));
        prune(&store.inner, MOST, 0).unwrap();
        assert_eq!(store.runs().unwrap().runs.len(), 1, "the newest stays");
    }

    #[test]
    fn what_is_no_record_is_named_and_harms_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Options::default()).unwrap();
        let (report, removals) = run(&store, true, at(1_000_000));
        let good = store.record_run(&report, &removals, &serde_json::Value::Null).unwrap();
        let runs = dir.path().join("runs");
        let text = fs::read_to_string(runs.join(format!("{good}.jsonl"))).unwrap();
        for (number, bad) in [
            String::new(),
            "{}\n".to_owned(),
            text.trim_end().to_owned(),
            text.replace("\"version\":1", "\"version\":2"),
            "x".repeat(MAX_HEAD as usize + 10),
        ]
        .iter()
        .enumerate()
        {
            fs::write(runs.join(format!("20000101T00000{number}.000Z.jsonl")), bad).unwrap();
        }
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            runs.join("20000101T000009.000Z.jsonl"),
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        fs::write(runs.join("state.json"), "the agent's").unwrap();
        let found = store.runs().unwrap();
        let problems = found.unreadable;
        assert_eq!((found.runs.len(), problems.len()), (1, 6), "{problems:?}");
        assert!(problems[3].message.contains("version 2"), "{problems:?}");
        for name in ["20000101T000000.000", "2000x101T000000.000Z", "../../etc/passwd0000"] {
            assert!(name.parse::<RunId>().is_err());
        }
        let id: RunId = "19990101T000000.000Z".parse().unwrap();
        let Err(Error::Io { source, .. }) = store.run(&id, &mut |_| {}) else {
            panic!()
        };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }
}
