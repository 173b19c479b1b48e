//! `umlctl rescue`, and the guardian, which is the same with `--watch`.

use super::args::Rescue;
use super::code;
use anyhow::{Context, Result};
use snapshot::sys::remote;
use snapshot::target::guardian::{Outcome, repair, repair_soon, wait_for_end};
use snapshot::target::{Error, journal};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Repairs what journals say.
pub fn run(a: &Rescue, json: bool) -> Result<u8> {
    if let Some(pid) = a.watch {
        return guard(pid, &a.journals);
    }
    let paths = match a.pid {
        Some(pid) => vec![Path::new(journal::DIRECTORY).join(pid.to_string())],
        None => all()?,
    };
    let mut failed = 0;
    let mut done = Vec::new();
    for path in &paths {
        if !path.exists() {
            continue;
        }
        let pid = pid_of(path);
        match repair(path, &connections) {
            Ok(outcome) => done.push((pid, outcome)),
            // Its saver lives.
            Err(Error::InUse(_)) if a.pid.is_none() => {}
            Err(e) => {
                failed += 1;
                eprintln!("umlctl: process {pid}: {:#}", anyhow::Error::from(e));
            }
        }
    }
    if json {
        let list: Vec<_> = done
            .iter()
            .map(|(p, o)| serde_json::json!({ "pid": p, "outcome": word(*o) }))
            .collect();
        println!(
            "{}",
            serde_json::json!({ "processes": list, "failed": failed })
        );
    } else if done.is_empty() && failed == 0 {
        println!("no process needs to be put right");
    } else {
        for (pid, outcome) in &done {
            println!("process {pid}: {}", word(*outcome));
        }
    }
    Ok(match (failed, done.len()) {
        (0, _) => 0,
        (_, 0) => code::ERROR,
        _ => code::PARTIAL,
    })
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Nothing => "nothing to do",
        Outcome::Gone => "it has ended; its journal is removed",
        Outcome::Repaired => "put right; it runs on",
    }
}

fn all() -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(journal::DIRECTORY) {
        Ok(dir) => Ok(dir.flatten().map(|e| e.path()).collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).context(format!("cannot list {}", journal::DIRECTORY)),
    }
}

/// Waits for the end of the saver, and repairs. What ends the saver's session or group must not end us with it.
fn guard(pid: i32, journals: &[PathBuf]) -> Result<u8> {
    let _ = nix::unistd::setsid();
    let saver = remote::pidfd_open(pid).context("the saver is gone")?;
    let mut out = std::io::stdout();
    out.write_all(b"+")?;
    out.flush()?;
    let mut result = Ok(0);
    wait_for_end(&saver);
    for path in journals {
        // The others of the tree are to be repaired all the same.
        if let Err(e) = repair_soon(path, &connections) {
            result = Err(e.into());
        }
    }
    result
}

fn connections(pid: i32) {
    // Those of a process that ends meanwhile are nobody's.
    let _ = snapshot::files::rescue_connections(pid);
}

/// A journal has the name of its process.
fn pid_of(path: &Path) -> i32 {
    path.file_name()
        .and_then(|n| n.to_str()?.parse().ok())
        .unwrap_or_default()
}
