//! `dedup` and `analytics`: what the store's room is used for (docs/store.md defines each figure).

use std::path::Path;

use clap::Args;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::table::Table;
use super::text::{human_size, printable, short};
use crate::layer;
use crate::store::{Amount, Analytics, Bucket, Dedup, Error, Held, HeldTree, Holders, Reader, TopBlob};

/// Show what storing every content once saves. Reads every manifest.
#[derive(Args)]
pub struct DedupArgs {}

impl DedupArgs {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let bar = io.spinner("reading manifests");
        let found = store.dedup()?;
        bar.finish_and_clear();
        match io.is_json() {
            true => io.json(&found)?,
            false => print_dedup(&found, io)?,
        }
        Ok(complete(&found, io))
    }
}

/// Show what the store's room is used for: by tree, by age of the trees, by size, and the contents that matter most.
#[derive(Args)]
pub struct AnalyticsArgs {
    /// How many contents are listed of those that save most, and of the largest.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
}

impl AnalyticsArgs {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let bar = io.spinner("reading manifests");
        let found = store.analytics(&OfLayers(store.root()), self.top)?;
        bar.finish_and_clear();
        match io.is_json() {
            true => io.json(&found)?,
            false => print_analytics(&found, io)?,
        }
        Ok(complete(&found.dedup, io))
    }
}

/// The trees of layers. Those of mounts that are no layer's are not known to one who does not mount.
struct OfLayers<'a>(&'a Path);

impl Holders for OfLayers<'_> {
    fn held(&self) -> Result<Held, Error> {
        let (layers, unreadable) = layer::list(self.0)?;
        Ok(Held {
            trees: layers
                .iter()
                .map(|layer| HeldTree::by_layer(layer.tree, &layer.owner))
                .collect(),
            unreadable,
        })
    }
}

/// Names what could not be read, which is damage.
fn complete(found: &Dedup, io: &mut Io) -> Exit {
    for problem in &found.problems {
        io.note(&format!("{}: {}", problem.path, problem.message));
    }
    match found.incomplete {
        true => {
            io.note("the figures are without what could not be read");
            Exit::Damaged
        }
        false => Exit::Done,
    }
}

fn print_dedup(found: &Dedup, io: &mut Io) -> Result<(), Failure> {
    let mut table = Table::new(&["", "COUNT", "BYTES"], &[1, 2]);
    let row = |what: &str, count: u64, bytes: Option<u64>| {
        [
            what.to_owned(),
            count.to_string(),
            bytes.map_or("-".to_owned(), human_size),
        ]
    };
    table.row(row("refs", found.refs, None));
    table.row(row("trees", found.manifests, None));
    table.row(row("references", found.references, Some(found.logical_bytes)));
    table.row(row("distinct contents", found.unique_blobs, Some(found.unique_bytes)));
    io.table(&table)?;
    io.line(&format!(
        "saved {}, {:.1} %: a ratio of {:.2}",
        human_size(found.saved_bytes),
        found.saved_percent,
        found.ratio
    ))
}

fn print_analytics(found: &Analytics, io: &mut Io) -> Result<(), Failure> {
    print_dedup(&found.dedup, io)?;

    io.line("")?;
    let mut table = Table::new(&["CONTENTS", "COUNT", "BYTES"], &[1, 2]);
    for (what, amount) in [
        ("of current trees", found.current),
        ("of history only", found.history),
        ("of trees without a name", found.unnamed),
        ("garbage", found.garbage),
        ("missing", found.missing),
    ] {
        table.row(cells(what.to_owned(), amount));
    }
    io.table(&table)?;

    io.line("")?;
    let mut table = Table::new(&["SIZE", "COUNT", "BYTES"], &[1, 2]);
    let mut from = 0;
    for Bucket { below, amount } in &found.sizes {
        let name = match below {
            Some(below) => format!("below {}", human_size(*below)),
            None => format!("from {}", human_size(from)),
        };
        from = below.unwrap_or(from);
        table.row(cells(name, *amount));
    }
    io.table(&table)?;

    if !found.manifests.is_empty() {
        io.line("")?;
        let head = &["TREE", "FILES", "CONTENTS", "LOGICAL", "UNIQUE", "EXCLUSIVE", "REFS"];
        let mut table = Table::new(head, &[1, 2, 3, 4, 5]);
        for used in &found.manifests {
            table.row([
                short(&used.digest.hex()).to_owned(),
                used.files.to_string(),
                used.blobs.to_string(),
                human_size(used.logical_bytes),
                human_size(used.unique_bytes),
                human_size(used.exclusive_bytes),
                refs(&used.current_of, &used.history_of),
            ]);
        }
        io.table(&table)?;
    }
    print_top("SAVES", &found.top_saved, |blob| blob.saved_bytes, io)?;
    print_top("LARGEST", &found.top_size, |blob| blob.size, io)
}

fn cells(what: String, amount: Amount) -> [String; 3] {
    [what, amount.blobs.to_string(), human_size(amount.bytes)]
}

/// The refs that name a tree: those whose history it is in come in brackets.
pub fn refs(current_of: &[String], history_of: &[String]) -> String {
    let history = history_of.iter().map(|name| format!("[{name}]"));
    let all: Vec<String> = current_of.iter().cloned().chain(history).collect();
    match all.is_empty() {
        true => "-".to_owned(),
        false => all.join(" "),
    }
}

fn print_top(
    head: &'static str,
    blobs: &[TopBlob],
    figure: impl Fn(&TopBlob) -> u64,
    io: &mut Io,
) -> Result<(), Failure> {
    if blobs.is_empty() {
        return Ok(());
    }
    io.line("")?;
    let head: &'static [&'static str] = match head {
        "SAVES" => &["SAVES", "SIZE", "REFERENCES", "CONTENT", "FOR EXAMPLE"],
        _ => &["LARGEST", "SIZE", "REFERENCES", "CONTENT", "FOR EXAMPLE"],
    };
    let mut table = Table::new(head, &[0, 1, 2]);
    for blob in blobs {
        let example = blob.samples.first().map_or("-".to_owned(), |file| {
            format!("{}:{}", short(&file.manifest.hex()), printable(&file.path))
        });
        table.row([
            human_size(figure(blob)),
            human_size(blob.size),
            blob.references.to_string(),
            short(&blob.digest.hex()).to_owned(),
            example,
        ]);
    }
    io.table(&table)
}
