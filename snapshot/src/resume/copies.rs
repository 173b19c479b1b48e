//! Copies of a snapshot in namespaces of their own: process numbers are what they were, whatever runs beside them.

use super::source::PageSource;
use super::{Error, Options, resume, sys};
use crate::files::Kind;
use crate::image::manifest::{Manifest, SharedKind};
use crate::sys::clone::{Fork, close_range, exit_now, fork};
use crate::sys::ptrace::{self, Report};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// A copy that runs.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// Its root's number, as the caller sees it.
    pub pid: i32,
    /// The number of the process that waits for the copy's processes and ends with them, as the root did.
    pub init: i32,
    /// From the start of the work to the first instruction.
    pub resume: Duration,
}

/// What the first process of a copy says.
#[derive(Debug, Serialize, Deserialize)]
struct Said {
    pid: i32,
    error: Option<String>,
}

/// Makes so many copies, as many at a time as there are processors. The calling process must have a single thread. If one
/// fails, those that were made are ended.
pub fn copies(
    manifest: &Manifest,
    source: &dyn PageSource,
    options: &Options<'_>,
    count: u32,
) -> Result<Vec<Copy>, Error> {
    let at_a_time = std::thread::available_parallelism().map_or(1, usize::from);
    let mut making: VecDeque<Making> = VecDeque::new();
    let mut made: Vec<Copy> = Vec::new();
    let mut left = count;
    while left > 0 || !making.is_empty() {
        let step = if left > 0 && making.len() < at_a_time {
            left -= 1;
            Making::begin(manifest, source, options).map(|new| making.push_back(new))
        } else {
            let next = making.pop_front().map(Making::end).transpose();
            next.map(|copy| made.extend(copy))
        };
        if let Err(e) = step {
            making.iter().for_each(|m| end(m.init));
            made.iter().for_each(|c| end(c.init));
            return Err(e);
        }
    }
    Ok(made)
}

/// A copy that is being made, by its first process.
struct Making {
    init: i32,
    from: std::io::PipeReader,
    start: Instant,
}

impl Making {
    fn begin(
        manifest: &Manifest,
        source: &dyn PageSource,
        options: &Options<'_>,
    ) -> Result<Self, Error> {
        let start = Instant::now();
        let (from, to) = std::io::pipe().map_err(|_| Error::Sys("pipe", nix::Error::last()))?;
        let flags = namespaces(manifest);
        match fork(flags as u64, libc::SIGCHLD, None).map_err(sys("clone3"))? {
            Fork::Parent(init) => Ok(Self { init, from, start }),
            Fork::Child => {
                drop(from);
                let run =
                    std::panic::AssertUnwindSafe(|| first(manifest, source, options, flags, to));
                let _ = std::panic::catch_unwind(run);
                exit_now(1)
            }
        }
    }

    /// Waits for it.
    fn end(mut self) -> Result<Copy, Error> {
        let mut text = String::new();
        let said = self
            .from
            .read_to_string(&mut text)
            .map_err(|_| Error::Sys("reading from a pipe", nix::Error::last()))
            .and_then(|_| {
                serde_json::from_str::<Said>(&text)
                    .map_err(|_| Error::Copy("its first process ended without a word".into()))
            });
        let pid = said.and_then(|said| match said.error {
            Some(e) => Err(Error::Copy(e)),
            None => seen_as(self.init, said.pid),
        });
        match pid {
            Ok(pid) => Ok(Copy {
                pid,
                init: self.init,
                resume: self.start.elapsed(),
            }),
            Err(e) => {
                end(self.init);
                Err(e)
            }
        }
    }
}

/// Kills a copy's first process, and all others with it.
fn end(init: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), Signal::SIGKILL);
    while let Ok(Some((_, r))) = ptrace::wait(init, true) {
        if matches!(r, Report::Ended(_)) {
            break;
        }
    }
}

/// Process numbers and what shows them always; identifiers of System V objects and addresses that are bound where there are
/// any, as the original may have them.
fn namespaces(m: &Manifest) -> i32 {
    let sysv = |o: &crate::image::manifest::SharedObject| matches!(o.kind, SharedKind::SysV(..));
    let bound = m.files.iter().any(|f| matches!(f.kind, Kind::Inet(_)));
    libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | if m.shared.iter().any(sysv) {
            libc::CLONE_NEWIPC
        } else {
            0
        }
        | if bound { libc::CLONE_NEWNET } else { 0 }
}

/// The number that a child of `init` has here.
fn seen_as(init: i32, inside: i32) -> Result<i32, Error> {
    for pid in crate::proc::children(init)? {
        if crate::proc::status(pid).is_ok_and(|s| s.ns_pid.last() == Some(&inside)) {
            return Ok(pid);
        }
    }
    Err(Error::Copy("it has ended already".into()))
}

/// The first process of a copy: resumes it, says so, and waits for all processes to end.
fn first(
    manifest: &Manifest,
    source: &dyn PageSource,
    options: &Options<'_>,
    flags: i32,
    mut to: std::io::PipeWriter,
) -> ! {
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    let made = own_view(flags).and_then(|()| {
        let options = Options {
            namespace: true,
            twin: true,
            ..options.clone()
        };
        resume(manifest, source, &options)
    });
    let (said, pid) = match &made {
        Ok(r) => (
            Said {
                pid: r.pid,
                error: None,
            },
            r.pid,
        ),
        Err(e) => (
            Said {
                pid: 0,
                error: Some(super::files::text(e)),
            },
            0,
        ),
    };
    let _ = nix::sys::prctl::set_pdeathsig(None);
    let text = serde_json::to_string(&said).unwrap_or_default();
    let _ = to.write_all(text.as_bytes());
    drop(to);
    if made.is_err() {
        exit_now(1);
    }
    let _ = nix::sys::prctl::set_name(c"umlctl-init");
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    let _ = close_range(0, i32::MAX);
    if let Some(t) = options.template {
        t.leave();
    }
    let mut code = 0;
    // Everything that has no parent any more comes here. When all are gone, the namespace goes.
    loop {
        match ptrace::wait(-1, true) {
            Ok(Some((who, Report::Ended(status)))) if who == pid => {
                code = match status & 0x7f {
                    0 => status >> 8 & 0xff,
                    signal => 128 + signal,
                };
            }
            Ok(_) => {}
            Err(_) => exit_now(code),
        }
    }
}

/// /proc of the new namespace; and a loopback interface that is up.
fn own_view(flags: i32) -> Result<(), Error> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(sys("making mounts the copy's own"))?;
    let flags_of_proc = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags_of_proc, none)
        .map_err(sys("mounting /proc"))?;
    if flags & libc::CLONE_NEWNET != 0 {
        crate::sys::netdev::loopback_up().map_err(sys("setting the loopback interface up"))?;
    }
    Ok(())
}
