//! One per node: `NodeStore.spec` → source, layer and store → `NodeStore.status`, and the node's layers.
//!
//! The agent works on from the last spec that it saw while the API server is away. It can be killed at any moment: what
//! it does is in the store and the layers, and each of these finishes or cleans at the next start what was begun.

mod analysis;
mod builds;
mod collecting;
mod layer_entry;
mod layer_outcome;
mod layer_plan;
mod layers;
mod node;
mod plan;
mod retention;
mod saved;
mod throttle;
mod work;

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{Either, select};
use kube::Client;
use kube::runtime::watcher;
use tokio::sync::{Notify, mpsc, watch};
use tracing::{error, info, warn};

use crate::api::{NodeStore, WritableLayer};
use crate::cli::control::Control;
use crate::cluster::{Followed, ObjectKey, follow, heartbeat};
use crate::layer::{self, Found, LayerRecord, Layers};
use crate::source::{self, Roots, SourceRoot};
use crate::store::{self, Damage, Ref, Store};
use crate::telemetry::Health;
use builds::Builder;
#[cfg(any(test, fuzzing))]
pub(crate) use retention::{Memory, Room, adopt, next};
#[cfg(any(test, fuzzing))]
pub(crate) use saved::{SavedSpec, parse as parse_saved};

/// Settings of the agent.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the node.
    pub node: String,
    /// Namespace of the agents' Leases.
    pub namespace: String,
    /// The store's folder.
    pub root: PathBuf,
    /// Folder whose folders named like a namespace are that namespace's sources.
    pub import_dir: PathBuf,
    /// Further roots of sources.
    pub source_roots: Vec<SourceRoot>,
    pub store: store::Options,
    pub layers: layer::Options,
    /// How long a layer on the disk may be without an object before it is released.
    pub orphan_grace: Duration,
    /// Most files that retention removes in a second; `None`: as many as the disk can.
    pub removal_rate: Option<NonZeroU64>,
}

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Layer(#[from] layer::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error("cannot make {}: {source}", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("a task of the agent broke off")]
    Broken,
}

/// What was found on the disk.
struct Disk {
    builder: Builder,
    spec: Option<saved::SavedSpec>,
    memory: retention::Memory,
    refs: BTreeMap<ObjectKey, Ref>,
    trouble: Option<analysis::Trouble>,
    records: Vec<LayerRecord>,
    /// Runs the writing commands of `larder store` until it is dropped.
    control: Option<Control>,
    /// Told after each of them.
    commands: Arc<Notify>,
}

/// Keeps the node's store and layers as the API server says, until `stop` is true. Mounts stay when it ends.
///
/// # Errors
/// When the store cannot be opened (another process has it, its disk is broken), or a task broke off: the process is
/// to end and start anew.
pub async fn run(client: Client, options: Options, health: Health, stop: watch::Receiver<bool>) -> Result<(), Error> {
    let at_start = options.clone();
    let disk = tokio::task::spawn_blocking(move || open(&at_start))
        .await
        .map_err(|_| Error::Broken)??;
    info!(
        node = options.node,
        store = disk.builder.store.id(),
        refs = disk.refs.len(),
        layers = disk.records.len(),
        "the store is open"
    );

    let (mounted_sender, mounted) = watch::channel(HashMap::new());
    let (placed_sender, placed) = watch::channel(HashMap::new());
    let (owner_sender, owner) = watch::channel(None);
    let (stores_sender, stores) = mpsc::channel::<Followed<NodeStore>>(64);
    let (layers_sender, layers) = mpsc::channel::<Followed<WritableLayer>>(256);

    let keeper = layers::Keeper::new(layers::Start {
        client: client.clone(),
        health: health.clone(),
        node: options.node.clone(),
        layers: disk.builder.layers.clone(),
        records: disk.records,
        placed,
        mounted: mounted_sender,
        orphan_grace: options.orphan_grace,
    });
    let _control = disk.control;
    let node = node::Node::new(node::Start {
        client: client.clone(),
        health: health.clone(),
        node: options.node.clone(),
        builder: disk.builder,
        spec: disk.spec,
        refs: disk.refs,
        trouble: disk.trouble,
        memory: disk.memory,
        removal_rate: options.removal_rate,
        commands: disk.commands,
        mounted,
        placed: placed_sender,
        owner: owner_sender,
    });

    let own_store = watcher::Config::default().fields(&format!("metadata.name={}", options.node));
    let own_layers = watcher::Config::default().fields(&format!("spec.nodeName={}", options.node));
    health.set_ready(true);
    let node = pin!(node.run(stores, stop.clone()));
    let others = pin!(async {
        tokio::select! {
            () = keeper.run(layers, stop.clone()) => {}
            () = heartbeat(client.clone(), options.namespace, options.node.clone(), owner) => {}
            () = follow::<NodeStore, _>(client.clone(), own_store, Duration::ZERO, stores_sender) => {}
            () = follow::<WritableLayer, _>(client.clone(), own_layers, Duration::ZERO, layers_sender) => {}
        }
    });
    // What ends without `stop` takes the rest with it: the process is to start anew. At `stop` the node's loop has
    // something to note.
    if let Either::Right(((), node)) = select(node, others).await
        && *stop.borrow()
    {
        node.await;
    }
    if *stop.borrow() { Ok(()) } else { Err(Error::Broken) }
}

