//! The ways to give a layer its tree, of which the first that the kernel can go is taken.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use super::error::IoContext;
use super::mount::{self, Changes, Flags, Overlay, Told, open_folder};
use super::{Error, image, loopdev, make_private};
use crate::store::tree::{self, Leaf, LeafKind, Meta, Tree};
use crate::store::{Digest, Store, object_name};

/// How layers come by the tree below them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Road {
    /// An image of the tree, whose files have their data in the store; overlayfs is told its layers by descriptors.
    /// Linux 6.15 and later.
    Descriptors,
    /// The same, with layers told by path, and where need be the image over a loop device. Linux 6.8 and later.
    Paths,
    /// A copy of the tree.
    Copy,
}

impl Road {
    /// In the order in which they are tried.
    pub const ALL: [Road; 3] = [Road::Descriptors, Road::Paths, Road::Copy];

    pub(super) fn told(self) -> Told {
        match self {
            Road::Descriptors => Told::ByDescriptor,
            Road::Paths => Told::ByPath,
            Road::Copy => Told::Either,
        }
    }
}

impl fmt::Display for Road {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for Road {
    type Err = String;
    fn from_str(text: &str) -> Result<Road, String> {
        let found = Road::ALL
            .into_iter()
            .find(|road| road.to_string().eq_ignore_ascii_case(text));
        found.ok_or_else(|| format!("{text:?} is no road: expected descriptors, paths or copy"))
    }
}

/// The road that is taken.
#[derive(Debug)]
pub struct Found {
    pub road: Road,
    /// Those that would be better, and why they are not taken.
    pub closed: Vec<(Road, Error)>,
}

/// Finds the first road that goes to its end here: a layer is made, read, changed and thrown away. With `forced`, only that
/// one is tried.
///
/// # Errors
/// If the forced one does not, or if not even a copy can be a lower layer.
pub(super) fn find(store: &Store, mounts: &Path, forced: Option<Road>) -> Result<Found, Error> {
    if let Some(road) = forced {
        try_out(store, mounts, road).map_err(|error| match error {
            error @ Error::Probe { .. } => error,
            error => Error::Probe {
                road,
                message: format!("--layer-road forces it, and {error}"),
            },
        })?;
        let closed = Vec::new();
        return Ok(Found { road, closed });
    }
    let mut closed = Vec::new();
    for road in Road::ALL {
        match try_out(store, mounts, road) {
            Ok(()) => return Ok(Found { road, closed }),
            Err(error) if road == Road::Copy => return Err(error),
            Err(error) => closed.push((road, error)),
        }
    }
    unreachable!("the last road ends the loop")
}

const TEXT: &[u8] = b"a layer is read through its image";
const NAME: &str = "file";

/// Makes a layer over a tree of one file. What an earlier try left, killed at any step, is cleaned first.
fn try_out(store: &Store, mounts: &Path, road: Road) -> Result<(), Error> {
    let scratch = store.scratch()?;
    let folder = |name: &str| {
        let path = scratch.path().join(name);
        fs::create_dir(&path).context("create", &path).map(|()| path)
    };
    let (upper, work) = (open_folder(&folder("upper")?)?, open_folder(&folder("work")?)?);
    let data = folder("data")?;
    let lower = Probe::begin(mounts)?;
    let from = if road == Road::Copy {
        let copy = folder("lower")?;
        fs::write(copy.join(NAME), TEXT).context("write", &copy)?;
        open_folder(&copy)?
    } else {
        let image = image_of_one_file(scratch.path(), &data)?;
        mount_image(&image, &lower.0, road)?;
        open_folder(&lower.0)?
    };
    let data = open_folder(&data)?;
    let layers = Overlay {
        source: "larder-probe",
        lower: &[from.as_fd()],
        data: (road != Road::Copy).then_some(data.as_fd()),
        changes: Some(Changes {
            upper: upper.as_fd(),
            work: work.as_fd(),
        }),
    };
    let layer = mount::overlay(&layers, road.told(), Flags { allow_suid: false }, &lower.0)?;
    let wrong = |what: &str| Error::Probe {
        road,
        message: what.to_owned(),
    };
    let read = || -> Result<Vec<u8>, Error> {
        let file = rustix::fs::openat(layer.folder(), NAME, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let mut bytes = Vec::new();
        let mut file = File::from(file.context("open", Path::new(NAME))?);
        file.read_to_end(&mut bytes).context("read", Path::new(NAME))?;
        Ok(bytes)
    };
    if read()? != TEXT {
        return Err(wrong("a file has other bytes than its content"));
    }
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::chmodat(layer.folder(), NAME, mode, rustix::fs::AtFlags::empty()).context("chmod", Path::new(NAME))?;
    if read()? != TEXT {
        return Err(wrong("a file whose mode was changed has other bytes than its content"));
    }
    Ok(())
}

/// Where images are mounted for a try.
struct Probe(std::path::PathBuf);

impl Probe {
    fn begin(mounts: &Path) -> Result<Probe, Error> {
        let path = mounts.join("probe");
        make_private(&path)?;
        mount::detach_at(&path, true)?;
        Ok(Probe(path))
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Whatever this leaves, the next try cleans.
        let _ = mount::detach_at(&self.0, true);
        let _ = fs::remove_dir(&self.0);
    }
}

/// Makes an image visible at `target`.
pub(super) fn mount_image(image: &File, target: &Path, road: Road) -> Result<(), Error> {
    let mounted = match mount::erofs(image.as_fd(), target) {
        Err(Error::Mount { source, .. }) if road == Road::Paths && source.raw_os_error() == Some(libc::ENOTBLK) => {
            mount_over_loop(image, target)?
        }
        other => other?,
    };
    mounted.attach(target)
}

/// As Linux before 6.12 needs it.
fn mount_over_loop(image: &File, target: &Path) -> Result<mount::Detached, Error> {
    let device = match loopdev::find(image).context("look for a loop device of", target)? {
        Some(device) => device,
        None => loopdev::attach(image, target, 0).context("attach a loop device to the image of", target)?,
    };
    // The device stays attached until the file system has its own hold on it.
    mount::erofs_on(&device.path, target)
}

/// Writes the image of a tree with one file, and the file's content into `data`.
fn image_of_one_file(folder: &Path, data: &Path) -> Result<File, Error> {
    let digest = Digest::from_bytes(Sha256::digest(TEXT).into());
    let blob = data.join(object_name(&digest));
    if let Some(shard) = blob.parent() {
        fs::create_dir(shard).context("create", shard)?;
    }
    fs::write(&blob, TEXT).context("write", &blob)?;
    let mut tree = Tree::new(Meta {
        mode: 0o755,
        ..Meta::default()
    });
    let leaf = Leaf {
        meta: Meta {
            mode: 0o644,
            ..Meta::default()
        },
        kind: LeafKind::File {
            digest,
            size: TEXT.len() as u64,
        },
    };
    let path = folder.join("image");
    let unreadable = |error: String| Error::io("make", &path, std::io::Error::other(error));
    let added = tree.add_leaf(Tree::ROOT, NAME.as_bytes(), leaf);
    added.map_err(|e| unreadable(e.to_string()))?;
    let mut manifest = Vec::new();
    let digest = tree.encode(&mut manifest).map_err(|e| unreadable(e.to_string()))?;
    let image = File::options().read(true).write(true).create_new(true).open(&path);
    let image = image.context("create", &path)?;
    image::write(&image, &digest, None, |visit| {
        let mut records = tree::Reader::new(&manifest[..]);
        while let Some(record) = records.next_record().map_err(|e| unreadable(e.to_string()))? {
            visit(record);
        }
        Ok(())
    })?;
    Ok(image)
}
