use super::*;
use serde_json::json;

fn policy(rules: serde_json::Value) -> ProjectedPolicy {
    serde_json::from_value(json!({"name": "p", "uid": "u", "generation": 1, "rules": rules})).unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn report(complete: bool) -> Report {
    let at = "2026-01-01T12:00:00Z";
    serde_json::from_value(json!({
        "dryRun": false, "complete": complete, "started": at, "finished": at, "scannedBlobs": 0, "deletedBlobs": 0,
        "freedBytes": 0, "droppedHistory": [], "decisions": [], "overLimit": null, "blocked": [], "missingBlobs": 0,
    }))
    .unwrap()
}

fn ran(memory: &mut Memory, time: &str) {
    (memory.tried, memory.edited) = (Some(at(time)), false);
}

#[test]
fn a_schedule_runs_from_when_the_policy_was_first_seen_and_a_missed_run_is_made_up_once() {
    let policy = policy(json!({"schedule": "0 3 * * *"}));
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&policy), "n", at("2026-01-01T12:00:00Z"));
    assert_eq!(memory.state.next_run, Some(Time(at("2026-01-02T03:00:00Z"))));
    assert_eq!(
        due(&memory, Some(&policy), "n", at("2026-01-01T12:00:01Z")),
        Due::At(at("2026-01-02T03:00:00Z"))
    );
    // Three days later the agent comes back.
    assert_eq!(
        due(&memory, Some(&policy), "n", at("2026-01-04T10:00:00Z")),
        Due::Now(Trigger::Schedule)
    );
    ran(&mut memory, "2026-01-04T10:00:00Z");
    assert_eq!(
        due(&memory, Some(&policy), "n", at("2026-01-04T10:00:01Z")),
        Due::At(at("2026-01-05T03:00:00Z"))
    );
}

#[test]
fn a_restart_repeats_no_run() {
    let mut policy = policy(json!({"schedule": "0 3 * * *"}));
    policy.requested_at = Some("1".into());
    let mut memory = Memory::default();
    let now = at("2026-01-02T03:00:00Z");
    adopt(&mut memory, Some(&policy), "n", now);
    note(&mut memory, policy.requested_at.clone(), Ok(&report(true)), now);
    let mut after: Memory = serde_json::from_str(&serde_json::to_string(&memory).unwrap()).unwrap();
    assert_eq!(after, memory);
    let later = at("2026-01-02T03:00:05Z");
    adopt(&mut after, Some(&policy), "n", later);
    assert_eq!(
        due(&after, Some(&policy), "n", later),
        Due::At(at("2026-01-03T03:00:00Z"))
    );
}

/// However the clock was set, and whenever the agent looked: in the next day there is one run, at its time.
#[test]
fn a_day_of_a_right_clock_has_one_run_whatever_it_was_before() {
    use rand::{Rng, SeedableRng};
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let policy = policy(json!({"schedule": "0 3 * * *", "timeZone": "Europe/Berlin"}));
    let hour = jiff::SignedDuration::from_hours(1);
    let look = |memory: &mut Memory, now: Timestamp| {
        adopt(memory, Some(&policy), "n", now);
        let is_due = due(memory, Some(&policy), "n", now) == Due::Now(Trigger::Schedule);
        if is_due {
            note(memory, None, Ok(&report(true)), now);
        }
        is_due
    };
    for _ in 0..300 {
        let mut memory = Memory::default();
        let mut now = at("2026-03-01T12:00:00Z");
        for _ in 0..rng.random_range(0..20) {
            now += match rng.random_range(0..4) {
                0 => hour * rng.random_range(-2000..2000),
                _ => hour * rng.random_range(0..60),
            };
            look(&mut memory, now);
        }
        // At noon in Berlin, whatever was missed has been made up for.
        now = at("2026-10-23T10:00:00Z");
        look(&mut memory, now);
        // Two nights, of which the second has an hour more.
        for night in ["2026-10-24T01:00:00Z", "2026-10-25T02:00:00Z"] {
            let mut runs = Vec::new();
            for _ in 0..24 {
                now += hour;
                if look(&mut memory, now) {
                    runs.push(now);
                }
            }
            assert_eq!(runs, [at(night)], "{memory:?}");
        }
    }
}

