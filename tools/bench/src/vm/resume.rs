//! How long it takes until a machine of a snapshot answers.

use std::time::Instant;

use anyhow::{Context, Result};

use super::Plan;
use super::guest::{ECHO, NC, Vm};
use super::net::{Asker, first_reply};
use crate::run::check_interrupted;
use crate::table1::drive::number;
use crate::table1::measure::{enough_memory, say};
use crate::table1::{Samples, at};

/// Who echoes after a resume, and the sample: a process that waits for it, and one that is made for it.
const ECHOES: [(u16, &str); 2] = [(ECHO, "first"), (NC, "first-nc")];

/// The part `resume`: a snapshot of each size, and machines of them in rounds.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    let mut sizes = Vec::new();
    for &mb in &plan.sizes {
        say(&format!("a snapshot of {mb} MB"));
        match enough_memory(mb).and_then(|()| save(plan, mb)) {
            Ok(()) => sizes.push(mb),
            Err(e) => samples.miss(&format!("resume, {mb} MB"), &e),
        }
        check_interrupted()?;
    }
    for round in 1..=plan.rounds {
        let mut firsts = Vec::new();
        for (port, row) in ECHOES {
            for &mb in &sizes {
                match resume(plan, samples, mb, (port, row), round == plan.rounds) {
                    Ok(first) => firsts.push(first),
                    Err(e) => samples.miss(&format!("resume, {mb} MB"), &e),
                }
                check_interrupted()?;
            }
        }
        if let ([64, .., 1024], true) = (&sizes[..], firsts.len() == sizes.len() * ECHOES.len()) {
            samples.add("resume_ratio", firsts[sizes.len() - 1] / firsts[0]);
        }
    }
    for mb in sizes {
        plan.umlctl(&["rm-snapshot", &snapshot(mb)])?;
    }
    Ok(())
}

fn snapshot(mb: u64) -> String {
    format!("r{mb}")
}

/// A snapshot that ends its machine.
fn save(plan: &Plan, mb: u64) -> Result<()> {
    let vm = Vm::start(plan, "idle", "idle", mb)?;
    plan.umlctl(&["snapshot", &vm.name, &snapshot(mb), "--kill"])?;
    Ok(())
}

/// One resume; seconds until the first echo.
fn resume(
    plan: &Plan,
    samples: &mut Samples,
    mb: u64,
    (port, row): (u16, &str),
    check: bool,
) -> Result<f64> {
    let start = Instant::now();
    let (ran, answer) = plan.umlctl(&["resume", &snapshot(mb), "--name", "r"])?;
    let vm = Vm::made(plan, &answer)?;
    let first = first_reply(&vm.address, port)?
        .duration_since(start)
        .as_secs_f64();
    let reported = number(&answer, "resume_us")? / 1e6;
    for (row, value) in [
        ("reported", reported),
        ("command", ran.wall.as_secs_f64()),
        (row, first),
    ] {
        samples.add(at("resume", mb, row), value);
    }
    if check && Plan::fill(mb) > 0 {
        Asker::new(&vm.address)?
            .check()
            .with_context(|| format!("after a resume of {mb} MB"))?;
    }
    Ok(first)
}
