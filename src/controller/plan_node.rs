//! What a node should hold: the plan of a NodeStore's spec.

use std::collections::BTreeSet;

use super::index::{Index, ManifestFacts, PolicyFacts, StoreFacts};
use crate::api::{
    MAX_NODE_MANIFESTS, MAX_NODE_SPEC_BYTES, NodeStoreSpec, PolicyRules, ProjectedManifest, ProjectedPolicy,
    RetentionPolicySpec, selects,
};
use crate::cluster::ObjectKey;

/// What to do about a node's NodeStore.
#[derive(Debug, PartialEq)]
pub enum NodePlan {
    /// Nothing to write.
    Keep,
    /// The NodeStore belongs to an earlier Node of the name: delete that very one.
    Replace { uid: String },
    /// Write this spec; `uid` is that of the NodeStore, if there is one.
    Write {
        uid: Option<String>,
        node_uid: String,
        spec: Box<NodeStoreSpec>,
    },
}

/// The plan, and the UIDs of the manifests that the node has no room for.
pub fn plan(index: &Index, name: &str) -> (NodePlan, BTreeSet<String>) {
    let Some(node) = index.nodes.get(name) else {
        // The garbage collector removes it with its Node.
        return (NodePlan::Keep, BTreeSet::new());
    };
    if !index.has_agent(name) {
        return (NodePlan::Keep, BTreeSet::new());
    }
    let store = index.stores.get(name);
    if let Some(store) = store.filter(|store| store.owner_uid.as_ref().is_some_and(|owner| *owner != node.uid)) {
        return (
            NodePlan::Replace {
                uid: store.meta.uid.clone(),
            },
            BTreeSet::new(),
        );
    }
    let (manifests, refused) = manifests(index, name, store);
    let retention = unreadable_policy(index, name).cloned().or_else(|| {
        governing(index, name).map(|(name, policy, spec)| ProjectedPolicy {
            name: name.clone(),
            uid: policy.meta.uid.clone(),
            generation: policy.meta.generation,
            requested_at: policy.meta.requested_at.clone(),
            rules: usable(&spec.rules),
        })
    });
    let spec = NodeStoreSpec { manifests, retention };
    let plan = match store {
        Some(store) if store.spec == spec && store.owner_uid.is_some() => NodePlan::Keep,
        store => NodePlan::Write {
            uid: store.map(|store| store.meta.uid.clone()),
            node_uid: node.uid.clone(),
            spec: Box::new(spec),
        },
    };
    (plan, refused)
}

/// The manifests that the node should hold, by namespace and name, and those that no longer fit.
fn manifests(index: &Index, node: &str, store: Option<&StoreFacts>) -> (Vec<ProjectedManifest>, BTreeSet<String>) {
    let placed = index
        .manifests
        .iter()
        .filter(|(key, manifest)| index.places(key, manifest, node));
    let mut placed: Vec<(&ObjectKey, &ManifestFacts)> = placed.collect();
    // The oldest stay; names decide between equals, so that the answer never depends on the order of events.
    placed.sort_by(|(key_a, a), (key_b, b)| (a.meta.created, key_a).cmp(&(b.meta.created, key_b)));
    let (mut entries, mut refused, mut bytes) = (Vec::new(), BTreeSet::new(), 0);
    for (key, manifest) in placed {
        let Some(entry) = project(key, manifest, store) else {
            continue;
        };
        let size = serde_json::to_vec(&entry).map_or(usize::MAX, |json| json.len() + 1);
        if entries.len() == MAX_NODE_MANIFESTS || bytes + size > MAX_NODE_SPEC_BYTES {
            refused.insert(manifest.meta.uid.clone());
            continue;
        }
        bytes += size;
        entries.push(entry);
    }
    entries.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    (entries, refused)
}

/// A manifest as the node gets it; one that does not decode stays as the node has it.
fn project(key: &ObjectKey, manifest: &ManifestFacts, store: Option<&StoreFacts>) -> Option<ProjectedManifest> {
    match &manifest.spec {
        Ok(spec) => Some(ProjectedManifest {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            uid: manifest.meta.uid.clone(),
            generation: manifest.meta.generation,
            requested_at: manifest.meta.requested_at.clone(),
            source: spec.source.clone(),
            rebuild_interval: spec.rebuild_interval.clone().filter(|interval| interval.get().is_ok()),
            revision_history_limit: spec.revision_history_limit,
            suspend: spec.suspend,
        }),
        Err(_) => store?
            .spec
            .manifests
            .iter()
            .find(|placed| placed.uid == manifest.meta.uid)
            .cloned(),
    }
}

