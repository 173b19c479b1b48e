//! Reading and writing one file.

use std::path::Path;

use anyhow::Result;

use super::{Bed, label};
use crate::cli::Plan;
use crate::peers::FsUnderTest;
use crate::results::{Goal, Results, Row, Unit};
use crate::run::{Done, Placement, check_interrupted, client, settle};

/// Rows of this group.
pub fn rows() -> Vec<Row> {
    use Unit::{BytesPerSecond as Bytes, PerSecond as Ops};
    let row = |id, title, unit, goal| Row::new(id, title, unit, vec![Goal::RateAtLeast(goal)]);
    vec![
        row(
            "seq_write",
            "sequential write, new file, fsync at the end",
            Bytes,
            0.9,
        ),
        row("seq_read_warm", "sequential read, warm", Bytes, 0.9),
        row("seq_read_cold", "sequential read, cold", Bytes, 0.9),
        row("rand_read_warm", "random read 4 KiB, warm", Ops, 0.9),
        row("rand_read_cold", "random read 4 KiB, cold", Ops, 0.9),
        row("mmap_read_warm", "mmap read, warm", Bytes, 0.9),
        row("mmap_read_cold", "mmap read, cold", Bytes, 0.9),
        row("rand_write", "random write 4 KiB", Ops, 0.5),
        row("fsync_write", "write 4 KiB + fsync", Ops, 0.8),
    ]
}

/// Runs them: every round takes each row on all filesystems in turn.
pub fn run(plan: &Plan, placement: Placement, results: &mut Results) -> Result<()> {
    let mut bed = Bed::new(plan, results, "io")?;
    let rows = rows();
    for round in 0..plan.rounds as u64 {
        for row in &rows {
            // The file that is read must be there whatever is asked for.
            let needed = round == 0 && row.id == "seq_write";
            if !needed && !plan.wants("io", &row.id) {
                continue;
            }
            for fs in &mut bed.systems {
                settle();
                match sample(plan, fs.as_ref(), &row.id, round) {
                    Ok(done) => {
                        if plan.wants("io", &row.id) {
                            results.add(placement, &row.id, fs.name(), done.rate());
                        }
                    }
                    Err(e) => results.miss(fs.name(), &label(&row.id, placement), &e),
                }
                check_interrupted()?;
            }
        }
    }
    Ok(())
}

/// One sample.
fn sample(plan: &Plan, fs: &dyn FsUnderTest, row: &str, round: u64) -> Result<Done> {
    // The file that is read stays in one piece; the other takes the writes.
    let (reads, writes) = (fs.root().join("reads"), fs.root().join("writes"));
    let seed = round + 1;
    match row {
        "seq_write" => {
            remove(&reads)?;
            client("seq-write", &reads, &[plan.file_bytes])
        }
        "seq_read_warm" => warm(&reads, |p| client("seq-read", p, &[])),
        "rand_read_warm" => warm(&reads, |p| client("rand-read", p, &[plan.random_ops, seed])),
        "mmap_read_warm" => warm(&reads, |p| client("mmap-read", p, &[])),
        "seq_read_cold" => {
            fs.drop_caches()?;
            client("seq-read", &reads, &[])
        }
        "rand_read_cold" => {
            fs.drop_caches()?;
            client("rand-read", &reads, &[plan.cold_ops, seed])
        }
        "mmap_read_cold" => {
            fs.drop_caches()?;
            client("mmap-read", &reads, &[])
        }
        "rand_write" => writes_to(&writes, plan, |p| {
            client("rand-write", p, &[plan.random_ops, seed])
        }),
        _ => writes_to(&writes, plan, |p| {
            client("fsync-write", p, &[plan.fsync_ops, seed])
        }),
    }
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    settle();
    Ok(())
}

/// Reads the file once before the sample.
fn warm(path: &Path, f: impl FnOnce(&Path) -> Result<Done>) -> Result<Done> {
    client("seq-read", path, &[])?;
    f(path)
}

/// Makes the file that takes the writes, if it is not there.
fn writes_to(path: &Path, plan: &Plan, f: impl FnOnce(&Path) -> Result<Done>) -> Result<Done> {
    if !path.exists() {
        client("seq-write", path, &[plan.file_bytes / 2])?;
        settle();
    }
    f(path)
}
