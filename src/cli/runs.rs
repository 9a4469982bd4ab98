//! `runs`: what collections did, and why.

use clap::Args;
use serde_json::{Value, json};

use super::collect::print;
use super::exit::{Exit, Failure};
use super::io::Io;
use super::table::Table;
use super::text::time;
use crate::api::RunSummary;
use crate::store::{Error, Gone, Reader, RunId, RunRecord, Runs as Recorded};

/// List the collections of this store, or show one: what went, and why.
#[derive(Args)]
pub struct Runs {
    /// Show this run, or with `last` the newest. With -o json, everything that went is listed.
    #[arg(value_name = "RUN")]
    run: Option<String>,
}

impl Runs {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        match self.run {
            None => list(store, io),
            Some(run) => show(store, &run, io),
        }
    }
}

fn list(store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
    let Recorded { runs, unreadable } = store.runs()?;
    for problem in &unreadable {
        io.note(&format!("{}: {}", problem.path, problem.message));
    }
    if io.is_json() {
        let runs: Vec<Value> = runs.iter().map(|(id, run)| run_json(id, run)).collect();
        io.json(&json!({"runs": runs, "unreadable": unreadable}))?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(
        &["RUN", "WHEN", "TRIGGER", "POLICY", "DELETED", "FREED", "STATE"],
        &[4, 5],
    );
    for (id, run) in &runs {
        let report = &run.report;
        table.row([
            id.to_string(),
            time(report.started),
            text(&run.about["trigger"]),
            text(&run.about["policy"]["name"]),
            report.deleted_blobs.to_string(),
            RunSummary::freed_text(report.freed_bytes, report.dry_run),
            state(run).to_owned(),
        ]);
    }
    match table.is_empty() {
        true => io.line("no runs; `larder store gc` makes one")?,
        false => io.table(&table)?,
    }
    Ok(Exit::Done)
}

/// How it ended, in a word or two.
fn state(run: &RunRecord) -> &'static str {
    let report = &run.report;
    match () {
        () if !report.blocked.is_empty() => "blocked",
        () if report.failed.is_some() => "failed",
        () if !report.complete => "cancelled",
        () if report.over_limit.is_some() && report.dry_run => "dry run, over limit",
        () if report.over_limit.is_some() => "over limit",
        () if report.dry_run => "dry run",
        () => "done",
    }
}

fn text(value: &Value) -> String {
    value.as_str().filter(|text| !text.is_empty()).unwrap_or("-").to_owned()
}

fn run_json(id: &RunId, run: &RunRecord) -> Value {
    let mut value = serde_json::to_value(run).unwrap_or_default();
    value["id"] = json!(id);
    value
}

fn show(store: &Reader, run: &str, io: &mut Io) -> Result<Exit, Failure> {
    let id = match run {
        "last" => store.runs()?.runs.pop().map(|(id, _)| id),
        run => Some(
            run.parse()
                .map_err(|e| Failure::new(Exit::Usage, format!("{run:?}: {e}")))?,
        ),
    };
    let Some(id) = id else {
        return Err(Failure::new(Exit::NotFound, "there was no run yet"));
    };
    let mut went: Vec<Gone> = Vec::new();
    let json = io.is_json();
    let mut keep = |gone| {
        if json {
            went.push(gone);
        }
    };
    let record = store.run(&id, &mut keep).map_err(|error| match error {
        Error::Io { ref source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Failure::new(Exit::NotFound, format!("there is no run {id}")).hint("`larder store runs` lists them")
        }
        other => other.into(),
    })?;
    if json {
        let mut value = run_json(&id, &record);
        value["items"] = serde_json::to_value(&went).unwrap_or_default();
        io.json(&value)?;
        return Ok(Exit::Done);
    }
    let (trigger, policy) = (text(&record.about["trigger"]), text(&record.about["policy"]["name"]));
    let started = time(record.report.started);
    io.line(&format!(
        "run {id}, {started}: {}, by {trigger}, policy {policy}",
        state(&record)
    ))?;
    print(&record.report, io)?;
    if record.listed < record.went {
        io.note(&format!(
            "{} of {} things that went are listed",
            record.listed, record.went
        ));
    }
    Ok(Exit::Done)
}
