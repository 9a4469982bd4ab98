//! The shell round the plans: takes changes in, makes due plans, and writes what differs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference};
use kube::Client;
use kube::api::{Api, DeleteParams, Preconditions};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::index::{Index, Key};
use super::plan_layer::LayerPlan;
use super::plan_node::NodePlan;
use super::{MANAGER, plan_layer, plan_manifest, plan_node, plan_policy};
use crate::api::{CasManifest, NodeStore, Parsed, RetentionPolicy, WritableLayer};
use crate::cluster::{
    Announcer, Backoff, CALL_TIMEOUT, Followed, ObjectKey, Said, WriteError, apply_finalizers, apply_object,
    apply_status, is_news, uid_of,
};
use crate::telemetry::Health;

/// What one of the watches says.
pub enum Change {
    Node(Followed<Node>),
    Lease(Followed<Lease>),
    CasManifest(Followed<CasManifest>),
    RetentionPolicy(Followed<RetentionPolicy>),
    WritableLayer(Followed<WritableLayer>),
    NodeStore(Followed<NodeStore>),
}

/// Kinds that must have been listed before anything is written.
const KINDS: usize = 6;

/// Writes at once.
const MAX_IN_FLIGHT: usize = 16;

/// While many nodes answer, an object's counters are written at most once in this time; a change of Ready is written
/// at once.
const COALESCE: Duration = Duration::from_secs(1);

/// What became of a write: the object as the API server has it now.
enum Written {
    Manifest(Box<Parsed<CasManifest>>),
    Policy(Box<Parsed<RetentionPolicy>>),
    Layer(Box<Parsed<WritableLayer>>),
    Store(Box<Parsed<NodeStore>>),
    Nothing,
}

type Outcome = (Key, Result<Written, WriteError>);

#[derive(Default)]
struct Turn {
    in_flight: bool,
    due: bool,
    /// Something changed since the last plan.
    fresh: bool,
    backoff: Backoff,
    /// What the last event said.
    announced: Option<Said>,
    /// When an unimportant change may be written.
    quiet_until: Option<Instant>,
}

impl Turn {
    fn is_ready(&self, now: Instant) -> bool {
        let quiet = self.quiet_until.is_some_and(|at| at > now);
        self.due && !self.in_flight && self.backoff.due(now).is_none() && (self.fresh || !quiet)
    }

    fn waits_until(&self) -> Option<Instant> {
        let now = Instant::now();
        // What waits for room is woken by the end of a write, not by the clock.
        self.backoff.due(now).or(self.quiet_until.filter(|at| *at > now))
    }
}

pub struct Shell {
    client: Client,
    health: Health,
    announcer: Announcer,
    index: Index,
    synced: BTreeSet<&'static str>,
    turns: HashMap<Key, Turn>,
    writes: JoinSet<Outcome>,
    in_flight: usize,
}

impl Shell {
    pub fn new(client: Client, health: Health) -> Self {
        Self {
            announcer: Announcer::new(client.clone(), MANAGER, None),
            client,
            health,
            index: Index::default(),
            synced: BTreeSet::new(),
            turns: HashMap::new(),
            writes: JoinSet::new(),
            in_flight: 0,
        }
    }

