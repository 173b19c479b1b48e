//! The rows of each size: pause, save, resume.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::drive::{Kind, Running, number, run, umlctl};
use super::target::Seen;
use super::{Plan, Samples, at, more, size};
use crate::run::check_interrupted;

/// gcore takes seconds for more, megabytes.
const GCORE_LARGEST: u64 = 128;

/// After two rounds no new one begins when those of a size have taken so long.
const ENOUGH: Duration = Duration::from_secs(60);

/// Measures everything the plan wants.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    if plan.wants("sizes") {
        if !plan.gcore {
            eprintln!("bench: gcore is left out: install gdb for it");
        }
        for &mb in &plan.sizes {
            say(&size(mb));
            if let Err(e) = enough_memory(mb).and_then(|()| one_size(plan, mb, samples)) {
                samples.miss(&size(mb), &e);
            }
            check_interrupted()?;
        }
    }
    more::all(plan, samples)
}

/// Tells how far the run is.
pub fn say(what: &str) {
    eprintln!("bench: {what}");
}

/// A target and a snapshot of it must fit into memory.
pub fn enough_memory(mb: u64) -> Result<()> {
    let have = available()? / (1 << 20);
    if have < 2 * mb + 1024 {
        bail!(
            "left out: {have} MB of memory are available, {} are needed",
            2 * mb + 1024
        );
    }
    Ok(())
}

/// Memory that programs could still have, bytes.
pub fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let kb: Option<u64> = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.split_whitespace().next()?.parse().ok());
    Ok(kb.context("/proc/meminfo has no MemAvailable")? * 1024)
}

fn one_size(plan: &Plan, mb: u64, samples: &mut Samples) -> Result<()> {
    let kind = Kind {
        mb,
        ..Kind::default()
    };
    let target = Running::start(&plan.work.join("target"), kind)?;
    let dir = plan.work.join("snapshot");
    if mb <= GCORE_LARGEST {
        // The first snapshot of all pays for cold caches.
        take(plan, &target, &dir, &[])?;
    }
    let start = Instant::now();
    for round in 0..plan.rounds {
        if round >= 2 && start.elapsed() > ENOUGH {
            say(&format!("{round} rounds of it are enough"));
            break;
        }
        for system in ["umlctl", "stop-and-copy", "gcore"] {
            let done = match system {
                "umlctl" => take(plan, &target, &dir, &[]),
                "stop-and-copy" => take(plan, &target, &dir, &["--stop-and-copy"]),
                _ if plan.gcore && mb <= GCORE_LARGEST => {
                    gcore(plan, &target, mb, samples).map(|()| Taken::default())
                }
                _ => continue,
            };
            match done {
                Ok(t) if system != "gcore" => t.note(samples, |row| at(row, mb, system)),
                Ok(_) => {}
                Err(e) => samples.miss(&format!("{}, {system}", size(mb)), &e),
            }
            check_interrupted()?;
        }
    }
    resumes(plan, &target, mb, samples)
}

/// What the command says its pause is made of: fields of its answer, and names of the samples (in seconds as all).
pub const PARTS: [&str; 4] = ["stop_us", "mark_us", "state_us", "detach_us"];

/// What one snapshot has cost: as the command says, and as the target has seen it.
#[derive(Debug, Default)]
pub struct Taken {
    /// Seconds
    pub pause: f64,
    /// The same as the target has seen it: its longest gap
    pub seen: f64,
    /// How much of that it waited for a CPU, at most
    pub waiting: f64,
    /// The stop of one thread before
    pub prepare: f64,
    /// What the pause is made of
    pub parts: [f64; 4],
    /// The whole command
    pub wall: f64,
    /// Until it was published
    pub total: f64,
    /// Bytes of memory in its files
    pub bytes: f64,
    /// All the target has seen
    pub all: Seen,
}

impl Taken {
    /// Adds all to the samples.
    pub fn note(&self, samples: &mut Samples, name: impl Fn(&str) -> String) {
        for (row, value) in [
            ("pause_reported", self.pause),
            ("pause_seen", self.seen),
            ("pause_waiting", self.waiting),
            ("prepare", self.prepare),
            ("wall", self.wall),
            ("rate", self.bytes / self.total.max(1e-6)),
            ("saved", self.bytes),
        ] {
            samples.add(name(row), value);
        }
        for (row, value) in PARTS.iter().zip(self.parts) {
            samples.add(name(row), value);
        }
    }
}

