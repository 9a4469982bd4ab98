//! `gc`, `plan`: a collection by a policy given as flags or as a file, or what one would do.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::table::Table;
use super::text::{counted, human_size, short};
use super::{policy, trees};
use crate::api::{PolicyRules, parse_duration, parse_size};
use crate::policy::limits;
use crate::store::retention::{OverLimit, Policy};
use crate::store::{Collecting, Kind, Removals, Report, Unfinished};

/// Delete what nothing needs, by these limits. What a ref stands for, a layer or mount shows, or a running build
/// stores is never deleted.
///
/// Without limits, contents that nothing names go when they are unused for 24 h. After an interruption, what is deleted
/// stays deleted, and the next collection goes on from there. `larder store runs` shows what went and why.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Gc {
    /// Say what would go, and delete nothing.
    #[arg(long)]
    dry_run: bool,
    /// Take the limits from a RetentionPolicy in a YAML file, or `-` for stdin. Its schedule and nodeSelector don't count.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["max_age", "max_size", "min_free", "min_copies", "grace"])]
    #[serde(skip)]
    policy: Option<PathBuf>,
    /// What was in the file: its name and its rules.
    #[arg(skip)]
    rules: Option<Box<(String, PolicyRules)>>,
    /// Drop history that was not used for so long, such as 30d.
    #[arg(long, value_parser = parse_duration)]
    max_age: Option<Duration>,
    /// Largest size of contents, manifests and images together, such as 100Gi.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    max_size: Option<u64>,
    /// Least free space of the store's disk, such as 20Gi.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    min_free: Option<u64>,
    /// Keep contents with fewer references than this only for --max-age, even if history names them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    min_copies: u32,
    /// Keep what was used within this time.
    #[arg(long, value_parser = parse_duration, default_value = "1h")]
    grace: Duration,
    /// Remove at most so many contents per second, so that the node does not feel it.
    #[arg(long, value_name = "N")]
    rate: Option<NonZeroU64>,
}

/// Show what a RetentionPolicy would delete, which need not be applied yet. Deletes nothing.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Plan {
    /// The YAML file, or `-` for stdin.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    policy: PathBuf,
    #[arg(skip)]
    rules: Option<Box<(String, PolicyRules)>>,
}

impl Plan {
    pub fn open(&mut self) -> Result<(), Failure> {
        self.rules = Some(Box::new(policy::read(&self.policy)?));
        Ok(())
    }

    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let (name, rules) = *self.rules.unwrap_or_default();
        let policy = limits(&rules, &site.store).map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        let about = json!({"trigger": "plan", "policy": {"name": name, "rules": rules}});
        collect(site, &policy, true, None, &about, io)
    }
}

impl Gc {
    pub fn open(&mut self) -> Result<(), Failure> {
        self.rules = self.policy.as_deref().map(policy::read).transpose()?.map(Box::new);
        Ok(())
    }

    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let (policy, dry_run, about) = match self.rules.as_deref() {
            Some((name, rules)) => {
                let limits = limits(rules, &site.store);
                let limits = limits.map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
                let about = json!({"name": name, "rules": rules});
                (limits, self.dry_run || rules.dry_run, about)
            }
            None => {
                let limits = Policy {
                    max_age: self.max_age,
                    max_size: self.max_size,
                    min_free: self.min_free,
                    min_copies: self.min_copies,
                    grace: self.grace,
                };
                (limits, self.dry_run, serde_json::Value::Null)
            }
        };
        let about = json!({"trigger": "admin", "policy": about, "owner": trees::OWNER});
        collect(site, &policy, dry_run, self.rate, &about, io)
    }
}

/// Says so if the command will have to wait: a run takes its time, by its rate.
pub fn await_collection(site: &Site, io: &mut Io) {
    if site.store.is_collecting() {
        io.note("waiting for a retention run or a verification that is under way");
    }
}

