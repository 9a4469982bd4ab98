//! Reading and hashing blobs.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroU64;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rayon::prelude::*;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::{BadBlob, Fault, Scope, VerifyProgress};
use crate::store::disk::{self, Step};
use crate::store::files::{self, lock};
use crate::store::layout::{Inner, object_path};
use crate::store::pace::Pace;
use crate::store::quarantine::{self, FileId};
use crate::store::{Digest, Error};

const CHUNK: usize = 1 << 18;
/// What reading past the page cache asks of buffers, offsets and lengths on every usual disk.
const ALIGN: usize = 4096;

/// What a verification reads.
#[derive(Default)]
pub(super) struct Chosen {
    /// Digest and length when it was listed.
    pub blobs: Vec<(Digest, u64)>,
    pub passed_over: u64,
}

/// Lists `objects/`, shard by shard. `since`: see [`super::record::last_full`].
pub(super) fn choose(store: &Inner, scope: Scope, since: Option<SystemTime>) -> Result<Chosen, Error> {
    let mut chosen = Chosen::default();
    for byte in 0..=255u8 {
        let Some(shard) = store.list_shard(byte)? else {
            continue;
        };
        for (digest, name) in shard.iter() {
            let stat = match shard.stat(name) {
                Ok(Some(stat)) => stat,
                Ok(None) => continue,
                // The reading will say what it is.
                Err(_) => {
                    chosen.blobs.push((digest, 0));
                    continue;
                }
            };
            let wanted = match scope {
                Scope::All => true,
                Scope::Sample { fraction, seed } => is_in_sample(&digest, fraction, seed),
                Scope::Changed => since.is_none_or(|since| changed(&stat) >= since),
            };
            match wanted {
                true => chosen.blobs.push((digest, stat.st_size.max(0) as u64)),
                false => chosen.passed_over += 1,
            }
        }
    }
    Ok(chosen)
}

/// A digest is as good as a random number; the seed makes another one of it (the mixing of SplitMix64).
fn is_in_sample(digest: &Digest, fraction: f64, seed: u64) -> bool {
    let [.., a, b, c, d, e, f, g, h] = *digest.as_bytes();
    let mut mixed = u64::from_be_bytes([a, b, c, d, e, f, g, h]) ^ seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    ((mixed >> 11) as f64) < fraction * (1u64 << 53) as f64
}

/// The time of the last change of anything about a file. One that does not fit counts as now: it is read.
fn changed(stat: &rustix::fs::Stat) -> SystemTime {
    let since_1970 = u64::try_from(stat.st_ctime).map(|seconds| Duration::new(seconds, stat.st_ctime_nsec as u32));
    let time = since_1970
        .ok()
        .and_then(|time| SystemTime::UNIX_EPOCH.checked_add(time));
    time.unwrap_or_else(SystemTime::now)
}

/// Reads blobs, and quarantines those that are wrong. Ends early when cancelled.
pub(super) fn check(
    store: &Inner,
    blobs: &[(Digest, u64)],
    rate: Option<NonZeroU64>,
    progress: &VerifyProgress,
    cancel: &AtomicBool,
) -> BTreeMap<Digest, BadBlob> {
    let bytes = blobs
        .iter()
        .map(|(_, size)| size)
        .fold(0, |sum: u64, size| sum.saturating_add(*size));
    progress.total_blobs.store(blobs.len() as u64, Ordering::Relaxed);
    progress.total_bytes.store(bytes, Ordering::Relaxed);
    let found = Mutex::new(BTreeMap::new());
    let one = |reader: &mut Reader, digest: &Digest| {
        if let Some(bad) = reader.check(store, digest) {
            lock(&found).insert(*digest, bad);
        }
    };
    match rate {
        Some(_) => {
            let mut reader = Reader::new(rate, progress, cancel);
            blobs.iter().for_each(|(digest, _)| one(&mut reader, digest));
        }
        None => blobs.par_iter().for_each_init(
            || Reader::new(None, progress, cancel),
            |reader, (digest, _)| one(reader, digest),
        ),
    }
    found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Judges one blob that is suspicious for another reason than its bytes.
pub(super) fn check_one(store: &Inner, digest: &Digest) -> Option<BadBlob> {
    Reader::new(None, &VerifyProgress::default(), &AtomicBool::new(false)).check(store, digest)
}

enum Verdict {
    Good,
    /// Nothing is there (any more), or the verification was cancelled.
    Nothing,
    /// The descriptor keeps the file's number from being given to another one.
    Bad {
        fault: Fault,
        id: Option<FileId>,
        _file: Option<File>,
    },
}

struct Reader<'a> {
    buffer: Vec<u8>,
    pace: Pace,
    progress: &'a VerifyProgress,
    cancel: &'a AtomicBool,
}

