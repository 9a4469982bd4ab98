//! `gc`: a collection by a policy given as flags.

use std::time::{Duration, SystemTime};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::table::Table;
use super::text::{counted, human_size, short};
use crate::api::{parse_duration, parse_size};
use crate::store::retention::{OverLimit, Policy};
use crate::store::{Kind, Report};

/// Delete what nothing needs, by these limits. What a ref stands for, a layer or mount shows, or a running build
/// stores is never deleted.
///
/// Without limits, contents that nothing names go when they are unused for 24 h. An interruption does not stop it:
/// it takes seconds, and what is deleted would stay deleted.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Gc {
    /// Say what would go, and delete nothing.
    #[arg(long)]
    dry_run: bool,
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
}

impl Gc {
    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let policy = Policy {
            max_age: self.max_age,
            max_size: self.max_size,
            min_free: self.min_free,
            min_copies: self.min_copies,
            grace: self.grace,
        };
        // What only waits for a next layer is not in use.
        site.layers.unmount_unused(Duration::ZERO)?;
        let bar = io.progress("collecting", 0);
        let report = site
            .store
            .collect(&policy, &site.layers, self.dry_run, SystemTime::now());
        bar.finish_and_clear();
        let report = report?;
        match io.is_json() {
            true => io.json(&report)?,
            false => print(&report, io)?,
        }
        if report.blocked.is_empty() {
            return Ok(Exit::Done);
        }
        for problem in &report.blocked {
            io.note(&format!("{}: {}", problem.path, problem.message));
        }
        let message = "nothing more was deleted: what cannot be read may need anything";
        Err(Failure::new(Exit::Damaged, message)
            .hint("build the owner again, or `larder store forget` the ref that cannot be read"))
    }
}

fn print(report: &Report, io: &mut Io) -> Result<(), Failure> {
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
    }
    Ok(())
}

fn over_limit(over: &OverLimit) -> String {
    let causes = over.causes.largest_first().into_iter();
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