#[test]
fn a_request_is_due_once() {
    let mut policy = policy(json!({}));
    let mut memory = Memory::default();
    let now = at("2026-01-01T12:00:00Z");
    adopt(&mut memory, Some(&policy), "n", now);
    assert!(matches!(due(&memory, Some(&policy), "n", now), Due::At(_)));
    policy.requested_at = Some("1".into());
    assert_eq!(due(&memory, Some(&policy), "n", now), Due::Now(Trigger::Request));
    note(&mut memory, policy.requested_at.clone(), Err("disk on fire"), now);
    assert!(matches!(due(&memory, Some(&policy), "n", now), Due::At(_)));
    assert_eq!(memory.state.problem.as_deref(), Some("disk on fire"));
}

#[test]
fn a_suspended_or_bad_policy_never_runs() {
    let now = at("2026-01-01T12:00:00Z");
    for rules in [
        json!({"suspend": true}),
        json!({"maxAge": "soon"}),
        json!({"schedule": "never"}),
    ] {
        let mut policy = policy(rules.clone());
        policy.requested_at = Some("1".into());
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&policy), "n", now);
        assert_eq!(
            due(&memory, Some(&policy), "n", at("2027-01-01T12:00:00Z")),
            Due::Never,
            "{rules}"
        );
        assert_eq!(
            memory.state.problem.is_some(),
            rules.get("suspend").is_none(),
            "{rules}"
        );
    }
}

#[test]
fn another_policy_starts_with_a_clean_memory() {
    let now = at("2026-01-01T12:00:00Z");
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&policy(json!({}))), "n", now);
    note(&mut memory, None, Err("no disk"), now);
    let kept = memory.clone();
    adopt(&mut memory, Some(&policy(json!({}))), "n", at("2026-01-01T14:00:00Z"));
    assert_eq!(memory.state.problem, kept.state.problem);
    adopt(&mut memory, None, "n", now);
    assert_eq!(
        (&memory.state.problem, &memory.state.policy_uid, &memory.tried),
        (&None, &None, &None)
    );
}

#[test]
fn a_policy_that_comes_back_does_not_repeat_what_it_was_asked_for() {
    let now = at("2026-01-01T12:00:00Z");
    let mut asked = policy(json!({}));
    asked.requested_at = Some("1".into());
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&asked), "n", now);
    note(&mut memory, Some("1".into()), Err("no disk"), now);
    for number in 0..MAX_ANSWERED - 1 {
        let mut other = policy(json!({}));
        other.uid = format!("other-{number}");
        adopt(&mut memory, Some(&other), "n", now);
        note(&mut memory, Some("x".into()), Err("no disk"), now);
    }
    adopt(&mut memory, Some(&asked), "n", now);
    assert!(matches!(due(&memory, Some(&asked), "n", now), Due::At(_)));
    assert_eq!(memory.state.requested_at.as_deref(), Some("1"));
    assert_eq!(memory.state.last_run, None);
    asked.requested_at = Some("2".into());
    assert_eq!(due(&memory, Some(&asked), "n", now), Due::Now(Trigger::Request));
    assert_eq!(memory.answered.len(), MAX_ANSWERED);
}

#[test]
fn too_little_room_is_a_reason_for_a_run_but_not_again_and_again() {
    let gib = 1u64 << 30;
    let room = |size: u64, free: u64| {
        Some(Room {
            size: size * gib,
            free: free * gib,
            total: 100 * gib,
        })
    };
    let limited = policy(json!({"maxSize": "50Gi", "minFree": "10%"}));
    let mut memory = Memory::default();
    let now = at("2026-01-01T12:00:00Z");
    adopt(&mut memory, Some(&limited), "n", now);
    for (room, pressed) in [
        (room(50, 10), false),
        (room(51, 10), true),
        (room(50, 9), true),
        (None, false),
    ] {
        assert_eq!(is_pressed(&memory, Some(&limited), room, now), pressed, "{room:?}");
    }
    assert!(
        !is_pressed(&memory, None, room(99, 0), now),
        "the built-in policy has no limits"
    );
    for rules in [
        json!({"maxSize": "1Gi", "suspend": true}),
        json!({"maxSize": "1Gi", "dryRun": true}),
        json!({"maxSize": "1Gi", "maxAge": "soon"}),
        json!({}),
    ] {
        assert!(
            !is_pressed(&memory, Some(&policy(rules.clone())), room(99, 0), now),
            "{rules}"
        );
    }
    ran(&mut memory, "2026-01-01T12:00:00Z");
    for (time, pressed) in [("2026-01-01T12:09:59Z", false), ("2026-01-01T12:10:00Z", true)] {
        assert_eq!(
            is_pressed(&memory, Some(&limited), room(51, 0), at(time)),
            pressed,
            "{time}"
        );
    }
    // The clock is set back by a day: the pause begins anew.
    let mut earlier = memory.clone();
    adopt(&mut earlier, Some(&limited), "n", at("2025-12-31T12:00:00Z"));
    for (time, pressed) in [("2025-12-31T12:09:59Z", false), ("2025-12-31T12:10:00Z", true)] {
        assert_eq!(
            is_pressed(&earlier, Some(&limited), room(51, 0), at(time)),
            pressed,
            "{time}"
        );
    }
    memory.state.over_limit = Some("current trees 51Gi".into());
    for (time, pressed) in [("2026-01-01T12:59:59Z", false), ("2026-01-01T13:00:00Z", true)] {
        assert_eq!(
            is_pressed(&memory, Some(&limited), room(51, 0), at(time)),
            pressed,
            "{time}"
        );
    }
}

