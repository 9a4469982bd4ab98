//! What is mounted where, as `/proc/<pid>/mountinfo` tells (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount: a line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: u32,
    pub parent: u32,
    /// Major and minor number of the superblock's device: equal for every mount of one file system.
    pub dev: (u32, u32),
    /// The folder of the file system that is mounted here.
    pub root: PathBuf,
    pub point: PathBuf,
    /// Per-mount options, as `rw,nosuid,nodev,relatime`.
    pub flags: String,
    /// The peer group that the mount is in.
    pub shared: Option<u32>,
    /// The peer group that the mount receives from.
    pub master: Option<u32>,
    pub fs_type: String,
    pub source: Vec<u8>,
    /// Options of the superblock.
    pub options: Vec<u8>,
}

impl Mount {
    /// Does it say that its file system, an ext4, has stopped taking writes for good? After an error that it cannot go on
    /// from it says `emergency_ro` since Linux 6.15, and `ro` on some before; `shutdown` when somebody asked for it, and on
    /// some kernels after an error, too.
    pub fn has_stopped(&self) -> bool {
        let mut options = self.options.split(|b| *b == b',');
        self.fs_type == "ext4" && options.any(|option| [&b"ro"[..], b"emergency_ro", b"shutdown"].contains(&option))
    }
}

/// The mounts of this process's own mount namespace, in the order in which the kernel lists them: of two mounts at
/// one point, the later one is on top.
pub fn of_self() -> io::Result<Vec<Mount>> {
    of_process(Path::new("/proc/self"))
}

/// The mounts that the process or thread with this `/proc` folder sees.
pub fn of_process(proc: &Path) -> io::Result<Vec<Mount>> {
    let path = proc.join("mountinfo");
    parse(&fs::read(&path)?).map_err(|line| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: line {line} is not in mountinfo's format", path.display()),
        )
    })
}

/// Reads mountinfo's text. The error is the number of the first line that is not in its format.
fn parse(text: &[u8]) -> Result<Vec<Mount>, usize> {
    text.split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .enumerate()
        .map(|(at, line)| parse_line(line).ok_or(at + 1))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = text(fields.next()?)?.split_once(':')?;
    let dev = (major.parse().ok()?, minor.parse().ok()?);
    let root = path(fields.next()?);
    let point = path(fields.next()?);
    let flags = text(fields.next()?)?.to_owned();
    let (mut shared, mut master) = (None, None);
    loop {
        let field = fields.next()?;
        if field == b"-" {
            break;
        } else if let Some(group) = field.strip_prefix(b"shared:") {
            shared = Some(number(group)?);
        } else if let Some(group) = field.strip_prefix(b"master:") {
            master = Some(number(group)?);
        }
    }
    // With a subtype, which whoever mounted a FUSE chose freely.
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let options = unescape(fields.next()?);
    Some(Mount {
        id,
        parent,
        dev,
        root,
        point,
        flags,
        shared,
        master,
        fs_type,
        source,
        options,
    })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

fn number(field: &[u8]) -> Option<u32> {
    text(field)?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

/// Undoes the kernel's octal escapes (`\040` for a space; also tab, newline, `\` and `#`).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail
            .get(..3)
            .filter(|d| first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match digits {
            Some(d) if d[0] <= b'3' => {
                out.push((d[0] - b'0') * 64 + (d[1] - b'0') * 8 + (d[2] - b'0'));
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_peer_groups_is_read() {
        let line = b"36 35 0:45 /a\\040b /mnt\\134x\\011y\\012z rw,nosuid,nodev shared:7 master:3 propagate_from:2 - overlay larder:sha256:ab\\043c rw,upperdir=/u\\054\n";
        let mounts = parse(line).unwrap();
        assert_eq!(
            mounts,
            [Mount {
                id: 36,
                parent: 35,
                dev: (0, 45),
                root: "/a b".into(),
                point: "/mnt\\x\ty\nz".into(),
                flags: "rw,nosuid,nodev".into(),
                shared: Some(7),
                master: Some(3),
                fs_type: "overlay".into(),
                source: b"larder:sha256:ab#c".to_vec(),
                options: b"rw,upperdir=/u,".to_vec(),
            }]
        );
    }

    #[test]
    fn a_type_that_is_no_text_spoils_no_other_line() {
        let mounts = parse(b"36 35 0:45 / /mnt rw - fuse.\xff\xfe source rw\n").unwrap();
        assert_eq!(
            (&*mounts[0].fs_type, &mounts[0].source[..]),
            ("fuse.\u{fffd}\u{fffd}", &b"source"[..])
        );
    }

    #[test]
    fn a_file_system_that_takes_no_writes_any_more_says_so() {
        for (options, stopped) in [
            ("ext4 /dev/loop0 rw,errors=remount-ro", false),
            ("ext4 /dev/loop0 ro,errors=remount-ro", true),
            ("ext4 /dev/loop0 rw,errors=remount-ro,emergency_ro", true),
            ("ext4 /dev/loop0 rw,shutdown", true),
            // Somebody's doing, and it would not come back.
            ("tmpfs larder-layer ro,size=8k", false),
        ] {
            let line = format!("1 0 7:0 / /mnt rw - {options}\n");
            assert_eq!(parse(line.as_bytes()).unwrap()[0].has_stopped(), stopped, "{options}");
        }
    }

    #[test]
    fn a_backslash_that_is_no_escape_stays() {
        assert_eq!(unescape(b"a\\9\\77"), b"a\\9\\77");
        assert_eq!(unescape(b"\\"), b"\\");
        assert_eq!(unescape(b"\\777"), b"\\777");
        assert_eq!(unescape(b"\\134040"), b"\\040");
    }

    #[test]
    fn a_broken_line_is_named_by_its_number() {
        let good = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n";
        assert_eq!(parse(good.as_bytes()).map(|m| m.len()), Ok(1));
        for bad in [
            "",
            "1 0 8:1 / / rw",
            "x 0 8:1 / / rw - ext4 s o",
            "1 0 81 / / rw - ext4 s o",
            "1 0 8:1 / / rw - ext4 s",
        ] {
            let text = format!("{good}{bad}\nlast");
            let expected = 2;
            assert_eq!(parse(text.as_bytes()), Err(expected), "{bad:?}");
        }
    }

    #[test]
    fn the_root_is_among_the_mounts_of_this_process() {
        let mounts = of_self().unwrap();
        assert!(mounts.iter().any(|m| m.point == Path::new("/")));
    }
}
