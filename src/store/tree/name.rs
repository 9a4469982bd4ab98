//! Names of entries.

use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

/// The bytes of a name. Short ones, as most are, lie in the entry itself: a tree of a million files is a million names.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Name(SmallVec<[u8; 16]>);

impl Name {
    /// So many zeros, to be filled.
    pub(super) fn zeros(length: usize) -> Name {
        Name(SmallVec::from_elem(0, length))
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Deref for Name {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for Name {
    fn from(bytes: &[u8]) -> Name {
        Name(SmallVec::from_slice(bytes))
    }
}

impl<const N: usize> From<&[u8; N]> for Name {
    fn from(bytes: &[u8; N]) -> Name {
        bytes.as_slice().into()
    }
}

impl<const N: usize> From<[u8; N]> for Name {
    fn from(bytes: [u8; N]) -> Name {
        bytes.as_slice().into()
    }
}

impl From<Vec<u8>> for Name {
    fn from(bytes: Vec<u8>) -> Name {
        bytes.as_slice().into()
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.escape_ascii())
    }
}
