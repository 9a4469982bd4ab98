//! `diff`: two trees.

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::text::{lossless, shown};
use super::trees::find;
use crate::store::Reader;
use crate::store::tree::{Change, What, diff};

/// Compare two trees. Exits with 0 if they are the same and with 1 if not, as diff(1) does.
#[derive(Args)]
pub struct Diff {
    /// A tree: a ref, a digest, or the beginning of one.
    a: String,
    /// Another one.
    b: String,
}

impl Diff {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let (a, b) = (find(store, &self.a)?, find(store, &self.b)?);
        let differences = match a.digest == b.digest {
            true => Vec::new(),
            false => diff(&a.load(store)?, &b.load(store)?),
        };
        let exit = if differences.is_empty() { Exit::Done } else { Exit::No };
        if io.is_json() {
            let (mut added, mut removed, mut changed) = (Vec::new(), Vec::new(), Vec::new());
            for difference in &differences {
                let path = lossless(&difference.path);
                match &difference.change {
                    Change::Added => added.push(path),
                    Change::Removed => removed.push(path),
                    Change::Changed(what) => {
                        let what: Vec<&str> = what.iter().map(|what| word(*what)).collect();
                        changed.push(json!({"path": path, "what": what}));
                    }
                }
            }
            io.json(&json!({
                "a": a.digest,
                "b": b.digest,
                "equal": differences.is_empty(),
                "added": added,
                "removed": removed,
                "changed": changed,
            }))?;
            return Ok(exit);
        }
        for difference in &differences {
            let path = match &difference.path[..] {
                [] => ".".to_owned(),
                path => shown(path),
            };
            match &difference.change {
                Change::Added => io.line(&format!("+ {path}"))?,
                Change::Removed => io.line(&format!("- {path}"))?,
                Change::Changed(what) => {
                    let what: Vec<&str> = what.iter().map(|what| word(*what)).collect();
                    io.line(&format!("~ {path}: {}", what.join(", ")))?;
                }
            }
        }
        Ok(exit)
    }
}

fn word(what: What) -> &'static str {
    match what {
        What::Type => "type",
        What::Content => "content",
        What::Target => "target",
        What::Device => "device",
        What::Mode => "mode",
        What::Owner => "owner",
        What::Mtime => "mtime",
        What::Xattrs => "xattrs",
        What::Links => "links",
    }
}