impl<'a> Reader<'a> {
    fn new(rate: Option<NonZeroU64>, progress: &'a VerifyProgress, cancel: &'a AtomicBool) -> Self {
        Self {
            buffer: vec![0; CHUNK + ALIGN],
            pace: Pace::new(rate),
            progress,
            cancel,
        }
    }

    fn check(&mut self, store: &Inner, digest: &Digest) -> Option<BadBlob> {
        let mut verdict = self.judge(store, digest);
        if matches!(verdict, Verdict::Bad { .. }) {
            // What was wrong for a moment (a disk that was reset) is no reason to move it.
            verdict = self.judge(store, digest);
        }
        match &verdict {
            Verdict::Good => {
                self.progress.blobs.fetch_add(1, Ordering::Relaxed);
                None
            }
            Verdict::Nothing => None,
            Verdict::Bad { fault, id, .. } => {
                self.progress.blobs.fetch_add(1, Ordering::Relaxed);
                set_aside(store, digest, fault.clone(), *id)
            }
        }
    }

    fn judge(&mut self, store: &Inner, digest: &Digest) -> Verdict {
        if self.cancel.load(Ordering::Relaxed) {
            return Verdict::Nothing;
        }
        let path = object_path(digest);
        let stat = match files::stat(&store.dir, path.as_str()) {
            Ok(Some(stat)) => stat,
            Ok(None) => return Verdict::Nothing,
            Err(errno) => return unreadable(errno, None, None),
        };
        let id = Some((stat.st_dev, stat.st_ino));
        if !files::is_file(&stat) {
            return Verdict::Bad {
                fault: Fault::NotAFile,
                id,
                _file: None,
            };
        }
        let (file, direct) = match open(store, &path) {
            Ok(opened) => opened,
            Err(Errno::NOENT) => return Verdict::Nothing,
            Err(errno) => return unreadable(errno, id, None),
        };
        // It may have been replaced since: what was opened is judged.
        let id = match rustix::fs::fstat(&file) {
            Ok(stat) => Some((stat.st_dev, stat.st_ino)),
            Err(errno) => return unreadable(errno, id, None),
        };
        match self.hash(store, &path, &file, direct) {
            Ok(Some((found, _))) if found == *digest => Verdict::Good,
            Ok(Some((found, length))) => Verdict::Bad {
                fault: Fault::Damaged { found, length },
                id,
                _file: Some(file),
            },
            Ok(None) => Verdict::Nothing,
            Err(errno) => unreadable(errno, id, Some(file)),
        }
    }

    /// Digest and length of a file; `None` if cancelled.
    fn hash(&mut self, store: &Inner, path: &str, file: &File, direct: bool) -> Result<Option<(Digest, u64)>, Errno> {
        let start = self.buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
        let chunk = self.pace.chunk(CHUNK);
        let mut hash = Sha256::new();
        let mut length = 0u64;
        let mut buffered: Option<File> = None;
        loop {
            let buffer = &mut self.buffer[start..start + chunk];
            let read = match disk::pread(Step::VerifyRead, buffered.as_ref().unwrap_or(file), buffer, length) {
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                // This file system wants another alignment.
                Err(Errno::INVAL) if direct && buffered.is_none() => {
                    buffered = Some(disk::open_file(&store.dir, path)?);
                    continue;
                }
                Err(errno) => return Err(errno),
            };
            // A small blob costs the disk a block.
            if !self
                .pace
                .wait((read as u64).max(if length == 0 { 4096 } else { 0 }), self.cancel)
            {
                return Ok(None);
            }
            if read == 0 {
                break;
            }
            hash.update(&self.buffer[start..start + read]);
            length += read as u64;
            self.progress.bytes.fetch_add(read as u64, Ordering::Relaxed);
            if direct && buffered.is_none() && !length.is_multiple_of(ALIGN as u64) {
                // The end; or a part of a block, after which no read is aligned any more.
                match rustix::fs::fstat(file)?.st_size.max(0) as u64 > length {
                    true => buffered = Some(disk::open_file(&store.dir, path)?),
                    false => break,
                }
            }
        }
        Ok(Some((Digest::from_bytes(hash.finalize().into()), length)))
    }
}

