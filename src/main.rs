//! The command line, nothing else.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand};

/// Keeps file trees on Kubernetes nodes.
#[derive(Parser)]
#[command(name = "larder", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the CustomResourceDefinitions as YAML.
    Crds {
        /// Write one file per kind into this folder instead.
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Crds { output } => crds(output.as_deref()),
    }
}

fn crds(output: Option<&Path>) -> anyhow::Result<()> {
    for (name, yaml) in larder::api::crd_files().context("cannot write the CRDs as YAML")? {
        match output {
            None => print!("---\n{yaml}"),
            Some(dir) => {
                let path = dir.join(name);
                std::fs::write(&path, yaml).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
    }
    Ok(())
}
