//! The rows beside the sizes: threads, a busy writer, sequels, many copies, a disk.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::drive::{Kind, Running, umlctl};
use super::measure::{available, enough_memory, keep, resume, say, take};
use super::{Plan, Samples};
use crate::results::Unit;
use crate::run::check_interrupted;

/// Megabytes of the writer's and the sequels' target.
const LARGE: u64 = 1024;
/// Megabytes of the others.
const MIDDLE: u64 = 128;
/// Copies of one snapshot.
const COPIES: usize = 100;

/// A row: name of its samples, title, unit, and what it must not exceed (must reach, for rates).
pub type Row = (&'static str, &'static str, Unit, Option<f64>);

/// All of them, in the order of the table.
pub const ROWS: [Row; 26] = [
    (
        "pause_reported@threads10",
        "pause with 10 threads, as reported",
        Unit::Seconds,
        Some(0.001),
    ),
    (
        "pause_seen@threads10",
        "... as seen by its first thread",
        Unit::Seconds,
        Some(0.001),
    ),
    (
        "pause_reported@threads100",
        "pause with 100 threads, as reported",
        Unit::Seconds,
        Some(0.005),
    ),
    (
        "pause_seen@threads100",
        "... as seen by its first thread",
        Unit::Seconds,
        Some(0.005),
    ),
    (
        "write_before",
        "a writer of random pages of 1 GB, alone: a write, mean",
        Unit::Seconds,
        None,
    ),
    (
        "write_mean",
        "... while it is saved: a write, mean of all",
        Unit::Seconds,
        Some(15e-6),
    ),
    (
        "write_page",
        "... what it lost, for each page that it wrote",
        Unit::Seconds,
        Some(15e-6),
    ),
    (
        "write_slow",
        "... a write that met a fault (over 2 us), mean",
        Unit::Seconds,
        Some(15e-6),
    ),
    (
        "write_slowest",
        "... the slowest write",
        Unit::Seconds,
        Some(0.001),
    ),
    (
        "write_slowest_before",
        "... the slowest write when it is alone",
        Unit::Seconds,
        None,
    ),
    (
        "pause_reported@writer",
        "... pause, as reported",
        Unit::Seconds,
        Some(0.001),
    ),
    (
        "pause_seen@writer",
        "... pause, as seen",
        Unit::Seconds,
        Some(0.001),
    ),
    ("wall@writer", "... whole snapshot", Unit::Seconds, None),
    (
        "rate@disk",
        "save of 1 GB to a filesystem on disk (page cache of it)",
        Unit::BytesPerSecond,
        None,
    ),
    (
        "pause_seen@disk",
        "... pause, as seen",
        Unit::Seconds,
        Some(0.001),
    ),
    ("since_changed", "1% of 1 GB changed", Unit::Bytes, None),
    ("saved@since", "... saved by --since", Unit::Bytes, None),
    ("since_ratio", "... saved / changed", Unit::Ratio, Some(1.2)),
    ("wall@since", "... whole snapshot", Unit::Seconds, None),
    (
        "pause_seen@since",
        "... pause, as seen",
        Unit::Seconds,
        Some(0.001),
    ),
    (
        "since_resume",
        "... the sequel resumed, until the first instruction",
        Unit::Seconds,
        Some(0.002),
    ),
    (
        "copies_resume",
        "100 copies of 128 MB, as reported",
        Unit::Seconds,
        Some(0.3),
    ),
    ("copies_wall", "... whole command", Unit::Seconds, Some(0.3)),
    (
        "copies_work",
        "... until each has read 32 MB",
        Unit::Seconds,
        None,
    ),
    (
        "copies_private",
        "... private memory of one, after reading",
        Unit::Bytes,
        Some(1048576.0),
    ),
    (
        "copies_machine",
        "... what the machine has less, a copy (with the template)",
        Unit::Bytes,
        None,
    ),
];

/// Measures those the plan wants.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    type Part = fn(&Plan, &mut Samples) -> Result<()>;
    let parts: [(&str, &str, Part); 4] = [
        ("threads", "many threads", threads),
        ("writer", "a busy writer", writer),
        ("since", "sequels, and a disk", since),
        ("copies", "many copies", copies),
    ];
    for (part, what, run) in parts {
        if !plan.wants(part) {
            continue;
        }
        say(what);
        if let Err(e) = run(plan, samples) {
            samples.miss(what, &e);
        }
        check_interrupted()?;
    }
    Ok(())
}

fn threads(plan: &Plan, samples: &mut Samples) -> Result<()> {
    let dir = plan.work.join("snapshot");
    for threads in [10, 100] {
        let kind = Kind {
            mb: MIDDLE,
            threads,
            ..Kind::default()
        };
        let target = Running::start(&plan.work.join("target"), kind)?;
        for _ in 0..plan.rounds {
            let taken = take(plan, &target, &dir, &[])?;
            taken.note(samples, |row| format!("{row}@threads{threads}"));
        }
    }
    Ok(())
}

