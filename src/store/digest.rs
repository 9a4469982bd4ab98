//! Names by content: [`Digest`] of a file's bytes, [`TreeDigest`] of a tree's manifest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The SHA-256 of a file's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// The SHA-256 of a tree's canonical manifest: equal trees have equal digests, whatever their name, time of build or
/// node. Not interchangeable with a [`Digest`], which names one file's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreeDigest([u8; 32]);

/// A text that is not `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: expected \"sha256:\" and 64 lower-case hexadecimal digits")]
pub struct InvalidDigest(String);

fn parse(text: &str) -> Result<[u8; 32], InvalidDigest> {
    let invalid = || InvalidDigest(text.chars().take(100).collect());
    let digits = text.strip_prefix("sha256:").ok_or_else(invalid)?;
    parse_hex(digits).ok_or_else(invalid)
}

fn parse_hex(digits: &str) -> Option<[u8; 32]> {
    // `hex` takes upper case too; a second spelling of one name must not exist.
    if digits.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(digits, &mut bytes).ok()?;
    Some(bytes)
}

impl Digest {
    /// The same order in numbers, in which many are sorted faster.
    pub(crate) fn halves(&self) -> (u128, u128) {
        let number = |half: &[u8]| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(half);
            u128::from_be_bytes(bytes)
        };
        (number(&self.0[..16]), number(&self.0[16..]))
    }
}

macro_rules! digest_type {
    ($name:ident) => {
        impl $name {
            /// Wraps 32 bytes that a SHA-256 gave.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// 64 lower-case hexadecimal digits, without the `sha256:` prefix.
            pub fn hex(&self) -> String {
                // `hex::encode` works char by char, which shows where there are a million digests.
                let mut digits = vec![0; 64];
                let _ = hex::encode_to_slice(self.0, &mut digits);
                String::from_utf8(digits).unwrap_or_default()
            }

            /// Reads what [`Self::hex`] wrote; `None` for anything else.
            pub fn from_hex(digits: &str) -> Option<Self> {
                parse_hex(digits).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "sha256:{}", self.hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidDigest;
            fn from_str(text: &str) -> Result<Self, InvalidDigest> {
                parse(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?
                    .parse()
                    .map_err(serde::de::Error::custom)
            }
        }
    };
}

digest_type!(Digest);
digest_type!(TreeDigest);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_text_and_has_one_spelling() {
        let digest = Digest::from_bytes([0xab; 32]);
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest.hex().len(), 64);
        for bad in [
            "",
            "sha256:",
            &digest.hex(),
            &digest.to_string().to_uppercase(),
            "sha256:zz",
            "md5:00",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?} was taken for a digest");
        }
        assert_eq!(Digest::from_hex(&digest.hex().to_uppercase()), None);
    }
}
