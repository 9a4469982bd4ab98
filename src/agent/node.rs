//! The node's main loop: `NodeStore.spec` → builds, retirement, retention → `NodeStore.status`.

mod status;

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Client;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, error, info, warn};

use super::analysis::{Figures, Pace, Trouble};
use super::builds::{Builder, Ended, MountedLayers};
use super::plan::{self, Failed, Goal, Known, Step};
use super::retention::{Memory, Room};
use super::saved::{self, SavedSpec, Saving};
use super::tell;
use super::throttle::Throttle;
use super::work::{self, Built, Done};
use crate::api::conditions::reasons;
use crate::api::{NodeStore, NodeStoreStatus, Parsed, ProjectedManifest, ProjectedPolicy, StoreUsage};
use crate::cluster::{AGENT_MANAGER, Announcer, Backoff, Followed, ObjectKey, Said};
use crate::store::{Ref, TreeDigest};
use crate::telemetry::Health;

/// Builds at once. More than one, so that a slow one holds nothing up; few, because they share the disk.
const MAX_BUILDS: usize = 4;

/// Longest pause of the loop.
pub(super) const TICK: Duration = Duration::from_secs(10);

/// The trees that the node should hold, for the layers: `None` while one is not stored yet.
pub type Placed = HashMap<ObjectKey, Option<TreeDigest>>;

/// What the loop knows of the cluster and the disk at its start.
pub struct Start {
    pub client: Client,
    pub health: Health,
    pub node: String,
    pub builder: Builder,
    pub spec: Option<SavedSpec>,
    pub refs: BTreeMap<ObjectKey, Ref>,
    pub trouble: Option<Trouble>,
    pub memory: Memory,
    /// Most files that retention removes in a second.
    pub removal_rate: Option<NonZeroU64>,
    /// Told when somebody else has changed the store through this process.
    pub commands: Arc<Notify>,
    pub mounted: watch::Receiver<MountedLayers>,
    pub placed: watch::Sender<Placed>,
    pub owner: watch::Sender<Option<OwnerReference>>,
}

struct Job {
    goal: Goal,
    cancel: Arc<AtomicBool>,
    started: Instant,
}

pub(super) struct RunUnderWay {
    pub(super) policy: Option<ProjectedPolicy>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) began: Instant,
}

/// The NodeStore as the API server has it.
pub(super) struct Observed {
    pub(super) uid: String,
    resource_version: String,
    status: NodeStoreStatus,
}

pub struct Node {
    client: Client,
    pub(super) health: Health,
    pub(super) node: String,
    pub(super) builder: Builder,
    mounted: watch::Receiver<MountedLayers>,
    placed: watch::Sender<Placed>,
    owner: watch::Sender<Option<OwnerReference>>,

    /// Shared with what the loop looks at, which changes the rest of it meanwhile.
    pub(super) spec: Option<Arc<SavedSpec>>,
    pub(super) refs: BTreeMap<ObjectKey, Ref>,
    pub(super) trouble: Option<Trouble>,
    jobs: HashMap<String, Job>,
    failed: HashMap<String, Failed>,
    checked: HashMap<String, Instant>,
    pub(super) retiring: HashMap<ObjectKey, Instant>,
    pub(super) memory: Memory,
    pub(super) collecting: Option<RunUnderWay>,
    /// When the last run ended.
    pub(super) ran: Option<Instant>,
    pub(super) removal_rate: Option<NonZeroU64>,
    pub(super) room: Option<Room>,
    /// When the room was looked at last.
    pub(super) looked: Option<Instant>,
    pub(super) announcer: Announcer,
    announced_over: Option<Said>,
    announced_failed: Option<Said>,
    pub(super) saving: Saving,
    usage: Option<StoreUsage>,
    /// When to count what the store's room is used for, and what was counted last.
    pub(super) pace: Pace,
    pub(super) figures: Option<Figures>,
    commands: Arc<Notify>,
    /// Builds that ended and retirements, so far: refs that were read before one of them are out of date.
    ref_changes: u64,

    pub(super) observed: Option<Observed>,
    writing: bool,
    write_backoff: Backoff,
    throttle: Throttle,
    differs_since: Option<Instant>,
    pub(super) tasks: JoinSet<Done>,
}

/// Whoever ends the loop, what is under way on other threads ends in order.
impl Drop for Node {
    fn drop(&mut self) {
        self.cancel_all();
    }
}

