//! What is said of a RetentionPolicy: where it governs, and what its runs did.

use jiff::Timestamp;

use super::index::{Index, StoreFacts};
use super::plan_node::governor;
use crate::api::conditions::{OVER_LIMIT, SHADOWED, Verdict, Wanted, merge, reasons};
use crate::api::{PolicyNodeCounts, PolicyRules, RetentionPolicyStatus, RetentionState, RunSummary, selects};

/// The status as it should be. `None` when the policy is gone.
pub fn plan(index: &Index, name: &str, now: Timestamp) -> Option<RetentionPolicyStatus> {
    let policy = index.policies.get(name)?;
    let old = &policy.status;
    let generation = policy.meta.generation;
    let mut status = RetentionPolicyStatus {
        observed_generation: generation,
        last_handled_reconcile_at: old.last_handled_reconcile_at.clone(),
        ..Default::default()
    };
    let (verdict, more) = match &policy.spec {
        Err(invalid) => (
            Verdict::Stalled {
                reason: reasons::INVALID_SPEC,
                message: invalid.to_string(),
            },
            Vec::new(),
        ),
        Ok(spec) => {
            let selected: Vec<&String> = index
                .nodes
                .iter()
                .filter(|(node, facts)| index.has_agent(node) && selects(Some(&spec.node_selector), &facts.labels))
                .map(|(node, _)| node)
                .collect();
            let mut shadows: Vec<&str> = Vec::new();
            let mut governed: Vec<(&String, Option<&StoreFacts>)> = Vec::new();
            for node in selected.iter().copied() {
                match governor(index, node) {
                    Some(governor) if governor == name => governed.push((node, index.stores.get(node))),
                    Some(governor) => shadows.push(governor),
                    None => {}
                }
            }
            shadows.sort_unstable();
            shadows.dedup();
            // What a node says counts once it is about this policy as it is now.
            let about = |store: Option<&StoreFacts>| -> Option<RetentionState> {
                let state = store?.status.retention.clone()?;
                let current =
                    state.policy_uid.as_ref() == Some(&policy.meta.uid) && state.observed_generation == generation;
                current.then_some(state)
            };
            let mut states: Vec<(&str, RetentionState)> = governed
                .iter()
                .filter_map(|(node, store)| Some((node.as_str(), about(*store)?)))
                .collect();
            states.sort_by_key(|(node, _)| *node);
            let reachable = governed.iter().filter(|(node, _)| index.reachable(node)).count();
            let answered = states.iter().filter(|(node, _)| index.reachable(node)).count();
            let handled = states
                .iter()
                .filter(|(node, state)| index.reachable(node) && state.requested_at == policy.meta.requested_at)
                .count();
            if reachable > 0 && handled == reachable {
                status.last_handled_reconcile_at = policy.meta.requested_at.clone();
            }
            status.nodes = Some(PolicyNodeCounts {
                selected: selected.len() as i64,
                governed: governed.len() as i64,
                over_limit: states.iter().filter(|(_, state)| state.over_limit.is_some()).count() as i64,
                failed: states.iter().filter(|(_, state)| state.problem.is_some()).count() as i64,
            });
            // A run stays on record when the policy is edited; until the nodes answer, the old sums are all there is.
            status.last_run = sum(states.iter().filter_map(|(_, state)| state.last_run.as_ref()))
                .or_else(|| old.last_run.clone().filter(|_| answered < governed.len()));
            status.next_run = states
                .iter()
                .filter_map(|(_, state)| state.next_run.clone())
                .min_by_key(|time| time.0);
            let verdict = match spec.rules.check() {
                Err(invalid) => Verdict::Stalled {
                    reason: reasons::INVALID_SPEC,
                    message: invalid.to_string(),
                },
                Ok(_) => verdict(
                    &spec.rules,
                    selected.len(),
                    governed.len(),
                    reachable,
                    answered,
                    &shadows,
                    &states,
                ),
            };
            (verdict, extras(&shadows, &states))
        }
    };
    let mut wanted = verdict.conditions();
    wanted.extend(more);
    status.conditions = merge(&old.conditions, wanted, generation, now);
    Some(status)
}

