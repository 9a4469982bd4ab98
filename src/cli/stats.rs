//! `stats`: how much the store holds.

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::table::Table;
use super::text::human_size;
use crate::store::Reader;

/// Count what the store holds. Looks at every blob.
#[derive(Args)]
pub struct Stats {}

impl Stats {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let usage = store.usage()?;
        if io.is_json() {
            let root = store.root().display().to_string();
            io.json(&json!({"root": root, "id": store.id(), "usage": usage}))?;
            return Ok(Exit::Done);
        }
        let mut table = Table::new(&["", "COUNT", "BYTES"], &[1, 2]);
        for (what, count, bytes) in [
            ("blobs", usage.blobs, usage.blob_bytes),
            ("manifests", usage.manifests, usage.manifest_bytes),
            ("images", usage.images, usage.image_bytes),
        ] {
            table.row([what.to_owned(), count.to_string(), human_size(bytes)]);
        }
        table.row(["free".to_owned(), "-".to_owned(), human_size(usage.free)]);
        io.table(&table)?;
        Ok(Exit::Done)
    }
}
