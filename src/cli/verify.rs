//! `verify`: is everything what its name says, and can what is not be had again?

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::exit::{Exit, Failure};
use super::figures::refs;
use super::io::Io;
use super::site::Site;
use super::table::Table;
use super::text::{counted, human_size, printable, short};
use crate::api::parse_size;
use crate::layer::ImageVerification;
use crate::source::{Origin, Repair, SourceDir, repair};
use crate::store::{BadBlob, Fault, RefName, Scope, Store, Verification, VerifyOptions, VerifyProgress};

/// Rows of a table; -o json has all.
const ROWS: usize = 50;

/// Read and hash contents, check every manifest and ref, and move damaged contents into quarantine/.
///
/// Images of trees, from which layers are mounted, are compared with their trees and replaced where they differ.
///
/// Works beside builds, layers and collections. What is moved away is stored again by the next build that has it, or
/// by --repair. Ends with 1 if anything is damaged and not repaired.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Verify {
    /// Read this part of the contents only, chosen at random: per cent, such as 5.
    #[arg(long, value_name = "PERCENT", value_parser = percent, conflicts_with = "changed")]
    sample: Option<f64>,
    /// Choose the sample that an earlier call with this seed chose.
    #[arg(long, value_name = "N", requires = "sample")]
    seed: Option<u64>,
    /// Read the contents only whose files changed since the last full verification began. Does not see what the disk
    /// itself lost.
    #[arg(long)]
    changed: bool,
    /// Read at most so many bytes per second, such as 50Mi, so that the node does not feel it.
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    rate: Option<NonZeroU64>,
    /// Store again what was found damaged or missing, from the folders that the trees were built from.
    #[arg(long)]
    repair: bool,
    /// For --repair: take the files from this folder instead, by their paths in the trees.
    #[arg(long, value_name = "DIR", requires = "repair")]
    #[serde(skip)]
    from: Option<PathBuf>,
    /// That folder, for messages.
    #[arg(skip)]
    from_path: Option<String>,
}

fn percent(text: &str) -> Result<f64, String> {
    let number: f64 = text
        .strip_suffix('%')
        .unwrap_or(text)
        .parse()
        .map_err(|_| "expected a number".to_owned())?;
    match (0.0..=100.0).contains(&number) {
        true => Ok(number),
        false => Err("expected per cent, from 0 to 100".to_owned()),
    }
}

fn rate(text: &str) -> Result<NonZeroU64, String> {
    let size = parse_size(text).map_err(|error| error.to_string())?;
    NonZeroU64::new(size).ok_or_else(|| "nothing can be read at a rate of 0".to_owned())
}

/// What `-o json` writes.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Output<'a> {
    /// Is nothing damaged, or was all of it repaired?
    sound: bool,
    #[serde(flatten)]
    found: &'a Verification,
    /// With `--repair`, if there was anything to do.
    repair: Option<&'a Repair>,
    images: &'a ImageVerification,
}