impl Node {
    pub fn new(start: Start) -> Self {
        let now = Instant::now();
        Self {
            announcer: Announcer::new(start.client.clone(), AGENT_MANAGER, Some(start.node.clone())),
            client: start.client,
            health: start.health,
            node: start.node,
            builder: start.builder,
            mounted: start.mounted,
            placed: start.placed,
            owner: start.owner,
            spec: start.spec.map(Arc::new),
            refs: start.refs,
            trouble: start.trouble,
            jobs: HashMap::new(),
            failed: HashMap::new(),
            checked: HashMap::new(),
            retiring: HashMap::new(),
            memory: start.memory,
            collecting: None,
            ran: None,
            removal_rate: start.removal_rate,
            room: None,
            looked: None,
            announced_over: None,
            announced_failed: None,
            saving: Saving::default(),
            usage: None,
            pace: Pace::new(now),
            figures: None,
            commands: start.commands,
            ref_changes: 0,
            observed: None,
            writing: false,
            write_backoff: Backoff::default(),
            throttle: Throttle::new(now),
            differs_since: None,
            tasks: JoinSet::new(),
        }
    }

    /// Runs until the watch ends or `stop` is true. A retention run that is under way then ends early, and what it did is
    /// noted.
    pub async fn run(mut self, mut changes: mpsc::Receiver<Followed<NodeStore>>, mut stop: watch::Receiver<bool>) {
        self.count();
        let commands = self.commands.clone();
        loop {
            let wake = self.work();
            self.health.beat();
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take(change),
                    None => break,
                },
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.finished(done),
                    Err(error) => {
                        error!(%error, "a task of the agent broke off; restarting");
                        return;
                    }
                },
                Ok(()) = self.mounted.changed() => self.retry_snapshots(),
                () = commands.notified() => self.reread(),
                _ = stop.wait_for(|stop| *stop) => break,
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
        self.end().await;
    }

    /// Notes the run that is under way, so that the next start neither repeats it nor takes it for one that was never
    /// begun. What else is under way notes itself or is done again.
    async fn end(mut self) {
        self.cancel_all();
        // If it fails now, it is left.
        self.saving.hurry();
        loop {
            self.save(Instant::now());
            if self.collecting.is_none() && !self.saving.is_under_way() {
                return;
            }
            match self.tasks.join_next().await {
                Some(Ok(done @ (Done::Collected(_) | Done::Saved(_)))) => self.finished(done),
                Some(Ok(_)) => {}
                Some(Err(error)) => return error!(%error, "a task of the agent broke off"),
                None => return,
            }
        }
    }

    fn cancel_all(&self) {
        for job in self.jobs.values() {
            job.cancel.store(true, Ordering::Relaxed);
        }
        if let Some(run) = &self.collecting {
            run.cancel.store(true, Ordering::Relaxed);
        }
    }

    fn take(&mut self, change: Followed<NodeStore>) {
        match change {
            Followed::Present(object) => self.observe(*object),
            // A NodeStore that is gone says nothing about what the node should hold: the last spec stays.
            Followed::Gone { .. } => {
                warn!(node = self.node, "the NodeStore is gone; working on from its last spec");
                self.observed = None;
            }
            Followed::Synced => debug!(node = self.node, "the NodeStore is synced"),
        }
    }

    fn observe(&mut self, object: Parsed<NodeStore>) {
        let uid = object.metadata.uid.clone().unwrap_or_default();
        let owner = object
            .metadata
            .owner_references
            .iter()
            .flatten()
            .find(|owner| owner.kind == "Node")
            .cloned();
        tell(&self.owner, owner);
        let store = match object.object {
            Ok(store) => store,
            Err(invalid) => {
                warn!(node = self.node, %invalid, "the NodeStore cannot be read; working on from its last spec");
                return;
            }
        };
        self.observed = Some(Observed {
            uid: uid.clone(),
            resource_version: object.metadata.resource_version.unwrap_or_default(),
            status: store.status.unwrap_or_default(),
        });
        let spec = SavedSpec {
            uid,
            generation: object.metadata.generation.unwrap_or_default(),
            spec: store.spec,
        };
        if self.spec.as_deref() != Some(&spec) {
            info!(
                node = self.node,
                generation = spec.generation,
                manifests = spec.spec.manifests.len(),
                "taking up a new spec"
            );
            self.spec = Some(Arc::new(spec));
            self.saving.wanted.spec = true;
        }
    }

    fn known<'a>(&'a self, manifest: &ProjectedManifest) -> Known<'a> {
        Known {
            stored: self.refs.get(&ObjectKey::new(&manifest.namespace, &manifest.name)),
            building: self.jobs.get(&manifest.uid).map(|job| &job.goal),
            failed: self.failed.get(&manifest.uid),
            checked: self.checked.get(&manifest.uid).copied(),
            exclusive: self.exclusive(manifest),
        }
    }

    /// Does what is due, and gives the time of the next look.
    fn work(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = now + TICK;
        let spec = self.spec.clone();
        let manifests: &[ProjectedManifest] = spec.as_ref().map_or(&[], |spec| &spec.spec.manifests);
        plan::prune(&mut self.failed, manifests);
        plan::prune(&mut self.checked, manifests);
        self.cancel_unwanted(manifests);
        let mut steps = Vec::with_capacity(manifests.len());
        for manifest in manifests {
            let interval = manifest
                .rebuild_interval
                .as_ref()
                .and_then(|interval| interval.get().ok());
            if interval.is_some() {
                // After a restart the interval begins anew: a restart of all agents must not read all sources at once.
                self.checked.entry(manifest.uid.clone()).or_insert(now);
            }
            let step = plan::step(manifest, self.known(manifest), interval, now);
            match step {
                Step::Build if self.jobs.len() < MAX_BUILDS => self.start_build(manifest, now),
                Step::Cancel => self.cancel(&manifest.uid),
                Step::Retry(at) | Step::Done(Some(at)) => wake = wake.min(at),
                _ => {}
            }
            steps.push(step);
        }
        // A spec from the disk may be older than what was built: after a kill, or where it could not be saved.
        if self.spec.is_some() && self.observed.is_some() {
            self.retire(manifests, now);
        }
        wake = wake.min(self.retention(now));
        wake = self.analyse(now).map_or(wake, |due| wake.min(due));
        self.save(now);
        wake = self.saving.due(now).map_or(wake, |due| wake.min(due));
        self.publish_placed(manifests);
        wake.min(self.write_status(manifests, &steps, now))
    }

    /// Builds whose manifest is gone from the spec have no step of their own.
    fn cancel_unwanted(&self, manifests: &[ProjectedManifest]) {
        for (uid, job) in &self.jobs {
            if !manifests.iter().any(|manifest| manifest.uid == *uid) {
                job.cancel.store(true, Ordering::Relaxed);
            }
        }
    }

    fn cancel(&self, uid: &str) {
        if let Some(job) = self.jobs.get(uid) {
            job.cancel.store(true, Ordering::Relaxed);
        }
    }

    fn start_build(&mut self, manifest: &ProjectedManifest, now: Instant) {
        let (goal, cancel) = (Goal::of(manifest), Arc::new(AtomicBool::new(false)));
        let key = ObjectKey::new(&manifest.namespace, &manifest.name);
        info!(manifest = %key, generation = goal.generation, "building");
        self.jobs.insert(
            manifest.uid.clone(),
            Job {
                goal: goal.clone(),
                cancel: cancel.clone(),
                started: now,
            },
        );
        let (builder, manifest, mounted) = (self.builder.clone(), manifest.clone(), self.mounted.borrow().clone());
        self.tasks
            .spawn_blocking(move || Done::Built(Box::new(work::build(&builder, &manifest, &mounted, &cancel))));
    }

    fn retry_snapshots(&mut self) {
        self.failed
            .retain(|_, failed| failed.failure.reason != reasons::LAYER_NOT_READY);
    }

    /// Trees whose manifest is no longer the node's become history.
    fn retire(&mut self, manifests: &[ProjectedManifest], now: Instant) {
        let retired: Vec<(ObjectKey, String)> = plan::retired(&self.refs, manifests)
            .into_iter()
            .filter(|(key, _)| {
                self.retiring
                    .get(key)
                    .is_none_or(|tried| now.duration_since(*tried) > TICK)
            })
            .map(|(key, entry)| (key.clone(), entry.owner.clone()))
            .collect();
        for (key, owner) in retired {
            info!(manifest = %key, "no longer on this node; its tree is history now");
            self.retiring.insert(key.clone(), now);
            let builder = self.builder.clone();
            self.tasks.spawn_blocking(move || work::retire(&builder, key, &owner));
        }
    }

    /// Saves what is to be saved.
    fn save(&mut self, now: Instant) {
        let Some(files) = self.saving.begin(now) else {
            return;
        };
        let root = self.builder.store.root().to_owned();
        let spec = self.spec.clone().filter(|_| files.spec);
        let memory = files.memory.then(|| self.memory.clone());
        self.tasks.spawn_blocking(move || {
            let spec = spec.map_or(Ok(()), |spec| saved::save(&root.join(saved::SPEC), &*spec));
            let memory = memory.map_or(Ok(()), |memory| saved::save(&root.join(saved::MEMORY), &memory));
            Done::Saved(spec.and(memory))
        });
    }

    /// Counts what the store holds, apart from the builds and collections that do it at their end.
    fn count(&mut self) {
        let builder = self.builder.clone();
        self.tasks.spawn_blocking(move || Done::Counted(work::count(&builder)));
    }

    /// Reads all refs again: a command of `larder store` may have changed them.
    fn reread(&mut self) {
        let (builder, change) = (self.builder.clone(), self.ref_changes);
        self.tasks.spawn_blocking(move || work::reread(&builder, change));
    }

    pub(super) fn counted(&mut self, usage: Option<StoreUsage>) {
        if let Some(usage) = usage {
            self.health.metrics().blobs.set(usage.blobs);
            self.health.metrics().stored_bytes.set(usage.stored_bytes);
            self.usage = Some(usage);
        }
    }

    fn refs_changed(&mut self, now: Instant) {
        self.ref_changes += 1;
        self.pace.changed(now);
    }

    fn publish_placed(&self, manifests: &[ProjectedManifest]) {
        let placed: Placed = manifests
            .iter()
            .map(|manifest| {
                let stored = self
                    .known(manifest)
                    .stored
                    .filter(|stored| stored.owner == manifest.uid);
                let digest = stored
                    .and_then(|stored| stored.current.as_ref())
                    .map(|tree| tree.digest);
                (ObjectKey::new(&manifest.namespace, &manifest.name), digest)
            })
            .collect();
        tell(&self.placed, placed);
    }

    fn finished(&mut self, done: Done) {
        let now = Instant::now();
        match done {
            Done::Built(built) => self.built(*built, now),
            Done::Retired { key, stored } => {
                self.retiring.remove(&key);
                self.refs_changed(now);
                match stored {
                    Ok(Some(stored)) => drop(self.refs.insert(key, *stored)),
                    Ok(None) => drop(self.refs.remove(&key)),
                    Err(error) => {
                        self.retiring.insert(key.clone(), now);
                        warn!(manifest = %key, %error, "cannot make its tree history; trying again");
                    }
                }
            }
            Done::Collected(collected) => self.collected(*collected),
            Done::Saved(result) => {
                self.saving.end(&result, now);
                if let Err(error) = result {
                    // Only a restart would miss it.
                    warn!(%error, "cannot save what the agent would need after a restart; trying again");
                }
            }
            Done::Counted(usage) => self.counted(usage),
            Done::Analysed(analysed) => self.analysed(*analysed, now),
            Done::Looked(room) => self.room = room,
            Done::Reread { change, .. } if change != self.ref_changes => self.reread(),
            Done::Reread { refs, usage, .. } => {
                self.counted(usage);
                self.pace.changed(now);
                match refs {
                    Ok(refs) => self.refs = refs,
                    Err(error) => warn!(%error, "cannot read the refs after a command; what was known stays"),
                }
            }
            Done::Written(result) => self.written(result, now),
        }
    }

    fn built(&mut self, built: Built, now: Instant) {
        let Built {
            goal,
            key,
            took,
            snapshot,
            result,
            stored,
            usage,
        } = built;
        self.counted(usage);
        self.refs_changed(now);
        self.jobs.remove(&goal.uid);
        let before = self
            .refs
            .get(&key)
            .and_then(|stored| Some(stored.current.as_ref()?.digest));
        if let Some(stored) = stored {
            let former = self.refs.insert(key.clone(), stored);
            // What is known of the name is about another manifest.
            if let (Some(former), Some(figures)) = (former, &mut self.figures)
                && former.owner != goal.uid
            {
                figures.exclusive.remove(&key);
            }
        }
        match result {
            Ok(()) => {
                let tree = self.refs.get(&key).and_then(|stored| stored.current.as_ref());
                let digest = tree.map(|tree| tree.digest.to_string()).unwrap_or_default();
                let (files, bytes) = tree.map_or((0, 0), |tree| (tree.files, tree.size));
                // An equal tree keeps what its first build added.
                let added = tree
                    .filter(|tree| Some(tree.digest) != before)
                    .map_or(0, |tree| tree.added);
                info!(manifest = %key, node = self.node, digest, files, bytes, ms = took.as_millis() as u64, "stored");
                self.health.metrics().builds.inc();
                if snapshot {
                    let metrics = self.health.metrics();
                    metrics.snapshot_seconds.observe(took.as_secs_f64());
                    metrics.snapshot_added_bytes.inc_by(added);
                }
                self.failed.remove(&goal.uid);
                self.checked.insert(goal.uid, now);
            }
            Err(Ended::Cancelled) => debug!(manifest = %key, "the build was cancelled"),
            Err(Ended::Failed(failure)) => {
                warn!(manifest = %key, node = self.node, reason = failure.reason, error = failure.message, "the build failed");
                self.health.metrics().build_failures.inc();
                if snapshot {
                    self.health.metrics().snapshot_failures.inc();
                }
                let before = self.failed.remove(&goal.uid).filter(|failed| failed.goal == goal);
                let mut backoff = before.map_or_else(Backoff::slow, |failed| failed.backoff);
                backoff.failed(now);
                self.failed.insert(goal.uid.clone(), Failed { goal, failure, backoff });
            }
        }
    }
}
