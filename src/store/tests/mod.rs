//! Tests of the store as a whole. Those of one part alone sit with it.

mod bounded;
mod builds;
mod collecting;
mod crash;
mod exporting;
pub mod full_disk;
mod limits;
mod meanwhile;
mod orders;
mod processes;
mod refs;
mod simulation;
mod single;
mod stress;
