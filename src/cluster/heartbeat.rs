//! The agent's sign of life: a Lease named after its node, as kubelets have.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use kube::Client;
use kube::api::{Api, ObjectMeta, Patch, PatchParams};
use tokio::sync::watch;
use tracing::warn;

use super::{AGENT_MANAGER, Backoff, CALL_TIMEOUT};

/// How long an agent may be silent before it counts as unreachable.
pub const HEARTBEAT_DURATION: Duration = Duration::from_secs(40);

const PERIOD: Duration = Duration::from_secs(10);

/// Renews the Lease every 10 s, for ever. `owner` is the Node once it is known, so that the Lease goes with it.
pub async fn heartbeat(
    client: Client,
    namespace: String,
    node: String,
    owner: watch::Receiver<Option<OwnerReference>>,
) {
    let api: Api<Lease> = Api::namespaced(client, &namespace);
    let mut backoff = Backoff::default();
    loop {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(node.clone()),
                namespace: Some(namespace.clone()),
                owner_references: owner.borrow().clone().map(|owner| vec![owner]),
                ..Default::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(node.clone()),
                lease_duration_seconds: Some(HEARTBEAT_DURATION.as_secs() as i32),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..Default::default()
            }),
        };
        let params = PatchParams::apply(AGENT_MANAGER).force();
        let patch = Patch::Apply(&lease);
        let write = api.patch(&node, &params, &patch);
        let pause = match tokio::time::timeout(CALL_TIMEOUT, write).await {
            Ok(Ok(_)) => {
                backoff.succeeded();
                PERIOD
            }
            Ok(Err(error)) => {
                warn!(%error, %node, "cannot renew the agent's lease");
                let now = std::time::Instant::now();
                (backoff.failed(now) - now).min(PERIOD)
            }
            Err(_) => Duration::from_secs(1),
        };
        tokio::time::sleep(pause).await;
    }
}
