//! Everything that larder reads and did not write itself just now: what lies on a disk, and what users write. One
//! function per kind reads bytes as that kind, and checks what must hold of whatever was read.
//!
//! The fuzz targets in `fuzz/` call these functions, and the tests here feed them with the targets' corpora, changed by
//! chance, and measure the memory that they take. Only in tests and under `cfg(fuzzing)`.

#[cfg(test)]
mod tests;

use std::str::FromStr;

use jiff::Timestamp;

use crate::agent::{Memory, Room, SavedSpec, adopt, next, parse_saved};
use crate::api::{PolicyRules, ProjectedPolicy, Schedule, Size, parse_duration, parse_size};
use crate::cli::control::Request;
use crate::layer::{LayerId, LayerRecord};
use crate::source::{SourceRoot, check_globs, reread_note};
use crate::store::tree::{Digests, FormatError, Meta, Node, Tree};
use crate::store::{self, Digest, RefName, TreeDigest};

/// A kind of input.
pub struct Input {
    /// Also the name of its fuzz target and of its corpus.
    pub name: &'static str,
    pub read: fn(&[u8]),
    /// Most memory that reading may take at any time: so many bytes for each of the input …
    pub factor: usize,
    /// … and so many whatever the input.
    pub base: usize,
}

const KIB: usize = 1 << 10;

pub const INPUTS: [Input; 15] = [
    // Three bytes are a FIFO with its name: 100 bytes in memory, in vectors that grow by doubling, and once more sorted,
    // counted and encoded again.
    input("manifest", manifest, 200, 512 * KIB),
    input("path", path, 8, 128 * KIB),
    input("ref", reference, 200, 64 * KIB),
    input("config", config, 16, 64 * KIB),
    input("node", node, 200, 512 * KIB),
    input("state", state, 100, 1024 * KIB),
    input("command", command, 100, 64 * KIB),
    input("layer", layer, 100, 64 * KIB),
    input("note", note, 16, 64 * KIB),
    // The first line may be any JSON, in small parts.
    input("run", run, 200, 64 * KIB),
    // Two bytes are a name of one letter: a string and its bytes, in a vector that grows by doubling.
    input("names", names, 64, 64 * KIB),
    input("size", size, 8, 64 * KIB),
    input("duration", duration, 16, 64 * KIB),
    // Zones of the built-in database are read, and kept for the next time.
    input("schedule", schedule, 100, 1024 * KIB),
    // A pattern is a regular expression, whose size is bounded by its compiler.
    input("glob", glob, 1000, 32 * 1024 * KIB),
];

const fn input(name: &'static str, read: fn(&[u8]), factor: usize, base: usize) -> Input {
    Input {
        name,
        read,
        factor,
        base,
    }
}

/// A tree's manifest.
pub fn manifest(bytes: &[u8]) {
    let digests: Result<Vec<_>, FormatError> = Digests::new(bytes).collect();
    let tree = match Tree::decode(bytes) {
        Ok(tree) => tree,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            // The one thing that the stream does not look for.
            assert!(digests.is_err() || matches!(error, FormatError::Sizes(_)), "{error}");
            return;
        }
    };
    let contents: Vec<(Digest, u64)> = tree.contents().map(|(digest, size)| (*digest, size)).collect();
    assert_eq!(digests.map_err(|error| error.to_string()), Ok(contents));
    // What was read is the canonical form of what was read.
    let mut again = Vec::new();
    let digest = tree.encode(&mut again).unwrap_or_else(|error| panic!("{error}"));
    assert!(again == bytes, "two manifests stand for one tree");
    assert_eq!(tree.digest(), Ok(digest));
    let stats = tree.stats();
    assert!(stats.distinct <= stats.logical && stats.files <= stats.entries);
    let mut walk = tree.walk();
    let mut seen = 0u64;
    while let Some((path, node)) = walk.next() {
        // Looking up all of a deep tree would take the square of its depth.
        if seen < 100 {
            assert_eq!(tree.lookup(path), Some(node), "{}", path.escape_ascii());
        }
        seen += 1;
    }
    assert_eq!(seen, stats.entries + 1);
    // Finishing what is finished changes nothing.
    assert!(tree.clone().finish().as_ref() == Ok(&tree));
}

