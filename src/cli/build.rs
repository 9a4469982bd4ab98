//! `build`: a folder into a tree.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use indicatif::ProgressBar;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::text::{counted, human_size};
use super::trees::{OWNER, parse_name};
use crate::api::MAX_REVISIONS;
use crate::source::{self, ScanOptions, SourceDir};
use crate::store::{Error, Publish, RefName, Revision};

/// Read a folder into a tree, and give it a name.
///
/// The tree is whole or there is none: what cannot be read fails the build. Mount points below the folder are not
/// entered: leave them out by --exclude.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct BuildTree {
    /// The folder.
    #[serde(skip)]
    dir: PathBuf,
    /// The ref that stands for the tree, as NAME (in the namespace `local`) or NAMESPACE/NAME.
    #[arg(long)]
    name: String,
    /// A glob of paths, relative to the folder, that are left out: `*` stays within a name, `**` goes over folders.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// How many former trees of the name are kept as history.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = history_limit())]
    history_limit: u32,
    /// The folder's absolute path, if it is text.
    #[arg(skip)]
    path: Option<String>,
}

/// As many as a CasManifest may keep.
pub fn history_limit() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(..=i64::from(MAX_REVISIONS))
}

impl BuildTree {
    pub fn open(&mut self) -> Result<Vec<OwnedFd>, Failure> {
        let failed = |action| {
            let dir = &self.dir;
            move |e: std::io::Error| Failure::file(action, dir, &e)
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&self.dir, flags, Mode::empty());
        let folder = opened.map_err(|e| failed("open")(e.into()))?;
        let path = std::fs::canonicalize(&self.dir).map_err(failed("resolve"))?;
        self.path = path.to_str().map(str::to_owned);
        Ok(vec![folder])
    }

    pub fn run(self, site: &Site, files: Vec<OwnedFd>, io: &mut Io) -> Result<Exit, Failure> {
        let name = parse_name(&self.name)?;
        refuse_others(site, &name)?;
        let started = Instant::now();
        let [folder] = <[OwnedFd; 1]>::try_from(files)
            .map_err(|_| Failure::new(Exit::Failed, "build: expected one open folder"))?;
        let shown = self.path.clone().unwrap_or_else(|| "the folder".to_owned());
        let folder = SourceDir::of(&site.store, folder, Path::new(&shown))?;
        let options = ScanOptions {
            exclude: self.exclude.clone(),
            ..ScanOptions::default()
        };
        let source = match &self.path {
            Some(path) if self.exclude.is_empty() => json!({"directory": {"path": path}}),
            Some(path) => json!({"directory": {"path": path, "exclude": self.exclude}}),
            None => serde_json::Value::Null,
        };
        let now = SystemTime::now();
        let target = Publish {
            name: name.clone(),
            owner: OWNER.to_owned(),
            generation: 0,
            request: None,
            source,
            history_limit: self.history_limit,
            now,
        };
        let built = {
            let _bar = Bar::over(options.progress.clone(), io.progress("reading, entries", 0));
            source::build_directory(&site.store, &folder, &options, target, &io.cancel())?
        };
        tell(io, &name, &built, now, started)?;
        Ok(Exit::Done)
    }
}

/// Says what stands for a name after a publish at `now`.
pub fn tell(io: &mut Io, name: &RefName, built: &Revision, now: SystemTime, started: Instant) -> Result<(), Failure> {
    let took = started.elapsed();
    // The ref keeps the revision of an equal tree, which says what its first build added.
    let unchanged = built.built_at != now;
    let added = if unchanged { 0 } else { built.added };
    if io.is_json() {
        return io.json(&json!({
            "name": name.to_string(),
            "digest": built.digest,
            "files": built.files,
            "entries": built.entries,
            "size": built.size,
            "unique": built.unique,
            "added": added,
            "unchanged": unchanged,
            "milliseconds": took.as_millis() as u64,
        }));
    }
    io.line(&format!("{name}  {}", built.digest))?;
    io.line(&format!(
        "{}, {}; {} distinct, {} added; {:.1} s",
        counted(built.files, "file", "files"),
        human_size(built.size),
        human_size(built.unique),
        human_size(added),
        took.as_secs_f64()
    ))
}

/// A name that an object of the cluster has is that object's.
pub fn refuse_others(site: &Site, name: &RefName) -> Result<(), Failure> {
    match site.store.get_ref(name) {
        Ok(Some(entry)) if entry.owner != OWNER && entry.current.is_some() => {
            let message = format!("the ref {name} belongs to the object with the UID {}", entry.owner);
            Err(Failure::new(Exit::InUse, message).hint("choose another name, or forget that ref first"))
        }
        // A build is what heals a ref that cannot be read.
        Ok(_) | Err(Error::BadRef { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Moves a bar on while a folder is read.
struct Bar {
    bar: ProgressBar,
    done: Arc<AtomicBool>,
}

impl Bar {
    fn over(entries: Arc<AtomicU64>, bar: ProgressBar) -> Bar {
        let done = Arc::new(AtomicBool::new(false));
        if !bar.is_hidden() {
            let (bar, done) = (bar.clone(), done.clone());
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    bar.set_position(entries.load(Ordering::Relaxed));
                    std::thread::sleep(Duration::from_millis(200));
                }
            });
        }
        Bar { bar, done }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        self.bar.finish_and_clear();
    }
}
