//! `layer.json`: what a layer is, written before anything else of it is made and removed after everything else is gone.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Error;
use super::error::IoContext;
use crate::store::{self, TreeDigest};

/// Version of `layer.json`. A file with another one is not read.
const VERSION: u32 = 1;
/// Largest `layer.json` that is read, in bytes.
const MAX_SIZE: u64 = 64 << 10;
pub(super) const FILE_NAME: &str = "layer.json";
pub(super) const TEMPORARY_NAME: &str = "layer.json.tmp";

/// A layer's identity: the UID of its object, a UUID in lower case. Safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(String);

impl LayerId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for LayerId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let valid = text.len() == 36
            && text.bytes().enumerate().all(|(at, b)| match at {
                8 | 13 | 18 | 23 => b == b'-',
                _ => b.is_ascii_digit() || (b'a'..=b'f').contains(&b),
            });
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::InvalidId(text.chars().take(100).collect()))
        }
    }
}

impl Serialize for LayerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for LayerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// What a layer belongs to, which says who releases it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerOwner {
    #[serde(default, skip_serializing_if = "OwnerKind::is_object")]
    pub kind: OwnerKind,
    /// Of the object; `local` for an admin's layer.
    pub namespace: String,
    pub name: String,
}

/// Kinds of what a layer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum OwnerKind {
    /// A WritableLayer. Without it, the layer is an orphan.
    #[default]
    Object,
    /// An admin who made it by hand, and who releases it.
    Admin,
}

impl OwnerKind {
    fn is_object(&self) -> bool {
        *self == OwnerKind::Object
    }
}

impl LayerOwner {
    /// A WritableLayer.
    pub fn object(namespace: impl Into<String>, name: impl Into<String>) -> LayerOwner {
        LayerOwner {
            kind: OwnerKind::Object,
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// An admin's layer of that name.
    pub fn admin(name: impl Into<String>) -> LayerOwner {
        LayerOwner {
            kind: OwnerKind::Admin,
            namespace: "local".to_owned(),
            name: name.into(),
        }
    }
}

impl fmt::Display for LayerOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            OwnerKind::Object => write!(f, "{}/{}", self.namespace, self.name),
            OwnerKind::Admin => write!(f, "{} (by hand)", self.name),
        }
    }
}

/// What may be changed in a layer, and where the changes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// On the disk: they survive a restart of the node.
    Overlay,
    /// In memory: a restart of the node empties the layer.
    Tmpfs,
    /// Nothing can be changed. All read-only layers of a tree are one mount, seen in several places.
    ReadOnly,
}

/// What a layer no longer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lost {
    /// The layer was in memory, and the memory went with a restart of the node (or somebody unmounted it): it came
    /// back empty.
    Reboot,
}

/// How far a layer's life is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Nothing was ever mounted: whatever lies in its folder can be made again.
    Making,
    /// Made; its data counts.
    Made,
    /// Given up; what is left of it is being removed.
    Releasing,
}

/// A layer as `layer.json` keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerRecord {
    version: u32,
    pub id: LayerId,
    pub owner: LayerOwner,
    pub tree: TreeDigest,
    pub mode: Mode,
    /// The limit in bytes; `None`: none but the disk's, or for a tmpfs the memory's.
    pub size: Option<u64>,
    /// The uid and gid that every entry of the tree has in this layer.
    pub ids: Option<(u32, u32)>,
    /// The store that the layer was made in.
    pub store_id: String,
    pub stage: Stage,
    /// What the layer lost since it was made; stays for its whole life.
    pub lost: Option<Lost>,
}

impl LayerRecord {
    pub(crate) fn new(spec: &super::LayerSpec, size: Option<u64>, store_id: &str) -> Self {
        Self {
            version: VERSION,
            id: spec.id.clone(),
            owner: spec.owner.clone(),
            tree: spec.tree,
            mode: spec.mode,
            size,
            ids: spec.ids,
            store_id: store_id.to_owned(),
            stage: Stage::Making,
            lost: None,
        }
    }

    /// Reads the record in a layer's folder; `None` if there is none.
    pub(super) fn read(folder: &Path, id: &LayerId) -> Result<Option<Self>, Error> {
        let path = folder.join(FILE_NAME);
        let invalid = |message: String| Error::Record {
            path: path.clone(),
            message,
        };
        let text = match store::read_bounded(&path, MAX_SIZE) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        if text.is_empty() && has_no_data(folder)? {
            return Ok(None);
        }
        let record = Self::parse(&text).map_err(invalid)?;
        if record.id != *id {
            return Err(invalid(format!("it is the record of another layer, {}", record.id)));
        }
        Ok(Some(record))
    }

