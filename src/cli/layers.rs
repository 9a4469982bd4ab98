//! `mount`, `umount`, `snapshot`, `layers`: layers by hand.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Instant, SystemTime};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::build::{history_limit, refuse_others, tell};
use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::table::Table;
use super::text::{human_size, printable, short};
use super::trees::{OWNER, find, parse_name};
use crate::api::parse_size;
use crate::layer::{self, LayerId, LayerOwner, LayerRecord, LayerSpec, Mode, OwnerKind, Seen, Stage};
use crate::source;
use crate::store::{Problem, Publish, Reader};

/// Fewest characters of an id that name a layer.
const SHORTEST: usize = 8;

/// What may be changed in a layer.
#[derive(Debug, Clone, Copy, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ModeArg {
    /// Changes go to the disk, and survive a reboot.
    Overlay,
    /// Changes go to memory.
    Tmpfs,
    /// Nothing can be changed.
    ReadOnly,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Mode {
        match mode {
            ModeArg::Overlay => Mode::Overlay,
            ModeArg::Tmpfs => Mode::Tmpfs,
            ModeArg::ReadOnly => Mode::ReadOnly,
        }
    }
}

/// Make a tree visible as a folder, as a layer of its own, and print its path.
///
/// A layer of the same name, tree and options is used as it is; after a reboot this mounts it again, with its changes.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Mount {
    /// The tree: a ref, a digest, or at least 8 of its first digits.
    tree: String,
    /// The layer's name among those made by hand; by default, the tree's.
    #[arg(long)]
    name: Option<String>,
    #[arg(long, value_enum, default_value = "overlay")]
    mode: ModeArg,
    /// How much may be written, such as 2Gi, kept by the kernel. Without it, an agent on the store gives its
    /// --default-layer-size; without an agent there is no limit but the disk's, or the memory's.
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    size: Option<u64>,
    /// The owner of everything in the tree, by numbers; by default, the owners in the tree.
    #[arg(long, value_parser = parse_ids, value_name = "UID:GID")]
    owner: Option<(u32, u32)>,
}

fn parse_ids(text: &str) -> Result<(u32, u32), String> {
    let ids = text.split_once(':').and_then(|(uid, gid)| {
        // The last number stands for "do not change" in system calls.
        let id = |text: &str| text.parse().ok().filter(|id| *id != u32::MAX);
        Some((id(uid)?, id(gid)?))
    });
    ids.ok_or_else(|| format!("{text:?} is not UID:GID, two numbers up to 4294967294"))
}

impl Mount {
    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let tree = find(&site.store, &self.tree)?;
        let name = self.name.or_else(|| tree.name()).unwrap_or_else(|| tree.digest.hex());
        let owner = LayerOwner::admin(name);
        // An agent runs several commands at once, and they must not make a layer each.
        let (spec, prepared) = site.layers.with_owner(&owner, || {
            let (records, _) = layer::list(site.store.root())?;
            let known = records.into_iter().find(|record| record.owner == owner);
            let spec = LayerSpec {
                id: match known {
                    Some(record) => record.id,
                    None => uuid::Uuid::new_v4().to_string().parse()?,
                },
                owner: owner.clone(),
                tree: tree.digest,
                mode: self.mode.into(),
                size: self.size,
                ids: self.owner,
            };
            let prepared = site.layers.prepare(&spec)?;
            Ok::<_, Failure>((spec, prepared))
        })?;
        if let Some(size) = self.size.filter(|_| spec.mode != Mode::ReadOnly)
            && prepared.size.is_none_or(|now| now / 4096 != size / 4096)
        {
            site.layers.grow(&spec.id, size)?;
        }
        if let Some(found) = &prepared.found {
            io.note(&format!(
                "files lay where the layer is mounted now; they are in {}",
                found.display()
            ));
        }
        if let Some(said) = &prepared.checked {
            io.note(&format!(
                "the layer's own file system had an error, and was checked; files in it may be lost. e2fsck said: {}",
                printable(said)
            ));
        }
        if prepared.lost.is_some() {
            io.note("the layer is empty: what was written before a reboot was in memory");
        }
        let path = prepared.path.display().to_string();
        match io.is_json() {
            true => io.json(&json!({
                "id": spec.id,
                "name": spec.owner.name,
                "digest": spec.tree,
                "path": path,
                "reused": prepared.reused,
            }))?,
            false => io.line(&path)?,
        }
        Ok(Exit::Done)
    }
}

