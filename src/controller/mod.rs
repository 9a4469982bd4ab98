//! One per cluster: custom resources → `NodeStore.spec`, and `NodeStore.status` → the resources' status.
//!
//! `index` holds what is known, the `plan_*` modules decide, and the shell writes only differences. Nothing is written
//! before everything has been listed once, so that a leader that does not know the cluster yet changes nothing.

mod index;
mod plan_layer;
mod plan_manifest;
mod plan_node;
mod plan_policy;
mod schema;
mod shell;
#[cfg(test)]
mod testing;

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::runtime::watcher;
use kube_lease_manager::LeaseManagerBuilder;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::api::{CasManifest, NodeStore, RetentionPolicy, WritableLayer};
use crate::cluster::{Followed, follow};
use crate::telemetry::Health;
use shell::{Change, Shell};

/// The field manager and the reporting controller of everything that the controller writes.
pub const MANAGER: &str = "larder-controller";

/// Settings of the controller.
#[derive(Debug, Clone)]
pub struct Options {
    /// Namespace of the Leases.
    pub namespace: String,
    /// Name of this replica in the leader's Lease.
    pub identity: String,
    /// How long an object must be found missing before it counts as deleted.
    pub deletion_grace: Duration,
}

/// Why the controller ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot take part in the leader election: {0}")]
    Election(#[from] kube_lease_manager::LeaseManagerError),
    #[error("lost the leader's Lease; another replica leads now")]
    LostLead,
}

/// Waits to be the leader, and then reconciles until `stop` is true. Releases the Lease at the end, so that the next
/// leader need not wait for it to run out.
///
/// # Errors
/// When the lead is lost: the process is to end and start anew, since another one leads.
pub async fn run(
    client: Client,
    options: Options,
    health: Health,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    let manager = LeaseManagerBuilder::new(client.clone(), "larder-controller")
        .with_namespace(&options.namespace)
        .with_identity(&options.identity)
        .with_duration(15)
        .with_grace(5)
        .build()
        .await?;
    let (mut leads, election) = manager.watch().await;
    // A replica that waits for its turn is as ready as it can be.
    health.set_ready(true);
    info!(identity = options.identity, "waiting to be the leader");
    let led = tokio::select! {
        led = leads.wait_for(|leads| *leads) => led.is_ok(),
        _ = stop.wait_for(|stop| *stop) => false,
    };
    let mut result = Ok(());
    if led {
        info!(identity = options.identity, "leading");
        health.metrics().leader.set(1);
        schema::warn_of_old_crds(&client).await;
        let lost = async {
            let _ = leads.wait_for(|leads| !*leads).await;
        };
        tokio::select! {
            () = reconcile(client, options, health.clone()) => {}
            () = lost => result = Err(Error::LostLead),
            _ = stop.wait_for(|stop| *stop) => {}
        }
        health.metrics().leader.set(0);
    }
    // Closing the channel makes the election's task release the Lease.
    drop(leads);
    if tokio::time::timeout(Duration::from_secs(5), election).await.is_err() {
        warn!("could not release the leader's Lease in time; the next leader waits until it has run out");
    }
    result
}

/// Watches and writes, for ever.
async fn reconcile(client: Client, options: Options, health: Health) {
    let (sender, receiver) = mpsc::channel::<Change>(1024);
    let grace = options.deletion_grace;
    let everything = watcher::Config::default;
    let leases = leases(client.clone(), &options.namespace, sender.clone());
    let follows = async {
        tokio::join!(
            // A Node that is gone is needed at once: layers wait for it. The proof by name stays.
            follow::<Node, _>(client.clone(), everything(), Duration::ZERO, sender.clone()),
            follow::<CasManifest, _>(client.clone(), everything(), grace, sender.clone()),
            follow::<RetentionPolicy, _>(client.clone(), everything(), grace, sender.clone()),
            follow::<WritableLayer, _>(client.clone(), everything(), grace, sender.clone()),
            follow::<NodeStore, _>(client.clone(), everything(), Duration::ZERO, sender.clone()),
        )
    };
    tokio::select! {
        _ = follows => {}
        () = leases => {}
        () = Shell::new(client.clone(), health).run(receiver) => {}
    }
}

/// Leases live in one namespace, where the controller may read them; the other kinds are followed everywhere.
async fn leases(client: Client, namespace: &str, into: mpsc::Sender<Change>) {
    crate::cluster::follow_in::<Lease, Change>(client, namespace, watcher::Config::default(), into).await;
}

macro_rules! changes {
    ($($kind:ident),*) => {
        $(impl From<Followed<$kind>> for Change {
            fn from(followed: Followed<$kind>) -> Self {
                Change::$kind(followed)
            }
        })*
    };
}
changes!(Node, Lease, CasManifest, RetentionPolicy, WritableLayer, NodeStore);
