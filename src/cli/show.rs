//! `show`: one tree.

use clap::Args;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::text::{counted, human_size, time};
use super::trees::find;
use super::{dump, tree_json};
use crate::store::Reader;

/// Show a tree: a summary, or all of it.
#[derive(Args)]
pub struct Show {
    /// A tree: a ref, a digest, or the beginning of one.
    tree: String,
    /// All of it as JSON; the same as --output json.
    #[arg(long, conflicts_with = "composefs")]
    json: bool,
    /// All of it in the dump format of composefs (composefs-dump(5)).
    #[arg(long)]
    composefs: bool,
}

impl Show {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let named = find(store, &self.tree)?;
        let tree = named.load(store)?;
        if self.composefs {
            dump::write(&tree, io.stdout()).map_err(|e| Failure::output(&e))?;
            return Ok(Exit::Done);
        }
        if self.json || io.is_json() {
            io.json(&tree_json::document(&named, &tree))?;
            return Ok(Exit::Done);
        }
        let stats = tree.stats();
        if let Some(name) = named.name() {
            io.line(&format!("name     {name}"))?;
        }
        io.line(&format!("digest   {}", named.digest))?;
        if let Some(current) = named.entry.as_ref().and_then(|entry| entry.current.as_ref()) {
            io.line(&format!("built    {}", time(current.built_at)))?;
        }
        let (files, entries) = (counted(stats.files, "file", "files"), stats.entries);
        io.line(&format!(
            "holds    {files}, {} in all",
            counted(entries, "entry", "entries")
        ))?;
        let (logical, distinct) = (human_size(stats.logical), human_size(stats.distinct));
        io.line(&format!("size     {logical}, {distinct} distinct"))?;
        for old in named.entry.iter().flat_map(|entry| &entry.history) {
            let (digest, retired) = (old.revision.digest, time(old.retired_at));
            io.line(&format!("history  {digest}, until {retired}"))?;
        }
        Ok(Exit::Done)
    }
}
