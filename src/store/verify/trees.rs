//! Refs, manifests, and what lacks what.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicBool;

use super::{BadBlob, BadManifest, Fault, FileOf, HurtFile, HurtTree, Verification, blobs};
use crate::store::index::Index;
use crate::store::layout::{Inner, manifest_path, object_path};
use crate::store::stored::{self, Class, Stored};
use crate::store::{Digest, Error, error, files, manifests};

/// Files that are named of a bad blob, and of a hurt tree.
const SAMPLES: usize = 5;

/// What the manifests name.
struct Named {
    index: Index,
    digests: Vec<Digest>,
    sizes: Vec<u64>,
    /// Contents that two manifests give different sizes.
    disputed: BTreeSet<Digest>,
}

impl Named {
    fn add(&mut self, (digest, size): (Digest, u64)) {
        let digests = &mut self.digests;
        let (number, new) = self.index.insert(&digest, |number| digests[number as usize]);
        if new {
            digests.push(digest);
            self.sizes.push(size);
        } else if self.sizes[number as usize] != size {
            self.disputed.insert(digest);
        }
    }
}

/// Fills in what the report says of refs, manifests and trees; adds to `bad` what is missing or has a wrong length.
pub(super) fn check(
    store: &Inner,
    report: &mut Verification,
    bad: &mut BTreeMap<Digest, BadBlob>,
    cancel: &AtomicBool,
) -> Result<(), Error> {
    // While it is held, no manifest and no blob of one goes: what is missing now is damage. A collection takes its time;
    // after a cancellation it is waited for only if something was found.
    let _no_collection = match bad.is_empty() {
        false => store.collecting.lock(),
        true => match store.collecting.lock_unless(cancel) {
            Some(guard) => guard,
            None => {
                report.complete = false;
                return Ok(());
            }
        },
    };
    let (good, lengths) = loop {
        let (good, named) = read(store, report)?;
        let moved = |bad: &BTreeMap<Digest, BadBlob>| bad.values().filter(|one| one.quarantined.is_some()).count();
        let before = moved(bad);
        // Contents that are right, and whose length a manifest gives wrong: their true lengths.
        let mut lengths: HashMap<Digest, u64> = HashMap::new();
        for (digest, size) in named.digests.iter().zip(&named.sizes) {
            let disputed = named.disputed.contains(digest);
            if let Some(length) = look(store, digest, *size, bad).filter(|length| disputed || length != size) {
                lengths.insert(*digest, length);
            }
        }
        // A tree that was published before one of these went, and after the manifests were listed, needs telling too.
        if moved(bad) == before {
            break (good, lengths);
        }
    };
    for one in bad.values_mut().filter(|one| one.quarantined.is_some()) {
        let path = object_path(&one.digest);
        one.healed = matches!(files::stat(&store.dir, path.as_str()), Ok(Some(stat)) if files::is_file(&stat));
    }
    if !lengths.is_empty() {
        wrong_sizes(store, report, &good, &lengths);
    }
    if bad.values().any(|one| !one.healed) {
        for one in good {
            hurts(store, report, one, bad);
        }
    }
    Ok(())
}

/// Reads all refs and manifests. Returns the trees that could be read, and what they name.
fn read(store: &Inner, report: &mut Verification) -> Result<(Vec<Stored>, Named), Error> {
    let all = stored::all(store)?;
    report.refs = all.refs.len() as u64;
    report.bad_refs = all.unreadable;
    report.bad_manifests.clear();
    let mut named = Named {
        index: Index::new(),
        digests: Vec::new(),
        sizes: Vec::new(),
        disputed: BTreeSet::new(),
    };
    let mut good = Vec::new();
    for one in all.trees {
        match manifests::files(store, &one.tree) {
            Ok(found) => {
                found.contents.into_iter().for_each(|content| named.add(content));
                good.push(one);
            }
            Err(Error::MissingManifest { .. }) if one.class == Class::Unnamed => {}
            Err(error) => report.bad_manifests.push(bad_manifest(store, &one, error.to_string())),
        }
    }
    report.manifests = good.len() as u64;
    Ok((good, named))
}

