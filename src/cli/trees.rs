//! Naming trees, and forgetting names.

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::io::Io;
use super::site::Site;
use super::text::short;
use crate::store::tree::Tree;
use crate::store::{Error, Reader, Ref, RefName, TreeDigest};

/// The namespace of a name that is given without one. Names of CasManifests have those of the cluster.
pub const DEFAULT_NAMESPACE: &str = "local";

/// The owner of the refs that the command line makes. No object has this UID, so that an agent leaves them alone.
pub const OWNER: &str = "larder-store";

/// Fewest hexadecimal digits that name a tree.
const SHORTEST: usize = 8;

/// Reads `name` or `namespace/name`.
pub fn parse_name(text: &str) -> Result<RefName, Error> {
    match text.split_once('/') {
        Some((namespace, name)) => RefName::new(namespace, name),
        None => RefName::new(DEFAULT_NAMESPACE, text),
    }
}

/// A tree that was named on the command line.
pub struct Named {
    pub digest: TreeDigest,
    /// The ref that it was named by, or the first one whose current tree it is.
    pub entry: Option<Ref>,
}

impl Named {
    pub fn name(&self) -> Option<String> {
        self.entry.as_ref().map(|entry| entry.name.to_string())
    }

    pub fn load(&self, store: &Reader) -> Result<Tree, Failure> {
        store.load(&self.digest).map_err(|error| match (error, &self.entry) {
            // It should be there.
            (Error::MissingManifest { tree }, Some(entry)) => {
                let message = format!(
                    "{} stands for the tree {tree}, whose manifest is not in the store",
                    entry.name
                );
                Failure::new(Exit::Damaged, message).hint("build the tree again to heal it")
            }
            (error, _) => error.into(),
        })
    }
}

/// Finds a tree by the name of a ref, its digest, or the beginning of its digest; in this order.
pub fn find(store: &Reader, text: &str) -> Result<Named, Failure> {
    if let Ok(name) = parse_name(text)
        && let Some(entry) = store.get_ref(&name)?
    {
        let Some(current) = &entry.current else {
            let old = entry.history.first();
            let old = old.map_or(String::new(), |old| {
                format!("; the newest of its history is {}", old.revision.digest)
            });
            return Err(Failure::new(
                Exit::NotFound,
                format!("{name} stands for no tree any more{old}"),
            ));
        };
        return Ok(Named {
            digest: current.digest,
            entry: Some(entry),
        });
    }
    let digest = by_digest(store, text)?;
    let entry = store.refs()?.refs.into_iter().find(|entry| {
        let current = entry.current.as_ref();
        current.is_some_and(|current| current.digest == digest)
    });
    Ok(Named { digest, entry })
}

fn by_digest(store: &Reader, text: &str) -> Result<TreeDigest, Failure> {
    let none = |why: &str| {
        Failure::new(Exit::NotFound, format!("there is no tree {text:?}{why}"))
            .hint("name a ref as `larder store ls` lists it, a digest, or at least 8 of its first digits")
    };
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let is_hex = digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if !is_hex || digits.len() < SHORTEST || digits.len() > 64 {
        return Err(none(""));
    }
    let manifests = store.manifests()?;
    let mut matching = manifests
        .iter()
        .map(|manifest| manifest.tree)
        .filter(|tree| tree.hex().starts_with(digits));
    match (matching.next(), matching.next()) {
        (Some(tree), None) => Ok(tree),
        (None, _) => Err(none("")),
        (Some(first), Some(second)) => Err(none(&format!(
            ", but several that begin so, such as {} and {}",
            short(&first.hex()),
            short(&second.hex())
        ))),
    }
}

/// Forget a name: its trees go with the next gc that finds them old enough, unless something else needs them.
///
/// Also a ref that cannot be read is forgotten, which is what ends the standstill that it causes.
#[derive(Debug, Args, Serialize, Deserialize)]
pub struct Forget {
    /// The ref, as NAME or NAMESPACE/NAME.
    name: String,
}

impl Forget {
    pub fn run(self, site: &Site, io: &mut Io) -> Result<Exit, Failure> {
        let name = parse_name(&self.name)?;
        match site.store.get_ref(&name) {
            Ok(None) => {
                return Err(Failure::new(Exit::NotFound, format!("there is no ref {name}"))
                    .hint("`larder store ls` lists the refs"));
            }
            // What it holds does not matter any more.
            Ok(Some(_)) | Err(Error::BadRef { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        site.store.forget(&name)?;
        match io.is_json() {
            true => io.json(&json!({"forgotten": name.to_string()}))?,
            false => io.line(&format!("{name} is forgotten"))?,
        }
        Ok(Exit::Done)
    }
}
