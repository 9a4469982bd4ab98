//! What the node's loop has done on other threads, and what comes back.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use tracing::warn;

use super::analysis::{Figures, LISTED, Trouble};
use super::builds::{Builder, Ended, MountedLayers};
use super::plan::Goal;
use super::retention::{How, Room, Trigger};
use super::{retention, saved};
use crate::api::{NodeStore, Parsed, ProjectedManifest, StoreUsage, human_size, int64};
use crate::cluster::{ObjectKey, WriteError};
use crate::store::{self, Problem, Ref, RefName, Refs, Report, RunId};

/// What ended on another thread.
pub enum Done {
    Built(Box<Built>),
    Retired {
        key: ObjectKey,
        stored: Result<Option<Box<Ref>>, String>,
    },
    Collected(Box<Collected>),
    Saved(Result<(), saved::FileError>),
    Counted(Option<StoreUsage>),
    Analysed(Box<Analysed>),
    Looked(Option<Room>),
    /// All refs, as they were after so many changes of the loop's own.
    Reread {
        change: u64,
        refs: Result<BTreeMap<ObjectKey, Ref>, String>,
        usage: Option<StoreUsage>,
    },
    Written(Result<Box<Parsed<NodeStore>>, WriteError>),
}

/// A build's end.
pub struct Built {
    pub goal: Goal,
    pub key: ObjectKey,
    pub took: Duration,
    /// The source was a layer.
    pub snapshot: bool,
    pub result: Result<(), Ended>,
    pub stored: Option<Ref>,
    pub usage: Option<StoreUsage>,
}

/// A retention run's end.
pub struct Collected {
    pub request: Option<String>,
    pub trigger: Trigger,
    pub result: Result<(Report, Option<RunId>), String>,
    pub refs: Option<BTreeMap<ObjectKey, Ref>>,
    pub usage: Option<StoreUsage>,
}

/// A look through the store's end.
pub struct Analysed {
    pub began: Instant,
    pub result: Result<Figures, String>,
    pub trouble: Option<Trouble>,
    /// Something keeps collections from deleting.
    pub is_blocked: bool,
}

/// Builds a manifest's tree.
pub fn build(builder: &Builder, manifest: &ProjectedManifest, mounted: &MountedLayers, cancel: &AtomicBool) -> Built {
    let started = Instant::now();
    let key = ObjectKey::new(&manifest.namespace, &manifest.name);
    let result = builder.build(manifest, mounted, cancel);
    let took = started.elapsed();
    let stored = read_ref(builder, &key);
    let usage = count(builder);
    Built {
        goal: Goal::of(manifest),
        key,
        took,
        snapshot: manifest.source.layer.is_some(),
        result,
        stored,
        usage,
    }
}

/// Makes the tree of a manifest that the node lost history.
pub fn retire(builder: &Builder, key: ObjectKey, owner: &str) -> Done {
    let stored = RefName::new(&key.namespace, &key.name).and_then(|name| {
        builder.store.retire(&name, owner, SystemTime::now())?;
        builder.store.get_ref(&name)
    });
    let stored = stored
        .map(|stored| stored.map(Box::new))
        .map_err(|error| error.to_string());
    Done::Retired { key, stored }
}

/// Runs retention.
pub fn collect(builder: &Builder, how: How) -> Collected {
    // What only waits for a next layer is not in use; also for a dry run, which is to say what a real one would do.
    if let Err(error) = builder.layers.unmount_unused(Duration::ZERO) {
        warn!(%error, "cannot unmount a tree that no layer shows any more; it counts as in use");
    }
    let result = retention::run(&builder.store, &builder.layers, &how);
    let request = how.policy.and_then(|policy| policy.requested_at);
    let refs = read_refs(builder).ok().map(|(refs, _)| refs);
    let usage = count(builder);
    Collected {
        request,
        trigger: how.trigger,
        result,
        refs,
        usage,
    }
}

fn read_ref(builder: &Builder, key: &ObjectKey) -> Option<Ref> {
    let name = RefName::new(&key.namespace, &key.name).ok()?;
    builder.store.get_ref(&name).ok()?
}

/// The refs of the store, and those that cannot be read.
pub fn read_refs(builder: &Builder) -> Result<(BTreeMap<ObjectKey, Ref>, Vec<Problem>), store::Error> {
    let Refs { refs, unreadable } = builder.store.refs()?;
    let refs = refs
        .into_iter()
        .map(|entry| (ObjectKey::new(entry.name.namespace(), entry.name.name()), entry));
    Ok((refs.collect(), unreadable))
}

/// Reads all refs and counts, after somebody else's command.
pub fn reread(builder: &Builder, change: u64) -> Done {
    let refs = read_refs(builder).map(|(refs, _)| refs).map_err(|e| e.to_string());
    Done::Reread {
        change,
        refs,
        usage: count(builder),
    }
}

/// Counts what the store holds.
pub fn count(builder: &Builder) -> Option<StoreUsage> {
    let (blobs, bytes) = builder.store.blobs().ok()?;
    Some(StoreUsage {
        blobs: int64(blobs),
        stored_bytes: int64(bytes),
        stored: human_size(bytes),
    })
}

/// Looks through the store: what its room is used for, and what is wrong.
pub fn analyse(builder: &Builder) -> Analysed {
    let began = Instant::now();
    let found = builder.store.look_through(&builder.layers, LISTED);
    let damage = found.as_ref().map(|(_, damage)| damage);
    Analysed {
        began,
        trouble: Trouble::of(damage),
        is_blocked: damage.map_or(true, |damage| !damage.problems.is_empty()),
        result: found
            .map(|(found, damage)| Figures::of(&found, &damage))
            .map_err(|error| error.to_string()),
    }
}