fn verdict(
    rules: &PolicyRules,
    selected: usize,
    governed: usize,
    reachable: usize,
    answered: usize,
    shadows: &[&str],
    states: &[(&str, RetentionState)],
) -> Verdict {
    if selected == 0 {
        let message = "no node with a larder agent is selected".to_owned();
        return Verdict::Progressing {
            reason: reasons::NO_NODES,
            message,
        };
    }
    if governed == 0 {
        let message = format!("{} governs every selected node", shadows.join(", "));
        return Verdict::Ready {
            reason: reasons::SHADOWED_BY,
            message,
        };
    }
    if let Some((node, problem)) = states
        .iter()
        .find_map(|(node, state)| Some((node, state.problem.as_ref()?)))
    {
        return Verdict::Progressing {
            reason: reasons::RUN_FAILED,
            message: format!("node {node}: {problem}"),
        };
    }
    if reachable == 0 {
        let message = format!("none of {governed} governed nodes can be reached");
        return Verdict::Progressing {
            reason: reasons::NODES_UNREACHABLE,
            message,
        };
    }
    if answered < reachable {
        let message = format!("{answered} of {governed} nodes have taken the policy over");
        return Verdict::Progressing {
            reason: reasons::APPLYING,
            message,
        };
    }
    let mut message = match governed == selected {
        true => format!("governs {governed} nodes"),
        false => format!(
            "governs {governed} of {selected} selected nodes; {} governs the others",
            shadows.join(", ")
        ),
    };
    if rules.suspend {
        message += "; spec.suspend: no runs, and none of another policy on these nodes";
        return Verdict::Ready {
            reason: reasons::SUSPENDED,
            message,
        };
    }
    if rules.dry_run {
        message += "; spec.dryRun: runs delete nothing";
    }
    Verdict::Ready {
        reason: reasons::GOVERNING,
        message,
    }
}

fn extras(shadows: &[&str], states: &[(&str, RetentionState)]) -> Vec<Wanted> {
    let mut extras = Vec::new();
    if !shadows.is_empty() {
        let message = format!("{} governs nodes that this policy selects", shadows.join(", "));
        extras.push(Wanted {
            kind: SHADOWED,
            status: true,
            reason: reasons::SHADOWED_BY,
            message,
        });
    }
    let over: Vec<_> = states
        .iter()
        .filter_map(|(node, state)| Some((node, state.over_limit.as_ref()?)))
        .collect();
    if let Some((node, causes)) = over.first() {
        let message = format!(
            "{} nodes are over the limit with live content alone; first node {node}: {causes}",
            over.len()
        );
        extras.push(Wanted {
            kind: OVER_LIMIT,
            status: true,
            reason: reasons::LIVE_CONTENT,
            message,
        });
    }
    extras
}