/// Past the page cache where that can be: what counts is what the disk has, and what pods have in memory stays there.
fn open(store: &Inner, path: &str) -> Result<(File, bool), Errno> {
    match disk::open_direct(&store.dir, path) {
        Err(Errno::INVAL | Errno::OPNOTSUPP) => disk::open_file(&store.dir, path).map(|file| (file, false)),
        other => other.map(|file| (file, true)),
    }
}

fn unreadable(errno: Errno, id: Option<FileId>, file: Option<File>) -> Verdict {
    Verdict::Bad {
        fault: Fault::Unreadable {
            errno: errno.raw_os_error(),
            message: std::io::Error::from(errno).to_string(),
        },
        id,
        _file: file,
    }
}

/// Is it the blob that is at fault, rather than the process or its surroundings?
fn is_the_blobs_fault(errno: i32) -> bool {
    // EUCLEAN and EBADMSG are what ext4, XFS and btrfs say of damaged metadata and checksums (EFSCORRUPTED, EFSBADCRC).
    matches!(
        errno,
        libc::EIO | libc::EUCLEAN | libc::EBADMSG | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO | libc::ENXIO
    )
}

/// Quarantines a bad blob. `None` if it is not there any more, or another file is.
fn set_aside(store: &Inner, digest: &Digest, fault: Fault, id: Option<FileId>) -> Option<BadBlob> {
    let mut bad = BadBlob {
        digest: *digest,
        path: store.path(object_path(digest)),
        fault,
        quarantined: None,
        not_moved: None,
        not_durable: None,
        healed: false,
        files: 0,
        samples: Vec::new(),
    };
    let movable = match &bad.fault {
        Fault::Unreadable { errno, .. } => is_the_blobs_fault(*errno),
        _ => true,
    };
    match id.filter(|_| movable) {
        None => bad.not_moved = Some("it may be good: the system could not read it just now".to_owned()),
        Some(id) => match quarantine::take(store, digest, id, SystemTime::now()) {
            Ok(Some(taken)) => {
                bad.quarantined = Some(taken.path);
                bad.not_durable = taken.not_synced.map(|error| error.to_string());
            }
            Ok(None) => return None,
            Err(error) => bad.not_moved = Some(error.to_string()),
        },
    }
    Some(bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::digest_of;

    #[test]
    fn a_sample_is_as_large_as_asked_and_the_same_for_a_seed() {
        let digests: Vec<Digest> = (0..10_000u32).map(|n| digest_of(&n.to_be_bytes())).collect();
        let sample = |fraction, seed| -> Vec<usize> {
            let chosen = digests.iter().enumerate();
            chosen
                .filter(|(_, digest)| is_in_sample(digest, fraction, seed))
                .map(|(index, _)| index)
                .collect()
        };
        assert_eq!(sample(0.0, 1), [0usize; 0]);
        assert_eq!(sample(1.0, 1).len(), 10_000);
        let (one, other) = (sample(0.1, 1), sample(0.1, 2));
        assert!((850..1150).contains(&one.len()), "{}", one.len());
        assert!((850..1150).contains(&other.len()), "{}", other.len());
        assert_eq!(one, sample(0.1, 1));
        let both = one.iter().filter(|index| other.contains(index)).count();
        assert!((40..200).contains(&both), "{both}: samples of two seeds hang together");
    }
}