impl Verify {
    pub fn open(&mut self) -> Result<Vec<OwnedFd>, Failure> {
        let Some(from) = &self.from else {
            return Ok(Vec::new());
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(from, flags, Mode::empty());
        let folder = folder.map_err(|e| Failure::file("open", from, &e.into()))?;
        self.from_path = Some(from.display().to_string());
        Ok(vec![folder])
    }

    pub fn run(self, site: &Site, files: Vec<OwnedFd>, io: &mut Io) -> Result<Exit, Failure> {
        let store = &site.store;
        let from = match files.into_iter().next() {
            Some(folder) => Some(SourceDir::of(
                store,
                folder,
                Path::new(self.from_path.as_deref().unwrap_or(".")),
            )?),
            None => None,
        };
        let scope = match (self.sample, self.changed) {
            (Some(percent), _) => Scope::Sample {
                fraction: percent / 100.0,
                seed: self.seed.unwrap_or_else(rand::random),
            },
            (None, true) => Scope::Changed,
            (None, false) => Scope::All,
        };
        let options = VerifyOptions { scope, rate: self.rate };
        let cancel = io.cancel();
        let mut found = watched(io.progress("reading", 1), |progress| {
            store.verify(&options, progress, &cancel)
        })?;
        let damaged = found.bad_blobs.iter().any(|bad| !bad.healed) || !found.bad_manifests.is_empty();
        // What fails from here on is said when all is told that was found: some of it has been moved away.
        let mut failed = found.failed.clone().map(|failed| Failure::new(Exit::Failed, failed));
        let mut repaired = None;
        if self.repair && damaged && found.complete {
            let bar = io.spinner("repairing");
            match self.repaired(store, &mut found, from.as_ref(), &cancel) {
                Ok(done) => repaired = Some(done),
                Err(failure) => failed = Some(failure),
            }
            bar.finish_and_clear();
        }
        let mut images = ImageVerification::default();
        if found.complete && failed.is_none() {
            let bar = io.spinner("comparing images");
            match site.layers.verify_images(self.rate, &cancel) {
                Ok(found) => images = found,
                Err(error) => failed = Some(error.into()),
            }
            bar.finish_and_clear();
        }
        // Also one that was cancelled between the images.
        found.complete &= !cancel.load(Ordering::Relaxed);
        let sound = found.is_sound() && images.is_sound();
        if io.is_json() {
            io.json(&Output {
                sound,
                found: &found,
                repair: repaired.as_ref(),
                images: &images,
            })?;
        } else {
            print(&found, io)?;
            print_images(&images, io)?;
            if let Some(repaired) = &repaired {
                print_repair(repaired, io)?;
            }
        }
        if let Some(failure) = failed {
            return Err(failure);
        }
        if !found.complete {
            return Err(Failure::new(
                Exit::Cancelled,
                "cancelled: what was found until then is told",
            ));
        }
        if sound && images.passed_over.is_empty() {
            return Ok(Exit::Done);
        }
        if sound {
            return Err(Failure::new(Exit::Failed, "some images of trees could not be compared"));
        }
        if found.is_sound() {
            let failure = Failure::new(Exit::No, "layers show a damaged image of their tree");
            let is_copy = images.bad.iter().any(|bad| bad.mounted && bad.entry.is_some());
            return Err(failure.hint(match is_copy {
                true => "take snapshots of what must be kept, delete the layers of the tree, and verify again: that removes a damaged copy",
                false => "a right one is in its place: unmount the layers of the tree, and when the last one is gone mount them again",
            }));
        }
        let failure = Failure::new(Exit::No, "the store is damaged");
        Err(failure.hint(
            match (found.bad_manifests.is_empty() && found.bad_refs.is_empty(), self.repair) {
                (true, false) => "build the trees again, or let `larder store verify --repair` look in their sources",
                (true, true) => "build the trees again, or give a folder that has the files by --from",
                (false, _) => "only building the trees again, or `larder store forget`, helps with manifests and refs",
            },
        ))
    }

    fn repaired(
        &self,
        store: &Store,
        found: &mut Verification,
        from: Option<&SourceDir>,
        cancel: &AtomicBool,
    ) -> Result<Repair, Failure> {
        let open = |_: &RefName, path: &str| SourceDir::open(store, Path::new(path));
        let origin = match from {
            Some(folder) => Origin::Folder(folder),
            None => Origin::Recorded(&open),
        };
        Ok(repair(store, found, &origin, cancel)?)
    }
}

/// Moves a bar on while the work goes on.
fn watched<T>(bar: ProgressBar, work: impl FnOnce(&VerifyProgress) -> T) -> T {
    struct Set<'a>(&'a AtomicBool);
    impl Drop for Set<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (progress, done) = (VerifyProgress::default(), AtomicBool::new(false));
    let result = std::thread::scope(|scope| {
        if !bar.is_hidden() {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    bar.set_length(progress.total_bytes.load(Ordering::Relaxed).max(1));
                    bar.set_position(progress.bytes.load(Ordering::Relaxed));
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
        let _done = Set(&done);
        work(&progress)
    });
    bar.finish_and_clear();
    result
}

fn print(found: &Verification, io: &mut Io) -> Result<(), Failure> {
    let took = found.finished.duration_since(found.started).unwrap_or_default();
    let passed_over = match found.passed_over {
        0 => String::new(),
        some => format!(", {some} passed over"),
    };
    let seed = match found.scope {
        Scope::Sample { seed, .. } => format!(", seed {seed}"),
        _ => String::new(),
    };
    io.line(&format!(
        "read {} of {} in {:.1} s{passed_over}{seed}; {} and {} are whole",
        human_size(found.bytes),
        counted(found.blobs, "content", "contents"),
        took.as_secs_f64(),
        counted(found.manifests, "manifest", "manifests"),
        counted(found.refs, "ref", "refs")
    ))?;
    if !found.bad_blobs.is_empty() {
        let mut table = Table::new(&["CONTENT", "FILES", "FAULT", "NOW"], &[1]);
        for bad in found.bad_blobs.iter().take(ROWS) {
            let digest = bad.digest.hex();
            table.row([
                short(&digest).to_owned(),
                bad.files.to_string(),
                fault(&bad.fault),
                state(bad),
            ]);
        }
        io.table(&table)?;
        rest(found.bad_blobs.len(), io)?;
    }
    if !found.hurt.is_empty() {
        let mut table = Table::new(&["TREE", "LACKS", "FILES", "REFS", "FOR EXAMPLE"], &[1, 2]);
        for hurt in found.hurt.iter().take(ROWS) {
            table.row([
                short(&hurt.digest.hex()).to_owned(),
                hurt.blobs.to_string(),
                hurt.files.to_string(),
                refs(&hurt.current_of, &hurt.history_of),
                hurt.samples
                    .first()
                    .map_or("-".to_owned(), |file| printable(&file.path)),
            ]);
        }
        io.table(&table)?;
        rest(found.hurt.len(), io)?;
    }
    for bad in &found.bad_manifests {
        let refs = refs(&bad.current_of, &bad.history_of);
        io.line(&format!("{}, of {refs}", bad.message))?;
    }
    for problem in &found.bad_refs {
        io.line(&format!("{}: {}", problem.path, problem.message))?;
    }
    if found.quarantined_blobs > 0 {
        io.line(&format!(
            "in quarantine: {}, {}",
            counted(found.quarantined_blobs, "file", "files"),
            human_size(found.quarantined_bytes)
        ))?;
    }
    Ok(())
}

fn rest(all: usize, io: &mut Io) -> Result<(), Failure> {
    match all.saturating_sub(ROWS) {
        0 => Ok(()),
        more => io.line(&format!("and {more} more: -o json lists all")),
    }
}

fn fault(fault: &Fault) -> String {
    match fault {
        Fault::Damaged { length, .. } => format!("other bytes, {length} of them"),
        // The message has the number.
        Fault::Unreadable { message, .. } => format!("unreadable: {message}"),
        Fault::NotAFile => "not a file".to_owned(),
        Fault::Missing => "missing".to_owned(),
    }
}

fn state(bad: &BadBlob) -> String {
    if bad.healed {
        return "stored again".to_owned();
    }
    match (&bad.quarantined, &bad.not_moved, &bad.not_durable) {
        (Some(_), _, Some(why)) => format!("in quarantine, perhaps back after a power cut: {why}"),
        (Some(_), ..) => "in quarantine".to_owned(),
        (_, Some(why), _) => format!("still there: {why}"),
        _ => "not there".to_owned(),
    }
}

fn print_images(found: &ImageVerification, io: &mut Io) -> Result<(), Failure> {
    if found.images > 0 {
        let right = found.images - found.bad.len() as u64;
        io.line(&format!(
            "{} of trees: {right} as they should be",
            counted(found.images, "image", "images")
        ))?;
    }
    for bad in found.bad.iter().take(ROWS) {
        let tree = bad.tree.hex();
        let tree = short(&tree);
        io.line(&match (&bad.entry, bad.mounted) {
            (None, false) => format!("the image of {tree} was damaged and is replaced"),
            (None, true) => format!(
                "the image of {tree} was damaged and is replaced, but it is mounted, and layers show it until the last of them is \
                 unmounted"
            ),
            (Some(entry), false) => format!("the copy of {tree} was damaged, at {entry:?}, and is removed"),
            (Some(entry), true) => {
                format!("the copy of {tree} is damaged, at {entry:?}, and stays as long as there are layers of the tree")
            }
        })?;
    }
    rest(found.bad.len(), io)?;
    for problem in found.passed_over.iter().take(ROWS) {
        io.line(&format!("not compared: {}: {}", problem.path, problem.message))?;
    }
    rest(found.passed_over.len(), io)
}

fn print_repair(repaired: &Repair, io: &mut Io) -> Result<(), Failure> {
    io.line(&format!(
        "repaired {}, {}",
        counted(repaired.repaired, "content", "contents"),
        human_size(repaired.bytes)
    ))?;
    for lost in repaired.lost.iter().take(ROWS) {
        let tried = match lost.tried.is_empty() {
            true => "no file of a stored tree has it".to_owned(),
            false => lost
                .tried
                .iter()
                .map(|tried| printable(tried))
                .collect::<Vec<_>>()
                .join("; "),
        };
        io.line(&format!("not repaired: {}: {tried}", short(&lost.digest.hex())))?;
    }
    rest(repaired.lost.len(), io)
}