    /// Runs until the watches end.
    pub async fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        let mut tick = tokio::time::interval(Index::TICK);
        let mut wake: Option<Instant> = None;
        loop {
            let sleep = wake.map(|at| tokio::time::sleep_until(at.into()));
            tokio::select! {
                change = changes.recv() => {
                    let Some(change) = change else { return };
                    self.take(change);
                    // Whatever else has come in is planned together.
                    while let Ok(change) = changes.try_recv() {
                        self.take(change);
                    }
                }
                Some(done) = self.writes.join_next() => match done {
                    Ok(outcome) => self.finished(outcome),
                    // A write that panicked is a fault of larder: better a restart than an object without a turn.
                    Err(error) => {
                        warn!(%error, "a write broke off");
                        return;
                    }
                },
                _ = tick.tick() => self.index.tick(Instant::now()),
                () = async { if let Some(sleep) = sleep { sleep.await } }, if wake.is_some() => {}
            }
            wake = self.work();
            self.health.beat();
        }
    }

    fn take(&mut self, change: Change) {
        let index = &mut self.index;
        let kind = match change {
            Change::Node(Followed::Present(node)) => return index.node(*node),
            Change::Node(Followed::Gone { key, uid }) => return index.node_gone(&key.name, &uid),
            Change::Lease(Followed::Present(lease)) => return index.lease(*lease, Instant::now()),
            Change::Lease(Followed::Gone { key, .. }) => return index.lease_gone(&key.name),
            Change::CasManifest(Followed::Present(manifest)) => return index.manifest(*manifest),
            Change::CasManifest(Followed::Gone { key, uid }) => {
                self.turns.remove(&Key::Manifest(key.clone()));
                return index.manifest_gone(&key, &uid);
            }
            Change::RetentionPolicy(Followed::Present(policy)) => return index.policy(*policy),
            Change::RetentionPolicy(Followed::Gone { key, uid }) => {
                self.turns.remove(&Key::Policy(key.name.clone()));
                return index.policy_gone(&key.name, &uid);
            }
            Change::WritableLayer(Followed::Present(layer)) => return index.layer(*layer),
            Change::WritableLayer(Followed::Gone { key, uid }) => {
                self.turns.remove(&Key::Layer(key.clone()));
                return index.layer_gone(&key, &uid);
            }
            Change::NodeStore(Followed::Present(store)) => return index.store(*store),
            Change::NodeStore(Followed::Gone { key, uid }) => return index.store_gone(&key.name, &uid),
            Change::Node(Followed::Synced) => "Node",
            Change::Lease(Followed::Synced) => "Lease",
            Change::CasManifest(Followed::Synced) => "CasManifest",
            Change::RetentionPolicy(Followed::Synced) => "RetentionPolicy",
            Change::WritableLayer(Followed::Synced) => "WritableLayer",
            Change::NodeStore(Followed::Synced) => "NodeStore",
        };
        if self.synced.insert(kind) && self.synced.len() == KINDS {
            info!(
                nodes = self.index.nodes.len(),
                manifests = self.index.manifests.len(),
                policies = self.index.policies.len(),
                layers = self.index.layers.len(),
                "everything is listed; reconciling"
            );
            self.index.touch_all();
        }
    }

    /// Makes the plans that are due, and gives the time at which the next one is.
    fn work(&mut self) -> Option<Instant> {
        if self.synced.len() < KINDS {
            return None;
        }
        // Plans may make further ones due.
        loop {
            for key in self.index.take_dirty() {
                let turn = self.turns.entry(key).or_default();
                (turn.due, turn.fresh) = (true, true);
            }
            let now = Instant::now();
            let mut ready: Vec<Key> = self
                .turns
                .iter()
                .filter(|(_, turn)| turn.is_ready(now))
                .map(|(key, _)| key.clone())
                .collect();
            // What found no room gets its turn when a write ends.
            ready.truncate(MAX_IN_FLIGHT.saturating_sub(self.in_flight));
            if ready.is_empty() {
                break;
            }
            for key in ready {
                self.plan(key, now);
            }
        }
        let waiting = self.turns.values().filter(|turn| turn.due && !turn.in_flight);
        waiting.filter_map(Turn::waits_until).min()
    }

    fn plan(&mut self, key: Key, now: Instant) {
        let time = Timestamp::now();
        if let Some(turn) = self.turns.get_mut(&key) {
            turn.fresh = false;
        }
        match &key {
            Key::Node(name) => {
                let (plan, refused) = plan_node::plan(&self.index, name);
                self.index.set_refused(name, refused);
                match plan {
                    NodePlan::Keep => self.settled(&key),
                    NodePlan::Replace { uid } => {
                        info!(node = name, "the node was made anew; replacing its NodeStore");
                        self.start(key.clone(), delete_store(self.client.clone(), name.clone(), uid));
                    }
                    NodePlan::Write { uid, node_uid, spec } => {
                        info!(node = name, manifests = spec.manifests.len(), "writing the node's spec");
                        let client = self.client.clone();
                        let store = ObjectKey::new("", name);
                        self.start(key.clone(), async move {
                            let owners = [node_owner(&store.name, node_uid)];
                            let uid = uid.as_deref();
                            let written =
                                apply_object::<NodeStore, _>(&client, &store, MANAGER, uid, &owners, &spec).await?;
                            Ok(Written::Store(Box::new(written)))
                        });
                    }
                }
            }
            Key::Manifest(object) => {
                let Some(facts) = self.index.manifests.get(object) else {
                    return self.forget(&key);
                };
                let Some(status) = plan_manifest::plan(&self.index, object, time) else {
                    return self.forget(&key);
                };
                let (meta, old) = (facts.meta.clone(), facts.status.clone());
                if status == old {
                    return self.settled(&key);
                }
                if !self.may_write(&key, differ(&old.conditions, &status.conditions), now) {
                    return;
                }
                self.announce::<CasManifest>(&key, object, &meta.uid, &old.conditions, &status.conditions);
                let (client, object) = (self.client.clone(), object.clone());
                self.start(key.clone(), async move {
                    let written =
                        apply_status::<CasManifest, _>(&client, &object, MANAGER, &meta.resource_version, &status);
                    Ok(Written::Manifest(Box::new(written.await?)))
                });
            }
            Key::Policy(name) => {
                let Some(facts) = self.index.policies.get(name) else {
                    return self.forget(&key);
                };
                let Some(status) = plan_policy::plan(&self.index, name, time) else {
                    return self.forget(&key);
                };
                let (meta, old) = (facts.meta.clone(), facts.status.clone());
                if status == old {
                    return self.settled(&key);
                }
                let important = differ(&old.conditions, &status.conditions)
                    || old.last_handled_reconcile_at != status.last_handled_reconcile_at;
                if !self.may_write(&key, important, now) {
                    return;
                }
                let object = ObjectKey::new("", name);
                self.announce::<RetentionPolicy>(&key, &object, &meta.uid, &old.conditions, &status.conditions);
                let client = self.client.clone();
                self.start(key.clone(), async move {
                    let written =
                        apply_status::<RetentionPolicy, _>(&client, &object, MANAGER, &meta.resource_version, &status);
                    Ok(Written::Policy(Box::new(written.await?)))
                });
            }
            Key::Layer(object) => {
                let Some(facts) = self.index.layers.get(object) else {
                    return self.forget(&key);
                };
                let meta = facts.meta.clone();
                let (client, layer) = (self.client.clone(), object.clone());
                match plan_layer::plan(&self.index, object, time) {
                    LayerPlan::Keep => self.settled(&key),
                    LayerPlan::Say(status) => {
                        self.announce::<WritableLayer>(
                            &key,
                            object,
                            &meta.uid,
                            &facts.status.conditions.clone(),
                            &status.conditions,
                        );
                        self.start(key.clone(), async move {
                            let written = apply_status::<WritableLayer, _>(
                                &client,
                                &layer,
                                MANAGER,
                                &meta.resource_version,
                                &status,
                            );
                            Ok(Written::Layer(Box::new(written.await?)))
                        });
                    }
                    LayerPlan::Drop { node } => {
                        self.start(key.clone(), drop_finalizer(client, layer, meta.uid, node));
                    }
                }
            }
        }
    }

    /// Whether a difference may be written now; an unimportant one waits until the last write is some time ago.
    fn may_write(&mut self, key: &Key, important: bool, now: Instant) -> bool {
        let turn = self.turns.entry(key.clone()).or_default();
        if !important && turn.quiet_until.is_some_and(|at| at > now) {
            return false;
        }
        turn.quiet_until = Some(now + COALESCE);
        true
    }

    fn settled(&mut self, key: &Key) {
        if let Some(turn) = self.turns.get_mut(key) {
            turn.due = false;
            if turn.quiet_until.is_none_or(|at| at <= Instant::now()) {
                self.turns.remove(key);
            }
        }
    }

    fn forget(&mut self, key: &Key) {
        self.turns.remove(key);
    }

    fn start(&mut self, key: Key, write: impl Future<Output = Result<Written, WriteError>> + Send + 'static) {
        let turn = self.turns.entry(key.clone()).or_default();
        (turn.in_flight, turn.due) = (true, false);
        self.in_flight += 1;
        self.writes.spawn(async move { (key, write.await) });
    }

    fn finished(&mut self, (key, result): Outcome) {
        self.in_flight -= 1;
        let now = Instant::now();
        let turn = self.turns.entry(key.clone()).or_default();
        turn.in_flight = false;
        match result {
            Ok(written) => {
                turn.backoff.succeeded();
                self.health.metrics().writes.inc();
                if matches!(written, Written::Nothing) {
                    turn.due = true;
                }
                self.answered(&key, written);
            }
            Err(WriteError::NotFound) => debug!(?key, "gone before it could be written"),
            Err(error) => {
                turn.due = true;
                self.health.metrics().write_errors.inc();
                let failures = turn.backoff.failures();
                turn.backoff.failed(now);
                if error.is_news(failures) {
                    warn!(?key, %error, failures = failures + 1, "cannot write; trying again");
                }
            }
        }
    }

    /// Takes the answer to a write in. Waiting for the watch would mean planning from the old state.
    fn answered(&mut self, key: &Key, written: Written) {
        let index = &mut self.index;
        let known = match key {
            Key::Node(name) => index.stores.get(name).map(|facts| &facts.meta),
            Key::Manifest(object) => index.manifests.get(object).map(|facts| &facts.meta),
            Key::Policy(name) => index.policies.get(name).map(|facts| &facts.meta),
            Key::Layer(object) => index.layers.get(object).map(|facts| &facts.meta),
        };
        let known = known.map(|meta| (meta.uid.as_str(), meta.resource_version.as_str()));
        match written {
            Written::Manifest(object) if is_news(known, &object.metadata) => index.manifest(*object),
            Written::Policy(object) if is_news(known, &object.metadata) => index.policy(*object),
            Written::Layer(object) if is_news(known, &object.metadata) => index.layer(*object),
            Written::Store(object) if is_news(known, &object.metadata) => index.store(*object),
            _ => {}
        }
    }

    fn announce<K: kube::Resource<DynamicType = ()>>(
        &mut self,
        turn: &Key,
        key: &ObjectKey,
        uid: &str,
        old: &[Condition],
        new: &[Condition],
    ) {
        let announced = &mut self.turns.entry(turn.clone()).or_default().announced;
        self.announcer.announce_ready::<K>(key, uid, old, new, announced);
    }
}

