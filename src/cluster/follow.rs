//! Following the objects of a kind, where absence is not deletion.
//!
//! A watch can miss an object for many reasons: a list that failed half-way or came back empty, a server restored from
//! a backup, a permission that was taken away for a minute. What was seen once therefore counts as there until the API
//! server answers a question for its very name with NotFound, or with another UID, and then a grace period has passed.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::pin::pin;
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use kube::api::{Api, ApiResource, DynamicObject, ObjectMeta};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::{Backoff, CALL_TIMEOUT, WriteError};
use crate::api::Parsed;

/// Namespace and name of an object; the namespace of a cluster-scoped one is empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub namespace: String,
    pub name: String,
}

impl ObjectKey {
    /// A key from its parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The namespace, where there is one.
    pub fn namespace(&self) -> Option<&str> {
        (!self.namespace.is_empty()).then_some(self.namespace.as_str())
    }

    /// The key of the object with this metadata.
    pub fn of(metadata: &ObjectMeta) -> Self {
        Self::new(
            metadata.namespace.clone().unwrap_or_default(),
            metadata.name.clone().unwrap_or_default(),
        )
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// What is learned of a kind.
#[derive(Debug)]
pub enum Followed<K> {
    /// The object as it is now.
    Present(Box<Parsed<K>>),
    /// The object with this UID is proved to be gone, and the grace period is over. Another one may have its name.
    Gone { key: ObjectKey, uid: String },
    /// Every object that exists has been reported at least once.
    Synced,
}

/// Follows the objects of kind `K` that `config` selects, for ever; ends when `into` is closed.
///
/// Errors are logged and retried with back-off; an object that does not decode comes as such and stops no other.
pub async fn follow<K, E>(client: Client, config: watcher::Config, grace: Duration, into: mpsc::Sender<E>)
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug + Send + 'static,
    E: From<Followed<K>> + Send + 'static,
    Parsed<K>: Resource<DynamicType = ()>,
{
    let api = Api::<Parsed<K>>::all(client.clone());
    follow_api(client, api, config, grace, into).await;
}

/// [`follow`] within one namespace, without a grace period.
pub async fn follow_in<K, E>(client: Client, namespace: &str, config: watcher::Config, into: mpsc::Sender<E>)
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + DeserializeOwned
        + Clone
        + fmt::Debug
        + Send
        + 'static,
    E: From<Followed<K>> + Send + 'static,
{
    let api = Api::<Parsed<K>>::namespaced(client.clone(), namespace);
    follow_api(client, api, config, Duration::ZERO, into).await;
}

async fn follow_api<K, E>(
    client: Client,
    api: Api<Parsed<K>>,
    config: watcher::Config,
    grace: Duration,
    into: mpsc::Sender<E>,
) where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug + Send + 'static,
    E: From<Followed<K>> + Send + 'static,
    Parsed<K>: Resource<DynamicType = ()>,
{
    let kind = K::kind(&());
    let mut events = pin!(watcher(api, config).default_backoff());
    // What was reported as present, and under which UID.
    let mut known: HashMap<ObjectKey, String> = HashMap::new();
    let mut listed: HashSet<ObjectKey> = HashSet::new();
    let mut probes = FuturesUnordered::new();
    let mut probing: HashSet<(ObjectKey, String)> = HashSet::new();
    loop {
        let mut suspects: Vec<ObjectKey> = Vec::new();
        tokio::select! {
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Apply(object))) => {
                    if report(&mut known, object, &into).await.is_err() { return; }
                }
                Ok(Some(watcher::Event::Delete(object))) => suspects.push(ObjectKey::of(&object.metadata)),
                Ok(Some(watcher::Event::Init)) => listed.clear(),
                Ok(Some(watcher::Event::InitApply(object))) => {
                    listed.insert(ObjectKey::of(&object.metadata));
                    if report(&mut known, object, &into).await.is_err() { return; }
                }
                Ok(Some(watcher::Event::InitDone)) => {
                    suspects.extend(known.keys().filter(|key| !listed.contains(key)).cloned());
                    listed.clear();
                    if into.send(Followed::Synced.into()).await.is_err() { return; }
                }
                Ok(None) => return,
                Err(error) => warn!(%kind, %error, "cannot watch; trying again"),
            },
            Some((key, uid)) = probes.next(), if !probes.is_empty() => {
                let (key, uid): (ObjectKey, String) = (key, uid);
                probing.remove(&(key.clone(), uid.clone()));
                if known.get(&key) == Some(&uid) { known.remove(&key); }
                if into.send(Followed::Gone { key, uid }.into()).await.is_err() { return; }
            }
            () = into.closed() => return,
        }
        for key in suspects {
            let Some(uid) = known.get(&key).cloned() else { continue };
            if probing.insert((key.clone(), uid.clone())) {
                debug!(%kind, %key, "not seen any more; asking for it by name");
                probes.push(prove_gone::<K>(client.clone(), key, uid, grace));
            }
        }
    }
}

async fn report<K, E>(
    known: &mut HashMap<ObjectKey, String>,
    mut object: Parsed<K>,
    into: &mpsc::Sender<E>,
) -> Result<(), mpsc::error::SendError<E>>
where
    E: From<Followed<K>>,
{
    object.metadata.managed_fields = None;
    let key = ObjectKey::of(&object.metadata);
    let uid = object.metadata.uid.clone().unwrap_or_default();
    // Another UID under a name is proof enough that the one before is gone.
    if let Some(old) = known.insert(key.clone(), uid.clone()).filter(|old| *old != uid) {
        into.send(Followed::Gone { key, uid: old }.into()).await?;
    }
    into.send(Followed::Present(Box::new(object)).into()).await
}

/// Returns when the object with this UID is proved to be gone and the grace period is over. While the API server does
/// not answer, or still has the object, it asks again.
async fn prove_gone<K: Resource<DynamicType = ()>>(
    client: Client,
    key: ObjectKey,
    uid: String,
    grace: Duration,
) -> (ObjectKey, String) {
    let mut backoff = Backoff::default();
    let mut gone_before = false;
    loop {
        let gone = match uid_of::<K>(&client, &key).await {
            // An object without a UID proves nothing.
            Ok(found) => found.is_none_or(|found| !found.is_empty() && found != uid),
            Err(error) => {
                warn!(kind = %K::kind(&()), %key, %error, "cannot tell whether it is gone");
                false
            }
        };
        match (gone, gone_before) {
            // The answer is asked for again after the grace period: a server restored from a backup may err once.
            (true, false) if !grace.is_zero() => {
                gone_before = true;
                tokio::time::sleep(grace).await;
            }
            (true, _) => return (key, uid),
            (false, _) => {
                gone_before = false;
                let now = std::time::Instant::now();
                tokio::time::sleep(backoff.failed(now) - now).await;
            }
        }
    }
}

/// Asks for an object by name: the UID of the one that has the name now, or `None` when the API server says that there
/// is none.
///
/// # Errors
/// When there is no answer; that says nothing about the object.
pub async fn uid_of<K: Resource<DynamicType = ()>>(
    client: &Client,
    key: &ObjectKey,
) -> Result<Option<String>, WriteError> {
    let resource = ApiResource::erase::<K>(&());
    let api: Api<DynamicObject> = match key.namespace() {
        None => Api::all_with(client.clone(), &resource),
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
    };
    match tokio::time::timeout(CALL_TIMEOUT, api.get_metadata_opt(&key.name)).await {
        Ok(found) => Ok(found?.map(|found| found.metadata.uid.unwrap_or_default())),
        Err(_) => Err(WriteError::Timeout),
    }
}
