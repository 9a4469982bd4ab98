//! Events on objects: what `kubectl describe` shows.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tracing::debug;

use super::{CALL_TIMEOUT, ObjectKey};
use crate::api::conditions::{READY, STALLED, find, is_true, reasons};
use crate::api::{MAX_MESSAGE, truncate};

/// Status and reason of a condition that an event told.
pub type Said = (String, String);

/// After an event could not be published, it is tried again after these pauses.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

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

    /// Says in an event what Ready says, when it says something else than `old` did; once, also when the status itself
    /// cannot be written: `announced` is the caller's memory of the object.
    pub fn announce_ready<K: Resource<DynamicType = ()>>(
        &self,
        key: &ObjectKey,
        uid: &str,
        old: &[Condition],
        new: &[Condition],
        announced: &mut Option<Said>,
    ) {
        let expected = |ready: &Condition| ready.status == "True" || reasons::EXPECTED.contains(&&*ready.reason);
        if let Some(ready) = news(READY, old, new, announced) {
            let warning = is_true(new, STALLED) || !expected(ready);
            self.announce::<K>(key, uid, warning, &ready.reason, &ready.message);
        }
    }

    /// Warns by an event when a condition appears that is there only while something is wrong; once, as
    /// [`Announcer::announce_ready`].
    pub fn warn_of<K: Resource<DynamicType = ()>>(
        &self,
        kind: &str,
        key: &ObjectKey,
        uid: &str,
        old: &[Condition],
        new: &[Condition],
        announced: &mut Option<Said>,
    ) {
        if let Some(condition) = news(kind, old, new, announced) {
            self.announce::<K>(key, uid, true, &condition.reason, &condition.message);
        }
    }

    /// Publishes an event about the object. It is never waited for, and lost, which is logged, after some tries.
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
            let mut pauses = AGAIN.iter();
            loop {
                let published = tokio::time::timeout(CALL_TIMEOUT, recorder.publish(&event, &reference)).await;
                let error = match published {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no answer".to_owned(),
                };
                match pauses.next() {
                    Some(pause) => tokio::time::sleep(*pause).await,
                    None => return debug!(error, reason = event.reason, "an event was lost"),
                }
            }
        });
    }
}

/// The condition, if it says something else than it did, and than an event has said.
fn news<'a>(
    kind: &str,
    old: &[Condition],
    new: &'a [Condition],
    announced: &mut Option<Said>,
) -> Option<&'a Condition> {
    let gist = |conditions| find(conditions, kind).map(|found| (found.status.clone(), found.reason.clone()));
    let said = gist(new);
    if said == gist(old) || said == *announced {
        return None;
    }
    // Also when it goes: should it come back, that is news.
    *announced = said;
    find(new, kind)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::api::conditions::{OVER_LIMIT, Wanted, merge};

    fn over(reason: &'static str, message: &str) -> Vec<Condition> {
        let wanted = Wanted {
            kind: OVER_LIMIT,
            status: true,
            reason,
            message: message.to_owned(),
        };
        merge(&[], vec![wanted], 1, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_condition_is_told_once_while_it_stays_and_again_when_it_comes_back() {
        let mut announced = None;
        let mut told = |old: &[Condition], new: &[Condition]| news(OVER_LIMIT, old, new, &mut announced).is_some();
        let (first, later) = (over("LiveContent", "20Gi"), over("LiveContent", "21Gi"));
        assert!(told(&[], &first));
        // The status could not be written, for an hour: the API server's is the old one still.
        for _ in 0..60 {
            assert!(!told(&[], &first));
        }
        // Other figures are no news.
        assert!(!told(&first, &later));
        assert!(told(&later, &over("Another", "21Gi")));
        assert!(!told(&later, &[]));
        assert!(told(&[], &first));
        // A new process knows of it from the status.
        assert!(news(OVER_LIMIT, &first, &later, &mut None).is_none());
    }
}
