//! Writing an image from its begin to its end, and now and then a field further back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const BUFFER: usize = 1 << 20;

pub(super) struct Out<'a> {
    file: &'a File,
    /// What was written behind `flushed`.
    buffer: Vec<u8>,
    flushed: u64,
}

impl<'a> Out<'a> {
    pub fn new(file: &'a File) -> Out<'a> {
        Out {
            file,
            buffer: Vec::with_capacity(BUFFER + (64 << 10)),
            flushed: 0,
        }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        match self.buffer.len() >= BUFFER {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Writes zeros up to a position.
    pub fn skip_to(&mut self, position: u64) -> io::Result<()> {
        while self.position() < position {
            let length = (position - self.position()).min(BUFFER as u64) as usize;
            self.buffer.resize(self.buffer.len() + length, 0);
            if self.buffer.len() >= BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes over what is before the position.
    pub fn patch(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if at < self.flushed {
            // It may begin on disk and end in the buffer.
            let on_disk = bytes.len().min((self.flushed - at) as usize);
            self.file.write_all_at(&bytes[..on_disk], at)?;
            return match on_disk == bytes.len() {
                true => Ok(()),
                false => self.patch(self.flushed, &bytes[on_disk..]),
            };
        }
        let at = (at - self.flushed) as usize;
        self.buffer[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