/// The name of the policy in force on a node.
pub fn governor<'a>(index: &'a Index, node: &str) -> Option<&'a String> {
    let kept = unreadable_policy(index, node).map(|policy| &policy.name);
    kept.or_else(|| governing(index, node).map(|(name, _, _)| name))
}

/// Of the policies that can be read, that for a node: highest priority, then oldest, then first by name.
fn governing<'a>(index: &'a Index, node: &str) -> Option<(&'a String, &'a PolicyFacts, &'a RetentionPolicySpec)> {
    let labels = &index.nodes.get(node)?.labels;
    index
        .policies
        .iter()
        .filter_map(|(name, policy)| Some((name, policy, policy.spec.as_ref().ok()?)))
        .filter(|(_, _, spec)| selects(Some(&spec.node_selector), labels))
        .min_by_key(|(name, policy, spec)| (std::cmp::Reverse(spec.priority), policy.meta.created, *name))
}

/// The rules as the node gets them. Rules that cannot be used (an older schema let them in) delete nothing; the API
/// server would not even take them in the NodeStore, and everything else of the node's would wait for it.
fn usable(rules: &PolicyRules) -> PolicyRules {
    match rules.check() {
        Ok(_) => rules.clone(),
        Err(_) => PolicyRules {
            suspend: true,
            ..PolicyRules::default()
        },
    }
}

