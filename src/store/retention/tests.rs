use proptest::prelude::*;

use super::*;
use crate::store::testing::at;

const DAY: u64 = 24 * 3600;
const NOW: u64 = 1000 * DAY;

fn days_ago(days: u64) -> SystemTime {
    at(NOW - days * DAY)
}

fn blob(number: u8, size: u64, unused_days: u64) -> BlobFact {
    BlobFact {
        digest: Digest::from_bytes([number; 32]),
        size,
        last_used: days_ago(unused_days),
        leased: false,
        present: true,
    }
}

fn manifest(number: u8, live: Option<Live>, unused_days: u64, blobs: &[u32]) -> ManifestFact {
    ManifestFact {
        needed_by: Vec::new(),
        tree: TreeDigest::from_bytes([number; 32]),
        size: 10,
        live,
        unused_since: days_ago(unused_days),
        blobs: blobs.to_vec(),
    }
}

fn image(number: u8, size: u64, in_use: bool, unused_days: u64) -> ImageFact {
    ImageFact {
        name: format!("image-{number}"),
        tree: TreeDigest::from_bytes([number; 32]),
        size,
        in_use,
        last_used: days_ago(unused_days),
    }
}

fn policy(max_age_days: Option<u64>) -> Policy {
    Policy {
        max_age: max_age_days.map(|days| Duration::from_secs(days * DAY)),
        ..Policy::built_in()
    }
}

fn planned(policy: &Policy, facts: &Facts) -> Plan {
    plan(policy, facts, at(NOW))
}

#[test]
fn the_built_in_policy_takes_only_unreferenced_blobs_after_24_hours() {
    let facts = Facts {
        manifests: vec![
            manifest(1, Some(Live::Current), 900, &[0]),
            manifest(2, None, 900, &[1]),
        ],
        blobs: vec![
            blob(0, 1, 900),
            blob(1, 1, 900),
            blob(2, 1, 900),
            blob(3, 1, 1),
            blob(4, 1, 0),
        ],
        ..Facts::default()
    };
    let plan = planned(&Policy::built_in(), &facts);
    assert_eq!(plan.manifests, []);
    assert_eq!(plan.blobs, [(2, Reason::Unreferenced), (3, Reason::Unreferenced)]);
    assert_eq!(plan.over_limit, None);
}

#[test]
fn history_goes_when_it_was_not_used_for_max_age() {
    let facts = Facts {
        manifests: vec![
            manifest(1, None, 30, &[0, 1]),
            manifest(2, None, 29, &[1, 2]),
            manifest(3, Some(Live::InUse), 500, &[3]),
            manifest(4, Some(Live::Current), 500, &[3]),
        ],
        blobs: vec![blob(0, 1, 40), blob(1, 1, 40), blob(2, 1, 40), blob(3, 1, 900)],
        ..Facts::default()
    };
    let plan = planned(&policy(Some(30)), &facts);
    assert_eq!(plan.manifests, [(0, Reason::MaxAge)]);
    assert_eq!(
        plan.blobs,
        [(0, Reason::Unreferenced)],
        "blob 1 is still named by history"
    );
}

#[test]
fn a_blob_of_dropped_history_that_was_used_lately_stays_a_while() {
    let facts = Facts {
        manifests: vec![manifest(1, None, 40, &[0, 1])],
        blobs: vec![blob(0, 1, 10), blob(1, 1, 40)],
        ..Facts::default()
    };
    assert_eq!(planned(&policy(Some(30)), &facts).blobs, [(1, Reason::Unreferenced)]);
}

#[test]
fn fresh_and_leased_blobs_stay() {
    let mut facts = Facts {
        blobs: vec![blob(0, 1, 5), blob(1, 1, 5), blob(2, 1, 5)],
        ..Facts::default()
    };
    facts.blobs[1].leased = true;
    facts.blobs[2].last_used = at(NOW - 59);
    let policy = Policy {
        max_age: Some(Duration::ZERO),
        grace: Duration::from_secs(60),
        max_size: Some(0),
        ..Policy::built_in()
    };
    let plan = planned(&policy, &facts);
    assert_eq!(plan.blobs, [(0, Reason::Unreferenced)]);
    let causes = plan.over_limit.unwrap().causes;
    assert_eq!((causes.building, causes.fresh), (1, 1));
}

