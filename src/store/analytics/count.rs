//! The pass over the manifests.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use super::{Amount, Analytics, BUCKETS, Bucket, Damage, Dedup, FileOf, ManifestUse, RefUse, TopBlob};
use crate::store::index::Index;
use crate::store::layout::{Folder, manifest_path};
use crate::store::stored::{self, Class, Stored};
use crate::store::{Digest, Error, Held, HeldTree, Holders, Problem, TreeDigest, error, gc, manifests};

/// Files that are named of a content.
const SAMPLES: u64 = 3;
/// How often it is counted beside a collection that takes something each time.
const TRIES: u32 = 4;

/// Who names a tree or a content, if not exactly one ref: several do, or something that is no ref.
const NO_ONE_REF: u32 = u32::MAX;

/// How much a tree is needed. A content is needed as much as the trees that name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    /// Not at all: the next collection takes it.
    Nobody,
    /// As history.
    Past,
    /// By a ref now, a layer, a mount.
    Live,
}

/// A distinct content.
struct Blob {
    digest: Digest,
    size: u64,
    references: u32,
    /// Trees that name it.
    manifests: u32,
    /// The last of them, by index: the only one if there is one.
    last: u32,
    /// The ref whose trees alone name it, by index, or [`NO_ONE_REF`].
    only_ref: u32,
    class: Class,
    need: Need,
    present: bool,
}

/// Everything that was counted.
pub(super) struct Count<'a> {
    store: &'a Folder,
    refs: Vec<RefUse>,
    index: Index,
    blobs: Vec<Blob>,
    manifests: Vec<ManifestUse>,
    /// With how much is needed what they are about.
    problems: Vec<(Need, Problem)>,
}

