//! The node's layers: `WritableLayer` → mounts on this node, and back into its status.
//!
//! Each layer has its own turn and its own back-off, so that one that hangs holds up no other. What is on the disk and
//! has no object any more is released after a grace period, once the API server has confirmed that the object is gone.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, error, info, warn};

use super::builds::MountedLayers;
use super::layer_entry::Entry;
use super::layer_outcome::{self, Outcome};
use super::layer_plan::{self, Observed, Recorded, Step};
use super::node::Placed;
use super::tell;
use crate::api::conditions::NEARLY_FULL;
use crate::api::{LAYER_FINALIZER, Parsed, WritableLayer, int64};
use crate::cluster::{
    AGENT_MANAGER, Announcer, Followed, ObjectKey, WriteError, apply_finalizers, apply_status, is_news, uid_of,
};
use crate::layer::{self, LayerId, LayerRecord, Layers, OwnerKind, Room};
use crate::telemetry::Health;

/// Layers prepared or released at once.
const MAX_AT_WORK: usize = 8;

/// How often the layers' use of space is looked at, and orphans are looked for.
const TICK: Duration = Duration::from_secs(30);

/// How long the mounts of a tree wait for its next layer.
const UNUSED: Duration = Duration::from_secs(600);

/// How long a deleted layer waits for processes that use it before it is detached from them.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the loop starts with.
pub struct Start {
    pub client: Client,
    pub health: Health,
    pub node: String,
    pub layers: Layers,
    pub records: Vec<LayerRecord>,
    pub placed: watch::Receiver<Placed>,
    pub mounted: watch::Sender<MountedLayers>,
    pub orphan_grace: Duration,
}

enum Done {
    Worked {
        key: ObjectKey,
        uid: String,
        outcome: Box<Outcome>,
        record: Result<Option<LayerRecord>, layer::Error>,
        /// If it was mounted and had not been before.
        mounted_in: Option<Duration>,
        /// Reasons of events, and what they say.
        news: Vec<(&'static str, String)>,
    },
    Finalizer {
        key: ObjectKey,
        result: Result<Box<Parsed<WritableLayer>>, WriteError>,
    },
    Written {
        key: ObjectKey,
        result: Result<Box<Parsed<WritableLayer>>, WriteError>,
    },
    Orphan {
        id: LayerId,
        released: bool,
    },
    Recalled {
        key: ObjectKey,
        uid: String,
        record: Result<Option<LayerRecord>, layer::Error>,
    },
    Used(Vec<(ObjectKey, Room)>),
}

pub struct Keeper {
    start: Start,
    announcer: Announcer,
    entries: BTreeMap<ObjectKey, Entry>,
    records: HashMap<LayerId, LayerRecord>,
    /// Layers on the disk without an object, and since when.
    orphans: HashMap<LayerId, (Instant, bool)>,
    synced: bool,
    measuring: bool,
    tasks: JoinSet<Done>,
}

impl Keeper {
    pub fn new(start: Start) -> Self {
        Self {
            announcer: Announcer::new(start.client.clone(), AGENT_MANAGER, Some(start.node.clone())),
            records: start
                .records
                .iter()
                .map(|record| (record.id.clone(), record.clone()))
                .collect(),
            start,
            entries: BTreeMap::new(),
            orphans: HashMap::new(),
            synced: false,
            measuring: false,
            tasks: JoinSet::new(),
        }
    }

    /// Runs until the watch ends or `stop` is true. Mounts stay.
    pub async fn run(mut self, mut changes: mpsc::Receiver<Followed<WritableLayer>>, mut stop: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(TICK);
        loop {
            let wake = self.work();
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change),
                    None => return,
                },
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.finished(done),
                    Err(error) => {
                        error!(%error, "a layer's task broke off; restarting");
                        return;
                    }
                },
                Ok(()) = self.start.placed.changed() => {
                    for entry in self.entries.values_mut().filter(|entry| entry.waits_for_tree()) {
                        entry.due = true;
                        entry.backoff.succeeded();
                    }
                }
                _ = tick.tick() => self.measure(),
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    fn take(&mut self, change: Followed<WritableLayer>) {
        match change {
            Followed::Present(object) => self.observe(*object),
            Followed::Gone { key, uid } => {
                if self.entries.get(&key).is_some_and(|entry| entry.observed.uid == uid) {
                    self.entries.remove(&key);
                }
            }
            Followed::Synced => {
                if !self.synced {
                    info!(
                        node = self.start.node,
                        layers = self.entries.len(),
                        "the node's layers are listed"
                    );
                }
                self.synced = true;
            }
        }
    }

