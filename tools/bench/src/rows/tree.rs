//! A real tree: unpacking, walking, searching, git, removing.

use std::path::Path;

use anyhow::{Context, Result};

use super::{Bed, label};
use crate::cli::Plan;
use crate::peers::FsUnderTest;
use crate::results::{Goal, Results, Row, Unit};
use crate::run::{Placement, check_interrupted, client, command, settle, timed, timed_codes};
use crate::source::{Source, which};

/// Rows of this group.
pub fn rows() -> Vec<Row> {
    let row = |id: &str, title: &str, goals| Row::new(id, title, Unit::Seconds, goals);
    let write = |g| {
        vec![
            Goal::TimeAtMost(g),
            Goal::FasterThan(4.0, "fuse-overlayfs".into()),
        ]
    };
    let second = || vec![Goal::TimeAtMost(1.2)];
    let first = |id: &str| vec![Goal::TimeAtMostOf(3.0, id.into())];
    vec![
        row("untar", "untar of a real tree", write(4.0)),
        row("rm", "rm -rf of it", write(3.0)),
        row("stat", "stat walk, second time", second()),
        row("grep", "grep -r, second time", second()),
        row("git", "git status, second time", second()),
        row(
            "first_stat",
            "stat walk, first after a mount",
            first("stat"),
        ),
        row("first_grep", "grep -r, first after a mount", first("grep")),
        row("first_git", "git status, first after a mount", first("git")),
        row(
            "cold_stat",
            "stat walk, after a mount, host cold too",
            vec![],
        ),
        row("cold_grep", "grep -r, after a mount, host cold too", vec![]),
    ]
}

/// Runs them: in every round each filesystem goes through the whole life of the tree.
pub fn run(
    plan: &Plan,
    source: &Source,
    placement: Placement,
    results: &mut Results,
) -> Result<()> {
    let mut bed = Bed::new(plan, results, "tree")?;
    for _ in 0..plan.tree_rounds {
        for fs in &mut bed.systems {
            if let Err(e) = life(plan, source, fs.as_mut(), placement, results) {
                results.miss(fs.name(), &label("tree", placement), &e);
            }
            for e in fs.complaints() {
                results.miss(fs.name(), &label("tree", placement), &e);
            }
            check_interrupted()?;
        }
    }
    Ok(())
}

/// From unpacking to removing.
fn life(
    plan: &Plan,
    source: &Source,
    fs: &mut dyn FsUnderTest,
    placement: Placement,
    results: &mut Results,
) -> Result<()> {
    let tree = fs.root().join("tree");
    let name = fs.name();
    if tree.exists() {
        timed(rm(&tree))?;
    }
    std::fs::create_dir(&tree).with_context(|| format!("making {}", tree.display()))?;
    // The tarball is read from memory.
    client("seq-read", &source.tar, &[])?;
    settle();
    results.add(placement, "untar", name, untar(source, &tree)?);
    settle();

    let wants = |row: &str| plan.wants("tree", row);
    let kinds = ["stat", "grep", "git"];
    for kind in kinds {
        let asked = wants(kind) || wants(&format!("first_{kind}"));
        if !asked || (kind == "git" && !which("git")) {
            continue;
        }
        // The first git status after unpacking looks into all files and writes the index: it is not part of any row.
        walk(kind, &tree, true)?;
        settle();
        walk(kind, &tree, false)?;
        results.add(placement, kind, name, walk(kind, &tree, false)?);
        fs.remount()?;
        results.add(
            placement,
            &format!("first_{kind}"),
            name,
            walk(kind, &tree, false)?,
        );
        if kind != "git" && wants(&format!("cold_{kind}")) {
            fs.remount()?;
            fs.drop_caches()?;
            results.add(
                placement,
                &format!("cold_{kind}"),
                name,
                walk(kind, &tree, false)?,
            );
        }
    }
    // Warm, so that rm does not read from the disk.
    walk("stat", &tree, false)?;
    settle();
    results.add(placement, "rm", name, timed(rm(&tree))?.as_secs_f64());
    Ok(())
}

/// Unpacks the tree; seconds.
pub fn untar(source: &Source, to: &Path) -> Result<f64> {
    let mut c = command("tar", &["--no-same-owner", "-xf"]);
    c.arg(&source.tar).arg("-C").arg(to);
    Ok(timed(c)?.as_secs_f64())
}

fn rm(tree: &Path) -> std::process::Command {
    let mut c = command("rm", &["-rf", "--"]);
    c.arg(tree);
    c
}

/// Goes over the whole tree in one way; seconds.
fn walk(kind: &str, tree: &Path, write_index: bool) -> Result<f64> {
    match kind {
        "stat" => Ok(client("stat", tree, &[])?.seconds()),
        "grep" => {
            let mut c = command("grep", &["-rF", "nowhere-in-this-tree-zq"]);
            c.arg(tree);
            // 1: found nothing.
            Ok(timed_codes(c, &[0, 1])?.as_secs_f64())
        }
        _ => {
            let mut c = command("git", &["-c", "safe.directory=*", "status", "--porcelain"]);
            c.current_dir(tree)
                .env("GIT_OPTIONAL_LOCKS", if write_index { "1" } else { "0" });
            Ok(timed(c)?.as_secs_f64())
        }
    }
}
