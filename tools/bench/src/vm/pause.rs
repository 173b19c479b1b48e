//! How long a machine stands still for a snapshot: as reported, as the network sees it, and as its own clock does.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::guest::Vm;
use super::net::{Asker, Client};
use super::tap::{GUEST, Tap};
use super::{Plan, boot};
use crate::run::check_interrupted;
use crate::table1::drive::number;
use crate::table1::measure::{enough_memory, say};
use crate::table1::{Samples, at};

/// Megabytes of the machine that is looked at most closely.
const MB: u64 = 128;
/// How a snapshot is taken, and the options for it.
pub const WAYS: [(&str, &[&str]); 2] = [("lazy", &[]), ("stop-and-copy", &["--stop-and-copy"])];
/// Fields of the answer that are times, in microseconds, and their samples.
pub const TIMES: [&str; 7] = [
    "pause_us",
    "stop_us",
    "mark_us",
    "state_us",
    "copy_us",
    "disk_us",
    "durable_us",
];
const SIZES: [&str; 2] = ["bytes_ahead", "bytes_in_stop"];
/// So many snapshots by stop-and-copy are one of the others.
const SHARE: usize = 5;

/// Takes a snapshot and removes it.
fn take(plan: &Plan, vm: &Vm, options: &[&str]) -> Result<(Duration, Value)> {
    check_interrupted()?;
    let mut args = vec!["snapshot", &vm.name, "s", "--wait"];
    args.extend(options);
    let (ran, answer) = plan.umlctl(&args)?;
    plan.umlctl(&["rm-snapshot", "s"])?;
    Ok((ran.wall, answer))
}

/// Whoever looks from outside at how long a machine stands still.
enum Looker {
    Net(Client),
    Inside(Asker),
}

impl Looker {
    fn gap(&mut self) -> Result<f64> {
        match self {
            Self::Net(c) => c.gap(),
            Self::Inside(a) => a.gap(),
        }
    }
}

/// The part `pause`: many snapshots of a busy machine, of an idle one, and of one that does nothing but look at its clock. One
/// after the other, as together they would leave no CPU for the snapshot.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    for role in ["busy", "idle", "watch"] {
        let vm = Vm::start(plan, role, role, MB)?;
        let mut looker = match role {
            "watch" => Looker::Inside(Asker::new(&vm.address)?),
            _ => Looker::Net(Client::new(&vm.address)?),
        };
        let row = format!("{role}_seen");
        let mut walls = Vec::new();
        // Until its load is what it will be.
        std::thread::sleep(Duration::from_secs(1));
        // The first has to find out what never changes, and pays for cold caches.
        let (_, first) = take(plan, &vm, &[])?;
        samples.add(format!("first_{role}"), number(&first, "pause_us")? / 1e6);
        for i in 0..plan.snapshots {
            for (way, options) in WAYS {
                if way != "lazy" && i % SHARE != 0 {
                    continue;
                }
                looker.gap()?;
                let (wall, answer) = take(plan, &vm, options)?;
                samples.add(at(&row, MB, way), looker.gap()?);
                note(samples, role, MB, way, &answer)?;
                if way == "lazy" {
                    // What there is without a snapshot, in a time as long.
                    let wall = wall.min(Duration::from_secs(1));
                    std::thread::sleep(wall);
                    samples.add(at(&row, MB, "none"), looker.gap()?);
                    walls.push(wall);
                }
            }
        }
        drop((looker, vm));
        if role != "watch" {
            beside(plan, samples, role, &walls).context("a bare kernel")?;
        }
    }
    Ok(())
}

/// What an echo client sees of a machine that umlctl has nothing to do with, in times as long as those of snapshots.
fn beside(plan: &Plan, samples: &mut Samples, role: &str, walls: &[Duration]) -> Result<()> {
    let tap = Tap::new(plan)?;
    // Another number than those of other parts.
    let number = if role == "busy" { 20_000 } else { 20_001 };
    let _machine = boot::bare(plan, role, number, Some(&tap))?;
    let client = Client::new(GUEST)?;
    std::thread::sleep(Duration::from_secs(1));
    for wall in walls {
        client.gap()?;
        std::thread::sleep(*wall);
        samples.add(at(&format!("{role}_seen"), MB, "bare"), client.gap()?);
        check_interrupted()?;
    }
    Ok(())
}

fn note(samples: &mut Samples, of: &str, mb: u64, way: &str, answer: &Value) -> Result<()> {
    for (fields, scale) in [(&TIMES[..], 1e6), (&SIZES[..], 1.0)] {
        for field in fields {
            let row = format!("{of}_{}", field.trim_end_matches("_us"));
            samples.add(at(&row, mb, way), number(answer, field)? / scale);
        }
    }
    Ok(())
}

/// The part `big`: busy machines of several sizes, in rounds.
pub fn sizes(plan: &Plan, samples: &mut Samples) -> Result<()> {
    for round in 0..plan.rounds {
        let mut medians = Vec::new();
        for &mb in &plan.sizes {
            say(&format!("round {}, {mb} MB", round + 1));
            if let Err(e) = enough_memory(mb) {
                samples.miss(&format!("big, {mb} MB"), &e);
                continue;
            }
            medians.push((mb, block(plan, samples, mb)?));
        }
        if let [.., (_, small), (1024, large)] = medians[..] {
            samples.add("big_ratio", large / small);
        }
    }
    Ok(())
}

/// A few snapshots of one size; the median of those that are not by stop-and-copy.
fn block(plan: &Plan, samples: &mut Samples, mb: u64) -> Result<f64> {
    let vm = Vm::start(plan, "busy", "busy", mb)?;
    let _client = Client::new(&vm.address)?;
    std::thread::sleep(Duration::from_secs(1));
    take(plan, &vm, &[])?;
    let mut pauses = Vec::new();
    for _ in 1..SHARE {
        let (_, answer) = take(plan, &vm, &[])?;
        pauses.push(number(&answer, "pause_us")?);
        note(samples, "big", mb, WAYS[0].0, &answer)?;
    }
    let (_, answer) = take(plan, &vm, WAYS[1].1)?;
    note(samples, "big", mb, WAYS[1].0, &answer)?;
    Ok(crate::results::median(&pauses).unwrap_or(f64::NAN))
}
