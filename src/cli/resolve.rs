//! `resolve`: which contents a path of a tree needs.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::io::Io;
use super::text::{human_size, lossless, shown};
use super::trees::find;
use crate::store::tree::{LeafKind, Node, Tree};
use crate::store::{Digest, Reader};

/// List the contents of a tree, or of a path in it, and where they are. Fails and names those that are missing.
#[derive(Args)]
pub struct Resolve {
    /// A tree: a ref, a digest, or the beginning of one.
    tree: String,
    /// A file or folder in it; symlinks are not followed. Absent: all of it.
    path: Option<PathBuf>,
}

impl Resolve {
    pub fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        let named = find(store, &self.tree)?;
        let tree = named.load(store)?;
        let wanted = self.path.unwrap_or_default();
        let wanted = wanted.as_os_str().as_bytes();
        let wanted: Vec<&[u8]> = wanted
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty() && *name != b".")
            .collect();
        let wanted = wanted.join(&b'/');
        if tree.lookup(&wanted).is_none() {
            let message = format!("the tree {} has no {:?}", self.tree, shown(&wanted));
            return Err(Failure::new(Exit::NotFound, message));
        }
        let (mut listed, mut missing) = (Vec::new(), 0u64);
        let mut error = None;
        each_file(&tree, &wanted, |path, digest, size| {
            let state = match store.blob(digest) {
                Ok(Some(blob)) if blob.size == size => "stored",
                Ok(Some(_)) => "damaged",
                Ok(None) => "missing",
                Err(failed) => {
                    error.get_or_insert(failed);
                    return Ok(());
                }
            };
            let object = store.path(digest).display().to_string();
            if state != "stored" {
                missing += 1;
                io.note(&format!("{}: the content {digest} is {state}", shown(path)));
            } else if !io.is_json() {
                io.line(&format!("{digest}  {:>7}  {}", human_size(size), shown(path)))?;
            }
            if io.is_json() {
                let path = lossless(path);
                listed.push(json!({"path": path, "digest": digest, "size": size, "state": state, "object": object}));
            }
            Ok(())
        })?;
        if let Some(error) = error {
            return Err(error.into());
        }
        if io.is_json() {
            let files: Vec<Value> = listed;
            io.json(&json!({"digest": named.digest, "path": lossless(&wanted), "files": files, "missing": missing}))?;
        }
        match missing {
            0 => Ok(Exit::Done),
            _ => Err(
                Failure::new(Exit::Damaged, format!("{missing} contents are not as they should be"))
                    .hint("build the tree again to heal it"),
            ),
        }
    }
}

/// Visits every name of a regular file at or below `top`.
fn each_file(
    tree: &Tree,
    top: &[u8],
    mut visit: impl FnMut(&[u8], &Digest, u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        let below = path.strip_prefix(top);
        let is_in = below.is_some_and(|rest| top.is_empty() || rest.is_empty() || rest.starts_with(b"/"));
        let Node::Leaf(id) = node else { continue };
        if let (true, LeafKind::File { digest, size }) = (is_in, &tree.leaf(id).kind) {
            visit(path, digest, *size)?;
        }
    }
    Ok(())
}
