//! Who else uses a mounted file system: mounts in any mount namespace, and processes.
//!
//! What can be seen is what `/proc` shows: an agent in a container needs the host's process namespace (`hostPID`) to
//! see the pods'.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::mountinfo::{self, Mount};

/// At most this many users are named.
const SAMPLE: usize = 3;

/// Describes the mounts that show the file system `dev`, or are recognised by `same`, elsewhere than at `own` in this
/// namespace.
///
/// A mount that this namespace's own one was propagated to does not count: it goes when that one goes.
pub(super) fn mounts(dev: Option<(u32, u32)>, own: &Path, same: impl Fn(&Mount) -> bool) -> io::Result<Vec<String>> {
    let mine = mountinfo::of_self()?;
    let mut users: Vec<String> = mine
        .iter()
        .filter(|m| m.point != own && (Some(m.dev) == dev || same(m)))
        .map(|m| format!("a mount at {}", m.point.display()))
        .collect();
    let others = other_namespaces()?;
    let groups = receivers(&mine, own, &others);
    for (process, mounts) in &others {
        for mount in mounts.iter().filter(|m| Some(m.dev) == dev || same(m)) {
            let parent = mounts.iter().find(|m| m.id == mount.parent);
            let propagated = parent.is_some_and(|p| {
                [p.shared, p.master]
                    .into_iter()
                    .flatten()
                    .any(|group| groups.contains(&group))
            });
            if !propagated {
                users.push(format!(
                    "a mount at {} in the mount namespace of {process}",
                    mount.point.display()
                ));
            }
        }
    }
    users.truncate(SAMPLE);
    Ok(users)
}

/// The peer groups that receive mounts and unmounts made at `own`: the group of the mount that `own` lies on, and
/// those below it.
fn receivers(mine: &[Mount], own: &Path, others: &[(String, Vec<Mount>)]) -> HashSet<u32> {
    let parent = mine.iter().find(|m| m.point == own).map(|m| m.parent);
    let mut groups: HashSet<u32> = mine
        .iter()
        .filter(|m| Some(m.id) == parent)
        .filter_map(|m| m.shared)
        .collect();
    loop {
        let before = groups.len();
        for mount in mine.iter().chain(others.iter().flat_map(|(_, mounts)| mounts)) {
            if let (Some(master), Some(shared)) = (mount.master, mount.shared)
                && groups.contains(&master)
            {
                groups.insert(shared);
            }
        }
        if groups.len() == before {
            return groups;
        }
    }
}

/// The mounts of every mount namespace but this process's own, with the name of one process in it.
fn other_namespaces() -> io::Result<Vec<(String, Vec<Mount>)>> {
    let mut seen = HashSet::from([fs::read_link("/proc/self/ns/mnt")?]);
    let mut known: HashSet<_> = mountinfo::of_self()?.iter().map(|mount| mount.id).collect();
    let mut found = Vec::new();
    for process in processes()? {
        // A thread can have a mount namespace of its own.
        let Some(threads) = gone_is_none(fs::read_dir(process.join("task")))? else {
            continue;
        };
        for thread in threads {
            let Some(thread) = gone_is_none(thread)? else { continue };
            let thread = thread.path();
            match fs::read_link(thread.join("ns/mnt")) {
                Ok(namespace) if !seen.insert(namespace.clone()) => continue,
                // Without the right to trace a process its namespace has no name, but its mounts can still be read.
                Err(e) if gone(&e) => continue,
                _ => {}
            }
            let Some(mounts) = gone_is_none(mountinfo::of_process(&thread))? else {
                continue;
            };
            // Ids of mounts are unique among all namespaces, so a namespace without a name is known by them.
            if mounts.first().is_some_and(|mount| known.insert(mount.id)) {
                found.push((describe(&process), mounts));
            }
        }
    }
    Ok(found)
}

/// Names processes that have something of the file system `dev` open, mapped or running, or their root or working
/// folder there.
pub(super) fn openers(dev: (u32, u32)) -> io::Result<Vec<String>> {
    let mut users = Vec::new();
    for process in processes()? {
        // A file of an overlay may show the device number of the layer that it lies in; the mount through which it was
        // opened tells. A process that cannot be looked into is only missing from a message.
        let mounts: HashSet<u64> = mountinfo::of_process(&process)
            .unwrap_or_default()
            .iter()
            .filter(|mount| mount.dev == dev)
            .map(|mount| mount.id.into())
            .collect();
        if mounts.is_empty() {
            continue;
        }
        let on_it = |path: &Path| mount_of(path).is_some_and(|id| mounts.contains(&id));
        let holds = ["cwd", "root", "exe"].iter().any(|link| on_it(&process.join(link)))
            || ["fd", "map_files"].iter().any(|kind| {
                fs::read_dir(process.join(kind)).is_ok_and(|mut all| all.any(|e| e.is_ok_and(|e| on_it(&e.path()))))
            });
        if holds {
            users.push(describe(&process));
            if users.len() == SAMPLE {
                break;
            }
        }
    }
    Ok(users)
}

/// The id of the mount that a path leads to, without asking the file system there (it may hang).
fn mount_of(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID).ok()?;
    Some(stat.stx_mnt_id)
}

fn processes() -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn describe(process: &Path) -> String {
    let pid = process.file_name().unwrap_or_default().display();
    match fs::read_to_string(process.join("comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim_end()),
        Err(_) => format!("process {pid}"),
    }
}

fn gone(error: &io::Error) -> bool {
    // EINVAL: the mountinfo of a process that has just ended.
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL))
}

fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if gone(&e) => Ok(None),
        Err(e) => Err(e),
    }
}
