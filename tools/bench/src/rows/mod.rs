//! The rows of the table, one module for each group.

mod io;
mod snap;
mod snap_peers;
mod space;
mod tree;

use anyhow::Result;

use crate::cli::Plan;
use crate::peers::{self, FsUnderTest};
use crate::results::{Results, Row};
use crate::run::{Placement, check_interrupted, place};
use crate::source;

pub use snap::{id, short};

/// Filesystems under test, set up side by side.
struct Bed {
    systems: Vec<Box<dyn FsUnderTest>>,
}

impl Bed {
    /// Sets all up; those that cannot be are noted and left out.
    fn new(plan: &Plan, results: &mut Results, what: &str) -> Result<Self> {
        let dir = plan.work.join(what);
        let mut systems = Vec::new();
        for name in &plan.systems {
            let made = peers::make(name, plan, &dir).and_then(|mut fs| fs.setup().map(|()| fs));
            match made {
                Ok(fs) => systems.push(fs),
                Err(e) => results.miss(name, what, &e),
            }
            check_interrupted()?;
        }
        Ok(Self { systems })
    }
}

/// Runs all rows that the plan wants, under all its placements.
pub fn run_all(plan: &Plan, results: &mut Results) -> Result<()> {
    let rows: Vec<(&str, Vec<Row>)> = vec![
        ("snap", snap::rows(plan)),
        ("io", io::rows()),
        ("tree", tree::rows()),
        ("space", space::rows()),
    ];
    let mut wanted = Vec::new();
    for (group, rows) in rows {
        for row in rows {
            if plan.wants(group, &row.id) {
                wanted.push(group);
                results.row(row);
            }
        }
    }
    let wants = |g: &str| wanted.contains(&g);
    let source = if wants("tree") || wants("space") {
        say("collecting a tree of files of this machine");
        let s = source::make(&plan.work, plan.tree_files)?;
        let text = format!(
            "{} files, {:.1} MB ({:.1} MB in blocks)",
            s.files,
            mb(s.bytes),
            mb(s.block_bytes)
        );
        say(&format!("the tree: {text}"));
        results.about.insert("tree".into(), text);
        Some(s)
    } else {
        None
    };
    for placement in &plan.placements {
        place(*placement, &[])?;
        if wants("io") {
            say(&format!("reading and writing, {}", placement.name()));
            io::run(plan, *placement, results)?;
        }
        if wants("tree")
            && let Some(source) = &source
        {
            say(&format!("the tree, {}", placement.name()));
            tree::run(plan, source, *placement, results)?;
        }
    }
    if wants("space")
        && let Some(source) = &source
    {
        say("the store's size");
        space::run(plan, source, results)?;
    }
    if wants("snap") {
        snap::run(plan, results)?;
    }
    Ok(())
}

/// Tells how far the run is.
fn say(what: &str) {
    eprintln!("bench: {what}");
}

/// Megabytes.
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// What one sample is called in messages.
fn label(row: &str, placement: Placement) -> String {
    format!("{row}, {}", placement.name())
}
