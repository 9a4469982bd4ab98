//! Tests on a real API server.

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod agent;
mod analytics;
mod damage;
mod deploy;
mod flow;
mod harness;
mod policies;
mod reboots;
mod retention;
mod rules;
mod schedule;
mod units;
