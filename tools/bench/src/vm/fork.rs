//! Many twins of one machine: how fast they come, and what they cost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::Plan;
use super::guest::{ECHO, Vm};
use super::net::first_reply;
use crate::run::check_interrupted;
use crate::table1::Samples;
use crate::table1::drive::number;
use crate::table1::measure::available;

/// Twins that have just come are not idle yet.
const SETTLE: Duration = Duration::from_secs(3);
/// Each of these rounds takes long.
const ROUNDS: usize = 3;

/// The part `forks`.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    let vm = Vm::start(plan, "idle", "idle", 128)?;
    for _ in 0..plan.rounds.min(ROUNDS) {
        check_interrupted()?;
        std::thread::sleep(SETTLE);
        let before = available()?;
        let count = plan.forks.to_string();
        let start = Instant::now();
        let (ran, answer) = plan.umlctl(&["fork", &vm.name, "twin", "--count", &count])?;
        let answers = match &answer["vms"] {
            Value::Array(many) => many.clone(),
            _ => Vec::new(),
        };
        let twins = answers
            .iter()
            .map(|a| Vm::made(plan, a))
            .collect::<Result<Vec<_>>>()?;
        for twin in &twins {
            first_reply(&twin.address, ECHO).with_context(|| twin.name.clone())?;
        }
        samples.add("forks_answer", start.elapsed().as_secs_f64());
        samples.add("forks_total", ran.wall.as_secs_f64());
        samples.add("forks_pause", number(&answer, "pause_us")? / 1e6);
        for a in &answers {
            samples.add("forks_resume", number(a, "resume_us")? / 1e6);
        }
        std::thread::sleep(SETTLE);
        let after = available()?;
        samples.add(
            "forks_available",
            before.saturating_sub(after) as f64 / plan.forks as f64,
        );
        for a in &answers {
            cost(samples, a)?;
        }
        remove(plan, twins);
    }
    Ok(())
}

/// By one command, which is faster than by one for each.
fn remove(plan: &Plan, mut twins: Vec<Vm>) {
    let names: Vec<String> = twins
        .iter_mut()
        .map(|t| std::mem::take(&mut t.name))
        .collect();
    let mut args = vec!["rm", "-f"];
    args.extend(names.iter().map(String::as_str));
    if !names.is_empty() {
        plan.quietly(&args);
    }
}

/// Adds what the processes of one twin have of the host's memory, each page shared out among those who have it.
fn cost(samples: &mut Samples, twin: &Value) -> Result<()> {
    let pid = |field: &str| -> Result<i32> { Ok(number(twin, field)? as i32) };
    let supervisor = pid("supervisor")?;
    let all = family(&[supervisor, pid("keeper")?, pid("main")?]);
    let mut seen = BTreeSet::new();
    let mut sum = 0.0;
    for &process in &all {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{process}/{file}"));
        // One of a guest's processes may have ended meanwhile.
        let (Ok(maps), Ok(rollup)) = (read("maps"), read("smaps_rollup")) else {
            continue;
        };
        // Main's helpers have main's memory, which counts once. No two others have the same mappings: their pages are at
        // different places of the guest's memory.
        if !seen.insert(maps) {
            continue;
        }
        let pss = field(&rollup, "Pss:").context("smaps_rollup has no Pss")?;
        sum += pss;
        if process == supervisor {
            samples.add("forks_pss_supervisor", pss);
        }
    }
    samples.add("forks_pss", sum);
    samples.add("forks_processes", all.len() as f64);
    Ok(())
}

/// A figure in kB, as bytes.
fn field(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kb: f64 = rest.split_whitespace().next()?.parse().ok()?;
    Some(kb * 1024.0)
}

/// Processes, their children, and so on.
fn family(heads: &[i32]) -> BTreeSet<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name, which may contain anything: the state, and the parent.
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|r| r.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = BTreeSet::new();
    let mut left = heads.to_vec();
    while let Some(pid) = left.pop() {
        if found.insert(pid) {
            left.extend(children.get(&pid).into_iter().flatten());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{family, field};

    #[test]
    fn figures() {
        let text = "Rss:   12 kB\nPss:    3 kB\nPss_Dirty:  1 kB\n";
        assert_eq!(field(text, "Pss:"), Some(3072.0));
        assert_eq!(field(text, "Swap:"), None);
    }

    #[test]
    fn a_child_is_found() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let all = family(&[std::process::id().cast_signed()]);
        let pid = child.id().cast_signed();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(all.contains(&pid));
    }
}
