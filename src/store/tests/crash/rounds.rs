//! What a round is: a life is struck, what it left is looked at, and the store is used on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::*;
use crate::store::disk::hook::Struck;
use crate::store::testing::{Trees, nothing_kept};
use crate::store::{Options, Store, remove_all};

/// Gives the seed of a run that is to be repeated.
const SEED: &str = "LARDER_SEED";

/// How many: `short` in `make test`, `long` in `make soak`.
pub fn by_patience<T>(short: T, long: T) -> T {
    match std::env::var_os("LARDER_SOAK") {
        Some(_) => long,
        None => short,
    }
}

/// Says on failure what was being done.
pub struct Context(String);

impl Drop for Context {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- in {}", self.0);
        }
    }
}

/// What a round strikes: a life of a new store, or of the one that the last round has left whole; and on which detour.
#[derive(Debug, Clone, Default)]
pub struct Target {
    pub new: bool,
    pub detour: Vec<Struck>,
}

/// Rounds on one store.
pub struct Rounds {
    pub root: PathBuf,
    out: PathBuf,
    /// What the store is on, if that is to be mounted again after each stroke.
    pub disk: Option<Disk>,
    pub rng: StdRng,
    seed: u64,
    done: u64,
    /// How the store is after a whole life.
    whole: State,
    /// How often a life reaches each step, for every target; of a detour the steps that are not reached otherwise.
    reached: Vec<(Target, BTreeMap<Step, u64>)>,
    /// How long a whole life lasts.
    pub lasts: Duration,
    /// How many rounds ended how.
    pub ended: BTreeMap<&'static str, u64>,
}

impl Rounds {
    /// Rounds on a store in `folder`, with exports to a folder in `out`.
    pub fn new(folder: &Path, out: &Path, disk: Option<Disk>) -> Self {
        let seed = match std::env::var(SEED) {
            Ok(seed) => seed.parse().expect("a number"),
            Err(_) => rand::random(),
        };
        let mut rounds = Self {
            root: folder.join("store"),
            out: out.join("out"),
            disk,
            rng: StdRng::seed_from_u64(seed),
            seed,
            done: 0,
            whole: State::default(),
            reached: Vec::new(),
            lasts: Duration::ZERO,
            ended: BTreeMap::new(),
        };
        for new in [true, false] {
            let target = Target {
                new,
                ..Target::default()
            };
            let begun = Instant::now();
            let life = live(&rounds.work(&target, None, false));
            rounds.lasts = begun.elapsed();
            assert_eq!(life.ended, Ended::Done, "{}", life.output);
            let state = look(&rounds.root);
            assert!(new || state == rounds.whole, "two lives end differently");
            assert_eq!(state.objects, state.needed, "garbage is left");
            rounds.whole = state;
            rounds.reached.push((target, life.reached));
        }
        let usual = rounds.reached[0].1.clone();
        for detour in detours().into_iter().skip(1) {
            let target = Target { new: true, detour };
            let _context = rounds.begin("a detour", &target);
            let mut reached = live(&rounds.work(&target, None, false)).reached;
            reached.retain(|step, _| usual[step] == 0);
            rounds.reached.push((target, reached));
        }
        life::live(&rounds.root, &rounds.out, &mut |_, _, _| {}).unwrap();
        rounds
    }

    pub fn work(&self, target: &Target, fault: Option<Struck>, again: bool) -> Work {
        Work {
            store: self.root.clone(),
            out: self.out.clone(),
            faults: target.detour.iter().copied().chain(fault).collect(),
            again,
        }
    }

    /// What is struck: of each step so many of its times (all, if it has no more), chosen by the seed from its first
    /// ones, its last one and others, of all targets.
    pub fn plan(&mut self, of_each_step: usize) -> Vec<(Target, Step, u64)> {
        let mut candidates: BTreeMap<Step, Vec<(Target, Step, u64)>> = BTreeMap::new();
        for (target, reached) in &self.reached {
            for (step, all) in reached.iter().filter(|(_, all)| **all > 0) {
                let mut times: Vec<_> = (1..=*all.min(&20)).chain([*all]).collect();
                times.extend((0..20).map(|_| self.rng.random_range(1..=*all)));
                times.sort_unstable();
                times.dedup();
                let found = times.into_iter().map(|time| (target.clone(), *step, time));
                candidates.entry(*step).or_default().extend(found);
            }
        }
        let mut plan = Vec::new();
        for mut candidates in candidates.into_values() {
            candidates.shuffle(&mut self.rng);
            candidates.truncate(of_each_step);
            plan.append(&mut candidates);
        }
        // What a round finds is what another has left: not always the same.
        plan.shuffle(&mut self.rng);
        plan
    }

