//! Reading a store, also one that another process has open.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::layout::{self, Folder};
use super::tree::{Record, Tree};
use super::{Digest, Error, StoredManifest, TreeDigest, disk, files, gc, manifests};

const CHUNK: usize = 1 << 17;

/// A store that is opened for reading. Clones share it.
///
/// It takes no lock and changes nothing on disk: not "last used" either, so it keeps nothing from a collection. Beside
/// a process that collects, a read can therefore end with [`Error::MissingBlob`] or [`Error::MissingManifest`] for what
/// was there a moment ago. It never gives wrong bytes for it: files are only ever replaced or unlinked whole, and an
/// open one stays as it is.
#[derive(Clone)]
pub struct Reader {
    pub(super) folder: Arc<Folder>,
}

/// A stored content, as its file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobInfo {
    pub digest: Digest,
    /// Bytes of the file.
    pub size: u64,
    /// When it was last stored, found present by a build, or seen in use.
    pub last_used: SystemTime,
}

impl Reader {
    /// Opens a store for reading, whoever has it open for writing.
    ///
    /// Fails with [`Error::NoStore`] if the folder does not exist or has no store, [`Error::NotAStore`] if it has
    /// something else, and [`Error::Config`] if this program does not know the store's format.
    pub fn open(root: &Path) -> Result<Reader, Error> {
        Ok(Reader::new(Arc::new(Folder::open(root)?)))
    }

    pub(super) fn new(folder: Arc<Folder>) -> Reader {
        Reader { folder }
    }

    /// The store's own id (a UUID), made with it: another id under the same path is another store.
    pub fn id(&self) -> &str {
        &self.folder.id
    }

    pub fn root(&self) -> &Path {
        &self.folder.root
    }

    /// Opens a content for reading. Fails with [`Error::MissingBlob`].
    pub fn read(&self, digest: &Digest) -> Result<File, Error> {
        let path = layout::object_path(digest);
        match disk::open_file(&self.folder.dir, path.as_str()) {
            Ok(file) => Ok(file),
            Err(Errno::NOENT) => Err(Error::MissingBlob { digest: *digest }),
            Err(error) => Err(Error::io("open", self.folder.path(&path), error)),
        }
    }

    /// Writes a content to `out`, and returns its length in bytes. The bytes are checked on their way.
    ///
    /// Fails with [`Error::MissingBlob`], and with [`Error::WrongBlob`] at the end of a damaged one. The outer error is
    /// that of `out`.
    pub fn copy(&self, digest: &Digest, out: &mut dyn Write) -> io::Result<Result<u64, Error>> {
        let mut file = match self.read(digest) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        let mut hash = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let mut size = 0;
        loop {
            let read = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Err(Error::io("read", self.path(digest), error))),
            };
            hash.update(&buffer[..read]);
            out.write_all(&buffer[..read])?;
            size += read as u64;
        }
        let found = Digest::from_bytes(hash.finalize().into());
        Ok(match found == *digest {
            true => Ok(size),
            false => Err(Error::WrongBlob { digest: *digest, found }),
        })
    }

    /// Where a content's file is, or would be: for reading only. Who writes to it or removes it damages the store.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.path(layout::object_path(digest))
    }

    /// What is known of a stored content without reading it; `None` if there is no such file.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobInfo>, Error> {
        let path = layout::object_path(digest);
        let stat = files::stat(&self.folder.dir, path.as_str());
        let stat = stat.map_err(|e| Error::io("look for", self.folder.path(&path), e))?;
        Ok(stat.filter(files::is_file).map(|stat| BlobInfo {
            digest: *digest,
            size: stat.st_size.max(0) as u64,
            last_used: files::mtime(&stat),
        }))
    }

    /// Every stored content whose digest begins with this byte, sorted. Other files in the folder are passed over.
    pub fn shard(&self, byte: u8) -> Result<Vec<BlobInfo>, Error> {
        let mut found = Vec::new();
        let Some(shard) = self.folder.list_shard(byte)? else {
            return Ok(found);
        };
        for (digest, name) in shard.iter() {
            // Gone meanwhile, or nothing that the store has made.
            found.extend(shard.stat(name)?.filter(files::is_file).map(|stat| BlobInfo {
                digest,
                size: stat.st_size.max(0) as u64,
                last_used: files::mtime(&stat),
            }));
        }
        found.sort_unstable_by_key(|blob| blob.digest);
        Ok(found)
    }

    /// Reads a tree's manifest and checks that it is that tree.
    pub fn load(&self, tree: &TreeDigest) -> Result<Tree, Error> {
        manifests::load(&self.folder, tree)
    }

    /// Goes through a tree's manifest, record by record. What was seen counts only if this ends well, for whether it is
    /// that tree is known at the end.
    pub fn records(&self, tree: &TreeDigest, visit: &mut dyn FnMut(Record)) -> Result<(), Error> {
        manifests::records(&self.folder, tree, visit)
    }

    /// Goes through the regular files of a tree, name by name: digest and size of the content, and the path below the
    /// root, in the order of the paths' names, until `visit` says `false`. Needs no memory for the tree. That the
    /// manifest has its own digest is not checked.
    pub fn paths(&self, tree: &TreeDigest, visit: &mut dyn FnMut(&Digest, u64, &[u8]) -> bool) -> Result<(), Error> {
        manifests::paths(&self.folder, tree, visit)
    }

    /// Every stored manifest, sorted, whether or not anything names it.
    pub fn manifests(&self) -> Result<Vec<StoredManifest>, Error> {
        gc::stored_manifests(&self.folder)
    }

    /// Where images of trees are: folders `<tree hex>[-variant].tree` and files `<tree hex>[-variant].erofs`, made
    /// under another name ([`super::Store::scratch`]) and renamed when whole. A collection removes those of trees that
    /// nothing holds, before their blobs.
    pub fn images_dir(&self) -> PathBuf {
        self.folder.path(layout::IMAGES)
    }

    /// Where the contents are, each at [`object_name`](super::object_name): for a mount that takes files' data from
    /// there.
    pub fn objects_dir(&self) -> PathBuf {
        self.folder.path(layout::OBJECTS)
    }
}