/// A path that is looked up in a tree.
pub fn path(bytes: &[u8]) {
    let tree = small_tree();
    let mut expected = Some(Node::Dir(Tree::ROOT));
    for name in bytes.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        expected = match expected {
            Some(Node::Dir(dir)) => {
                let entries = &tree.dirs[dir.0 as usize].entries;
                entries
                    .iter()
                    .find(|entry| &*entry.name == name)
                    .map(|entry| entry.node)
            }
            _ => None,
        };
    }
    assert_eq!(tree.lookup(bytes), expected);
}

fn small_tree() -> Tree {
    use crate::store::tree::{Leaf, LeafKind};
    let mut tree = Tree::new(Meta::default());
    let mut parent = Tree::ROOT;
    for folder in [b"a".as_slice(), b"bb", b"\xff", b"..."] {
        for name in [b"f".as_slice(), b" ", b"g\n", b"\x80"] {
            let leaf = Leaf {
                meta: Meta::default(),
                kind: LeafKind::Fifo,
            };
            tree.add_leaf(parent, name, leaf)
                .unwrap_or_else(|error| panic!("{error}"));
        }
        parent = tree
            .add_dir(parent, folder, Meta::default())
            .unwrap_or_else(|error| panic!("{error}"));
    }
    tree.finish().unwrap_or_else(|error| panic!("{error}"))
}

/// The file of a ref.
pub fn reference(bytes: &[u8]) {
    match store::parse_ref(bytes) {
        Ok((_, json)) => {
            let (_, again) = store::parse_ref(&json).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(text(&json), text(&again));
        }
        Err(error) => assert!(!error.is_empty()),
    }
}

fn text(json: &[u8]) -> &str {
    std::str::from_utf8(json).unwrap_or_else(|error| panic!("{error}"))
}

/// `larder.json`.
pub fn config(bytes: &[u8]) {
    match store::parse_config(bytes) {
        Ok(id) => assert!(!id.is_empty()),
        Err(error) => assert!(error.to_string().contains("larder.json"), "{error}"),
    }
}

/// What is noted beside a ref of a folder, without the check at its end.
pub fn note(bytes: &[u8]) {
    if let Some(again) = reread_note(bytes) {
        assert_eq!(bytes, again);
    }
}

/// The record of a collection.
pub fn run(bytes: &[u8]) {
    if let Ok((record, listed)) = store::parse_run(bytes) {
        assert!(serde_json::to_vec(&record).is_ok() && listed <= bytes.len() as u64);
    }
}

/// What the agent remembers of retention: whatever it is, there is a next run or none.
pub fn state(bytes: &[u8]) {
    let Ok(memory) = parse_saved::<Memory>(bytes) else {
        return;
    };
    let json = serde_json::to_vec(&memory).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(parse_saved::<Memory>(&json).ok().as_ref(), Some(&memory));
    let now = Timestamp::UNIX_EPOCH;
    let room = Some(Room {
        size: u64::MAX,
        free: 0,
        total: 1,
    });
    let rules = PolicyRules {
        max_size: Some("1".into()),
        ..PolicyRules::default()
    };
    let mut policy = ProjectedPolicy {
        name: "p".to_owned(),
        uid: memory.state.policy_uid.clone().unwrap_or_default(),
        generation: memory.state.observed_generation,
        requested_at: memory.state.requested_at.clone(),
        rules,
    };
    for generation in [policy.generation, policy.generation.wrapping_add(1)] {
        policy.generation = generation;
        for policy in [None, Some(&policy)] {
            let mut memory = memory.clone();
            adopt(&mut memory, policy, "n", now);
            next(&memory, policy, room, "n", now);
            // Nothing of what was remembered is of a time that has not come.
            let latest = now + jiff::SignedDuration::from_mins(5);
            assert!(memory.since.max(memory.tried).is_none_or(|time| time <= latest));
        }
    }
}

/// A command that comes by the socket.
pub fn command(bytes: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(bytes) {
        let json = serde_json::to_vec(&request).unwrap_or_else(|error| panic!("{error}"));
        assert!(serde_json::from_slice::<Request>(&json).is_ok(), "{}", text(&json));
    }
}