fn collect(
    site: &Site,
    policy: &Policy,
    dry_run: bool,
    rate: Option<NonZeroU64>,
    about: &serde_json::Value,
    io: &mut Io,
) -> Result<Exit, Failure> {
    // What only waits for a next layer is not in use.
    site.layers.unmount_unused(Duration::ZERO)?;
    await_collection(site, io);
    let bar = io.spinner("collecting");
    let cancel = io.cancel();
    let how = Collecting {
        dry_run,
        now: SystemTime::now(),
        rate,
        cancel: &cancel,
    };
    let collected = site.store.collect_with(policy, &site.layers, &how);
    bar.finish_and_clear();
    let (collected, failed) = match collected {
        Ok(collected) => (collected, None),
        Err(Unfinished {
            error,
            done: Some(done),
        }) => (*done, Some(error)),
        Err(unfinished) => return Err(unfinished.error.into()),
    };
    let (report, removals) = collected;
    // A plan is asked for again and again, and leaves nothing.
    if !dry_run && let Err(error) = site.store.record_run(&report, &removals, about) {
        io.note(&format!("the run is not recorded: {error}"));
    }
    match (io.is_json(), dry_run) {
        // Nothing is on record of it.
        (true, true) => io.json(&Planned {
            report: &report,
            items: &removals,
        })?,
        (true, false) => io.json(&report)?,
        (false, _) => print(&report, io)?,
    }
    if let Some(error) = failed {
        return Err(error.into());
    }
    for problem in &report.blocked {
        io.note(&format!("{}: {}", problem.path, problem.message));
    }
    if !report.blocked.is_empty() {
        let message = "nothing more was deleted: what cannot be read may need anything";
        return Err(Failure::new(Exit::Damaged, message)
            .hint("build the owner again, or `larder store forget` the ref that cannot be read"));
    }
    match report.complete {
        true => Ok(Exit::Done),
        false => Err(Failure::new(
            Exit::Cancelled,
            "cancelled: what is deleted stays deleted, and the next collection goes on from there",
        )),
    }
}

/// What would go, with everything that would. There may be millions, which are written one by one.
#[derive(Serialize)]
struct Planned<'a> {
    #[serde(flatten)]
    report: &'a Report,
    #[serde(serialize_with = "each")]
    items: &'a Removals,
}

fn each<S: Serializer>(removals: &&Removals, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(removals.iter())
}

pub fn print(report: &Report, io: &mut Io) -> Result<(), Failure> {
    let verb = if report.dry_run { "would delete" } else { "deleted" };
    if report.decisions.is_empty() {
        io.line(&format!(
            "nothing to delete among {}",
            counted(report.scanned_blobs, "blob", "blobs")
        ))?;
    } else {
        let mut table = Table::new(&["KIND", "COUNT", "BYTES", "REASON"], &[1, 2]);
        for decision in &report.decisions {
            let kind = match decision.kind {
                Kind::Image => "image",
                Kind::Manifest => "manifest",
                Kind::Blob => "blob",
                Kind::Quarantined => "quarantined",
            };
            table.row([
                kind.to_owned(),
                decision.count.to_string(),
                human_size(decision.bytes),
                decision.message.clone(),
            ]);
        }
        io.table(&table)?;
        for dropped in &report.dropped_history {
            let digest = dropped.digest.hex();
            let (tree, reason) = (short(&digest), dropped.reason);
            io.line(&format!("history of {}: {tree}, {reason}", dropped.name))?;
        }
        io.line(&format!("{verb} {} in all", human_size(report.freed_bytes)))?;
    }
    if report.missing_blobs > 0 {
        let missing = counted(report.missing_blobs, "content", "contents");
        io.note(&format!(
            "{missing} that stored trees name are missing: build these trees again"
        ));
    }
    if let Some(over) = &report.over_limit {
        io.line(&over_limit(over))?;
        holders(over, io)?;
    }
    Ok(())
}

fn over_limit(over: &OverLimit) -> String {
    let causes = over.largest_first().into_iter();
    let causes: Vec<String> = causes
        .map(|(cause, bytes)| format!("{cause} {}", human_size(bytes)))
        .collect();
    format!(
        "still over the limit: {} stored, {} free; {}",
        human_size(over.size),
        human_size(over.free),
        causes.join(", ")
    )
}

/// The trees that hold most, a line each.
fn holders(over: &OverLimit, io: &mut Io) -> Result<(), Failure> {
    for holder in over.largest.iter().filter(|holder| holder.exclusive > 0) {
        let digest = holder.tree.hex();
        let (size, tree, by) = (
            human_size(holder.exclusive),
            short(&digest),
            holder.needed_by.join(", "),
        );
        io.line(&format!("  {size} only in {tree}, needed by {by}"))?;
    }
    Ok(())
}