/// Take a layer that was made by hand out of sight. What was changed on disk stays, for the next mount of that name.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Umount {
    /// The layer: its name, its id, or at least 8 characters of that.
    layer: String,
    /// Delete the layer with all changes.
    #[arg(long)]
    delete: bool,
}

impl Umount {
    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let record = match find_layer(&site.store, &self.layer) {
            Ok(record) => record,
            Err(failure) => {
                return match unreadable(&site.store, &self.layer)? {
                    Some((id, problem)) => self.give_up(site, &id, problem, io),
                    None => Err(failure),
                };
            }
        };
        if record.owner.kind == OwnerKind::Object {
            let message = format!("the layer {} belongs to the WritableLayer {}", record.id, record.owner);
            return Err(Failure::new(Exit::InUse, message).hint("delete that object: its agent then unmounts it"));
        }
        // A read-only layer has nothing to keep.
        let delete = self.delete || record.mode == Mode::ReadOnly || record.stage == Stage::Releasing;
        if record.mode == Mode::Tmpfs && !delete {
            let message = format!("the changes in {} are in memory, and would be lost", record.owner.name);
            return Err(Failure::new(Exit::InUse, message).hint("give --delete to delete them"));
        }
        match delete {
            true => site.layers.release(&record.id, false)?,
            false => site.layers.unmount(&record.id)?,
        }
        site.layers.unmount_unused(std::time::Duration::ZERO)?;
        let what = if delete { "deleted" } else { "unmounted" };
        match io.is_json() {
            true => io.json(&json!({"id": record.id, "name": record.owner.name, "state": what}))?,
            false => io.line(&format!("{} is {what}", record.owner.name))?,
        }
        Ok(Exit::Done)
    }

    /// Deletes a layer of which nothing is known but its id.
    fn give_up(&self, site: &Site, id: &LayerId, problem: Problem, io: &mut Io) -> Result<Exit, Failure> {
        if !self.delete {
            let failure = Failure::new(Exit::Damaged, format!("{}: {}", problem.path, problem.message));
            return Err(failure.hint("give --delete to delete the layer with all that was changed in it"));
        }
        site.layers.release(id, false)?;
        site.layers.unmount_unused(std::time::Duration::ZERO)?;
        match io.is_json() {
            true => io.json(&json!({"id": id, "name": null, "state": "deleted"}))?,
            false => io.line(&format!("{id} is deleted"))?,
        }
        Ok(Exit::Done)
    }
}

/// Capture a mounted layer as a tree, and give that a name. Only the changes are read.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Snapshot {
    /// The layer: its name, its id, or at least 8 characters of that.
    layer: String,
    /// The ref that stands for the tree, as NAME (in the namespace `local`) or NAMESPACE/NAME.
    #[arg(long)]
    name: String,
    /// How many former trees of the name are kept as history.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = history_limit())]
    history_limit: u32,
}

impl Snapshot {
    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let name = parse_name(&self.name)?;
        refuse_others(site, &name)?;
        let record = find_layer(&site.store, &self.layer)?;
        let (started, now) = (Instant::now(), SystemTime::now());
        let target = Publish {
            name: name.clone(),
            owner: OWNER.to_owned(),
            generation: 0,
            request: None,
            source: json!({"layer": {"name": record.owner.name}}),
            history_limit: self.history_limit,
            now,
        };
        let build = site.store.build()?;
        let tree = source::snapshot(&site.layers, &record.id, &build, &io.cancel())?;
        let built = build.publish(&tree, target)?;
        tell(io, &name, &built, now, started)?;
        Ok(Exit::Done)
    }
}

/// List the node's layers, those of WritableLayers too.
#[derive(Args)]
pub struct ListLayers {}

