//! What a bench must reach: a line per goal at its end, and the same as JSON in `target/bench.json`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A figure and its limit. A smaller figure is a better one.
#[derive(Serialize, Deserialize)]
pub struct Goal {
    name: String,
    figure: f64,
    limit: f64,
    unit: String,
    met: bool,
}

/// The goals of one part of `make bench`.
pub struct Goals {
    part: &'static str,
    goals: Vec<Goal>,
}

impl Goals {
    pub fn new(part: &'static str) -> Self {
        Self {
            part,
            goals: Vec::new(),
        }
    }

    pub fn at_most(&mut self, name: impl Into<String>, figure: f64, limit: f64, unit: &str) {
        self.goals.push(Goal {
            name: name.into(),
            figure,
            limit,
            unit: unit.to_owned(),
            // What could not be measured is not met.
            met: figure <= limit,
        });
    }

    /// Prints the lines, and puts this part's goals in the place of its former ones in the file.
    pub fn finish(self) {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench.json");
        let mut all: serde_json::Map<String, serde_json::Value> = fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default();
        println!();
        for goal in &self.goals {
            let Goal {
                name,
                figure,
                limit,
                unit,
                met,
            } = goal;
            let verdict = if *met { "met" } else { "short" };
            println!("{name:<64} {figure:>9.3} {limit:>9.3} {unit:<5} {verdict}");
        }
        let goals = serde_json::to_value(&self.goals).expect("plain values");
        all.insert(self.part.to_owned(), goals);
        let text = serde_json::to_vec_pretty(&all).expect("plain values");
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    }
}