/// Counts, and again if trees have gone meanwhile: a collection that is running takes manifests and then their blobs,
/// which would be missing. After some tries what was counted last has to do.
pub(super) fn settled<T>(
    store: &Folder,
    holders: &dyn Holders,
    figures: impl Fn(&mut Count<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    for _ in 1..TRIES {
        let before = gc::stored_manifests(store)?;
        let figures = Count::of(store, holders).and_then(|mut count| figures(&mut count));
        let after = gc::stored_manifests(store)?;
        let after: HashSet<TreeDigest> = after.into_iter().map(|manifest| manifest.tree).collect();
        if before.iter().all(|manifest| after.contains(&manifest.tree)) {
            return figures;
        }
    }
    figures(&mut Count::of(store, holders)?)
}

impl<'a> Count<'a> {
    fn of(store: &'a Folder, holders: &dyn Holders) -> Result<Self, Error> {
        let Held { trees, unreadable } = holders.held()?;
        let mut held = HeldTree::names(trees);
        let all = stored::all(store)?;
        let unused = |name| RefUse {
            name,
            exclusive_blobs: 0,
            exclusive_bytes: 0,
        };
        // What cannot be read may need anything.
        let unreadable = all.unreadable.into_iter().chain(unreadable);
        let mut count = Self {
            store,
            refs: all.refs.into_iter().map(unused).collect(),
            index: Index::new(),
            blobs: Vec::new(),
            manifests: Vec::new(),
            problems: unreadable.map(|problem| (Need::Live, problem)).collect(),
        };
        for one in all.trees {
            let holders = held.remove(&one.tree).unwrap_or_default();
            let need = match one.class {
                Class::Current => Need::Live,
                _ if !holders.is_empty() => Need::Live,
                Class::History => Need::Past,
                Class::Unnamed => Need::Nobody,
            };
            match manifests::files(store, &one.tree) {
                Ok(found) => count.add(one, holders, need, found),
                // It has gone since it was listed.
                Err(Error::MissingManifest { .. }) if need == Need::Nobody => {}
                Err(error) => count.problem(&one, holders, need, error.to_string()),
            }
        }
        // What a ref names was among them, stored or not; these are of layers and mounts alone.
        for (tree, holders) in held {
            let message = Error::MissingManifest { tree }.to_string();
            let one = Stored {
                class: Class::Unnamed,
                current_of: Vec::new(),
                history_of: Vec::new(),
                tree,
            };
            count.problem(&one, holders, Need::Live, message);
        }
        Ok(count)
    }

    fn problem(&mut self, of: &Stored, holders: Vec<String>, need: Need, message: String) {
        let history = of.history_of.iter().map(|name| format!("the history of {name}"));
        let by: Vec<String> = of.current_of.iter().cloned().chain(holders).chain(history).collect();
        let problem = Problem {
            path: self.store.path(manifest_path(&of.tree)).display().to_string(),
            message: error::needed_by(&message, &by),
        };
        self.problems.push((need, problem));
    }

    fn add(&mut self, one: Stored, holders: Vec<String>, need: Need, found: manifests::Files) {
        let number = self.manifests.len() as u32;
        let only_ref = self.only_ref(&one);
        let mut used = ManifestUse {
            digest: one.tree,
            current_of: one.current_of.clone(),
            history_of: one.history_of.clone(),
            files: found.names,
            references: found.contents.len() as u64,
            blobs: 0,
            logical_bytes: 0,
            unique_bytes: 0,
            exclusive_blobs: 0,
            exclusive_bytes: 0,
        };
        let mut conflict = None;
        for (digest, size) in found.contents {
            used.logical_bytes = used.logical_bytes.saturating_add(size);
            let blobs = &mut self.blobs;
            let (index, new) = self.index.insert(&digest, |number| blobs[number as usize].digest);
            if new {
                blobs.push(Blob {
                    digest,
                    size,
                    references: 0,
                    manifests: 0,
                    last: 0,
                    only_ref,
                    class: one.class,
                    need,
                    present: false,
                });
            }
            let blob = &mut blobs[index as usize];
            blob.references = blob.references.saturating_add(1);
            if blob.manifests == 0 || blob.last != number {
                blob.manifests += 1;
                blob.last = number;
                used.blobs += 1;
                used.unique_bytes = used.unique_bytes.saturating_add(blob.size);
                blob.need = blob.need.max(need);
                // What goes with the next collection shares it with nobody.
                if blob.only_ref != only_ref && need > Need::Nobody {
                    blob.only_ref = NO_ONE_REF;
                }
            }
            if blob.size != size {
                conflict = Some((digest, size, blob.size));
            }
        }
        self.manifests.push(used);
        if let Some((content, size, before)) = conflict {
            let message = format!("it gives {content} {size} bytes, and another place {before}: one of them is wrong");
            self.problem(&one, holders, need, message);
        }
    }

    /// The one ref that names a tree, as its current one or in its history.
    fn only_ref(&self, tree: &Stored) -> u32 {
        let mut names = tree.current_of.iter().chain(&tree.history_of);
        let only = names.next().filter(|first| names.all(|name| name == *first));
        let found = only.and_then(|name| self.refs.binary_search_by(|used| used.name.cmp(name)).ok());
        found.map_or(NO_ONE_REF, |index| index as u32)
    }

    pub fn dedup(&self) -> Dedup {
        let logical = sum(self.manifests.iter().map(|used| used.logical_bytes));
        let unique = sum(self.blobs.iter().map(|blob| blob.size));
        let saved = logical.saturating_sub(unique);
        let part = |of: u64, whole: u64, empty: f64| match whole {
            0 => empty,
            _ => of as f64 / whole as f64,
        };
        Dedup {
            refs: self.refs.len() as u64,
            manifests: self.manifests.len() as u64,
            references: sum(self.manifests.iter().map(|used| used.references)),
            unique_blobs: self.blobs.len() as u64,
            logical_bytes: logical,
            unique_bytes: unique,
            saved_bytes: saved,
            saved_percent: 100.0 * part(saved, logical, 0.0),
            ratio: part(logical, unique, 1.0),
            incomplete: !self.problems.is_empty(),
            problems: self.problems.iter().map(|(_, problem)| problem.clone()).collect(),
        }
    }

    pub fn analytics(&mut self, top: usize) -> Result<Analytics, Error> {
        let garbage = self.scan()?;
        let bounds = BUCKETS.iter().map(|bound| Some(*bound)).chain([None]);
        let mut sizes: Vec<Bucket> = bounds
            .map(|below| Bucket {
                below,
                amount: Amount::default(),
            })
            .collect();
        let (mut current, mut history, mut unnamed) = (Amount::default(), Amount::default(), Amount::default());
        let mut missing = Amount::default();
        for blob in &self.blobs {
            match blob.class {
                Class::Current => current.add(blob.size),
                Class::History => history.add(blob.size),
                Class::Unnamed => unnamed.add(blob.size),
            }
            if !blob.present && blob.need > Need::Nobody {
                missing.add(blob.size);
            }
            let bucket = BUCKETS.partition_point(|bound| *bound <= blob.size);
            sizes[bucket].amount.add(blob.size);
            if blob.manifests == 1 {
                let owner = &mut self.manifests[blob.last as usize];
                owner.exclusive_blobs += 1;
                owner.exclusive_bytes = owner.exclusive_bytes.saturating_add(blob.size);
            }
            if let Some(used) = self.refs.get_mut(blob.only_ref as usize) {
                used.exclusive_blobs += 1;
                used.exclusive_bytes = used.exclusive_bytes.saturating_add(blob.size);
            }
        }
        let saved = |blob: &Blob| blob.size.saturating_mul(u64::from(blob.references.saturating_sub(1)));
        let shown = |numbers: Vec<u32>| -> Vec<TopBlob> {
            let shown = numbers.into_iter().map(|number| {
                let blob = &self.blobs[number as usize];
                TopBlob {
                    digest: blob.digest,
                    size: blob.size,
                    references: u64::from(blob.references),
                    manifests: u64::from(blob.manifests),
                    saved_bytes: saved(blob),
                    samples: Vec::new(),
                }
            });
            shown.collect()
        };
        let top_saved = shown(self.first(top, saved));
        let top_size = shown(self.first(top, |blob| blob.size));
        Ok(Analytics {
            dedup: self.dedup(),
            current,
            history,
            unnamed,
            garbage,
            missing,
            sizes,
            manifests: std::mem::take(&mut self.manifests),
            refs: std::mem::take(&mut self.refs),
            top_saved,
            top_size,
        })
    }

    /// Looks which contents are there. Returns what is there besides.
    fn scan(&mut self) -> Result<Amount, Error> {
        let mut garbage = Amount::default();
        for byte in 0..=255u8 {
            let Some(shard) = self.store.list_shard(byte)? else {
                continue;
            };
            for (digest, name) in shard.iter() {
                let blobs = &self.blobs;
                if let Some(number) = self.index.get(&digest, |number| blobs[number as usize].digest) {
                    self.blobs[number as usize].present = true;
                } else if let Some(stat) = shard.stat(name)? {
                    garbage.add(stat.st_size.max(0) as u64);
                }
            }
        }
        Ok(garbage)
    }

    /// The numbers of the first contents by a figure, the highest first; none with a figure of 0.
    fn first(&self, top: usize, figure: impl Fn(&Blob) -> u64) -> Vec<u32> {
        let mut first: Vec<(Reverse<u64>, Digest, u32)> = Vec::new();
        let figures = self.blobs.iter().enumerate();
        for (number, blob) in figures.filter(|(_, blob)| figure(blob) > 0) {
            first.push((Reverse(figure(blob)), blob.digest, number as u32));
            // Sorted only now and then, so that memory is bounded by what is asked for.
            if first.len() >= top.saturating_mul(2).saturating_add(1024) {
                first.sort_unstable();
                first.truncate(top);
            }
        }
        first.sort_unstable();
        first.truncate(top);
        first.into_iter().map(|(_, _, number)| number).collect()
    }

    /// Names a few files of each of the contents that are listed.
    pub fn add_samples(&self, found: &mut Analytics) -> Result<(), Error> {
        let listed = found.top_saved.iter().chain(&found.top_size);
        let mut left: HashMap<Digest, u64> = listed.map(|blob| (blob.digest, SAMPLES.min(blob.references))).collect();
        let mut samples: HashMap<Digest, Vec<FileOf>> = HashMap::new();
        for used in &found.manifests {
            if left.is_empty() {
                break;
            }
            manifests::paths(self.store, &used.digest, &mut |digest, _, path| {
                if let Some(more) = left.get_mut(digest) {
                    samples.entry(*digest).or_default().push(FileOf {
                        manifest: used.digest,
                        path: error::path_text(path),
                    });
                    *more -= 1;
                    if *more == 0 {
                        left.remove(digest);
                    }
                }
                !left.is_empty()
            })?;
        }
        for blob in found.top_saved.iter_mut().chain(&mut found.top_size) {
            blob.samples = samples.get(&blob.digest).cloned().unwrap_or_default();
        }
        Ok(())
    }

    /// What is wrong with what is needed, and what is missing of trees that are live.
    pub fn damage(&self) -> Damage {
        let mut missing = Amount::default();
        for blob in self
            .blobs
            .iter()
            .filter(|blob| !blob.present && blob.need == Need::Live)
        {
            missing.add(blob.size);
        }
        let problems = self.problems.iter().filter(|(need, _)| *need > Need::Nobody);
        Damage {
            problems: problems.map(|(_, problem)| problem.clone()).collect(),
            missing,
        }
    }
}

fn sum(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}
