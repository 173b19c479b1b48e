//! Table 1 as Markdown, JSON and a plot.

use std::fmt::Write;

use anyhow::{Context, Result};

use super::measure::PARTS;
use super::recorded::{
    CRIU_DUMP, CRIU_FROZEN, CRIU_LAZY, CRIU_RESTORE, PAPER, PAPER_RESUME, Recorded, middle, show,
};
use super::{Plan, Samples, at, more, size};
use crate::plot::{Axis, Line, draw};
use crate::results::Unit;

/// Pause that is to be reached, seconds.
const GOAL_PAUSE: f64 = 0.0005;
/// Save rate, bytes a second.
const GOAL_RATE: f64 = 1e9;
/// Resume until the first instruction, seconds.
const GOAL_RESUME: f64 = 0.002;

/// Writes table1.json, table1.md and table1.svg; the Markdown.
pub fn write(plan: &Plan, samples: &Samples) -> Result<String> {
    let json = serde_json::to_string_pretty(samples).context("writing the results")?;
    let text = markdown(samples);
    for (name, content) in [("table1.json", json), ("table1.md", text.clone())] {
        let path = plan.out.join(name);
        std::fs::write(&path, content + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let lines = lines(samples);
    if lines.len() > 3 {
        let axis = Axis {
            title: "memory of the process",
            show: |x| size(x),
        };
        draw(
            &plan.out.join("table1.svg"),
            "how long a process stands still for its snapshot",
            axis,
            &lines,
        )?;
    }
    Ok(text)
}

pub(crate) fn time(seconds: f64) -> String {
    let us = seconds * 1e6;
    if us < 100.0 {
        format!("{us:.1} us")
    } else {
        Unit::Micros.show(us)
    }
}

pub(crate) fn value(unit: Unit, v: f64) -> String {
    match unit {
        Unit::Seconds => time(v),
        Unit::Bytes if v < 1e7 => format!("{:.0} kB", v / 1e3),
        _ => unit.show(v),
    }
}

pub(crate) fn cell(samples: &Samples, name: &str, unit: Unit) -> String {
    match samples.get(name) {
        None => "-".into(),
        Some((m, low, high)) if low >= high => value(unit, m),
        Some((m, low, high)) => {
            format!(
                "{} ({} to {})",
                value(unit, m),
                value(unit, low),
                value(unit, high)
            )
        }
    }
}

/// Whether a median meets its goal; a rate has to reach it.
pub(crate) fn met(samples: &Samples, name: &str, unit: Unit, goal: f64) -> &'static str {
    match samples.median(name) {
        None => "-",
        Some(v) if (unit.is_rate() && v >= goal) || (!unit.is_rate() && v <= goal) => "yes",
        Some(_) => "**no**",
    }
}

fn markdown(samples: &Samples) -> String {
    let mut t = String::from("# The paper's Table 1, again\n\n");
    crate::report::about(&mut t, &samples.about);
    let mut line = |l: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(t, "{l}");
    };
    line(
        "\nMedians (lowest to highest) of interleaved rounds of one run. Targets hold their size in written pages of 4 KiB. \
         *Reported* is what the command says; *seen* is the longest time between two looks at the clock of a target that \
         does nothing else, so that waiting for a CPU and all other stops of the snapshot are in it. Recorded figures are not of this \
         run: CRIU 4.2 was built from source and measured earlier on a machine of the same kind; the paper's are of 2003, \
         a Pentium III of 766 MHz. Snapshots go to the page cache (tmpfs). Repeat it with `tools/setup bench && cargo run \
         --release -p bench -- table1`.\n"
            .to_owned(),
    );
    line("## How long the process stands still\n".into());
    line("| size | umlctl, reported | umlctl, seen | goal | met? | stop-and-copy, reported | stop-and-copy, seen | gcore, seen | CRIU 4.2, frozen (recorded) | the paper (recorded) |".into());
    line(format!("|{}", "---|".repeat(10)));
    for &mb in &samples.sizes_mb {
        let c = |row: &str, system: &str| cell(samples, &at(row, mb, system), Unit::Seconds);
        let m = |row: &str| met(samples, &at(row, mb, "umlctl"), Unit::Seconds, GOAL_PAUSE);
        line(format!(
            "| {} | {} | {} | {} | {}; {} | {} | {} | {} | {} | {} |",
            size(mb),
            c("pause_reported", "umlctl"),
            c("pause_seen", "umlctl"),
            time(GOAL_PAUSE),
            m("pause_reported"),
            m("pause_seen"),
            c("pause_reported", "stop-and-copy"),
            c("pause_seen", "stop-and-copy"),
            c("pause_seen", "gcore"),
            show(&CRIU_FROZEN, mb),
            show(&PAPER, mb),
        ));
    }
    line("\nWhat the pause is made of, as reported; the earlier stop of one thread (*prepare*); and how much of what was seen was waiting for a CPU (at most):\n".into());
    line("| size | stop | mark | state | detach | prepare | waiting for a CPU |".into());
    line(format!("|{}", "---|".repeat(7)));
    for &mb in &samples.sizes_mb {
        let c = |row: &str| cell(samples, &at(row, mb, "umlctl"), Unit::Seconds);
        line(format!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            size(mb),
            c(PARTS[0]),
            c(PARTS[1]),
            c(PARTS[2]),
            c(PARTS[3]),
            c("prepare"),
            c("pause_waiting")
        ));
    }
    line("\n## The whole snapshot\n".into());
    line("| size | umlctl, command | umlctl, saved per second, running | goal | met? | stop-and-copy, command | gcore, command | CRIU 4.2 dump, command (recorded) |".into());
    line(format!("|{}", "---|".repeat(8)));
    for &mb in &samples.sizes_mb {
        let c = |row: &str, system: &str| cell(samples, &at(row, mb, system), Unit::Seconds);
        let rate = at("rate", mb, "umlctl");
        line(format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            size(mb),
            c("wall", "umlctl"),
            cell(samples, &rate, Unit::BytesPerSecond),
            Unit::BytesPerSecond.show(GOAL_RATE),
            met(samples, &rate, Unit::BytesPerSecond, GOAL_RATE),
            c("wall", "stop-and-copy"),
            c("wall", "gcore"),
            show(&CRIU_DUMP, mb),
        ));
    }
    resume_table(samples, &mut t);
    more_table(samples, &mut t);
    crate::report::missing(&mut t, &samples.missing);
    t
}