#[test]
fn a_time_in_the_future_counts_as_now() {
    let mut facts = Facts {
        manifests: vec![manifest(1, None, 0, &[])],
        blobs: vec![blob(0, 1, 0)],
        ..Facts::default()
    };
    facts.blobs[0].last_used = at(NOW + 500 * DAY);
    facts.manifests[0].unused_since = at(NOW + 500 * DAY);
    assert_eq!(planned(&policy(Some(1)), &facts), Plan::default());
    let none = Policy {
        grace: Duration::ZERO,
        ..policy(Some(0))
    };
    assert_eq!(
        planned(&none, &facts).blobs.len(),
        1,
        "an age is never negative: 0 is not below 0"
    );
}

#[test]
fn too_few_copies_take_history_with_them_until_nothing_changes() {
    // 2 names a and b, 3 names b and c, 4 names c and d: a goes, so 2, so b, so 3, so c, so 4 – but d is young.
    let facts = Facts {
        manifests: vec![
            manifest(2, None, 5, &[0, 1]),
            manifest(3, None, 5, &[1, 2]),
            manifest(4, None, 5, &[2, 3]),
            manifest(5, None, 5, &[4, 5]),
            manifest(6, None, 5, &[4, 5]),
            manifest(7, Some(Live::Current), 5, &[6]),
        ],
        blobs: (0..7)
            .map(|number| blob(number, 1, if number == 3 { 5 } else { 50 }))
            .collect(),
        ..Facts::default()
    };
    let two = Policy {
        min_copies: 2,
        ..policy(Some(30))
    };
    let plan = planned(&two, &facts);
    assert_eq!(plan.manifests, [0, 1, 2].map(|index| (index, Reason::Incomplete)));
    assert_eq!(
        plan.blobs.iter().map(|(index, _)| *index).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    // With one copy as the rule nothing goes, and without an age only what nothing names could.
    assert_eq!(planned(&policy(Some(30)), &facts), Plan::default());
    let ageless = Policy {
        min_copies: 2,
        ..policy(None)
    };
    assert_eq!(planned(&ageless, &facts), Plan::default());
}

#[test]
fn what_is_too_old_goes_for_its_age_even_if_it_also_lost_a_blob() {
    let mut facts = Facts {
        manifests: vec![manifest(1, None, 40, &[0]), manifest(2, None, 50, &[0])],
        blobs: vec![blob(0, 1, 60)],
        ..Facts::default()
    };
    let two = Policy {
        min_copies: 2,
        ..policy(Some(30))
    };
    for _ in 0..2 {
        let plan = planned(&two, &facts);
        assert_eq!(plan.manifests, [0, 1].map(|index| (index, Reason::MaxAge)));
        assert_eq!(plan.blobs, [(0, Reason::Unreferenced)]);
        facts.manifests.reverse();
    }
}

#[test]
fn blobs_that_go_together_go_for_one_reason() {
    let facts = Facts {
        manifests: vec![manifest(1, None, 5, &[0, 1])],
        blobs: vec![blob(0, 1, 50), blob(1, 1, 50)],
        ..Facts::default()
    };
    let two = Policy {
        min_copies: 2,
        ..policy(Some(30))
    };
    let plan = planned(&two, &facts);
    assert_eq!(plan.blobs, [0, 1].map(|index| (index, Reason::MinCopies)));
}

#[test]
fn no_copies_asked_for_means_that_unreferenced_blobs_stay() {
    let facts = Facts {
        blobs: vec![blob(0, 1, 500)],
        ..Facts::default()
    };
    let zero = Policy {
        min_copies: 0,
        ..policy(Some(1))
    };
    assert_eq!(planned(&zero, &facts), Plan::default());
}

fn full() -> Facts {
    Facts {
        manifests: vec![
            manifest(1, Some(Live::Current), 1, &[0]),
            manifest(2, None, 20, &[0, 1]),
            manifest(3, None, 10, &[2]),
        ],
        blobs: vec![blob(0, 100, 90), blob(1, 100, 90), blob(2, 100, 90), blob(3, 100, 15)],
        images: vec![image(1, 50, true, 9), image(2, 50, false, 9), image(3, 50, false, 8)],
        free: 1000,
        ..Facts::default()
    }
}

fn by_size(max_size: u64) -> Policy {
    Policy {
        max_size: Some(max_size),
        // So that nothing goes by age.
        max_age: Some(Duration::from_secs(900 * DAY)),
        ..Policy::built_in()
    }
}

#[test]
fn over_the_size_images_go_first_then_the_longest_unused() {
    // 400 of blobs, 30 of manifests, 150 of images.
    let goes = |max_size| {
        let plan = planned(&by_size(max_size), &full());
        let indices = |list: &[(usize, Reason)]| {
            assert!(list.iter().all(|(_, reason)| *reason == Reason::MaxSize));
            list.iter().map(|(index, _)| *index).collect::<Vec<_>>()
        };
        let over = plan.over_limit.is_some();
        (
            indices(&plan.images),
            indices(&plan.manifests),
            indices(&plan.blobs),
            over,
        )
    };
    assert_eq!(goes(580), (vec![], vec![], vec![], false));
    assert_eq!(goes(579), (vec![1], vec![], vec![], false));
    assert_eq!(goes(529), (vec![1, 2], vec![], vec![], false));
    // History 20 days unused, then its blob (unused for longer than anything else); blob 0 is live.
    assert_eq!(goes(470), (vec![1, 2], vec![1], vec![], false));
    assert_eq!(goes(469), (vec![1, 2], vec![1], vec![1], false));
    assert_eq!(goes(300), (vec![1, 2], vec![1], vec![1, 3], false));
    assert_eq!(goes(160), (vec![1, 2], vec![1, 2], vec![1, 2, 3], false));
    assert_eq!(goes(159), (vec![1, 2], vec![1, 2], vec![1, 2, 3], true));
}

#[test]
fn what_is_left_over_the_limit_is_told_by_cause() {
    let mut facts = full();
    facts.manifests.push(manifest(4, Some(Live::InUse), 0, &[0, 3]));
    let over = planned(&by_size(10), &facts).over_limit.unwrap();
    let causes = Causes {
        current: 100,
        in_use: 100,
        manifests: 20,
        images: 50,
        ..Causes::default()
    };
    assert_eq!(over.causes, causes);
    assert_eq!(
        (over.size, over.max_size, over.free, over.min_free),
        (270, Some(10), 1320, None)
    );
}

#[test]
fn too_little_free_space_works_like_too_much_size() {
    let mut facts = full();
    facts.free = 90;
    let min_free = |bytes| Policy {
        min_free: Some(bytes),
        max_size: None,
        ..by_size(0)
    };
    assert_eq!(planned(&min_free(90), &facts), Plan::default());
    let plan = planned(&min_free(140), &facts);
    assert_eq!((plan.images, plan.manifests), (vec![(1, Reason::MinFree)], vec![]));
    (facts.orphans, facts.expired) = (20, 30);
    assert_eq!(planned(&min_free(140), &facts), Plan::default(), "these go anyhow");
    assert!(planned(&min_free(100_000), &facts).over_limit.is_some());
}

#[test]
fn an_image_goes_with_its_manifest_but_not_while_in_use() {
    let mut facts = full();
    facts.images.push(image(9, 5, false, 0));
    facts.images.push(image(8, 5, true, 0));
    let plan = planned(&policy(Some(15)), &facts);
    assert_eq!(plan.manifests, [(1, Reason::MaxAge)]);
    assert_eq!(plan.images, [(1, Reason::Orphaned), (3, Reason::Orphaned)]);
}

#[test]
fn history_within_its_grace_is_not_dropped_for_its_size() {
    let facts = Facts {
        manifests: vec![manifest(1, None, 0, &[0])],
        blobs: vec![blob(0, 100, 5)],
        ..Facts::default()
    };
    let plan = planned(&by_size(1), &facts);
    assert_eq!((plan.manifests, plan.blobs), (vec![], vec![]));
    assert_eq!(plan.over_limit.unwrap().causes.history, 100);
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let blob = (0u64..60, 0u64..50, any::<bool>(), 0u8..20)
        .prop_map(|(size, days, present, leased)| (size, days, present, leased == 0));
    let manifest = (0u8..6, 0u64..50, prop::collection::btree_set(0u32..24, 0..8));
    let image = (0u8..12, 0u64..40, 0u64..50, any::<bool>());
    (
        prop::collection::vec(blob, 24),
        prop::collection::vec(manifest, 0..10),
        prop::collection::vec(image, 0..6),
        (0u64..500, 0u64..50, 0u64..50),
    )
        .prop_map(|(blobs, manifests, images, (free, orphans, expired))| Facts {
            total: 10_000,
            blobs: (0u8..)
                .zip(blobs)
                .map(|(number, (size, days, present, leased))| BlobFact {
                    leased,
                    present,
                    ..super::tests::blob(number, size, days)
                })
                .collect(),
            manifests: (0u8..)
                .zip(manifests)
                .map(|(number, (live, days, blobs))| {
                    let live = match live {
                        0 => Some(Live::Current),
                        1 => Some(Live::InUse),
                        _ => None,
                    };
                    super::tests::manifest(number, live, days, &Vec::from_iter(blobs))
                })
                .collect(),
            images: (0u8..)
                .zip(images)
                .map(|(number, (tree, size, days, in_use))| ImageFact {
                    name: format!("image-{number}"),
                    ..super::tests::image(tree, size, in_use, days)
                })
                .collect(),
            orphans,
            expired,
            free,
        })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (
        prop::option::of(0u64..40),
        prop::option::of(0u64..800),
        prop::option::of(0u64..800),
        0u32..4,
        0u64..5,
    )
        .prop_map(|(days, max_size, min_free, min_copies, grace_days)| Policy {
            max_age: days.map(|days| Duration::from_secs(days * DAY)),
            max_size,
            min_free,
            min_copies,
            grace: Duration::from_secs(grace_days * DAY),
        })
}

type Names = (Vec<(TreeDigest, Reason)>, Vec<(Digest, Reason)>, Vec<(String, Reason)>);

/// What a plan takes and why, whatever the order of the facts.
fn names(facts: &Facts, plan: &Plan) -> Names {
    fn sorted<T: Ord>(taken: &[(usize, Reason)], name: impl Fn(usize) -> T) -> Vec<(T, Reason)> {
        let mut names: Vec<_> = taken.iter().map(|(index, reason)| (name(*index), *reason)).collect();
        names.sort();
        names
    }
    (
        sorted(&plan.manifests, |index| facts.manifests[index].tree),
        sorted(&plan.blobs, |index| facts.blobs[index].digest),
        sorted(&plan.images, |index| facts.images[index].name.clone()),
    )
}

fn is_part(small: &[(usize, Reason)], large: &[(usize, Reason)]) -> bool {
    let large: std::collections::HashSet<usize> = large.iter().map(|(index, _)| *index).collect();
    small.iter().all(|(index, _)| large.contains(index))
}

/// The facts once the plan is carried out.
fn after(facts: &Facts, plan: &Plan) -> Facts {
    let mut facts = facts.clone();
    facts.free += std::mem::take(&mut facts.orphans) + std::mem::take(&mut facts.expired);
    for (index, _) in &plan.blobs {
        facts.blobs[*index].present = false;
        facts.free += facts.blobs[*index].size;
    }
    for (index, _) in plan.manifests.iter().rev() {
        facts.free += facts.manifests.remove(*index).size;
    }
    for (index, _) in plan.images.iter().rev() {
        facts.free += facts.images.remove(*index).size;
    }
    facts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_live_is_ever_in_a_plan(facts in any_facts(), policy in any_policy()) {
        let plan = planned(&policy, &facts);
        for (index, _) in &plan.manifests {
            prop_assert_eq!(facts.manifests[*index].live, None);
        }
        let gone: std::collections::HashSet<usize> = plan.manifests.iter().map(|(index, _)| *index).collect();
        for (index, _) in &plan.blobs {
            let blob = &facts.blobs[*index];
            prop_assert!(blob.present && !blob.leased);
            prop_assert!(age(at(NOW), blob.last_used) >= policy.grace);
            // A manifest that stays is complete.
            for (number, manifest) in facts.manifests.iter().enumerate() {
                prop_assert!(gone.contains(&number) || !manifest.blobs.contains(&(*index as u32)));
            }
        }
        for (index, _) in &plan.images {
            prop_assert!(!facts.images[*index].in_use);
        }
    }

    #[test]
    fn a_second_run_deletes_nothing_more(facts in any_facts(), policy in any_policy()) {
        let first = planned(&policy, &facts);
        let second = planned(&policy, &after(&facts, &first));
        prop_assert_eq!((second.manifests, second.blobs, second.images), (vec![], vec![], vec![]));
        prop_assert_eq!(second.over_limit, first.over_limit);
    }

    #[test]
    fn the_limits_are_kept_or_it_is_said_that_they_are_not(facts in any_facts(), policy in any_policy()) {
        let plan = planned(&policy, &facts);
        let left = after(&facts, &plan);
        let sizes = left.blobs.iter().filter(|blob| blob.present).map(|blob| blob.size);
        let size: u64 = sizes.chain(left.manifests.iter().map(|one| one.size)).chain(left.images.iter().map(|one| one.size)).sum();
        let is_over = policy.max_size.is_some_and(|most| size > most) || policy.min_free.is_some_and(|least| left.free < least);
        prop_assert_eq!(plan.over_limit.as_ref().map(|over| (over.size, over.free)), is_over.then_some((size, left.free)));
    }

    #[test]
    fn the_order_of_the_facts_does_not_matter(
        facts in any_facts(),
        policy in any_policy(),
        keys in prop::collection::vec(any::<u32>(), 64),
    ) {
        let mut order: Vec<usize> = (0..facts.blobs.len()).collect();
        order.sort_by_key(|index| keys[*index]);
        let mut shuffled = facts.clone();
        shuffled.blobs = order.iter().map(|index| facts.blobs[*index].clone()).collect();
        let new_index = |old: u32| order.iter().position(|index| *index == old as usize).unwrap() as u32;
        for manifest in &mut shuffled.manifests {
            manifest.blobs = manifest.blobs.iter().map(|old| new_index(*old)).collect();
        }
        shuffled.manifests.reverse();
        shuffled.images.reverse();
        let (one, other) = (planned(&policy, &facts), planned(&policy, &shuffled));
        prop_assert_eq!(names(&facts, &one), names(&shuffled, &other));
        prop_assert_eq!(one.over_limit, other.over_limit);
    }

    #[test]
    fn a_smaller_size_takes_at_least_as_much(
        facts in any_facts(),
        policy in any_policy(),
        one in 0u64..800,
        other in 0u64..800,
    ) {
        let with = |max_size| planned(&Policy { max_size: Some(max_size), ..policy.clone() }, &facts);
        let (small, large) = (with(one.min(other)), with(one.max(other)));
        prop_assert!(is_part(&large.manifests, &small.manifests));
        prop_assert!(is_part(&large.blobs, &small.blobs));
        prop_assert!(is_part(&large.images, &small.images));
    }
}