/// The runs of all nodes together. After an edit of `dryRun` nodes follow one by one: those count that made a run of the
/// latest one's kind, since what went and what would go make no sum.
fn sum<'a>(runs: impl Iterator<Item = &'a RunSummary> + Clone) -> Option<RunSummary> {
    let dry_run = runs.clone().max_by_key(|run| run.time.0)?.dry_run;
    runs.filter(|run| run.dry_run == dry_run).cloned().reduce(|a, b| {
        let freed_bytes = a.freed_bytes.saturating_add(b.freed_bytes);
        RunSummary {
            time: if a.time.0 >= b.time.0 { a.time } else { b.time },
            scanned_blobs: a.scanned_blobs.saturating_add(b.scanned_blobs),
            deleted_blobs: a.deleted_blobs.saturating_add(b.deleted_blobs),
            freed_bytes,
            freed: RunSummary::freed_text(freed_bytes.unsigned_abs(), dry_run),
            dropped_revisions: a.dropped_revisions.saturating_add(b.dropped_revisions),
            dry_run,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan_node::{self, NodePlan};
    use super::super::testing::*;
    use super::*;
    use crate::api::NodeStoreStatus;
    use crate::api::conditions::{READY, find, is_true};
    use serde_json::json;

    fn answer(index: &mut Index, node: &str, fields: serde_json::Value) {
        let spec = match plan_node::plan(index, node).0 {
            NodePlan::Write { spec, .. } => *spec,
            _ => index.stores[node].spec.clone(),
        };
        let mut state =
            json!({"policyUid": spec.retention.as_ref().map(|policy| policy.uid.clone()), "observedGeneration": 1});
        for (field, value) in fields.as_object().unwrap() {
            state[field] = value.clone();
        }
        let status: NodeStoreStatus =
            serde_json::from_value(json!({"observedGeneration": 1, "retention": state})).unwrap();
        index.store(store(node, &format!("uid-{node}"), spec, status));
    }

    fn run(second: i64, freed: i64) -> serde_json::Value {
        json!({"time": Timestamp::from_second(second).unwrap().to_string(), "scannedBlobs": 10, "deletedBlobs": 2, "freedBytes": freed,
               "freed": "x", "droppedRevisions": 1, "dryRun": false})
    }

    fn reason(status: &RetentionPolicyStatus) -> (&str, &str) {
        let ready = find(&status.conditions, READY).unwrap();
        (&ready.status, &ready.reason)
    }

    #[test]
    fn a_policy_governs_and_sums_its_nodes_runs_up() {
        let mut index = world();
        index.node(node("n2", &[]));
        index.lease(lease("n2", 1), now());
        index.policy(policy("p", 0, 1));
        assert_eq!(
            reason(&plan(&index, "p", Timestamp::UNIX_EPOCH).unwrap()),
            ("False", "Applying")
        );
        answer(&mut index, "n1", json!({"lastRun": run(100, 1000)}));
        answer(&mut index, "n2", json!({"lastRun": run(200, 24)}));
        let status = plan(&index, "p", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(reason(&status), ("True", "Governing"));
        let last = status.last_run.unwrap();
        assert_eq!(
            (
                last.time.0.as_second(),
                last.deleted_blobs,
                last.freed_bytes,
                last.freed.as_str()
            ),
            (200, 4, 1024, "1Ki")
        );
        // An edit made it a dry run, which the other node has not made yet.
        let mut dry = run(300, 2048);
        (dry["dryRun"], dry["freed"]) = (json!(true), json!("2Ki (dry run)"));
        answer(&mut index, "n1", json!({"lastRun": dry}));
        let last = plan(&index, "p", Timestamp::UNIX_EPOCH).unwrap().last_run.unwrap();
        assert_eq!(
            (last.dry_run, last.deleted_blobs, last.freed.as_str()),
            (true, 2, "2Ki (dry run)")
        );
        assert_eq!(
            status.nodes.unwrap(),
            PolicyNodeCounts {
                selected: 2,
                governed: 2,
                over_limit: 0,
                failed: 0
            }
        );
    }

    #[test]
    fn a_shadowed_policy_says_by_which() {
        let mut index = world();
        index.policy(policy("p", 0, 1));
        index.policy(policy("q", 5, 2));
        let status = plan(&index, "p", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(reason(&status), ("True", "ShadowedBy"));
        let shadowed = find(&status.conditions, SHADOWED).unwrap();
        assert!(
            shadowed.status == "True" && shadowed.message.contains('q'),
            "{}",
            shadowed.message
        );
        assert_eq!(status.nodes.unwrap().governed, 0);
    }

    #[test]
    fn what_keeps_a_node_from_deleting_is_said() {
        let mut index = world();
        index.policy(policy("p", 0, 1));
        answer(
            &mut index,
            "n1",
            json!({"problem": "manifests/ab cannot be read", "overLimit": "live manifests 5Gi"}),
        );
        let status = plan(&index, "p", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(reason(&status), ("False", "RunFailed"));
        assert!(is_true(&status.conditions, OVER_LIMIT));
        let nodes = status.nodes.unwrap();
        assert_eq!((nodes.over_limit, nodes.failed), (1, 1));
    }

    #[test]
    fn an_answer_about_another_generation_does_not_count() {
        let mut index = world();
        index.policy(policy("p", 0, 1));
        answer(
            &mut index,
            "n1",
            json!({"observedGeneration": 0, "lastRun": run(100, 5)}),
        );
        let status = plan(&index, "p", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!((reason(&status), &status.last_run), (("False", "Applying"), &None));
    }
}
