//! The crash kit: what is left of a store whose process, disk or file system failed at any step of its work.
//!
//! A process of its own lives a whole [`life`] of a store, is struck at a step that the test names, and what it leaves
//! is looked at by a checker that uses none of the store's code.

mod child;
mod life;
mod listed;

use super::full_disk::{disk_of, noise};
use crate::store::disk::Step;
use child::{Ended, Work, detours, live};
