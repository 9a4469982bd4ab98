//! The independent checker: looks at a store's folder with nothing of the store's code but the decoder of manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::life::HISTORY;
use crate::store::tree::Tree;

/// What a ref's file says, as digests in hexadecimal.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ref {
    pub current: Option<String>,
    /// The newest first.
    pub history: Vec<String>,
}

/// What is in a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// By `namespace/name`.
    pub refs: BTreeMap<String, Ref>,
    pub manifests: BTreeSet<String>,
    pub objects: BTreeSet<String>,
    /// Contents that a manifest names.
    pub needed: BTreeSet<String>,
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Names and paths in a folder; none if it does not exist (yet).
fn list(folder: &Path) -> Vec<(String, std::path::PathBuf)> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        entries => entries
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
            .collect(),
    }
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn hex_of(digest: &serde_json::Value) -> String {
    let digest = digest.as_str().expect("a digest");
    digest.strip_prefix("sha256:").expect("SHA-256").to_owned()
}

/// Looks at everything. Fails for a blob or manifest with other bytes than its name says, for a manifest that lacks a
/// blob, and for a ref that cannot be read or whose manifest is not there.
pub fn look(root: &Path) -> State {
    let mut state = State::default();
    let mut sizes = BTreeMap::new();
    for (shard, folder) in list(&root.join("objects")) {
        for (rest, path) in list(&folder) {
            let bytes = read(&path);
            let name = format!("{shard}{rest}");
            assert_eq!(
                sha256(&bytes),
                name,
                "{} has other bytes than its name says: {} bytes, {} of its pages are zeros",
                path.display(),
                bytes.len(),
                bytes
                    .chunks(4096)
                    .filter(|page| page.iter().all(|byte| *byte == 0))
                    .count()
            );
            sizes.insert(name.clone(), bytes.len() as u64);
            state.objects.insert(name);
        }
    }
    let quarantined = list(&root.join("quarantine")).into_iter();
    let quarantined: BTreeSet<_> = quarantined
        .filter_map(|(name, _)| Some(name.get(..64)?.to_owned()))
        .collect();
    for (name, path) in list(&root.join("manifests")) {
        let bytes = read(&path);
        assert_eq!(
            sha256(&bytes),
            name,
            "{} ({} bytes) is not the manifest that it is named as",
            path.display(),
            bytes.len()
        );
        let tree = Tree::decode(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for (digest, size) in tree.contents() {
            let digest = digest.hex();
            if !sizes.contains_key(&digest) && quarantined.contains(&digest) {
                // It could not be read, and whoever found that was struck before it was built again.
                continue;
            }
            assert_eq!(sizes.get(&digest), Some(&size), "the manifest {name} lacks {digest}");
            state.needed.insert(digest);
        }
        state.manifests.insert(name);
    }
    for (namespace, folder) in list(&root.join("refs")) {
        for (name, path) in list(&folder) {
            let value: serde_json::Value = serde_json::from_slice(&read(&path))
                .unwrap_or_else(|error| panic!("{} cannot be read: {error}", path.display()));
            assert_eq!(value["version"], 1);
            let history = value["history"].as_array().expect("a history");
            let entry = Ref {
                current: value.get("current").map(|revision| hex_of(&revision["digest"])),
                history: history.iter().map(|old| hex_of(&old["revision"]["digest"])).collect(),
            };
            for tree in entry.current.iter().chain(&entry.history) {
                assert!(
                    state.manifests.contains(tree),
                    "{namespace}/{name} names {tree}, which is not there"
                );
            }
            state.refs.insert(format!("{namespace}/{name}"), entry);
        }
    }
    state
}

/// What lies in `staging/`.
pub fn staged(root: &Path) -> Vec<String> {
    list(&root.join("staging")).into_iter().map(|(name, _)| name).collect()
}

/// What a life that was cut short must have left, by what it said.
#[derive(Debug, Clone, Default)]
pub struct Promise {
    /// How each ref can be. More than one is possible after something failed.
    refs: BTreeMap<String, BTreeSet<Ref>>,
    /// What was begun: how the ref can be if it has been done.
    begun: BTreeMap<String, BTreeSet<Ref>>,
    /// Contents that no tree names and that are there.
    contents: BTreeSet<String>,
    /// Contents that were removed.
    removed: BTreeSet<String>,
}

impl Promise {
    /// The promise of a store that nobody is at work on.
    pub fn of(state: &State) -> Self {
        let refs = state.refs.iter();
        Self {
            refs: refs
                .map(|(name, entry)| (name.clone(), [entry.clone()].into()))
                .collect(),
            ..Self::default()
        }
    }

    fn can_be(&self, name: &str) -> BTreeSet<Ref> {
        let known = self.refs.get(name).cloned();
        known.unwrap_or_else(|| [Ref::default()].into())
    }

    fn begin(&mut self, name: &str, change: impl Fn(&mut Ref)) {
        let changed = self.can_be(name).into_iter().map(|mut entry| {
            change(&mut entry);
            entry
        });
        self.begun.insert(name.to_owned(), changed.collect());
    }

    /// Takes a line in.
    pub fn hear(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        let [what, name, digest] = words[..] else {
            panic!("{line:?} is not an action, a name and a digest");
        };
        let digest = digest.trim_start_matches("sha256:").to_owned();
        let name = format!("test/{name}");
        match what {
            "publishing" => self.begin(&name, |entry| {
                if entry.current.as_ref() == Some(&digest) {
                    return;
                }
                retire(entry);
                entry.history.retain(|old| *old != digest);
                entry.history.truncate(HISTORY as usize);
                entry.current = Some(digest.clone());
            }),
            "retiring" => self.begin(&name, |entry| {
                retire(entry);
                entry.history.truncate(HISTORY as usize);
            }),
            "forgetting" => self.begin(&name, |entry| *entry = Ref::default()),
            "putting" => self.removed.clear(),
            "put" => drop(self.contents.insert(digest)),
            "removing" => drop(self.contents.remove(&digest)),
            "removed" => drop(self.removed.insert(digest)),
            "collecting" => {
                self.contents.clear();
                for name in self.refs.keys().cloned().collect::<Vec<_>>() {
                    self.begin(&name, |entry| entry.history.retain(|old| *old == digest));
                }
            }
            "published" | "retired" | "forgotten" | "collected" => self.refs.append(&mut self.begun),
            // Whether it was done before it failed is not known.
            "failed" => {
                for (name, after) in std::mem::take(&mut self.begun) {
                    let before = self.can_be(&name);
                    self.refs.insert(name, before.union(&after).cloned().collect());
                }
            }
            "opened" | "exported" | "moved" | "unmoved" | "verified" | "reopened" => {}
            other => panic!("{other:?} is none of a life's actions"),
        }
    }

    /// Fails unless every ref is as it was before what was begun, or as it is after it.
    pub fn check(&self, state: &State) {
        let lost: Vec<&String> = self.contents.difference(&state.objects).collect();
        assert!(lost.is_empty(), "{lost:?} were put, and are not there");
        let back: Vec<&String> = self.removed.intersection(&state.objects).collect();
        assert!(back.is_empty(), "{back:?} were removed, and are there");
        let known = self.refs.keys().chain(self.begun.keys());
        for name in known.chain(state.refs.keys()) {
            let found = state.refs.get(name).cloned().unwrap_or_default();
            let before = self.can_be(name);
            let after = self.begun.get(name).cloned().unwrap_or_default();
            assert!(
                before.contains(&found) || after.contains(&found),
                "{name} is {found:?}, and was promised as one of {before:?} or {after:?}"
            );
        }
    }
}

fn retire(entry: &mut Ref) {
    if let Some(current) = entry.current.take() {
        entry.history.retain(|old| *old != current);
        entry.history.insert(0, current);
    }
}