fn bad_manifest(store: &Inner, one: &Stored, message: String) -> BadManifest {
    BadManifest {
        digest: one.tree,
        path: store.path(manifest_path(&one.tree)),
        message,
        current_of: one.current_of.clone(),
        history_of: one.history_of.clone(),
    }
}

/// Looks whether a content is there. Returns the length of one that is there and right, as far as is known.
fn look(store: &Inner, digest: &Digest, size: u64, bad: &mut BTreeMap<Digest, BadBlob>) -> Option<u64> {
    let path = object_path(digest);
    let moved = bad.get(digest).map(|bad| bad.not_moved.is_none());
    match files::stat(&store.dir, path.as_str()) {
        Ok(Some(stat)) if files::is_file(&stat) && stat.st_size.max(0) as u64 == size => Some(size),
        // It was judged already, and is still there.
        Ok(Some(_)) | Err(_) if moved == Some(false) => None,
        Ok(Some(stat)) => match blobs::check_one(store, digest) {
            Some(found) => {
                bad.insert(*digest, found);
                None
            }
            // Its bytes are right, so the manifest's length is not.
            None => Some(stat.st_size.max(0) as u64),
        },
        Err(_) => {
            if let Some(found) = blobs::check_one(store, digest) {
                bad.insert(*digest, found);
            }
            None
        }
        Ok(None) => {
            bad.entry(*digest).or_insert_with(|| BadBlob {
                digest: *digest,
                path: store.path(&path),
                fault: Fault::Missing,
                quarantined: None,
                not_moved: None,
                not_durable: None,
                healed: false,
                files: 0,
                samples: Vec::new(),
            });
            None
        }
    }
}

/// Manifests that give a content another length than it has.
fn wrong_sizes(store: &Inner, report: &mut Verification, trees: &[Stored], lengths: &HashMap<Digest, u64>) {
    for one in trees {
        let contents = match manifests::files(store, &one.tree) {
            Ok(found) => found.contents,
            Err(error) => {
                report.bad_manifests.push(bad_manifest(store, one, error.to_string()));
                continue;
            }
        };
        let wrong = contents.into_iter().find_map(|(digest, size)| {
            let length = lengths.get(&digest).filter(|length| **length != size);
            length.map(|length| (digest, size, *length))
        });
        if let Some((digest, size, length)) = wrong {
            let message =
                format!("it gives the content {digest} {size} bytes, but that has {length}; rebuild the tree");
            report.bad_manifests.push(bad_manifest(store, one, message));
        }
    }
}

/// Notes what one tree lacks.
fn hurts(store: &Inner, report: &mut Verification, one: Stored, bad: &mut BTreeMap<Digest, BadBlob>) {
    let mut hurt = HurtTree {
        digest: one.tree,
        current_of: one.current_of.clone(),
        history_of: one.history_of.clone(),
        blobs: 0,
        files: 0,
        samples: Vec::new(),
    };
    let mut lacks: BTreeSet<Digest> = BTreeSet::new();
    let read = manifests::paths(store, &one.tree, &mut |digest, _, path| {
        let Some(blob) = bad.get_mut(digest).filter(|blob| !blob.healed) else {
            return true;
        };
        lacks.insert(*digest);
        blob.files += 1;
        if blob.samples.len() < SAMPLES {
            blob.samples.push(FileOf {
                manifest: one.tree,
                path: error::path_text(path),
            });
        }
        hurt.files += 1;
        if hurt.samples.len() < SAMPLES {
            hurt.samples.push(HurtFile {
                path: error::path_text(path),
                content: *digest,
            });
        }
        true
    });
    if let Err(error) = read {
        report.bad_manifests.push(bad_manifest(store, &one, error.to_string()));
    }
    hurt.blobs = lacks.len() as u64;
    if hurt.blobs > 0 {
        report.hurt.push(hurt);
    }
}