fn writer(plan: &Plan, samples: &mut Samples) -> Result<()> {
    enough_memory(LARGE)?;
    let kind = Kind {
        mb: LARGE,
        busy: true,
        ..Kind::default()
    };
    let target = Running::start(&plan.work.join("target"), kind)?;
    let mean = |ns: u64, n: u64| ns as f64 / 1e9 / n.max(1) as f64;
    for _ in 0..plan.rounds {
        target.ask()?;
        std::thread::sleep(Duration::from_millis(500));
        let alone = target.ask()?;
        samples.add("write_before", mean(alone.write_ns, alone.writes));
        samples.add("write_slowest_before", alone.slowest_ns as f64 / 1e9);
        let taken = take(plan, &target, &plan.work.join("snapshot"), &[])?;
        taken.note(samples, |row| format!("{row}@writer"));
        let seen = taken.all;
        samples.add("write_mean", mean(seen.write_ns, seen.writes));
        let usual = mean(alone.write_ns, alone.writes) * seen.writes as f64;
        let lost = (seen.write_ns as f64 / 1e9 - usual).max(0.0);
        samples.add("write_page", lost / seen.pages.max(1) as f64);
        samples.add("write_slow", mean(seen.slow_ns, seen.slow));
        samples.add("write_slowest", seen.slowest_ns as f64 / 1e9);
        samples.add("write_count", seen.writes as f64);
        samples.add("write_slow_count", seen.slow as f64);
        check_interrupted()?;
    }
    Ok(())
}

fn since(plan: &Plan, samples: &mut Samples) -> Result<()> {
    enough_memory(LARGE)?;
    let kind = Kind {
        mb: LARGE,
        ..Kind::default()
    };
    let target = Running::start(&plan.work.join("target"), kind)?;
    let changed = ((LARGE << 8) / 100 * 4096) as f64;
    let name = |n: usize| plan.work.join(format!("sequel{n}"));
    keep(plan, &target, &name(0), &[])?;
    for round in 1..=plan.rounds {
        target.change()?;
        let parent = name(round - 1).display().to_string();
        let mut options = vec!["--since", &parent];
        if round == plan.rounds {
            options.push("--kill");
        }
        let taken = keep(plan, &target, &name(round), &options)?;
        samples.add("since_changed", changed);
        samples.add("since_ratio", taken.bytes / changed);
        samples.add("saved@since", taken.bytes);
        samples.add("wall@since", taken.wall);
        samples.add("pause_reported@since", taken.pause);
        if round < plan.rounds {
            samples.add("pause_seen@since", taken.seen);
        }
        check_interrupted()?;
    }
    // The sum of everything tells whether the chain holds.
    target.gone()?;
    let resumed = resume(plan, &target, &name(plan.rounds), true)?;
    samples.add("since_resume", resumed.0);
    for n in 0..=plan.rounds {
        let _ = std::fs::remove_dir_all(name(n));
    }
    // The resumed one goes on as the target; its memory is all there, as the sum has been made.
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..plan.rounds.min(2) {
        let taken = take(plan, &target, &plan.disk.join("snapshot"), &[])?;
        taken.note(samples, |row| format!("{row}@disk"));
        nix::unistd::sync();
        check_interrupted()?;
    }
    Ok(())
}

fn copies(plan: &Plan, samples: &mut Samples) -> Result<()> {
    // If nothing were shared, each copy would take all of it.
    enough_memory(MIDDLE * COPIES as u64 / 2)?;
    let kind = Kind {
        mb: MIDDLE,
        idle: true,
        ..Kind::default()
    };
    let target = Running::start(&plan.work.join("target"), kind)?;
    let dir = plan.work.join("snapshot");
    keep(plan, &target, &dir, &["--kill"])?;
    target.gone()?;
    for _ in 0..plan.rounds {
        let r = hundred(plan, &target, &dir.display().to_string(), samples);
        target.kill()?;
        r?;
        check_interrupted()?;
    }
    let _ = std::fs::remove_dir_all(&dir);
    Ok(())
}

fn hundred(plan: &Plan, target: &Running, dir: &str, samples: &mut Samples) -> Result<()> {
    let before = available()?;
    target.expect(false)?;
    let count = COPIES.to_string();
    let args = ["resume", dir, "--detach", "--count", &count];
    let (ran, answer) = umlctl(&plan.umlctl, &plan.work, &args)?;
    let said = target.resumed(COPIES)?;
    let last = said.iter().map(|r| r.done_ns).max().unwrap_or(0);
    let running = target.copies();
    let private: Vec<f64> = running.iter().filter_map(|p| private(*p)).collect();
    let each = private.iter().sum::<f64>() / private.len().max(1) as f64;
    let less = before.saturating_sub(available()?) as f64 / COPIES as f64;
    samples.add(
        "copies_resume",
        longest(&answer).context("umlctl's answer has no resume_us")?,
    );
    samples.add("copies_wall", ran.wall.as_secs_f64());
    samples.add(
        "copies_work",
        last.saturating_sub(ran.start_ns) as f64 / 1e9,
    );
    samples.add("copies_private", each);
    samples.add("copies_machine", less);
    Ok(())
}

/// The longest `resume_us` anywhere in an answer, seconds.
fn longest(answer: &Value) -> Option<f64> {
    let inner: Box<dyn Iterator<Item = &Value>> = match answer {
        Value::Object(o) => {
            if let Some(us) = o.get("resume_us").and_then(Value::as_f64) {
                return Some(us / 1e6);
            }
            Box::new(o.values())
        }
        Value::Array(a) => Box::new(a.iter()),
        _ => return None,
    };
    inner.filter_map(longest).reduce(f64::max)
}

/// Private memory of a process, bytes.
fn private(pid: i32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let kb: u64 = text
        .lines()
        .filter(|l| l.starts_with("Private_"))
        .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Some(kb as f64 * 1024.0)
}