    fn observe(&mut self, object: Parsed<WritableLayer>) {
        let key = ObjectKey::of(&object.metadata);
        let observed = match Observed::of(object) {
            Ok(observed) => observed,
            Err(invalid) => {
                // The controller says so in the object's status.
                warn!(layer = %key, %invalid, "the layer cannot be read; what is mounted stays");
                return;
            }
        };
        match self.entries.get_mut(&key) {
            Some(entry) if entry.observed.uid == observed.uid => {
                let changed = entry.observed.generation != observed.generation
                    || entry.observed.deleting != observed.deleting
                    || entry.observed.held != observed.held;
                entry.observed = observed;
                if changed {
                    entry.due = true;
                    entry.backoff.succeeded();
                }
            }
            _ => {
                self.entries.insert(key, Entry::new(observed));
            }
        }
    }

    /// Does what is due, and gives the time of the next look.
    fn work(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = now + TICK;
        let mut at_work = self.entries.values().filter(|entry| entry.at_work).count();
        let keys: Vec<ObjectKey> = self.entries.keys().cloned().collect();
        for key in keys {
            let Some(entry) = self.entries.get(&key) else { continue };
            if entry.due && !entry.at_work {
                match entry.backoff.due(now) {
                    Some(due) => wake = wake.min(due),
                    None if at_work < MAX_AT_WORK => {
                        at_work += 1;
                        self.step(&key, now);
                    }
                    None => {}
                }
            }
            wake = wake.min(self.write_status(&key, now));
        }
        self.publish_mounted();
        self.release_orphans(now);
        wake
    }

    fn step(&mut self, key: &ObjectKey, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let placed = self.start.placed.borrow().get(&entry.observed.manifest).copied();
        let patience_ended = entry
            .in_use_since
            .is_some_and(|since| now.duration_since(since) > PATIENCE);
        let recorded = match entry.observed.id().and_then(|id| self.records.get(&id)) {
            Some(record) => Recorded::As(record),
            None if entry.is_new => Recorded::No,
            None => Recorded::Unknown,
        };
        let step = layer_plan::step(
            key,
            &entry.observed,
            placed,
            recorded,
            self.start.layers.store().id(),
            patience_ended,
            entry.outcome == Some(Outcome::Released),
        );
        (entry.due, entry.at_work) = (false, true);
        let (client, uid, key) = (self.start.client.clone(), entry.observed.uid.clone(), key.clone());
        match step {
            Step::Nothing => entry.at_work = false,
            Step::Say(outcome) => {
                entry.at_work = false;
                entry.settle(outcome, now);
            }
            Step::Finalizers(finalizers) => {
                self.tasks.spawn(async move {
                    let result =
                        apply_finalizers::<WritableLayer>(&client, &key, AGENT_MANAGER, &uid, finalizers).await;
                    Done::Finalizer {
                        key,
                        result: result.map(Box::new),
                    }
                });
            }
            Step::Prepare { spec, grow } => {
                let layers = self.start.layers.clone();
                self.tasks.spawn_blocking(move || {
                    let started = Instant::now();
                    let ended = layer_plan::prepare(&layers, &spec, grow);
                    let record = layers.record(&spec.id);
                    Done::Worked {
                        key,
                        uid,
                        outcome: Box::new(ended.outcome),
                        record,
                        mounted_in: ended.anew.then(|| started.elapsed()),
                        news: ended.news,
                    }
                });
            }
            Step::Recall { id } => {
                let layers = self.start.layers.clone();
                self.tasks.spawn_blocking(move || {
                    let record = layers.record(&id);
                    Done::Recalled { key, uid, record }
                });
            }
            Step::Release { id, detach } => {
                let layers = self.start.layers.clone();
                self.tasks.spawn_blocking(move || {
                    let outcome = Box::new(layer_plan::release(&layers, &id, detach));
                    let record = layers.record(&id);
                    Done::Worked {
                        key,
                        uid,
                        outcome,
                        record,
                        mounted_in: None,
                        news: Vec::new(),
                    }
                });
            }
        }
    }

