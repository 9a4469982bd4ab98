//! Writes: server-side apply, guarded, with a timeout.

use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Patch, PatchParams, Request};
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{CALL_TIMEOUT, ObjectKey};
use crate::api::{MAX_MESSAGE, Parsed, truncate};

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("the object changed or was replaced in the meantime")]
    Conflict,
    #[error("the object is gone")]
    NotFound,
    #[error("the API server did not answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout,
    #[error("{}", refusal(.0))]
    Api(kube::Error),
}

impl WriteError {
    /// Whether a write that has failed this many times in a row is worth a warning. A conflict with somebody's change is
    /// ordinary: the watch brings that change.
    pub fn is_news(&self, failures: u32) -> bool {
        failures > 2 || !matches!(self, Self::Conflict)
    }
}

/// The API server's own words without the structure that kube adds to them, which repeats them.
fn refusal(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({})", truncate(&status.message, MAX_MESSAGE), status.code),
        other => other.to_string(),
    }
}

impl From<kube::Error> for WriteError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 409 => Self::Conflict,
            kube::Error::Api(status) if status.code == 404 => Self::NotFound,
            _ => Self::Api(error),
        }
    }
}

/// Writes the status of the object whose `resource_version` it was based on; a status write does not look at the UID, so
/// the version is what keeps it from landing on another object of the name.
///
/// Unchanged content does not move the object's version. The manager gives up what it leaves out.
///
/// # Errors
/// [`WriteError::Conflict`] when the object changed since; it will be seen through the watch.
pub async fn apply_status<K, S>(
    client: &Client,
    key: &ObjectKey,
    manager: &str,
    resource_version: &str,
    status: &S,
) -> Result<Parsed<K>, WriteError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
    S: Serialize,
{
    let metadata = json!({"resourceVersion": resource_version});
    let body = json!({"status": status});
    match send(client, key, manager, metadata.clone(), body.clone(), Some("status")).await {
        // Server-side apply must understand the whole object, also parts that an older schema let in and that are not
        // written here. A merge patch leaves them alone.
        Err(WriteError::Api(kube::Error::Api(refusal))) if matches!(refusal.code, 422 | 500) => {
            merge_status(client, key, manager, metadata, body).await
        }
        result => result,
    }
}

async fn merge_status<K>(
    client: &Client,
    key: &ObjectKey,
    manager: &str,
    metadata: Value,
    mut body: Value,
) -> Result<Parsed<K>, WriteError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    body["metadata"] = metadata;
    let params = PatchParams {
        field_manager: Some(manager.to_owned()),
        ..Default::default()
    };
    let request = Request::new(K::url_path(&(), key.namespace()));
    call(
        client,
        request.patch_subresource("status", &key.name, &params, &Patch::Merge(body)),
    )
    .await
}

/// Writes the spec and the owners of an object. Without a `uid` it is created if it is missing; with one, only that
/// very object is written.
///
/// # Errors
/// [`WriteError::Conflict`] when another object has the name.
pub async fn apply_object<K, S>(
    client: &Client,
    key: &ObjectKey,
    manager: &str,
    uid: Option<&str>,
    owners: &[OwnerReference],
    spec: &S,
) -> Result<Parsed<K>, WriteError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
    S: Serialize,
{
    let mut metadata = json!({"ownerReferences": owners});
    if let Some(uid) = uid {
        metadata["uid"] = uid.into();
    }
    send(client, key, manager, metadata, json!({"spec": spec}), None).await
}

/// Sets which finalizers this manager holds on an object; those of others stay.
///
/// # Errors
/// [`WriteError::Conflict`] or [`WriteError::NotFound`] when the object with this UID is gone.
pub async fn apply_finalizers<K>(
    client: &Client,
    key: &ObjectKey,
    manager: &str,
    uid: &str,
    finalizers: &[&str],
) -> Result<Parsed<K>, WriteError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    // The UID keeps an apply from making an object anew that is gone.
    send(
        client,
        key,
        manager,
        json!({"uid": uid, "finalizers": finalizers}),
        json!({}),
        None,
    )
    .await
}

async fn send<K>(
    client: &Client,
    key: &ObjectKey,
    manager: &str,
    mut metadata: Value,
    mut body: Value,
    subresource: Option<&str>,
) -> Result<Parsed<K>, WriteError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    let namespace = key.namespace();
    metadata["name"] = key.name.as_str().into();
    if let Some(namespace) = namespace {
        metadata["namespace"] = namespace.into();
    }
    body["apiVersion"] = K::api_version(&()).into();
    body["kind"] = K::kind(&()).into();
    body["metadata"] = metadata;

    let params = PatchParams::apply(manager).force();
    let request = Request::new(K::url_path(&(), namespace));
    let request = match subresource {
        None => request.patch(&key.name, &params, &Patch::Apply(body)),
        Some(name) => request.patch_subresource(name, &key.name, &params, &Patch::Apply(body)),
    };
    call(client, request).await
}

async fn call<K>(
    client: &Client,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<Parsed<K>, WriteError>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    let request = request.map_err(|error| WriteError::Api(kube::Error::BuildRequest(error)))?;
    match tokio::time::timeout(CALL_TIMEOUT, client.request(request)).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(WriteError::Timeout),
    }
}
