//! Checkpoint and rollback by the number of files, and the daemon's memory.

use anyhow::{Context, Result, bail};

use super::snap_peers::{CALL, Figures, Snapshots, all};
use super::{label, say};
use crate::cli::Plan;
use crate::results::{Goal, Results, Row, Unit};
use crate::run::{Holder, Placement, check_interrupted, client, command, place, settle, timed};

/// Files changed before every checkpoint and rollback.
const CHANGED: u64 = 100;
/// What the goals say, microseconds and bytes.
const CHECKPOINT_US: f64 = 1000.0;
const ROLLBACK_US: f64 = 5000.0;
const MEMORY: f64 = 200e6;
/// Rows of the command's own start, and of the smallest program's.
const SPAWN: &str = "spawn";
const SPAWN_TRUE: &str = "spawn_true";
/// What mounting may take, microseconds.
const MOUNT_US: f64 = 1.2e6;

/// Row of a figure at a number of files.
pub fn id(what: &str, files: u64) -> String {
    format!("{what}@{files}")
}

/// A number of files for people.
pub fn short(files: u64) -> String {
    match files {
        n if n >= 1_000_000 && n.is_multiple_of(1_000_000) => format!("{}M", n / 1_000_000),
        n if n >= 1000 && n.is_multiple_of(1000) => format!("{}k", n / 1000),
        n => n.to_string(),
    }
}

/// Rows of this group.
pub fn rows(plan: &Plan) -> Vec<Row> {
    let mut rows = Vec::new();
    let (checkpoint, rollback) = (Some(CHECKPOINT_US), Some(ROLLBACK_US));
    let kinds = [
        ("checkpoint", "checkpoint, in the daemon", checkpoint),
        (
            "checkpoint_socket",
            "checkpoint, asked and answered over the socket",
            checkpoint,
        ),
        ("checkpoint_call", "checkpoint, whole call", checkpoint),
        (
            "checkpoint_clean_call",
            "checkpoint, nothing changed, whole call",
            None,
        ),
        (
            "first_checkpoint_call",
            "checkpoint, all files new, whole call",
            None,
        ),
        ("rollback", "rollback, in the daemon", rollback),
        ("rollback_call", "rollback, whole call", rollback),
        (
            "rollback_held",
            "rollback, process inside, in the daemon",
            rollback,
        ),
        (
            "rollback_held_call",
            "rollback, process inside, whole call",
            rollback,
        ),
    ];
    for (what, title, goal) in kinds {
        for &files in &plan.counts {
            let mut goals: Vec<Goal> = goal.into_iter().map(Goal::AtMost).collect();
            // Flat: the largest within twice the smallest.
            if goal.is_some() && plan.counts.len() > 1 && Some(&files) == plan.counts.last() {
                goals.push(Goal::Within(2.0, id(what, plan.counts[0])));
            }
            rows.push(Row::new(
                id(what, files),
                format!("{title}, {} files", short(files)),
                Unit::Micros,
                goals,
            ));
        }
    }
    let spawn = "(starting the cowfs command alone, --version)";
    rows.push(Row::new(SPAWN, spawn, Unit::Micros, vec![]));
    let spawn = "(starting /bin/true: what no command can be below)";
    rows.push(Row::new(SPAWN_TRUE, spawn, Unit::Micros, vec![]));
    for (what, title) in [
        ("mount", "mounting, after a clean end"),
        (
            "mount_crash",
            "mounting, after kill -9 with a log to replay",
        ),
    ] {
        for &files in &plan.counts {
            let goals = vec![Goal::AtMost(MOUNT_US)];
            rows.push(Row::new(
                id(what, files),
                format!("{title}, {} files", short(files)),
                Unit::Micros,
                goals,
            ));
        }
    }
    for &files in &plan.counts {
        let goals = vec![Goal::AtMost(MEMORY)];
        rows.push(Row::new(
            id("rss", files),
            format!("daemon's memory, {} files", short(files)),
            Unit::Bytes,
            goals,
        ));
    }
    rows
}

