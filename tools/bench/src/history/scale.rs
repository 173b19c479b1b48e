//! What many files and many checkpoints cost: checkpoint, rollback, list and diff at ten checkpoints and at a thousand, and
//! diff in a small tree and in a large one.

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Plan;
use crate::peers::{Cowfs, FsUnderTest};
use crate::run::{check_interrupted, client};
use crate::table1::Samples;

/// The few checkpoints that the many are compared with.
pub const FEW: usize = 10;
/// Files of the small tree.
pub const SMALLEST: u64 = 10_000;
/// Files changed before every checkpoint.
const CHANGED: u64 = 100;
/// Files changed for the larger difference.
const MORE: u64 = 1_000;
/// Samples of a row for each round.
const REPEATS: usize = 5;

/// What is measured, and its title.
pub const ROWS: [(&str, &str); 8] = [
    ("checkpoint_inside", "checkpoint, in the daemon"),
    ("checkpoint_call", "checkpoint, whole call"),
    ("rollback_inside", "rollback, in the daemon"),
    ("rollback_call", "rollback, whole call"),
    ("list_socket", "list, asked and answered over the socket"),
    ("list_call", "list, whole call"),
    ("diff_socket", "diff of neighbours, over the socket"),
    ("diff_call", "diff of neighbours, whole call"),
];

/// The start of a command alone, which is in every whole call, and with it what other work on the machine does to it.
pub const SPAWN: &str = "spawn";

/// A tree with checkpoints.
struct Scene<'a> {
    fs: Cowfs,
    files: u64,
    made: usize,
    samples: &'a mut Samples,
}

/// All rows.
///
/// # Errors
/// If something of cowfs fails or answers wrongly, or the run was interrupted.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    let samples_of_row = plan.rounds * REPEATS;
    for (what, value) in [
        ("files", plan.files as f64),
        ("checkpoints", plan.checkpoints as f64),
    ] {
        samples.add(format!("scale_{what}"), value);
    }
    let mut sizes = vec![SMALLEST, plan.files];
    sizes.dedup();
    for files in sizes {
        let large = files == plan.files;
        eprintln!("bench: {files} files");
        let mut fs = Cowfs::of(&plan.cowfs, &plan.work.join(format!("scale-{files}")));
        fs.setup()?;
        let took = client("populate", fs.root(), &[files])?.seconds();
        samples.add(format!("populate@{files}"), took);
        let mut scene = Scene {
            fs,
            files,
            made: 0,
            samples,
        };
        while scene.made < FEW {
            scene.checkpoint(None)?;
        }
        scene.measure(FEW, samples_of_row)?;
        scene.larger_diff(samples_of_row)?;
        if large {
            while scene.made < plan.checkpoints {
                scene.checkpoint(None)?;
                if scene.made.is_multiple_of(100) {
                    eprintln!("bench: {} checkpoints", scene.made);
                }
            }
            scene.measure(plan.checkpoints, samples_of_row)?;
            let rss = scene.fs.rss()?;
            scene.samples.add("scale_rss", rss);
        }
    }
    Ok(())
}

/// Name of a sample at a number of files and checkpoints.
pub fn id(row: &str, files: u64, checkpoints: usize) -> String {
    format!("{row}@{files}@{checkpoints}")
}

impl Scene<'_> {
    fn change(&self, count: u64) -> Result<()> {
        let seed = u64::try_from(self.made).context("a seed")? + 1;
        client("change", self.fs.root(), &[self.files, count, seed]).map(drop)
    }

    /// Changes some files and makes the next checkpoint; its time goes to the rows at so many, if that is given.
    fn checkpoint(&mut self, of: Option<usize>) -> Result<()> {
        check_interrupted()?;
        self.change(CHANGED)?;
        self.made += 1;
        let call = self.fs.call("checkpoint", &[&name(self.made)])?;
        if let Some(n) = of {
            self.add("checkpoint_inside", n, call.inside / 1e6);
            self.add("checkpoint_call", n, call.outside / 1e6);
        }
        Ok(())
    }

    fn add(&mut self, row: &str, checkpoints: usize, seconds: f64) {
        self.samples.add(id(row, self.files, checkpoints), seconds);
    }

    fn measure(&mut self, n: usize, repeats: usize) -> Result<()> {
        for _ in 0..repeats {
            let spawn = self.fs.spawn_us()?;
            self.add(SPAWN, n, spawn / 1e6);
            self.checkpoint(Some(n))?;
            self.rollback(n)?;
            self.list(n)?;
            self.diff(n, CHANGED, ["diff_socket", "diff_call"])?;
        }
        Ok(())
    }

    /// Goes back to the last checkpoint after a change, and looks whether the change is gone.
    fn rollback(&mut self, n: usize) -> Result<()> {
        let seed = u64::try_from(self.made).context("a seed")? + 1;
        let numbers = [self.files, CHANGED, seed];
        let digest =
            |s: &Self| Ok::<_, anyhow::Error>(client("digest", s.fs.root(), &numbers)?.sum);
        let before = digest(self)?;
        self.change(CHANGED)?;
        if digest(self)? == before {
            bail!("nothing was changed before a rollback");
        }
        // What is left behind would be one more checkpoint.
        let call = self.fs.call("rollback", &[&name(self.made), "--discard"])?;
        if digest(self)? != before {
            bail!("a rollback did not bring the contents back");
        }
        self.add("rollback_inside", n, call.inside / 1e6);
        self.add("rollback_call", n, call.outside / 1e6);
        Ok(())
    }

    fn list(&mut self, n: usize) -> Result<()> {
        let (took, text) = self.fs.ask(&json!({ "request": "list" }))?;
        if !text.contains(&format!("\"{}\"", name(self.made))) {
            bail!("the last checkpoint is not in the list");
        }
        self.add("list_socket", n, took.as_secs_f64());
        let took = self.fs.answer("list", &[])?.0;
        self.add("list_call", n, took.as_secs_f64());
        Ok(())
    }

    /// The difference of the last two checkpoints, which has so many entries.
    fn diff(&mut self, n: usize, entries: u64, rows: [&str; 2]) -> Result<()> {
        let (a, b) = (name(self.made - 1), name(self.made));
        let request = json!({ "request": "diff", "head": "main", "a": a, "b": b });
        let (took, _) = self.fs.ask(&request)?;
        self.add(rows[0], n, took.as_secs_f64());
        let (took, answer) = self.fs.answer("diff", &[&a, &b])?;
        let found = answer["entries"].as_array().map_or(0, Vec::len);
        if u64::try_from(found).ok() != Some(entries) {
            bail!("diff {a} {b} has {found} entries, not {entries}");
        }
        self.add(rows[1], n, took.as_secs_f64());
        Ok(())
    }

    /// The same with ten times as many changes: what it costs is to follow these.
    fn larger_diff(&mut self, repeats: usize) -> Result<()> {
        self.change(MORE)?;
        self.made += 1;
        self.fs.call("checkpoint", &[&name(self.made)])?;
        for _ in 0..repeats {
            self.diff(FEW, MORE, ["diff_more_socket", "diff_more_call"])?;
        }
        Ok(())
    }
}

fn name(n: usize) -> String {
    format!("c{n:05}")
}