    pub(crate) fn parse(text: &[u8]) -> Result<Self, String> {
        // The version first: a later one may have other fields.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let version: Version = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if version.version != VERSION {
            return Err(format!("version {} is not known", version.version));
        }
        serde_json::from_slice(text).map_err(|e| e.to_string())
    }

    /// Records that the layer is made, if it was not.
    pub(super) fn made(&mut self, folder: &Path) -> Result<(), Error> {
        match self.stage {
            Stage::Made => Ok(()),
            Stage::Making | Stage::Releasing => {
                self.stage = Stage::Made;
                self.write(folder)
            }
        }
    }

    /// Is there something that a power cut must not part from its record?
    pub(super) fn is_durable(&self) -> bool {
        match self.mode {
            Mode::Overlay => true,
            Mode::Tmpfs | Mode::ReadOnly => false,
        }
    }

    /// Writes the record so that after a crash either the old or the new one is there, whole.
    ///
    /// That of a layer whose changes do not survive a power cut need not survive one either, and syncs are what making
    /// such a layer would wait for ([`has_no_data`]).
    pub(super) fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(FILE_NAME);
        let temporary = folder.join(TEMPORARY_NAME);
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| Error::Record {
            path: path.clone(),
            message: e.to_string(),
        })?;
        text.push(b'\n');
        File::create(&temporary)
            .and_then(|mut file| {
                file.write_all(&text)?;
                match self.is_durable() {
                    true => file.sync_all(),
                    false => Ok(()),
                }
            })
            .context("write", &temporary)?;
        fs::rename(&temporary, &path).context("rename to", &path)?;
        match self.is_durable() {
            true => sync_folder(folder),
            false => Ok(()),
        }
    }
}

/// Whether a layer's folder holds nothing that was written in the layer: nothing at all, or what a power cut leaves of a
/// layer in memory. Its record, which is not synced, may be missing or empty then (file systems give a file its length
/// after its data, so it is empty or whole), and there may be the folder at which its tmpfs was mounted.
///
/// Others may remove the layer meanwhile: what is gone holds nothing.
pub(super) fn has_no_data(folder: &Path) -> Result<bool, Error> {
    let Some(entries) = unless_gone(fs::read_dir(folder)).context("list", folder)? else {
        return Ok(true);
    };
    for entry in entries {
        let path = entry.context("list", folder)?.path();
        let nothing = match path.file_name().and_then(|name| name.to_str()) {
            Some(TEMPORARY_NAME) => true,
            Some(FILE_NAME) => unless_gone(path.metadata())
                .context("stat", &path)?
                .is_none_or(|file| file.len() == 0),
            Some("disk") => unless_gone(fs::read_dir(&path))
                .context("list", &path)?
                .is_none_or(|mut disk| disk.next().is_none()),
            _ => false,
        };
        if !nothing {
            return Ok(false);
        }
    }
    Ok(true)
}

fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|f| f.sync_all()).context("sync", folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";

    fn record() -> LayerRecord {
        LayerRecord {
            version: VERSION,
            id: UID.parse().unwrap(),
            owner: LayerOwner::object("default", "work"),
            tree: TreeDigest::from_bytes([7; 32]),
            mode: Mode::Overlay,
            size: Some(1 << 30),
            ids: Some((1000, 1001)),
            store_id: "a".into(),
            stage: Stage::Made,
            lost: None,
        }
    }

    #[test]
    fn only_a_lower_case_uuid_is_an_id() {
        assert_eq!(UID.parse::<LayerId>().unwrap().as_str(), UID);
        for bad in [
            "",
            "..",
            "../../etc/passwd/aaaaaaaaaaaaaaaaaaaaa",
            &UID.to_uppercase(),
            &UID[1..],
            &UID.replace('-', "a"),
        ] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_record_survives_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(LayerRecord::read(folder.path(), &record().id).unwrap(), None);
        record().write(folder.path()).unwrap();
        assert_eq!(LayerRecord::read(folder.path(), &record().id).unwrap(), Some(record()));
        let names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["layer.json"]);
    }

    #[test]
    fn what_a_power_cut_leaves_of_a_layer_in_memory_is_no_layer() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path(FILE_NAME), "").unwrap();
        fs::create_dir(path("disk")).unwrap();
        assert_eq!(LayerRecord::read(folder.path(), &record().id).unwrap(), None);
        // There was data.
        fs::create_dir(path("disk/upper")).unwrap();
        assert!(!has_no_data(folder.path()).unwrap());
        LayerRecord::read(folder.path(), &record().id).unwrap_err();
        fs::remove_dir(path("disk/upper")).unwrap();
        fs::write(path("disk.img"), "").unwrap();
        LayerRecord::read(folder.path(), &record().id).unwrap_err();
    }

    #[test]
    fn a_record_that_cannot_be_understood_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let mut other = serde_json::to_value(record()).unwrap();
        other["id"] = "00000000-0000-0000-0000-000000000000".into();
        let mut later = serde_json::to_value(record()).unwrap();
        later["version"] = 2.into();
        for (text, says) in [
            ("{".into(), "EOF"),
            ("{}".into(), "version"),
            (later.to_string(), "version 2"),
            (other.to_string(), "another layer"),
        ] {
            fs::write(&path, text).unwrap();
            let error = LayerRecord::read(folder.path(), &record().id).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("layer.json"), "{error}");
        }
    }
}
