//! Small files that are replaced whole.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::OFlags;

use super::disk::{self, Step};
use super::layout::Inner;
use super::{Error, files};

/// The steps of a replacement.
pub(super) struct Steps {
    pub create: Step,
    pub write: Step,
    /// For a file that must be durable before it gets its name.
    pub sync: Option<Step>,
    pub rename: Step,
    pub discard: Step,
}

impl Inner {
    /// Writes a file that is not there yet, for root alone.
    pub fn write_new(&self, [create, write]: [Step; 2], name: &str, text: &[u8]) -> Result<File, io::Error> {
        let file = disk::create(create, &self.dir, name, OFlags::WRONLY | OFlags::EXCL, 0o600)?;
        files::write_at(write, file.as_fd(), text, 0, 0)?;
        Ok(file)
    }

    /// Gives a file this content in one step. If that fails, it stays what it was.
    pub fn replace(&self, steps: &Steps, path: &str, content: &[u8]) -> Result<(), Error> {
        let staged = self.staging_name("file");
        let written = self.write_new([steps.create, steps.write], &staged, content);
        let replaced = written.and_then(|file| {
            if let Some(sync) = steps.sync {
                disk::fsync(sync, &file)?;
            }
            Ok(disk::rename(steps.rename, &self.dir, &*staged, &self.dir, path)?)
        });
        replaced.map_err(|e| {
            // Nothing to add to the error that is being reported; the next start empties staging.
            let _ = files::remove_file(steps.discard, &self.dir, &*staged);
            self.write_error(path, content.len() as u64, e)
        })
    }
}
