//! Compares the CRDs in the cluster with the types of this program.
//!
//! An older CRD makes the API server drop the fields that it does not know, without a word: a limit that was dropped
//! would read as none. The controller says so at its start, by name.

use std::collections::BTreeSet;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSONSchemaProps};
use kube::Client;
use kube::api::Api;
use tracing::{info, warn};

use crate::cluster::CALL_TIMEOUT;

/// Warns of every field that an installed CRD lacks.
pub async fn warn_of_old_crds(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for wanted in crate::api::crds() {
        let name = format!("{}.{}", wanted.spec.names.plural, wanted.spec.group);
        match tokio::time::timeout(CALL_TIMEOUT, api.get_opt(&name)).await {
            Ok(Ok(Some(installed))) => {
                let missing = missing_fields(&installed, &wanted);
                if missing.is_empty() {
                    info!(crd = name, "the installed CRD has every field");
                } else {
                    let fields = missing.into_iter().collect::<Vec<_>>().join(", ");
                    warn!(crd = name, %fields, "the installed CRD is older than larder and lacks fields; apply the CRDs of this version");
                }
            }
            Ok(Ok(None)) => warn!(crd = name, "the CRD is not installed"),
            Ok(Err(error)) => warn!(crd = name, %error, "cannot read the installed CRD"),
            Err(_) => warn!(crd = name, "cannot read the installed CRD: no answer"),
        }
    }
}

/// Paths of the fields that `wanted` has and `installed` lacks.
fn missing_fields(installed: &CustomResourceDefinition, wanted: &CustomResourceDefinition) -> BTreeSet<String> {
    let fields = |crd: &CustomResourceDefinition| {
        let mut paths = BTreeSet::new();
        let version = crd.spec.versions.iter().find(|version| version.name == "v1alpha1");
        if let Some(schema) = version.and_then(|version| version.schema.as_ref()?.open_api_v3_schema.as_ref()) {
            collect(schema, "", &mut paths);
        }
        paths
    };
    &fields(wanted) - &fields(installed)
}

/// The depth is that of a schema, which the API server bounds.
fn collect(schema: &JSONSchemaProps, path: &str, paths: &mut BTreeSet<String>) {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaPropsOrArray;
    for (name, property) in schema.properties.iter().flatten() {
        let path = format!("{path}.{name}");
        collect(property, &path, paths);
        paths.insert(path);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        collect(items, &format!("{path}[*]"), paths);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_an_older_crd_lacks_are_named() {
        let wanted = crate::api::crds().remove(0);
        assert!(missing_fields(&wanted, &wanted).is_empty());
        let mut older = wanted.clone();
        let schema = older.spec.versions[0]
            .schema
            .as_mut()
            .unwrap()
            .open_api_v3_schema
            .as_mut()
            .unwrap();
        let spec = schema.properties.as_mut().unwrap().get_mut("spec").unwrap();
        spec.properties.as_mut().unwrap().remove("rebuildInterval").unwrap();
        assert_eq!(
            missing_fields(&older, &wanted),
            BTreeSet::from([".spec.rebuildInterval".to_owned()])
        );
    }
}
