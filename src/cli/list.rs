//! `ls`: what is stored.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::io::Io;
use super::table::Table;
use super::text::{human_size, rfc3339, short, time};
use crate::store::{Reader, Ref, Refs, Retired, StoredManifest, TreeDigest};

/// List refs: names, and the trees that they stand for.
#[derive(Args)]
pub struct Ls {
    /// List the stored trees instead, whether or not a ref names them.
    #[arg(long, conflicts_with = "blobs")]
    manifests: bool,
    /// List the stored contents instead.
    #[arg(long)]
    blobs: bool,
}

impl Ls {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        match (self.manifests, self.blobs) {
            (true, _) => manifests(store, io),
            (_, true) => blobs(store, io),
            _ => refs(store, io),
        }
    }
}

/// Names the refs that cannot be read, which is damage.
fn unreadable(refs: &Refs, io: &mut Io) -> Exit {
    for problem in &refs.unreadable {
        io.note(&format!("{}: {}", problem.path, problem.message));
    }
    match refs.unreadable.is_empty() {
        true => Exit::Done,
        false => Exit::Damaged,
    }
}

fn refs(store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
    let refs = store.refs()?;
    let exit = unreadable(&refs, io);
    if io.is_json() {
        let listed: Vec<Value> = refs.refs.iter().map(ref_json).collect();
        io.json(&json!({"refs": listed, "unreadable": refs.unreadable}))?;
        return Ok(exit);
    }
    let head: &[&str] = &["NAME", "TREE", "FILES", "SIZE", "ADDED", "BUILT", "HISTORY"];
    let mut table = Table::new(head, &[2, 3, 4, 6]);
    for entry in &refs.refs {
        let mut cells = vec![entry.name.to_string()];
        match &entry.current {
            Some(current) => cells.extend([
                short(&current.digest.hex()).to_owned(),
                current.files.to_string(),
                human_size(current.size),
                human_size(current.added),
                time(current.built_at),
            ]),
            None => cells.extend(["-", "-", "-", "-", "-"].map(str::to_owned)),
        }
        cells.push(entry.history.len().to_string());
        table.row(cells);
    }
    match table.is_empty() {
        true => io.line("no refs; `larder store build DIR --name NAME` makes one")?,
        false => io.table(&table)?,
    }
    Ok(exit)
}

/// A ref as JSON: the fields of its revisions are those of the store.
pub fn ref_json(entry: &Ref) -> Value {
    let retired = |old: &Retired| json!({"revision": old.revision, "retiredAt": rfc3339(old.retired_at)});
    json!({
        "name": entry.name.to_string(),
        "owner": entry.owner,
        "generation": entry.generation,
        "source": entry.source,
        "current": entry.current,
        "history": entry.history.iter().map(retired).collect::<Vec<_>>(),
        "historyLimit": entry.history_limit,
    })
}

fn manifests(store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
    let refs = store.refs()?;
    let exit = unreadable(&refs, io);
    let mut names: BTreeMap<TreeDigest, Vec<String>> = BTreeMap::new();
    for entry in &refs.refs {
        if let Some(current) = &entry.current {
            names.entry(current.digest).or_default().push(entry.name.to_string());
        }
        for old in &entry.history {
            let name = format!("{} (history)", entry.name);
            names.entry(old.revision.digest).or_default().push(name);
        }
    }
    let stored = store.manifests()?;
    if io.is_json() {
        let listed: Vec<Value> = stored
            .iter()
            .map(|StoredManifest { tree, size, .. }| {
                json!({"digest": tree, "size": size, "refs": names.get(tree).cloned().unwrap_or_default()})
            })
            .collect();
        io.json(&json!({"manifests": listed, "unreadable": refs.unreadable}))?;
        return Ok(exit);
    }
    if stored.is_empty() {
        io.line("no manifests")?;
        return Ok(exit);
    }
    let mut table = Table::new(&["TREE", "SIZE", "NAMED BY"], &[1]);
    for StoredManifest { tree, size, .. } in stored {
        let by = names.get(&tree).map_or("-".to_owned(), |names| names.join(", "));
        table.row([tree.to_string(), human_size(size), by]);
    }
    io.table(&table)?;
    Ok(exit)
}

/// Shard by shard: a store may have millions.
fn blobs(store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
    let (mut count, json) = (0u64, io.is_json());
    if json {
        io.bytes(b"{\"blobs\": [")?;
    }
    for byte in 0..=255 {
        for blob in store.shard(byte)? {
            if json {
                let lead = if count == 0 { "\n" } else { ",\n" };
                let last_used = rfc3339(blob.last_used);
                let entry = json!({"digest": blob.digest, "size": blob.size, "lastUsed": last_used});
                io.bytes(format!("{lead}{entry}").as_bytes())?;
            } else {
                let size = human_size(blob.size);
                io.line(&format!("{}  {size:>7}  {}", blob.digest, time(blob.last_used)))?;
            }
            count += 1;
        }
    }
    match (json, count) {
        (true, _) => io.line("\n]}")?,
        (false, 0) => io.line("no blobs")?,
        (false, _) => {}
    }
    Ok(Exit::Done)
}