/// Whether conditions differ in more than their messages.
fn differ(old: &[Condition], new: &[Condition]) -> bool {
    let gist = |conditions: &[Condition]| -> BTreeMap<String, (String, String, Option<i64>)> {
        let gist = conditions.iter().map(|c| {
            (
                c.type_.clone(),
                (c.status.clone(), c.reason.clone(), c.observed_generation),
            )
        });
        gist.collect()
    };
    gist(old) != gist(new)
}

fn node_owner(name: &str, uid: String) -> OwnerReference {
    OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: name.to_owned(),
        uid,
        ..Default::default()
    }
}

async fn delete_store(client: Client, name: String, uid: String) -> Result<Written, WriteError> {
    let api: Api<NodeStore> = Api::all(client);
    let only_that = Preconditions {
        uid: Some(uid),
        resource_version: None,
    };
    let params = DeleteParams {
        preconditions: Some(only_that),
        ..Default::default()
    };
    match tokio::time::timeout(CALL_TIMEOUT, api.delete(&name, &params)).await {
        Ok(result) => result.map(|_| Written::Nothing).map_err(WriteError::from),
        Err(_) => Err(WriteError::Timeout),
    }
}

/// Drops the agent's finalizer from a layer, if the API server confirms that the node does not exist.
async fn drop_finalizer(client: Client, layer: ObjectKey, uid: String, node: String) -> Result<Written, WriteError> {
    if uid_of::<Node>(&client, &ObjectKey::new("", &node)).await?.is_some() {
        debug!(%node, "the node is there after all");
        return Ok(Written::Nothing);
    }
    info!(%layer, %node, "the layer's node is gone; dropping its finalizer");
    // The finalizer is the agent's: only in its name can it be given up.
    let written = apply_finalizers::<WritableLayer>(&client, &layer, crate::cluster::AGENT_MANAGER, &uid, &[]).await?;
    Ok(Written::Layer(Box::new(written)))
}
