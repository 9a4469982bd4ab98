//! Where a tree comes from: a folder of the node ([`build_directory`], [`scan`]), or what was changed in a layer
//! ([`snapshot`]); and taking what the store has lost from there again ([`repair`]).
//!
//! What this module promises:
//! - a namespace reads only below the roots that name it, and nothing outside the folder that it named: no symlink is
//!   followed, no mount entered (`roots.rs`);
//! - the tree is whole, or there is no tree: what cannot be read fails the reading, named and counted, and is never an
//!   empty or shortened entry (`read.rs`);
//! - a file's metadata and content belong together: both were the same before and after reading (`leaf.rs`);
//! - a file that is as it was when it was last read is not read again, and not one that only looks so (`unchanged.rs`);
//! - FIFOs, sockets and devices are recorded and never opened.

mod directory;
mod error;
mod leaf;
mod read;
mod repair;
mod roots;
mod snapshot;
#[cfg(test)]
mod tests;
mod unchanged;

#[cfg(any(test, fuzzing))]
pub use directory::check_globs;
pub use directory::{ScanOptions, build_directory, scan};
pub use error::{Error, Failure, FailureKind};
pub use repair::{Lost, Origin, Repair, repair};
pub use roots::{Roots, SourceDir, SourceRoot};
pub use snapshot::snapshot;
#[cfg(any(test, fuzzing))]
pub use unchanged::reread_note;
