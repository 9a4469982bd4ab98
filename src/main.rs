//! The command line, nothing else.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use larder::api::{parse_duration, parse_size};
use larder::cli::StoreArgs;
use larder::source::SourceRoot;
use larder::telemetry::{Health, LogFormat, init_logs};
use larder::{agent, controller, layer, store, telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// How long the work may take to end after SIGTERM: it notes what it has done, which a slow disk can hold up. The
/// kubelet kills after 30 seconds (`terminationGracePeriodSeconds`).
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Keeps file trees on Kubernetes nodes.
#[derive(Parser)]
#[command(name = "larder", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the controller: one per cluster; further replicas wait for their turn.
    Controller(ControllerArgs),
    /// Run the agent of this node, as root.
    Agent(AgentArgs),
    /// Print the CustomResourceDefinitions as YAML.
    Crds {
        /// Write one file per kind into this folder instead.
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
    },
    /// Work with a store: put, build, list, compare, export, collect. Needs no cluster.
    Store(StoreArgs),
}

#[derive(Args)]
struct Common {
    /// Namespace that larder runs in: of its Leases.
    #[arg(long, env = "POD_NAMESPACE", default_value = "larder-system")]
    namespace: String,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// How log lines are written.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Args)]
struct ControllerArgs {
    #[command(flatten)]
    common: Common,
    /// Name of this replica in the leader's Lease. Absent: made from the host's name.
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    /// How long an object must be found missing before it counts as deleted.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    deletion_grace: Duration,
}

#[derive(Args)]
struct AgentArgs {
    #[command(flatten)]
    common: Common,
    /// Name of this node.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// The store's folder.
    #[arg(long, default_value = "/var/lib/larder")]
    root: PathBuf,
    /// Folder whose folder NAMESPACE/ holds the sources of that namespace. It may not lie in the store.
    #[arg(long, default_value = "/var/lib/larder-import")]
    import_dir: PathBuf,
    /// A further folder of sources, for the named namespaces: PATH=NAMESPACE[,NAMESPACE...]. Can be given several times.
    #[arg(long = "source-root", value_name = "PATH=NAMESPACES")]
    source_roots: Vec<SourceRoot>,
    /// Limit of layers that declare none, such as 10Gi; "none" for no limit.
    #[arg(long, default_value = "10Gi", value_parser = limit)]
    default_layer_size: Limit,
    /// Let setuid files and file capabilities work in layers. Any user who can reach a layer can then use them.
    #[arg(long)]
    allow_suid: bool,
    /// How layers come by their trees: descriptors, paths (both from an image), or copy. Absent: the first that the
    /// kernel can.
    #[arg(long, value_name = "ROAD")]
    layer_road: Option<layer::Road>,
    /// Space that builds leave free on the store's disk.
    #[arg(long, default_value = "1Gi", value_parser = parse_size)]
    reserved_free: u64,
    /// How long a layer on the disk may be without an object before it is released.
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    orphan_grace: Duration,
    /// Most files that retention removes in a second, so that the node does not feel it. Absent: as many as the disk can.
    #[arg(long, value_name = "N")]
    max_removals_per_second: Option<NonZeroU64>,
}

#[derive(Clone, Copy)]
struct Limit(Option<u64>);

fn limit(text: &str) -> Result<Limit, larder::api::InvalidSize> {
    if text == "none" {
        Ok(Limit(None))
    } else {
        parse_size(text).map(|size| Limit(Some(size)))
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Controller(args) => run_controller(args),
        Command::Agent(args) => run_agent(args),
        Command::Crds { output } => crds(output.as_deref()),
        Command::Store(args) => return ExitCode::from(larder::cli::run(args, Cli::command())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("larder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_controller(args: ControllerArgs) -> anyhow::Result<()> {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let options = controller::Options {
        namespace: args.common.namespace.clone(),
        identity: args
            .identity
            .unwrap_or_else(|| format!("{}-{}", host(), std::process::id())),
        deletion_grace: args.deletion_grace,
    };
    serve(args.common, async move |client, health, stop| {
        Ok(controller::run(client, options, health, stop).await?)
    })
}

fn run_agent(args: AgentArgs) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("the agent mounts file systems and keeps files of every owner: run it as root");
    }
    let options = agent::Options {
        node: args.node_name,
        namespace: args.common.namespace.clone(),
        root: args.root,
        import_dir: args.import_dir,
        source_roots: args.source_roots,
        store: store::Options {
            reserved_free: args.reserved_free,
        },
        layers: layer::Options {
            default_size: args.default_layer_size.0,
            allow_suid: args.allow_suid,
            road: args.layer_road,
        },
        orphan_grace: args.orphan_grace,
        removal_rate: args.max_removals_per_second,
    };
    serve(args.common, async move |client, health, stop| {
        Ok(agent::run(client, options, health, stop).await?)
    })
}

/// Runs the work beside the health server until SIGTERM or SIGINT.
fn serve<F>(common: Common, work: F) -> anyhow::Result<()>
where
    F: AsyncFnOnce(kube::Client, Health, watch::Receiver<bool>) -> anyhow::Result<()>,
{
    init_logs(common.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        let client = kube::Client::try_default()
            .await
            .context("cannot find the API server")?;
        let health = Health::new();
        let (stopper, stop) = watch::channel(false);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let health_server = telemetry::serve(common.listen, health.clone(), stop.clone());
        let mut work = std::pin::pin!(work(client, health, stop));
        tokio::select! {
            result = &mut work => return result,
            result = health_server => result.with_context(|| format!("cannot serve on {}", common.listen))?,
            _ = terminate.recv() => info!("SIGTERM: ending"),
            _ = interrupt.recv() => info!("SIGINT: ending"),
        }
        stopper.send_replace(true);
        match tokio::time::timeout(STOP_TIMEOUT, work).await {
            Ok(result) => result,
            Err(_) => {
                warn!("the work did not end in time; leaving it to the next start");
                Ok(())
            }
        }
    });
    // Blocking work that is under way is finished or cleaned by the next start, as after a kill.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
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