/// `node.json`, with all that an agent asks of the specs in it.
pub fn node(bytes: &[u8]) {
    let Ok(saved) = parse_saved::<SavedSpec>(bytes) else {
        return;
    };
    let json = serde_json::to_vec(&saved).unwrap_or_else(|error| panic!("{error}"));
    let again = parse_saved::<SavedSpec>(&json).unwrap_or_else(|error| panic!("{error}"));
    let twice = serde_json::to_vec(&again).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(text(&json), text(&twice));
    if let Some(policy) = &saved.spec.retention {
        rules(&policy.rules);
    }
    for manifest in &saved.spec.manifests {
        let _ = manifest.rebuild_interval.as_ref().map(|interval| interval.get());
        let _ = RefName::new(manifest.namespace.as_str(), manifest.name.as_str());
    }
}

fn rules(rules: &PolicyRules) {
    let checked = rules.check();
    let parts = [
        rules.max_age().is_ok(),
        rules.grace().is_ok(),
        rules.jitter().is_ok(),
        rules.max_size().is_ok(),
        rules.min_free(1 << 40).is_ok(),
    ];
    if let Ok(schedule) = checked {
        assert_eq!(parts, [true; 5], "{rules:?} was found good");
        assert!(schedule.next_after(Timestamp::UNIX_EPOCH).is_some());
    }
}

/// `layer.json`.
pub fn layer(bytes: &[u8]) {
    match LayerRecord::parse(bytes) {
        Ok(record) => {
            let json = serde_json::to_vec(&record).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(LayerRecord::parse(&json), Ok(record));
        }
        Err(error) => assert!(!error.is_empty()),
    }
}

/// Digests, the names of refs, the ids of layers, source roots: what becomes a path.
pub fn names(bytes: &[u8]) {
    let text = &String::from_utf8_lossy(bytes);
    if let Ok(digest) = Digest::from_str(text) {
        assert_eq!(digest.to_string(), *text);
    }
    assert_eq!(
        TreeDigest::from_hex(text).map(|digest| digest.hex() == *text),
        TreeDigest::from_hex(text).map(|_| true)
    );
    let (namespace, name) = text.split_once('/').unwrap_or((text, "name"));
    if let Ok(name) = RefName::new(namespace, name) {
        for part in [name.namespace(), name.name()] {
            assert!(
                !part.is_empty() && !part.starts_with('.') && !part.contains(['/', '\0']),
                "{name}"
            );
        }
    }
    if let Ok(id) = text.parse::<LayerId>() {
        assert!(id.as_str().len() == 36 && !id.as_str().contains(['/', '.']));
    }
    let _ = text.parse::<SourceRoot>();
}

/// A size, as on a command line and as in a resource.
pub fn size(bytes: &[u8]) {
    let text = &*String::from_utf8_lossy(bytes);
    let parsed = parse_size(text);
    assert_eq!(Size::from(text).bytes(), parsed);
    match parsed {
        Ok(size) => assert_eq!(parse_size(&size.to_string()), Ok(size)),
        Err(error) => assert!(
            error.to_string().len() < 1000,
            "a message of {} bytes",
            error.to_string().len()
        ),
    }
}

/// A duration.
pub fn duration(bytes: &[u8]) {
    let text = &*String::from_utf8_lossy(bytes);
    match parse_duration(text) {
        Ok(duration) => {
            // The largest of each unit, added up.
            assert!(duration.as_secs() <= 99_999 * (604_800 + 86_400) + 999_999 * 3600 + 9_999_999 * 60 + 99_999_999);
            assert!(text.ends_with(['w', 'd', 'h', 'm', 's']), "{text:?}");
        }
        Err(error) => assert!(
            error.to_string().len() < 1000,
            "a message of {} bytes",
            error.to_string().len()
        ),
    }
}

/// A schedule, and after a line feed its time zone.
pub fn schedule(bytes: &[u8]) {
    let text = &*String::from_utf8_lossy(bytes);
    let (expression, zone) = match text.split_once('\n') {
        Some((expression, zone)) => (expression, Some(zone)),
        None => (text, None),
    };
    let Ok(schedule) = Schedule::parse(expression, zone) else {
        return;
    };
    let mut time = Timestamp::UNIX_EPOCH;
    for _ in 0..3 {
        let Some(next) = schedule.next_after(time) else { break };
        assert!(next > time, "{text:?}: {next} is not after {time}");
        time = next;
    }
}

/// Patterns of what a source leaves out, one a line.
pub fn glob(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let globs: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Err(error) = check_globs(&globs) {
        assert!(error.to_string().contains("exclude"), "{error}");
    }
}