fn resume_table(samples: &Samples, t: &mut String) {
    let _ = writeln!(
        t,
        "\n## Resume\n\nUntil the first instruction: as reported; and, by the clock of the resumed process, from the start of the \
         command. The first work is a scan of 32 MB, from the start of the command; its goal is CRIU's restore alone, without \
         any work. In the last round all memory is compared.\n\n\
         | size | until the first instruction, reported | goal | met? | ... of the whole command | scan of 32 MB done | less than CRIU's restore? | CRIU 4.2 restore (recorded) | CRIU 4.2 lazy (recorded) | the paper (recorded) |\n|{}",
        "---|".repeat(10)
    );
    for &mb in &samples.sizes_mb {
        let name = |row: &str| at(row, mb, "umlctl");
        let c = |row: &str| cell(samples, &name(row), Unit::Seconds);
        let criu = CRIU_RESTORE.iter().find(|r| r.0 == mb);
        let less = criu.map_or("-", |r| {
            met(samples, &name("resume_work"), Unit::Seconds, middle(r))
        });
        let _ = writeln!(
            t,
            "| {} | {} | {} | {} | {} | {} | {less} | {} | {} | {} |",
            size(mb),
            c("resume"),
            time(GOAL_RESUME),
            met(samples, &name("resume"), Unit::Seconds, GOAL_RESUME),
            c("resume_first"),
            c("resume_work"),
            show(&CRIU_RESTORE, mb),
            show(&CRIU_LAZY, mb),
            if mb <= 128 {
                format!("< {}", time(PAPER_RESUME))
            } else {
                "-".into()
            },
        );
    }
}

fn more_table(samples: &Samples, t: &mut String) {
    if !more::ROWS.iter().any(|r| samples.samples.contains_key(r.0)) {
        return;
    }
    let _ = writeln!(
        t,
        "\n## More\n\n| what | measured | goal | met? |\n|---|---|---|---|"
    );
    for (name, title, unit, goal) in more::ROWS {
        let (goal, ok) = match goal {
            None => (String::new(), ""),
            Some(g) => (value(unit, g), met(samples, name, unit, g)),
        };
        let _ = writeln!(
            t,
            "| {title} | {} | {goal} | {ok} |",
            cell(samples, name, unit)
        );
    }
}

/// Lines of the plot: megabytes and milliseconds.
fn lines(samples: &Samples) -> Vec<Line> {
    let own = |row: &str, system: &str| {
        let point = |mb: &u64| Some((*mb as f64, samples.median(&at(row, *mb, system))? * 1e3));
        samples.sizes_mb.iter().filter_map(point).collect()
    };
    let recorded = |list: &[Recorded]| list.iter().map(|r| (r.0 as f64, middle(r) * 1e3)).collect();
    let mut lines: Vec<Line> = vec![
        (
            "umlctl, as the process sees it".into(),
            own("pause_seen", "umlctl"),
        ),
        (
            "umlctl, as reported".into(),
            own("pause_reported", "umlctl"),
        ),
        ("stop-and-copy".into(), own("pause_seen", "stop-and-copy")),
        ("gcore".into(), own("pause_seen", "gcore")),
        ("CRIU 4.2 (recorded)".into(), recorded(&CRIU_FROZEN)),
        ("the paper, 2003 (recorded)".into(), recorded(&PAPER)),
    ];
    lines.retain(|l| !l.1.is_empty());
    lines
}

#[cfg(test)]
mod tests {
    use super::{Samples, Unit, at, markdown, met};

    fn samples(pause: &[f64]) -> Samples {
        let mut s = Samples {
            version: 1,
            about: Default::default(),
            sizes_mb: vec![128],
            samples: Default::default(),
            missing: Vec::new(),
        };
        for p in pause {
            s.add(at("pause_seen", 128, "umlctl"), *p);
        }
        s
    }

    #[test]
    fn goals_are_judged_by_the_median() {
        let name = at("pause_seen", 128, "umlctl");
        let s = samples(&[0.0001, 0.0004, 0.9]);
        assert_eq!(met(&s, &name, Unit::Seconds, 0.0005), "yes");
        assert_eq!(met(&s, &name, Unit::Seconds, 0.0003), "**no**");
        assert_eq!(met(&s, &name, Unit::BytesPerSecond, 0.0003), "yes");
        assert_eq!(met(&s, "none", Unit::Seconds, 1.0), "-");
    }

    #[test]
    fn the_report_has_both_figures_and_the_recorded_ones() {
        let t = markdown(&samples(&[0.0004]));
        let row = t.lines().find(|l| l.starts_with("| 128 MB")).unwrap();
        for part in ["| - | 400 us |", "113 to 125 ms", "10.42 s", "-; yes"] {
            assert!(row.contains(part), "{part} is not in {row}");
        }
    }
}