fn open(options: &Options) -> Result<Disk, Error> {
    let store = Store::open(&options.root, options.store.clone())?;
    let layers = Layers::open(store.clone(), options.layers.clone())?;
    let roots = Roots::new(&store, options.import_dir.clone(), options.source_roots.clone())?;
    let runs = options.root.join("runs");
    std::fs::create_dir_all(&runs).map_err(|source| Error::Folder {
        path: runs.clone(),
        source,
    })?;
    let builder = Builder {
        store,
        layers,
        roots: Arc::new(roots),
    };
    find_road(&builder.layers);
    let (refs, unreadable) = work::read_refs(&builder)?;
    let (records, layer_problems) = builder.layers.list()?;
    for problem in &layer_problems {
        warn!(
            path = problem.path,
            message = problem.message,
            "a layer on the disk cannot be read; retention deletes nothing until it can"
        );
    }
    for problem in &unreadable {
        warn!(
            path = problem.path,
            message = problem.message,
            "a ref cannot be read; retention deletes nothing until its owner is rebuilt or it is forgotten"
        );
    }
    let trouble = analysis::Trouble::of(Ok(&Damage {
        problems: unreadable.into_iter().chain(layer_problems).collect(),
        ..Damage::default()
    }));
    // Last, when nothing can fail any more: from here on others have the agent work.
    let commands = Arc::new(Notify::new());
    let told = commands.clone();
    let control = Control::open(builder.layers.clone(), move || told.notify_one());
    Ok(Disk {
        // Either file only saves work: without it the API server is asked, and retention waits for its next time.
        spec: or_none(saved::load(&options.root.join(saved::SPEC))),
        memory: or_none(saved::load(&options.root.join(saved::MEMORY))).unwrap_or_default(),
        builder,
        refs,
        trouble,
        records,
        // The node's work does not need it.
        control: control
            .inspect_err(|error| warn!(%error, "no commands of larder store are taken"))
            .ok(),
        commands,
    })
}

/// Trees are built also where no layer can be made. It is tried again with the next layer.
fn find_road(layers: &Layers) {
    match layers.road() {
        Ok(Found { road, closed }) => {
            for (better, error) in closed {
                info!(road = %better, %error, "layers cannot be made in this way here");
            }
            info!(%road, "layers are made");
        }
        Err(error) => error!(%error, "layers cannot be made on this node"),
    }
}

fn or_none<T>(loaded: Result<Option<T>, saved::FileError>) -> Option<T> {
    loaded.unwrap_or_else(|error| {
        warn!(%error, "a file of the agent cannot be read; going on without it");
        None
    })
}

/// How many there are besides what a message names; nothing if there are none.
fn others(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" (and {count} more)"),
    }
}

/// Sends a value to whoever watches it, if it is another one.
fn tell<T: PartialEq>(watchers: &watch::Sender<T>, value: T) {
    watchers.send_if_modified(|known| {
        let changed = *known != value;
        *known = value;
        changed
    });
}
