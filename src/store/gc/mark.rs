//! The mark: who names which trees, what these name, what there is.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use rayon::prelude::*;
use rustix::io::Errno;

use super::{Collecting, HeldTree, Holders};
use crate::store::files;
use crate::store::index::Index;
use crate::store::layout::{Folder, Inner, MANIFESTS, manifest_path};
use crate::store::leases::BuildLeases;
use crate::store::quarantine::Quarantined;
use crate::store::retention::{BlobFact, Facts, ImageFact, Live, ManifestFact};
use crate::store::{Digest, Error, Problem, RefName, TreeDigest, error, images, manifests, quarantine};

/// What a mark found out; by default one that was cancelled before it began.
#[derive(Default)]
pub(super) struct Marked {
    pub facts: Facts,
    /// The refs in whose history each manifest is, by index.
    pub history: Vec<Vec<RefName>>,
    pub orphans: Vec<StoredManifest>,
    /// What has been in quarantine for long enough.
    pub quarantined: Vec<Quarantined>,
    pub blocked: Vec<Problem>,
    pub scanned: u64,
    /// `false`: it was cancelled. A plan made of half the facts must not be carried out.
    pub complete: bool,
}

/// Who names a tree.
#[derive(Default)]
struct Named {
    live: Option<Live>,
    /// Only a hold: perhaps that of a build whose manifest has no name yet.
    hold_only: bool,
    retired_at: Option<SystemTime>,
    history: Vec<RefName>,
    /// For messages.
    by: Vec<String>,
}

pub(super) fn mark(store: &Inner, holders: &dyn Holders, how: &Collecting) -> Result<Marked, Error> {
    let refs = store.refs()?;
    let held = holders.held()?;
    let holds = store.leases.trees();
    let mut blocked = refs.unreadable;
    blocked.extend(held.unreadable);

    // Sorted, so that the report does not depend on chance.
    let mut named: BTreeMap<TreeDigest, Named> = BTreeMap::new();
    for entry in &refs.refs {
        if let Some(current) = &entry.current {
            let named = named.entry(current.digest).or_default();
            named.live = Some(Live::Current);
            named.by.push(entry.name.to_string());
        }
        for old in &entry.history {
            let named = named.entry(old.revision.digest).or_default();
            named.retired_at = named.retired_at.max(Some(old.retired_at));
            named.history.push(entry.name.clone());
        }
    }
    for held in &held.trees {
        let live = if held.is_layer() { Live::Layer } else { Live::InUse };
        let named = &mut named.entry(held.tree).or_default().live;
        *named = Some(named.map_or(live, |known| known.min(live)));
    }
    let mut in_use: HashSet<TreeDigest> = held.trees.iter().map(|held| held.tree).collect();
    for (tree, names) in HeldTree::names(held.trees) {
        named.entry(tree).or_default().by.extend(names);
    }
    // Who needs it now comes first: the first one is named as what takes the room.
    for named in named.values_mut() {
        let history = named.history.iter().map(|name| format!("the history of {name}"));
        named.by.extend(history);
    }
    for tree in &holds {
        let named = named.entry(*tree).or_default();
        named.hold_only = named.by.is_empty();
        named.live.get_or_insert(Live::InUse);
    }
    in_use.extend(holds);

    let asked = |e| Error::io("ask for the free space of", &store.root, e);
    let mut facts = Facts {
        free: files::available(&store.dir).map_err(asked)?,
        total: files::total(&store.dir).map_err(asked)?,
        ..Facts::default()
    };
    let mut index = Index::new();
    let mut history = Vec::new();
    for (tree, named) in &named {
        if how.cancel.load(Ordering::Relaxed) {
            break;
        }
        match read_manifest(store, tree, named, &mut facts.blobs, &mut index) {
            Ok(fact) => {
                facts.manifests.push(fact);
                history.push(named.history.clone());
            }
            Err(Error::MissingManifest { .. }) if named.hold_only => {}
            Err(error) => blocked.push(Problem {
                path: store.path(manifest_path(tree)).display().to_string(),
                message: error::needed_by(&error.to_string(), &named.by),
            }),
        }
    }
    let orphans = orphans(store, &named)?;
    let quarantined = quarantine::old(store, how.now)?;
    facts.expired = quarantined.iter().map(|one| one.size).fold(0, u64::saturating_add);
    facts.orphans = orphans.iter().map(|orphan| orphan.size).sum();
    let scanned = scan(store, &mut facts, &index, how)?;
    for image in images::list(store)? {
        facts.images.push(ImageFact {
            in_use: in_use.contains(&image.tree),
            name: image.name,
            tree: image.tree,
            size: image.size,
            last_used: image.last_used,
        });
    }
    Ok(Marked {
        facts,
        history,
        orphans,
        quarantined,
        blocked,
        scanned,
        complete: !how.cancel.load(Ordering::Relaxed),
    })
}

