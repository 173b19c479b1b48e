//! `vm.md`, `vm.json` and `vm.svg`.

use std::fmt::Write;

use anyhow::{Context, Result};

use super::Plan;
use super::rows::{Goal, Row, tables};
use crate::plot::{Axis, Line, draw};
use crate::results::Unit;
use crate::table1::recorded::{PAPER, PAPER_RESUME, middle};
use crate::table1::report::{cell, met, value};
use crate::table1::{Samples, at, size};

/// Writes all; the Markdown.
pub fn write(plan: &Plan, samples: &Samples) -> Result<String> {
    let json = serde_json::to_string_pretty(samples).context("writing the results")?;
    let text = markdown(samples);
    for (name, content) in [("vm.json", json), ("vm.md", text.clone())] {
        let path = plan.out.join(name);
        std::fs::write(&path, content + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let lines = lines(samples);
    if lines.len() > 1 {
        let axis = Axis {
            title: "memory of the machine",
            show: |x| size(x),
        };
        let title =
            "how long a machine stands still for its snapshot, and until it answers after a resume";
        draw(&plan.out.join("vm.svg"), title, axis, &lines)?;
    }
    Ok(text)
}

/// The value that so many percent of the samples do not exceed.
fn percentile(samples: &[f64], percent: usize) -> Option<f64> {
    let mut s = samples.to_vec();
    s.sort_by(f64::total_cmp);
    let rank = (s.len() * percent).div_ceil(100);
    s.get(rank.saturating_sub(1)).copied()
}

fn markdown(samples: &Samples) -> String {
    let mut t = String::from("# Machines\n\n");
    crate::report::about(&mut t, &samples.about);
    t.push_str(
        "\nMedians (lowest to highest) of one run; what is compared is interleaved. Guests are of one static busybox. \
         Snapshots go to a disk, and are in the page cache when they are resumed. Other work on the machine is in all \
         figures. Repeat it with `cargo run --release -p bench -- vm`.\n",
    );
    for (title, text, rows) in tables(samples) {
        table(&mut t, samples, title, text, &rows);
    }
    crate::report::missing(&mut t, &samples.missing);
    t
}

fn table(t: &mut String, samples: &Samples, title: &str, text: &str, rows: &[Row]) {
    if !rows.iter().any(|r| samples.samples.contains_key(&r.0)) {
        return;
    }
    let _ = writeln!(
        t,
        "\n## {title}\n\n{text}\n\n| what | measured | 99th percentile | n | goal | met? |\n|{}",
        "---|".repeat(6)
    );
    for (name, title, unit, goal) in rows {
        let all = samples.samples.get(name).map_or(&[][..], Vec::as_slice);
        let high = percentile(all, 99);
        // Of few samples it is the highest.
        let shown = high.filter(|_| all.len() >= 20);
        let shown = shown.map_or("-".into(), |v| value(*unit, v));
        let (goal, ok) = judge(samples, name, *unit, *goal, high);
        let n = all.len();
        let _ = writeln!(
            t,
            "| {title} | {} | {shown} | {n} | {goal} | {ok} |",
            cell(samples, name, *unit)
        );
    }
}

/// A goal for people, and whether it is met.
fn judge(s: &Samples, name: &str, unit: Unit, goal: Goal, high: Option<f64>) -> (String, String) {
    let yes = |ok: bool| if ok { "yes" } else { "**no**" };
    match goal {
        Goal::None => Default::default(),
        Goal::Median(g) => (value(unit, g), met(s, name, unit, g).into()),
        Goal::Both(g, h) => (
            format!("{}; p99 {}", value(unit, g), value(unit, h)),
            format!(
                "{}; {}",
                met(s, name, unit, g),
                high.map_or("-", |v| yes(v <= h))
            ),
        ),
        Goal::Same => (
            "the same".into(),
            s.get(name)
                .map_or("-", |(_, low, _)| yes(low <= 1.0))
                .into(),
        ),
    }
}

/// Lines of the plot: megabytes and milliseconds.
fn lines(samples: &Samples) -> Vec<Line> {
    let own = |row: &str, system: &str| {
        let point = |mb: &u64| Some((*mb as f64, samples.median(&at(row, *mb, system))? * 1e3));
        samples
            .sizes_mb
            .iter()
            .filter_map(point)
            .collect::<Vec<_>>()
    };
    let paper: Vec<(f64, f64)> = PAPER
        .iter()
        .map(|r| (r.0 as f64, middle(r) * 1e3))
        .collect();
    let resumed = paper.iter().map(|p| (p.0, PAPER_RESUME * 1e3)).collect();
    let mut lines: Vec<Line> = vec![
        ("umlctl snapshot, pause".into(), own("big_pause", "lazy")),
        (
            "stop-and-copy, pause".into(),
            own("big_pause", "stop-and-copy"),
        ),
        ("umlctl resume, first echo".into(), own("resume", "first")),
        ("the paper, 2003, snapshot (recorded)".into(), paper),
        (
            "the paper, 2003, resume: less than (recorded)".into(),
            resumed,
        ),
    ];
    lines.retain(|l| !l.1.is_empty());
    lines
}

#[cfg(test)]
mod tests {
    use super::{Goal, Samples, Unit, judge, markdown, percentile};

    fn samples(name: &str, all: &[f64]) -> Samples {
        let mut s = Samples {
            version: 1,
            about: Default::default(),
            sizes_mb: vec![64, 1024],
            samples: Default::default(),
            missing: Vec::new(),
        };
        for v in all {
            s.add(name, *v);
        }
        s
    }

    #[test]
    fn percentiles_are_samples() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 99), Some(99.0));
        assert_eq!(percentile(&hundred[..50], 99), Some(50.0));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn goals() {
        let s = samples("x", &[0.9, 1.1, 1.2]);
        let ok = |goal| judge(&s, "x", Unit::Ratio, goal, Some(1.2)).1;
        assert_eq!(ok(Goal::Same), "yes");
        assert_eq!(ok(Goal::Median(1.0)), "**no**");
        assert_eq!(ok(Goal::Both(1.1, 1.1)), "yes; **no**");
        assert_eq!(judge(&s, "y", Unit::Ratio, Goal::Same, None).1, "-");
    }

    #[test]
    fn only_what_was_measured_has_a_table() {
        let t = markdown(&samples("resume@64/first", &[0.02]));
        assert!(
            t.contains("| 64 MB, first echo | 20.00 ms | - | 1 | 30.00 ms | yes |"),
            "{t}"
        );
        assert!(!t.contains("## Boot"), "{t}");
    }
}
