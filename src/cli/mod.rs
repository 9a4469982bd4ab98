//! `larder store …`: the store for an admin, with or without an agent, and with no cluster at all (docs/cli.md).
//!
//! What this module promises:
//! - a reading command takes no lock and changes nothing, so it works beside an agent ([`Reader`]);
//! - a writing command has the store for itself, or is run by the agent that has it, with that one's leases and
//!   collections (`site.rs`, `control/`): never two processes at once;
//! - an error says what to do next, and the exit code what kind of error it is (`exit.rs`).
//!
//! One file per family of commands, thin over `store`, `layer` and `source`: a command reads its arguments and writes a
//! table or JSON. To add one: its arguments and their `run` in a file here, a variant in `Read` or `Write`.

mod blobs;
mod build;
mod collect;
pub mod control;
mod diff;
mod dump;
mod exit;
mod export;
mod figures;
mod interrupt;
mod io;
mod layers;
mod links;
mod list;
mod policy;
mod put;
mod resolve;
mod runs;
mod show;
mod site;
mod stats;
mod table;
mod tar;
mod text;
mod tree_json;
mod trees;
mod verify;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

pub use exit::Exit;
use exit::Failure;
use io::Io;
use site::Site;
pub use trees::{DEFAULT_NAMESPACE, OWNER};

use crate::store::Reader;

/// The arguments of `larder store`.
#[derive(Args)]
pub struct StoreArgs {
    /// The store's folder.
    #[arg(
        long,
        env = "LARDER_STORE",
        default_value = "/var/lib/larder",
        value_name = "DIR",
        global = true
    )]
    store: PathBuf,
    /// What is written to stdout.
    #[arg(
        short,
        long,
        value_enum,
        default_value = "text",
        value_name = "FORMAT",
        global = true
    )]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// What a command writes to stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Tables and lines for people.
    Text,
    /// One JSON document, as docs/cli.md says.
    Json,
}

#[derive(Subcommand)]
enum Command {
    Init(site::Init),
    #[command(flatten)]
    Read(Read),
    #[command(flatten)]
    Write(Write),
    /// Print the completions of `larder` for a shell.
    Completions {
        shell: clap_complete::Shell,
    },
}

/// The commands that only read.
#[derive(Subcommand)]
enum Read {
    Get(blobs::Get),
    Path(blobs::PathOf),
    Exists(blobs::Exists),
    Ls(list::Ls),
    Show(show::Show),
    Resolve(resolve::Resolve),
    Diff(diff::Diff),
    Export(export::Export),
    Stats(stats::Stats),
    Dedup(figures::DedupArgs),
    Analytics(figures::AnalyticsArgs),
    Layers(layers::ListLayers),
    Runs(runs::Runs),
}

/// The commands that change the store: run under its lock, here or by the agent that has it.
#[derive(Debug, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Write {
    Put(put::Put),
    Rm(blobs::Rm),
    Build(build::BuildTree),
    Forget(trees::Forget),
    Gc(collect::Gc),
    Plan(collect::Plan),
    Verify(verify::Verify),
    Mount(layers::Mount),
    Umount(layers::Umount),
    Snapshot(layers::Snapshot),
}

impl Read {
    fn run(self, store: &Reader, io: &mut Io) -> Result<Exit, Failure> {
        match self {
            Read::Get(args) => args.run(store, io),
            Read::Path(args) => args.run(store, io),
            Read::Exists(args) => args.run(store, io),
            Read::Ls(args) => args.run(store, io),
            Read::Show(args) => args.run(store, io),
            Read::Resolve(args) => args.run(store, io),
            Read::Diff(args) => args.run(store, io),
            Read::Export(args) => args.run(store, io),
            Read::Stats(args) => args.run(store, io),
            Read::Dedup(args) => args.run(store, io),
            Read::Analytics(args) => args.run(store, io),
            Read::Layers(args) => args.run(store, io),
            Read::Runs(args) => args.run(store, io),
        }
    }

    /// Does an interruption have something to clean up? Else it just ends the process.
    fn is_cancellable(&self) -> bool {
        match self {
            Read::Export(_) => true,
            Read::Get(args) => args.writes_a_file(),
            _ => false,
        }
    }
}

impl Write {
    /// Opens what the command reads, as the user who called sees it: who runs it may see other mounts.
    fn open(&mut self) -> Result<Vec<OwnedFd>, Failure> {
        match self {
            Write::Put(args) => args.open(),
            Write::Build(args) => args.open(),
            Write::Verify(args) => args.open(),
            Write::Gc(args) => args.open().map(|()| Vec::new()),
            Write::Plan(args) => args.open().map(|()| Vec::new()),
            Write::Rm(_) | Write::Forget(_) | Write::Mount(_) | Write::Umount(_) | Write::Snapshot(_) => Ok(Vec::new()),
        }
    }

    /// Runs it; `files` are what [`Write::open`] gave.
    fn run(self, site: &Site, files: Vec<OwnedFd>, io: &mut Io) -> Result<Exit, Failure> {
        match self {
            Write::Put(args) => args.run(site, files, io),
            Write::Rm(args) => args.run(site, io),
            Write::Build(args) => args.run(site, files, io),
            Write::Forget(args) => args.run(site, io),
            Write::Gc(args) => args.run(site, io),
            Write::Plan(args) => args.run(site, io),
            Write::Verify(args) => args.run(site, files, io),
            Write::Mount(args) => args.run(site, io),
            Write::Umount(args) => args.run(site, io),
            Write::Snapshot(args) => args.run(site, io),
        }
    }
}

/// Runs a command of `larder store` and returns the process's exit code. `program` is the whole command line, for its
/// completions.
pub fn run(args: StoreArgs, program: clap::Command) -> u8 {
    let mut io = match Io::of_this_process(args.output) {
        Ok(io) => io,
        Err(error) => {
            eprintln!("larder: cannot open stdin, stdout and stderr: {error}");
            return Exit::Failed as u8;
        }
    };
    let result = match args.command {
        Command::Init(init) => init.run(&args.store, &mut io),
        Command::Completions { shell } => completions(shell, program, &mut io),
        Command::Read(read) => Reader::open(&args.store).map_err(Failure::from).and_then(|store| {
            if read.is_cancellable() {
                interrupt::watch(io.cancel())?;
            }
            read.run(&store, &mut io)
        }),
        Command::Write(write) => site::write(&args.store, write, &mut io),
    };
    io.finish(result) as u8
}

fn completions(shell: clap_complete::Shell, mut program: clap::Command, io: &mut Io) -> Result<Exit, Failure> {
    let name = program.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut text);
    io.bytes(&text)?;
    Ok(Exit::Done)
}