    /// One round. With `again` the process tries once more itself.
    pub fn strike(&mut self, target: &Target, fault: Struck, again: bool) {
        let _context = self.begin(&format!("{fault:?} of {target:?}, again: {again}"), target);
        let life = live(&self.work(target, Some(fault), again));
        self.judge(target, again, &life);
    }

    /// Makes ready for a round. What it returns says on failure which one it was.
    pub fn begin(&mut self, what: &str, target: &Target) -> Context {
        self.done += 1;
        if target.new {
            remove_all(&self.root).unwrap();
            if let Some(disk) = &self.disk {
                // Or it is there again after the cut.
                disk.sync();
            }
        }
        Context(format!("round {}: {what}; {SEED}={}", self.done, self.seed))
    }

    /// What a life has left is as it has promised, the store can be used, and the same work makes it whole.
    pub fn judge(&mut self, target: &Target, again: bool, life: &Life) {
        self.inspect(target, again, life);
        self.heal();
    }

    /// What a life has left is as it has promised, and the store can be opened and collected.
    pub fn inspect(&mut self, target: &Target, again: bool, life: &Life) {
        let _context = Context(format!("{:?}, after this:\n{}", life.ended, life.said.join("\n")));
        let ended = match &life.ended {
            Ended::Failed(error) => {
                assert!(!again, "it has failed twice: {error}");
                "failed"
            }
            Ended::Done => "done",
            Ended::Killed => "killed",
        };
        *self.ended.entry(ended).or_default() += 1;
        let bad = |line: &&String| line.starts_with("moved ") || line.starts_with("unmoved ");
        if let (Some(line), []) = (life.said.iter().find(bad), &target.detour[..]) {
            panic!("{line:?} was found bad, and nothing has damaged it");
        }
        if let Some(disk) = &self.disk {
            disk.mount_again();
        }
        let found = look(&self.root);
        match life.ended {
            Ended::Done if self.disk.is_none() => assert_eq!(found, self.whole),
            // What was removed as garbage may come back.
            Ended::Done => assert_eq!(found.refs, self.whole.refs),
            _ => {
                let mut promise = match target.new {
                    true => Promise::default(),
                    false => Promise::of(&self.whole),
                };
                life.said.iter().for_each(|line| promise.hear(line));
                promise.check(&found);
            }
        }

        let store = Store::open(&self.root, Options::default()).unwrap();
        assert_eq!(staged(&self.root), [""; 0], "opening the store has not emptied staging");
        assert_eq!(look(&self.root), found, "opening the store has changed it");
        let report = store
            .collect(&nothing_kept(), &Trees(Vec::new()), false, SystemTime::now())
            .unwrap();
        assert_eq!(report.blocked, []);
        let collected = look(&self.root);
        for (name, entry) in &found.refs {
            let left = collected.refs.get(name).cloned().unwrap_or_default();
            assert_eq!((&left.current, left.history.len()), (&entry.current, 0), "{name}");
        }
        let current: BTreeSet<_> = collected
            .refs
            .values()
            .filter_map(|entry| entry.current.clone())
            .collect();
        assert_eq!(collected.manifests, current, "the collection has left garbage");
        assert_eq!(collected.objects, collected.needed, "the collection has left garbage");
    }

    /// The same work makes the store whole.
    pub fn heal(&self) {
        life::live(&self.root, &self.out, &mut |_, _, _| {}).unwrap();
        assert_eq!(
            look(&self.root),
            self.whole,
            "the same work does not make the store whole"
        );
        assert_eq!(staged(&self.root), [""; 0], "a build has left something behind");
    }
}
