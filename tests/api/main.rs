//! Tests on a real API server.

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod agent;
mod deploy;
mod flow;
mod harness;
mod retention;
mod rules;
mod units;
