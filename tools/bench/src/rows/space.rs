//! How large a store becomes with checkpoints.

use anyhow::{Context, Result};

use super::tree::untar;
use crate::cli::Plan;
use crate::peers::{Cowfs, FsUnderTest};
use crate::results::{Goal, Results, Row, Unit};
use crate::run::{Placement, client, command, output, settle};
use crate::source::Source;

/// Checkpoints, each after changing one percent.
const CHECKPOINTS: u64 = 10;

/// Rows of this group.
pub fn rows() -> Vec<Row> {
    let row = |id: &str, title: &str, unit, goals| Row::new(id, title, unit, goals);
    vec![
        row(
            "store_size",
            "store / data, ten checkpoints that each change 1%",
            Unit::Ratio,
            vec![Goal::AtMost(1.15)],
        ),
        row(
            "store_size_bytes",
            "the same / bytes of the files without rounding up to blocks",
            Unit::Ratio,
            vec![],
        ),
        row("store_bytes", "the store then", Unit::Bytes, vec![]),
    ]
}

/// Runs them once: sizes do not depend on the placement, and are the same every time.
pub fn run(plan: &Plan, source: &Source, results: &mut Results) -> Result<()> {
    let Some(placement) = plan.placements.first() else {
        return Ok(());
    };
    if plan.cowfs.is_none() {
        return Ok(());
    }
    if let Err(e) = measure(plan, source, *placement, results) {
        results.miss("cowfs", "store_size", &e);
    }
    Ok(())
}

fn measure(
    plan: &Plan,
    source: &Source,
    placement: Placement,
    results: &mut Results,
) -> Result<()> {
    let mut fs = Cowfs::new(plan, &plan.work.join("space"))?;
    fs.setup()?;
    let tree = fs.root().join("tree");
    std::fs::create_dir(&tree).context("making the tree")?;
    untar(source, &tree)?;
    // The repository counts as data like all else.
    let (data, bytes) = data_of(&tree)?;
    for i in 0..CHECKPOINTS {
        client("rewrite", &tree, &[1, i + 1])?;
        fs.call("checkpoint", &[&format!("percent{i}"), "--wait"])?;
    }
    settle();
    let store = du(&fs.store(), &["-s", "-B1"])?;
    results.add(placement, "store_size", "cowfs", store / data);
    results.add(placement, "store_size_bytes", "cowfs", store / bytes);
    results.add(placement, "store_bytes", "cowfs", store);
    Ok(())
}

/// Bytes of a tree's files in whole blocks as ext4 has them, and without rounding.
fn data_of(tree: &std::path::Path) -> Result<(f64, f64)> {
    let mut c = command("find", &[tree]);
    c.args(["-printf", "%s %y\n"]);
    let (_, text) = output(c)?;
    let (mut blocks, mut bytes) = (0_u64, 0_u64);
    for line in text.lines() {
        let (size, kind) = line.split_once(' ').context("find's output")?;
        let size: u64 = size.parse().context("find's output")?;
        match kind {
            "f" => {
                blocks += size.next_multiple_of(4096);
                bytes += size;
            }
            "d" => blocks += 4096,
            _ => {}
        }
    }
    Ok((blocks as f64, bytes as f64))
}

fn du(dir: &std::path::Path, args: &[&str]) -> Result<f64> {
    let mut c = command("du", args);
    c.arg(dir);
    let (_, text) = output(c)?;
    text.split_whitespace()
        .next()
        .and_then(|w| w.parse().ok())
        .context("du's output")
}