impl ListLayers {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let (records, problems) = layer::list(store.root())?;
        let mut listed = Vec::new();
        for record in &records {
            listed.push((record, layer::look(store.root(), record)?));
        }
        if io.is_json() {
            let layers: Vec<_> = listed
                .iter()
                .map(|(record, seen)| {
                    json!({
                        "id": record.id,
                        "kind": record.owner.kind,
                        "namespace": record.owner.namespace,
                        "name": record.owner.name,
                        "digest": record.tree,
                        "mode": record.mode,
                        "owner": record.ids.map(|(uid, gid)| json!({"uid": uid, "gid": gid})),
                        "sizeLimit": record.size,
                        "usedBytes": seen.used,
                        "state": state(record, seen),
                        "path": seen.path.display().to_string(),
                    })
                })
                .collect();
            io.json(&json!({"layers": layers, "problems": problems}))?;
        } else {
            let mut table = Table::new(
                &["ID", "NAME", "TREE", "MODE", "LIMIT", "USED", "STATE", "PATH"],
                &[4, 5],
            );
            let size = |bytes: Option<u64>| bytes.map_or("-".to_owned(), human_size);
            for (record, seen) in &listed {
                table.row([
                    record.id.as_str()[..SHORTEST].to_owned(),
                    printable(&record.owner.to_string()),
                    short(&record.tree.hex()).to_owned(),
                    format!("{:?}", record.mode),
                    size(record.size),
                    size(seen.used),
                    state(record, seen).to_owned(),
                    printable(&seen.path.display().to_string()),
                ]);
            }
            io.table(&table)?;
            for problem in &problems {
                io.note(&format!("{}: {}", problem.path, problem.message));
            }
        }
        match problems.is_empty() {
            true => Ok(Exit::Done),
            false => Ok(Exit::Damaged),
        }
    }
}

fn state(record: &LayerRecord, seen: &Seen) -> &'static str {
    match record.stage {
        Stage::Releasing => "releasing",
        Stage::Making => "making",
        Stage::Made if seen.stopped => "stopped",
        Stage::Made if seen.mounted => "mounted",
        Stage::Made => "unmounted",
    }
}

/// The layer with this id, if it has data and its record cannot be read.
fn unreadable(store: &Reader, text: &str) -> Result<Option<(LayerId, Problem)>, Failure> {
    let Ok(id) = text.parse::<LayerId>() else {
        return Ok(None);
    };
    let (_, problems) = layer::list(store.root())?;
    let folder = |problem: &Problem| Path::new(&problem.path).file_name() == Some(OsStr::new(id.as_str()));
    let problem = problems.into_iter().find(folder);
    Ok(problem.map(|problem| (id, problem)))
}

/// Finds a layer by the name that it was given by hand, by the namespace and name of its object, or by its id.
fn find_layer(store: &Reader, text: &str) -> Result<LayerRecord, Failure> {
    let (records, _) = layer::list(store.root())?;
    let by_name = |record: &&LayerRecord| match record.owner.kind {
        OwnerKind::Admin => record.owner.name == text,
        OwnerKind::Object => record.owner.to_string() == text,
    };
    let by_id = |id: &LayerId| text.len() >= SHORTEST && id.as_str().starts_with(text);
    let mut found: Vec<&LayerRecord> = records.iter().filter(by_name).collect();
    if found.is_empty() {
        found = records.iter().filter(|record| by_id(&record.id)).collect();
    }
    match &found[..] {
        [record] => Ok((*record).clone()),
        [] => Err(Failure::new(Exit::NotFound, format!("there is no layer {text:?}"))
            .hint("`larder store layers` lists them")),
        [first, second, ..] => Err(Failure::new(
            Exit::NotFound,
            format!(
                "there is not one layer {text:?}, but several, such as {} and {}",
                first.id, second.id
            ),
        )
        .hint("give more of the id")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_two_numbers() {
        assert_eq!(parse_ids("1000:0"), Ok((1000, 0)));
        for bad in ["", "1000", "1:", ":1", "-1:0", "a:b", "1:2:3", "4294967295:0"] {
            assert!(parse_ids(bad).unwrap_err().contains("UID:GID"), "{bad}");
        }
    }
}
