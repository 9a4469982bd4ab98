//! Contents that are too large to be held in memory. What can share blocks is not copied; else the copy is hashed while
//! it is made, on another thread, for hashing takes as long as copying.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::SystemTime;

use rustix::fs::Stat;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::disk::{self, Reader, Step};
use super::files;
use super::{Blob, Build, Digest, Error};

/// What is read at a time …
const CHUNK: usize = 1 << 18;
/// … and how many such pieces there are, so that reading, writing and hashing do not wait for one another.
const CHUNKS: usize = 4;
/// What the kernel is asked to copy at a time.
const PIECE: usize = 1 << 23;

/// Digest and length of what was stored.
type Hashed = (Digest, u64);

impl Build {
    /// Stores what a reader gives until its end. Zero blocks of `hole` bytes are not written; with 0, all are.
    pub(super) fn put_stream(&self, from: &mut dyn Read, hole: usize) -> Result<Blob, Error> {
        self.staging(|to| self.stream(from, hole, to))
    }

    /// Stores a file that had the status `before`. Zero blocks of `hole` bytes are not written; with 0, all are.
    pub(super) fn put_large(
        &self,
        from: &File,
        before: &Stat,
        hole: usize,
        cancel: &AtomicBool,
    ) -> Result<Blob, Error> {
        self.staging(|to| {
            if let Some(shared) = self.share(from, before, to, cancel)? {
                return Ok(shared);
            }
            // The kernel's copy would fill the holes.
            if hole == 0
                && let Some(copied) = self.copy(from, before, to, cancel)?
            {
                return Ok(copied);
            }
            let reader = Reader::new(Step::SourceRead, from);
            self.stream(&mut Until { reader, cancel }, hole, to)
        })
    }

    /// Stages what `fill` writes into a new file. If the source fails it is thrown away, and the build may go on: its
    /// other contents are good.
    fn staging(&self, fill: impl FnOnce(&File) -> Result<Hashed, Error>) -> Result<Blob, Error> {
        let number = self.next_number();
        let file = self.guard(|| self.create(number))?;
        match fill(&file) {
            Ok((digest, size)) => self.adopt(digest, size, number),
            Err(error) => {
                if matches!(error, Error::Source(_)) {
                    self.discard(number)?;
                }
                Err(error)
            }
        }
    }

    fn stream(&self, from: &mut dyn Read, hole: usize, to: &File) -> Result<Hashed, Error> {
        let mut size = 0u64;
        let digest = hash_beside(|mut buffer, hash| {
            loop {
                let filled = fill(from, &mut buffer).map_err(Error::Source)?;
                if filled == 0 {
                    return Ok::<_, Error>(());
                }
                buffer.truncate(filled);
                self.guard(|| {
                    self.store.reserve(filled as u64)?;
                    let written = files::write_at(Step::BlobWrite, to.as_fd(), &buffer, size, hole);
                    written.map_err(|e| self.store.write_error(&self.path, filled as u64, e))
                })?;
                size += filled as u64;
                buffer = hash.update(buffer);
            }
        })?;
        self.guard(|| self.set_length(to, size))?;
        Ok((digest, size))
    }