#[test]
fn a_clock_that_was_ahead_for_a_while_stops_no_schedule() {
    let policy = policy(json!({"schedule": "0 3 * * *"}));
    // With a run in that time, and with the policy first seen in it.
    for has_run in [true, false] {
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&policy), "n", at("2038-01-01T12:00:00Z"));
        if has_run {
            note(&mut memory, None, Ok(&report(true)), at("2038-01-02T03:00:00Z"));
        }
        adopt(&mut memory, Some(&policy), "n", at("2026-01-01T12:00:00Z"));
        let next = at("2026-01-02T03:00:00Z");
        assert_eq!(memory.state.next_run, Some(Time(next)), "{has_run}");
        adopt(&mut memory, Some(&policy), "n", at("2026-01-02T02:59:59Z"));
        assert_eq!(due(&memory, Some(&policy), "n", next), Due::Now(Trigger::Schedule));
    }
}

#[test]
fn a_node_is_over_its_limits_until_there_is_room_again() {
    let gib = 1u64 << 30;
    let room = |size: u64| Room {
        size: size * gib,
        free: 50 * gib,
        total: 100 * gib,
    };
    let limited = |generation: i64, rules| ProjectedPolicy {
        generation,
        ..policy(rules)
    };
    let now = at("2026-01-01T12:00:00Z");
    let over = |rules, room| {
        let mut memory = Memory::default();
        adopt(&mut memory, Some(&limited(1, json!({"maxSize": "10Gi"}))), "n", now);
        note(&mut memory, None, Err("no disk"), now);
        memory.state.over_limit = Some("20Gi of at most 10Gi".into());
        let policy = limited(2, rules);
        adopt(&mut memory, Some(&policy), "n", now);
        ease(&mut memory, Some(&policy), room);
        memory.state.over_limit.is_some()
    };
    // Nothing changed; nobody has looked since the last run; somebody made room; the limit was raised, and taken away.
    assert!(over(json!({"maxSize": "10Gi"}), Some(room(20))));
    assert!(over(json!({"maxSize": "10Gi"}), None));
    assert!(!over(json!({"maxSize": "10Gi"}), Some(room(10))));
    assert!(!over(json!({"maxSize": "30Gi"}), Some(room(20))));
    assert!(!over(json!({}), None));

    // A run that could not look says nothing of it, and one that was cut off neither.
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&limited(1, json!({"maxSize": "10Gi"}))), "n", now);
    memory.state.over_limit = Some("20Gi of at most 10Gi".into());
    let problem = crate::store::Problem {
        path: "/store/refs/x".into(),
        message: "it is damaged".into(),
    };
    let blocked = Report {
        blocked: vec![problem],
        ..report(true)
    };
    for report in [&blocked, &report(false)] {
        note(&mut memory, None, Ok(report), now);
        assert!(memory.state.over_limit.is_some());
    }
    note(&mut memory, None, Ok(&report(true)), now);
    assert_eq!(memory.state.over_limit, None);
}

#[test]
fn a_run_that_ended_early_says_what_it_did_and_why_it_ended() {
    let now = at("2026-01-01T12:00:00Z");
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&policy(json!({}))), "n", now);
    let report = Report {
        failed: Some("cannot remove /store/objects/ab/cd: Input/output error".into()),
        deleted_blobs: 7,
        ..report(false)
    };
    note(&mut memory, None, Ok(&report), now);
    assert_eq!(memory.state.last_run.unwrap().deleted_blobs, 7);
    let problem = memory.state.problem.unwrap();
    assert!(
        problem.contains("ended early") && problem.contains("objects/ab/cd"),
        "{problem}"
    );
}

