//! What an upgrade prints: its plan, its steps, its end.

use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::super::args::Cli;
use super::super::output::{self, duration};
use super::journal::{Journal, State};
use crate::control::Failure;

/// One step as reported.
#[derive(Debug, Serialize)]
struct Step {
    step: &'static str,
    ok: bool,
    elapsed_us: u64,
}

/// What has been done, as it is told.
#[derive(Debug)]
pub(super) struct Report {
    json: bool,
    steps: Vec<Step>,
    warnings: Vec<String>,
}

impl Report {
    pub fn new(cli: &Cli) -> Self {
        Self {
            json: cli.json,
            steps: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Tells people.
    pub fn say(&self, line: &str) {
        if !self.json {
            eprintln!("{line}");
        }
    }

    /// Something that went wrong and does not matter for how it ends.
    pub fn warn(&mut self, line: String) {
        self.say(&format!("warning: {line}"));
        self.warnings.push(line);
    }

    /// Notes how a step went that began at `start`.
    pub fn step(&mut self, step: &'static str, start: Instant, ok: bool) {
        let elapsed_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let state = if ok { "ok" } else { "FAILED" };
        self.say(&format!("{step:<10}  {state:<6}  {}", duration(elapsed_us)));
        self.steps.push(Step {
            step,
            ok,
            elapsed_us,
        });
    }

    /// The end.
    pub fn end(&self, j: &Journal, code: u8) {
        if self.json {
            output::json(json!({
                "name": j.name, "state": j.state, "why": j.why, "kept_as": j.keep_as,
                "steps": self.steps, "warnings": self.warnings, "exit_code": code,
            }));
            return;
        }
        match j.state {
            State::Done => {
                eprintln!(
                    "upgraded; to take it back: stop, 'cowfs rollback {} {}', start",
                    j.mountpoint.display(),
                    j.name
                );
                println!("{}", j.name);
            }
            State::RolledBack => {
                let kept = j.keep_as.as_ref();
                let kept = kept.map_or(String::new(), |k| format!(". What failed is kept as {k}"));
                eprintln!("rolled back; the service is healthy again{kept}");
                if let Some(w) = &j.why {
                    eprintln!("why: {w}");
                }
                println!("{}", j.name);
            }
            // The error says the rest.
            _ => {}
        }
    }
}

/// Prints what would be done.
pub(super) fn plan(cli: &Cli, j: &Journal, resume: bool) -> Result<u8, Failure> {
    let mut steps = Vec::new();
    let back = |steps: &mut Vec<String>| {
        steps.push(format!("stop:       {}", j.stop));
        steps.push(format!("rollback:   to {} of head {}", j.name, j.head));
    };
    let old = |steps: &mut Vec<String>| {
        steps.push(format!("start:      {}", j.start));
        steps.push(format!(
            "check:      {} (up to {} s)",
            j.check, j.check_timeout_s
        ));
    };
    match (resume, j.state) {
        (false, _) => {
            steps.push(format!("stop:       {}", j.stop));
            steps.push(format!("checkpoint: {} of head {}", j.name, j.head));
            steps.push(format!("run:        {}", j.run));
            old(&mut steps);
            steps.push(format!(
                "on failure: stop, roll back to {}, start, check; exit 12",
                j.name
            ));
        }
        (true, State::Checked) => steps.push(format!("upgrade {} is good: note it", j.name)),
        (true, State::Stopping | State::Stopped) => old(&mut steps),
        (true, _) => {
            back(&mut steps);
            old(&mut steps);
        }
    }
    if cli.json {
        output::json(json!({ "steps": steps }));
    } else {
        for s in steps {
            println!("{s}");
        }
    }
    Ok(0)
}
