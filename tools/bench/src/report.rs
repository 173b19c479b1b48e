//! The tables, and the files they are written to.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};

use crate::cli::Plan;
use crate::results::{Goal, Results, Row, Unit};
use crate::run::Placement;

/// Figures of peers measured earlier on another machine (2 cores, ext4 on a loop file in tmpfs), for what a run
/// leaves out because it takes long: row, system, text.
const RECORDED: [(&str, &str, &str); 2] = [
    (
        "first_checkpoint_call@100000",
        "native",
        "8.2 s (cp -a, recorded)",
    ),
    (
        "checkpoint_call@100000",
        "native",
        "8.2 s (cp -a, recorded)",
    ),
];

/// Writes `results.json` and `results.md`.
pub fn write(plan: &Plan, results: &Results) -> Result<()> {
    let json = serde_json::to_string_pretty(results).context("writing the results")?;
    for (name, text) in [("results.json", json), ("results.md", markdown(results))] {
        let path = plan.out.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Both tables.
pub fn markdown(results: &Results) -> String {
    let mut text = String::from("# How fast\n\n");
    about(&mut text, &results.about);
    text.push_str(
        "\nMedians of interleaved rounds (lowest to highest in brackets); `x` is the ratio to native, of times or of \
         rates. In the checkpoint and rollback rows \"native\" is `cp -a`, and overlay's and btrfs's rollbacks are \
         not live.\n",
    );
    for placement in Placement::ALL {
        if results.series.iter().any(|s| s.placement == placement) {
            table(&mut text, results, placement);
        }
    }
    missing(&mut text, &results.missing);
    text
}

/// What a report begins with, below its title: of which machine and run it is.
pub fn about(text: &mut String, about: &BTreeMap<String, String>) {
    for (k, v) in about {
        line(text, &format!("- {k}: {v}"));
    }
}

/// What a report ends with: what is not in it.
pub fn missing(text: &mut String, missing: &[String]) {
    if missing.is_empty() {
        return;
    }
    text.push_str("\n## Not measured, or gone wrong\n\n");
    for m in missing {
        line(text, &format!("- {m}"));
    }
}

fn line(text: &mut String, l: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{l}");
}

fn table(text: &mut String, results: &Results, placement: Placement) {
    let heading = match placement {
        Placement::Unpinned => "Unpinned",
        Placement::Pinned => "Clients and daemons on one CPU",
    };
    line(text, &format!("\n## {heading}\n"));
    line(
        text,
        &format!(
            "| what | {} | goal | measured | met? |",
            results.systems.join(" | ")
        ),
    );
    line(
        text,
        &format!("|---|{}---|---|---|", "---|".repeat(results.systems.len())),
    );
    for row in &results.rows {
        let cells: Vec<String> = results
            .systems
            .iter()
            .map(|s| cell(results, placement, row, s))
            .collect();
        if cells.iter().all(|c| c == "-") {
            continue;
        }
        let (mut goals, mut got, mut met) = (Vec::new(), Vec::new(), Vec::new());
        for goal in &row.goals {
            goals.push(goal_text(row, goal));
            match results.judge(placement, row, goal) {
                Some((v, ok)) => {
                    got.push(value_text(row, goal, v));
                    met.push(if ok { "yes" } else { "**no**" });
                }
                None => {
                    got.push("-".into());
                    met.push("-");
                }
            }
        }
        let (goals, got, met) = (goals.join("; "), got.join("; "), met.join("; "));
        line(
            text,
            &format!(
                "| {} | {} | {goals} | {got} | {met} |",
                row.title,
                cells.join(" | ")
            ),
        );
    }
}

fn cell(results: &Results, placement: Placement, row: &Row, system: &str) -> String {
    let Some(samples) = results.samples(placement, &row.id, system) else {
        let recorded = RECORDED.iter().find(|r| r.0 == row.id && r.1 == system);
        return recorded.map_or_else(|| "-".into(), |r| r.2.into());
    };
    let Some(median) = results.median(placement, &row.id, system) else {
        return "-".into();
    };
    let mut text = row.unit.show(median);
    if samples.len() > 1 {
        let low = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let high = samples.iter().copied().fold(0.0, f64::max);
        let _ = write!(text, " ({} to {})", row.unit.show(low), row.unit.show(high));
    }
    if system != "native"
        && row.unit != Unit::Micros
        && let Some(r) = results.ratio(placement, &row.id, system, "native")
    {
        let _ = write!(text, " {r:.2}x");
    }
    text
}

fn goal_text(row: &Row, goal: &Goal) -> String {
    match goal {
        Goal::RateAtLeast(g) => format!(">= {g}x"),
        Goal::TimeAtMost(g) => format!("<= {g}x"),
        Goal::TimeAtMostOf(g, _) => format!("<= {g}x native's second time"),
        Goal::FasterThan(g, peer) => format!("{g} times faster than {peer}"),
        Goal::AtMost(g) => format!("<= {}", row.unit.show(*g)),
        Goal::Within(g, other) => format!(
            "within {g}x of {} files",
            other.rsplit('@').next().unwrap_or(other)
        ),
    }
}

fn value_text(row: &Row, goal: &Goal, v: f64) -> String {
    match goal {
        Goal::AtMost(_) => row.unit.show(v),
        Goal::FasterThan(..) => format!("{v:.1} times"),
        _ => format!("{v:.2}x"),
    }
}
