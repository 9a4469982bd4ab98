use super::*;
use serde_json::json;

pub const UID: &str = "6f1ed002-ab59-4a7c-8a5d-0123456789ab";

pub fn observed(change: serde_json::Value) -> Observed {
    let mut object = json!({
        "metadata": {"name": "l", "namespace": "ns", "uid": UID, "generation": 1, "resourceVersion": "1",
                     "finalizers": ["larder.dev/layer"]},
        "spec": {"manifest": {"name": "m"}, "nodeName": "n", "sizeLimit": "1Gi"}
    });
    for (part, fields) in change.as_object().unwrap() {
        for (field, value) in fields.as_object().unwrap() {
            object[part][field] = value.clone();
        }
    }
    Observed::of(serde_json::from_value(object).unwrap()).unwrap()
}

fn decide(observed: &Observed, placed: Option<Option<TreeDigest>>) -> Step {
    step(
        &ObjectKey::new("ns", "l"),
        observed,
        placed,
        Recorded::No,
        "store-1",
        false,
        false,
    )
}

fn reason(step: Step) -> &'static str {
    match step {
        Step::Say(outcome) => outcome.verdict().reason(),
        other => panic!("expected words, got {other:?}"),
    }
}

#[test]
fn a_layer_is_held_before_anything_is_made() {
    let tree = TreeDigest::from_bytes([7; 32]);
    let free = observed(json!({"metadata": {"finalizers": []}}));
    assert_eq!(decide(&free, Some(Some(tree))), Step::Finalizers(&["larder.dev/layer"]));
    let Step::Prepare { spec, grow } = decide(&observed(json!({})), Some(Some(tree))) else {
        panic!()
    };
    assert_eq!((spec.tree, spec.size, grow), (tree, Some(1 << 30), None));
    assert_eq!(spec.id.as_str(), UID);
}

#[test]
fn a_layer_keeps_the_tree_that_it_was_made_over_and_its_data() {
    let [first, second] = [7, 8].map(|byte| TreeDigest::from_bytes([byte; 32]));
    let observed = observed(json!({"status": {"observedGeneration": 1, "storeId": "store-0"}}));
    let spec = LayerSpec {
        id: UID.parse().unwrap(),
        owner: LayerOwner::object("ns", "l"),
        tree: first,
        mode: Mode::Overlay,
        size: Some(1 << 20),
        ids: None,
    };
    let record = LayerRecord::new(&spec, spec.size, "store-1");
    // Built anew, not stored any more, deleted.
    for placed in [Some(Some(second)), Some(None), None] {
        let step = step(
            &ObjectKey::new("ns", "l"),
            &observed,
            placed,
            Recorded::As(&record),
            "store-1",
            false,
            false,
        );
        let Step::Prepare { spec, grow } = step else {
            panic!("{step:?}")
        };
        assert_eq!((spec.tree, grow), (first, Some(1 << 30)));
    }
}

#[test]
fn a_layer_waits_for_its_tree_and_says_for_what() {
    assert_eq!(reason(decide(&observed(json!({})), None)), "NotPlaced");
    assert_eq!(reason(decide(&observed(json!({})), Some(None))), "ManifestNotReady");
}

#[test]
fn a_wiped_disk_is_said_and_not_silently_filled_anew() {
    let lost = observed(json!({"status": {"observedGeneration": 1, "storeId": "store-0"}}));
    assert_eq!(
        reason(decide(&lost, Some(Some(TreeDigest::from_bytes([7; 32]))))),
        "DataLost"
    );
}

#[test]
fn a_deleted_layer_loses_its_finalizer_when_it_has_been_released_whatever_is_recorded() {
    let deleted = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let mut other = deleted.clone();
    other["metadata"]["finalizers"] = json!(["other/one"]);
    let (held, other) = (observed(deleted), observed(other));
    let decide = |observed: &Observed, released| {
        step(
            &ObjectKey::new("ns", "l"),
            observed,
            None,
            Recorded::Unknown,
            "store-1",
            true,
            released,
        )
    };
    let release = Step::Release {
        id: UID.parse().unwrap(),
        detach: true,
    };
    assert_eq!(decide(&held, false), release);
    assert_eq!(decide(&held, true), Step::Finalizers(&[]));
    assert_eq!(decide(&other, false), Step::Nothing);
    assert_eq!(decide(&other, true), Step::Nothing);
}

#[test]
fn of_a_layer_that_was_made_here_the_disk_is_asked_before_it_is_made_over_another_tree() {
    let tree = TreeDigest::from_bytes([7; 32]);
    let [new, made] = [
        json!({}),
        json!({"status": {"observedGeneration": 1, "storeId": "store-1"}}),
    ]
    .map(observed);
    let decide = |observed: &Observed, placed, recorded| {
        let key = ObjectKey::new("ns", "l");
        step(&key, observed, placed, recorded, "store-1", false, false)
    };
    let id = UID.parse().unwrap();
    for placed in [Some(Some(tree)), Some(None), None] {
        assert_eq!(
            decide(&made, placed, Recorded::Unknown),
            Step::Recall {
                id: LayerId::clone(&id)
            }
        );
        let (of_new, of_made) = (
            decide(&new, placed, Recorded::Unknown),
            decide(&made, placed, Recorded::No),
        );
        assert_eq!(of_new, of_made, "{placed:?}");
    }
}

#[test]
fn a_layer_that_does_not_decode_can_be_deleted() {
    let object = |deleting: bool| -> Parsed<WritableLayer> {
        let mut object = json!({
            "metadata": {"name": "l", "namespace": "ns", "uid": UID, "finalizers": ["larder.dev/layer"]},
            "spec": {"manifest": {"name": "m"}, "nodeName": "n", "mode": "Unheard"}
        });
        if deleting {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        serde_json::from_value(object).unwrap()
    };
    assert_eq!(Observed::of(object(false)).unwrap_err().field, "spec.mode");
    let observed = Observed::of(object(true)).unwrap();
    assert!(!observed.decodes);
    let key = ObjectKey::new("ns", "l");
    let decide = |released| step(&key, &observed, None, Recorded::Unknown, "store-1", false, released);
    let id = UID.parse().unwrap();
    assert_eq!(decide(false), Step::Release { id, detach: false });
    assert_eq!(decide(true), Step::Finalizers(&[]));
}

#[test]
fn a_bad_size_that_is_stored_is_named() {
    let Step::Say(outcome) = decide(&observed(json!({"spec": {"sizeLimit": {"a": 1}}})), Some(None)) else {
        panic!()
    };
    assert!(outcome.verdict().message().contains("spec.sizeLimit"), "{outcome:?}");
}
