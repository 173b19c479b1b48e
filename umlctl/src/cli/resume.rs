//! `umlctl resume`.

use super::args::Resume;
use super::time;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use snapshot::image::{store, verify};
use snapshot::resume::image::Snapshot;
use snapshot::resume::{Options, resume};

/// Makes running processes of a snapshot.
pub fn run(a: &Resume, json: bool) -> Result<u8> {
    let manifest = store::load(&a.dir)?;
    if a.verify {
        verify::verify(&a.dir, &manifest)?;
    }
    if a.count > 1 {
        bail!("--count is not there yet");
    }
    let source = Snapshot::open(&a.dir, &manifest)?;
    let options = Options {
        dir: a.dir.clone(),
        eager: a.eager,
        ..Options::default()
    };
    let resumed = resume(&manifest, &source, &options)?;
    let us = u64::try_from(resumed.resume.as_micros()).unwrap_or(u64::MAX);
    if json {
        println!(
            "{}",
            serde_json::json!({ "pid": resumed.pid, "resume_us": us })
        );
    } else if a.detach {
        println!("process {} runs again, after {}", resumed.pid, time(us));
    }
    if a.detach { Ok(0) } else { wait(resumed.pid) }
}

/// Waits for it, and ends as it ends.
fn wait(pid: i32) -> Result<u8> {
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as u8),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting for the process"),
        }
    }
}