    /// Copies within the kernel, and hashes what was written behind it. `None` if that did not go to the end: here it
    /// cannot be told whether the source or the store is at fault, so the caller copies by hand.
    ///
    /// Faster than [`Build::stream`] on an idle disk: the copy does not wait for the hashing, so that the disk has
    /// something to write earlier.
    fn copy(&self, from: &File, before: &Stat, to: &File, cancel: &AtomicBool) -> Result<Option<Hashed>, Error> {
        if !self.copy_in_kernel.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (copied, ends) = channel();
        let (whole, hashed) = thread::scope(|scope| {
            let hasher = scope.spawn(move || hash_behind(to, ends, cancel));
            let whole = self.copy_to_end(from, before, to, cancel, copied);
            (whole, hasher.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        if !whole {
            return Ok(None);
        }
        let error = |e| Error::io("read a staged file of", self.store.path(&self.path), e);
        self.guard(|| hashed.map(Some).map_err(error))
    }

    /// Copies until the source ends, and tells `copied` how far it has come. `false` if it has not come to the end.
    fn copy_to_end(&self, from: &File, before: &Stat, to: &File, cancel: &AtomicBool, copied: Sender<u64>) -> bool {
        let expected = before.st_size.max(0) as u64;
        let (mut read_at, mut at) = (0, 0);
        loop {
            let left = expected.saturating_sub(at);
            if cancel.load(Ordering::Relaxed) || self.store.reserve(left.min(PIECE as u64)).is_err() {
                return false;
            }
            match disk::copy(Step::BlobCopy, from, &mut read_at, to, &mut at, PIECE) {
                // Some file systems give nothing where reading would.
                Ok(0) => return at >= expected,
                // Nothing but a failed read ends the hasher before this does, and that is seen by the caller.
                Ok(_) => drop(copied.send(at)),
                Err(Errno::INTR) => {}
                Err(error) => {
                    if matches!(error, Errno::OPNOTSUPP | Errno::NOSYS) {
                        self.copy_in_kernel.store(false, Ordering::Relaxed);
                    }
                    return false;
                }
            }
        }
    }

    /// Shares the file's blocks where the file system can. `None` if it cannot.
    fn share(&self, from: &File, before: &Stat, to: &File, cancel: &AtomicBool) -> Result<Option<Hashed>, Error> {
        if !self.reflink.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let now = SystemTime::now();
        match disk::reflink(Step::BlobReflink, to, from) {
            Ok(()) => hash_shared(from, before, to, now, cancel)
                .map(Some)
                .map_err(Error::Source),
            Err(error) => {
                // Another file system, or one without reflinks. Whatever else it is, copying will tell.
                if matches!(error, Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) {
                    self.reflink.store(false, Ordering::Relaxed);
                }
                Ok(None)
            }
        }
    }
}

/// Digest and length of `file`, which shares the blocks that `from` had when it had the status `before`, or later.
///
/// What is stored counts, and the source may have changed since. But it is the source that is likely to be in
/// memory. So that is hashed if it is the same before and after, and was settled before: then any change, be it by a
/// mapping of its pages, would have shown (sharing blocks writes back what is dirty, so that the next write of a
/// mapping is noticed).
pub(super) fn hash_shared(
    from: &File,
    before: &Stat,
    file: &File,
    now: SystemTime,
    cancel: &AtomicBool,
) -> io::Result<(Digest, u64)> {
    if files::is_settled(before, now) {
        let hashed = hash_file(Step::SourceRead, from, cancel)?;
        let after = rustix::fs::fstat(from)?;
        let key = |stat: &Stat| {
            (
                stat.st_size,
                stat.st_mtime,
                stat.st_mtime_nsec,
                stat.st_ctime,
                stat.st_ctime_nsec,
            )
        };
        if key(before) == key(&after) && i64::try_from(hashed.1) == Ok(after.st_size) {
            return Ok(hashed);
        }
    }
    hash_file(Step::StagedRead, file, cancel)
}

/// Digest and length of a file's whole content. By one thread: what was just read is in its cache, and where two
/// processors are one core's, as in most virtual machines, a second one would gain nothing.
fn hash_file(step: Step, file: &File, cancel: &AtomicBool) -> io::Result<(Digest, u64)> {
    let reader = Reader::new(step, file);
    let mut reader = Until { reader, cancel };
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut size = 0u64;
    loop {
        let filled = fill(&mut reader, &mut buffer)?;
        if filled == 0 {
            return Ok((Digest::from_bytes(hash.finalize().into()), size));
        }
        hash.update(&buffer[..filled]);
        size += filled as u64;
    }
}

/// Digest and length of what is written to a file, up to each of `ends` as it comes.
fn hash_behind(file: &File, ends: Receiver<u64>, cancel: &AtomicBool) -> io::Result<Hashed> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    for end in ends {
        while at < end {
            if cancel.load(Ordering::Relaxed) {
                return Err(io::Error::other("cancelled"));
            }
            let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            match disk::pread(Step::StagedRead, file, &mut buffer[..length], at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    hash.update(&buffer[..read]);
                    at += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok((Digest::from_bytes(hash.finalize().into()), at))
}

/// Where [`hash_beside`] takes bytes.
struct Beside {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

impl Beside {
    /// Hashes the bytes. Gives another buffer of [`CHUNK`] bytes.
    fn update(&self, bytes: Vec<u8>) -> Vec<u8> {
        // Only a panic of the other thread, which is passed on, ends the channels.
        let sent = self.full.send(bytes);
        let mut buffer = sent.ok().and_then(|()| self.empty.recv().ok()).unwrap_or_default();
        buffer.resize(CHUNK, 0);
        buffer
    }
}

/// Runs `work` with a first buffer of [`CHUNK`] bytes, and hashes on another thread what it gives.
fn hash_beside<E>(work: impl FnOnce(Vec<u8>, &Beside) -> Result<(), E>) -> Result<Digest, E> {
    let (full, to_hash) = sync_channel::<Vec<u8>>(CHUNKS);
    let (hashed, empty) = sync_channel(CHUNKS);
    for _ in 1..CHUNKS {
        // There is room for them.
        let _ = hashed.send(Vec::new());
    }
    thread::scope(|scope| {
        let hasher = scope.spawn(move || {
            let mut hash = Sha256::new();
            for bytes in to_hash {
                hash.update(&bytes);
                // Nobody waits for it after the last one.
                let _ = hashed.send(bytes);
            }
            Digest::from_bytes(hash.finalize().into())
        });
        let worked = work(vec![0; CHUNK], &Beside { full, empty });
        // `work` has dropped its end, so the thread comes to its end too.
        let digest = hasher.join().unwrap_or_else(|panic| resume_unwind(panic));
        worked.map(|()| digest)
    })
}

/// A reader that fails once it is cancelled: a sparse file may be of any size, and its zeros are read for hours.
pub(super) struct Until<'a, R> {
    pub reader: R,
    pub cancel: &'a AtomicBool,
}

impl<R: Read> Read for Until<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(io::Error::other("cancelled")),
            false => self.reader.read(buffer),
        }
    }
}

/// Reads until the buffer is full or the reader ends.
fn fill(from: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
