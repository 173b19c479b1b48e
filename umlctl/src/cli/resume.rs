//! `umlctl resume`.

use super::args::Resume;
use super::time;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use snapshot::image::manifest::Manifest;
use snapshot::image::{store, verified};
use snapshot::resume::copies::{self, Copy};
use snapshot::resume::image::Snapshot;
use snapshot::resume::template::Template;
use snapshot::resume::{Error, Options, resume};
use std::os::fd::AsFd;
use std::path::Path;

/// Makes running processes of a snapshot.
pub fn run(a: &Resume, json: bool) -> Result<u8> {
    let manifest = store::load(&a.dir)?;
    let records = Path::new(verified::DIRECTORY);
    let source = Snapshot::open_verified(records, &a.dir, &manifest, a.verify)?;
    let options = Options {
        dir: a.dir.clone(),
        eager: a.eager,
        lazy: a.lazy,
        withheld: if a.detach { withheld(json) } else { Vec::new() },
        ..Options::default()
    };
    let single = if a.count == 1 {
        let dir = std::path::absolute(&a.dir)?;
        let let_go = || super::hold::let_go(&dir);
        let options = Options {
            before_connections: Some(&let_go),
            ..options.clone()
        };
        match resume(&manifest, &source, &options) {
            // The original runs still, or something else has its number.
            Err(Error::PidTaken(_)) => None,
            other => Some(other?),
        }
    } else {
        None
    };
    let copies = match single {
        Some(r) => vec![Copy {
            pid: r.pid,
            init: r.pid,
            resume: r.resume,
        }],
        None => copies(&manifest, &source, &options, a.count)?,
    };
    if json && a.count == 1 {
        println!("{}", value(&copies[0]));
    } else if json {
        println!("{}", list(&copies));
    } else if a.detach {
        for c in &copies {
            println!("process {} runs again, after {}", c.pid, time(micros(c)));
        }
    }
    let mut code = 0;
    for c in copies.iter().filter(|_| !a.detach) {
        let ended = wait(c.init)?;
        code = if code == 0 { ended } else { code };
    }
    Ok(code)
}

fn micros(c: &Copy) -> u64 {
    u64::try_from(c.resume.as_micros()).unwrap_or(u64::MAX)
}

fn value(c: &Copy) -> serde_json::Value {
    serde_json::json!({ "pid": c.pid, "resume_us": micros(c) })
}

/// The copies in JSON.
pub fn list(copies: &[Copy]) -> serde_json::Value {
    copies.iter().map(value).collect()
}

/// Makes copies, each in namespaces of its own, which share memory if there are several.
pub fn copies(
    manifest: &Manifest,
    source: &Snapshot,
    options: &Options<'_>,
    count: u32,
) -> Result<Vec<Copy>> {
    let template = match count {
        1 => None,
        _ => Some(Template::new(manifest, source)?),
    };
    let options = &Options {
        template: template.as_ref(),
        ..options.clone()
    };
    Ok(copies::copies(manifest, source, options, count)?)
}

/// Which of descriptors 0 to 2 processes that outlive this command do not get: pipes and sockets, whose other end would wait
/// for them, and what the answer in JSON goes to.
pub fn withheld(json: bool) -> Vec<i32> {
    let (a, b, c) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    [a.as_fd(), b.as_fd(), c.as_fd()]
        .into_iter()
        .zip(0..)
        .filter(|(fd, number)| {
            let kind = fstat(fd).map_or(SFlag::empty(), |s| {
                SFlag::from_bits_truncate(s.st_mode & SFlag::S_IFMT.bits())
            });
            matches!(kind, SFlag::S_IFIFO | SFlag::S_IFSOCK) || (json && *number == 1)
        })
        .map(|(_, number)| number)
        .collect()
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
