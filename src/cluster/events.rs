//! Events on objects: what `kubectl describe` shows.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tracing::debug;

use super::{CALL_TIMEOUT, ObjectKey};
use crate::api::{MAX_MESSAGE, truncate};

/// Publishes events without holding up the work that they are about.
#[derive(Clone)]
pub struct Announcer {
    recorder: Recorder,
}

impl Announcer {
    /// Events from `controller` (such as `larder-agent`), the part of it called `instance` (such as the node's name).
    pub fn new(client: Client, controller: &str, instance: Option<String>) -> Self {
        let reporter = Reporter {
            controller: controller.to_owned(),
            instance,
        };
        Self {
            recorder: Recorder::new(client, reporter),
        }
    }

    /// Publishes an event about the object. A lost event is logged, never waited for.
    pub fn announce<K: Resource<DynamicType = ()>>(
        &self,
        key: &ObjectKey,
        uid: &str,
        warning: bool,
        reason: &str,
        note: &str,
    ) {
        let reference = ObjectReference {
            api_version: Some(K::api_version(&()).into_owned()),
            kind: Some(K::kind(&()).into_owned()),
            name: Some(key.name.clone()),
            namespace: (!key.namespace.is_empty()).then(|| key.namespace.clone()),
            uid: Some(uid.to_owned()),
            ..Default::default()
        };
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.to_owned(),
            note: (!note.is_empty()).then(|| truncate(note, MAX_MESSAGE)),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        let recorder = self.recorder.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(CALL_TIMEOUT, recorder.publish(&event, &reference)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, reason = event.reason, "an event was lost"),
                Err(_) => debug!(reason = event.reason, "an event was lost: no answer"),
            }
        });
    }
}