#[test]
fn after_an_edit_a_node_over_its_limits_is_seen_to_sooner() {
    let room = Some(Room {
        size: 20,
        free: 50,
        total: 100,
    });
    let mut edited = policy(json!({"maxSize": "10"}));
    let now = at("2026-01-01T12:00:00Z");
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&edited), "n", now);
    note(&mut memory, None, Err("no disk"), now);
    memory.state.over_limit = Some("20 of at most 10".into());
    let later = at("2026-01-01T12:10:00Z");
    assert!(!is_pressed(&memory, Some(&edited), room, later));
    edited.generation += 1;
    adopt(&mut memory, Some(&edited), "n", later);
    assert!(is_pressed(&memory, Some(&edited), room, later));
}

#[test]
fn jitter_is_bounded_and_differs_between_nodes() {
    let longest = Duration::from_secs(600);
    let delays: std::collections::BTreeSet<_> = (0..50).map(|i| jitter(&format!("n{i}"), "u", longest)).collect();
    assert!(delays.len() > 30 && delays.iter().all(|delay| *delay <= longest));
    assert_eq!(jitter("n", "u", longest), jitter("n", "u", longest));
    assert_eq!(jitter("n", "u", Duration::ZERO), Duration::ZERO);
}

#[test]
fn a_run_that_failed_is_made_up_for_an_hour_later_or_at_its_next_time() {
    let policy = policy(json!({"schedule": "0 3 * * *"}));
    let mut memory = Memory::default();
    let now = at("2026-01-01T00:00:00Z");
    adopt(&mut memory, Some(&policy), "n", now);
    let due_after = |memory: &mut Memory, time: &str| {
        adopt(memory, Some(&policy), "n", at(time));
        due(memory, Some(&policy), "n", at(time))
    };
    let half = Report {
        failed: Some("cannot remove it".into()),
        ..report(false)
    };
    let (retry, schedule) = (Trigger::Retry, Trigger::Schedule);
    for (result, failed_at, next, trigger) in [
        (Err("no disk"), "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z", retry),
        (Ok(&half), "2026-01-01T01:00:00Z", "2026-01-01T02:00:00Z", retry),
        (Err("no disk"), "2026-01-01T02:30:00Z", "2026-01-01T03:00:00Z", schedule),
        (
            Ok(&report(true)),
            "2026-01-01T03:00:00Z",
            "2026-01-02T03:00:00Z",
            schedule,
        ),
    ] {
        note(&mut memory, None, result, at(failed_at));
        let later = at(failed_at) + jiff::SignedDuration::from_secs(1);
        assert_eq!(due_after(&mut memory, &later.to_string()), Due::At(at(next)));
        assert_eq!(memory.state.next_run, Some(Time(at(next))));
        assert_eq!(due_after(&mut memory, next), Due::Now(trigger));
    }

    // The clock is set back by years: the hour is one from then on.
    note(&mut memory, None, Err("no disk"), at("2026-01-01T04:00:00Z"));
    assert_eq!(
        due_after(&mut memory, "2020-01-01T00:00:00Z"),
        Due::At(at("2020-01-01T01:00:00Z"))
    );
}

#[test]
fn a_run_that_something_unreadable_kept_from_deleting_is_made_up_for_when_that_is_mended() {
    let policy = policy(json!({"schedule": "0 3 * * *"}));
    let mut memory = Memory::default();
    let now = at("2026-01-01T12:00:00Z");
    adopt(&mut memory, Some(&policy), "n", now);
    let blocked = Report {
        blocked: vec![crate::store::Problem {
            path: "/store/refs/x".into(),
            message: "it is damaged".into(),
        }],
        ..report(true)
    };
    note(&mut memory, None, Ok(&blocked), now);
    let later = at("2026-01-01T20:00:00Z");
    let tomorrow = Due::At(at("2026-01-02T03:00:00Z"));
    assert_eq!(due(&memory, Some(&policy), "n", later), tomorrow);
    let said = memory.state.problem.clone().unwrap();
    assert!(said.starts_with("nothing was deleted, because /store/refs/x"), "{said}");
    // No edit mends it, and one that cannot be used hides it only while it is there.
    let mut edited = ProjectedPolicy {
        generation: 2,
        ..policy.clone()
    };
    edited.rules.max_age = Some("soon".into());
    adopt(&mut memory, Some(&edited), "n", later);
    assert!(memory.state.problem.as_ref().unwrap().contains("soon"));
    let policy = ProjectedPolicy {
        generation: 3,
        ..policy
    };
    adopt(&mut memory, Some(&policy), "n", later);
    assert_eq!(memory.state.problem, Some(said));
    unblock(&mut memory, later);
    assert_eq!(memory.state.problem, None);
    assert_eq!(due(&memory, Some(&policy), "n", later), Due::Now(Trigger::Retry));
    note(&mut memory, None, Ok(&report(true)), later);
    assert_eq!(due(&memory, Some(&policy), "n", later), tomorrow);
}

