//! Reading objects that may not fit their type, without losing the others of their kind.
//!
//! A plain typed list fails as a whole when one object in it does not decode. [`Parsed`] always decodes: it keeps the
//! metadata, and either the object or what is wrong with it.

use std::borrow::Cow;

use kube::Resource;
use kube::api::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use super::truncate;

/// An object of kind `K` as the API server has it, whether or not it fits the type.
#[derive(Debug, Clone)]
pub struct Parsed<K> {
    pub metadata: ObjectMeta,
    pub object: Result<K, Invalid>,
}

/// Why an object does not fit its type: the field and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// Path of the field, such as `spec.nodeSelector`.
    pub field: String,
    pub message: String,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Parsed<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Envelope {
            #[serde(default)]
            metadata: ObjectMeta,
        }
        let value = serde_json::Value::deserialize(deserializer)?;
        let Envelope { metadata } = Envelope::deserialize(&value).map_err(serde::de::Error::custom)?;
        let object = serde_path_to_error::deserialize(value).map_err(|error| Invalid {
            field: error.path().to_string(),
            message: truncate(&error.inner().to_string(), 512),
        });
        Ok(Self { metadata, object })
    }
}

impl<K: Resource<Scope = S>, S> Resource for Parsed<K>
where
    K: Resource,
{
    type DynamicType = K::DynamicType;
    type Scope = S;

    fn kind(dt: &K::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &K::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &K::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &K::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::CasManifest;

    #[test]
    fn a_bad_field_is_named_and_the_metadata_kept() {
        let bad = serde_json::json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CasManifest",
            "metadata": {"name": "bad", "namespace": "n", "generation": 7},
            "spec": {"source": {"directory": {"path": "/x"}}, "nodeSelector": 5}
        });
        let parsed: Parsed<CasManifest> = serde_json::from_value(bad).unwrap();
        assert_eq!(parsed.metadata.generation, Some(7));
        let error = parsed.object.unwrap_err();
        assert_eq!(error.field, "spec.nodeSelector");
        assert!(error.message.contains("`5`"), "{error}");
    }
}
