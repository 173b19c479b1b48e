//! `umlctl stop`, `kill` and `rm`.

use super::args::{One, Rm, Stop};
use super::{ask_until_end, find};
use crate::control::Request;
use crate::net::netns;
use crate::net::pool::Pool;
use crate::vm::Error;
use crate::vm::home::Vm;
use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// How long a supervisor may take from its last answer to its end.
const LAST: Duration = Duration::from_secs(60);

fn end(name: &str, request: &Request, json: bool) -> Result<u8> {
    let vm = find(name)?;
    ask_until_end(&vm, request)?;
    gone(&vm)?;
    if json {
        println!("{}", super::list::value(&vm)?);
    } else {
        println!("{}", vm.name());
    }
    Ok(0)
}

/// Waits until nothing of it is left.
pub fn gone(vm: &Vm) -> Result<()> {
    let begin = Instant::now();
    while vm.locked() {
        anyhow::ensure!(
            begin.elapsed() < LAST,
            "the supervisor of {} does not end",
            vm.name()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Powers off.
pub fn stop(a: &Stop, json: bool) -> Result<u8> {
    let request = Request::Stop {
        timeout_s: a.timeout,
    };
    end(&a.name, &request, json)
}

/// Kills.
pub fn kill(a: &One, json: bool) -> Result<u8> {
    end(&a.name, &Request::Kill, json)
}

/// Removes VMs.
pub fn rm(a: &Rm, json: bool) -> Result<u8> {
    let (mut done, mut failure) = (Vec::new(), None);
    for name in &a.names {
        match one(name, a.force) {
            Ok(()) => done.push(name.as_str()),
            Err(e) if a.names.len() == 1 => return Err(e),
            Err(e) => {
                eprintln!("umlctl: {name}: {e:#}");
                failure = Some(e);
            }
        }
    }
    if json {
        println!("{}", serde_json::json!({ "removed": done }));
    } else {
        done.iter().for_each(|n| println!("{n}"));
    }
    match failure {
        None => Ok(0),
        Some(_) if !done.is_empty() => Ok(crate::cli::code::PARTIAL),
        Some(e) => Err(e),
    }
}

fn one(name: &str, force: bool) -> Result<()> {
    let vm = match find(name) {
        Err(e) if force && matches!(e.downcast_ref(), Some(Error::NoVm(..))) => return Ok(()),
        other => other?,
    };
    if force && vm.locked() {
        match ask_until_end(&vm, &Request::Kill) {
            // It has ended just now.
            Err(e) if matches!(e.downcast_ref(), Some(Error::NotRunning(..))) => {}
            other => drop(other?),
        }
        gone(&vm)?;
    }
    // Held to the end, so that nobody starts it meanwhile.
    let _lock = vm.lock()?;
    remove(&vm)
}

/// Removes all there is of a VM of which nothing runs. What is not there is no error: it may be a half-made one.
pub fn remove(vm: &Vm) -> Result<()> {
    if let Some(index) = vm.config().ok().and_then(|c| c.net_index) {
        let pool = Pool::lock()?;
        // The number may have been given to another, with the network that goes with it.
        if pool.give_back(vm, index)? {
            netns::remove(index)?;
        }
    }
    match std::fs::remove_dir_all(vm.dir()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", vm.dir().display()))
        }
        _ => Ok(()),
    }
}