/// Runs them. A tree is populated once, on one CPU (several times faster with FUSE); then client and daemon are
/// placed for each half of the table.
pub fn run(plan: &Plan, results: &mut Results) -> Result<()> {
    for &files in &plan.counts {
        if ![
            "checkpoint",
            "checkpoint_call",
            "checkpoint_socket",
            "mount",
            "mount_crash",
            "first_checkpoint_call",
            "rollback",
            "rollback_held_call",
            "rss",
        ]
        .iter()
        .any(|w| plan.wants("snap", &id(w, files)))
        {
            continue;
        }
        say(&format!("checkpoints of {} files", short(files)));
        place(Placement::Pinned, &[])?;
        let dir = plan.work.join(format!("snap{files}"));
        let mut ready = Vec::new();
        for mut s in all(plan, files, &dir)? {
            match prepare(s.as_mut(), files, results, plan) {
                Ok(()) => ready.push(s),
                Err(e) => results.miss(s.name(), &id("checkpoint", files), &e),
            }
            check_interrupted()?;
        }
        for placement in &plan.placements {
            for round in 0..plan.rounds as u64 {
                for s in &mut ready {
                    settle();
                    place(*placement, &s.pids())?;
                    for i in 0..s.repeats() {
                        let seed = round * 100 + i * 10;
                        if let Err(e) = one_round(s.as_mut(), files, seed, *placement, results) {
                            results.miss(
                                s.name(),
                                &label(&id("checkpoint", files), *placement),
                                &e,
                            );
                        }
                        check_interrupted()?;
                    }
                }
            }
        }
        for s in &mut ready {
            for placement in &plan.placements {
                place(*placement, &s.pids())?;
                match s.mount_times() {
                    Some(Ok((clean, crashed))) => {
                        let system = s.name();
                        results.add(*placement, &id("mount", files), system, clean);
                        results.add(*placement, &id("mount_crash", files), system, crashed);
                    }
                    Some(Err(e)) => {
                        results.miss(s.name(), &label(&id("mount", files), *placement), &e);
                    }
                    None => {}
                }
            }
        }
    }
    Ok(())
}

/// Makes the tree and takes the first checkpoint, which finds all of it new.
fn prepare(s: &mut dyn Snapshots, files: u64, results: &mut Results, plan: &Plan) -> Result<()> {
    s.setup()?;
    let done = client("populate", &s.tree(), &[files])?;
    if files >= 100_000 {
        say(&format!(
            "{}: {} files at {:.0}/s",
            s.name(),
            short(files),
            done.rate()
        ));
    }
    let figures = s.checkpoint("first")?;
    let first = figures.iter().find(|f| f.0 == CALL).context("no figure")?.1;
    client("stat", &s.tree(), &[])?;
    for placement in &plan.placements {
        // Taken once, on one CPU; only shown there.
        if *placement == Placement::Pinned {
            results.add(
                *placement,
                &id("first_checkpoint_call", files),
                s.name(),
                first,
            );
        }
        if let Some(rss) = s.rss() {
            results.add(*placement, &id("rss", files), s.name(), rss);
        }
    }
    Ok(())
}

/// Change and checkpoint; change and go back; the same with a process inside.
fn one_round(
    s: &mut dyn Snapshots,
    files: u64,
    seed: u64,
    placement: Placement,
    results: &mut Results,
) -> Result<()> {
    let name = format!("{}-{seed}", placement.name());
    let seed = seed + if placement == Placement::Pinned { 5 } else { 1 };
    let system = s.name();
    let mut note = |what: &str, figures: Figures| {
        for (suffix, us) in figures {
            results.add(
                placement,
                &id(&format!("{what}{suffix}"), files),
                system,
                us,
            );
        }
    };
    let tree = s.tree();
    client("change", &tree, &[files, CHANGED, seed + 3])?;
    if let Some(us) = s.checkpoint_by_socket(&format!("{name}.socket")) {
        note("checkpoint_socket", vec![("", us?)]);
    }
    client("change", &tree, &[files, CHANGED, seed])?;
    let figures = s.checkpoint(&name)?;
    note("checkpoint", figures);
    if s.live() {
        let mut clean = s.checkpoint(&format!("{name}.clean"))?;
        clean.retain(|f| f.0 == CALL);
        note("checkpoint_clean", clean);
    }
    note("rollback", back(s, files, &name, seed + 1)?);
    if s.live() {
        let inside = Holder::start(&tree)?;
        note("rollback_held", back(s, files, &name, seed + 2)?);
        drop(inside);
    }
    if let Some(us) = s.spawn_us() {
        results.add(placement, SPAWN, system, us);
        let least = timed(command::<&str>("/bin/true", &[]))?;
        results.add(placement, SPAWN_TRUE, system, least.as_secs_f64() * 1e6);
    }
    if let Some(bytes) = s.rss() {
        results.add(placement, &id("rss", files), system, bytes);
    }
    Ok(())
}

/// Changes files, goes back, and looks whether they are as they were.
fn back(s: &mut dyn Snapshots, files: u64, name: &str, seed: u64) -> Result<Figures> {
    let which = [files, CHANGED, seed];
    let before = client("digest", &s.tree(), &which)?.sum;
    client("change", &s.tree(), &which)?;
    if client("digest", &s.tree(), &which)?.sum == before {
        bail!("the change did not arrive");
    }
    let figures = s.rollback(name)?;
    if client("digest", &s.tree(), &which)?.sum != before {
        bail!("the rollback to {name} did not bring the old contents back");
    }
    Ok(figures)
}
