//! The controller in a world that fails: it runs in the test's own process, with a client that injects faults. Only one
//! controller may lead a cluster, so these tests take turns.

#[path = "../support/mod.rs"]
mod support;

mod absence;
mod nodes;
mod poison;
mod writes;

use std::time::Duration;

use http::Method;
use larder::controller;
use larder::telemetry::Health;
use support::{Cluster, Faults, SYSTEM_NAMESPACE, unique};
use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::task::JoinHandle;

static TURN: Mutex<()> = Mutex::const_new(());

/// A controller with faults; it is stopped by [`Controller::stop`] and at the end of the test's runtime.
struct Controller {
    faults: Faults,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<(), controller::Error>>,
    turn: MutexGuard<'static, ()>,
}

impl Controller {
    /// Starts when no other test's controller runs. Deleted objects count as gone after a second.
    async fn start(cluster: &Cluster) -> Controller {
        Self::start_with(cluster, Faults::new()).await
    }

    async fn start_with(cluster: &Cluster, faults: Faults) -> Controller {
        Self::start_in_turn(cluster, faults, TURN.lock().await).await
    }

    async fn start_in_turn(cluster: &Cluster, faults: Faults, turn: MutexGuard<'static, ()>) -> Controller {
        if std::env::var_os("LARDER_TEST_LOG").is_some() {
            larder::telemetry::init_logs(larder::telemetry::LogFormat::Text);
        }
        cluster.deploy().await;
        let (stop, stopped) = watch::channel(false);
        let options = controller::Options {
            namespace: SYSTEM_NAMESPACE.to_owned(),
            identity: unique("controller"),
            deletion_grace: Duration::from_secs(1),
        };
        let client = faults.client(cluster.config().await);
        let task = tokio::spawn(controller::run(client, options, Health::new(), stopped));
        Controller {
            faults,
            stop,
            task,
            turn,
        }
    }

    /// Ends it as SIGTERM does.
    async fn stop(self) {
        drop(self.end().await);
    }

    /// Likewise, and keeps the turn.
    async fn end(self) -> MutexGuard<'static, ()> {
        self.stop.send_replace(true);
        let ended = tokio::time::timeout(Duration::from_secs(10), self.task).await;
        ended
            .expect("it ends within ten seconds")
            .expect("it does not panic")
            .expect("it ends well");
        self.turn
    }
}

/// Whether a request lists or watches a kind.
fn reads(plural: &'static str) -> impl Fn(&Method, &str) -> bool + Send + Sync + Clone + 'static {
    move |method, path| {
        let path = path.split('?').next().unwrap_or_default();
        *method == Method::GET && path.ends_with(&format!("/{plural}"))
    }
}

/// Whether a request lists a kind, and is no watch.
fn lists(plural: &'static str) -> impl Fn(&Method, &str) -> bool + Send + Sync + Clone + 'static {
    let reads = reads(plural);
    move |method, path| reads(method, path) && !path.contains("watch=true")
}
