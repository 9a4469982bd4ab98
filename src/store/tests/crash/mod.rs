//! The crash kit: what is left of a store whose process, disk or file system failed at any step of its work.
//!
//! A process of its own lives a whole [`life`] of a store, is struck at a step that the test names, and what it leaves
//! is looked at by a checker that uses none of the store's code.

mod check;
mod child;
mod disks;
mod full;
mod kills;
mod life;
mod listed;
mod power;
mod rounds;
mod unreadable;

use super::full_disk::{Unmount, noise};
use crate::store::disk::Step;
use crate::store::disk::hook::Fault;
use check::{Promise, State, look, staged};
use child::{Ended, Life, Work, detours, live};
use disks::Disk;
pub(super) use disks::Ram;
use rounds::Rounds;
