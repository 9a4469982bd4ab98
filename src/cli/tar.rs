//! A tree as a tar stream in the pax format (POSIX.1-2024, pax: "pax Interchange Format").
//!
//! Every name begins with `./`, the root's is `./`: so its metadata is restored too. What a ustar header cannot hold
//! stands in a pax record before it. Extended attributes are `SCHILY.xattr.<name>` records, as GNU tar and star have
//! them; in a name, `%` is `%25` and `=` is `%3D`, as GNU tar writes and reads it.

use std::io::{self, Write};

use super::links::Links;
use crate::store::tree::{Leaf, LeafKind, Meta, Node, Tree};
use crate::store::{Error, Reader};

const BLOCK: usize = 512;
/// The largest numbers of a field of 7 and of 11 octal digits.
const MAX_7: u64 = 0o7_777_777;
const MAX_11: u64 = 0o77_777_777_777;

/// What of an inode goes into a header beside its metadata.
#[derive(Clone, Copy)]
struct Kind<'a> {
    flag: u8,
    size: u64,
    link: &'a [u8],
    device: (u32, u32),
}

impl Kind<'_> {
    fn plain(flag: u8) -> Self {
        Kind {
            flag,
            size: 0,
            link: b"",
            device: (0, 0),
        }
    }
}

/// Writes the whole stream, and returns the paths of sockets, which tar cannot keep. The outer error is that of `out`;
/// with the inner one, a content was missing or damaged and the stream is cut off.
pub fn write(store: &Reader, tree: &Tree, out: &mut dyn Write) -> io::Result<Result<Vec<Vec<u8>>, Error>> {
    let mut left_out = Vec::new();
    let mut links = Links::of(tree);
    let mut walk = tree.walk();
    while let Some((path, node)) = walk.next() {
        let name = [b"./", path].concat();
        let leaf = match node {
            Node::Dir(id) => {
                let name = if path.is_empty() {
                    name
                } else {
                    [&name[..], b"/"].concat()
                };
                header(out, &name, &tree.dir(id).meta, Kind::plain(b'5'))?;
                continue;
            }
            Node::Leaf(id) => {
                let leaf = tree.leaf(id);
                if leaf.kind == LeafKind::Socket {
                    left_out.push(path.to_vec());
                    continue;
                }
                if let Some(first) = links.first(id, &name) {
                    let kind = Kind {
                        link: &first,
                        ..Kind::plain(b'1')
                    };
                    header(out, &name, &leaf.meta, kind)?;
                    continue;
                }
                leaf
            }
        };
        if let Err(error) = write_leaf(store, &name, leaf, out)? {
            return Ok(Err(Error::ExportBlob {
                path: path.to_vec(),
                source: Box::new(error),
            }));
        }
    }
    out.write_all(&[0; 2 * BLOCK])?;
    Ok(Ok(left_out))
}

fn write_leaf(store: &Reader, name: &[u8], leaf: &Leaf, out: &mut dyn Write) -> io::Result<Result<(), Error>> {
    let kind = match &leaf.kind {
        LeafKind::File { digest, size } => {
            // Before the header, which promises so many bytes.
            let expected = *size;
            match store.blob(digest) {
                Ok(Some(blob)) if blob.size == expected => {}
                Ok(None) if expected == 0 => {}
                Ok(None) => return Ok(Err(Error::MissingBlob { digest: *digest })),
                Ok(Some(blob)) => {
                    return Ok(Err(Error::WrongLength {
                        digest: *digest,
                        expected,
                        found: blob.size,
                    }));
                }
                Err(error) => return Ok(Err(error)),
            }
            let kind = Kind {
                size: expected,
                ..Kind::plain(b'0')
            };
            header(out, name, &leaf.meta, kind)?;
            if expected > 0 {
                if let Err(error) = store.copy(digest, out)? {
                    return Ok(Err(error));
                }
                pad(out, expected)?;
            }
            return Ok(Ok(()));
        }
        LeafKind::Symlink(target) => Kind {
            link: target,
            ..Kind::plain(b'2')
        },
        LeafKind::CharDevice { major, minor } => Kind {
            device: (*major, *minor),
            ..Kind::plain(b'3')
        },
        LeafKind::BlockDevice { major, minor } => Kind {
            device: (*major, *minor),
            ..Kind::plain(b'4')
        },
        LeafKind::Fifo => Kind::plain(b'6'),
        // The caller has left it out.
        LeafKind::Socket => return Ok(Ok(())),
    };
    header(out, name, &leaf.meta, kind)?;
    Ok(Ok(()))
}

/// Writes the pax records that an entry needs, and its header.
fn header(out: &mut dyn Write, name: &[u8], meta: &Meta, kind: Kind<'_>) -> io::Result<()> {
    let mut records = Records::default();
    if !fits(name) {
        records.text("path", name);
    }
    if !fits(kind.link) {
        records.text("linkpath", kind.link);
    }
    for (key, number, max) in [
        ("size", kind.size, MAX_11),
        ("uid", meta.uid.into(), MAX_7),
        ("gid", meta.gid.into(), MAX_7),
    ] {
        if number > max {
            records.add(key.as_bytes(), number.to_string().as_bytes());
        }
    }
    let plain_time = u64::try_from(meta.mtime.0).ok().filter(|seconds| *seconds <= MAX_11);
    if plain_time.is_none() || meta.mtime.1 != 0 {
        records.add(b"mtime", time(meta.mtime).as_bytes());
    }
    // A hard link has them with its first name.
    if kind.flag != b'1' {
        for (name, value) in &meta.xattrs {
            records.add(&xattr_key(name), value);
        }
    }
    let records = records.finish();
    if !records.is_empty() {
        let plain = Meta {
            mode: 0o644,
            ..Meta::default()
        };
        let kind = Kind {
            size: records.len() as u64,
            ..Kind::plain(b'x')
        };
        out.write_all(&ustar(b"./PaxHeaders/entry", &plain, 0, kind))?;
        out.write_all(&records)?;
        pad(out, records.len() as u64)?;
    }
    out.write_all(&ustar(name, meta, plain_time.unwrap_or(0), kind))
}