    fn finished(&mut self, done: Done) {
        let now = Instant::now();
        match done {
            Done::Worked {
                key,
                uid,
                outcome,
                record,
                mounted_in,
                news,
            } => {
                let metrics = self.start.health.metrics();
                if let Some(took) = mounted_in {
                    metrics.layer_mount_seconds.observe(took.as_secs_f64());
                }
                if outcome.is_failed_try() {
                    metrics.layer_mount_failures.inc();
                }
                if let Ok(id) = uid.parse::<LayerId>() {
                    match record {
                        Ok(Some(record)) => drop(self.records.insert(id, record)),
                        Ok(None) => drop(self.records.remove(&id)),
                        // What is known of it still holds.
                        Err(error) => warn!(layer = %key, %error, "the layer's record cannot be read"),
                    }
                }
                for (reason, note) in news {
                    warn!(layer = %key, node = self.start.node, "{note}");
                    self.announcer
                        .announce::<WritableLayer>(&key, &uid, true, reason, &note);
                }
                let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.observed.uid == uid) else {
                    return;
                };
                entry.at_work = false;
                let verdict = outcome.verdict();
                // A layer that waits for its user is looked at often, and is news once.
                if entry.outcome.as_ref().is_none_or(|before| before.verdict() != verdict) {
                    info!(layer = %key, node = self.start.node, reason = verdict.reason(), message = verdict.message(), "layer");
                }
                entry.settle(*outcome, now);
            }
            Done::Recalled { key, uid, record } => {
                let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.observed.uid == uid) else {
                    return;
                };
                entry.at_work = false;
                match record {
                    Ok(found) => {
                        entry.is_new = found.is_none();
                        entry.due = true;
                        if let Some((id, record)) = entry.observed.id().zip(found) {
                            self.records.insert(id, record);
                        }
                    }
                    Err(error) => {
                        warn!(layer = %key, node = self.start.node, %error, "the layer's record cannot be read; trying again");
                        entry.settle(layer_outcome::outcome(error), now);
                    }
                }
            }
            Done::Finalizer { key, result } => {
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.at_work = false;
                    match &result {
                        Ok(_) => {
                            entry.backoff.succeeded();
                            entry.due = true;
                        }
                        Err(WriteError::NotFound) => {}
                        Err(error) => {
                            entry.due = true;
                            entry.backoff.failed(now);
                            warn!(layer = %key, %error, "cannot write the layer's finalizer; trying again");
                        }
                    }
                }
                if let Ok(object) = result {
                    self.answered(*object);
                }
            }
            Done::Written { key, result } => {
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.writing = false;
                    match &result {
                        Ok(_) => entry.write_backoff.succeeded(),
                        Err(WriteError::NotFound) => {}
                        Err(error) => {
                            entry.write_backoff.failed(now);
                            if error.is_news(entry.write_backoff.failures()) {
                                warn!(layer = %key, %error, "cannot write the layer's status; trying again");
                            }
                        }
                    }
                }
                if let Ok(object) = result {
                    self.answered(*object);
                }
            }
            Done::Orphan { id, released } => {
                if released {
                    self.orphans.remove(&id);
                    self.records.remove(&id);
                } else if let Some((since, at_work)) = self.orphans.get_mut(&id) {
                    (*since, *at_work) = (now, false);
                }
            }
            Done::Used(used) => {
                self.measuring = false;
                for (key, room) in used {
                    if let Some(entry) = self.entries.get_mut(&key) {
                        entry.note_use(&room, now);
                    }
                }
            }
        }
    }

    /// The answer to an own write. An object whose last finalizer went is gone with it.
    fn answered(&mut self, object: Parsed<WritableLayer>) {
        let known = self.entries.get(&ObjectKey::of(&object.metadata));
        let known = known.map(|entry| (&*entry.observed.uid, &*entry.observed.resource_version));
        if !is_news(known, &object.metadata) {
            return;
        }
        let gone = object.metadata.deletion_timestamp.is_some()
            && object
                .metadata
                .finalizers
                .as_ref()
                .is_none_or(|finalizers| finalizers.is_empty());
        if gone {
            self.entries.remove(&ObjectKey::of(&object.metadata));
        } else {
            self.observe(object);
        }
    }

    fn write_status(&mut self, key: &ObjectKey, now: Instant) -> Instant {
        let later = now + TICK;
        let Some(entry) = self.entries.get_mut(key) else {
            return later;
        };
        // What does not decode has a status that is not known here; the controller says why.
        let may_write = entry.observed.decodes && !entry.writing;
        let Some(outcome) = entry.outcome.as_ref().filter(|_| may_write) else {
            return later;
        };
        let status = outcome.status(&entry.observed, self.start.layers.store().id(), Timestamp::now());
        if status == entry.observed.status {
            return later;
        }
        if let Some(due) = entry.write_backoff.due(now) {
            return due;
        }
        entry.writing = true;
        let observed = &entry.observed;
        let (uid, old, new) = (&observed.uid, &observed.status.conditions, &status.conditions);
        self.announcer
            .announce_ready::<WritableLayer>(key, uid, old, new, &mut entry.announced);
        self.announcer
            .warn_of::<WritableLayer>(NEARLY_FULL, key, uid, old, new, &mut entry.announced_full);
        let (client, key) = (self.start.client.clone(), key.clone());
        let resource_version = entry.observed.resource_version.clone();
        self.tasks.spawn(async move {
            let result =
                apply_status::<WritableLayer, _>(&client, &key, AGENT_MANAGER, &resource_version, &status).await;
            Done::Written {
                key,
                result: result.map(Box::new),
            }
        });
        later
    }

    fn publish_mounted(&self) {
        let mounted: MountedLayers = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.is_mounted())
            .filter_map(|(key, entry)| Some((key.clone(), entry.observed.id()?)))
            .collect();
        let outcomes = self.entries.values().filter(|entry| entry.is_mounted());
        let (mut full, mut bytes) = (0, 0u64);
        for outcome in outcomes.filter_map(|entry| entry.outcome.as_ref()) {
            if let Outcome::Mounted { used, short, .. } = outcome {
                full += i64::from(short.is_some());
                bytes = bytes.saturating_add(used.unwrap_or(0));
            }
        }
        let metrics = self.start.health.metrics();
        metrics.layers.set(int64(mounted.len() as u64));
        metrics.layers_nearly_full.set(full);
        metrics.layer_used_bytes.set(int64(bytes));
        tell(&self.start.mounted, mounted);
    }

    /// Looks how much the layers use, and unmounts what none of them uses any more.
    fn measure(&mut self) {
        if self.measuring {
            return;
        }
        let mounted = self.entries.iter().filter(|(_, entry)| entry.is_mounted());
        let mounted: Vec<(ObjectKey, LayerId)> = mounted
            .filter_map(|(key, entry)| Some((key.clone(), entry.observed.id()?)))
            .collect();
        self.measuring = true;
        let layers = self.start.layers.clone();
        self.tasks.spawn_blocking(move || {
            let used = mounted.into_iter().filter_map(|(key, id)| match layers.room(&id) {
                Ok(room) => Some((key, room)),
                Err(error) => {
                    debug!(layer = %key, %error, "cannot tell how much it uses");
                    None
                }
            });
            let used = used.collect();
            match layers.unmount_unused(UNUSED) {
                Ok(0) => {}
                Ok(mounts) => debug!(mounts, "unmounted trees that no layer shows any more"),
                Err(error) => warn!(%error, "cannot unmount a tree that no layer shows any more"),
            }
            Done::Used(used)
        });
    }

    /// Releases layers on the disk that have had no object for the whole grace period. Their objects are asked for by
    /// name: a list that lacks them proves nothing.
    fn release_orphans(&mut self, now: Instant) {
        if !self.synced {
            return;
        }
        let owned: std::collections::HashSet<LayerId> =
            self.entries.values().filter_map(|entry| entry.observed.id()).collect();
        self.orphans.retain(|id, _| !owned.contains(id));
        for (id, record) in &self.records {
            // What an admin has made by hand, an admin releases.
            if !owned.contains(id) && record.owner.kind == OwnerKind::Object {
                self.orphans.entry(id.clone()).or_insert((now, false));
            }
        }
        let grace = self.start.orphan_grace;
        for (id, (since, at_work)) in &mut self.orphans {
            let Some(record) = self
                .records
                .get(id)
                .filter(|_| !*at_work && now.duration_since(*since) >= grace)
            else {
                continue;
            };
            *at_work = true;
            let (client, layers, record) = (self.start.client.clone(), self.start.layers.clone(), record.clone());
            self.tasks.spawn(async move {
                let released = release_orphan(client, layers, &record).await;
                Done::Orphan {
                    id: record.id,
                    released,
                }
            });
        }
    }
}

async fn release_orphan(client: Client, layers: Layers, record: &LayerRecord) -> bool {
    let key = ObjectKey::new(&record.owner.namespace, &record.owner.name);
    match uid_of::<WritableLayer>(&client, &key).await {
        Ok(Some(uid)) if uid == record.id.as_str() => return false,
        Ok(_) => {}
        Err(error) => {
            debug!(layer = %record.owner, %error, "cannot tell whether its object is gone");
            return false;
        }
    }
    info!(layer = %record.owner, id = %record.id, "the layer's object is gone; releasing it");
    let id = record.id.clone();
    let released = tokio::task::spawn_blocking(move || layers.release(&id, false)).await;
    match released {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            warn!(layer = %record.owner, %error, "cannot release a layer without an object; trying again");
            false
        }
        Err(_) => false,
    }
}

/// Names the finalizer in one place for the plan.
pub(super) const HELD: &[&str] = &[LAYER_FINALIZER];