#[test]
fn what_was_asked_for_goes_before_what_is_due_and_that_before_want_of_room() {
    let mut policy = policy(json!({"schedule": "0 3 * * *", "maxSize": "10"}));
    let room = Some(Room {
        size: 20,
        free: 50,
        total: 100,
    });
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&policy), "n", at("2026-01-01T12:00:00Z"));
    let late = at("2026-01-02T12:00:00Z");
    let next_at = |memory: &Memory, policy: &ProjectedPolicy| next(memory, Some(policy), room, "n", late);
    policy.requested_at = Some("1".into());
    assert_eq!(next_at(&memory, &policy), Due::Now(Trigger::Request));
    policy.requested_at = None;
    assert_eq!(next_at(&memory, &policy), Due::Now(Trigger::Schedule));
    memory.since = Some(late);
    assert_eq!(next_at(&memory, &policy), Due::Now(Trigger::Pressure));
    ran(&mut memory, "2026-01-02T12:00:00Z");
    assert_eq!(next_at(&memory, &policy), Due::At(at("2026-01-03T03:00:00Z")));
}

#[test]
fn a_run_under_rules_that_are_no_more_is_cut_off_and_made_under_the_new_ones() {
    let mut asked = policy(json!({"schedule": "0 3 * * *", "maxAge": "1h"}));
    asked.requested_at = Some("1".into());
    let now = at("2026-01-01T12:00:00Z");
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&asked), "n", now);
    // Another request, or an edit of what runs don't know of, is no other rule.
    let same = ProjectedPolicy {
        requested_at: Some("2".into()),
        generation: 2,
        ..asked.clone()
    };
    assert!(!is_outdated(Some(&asked), Some(&same)));
    let mut edited = same.clone();
    edited.rules.schedule = "0 4 * * *".into();
    edited.rules.time_zone = Some("Europe/Berlin".into());
    edited.rules.jitter = Some("1h".into());
    assert!(!is_outdated(Some(&asked), Some(&edited)));
    edited.rules.max_age = Some("30d".into());
    let other = ProjectedPolicy {
        uid: "other".into(),
        ..asked.clone()
    };
    for new in [Some(&edited), Some(&other), None] {
        assert!(is_outdated(Some(&asked), new) && is_outdated(new, Some(&asked)));
    }
    // What was asked for is not answered by half a run.
    note(&mut memory, asked.requested_at.clone(), Ok(&report(false)), now);
    adopt(&mut memory, Some(&asked), "n", now);
    assert_eq!(due(&memory, Some(&asked), "n", now), Due::Now(Trigger::Request));
    asked.requested_at = None;
    assert_eq!(due(&memory, Some(&asked), "n", now), Due::Now(Trigger::Retry));
    asked.rules.suspend = true;
    assert_eq!(due(&memory, Some(&asked), "n", now), Due::Never);
    assert_eq!((memory.state.problem, memory.answered.len()), (None, 0));
}

#[test]
fn a_clock_that_is_corrected_by_a_little_repeats_no_run() {
    let policy = policy(json!({"schedule": "0 3 * * *"}));
    let mut memory = Memory::default();
    adopt(&mut memory, Some(&policy), "n", at("2026-01-01T12:00:00Z"));
    ran(&mut memory, "2026-01-02T03:00:00.2Z");
    for time in ["2026-01-02T02:59:59.9Z", "2026-01-02T03:00:00Z", "2026-01-02T03:00:01Z"] {
        adopt(&mut memory, Some(&policy), "n", at(time));
        assert_eq!(
            due(&memory, Some(&policy), "n", at(time)),
            Due::At(at("2026-01-03T03:00:00Z"))
        );
    }
}