fn read_manifest(
    store: &Inner,
    tree: &TreeDigest,
    named: &Named,
    blobs: &mut Vec<BlobFact>,
    index: &mut Index,
) -> Result<ManifestFact, Error> {
    let contents = manifests::contents(store, tree)?;
    let path = manifest_path(tree);
    let stat = files::stat(&store.dir, path.as_str()).map_err(|e| Error::io("look at", store.path(&path), e))?;
    let stat = stat.ok_or(Error::MissingManifest { tree: *tree })?;
    let number = |(digest, size): (Digest, u64)| {
        let (number, new) = index.insert(&digest, |number| blobs[number as usize].digest);
        if new {
            blobs.push(BlobFact {
                digest,
                size,
                last_used: SystemTime::UNIX_EPOCH,
                leased: false,
                present: false,
            });
        }
        number
    };
    // The manifest's mtime is when the tree was last built, held or seen in use.
    let used = files::mtime(&stat);
    Ok(ManifestFact {
        tree: *tree,
        size: stat.st_size.max(0) as u64,
        live: named.live,
        needed_by: named.by.clone(),
        unused_since: named.retired_at.map_or(used, |retired| retired.max(used)),
        blobs: contents.into_iter().map(number).collect(),
    })
}

/// Manifests that no ref, holder or hold names: their publish was cut short, or their history's limit was applied.
fn orphans(store: &Inner, named: &BTreeMap<TreeDigest, Named>) -> Result<Vec<StoredManifest>, Error> {
    let mut orphans = stored_manifests(store)?;
    orphans.retain(|manifest| !named.contains_key(&manifest.tree));
    Ok(orphans)
}

/// A manifest that is in the store, whoever names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredManifest {
    pub tree: TreeDigest,
    /// Bytes.
    pub size: u64,
    /// When it was last built, held or seen in use.
    pub last_used: SystemTime,
}

/// Every manifest in the store, by digest.
pub(in crate::store) fn stored_manifests(store: &Folder) -> Result<Vec<StoredManifest>, Error> {
    let error = |e: Errno| Error::io("list", store.path(MANIFESTS), e);
    let dir = files::open_dir(&store.dir, MANIFESTS).map_err(error)?;
    let mut found = Vec::new();
    for (name, _) in files::names(&dir).map_err(error)? {
        let tree = name.to_str().ok().and_then(TreeDigest::from_hex);
        // Another name is nothing that the store has made: it is not the store's to judge.
        if let (Some(tree), Some(stat)) = (tree, files::stat(&dir, name.as_c_str()).map_err(error)?) {
            found.push(StoredManifest {
                tree,
                size: stat.st_size.max(0) as u64,
                last_used: files::mtime(&stat),
            });
        }
    }
    found.sort_unstable_by_key(|manifest| manifest.tree);
    Ok(found)
}

/// With so many names in a shard, there is work for two threads.
const LARGE_SHARD: usize = 256;

/// Looks through `objects/`: names only for what is live, also times and sizes for the rest. Returns the count.
///
/// Most of that is waiting for memory, which two threads do in half the time; not while builds want the processors.
fn scan(store: &Inner, facts: &mut Facts, index: &Index, how: &Collecting) -> Result<u64, Error> {
    let mut live = vec![false; facts.blobs.len()];
    for manifest in facts.manifests.iter().filter(|manifest| manifest.live.is_some()) {
        for blob in &manifest.blobs {
            live[*blob as usize] = true;
        }
    }
    let mut scanned = 0;
    let mut shards = 0..=255u8;
    let mut is_large = false;
    while !shards.is_empty() && !how.cancel.load(Ordering::Relaxed) {
        let threads = if is_large && !store.leases.is_building() { 2 } else { 1 };
        let turn: Vec<u8> = shards.by_ref().take(threads).collect();
        let builds = store.leases.builds();
        let known = &facts.blobs;
        let look = |byte: &u8| look_through(store, *byte, known, index, &live, &builds);
        let looked: Vec<Looked> = match turn.len() {
            1 => turn.iter().map(look).collect::<Result<_, _>>()?,
            _ => turn.par_iter().map(look).collect::<Result<_, _>>()?,
        };
        for looked in looked {
            is_large = looked.live.len() + looked.others.len() > LARGE_SHARD;
            scanned += (looked.live.len() + looked.others.len() + looked.gone) as u64;
            for known in looked.live {
                let blob = &mut facts.blobs[known as usize];
                (blob.present, blob.last_used) = (true, how.now);
            }
            for (known, fact) in looked.others {
                match known {
                    Some(known) => facts.blobs[known as usize] = fact,
                    None => facts.blobs.push(fact),
                }
            }
        }
    }
    Ok(scanned)
}

/// What is in one shard.
#[derive(Default)]
struct Looked {
    /// Numbers of live blobs that are there.
    live: Vec<u32>,
    /// The others, with their numbers if a manifest names them.
    others: Vec<(Option<u32>, BlobFact)>,
    /// Another collection cannot be running, but an admin can.
    gone: usize,
}

fn look_through(
    store: &Inner,
    byte: u8,
    blobs: &[BlobFact],
    index: &Index,
    live: &[bool],
    builds: &[Arc<BuildLeases>],
) -> Result<Looked, Error> {
    let mut looked = Looked::default();
    let Some(shard) = store.list_shard(byte)? else {
        return Ok(looked);
    };
    for (digest, name) in shard.iter() {
        let known = index.get(&digest, |number| blobs[number as usize].digest);
        if let Some(known) = known
            && live[known as usize]
        {
            looked.live.push(known);
            continue;
        }
        let Some(stat) = shard.stat(name)? else {
            looked.gone += 1;
            continue;
        };
        let fact = BlobFact {
            digest,
            size: stat.st_size.max(0) as u64,
            last_used: files::mtime(&stat),
            leased: builds.iter().any(|build| build.has(&digest)),
            present: true,
        };
        looked.others.push((known, fact));
    }
    Ok(looked)
}