/// The policy that the node has stays in force while it exists and cannot be read: another one, which it may have kept
/// away, could delete more.
fn unreadable_policy<'a>(index: &'a Index, node: &str) -> Option<&'a ProjectedPolicy> {
    let current = index.stores.get(node)?.spec.retention.as_ref()?;
    let policy = index.policies.get(&current.name)?;
    (policy.spec.is_err() && policy.meta.uid == current.uid).then_some(current)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::api::Parsed;

    fn spec_of(index: &Index, node: &str) -> NodeStoreSpec {
        match plan(index, node).0 {
            NodePlan::Write { spec, .. } => *spec,
            other => panic!("expected a write, got {other:?}"),
        }
    }

    fn names(spec: &NodeStoreSpec) -> Vec<&str> {
        spec.manifests.iter().map(|manifest| manifest.name.as_str()).collect()
    }

    #[test]
    fn a_node_gets_the_manifests_that_select_it_once_it_has_an_agent() {
        let mut index = Index::default();
        index.node(node("n1", &[("pool", "build")]));
        index.manifest(manifest("a", 1, serde_json::json!({"nodeSelector": {"pool": "build"}})));
        index.manifest(manifest("b", 2, serde_json::json!({"nodeSelector": {"pool": "other"}})));
        index.manifest(manifest("c", 3, serde_json::json!({})));
        assert_eq!(plan(&index, "n1").0, NodePlan::Keep, "no agent, no NodeStore");
        index.lease(lease("n1", 1), now());
        assert_eq!(names(&spec_of(&index, "n1")), ["a", "c"]);
    }

    #[test]
    fn nothing_is_written_when_the_node_store_is_as_it_should_be() {
        let mut index = world();
        let NodePlan::Write {
            uid: None,
            node_uid,
            spec,
        } = plan(&index, "n1").0
        else {
            panic!()
        };
        assert_eq!(node_uid, "uid-n1");
        index.store(store("n1", "uid-n1", *spec, Default::default()));
        assert_eq!(plan(&index, "n1").0, NodePlan::Keep);
    }

    #[test]
    fn the_store_of_an_earlier_node_of_the_name_is_replaced() {
        let mut index = world();
        index.store(store(
            "n1",
            "uid-of-another-node",
            NodeStoreSpec::default(),
            Default::default(),
        ));
        assert_eq!(
            plan(&index, "n1").0,
            NodePlan::Replace {
                uid: "uid-store-n1".into()
            }
        );
    }

    #[test]
    fn a_manifest_that_does_not_decode_stays_as_the_node_has_it() {
        let mut index = world();
        let before = spec_of(&index, "n1");
        index.store(store("n1", "uid-n1", before.clone(), Default::default()));
        index.manifest(undecodable("m"));
        assert_eq!(plan(&index, "n1").0, NodePlan::Keep);
        // One that no node ever had goes to none.
        index.manifest(undecodable("new"));
        assert_eq!(plan(&index, "n1").0, NodePlan::Keep);
    }

    #[test]
    fn the_newest_manifests_are_refused_by_a_full_node() {
        let mut index = world();
        for i in 0..MAX_NODE_MANIFESTS as i64 {
            index.manifest(manifest(&format!("x{i:03}"), 100 + i, serde_json::json!({})));
        }
        let (NodePlan::Write { spec, .. }, refused) = plan(&index, "n1") else {
            panic!()
        };
        assert_eq!(spec.manifests.len(), MAX_NODE_MANIFESTS);
        assert_eq!(refused, BTreeSet::from(["uid-x255".to_owned()]));
    }

    #[test]
    fn a_node_store_never_outgrows_its_bytes() {
        let mut index = world();
        let long = format!("/{}", "p".repeat(1000));
        for i in 0..250 {
            let source = serde_json::json!({"source": {"directory": {"path": long, "exclude": ["*".repeat(128)]}}});
            index.manifest(manifest(&format!("x{i:03}"), 100 + i, source));
        }
        let (NodePlan::Write { spec, .. }, refused) = plan(&index, "n1") else {
            panic!()
        };
        assert!(serde_json::to_vec(&spec).unwrap().len() < MAX_NODE_SPEC_BYTES + 1024);
        assert_eq!(spec.manifests.len() + refused.len(), 251);
        assert!(!refused.is_empty() && !refused.contains("uid-m"));
    }

    #[test]
    fn the_same_policy_governs_whatever_the_order() {
        let policies = [
            policy("b-old", 0, 10),
            policy("a-new", 0, 20),
            policy("low", -1, 1),
            policy("a-old", 0, 10),
        ];
        for rotation in 0..policies.len() {
            let mut index = world();
            for i in 0..policies.len() {
                index.policy(policies[(i + rotation) % policies.len()].clone());
            }
            assert_eq!(governing(&index, "n1").unwrap().0, "a-old");
            index.policy(policy("high", 1, 99));
            assert_eq!(spec_of(&index, "n1").retention.unwrap().name, "high");
        }
    }

    #[test]
    fn a_policy_that_stops_decoding_stays_in_force_where_it_was() {
        let mut index = world();
        index.policy(policy("p", 0, 1));
        let before = spec_of(&index, "n1");
        index.store(store("n1", "uid-n1", before, Default::default()));
        let mut broken: Parsed<crate::api::RetentionPolicy> = policy("p", 0, 1);
        broken.object = Err(invalid());
        index.policy(broken);
        assert_eq!(plan(&index, "n1").0, NodePlan::Keep);
        // Also beside another one, which it may have shadowed.
        index.policy(policy("other", 7, 1));
        assert_eq!(plan(&index, "n1").0, NodePlan::Keep);
        assert_eq!(governor(&index, "n1").unwrap(), "p");
        index.policy(policy("p", 0, 1));
        assert_eq!(spec_of(&index, "n1").retention.unwrap().name, "other");
    }

    #[test]
    fn a_policy_with_a_rule_that_cannot_be_used_is_in_force_and_deletes_nothing() {
        let mut index = world();
        let mut bad = policy("p", 0, 1);
        bad.object.as_mut().unwrap().spec.rules.max_age = Some("soon".into());
        index.policy(bad);
        let rules = spec_of(&index, "n1").retention.unwrap().rules;
        assert!(rules.suspend && rules.check().is_ok());
    }

    #[test]
    fn a_snapshot_goes_to_its_layers_node_and_stays_when_the_layer_goes() {
        let mut index = world();
        index.node(node("n2", &[]));
        index.lease(lease("n2", 1), now());
        index.layer(layer("l", "n2"));
        index.manifest(manifest(
            "snap",
            5,
            serde_json::json!({"source": {"layer": {"name": "l"}}}),
        ));
        assert_eq!(names(&spec_of(&index, "n1")), ["m"]);
        let spec = spec_of(&index, "n2");
        assert_eq!(names(&spec), ["m", "snap"]);
        index.store(store("n2", "uid-n2", spec, Default::default()));
        index.layer_gone(&ObjectKey::new("ns", "l"), "uid-l");
        assert_eq!(plan(&index, "n2").0, NodePlan::Keep);
        assert_eq!(names(&spec_of(&index, "n1")), ["m"]);
    }
}
