//! The corpora of the fuzz targets, as they are and changed by chance, through the same functions: without a panic,
//! and within the memory that each kind of input may take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::{INPUTS, Input};

/// The system's allocator, which counts what each thread has.
struct Counting;

thread_local! {
    /// Bytes that this thread has now, and the most it had since it was asked. Less than nothing if it drops what
    /// another one has made.
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let now = NOW.get() + bytes;
    NOW.set(now);
    MOST.set(MOST.get().max(now));
}

// SAFETY: all is the system allocator's work; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as our caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as our caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as our caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // For a moment there may be both.
        count(size as isize);
        // SAFETY: as our caller promised.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        count(-(layout.size() as isize));
        moved
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory that this thread takes for something, beyond what it has.
fn memory_of(something: impl FnOnce()) -> usize {
    let before = NOW.get();
    MOST.set(before);
    something();
    usize::try_from(MOST.get() - before).unwrap_or(0)
}

/// Bytes that mean something to one reader or another.
const TOKENS: [&[u8]; 20] = [
    b"LARDER\n\x01",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x04",
    b"\x00",
    b"\x07",
    b"\x40",
    b"{",
    b"[[[[[[[[",
    b"\"",
    b"null",
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"\\ud800",
    b"\"version\":2,",
    b"*/",
    b"@daily",
    b"Ei",
    b"../",
    b"{a,b}",
];

/// One to four changes, as fuzzers make them.
fn mutate(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..5) {
        let at = rng.random_range(0..=bytes.len());
        let end = bytes.len().min(at + rng.random_range(0..32));
        match rng.random_range(0..8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = rng.random(),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let token = *TOKENS.choose(rng).unwrap();
                bytes.splice(at..at, token.iter().copied());
            }
            5 => {
                let token = *TOKENS.choose(rng).unwrap();
                bytes.splice(at..end, token.iter().copied());
            }
            6 => {
                // The same again and again.
                let part = bytes[at..end].to_vec();
                for _ in 0..rng.random_range(0..200) {
                    bytes.splice(at..at, part.iter().copied());
                }
            }
            _ => {
                let other = corpus.choose(rng).unwrap();
                let from = rng.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
        }
    }
}

fn corpora() -> BTreeMap<String, Vec<Vec<u8>>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut found = BTreeMap::new();
    for folder in std::fs::read_dir(root).unwrap() {
        let folder = folder.unwrap();
        let files = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|file| file.unwrap().path());
        let mut files: Vec<_> = files.collect();
        files.sort();
        let corpus: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
        found.insert(folder.file_name().into_string().unwrap(), corpus);
    }
    found
}

fn check(input: &Input, bytes: &[u8], seed: &str) {
    let shown = || bytes.escape_ascii().to_string();
    let mut result = Ok(());
    let most = memory_of(|| result = catch_unwind(AssertUnwindSafe(|| (input.read)(bytes))));
    if let Err(panic) = result {
        eprintln!("{}, {seed}: {}", input.name, shown());
        std::panic::resume_unwind(panic);
    }
    let allowed = input.base + bytes.len() * input.factor;
    assert!(
        most <= allowed,
        "{}, {seed}: {} bytes took {most} bytes of memory, {allowed} are allowed: {}",
        input.name,
        bytes.len(),
        shown()
    );
}

#[test]
fn every_kind_of_input_has_a_fuzz_target_and_a_corpus() {
    let corpora: Vec<String> = corpora().into_keys().collect();
    let mut names: Vec<&str> = INPUTS.iter().map(|input| input.name).collect();
    names.sort_unstable();
    assert_eq!(corpora, names);
    let manifest = include_str!("../../fuzz/Cargo.toml");
    for name in names {
        assert!(
            manifest.contains(&format!("name = \"{name}\"")),
            "fuzz/Cargo.toml lacks {name}"
        );
        let target = std::fs::read_to_string(format!("{}/fuzz/fuzz_targets/{name}.rs", env!("CARGO_MANIFEST_DIR")));
        assert!(target.unwrap().contains("larder::inputs"), "{name}");
    }
}

#[test]
fn no_corpus_changed_by_chance_panics_or_takes_more_memory_than_it_may() {
    let given = std::env::var("LARDER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| rand::rng().random());
    eprintln!("LARDER_SEED={seed}");
    let rounds = match std::env::var_os("LARDER_SOAK") {
        Some(_) => 300_000,
        None => 3000,
    };
    let corpora = corpora();
    for input in &INPUTS {
        let corpus = &corpora[input.name];
        assert!(!corpus.is_empty(), "{}", input.name);
        for bytes in corpus {
            check(input, bytes, "as it is");
        }
        let mut rng = StdRng::seed_from_u64(seed);
        for round in 0..rounds {
            let mut bytes = corpus.choose(&mut rng).unwrap().clone();
            mutate(&mut bytes, corpus, &mut rng);
            check(input, &bytes, &format!("LARDER_SEED={seed}, round {round}"));
        }
    }
}

#[test]
fn memory_is_measured() {
    assert_eq!(memory_of(|| drop(std::hint::black_box(vec![0u8; 12345]))), 12345);
    let kept = memory_of(|| {
        let mut parts: Vec<Box<[u8]>> = Vec::with_capacity(10);
        for _ in 0..10 {
            parts.push(vec![1; 1000].into());
        }
        std::hint::black_box(parts);
    });
    assert!((10_000..11_000).contains(&kept), "{kept}");
    assert!(memory_of(|| {}) < 100);
}

/// What a reader sets aside follows what is there, not what is claimed.
#[test]
fn a_large_manifest_is_read_within_its_bound() {
    let mut bytes = b"LARDER\n\x01\x00\xff\xff\x03".to_vec();
    for number in 0..65_535u32 {
        bytes.push(4);
        bytes.extend(number.to_be_bytes().map(|byte| byte.max(1) | 0x10));
        bytes.push(5);
    }
    // Names are neither sorted nor unique: it fails somewhere, in bounds.
    check(&INPUTS[0], &bytes, "unsorted");
    let mut bytes = b"LARDER\n\x01\x00\xe0\x5d".to_vec();
    for number in 0..12_000u32 {
        bytes.extend([2, 100 + (number / 200) as u8, 50 + (number % 200) as u8]);
        bytes.push(5);
    }
    assert!(crate::store::tree::Tree::decode(&bytes).is_ok());
    check(&INPUTS[0], &bytes, "sorted");
}