/// Can a field of 100 bytes hold it, in a way that every program reads alike?
fn fits(text: &[u8]) -> bool {
    text.len() <= 100 && text.is_ascii()
}

fn ustar(name: &[u8], meta: &Meta, mtime: u64, kind: Kind<'_>) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    put(&mut block[..100], name);
    number(&mut block[100..108], meta.mode.into());
    number(&mut block[108..116], meta.uid.into());
    number(&mut block[116..124], meta.gid.into());
    number(&mut block[124..136], kind.size);
    number(&mut block[136..148], mtime);
    block[148..156].fill(b' ');
    block[156] = kind.flag;
    put(&mut block[157..257], kind.link);
    put(&mut block[257..265], b"ustar\x0000");
    if kind.flag == b'3' || kind.flag == b'4' {
        number(&mut block[329..337], kind.device.0.into());
        number(&mut block[337..345], kind.device.1.into());
    }
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut block[148..156], format!("{sum:06o}\0 ").as_bytes());
    block
}

/// What does not fit is cut: its whole stands in a pax record.
fn put(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
}

/// Octal digits and a NUL; a number that they cannot hold in base 256, as GNU tar has it, for who does not know pax.
fn number(field: &mut [u8], number: u64) {
    let digits = field.len() - 1;
    let octal = format!("{number:0digits$o}");
    if octal.len() == digits {
        put(field, octal.as_bytes());
        return;
    }
    let bytes = number.to_be_bytes();
    let start = field.len().saturating_sub(bytes.len());
    let skip = bytes.len() - (field.len() - start);
    field[start..].copy_from_slice(&bytes[skip..]);
    field[0] |= 0x80;
}

/// Seconds since 1970 with nine decimals, perhaps negative.
fn time((seconds, nanos): (i64, u32)) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    let sign = if total < 0 { "-" } else { "" };
    let total = total.unsigned_abs();
    format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000)
}

fn xattr_key(name: &[u8]) -> Vec<u8> {
    let mut key = b"SCHILY.xattr.".to_vec();
    for byte in name {
        match byte {
            b'%' => key.extend_from_slice(b"%25"),
            b'=' => key.extend_from_slice(b"%3D"),
            byte => key.push(*byte),
        }
    }
    key
}

fn pad(out: &mut dyn Write, written: u64) -> io::Result<()> {
    let over = (written % BLOCK as u64) as usize;
    match over {
        0 => Ok(()),
        over => out.write_all(&[0; BLOCK][over..]),
    }
}

/// The records of one pax header.
#[derive(Default)]
struct Records {
    records: Vec<u8>,
    binary: bool,
}

impl Records {
    /// A path, which pax takes for UTF-8 unless it is told otherwise.
    fn text(&mut self, key: &str, value: &[u8]) {
        self.binary |= std::str::from_utf8(value).is_err();
        self.add(key.as_bytes(), value);
    }

    /// `length key=value\n`, where the length counts itself.
    fn add(&mut self, key: &[u8], value: &[u8]) {
        self.records.extend(record(key, value));
    }

    fn finish(self) -> Vec<u8> {
        match self.binary {
            true => [record(b"hdrcharset", b"BINARY"), self.records].concat(),
            false => self.records,
        }
    }
}

fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        assert_eq!(record(b"path", b"a"), b"9 path=a\n");
        assert_eq!(record(b"path", b""), b"8 path=\n");
        // One digit more makes it one longer.
        assert_eq!(record(b"k", &[b'x'; 93]).len(), 99);
        assert_eq!(record(b"k", &[b'x'; 94]).len(), 101);
        for length in 0..2000 {
            let record = record(b"key", &vec![b'x'; length]);
            let text = String::from_utf8(record.clone()).unwrap();
            assert_eq!(text.split(' ').next().unwrap(), record.len().to_string());
        }
    }

    #[test]
    fn times_before_1970_have_their_fraction_counted_from_zero() {
        assert_eq!(time((1, 5)), "1.000000005");
        assert_eq!(time((-1, 500_000_000)), "-0.500000000");
        assert_eq!(time((-2, 0)), "-2.000000000");
        assert_eq!(time((i64::MIN, 1)), "-9223372036854775807.999999999");
    }

    #[test]
    fn numbers_beyond_octal_are_written_in_base_256_and_as_a_record() {
        let mut field = [0; 8];
        number(&mut field, 0o7_777_777);
        assert_eq!(&field, b"7777777\0");
        number(&mut field, 0o10_000_000);
        assert_eq!(field, [0x80, 0, 0, 0, 0, 0x20, 0, 0]);
        let mut size = [0; 12];
        number(&mut size, 9 << 30);
        assert_eq!(size, [0x80, 0, 0, 0, 0, 0, 0, 2, 0x40, 0, 0, 0]);

        let meta = Meta {
            uid: 3_000_000,
            gid: u32::MAX,
            mtime: (0, 0),
            ..Meta::default()
        };
        let kind = Kind {
            size: 9 << 30,
            ..Kind::plain(b'0')
        };
        let mut out = Vec::new();
        header(&mut out, b"./big", &meta, kind).unwrap();
        assert_eq!(out.len(), 3 * BLOCK);
        let records = "19 size=9663676416\n15 uid=3000000\n18 gid=4294967295\n";
        assert_eq!(&out[BLOCK..BLOCK + records.len()], records.as_bytes());
    }
}