/// Takes a snapshot and removes it, unless it was asked for by `--kill` or `--since`.
pub fn take(plan: &Plan, target: &Running, dir: &Path, options: &[&str]) -> Result<Taken> {
    let taken = keep(plan, target, dir, options);
    let _ = std::fs::remove_dir_all(dir);
    taken
}

/// Takes a snapshot.
pub fn keep(plan: &Plan, target: &Running, dir: &Path, options: &[&str]) -> Result<Taken> {
    let pid = target.pid.to_string();
    let name = dir.display().to_string();
    let mut args = vec!["snapshot", "--pid", &pid, &name];
    args.extend(options);
    target.ask()?;
    let (ran, answer) = umlctl(&plan.umlctl, &plan.work, &args)?;
    let seconds = |field| number(&answer, field).map(|us| us / 1e6);
    let mut taken = Taken {
        pause: seconds("pause_us")?,
        prepare: seconds("prepare_us")?,
        total: seconds("total_us")?,
        bytes: number(&answer, "bytes_saved")?,
        wall: ran.wall.as_secs_f64(),
        ..Taken::default()
    };
    for (part, field) in taken.parts.iter_mut().zip(PARTS) {
        *part = seconds(field)?;
    }
    if !options.contains(&"--kill") {
        taken.all = target.ask()?;
        taken.seen = taken.all.gap_ns as f64 / 1e9;
        taken.waiting = taken.all.gap_waiting_ns as f64 / 1e9;
    }
    Ok(taken)
}

fn gcore(plan: &Plan, target: &Running, mb: u64, samples: &mut Samples) -> Result<()> {
    let prefix = plan.work.join("core");
    let mut c = Command::new("gcore");
    c.arg("-o").arg(&prefix).arg(target.pid.to_string());
    target.ask()?;
    let ran = run(c, &plan.work);
    let _ = std::fs::remove_file(plan.work.join(format!("core.{}", target.pid)));
    samples.add(at("wall", mb, "gcore"), ran?.wall.as_secs_f64());
    samples.add(
        at("pause_seen", mb, "gcore"),
        target.ask()?.gap_ns as f64 / 1e9,
    );
    Ok(())
}

/// One snapshot that kills the target, resumed round after round; all memory is checked in the last.
fn resumes(plan: &Plan, target: &Running, mb: u64, samples: &mut Samples) -> Result<()> {
    let dir = plan.work.join("snapshot");
    keep(plan, target, &dir, &["--kill"])?;
    target.gone()?;
    for round in 1..=plan.rounds {
        let all = round == plan.rounds;
        let r = resume(plan, target, &dir, all);
        let killed = target.kill();
        let (resume, first, work) = r.with_context(|| format!("resume {round}"))?;
        killed?;
        samples.add(at("resume", mb, "umlctl"), resume);
        samples.add(at("resume_first", mb, "umlctl"), first);
        samples.add(at("resume_work", mb, "umlctl"), work);
        check_interrupted()?;
    }
    let _ = std::fs::remove_dir_all(&dir);
    Ok(())
}

/// Resumes, and waits for the first work. Seconds until the first instruction as the command says; and until the first
/// look at the clock, and the end of the work, from the start of the command.
pub fn resume(plan: &Plan, target: &Running, dir: &Path, all: bool) -> Result<(f64, f64, f64)> {
    target.expect(all)?;
    let name = dir.display().to_string();
    let (ran, answer) = umlctl(&plan.umlctl, &plan.work, &["resume", &name, "--detach"])?;
    let us = number(&answer, "resume_us")?;
    let pid = number(&answer, "pid")?;
    if (pid - f64::from(target.pid)).abs() > 0.1 {
        bail!("it was resumed as process {pid}, and was {}", target.pid);
    }
    let said = target.resumed(if all { 2 } else { 1 })?;
    let first = said.first().context("it said nothing")?;
    let since = |ns: u64| ns.saturating_sub(ran.start_ns) as f64 / 1e9;
    Ok((us / 1e6, since(first.first_ns), since(first.done_ns)))
}
