//! The guardian: puts a target right after the death of the process that drove it.

use super::driver::{AWAY_MASK, LOOP, call_at, write_code};
use super::journal::{Journal, Record};
use super::{Error, Stopped};
use crate::proc;
use crate::sys::ptrace;
use crate::sys::remote;
use nix::errno::Errno;
use std::path::Path;

/// What a repair did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// There was nothing to do.
    Nothing,
    /// The process of the journal is gone.
    Gone,
    /// It was repaired and runs on.
    Repaired,
}

/// Repairs the process that the journal names, if it says so, and removes the journal. `connections` is called with its number
/// before all else, and again when it stands still: what the saver has left on its connections must be gone before a thread that
/// was away uses them.
///
/// # Errors
/// If the process cannot be attached to or driven, or its saver lives; then the journal stays as it is.
pub fn repair(path: &Path, connections: &dyn Fn(i32)) -> Result<Outcome, Error> {
    let Some(mut journal) = Journal::take_over(path)? else {
        return Ok(Outcome::Nothing);
    };
    let r = journal.record.clone();
    if r.is_gone() {
        return Ok(Outcome::Gone);
    }
    connections(r.pid);
    if r.held {
        // Its connections are as they were, and threads that are away wait where they are.
        let pid = nix::unistd::Pid::from_raw(r.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGCONT)
            .map_err(|e| Error::Call(r.pid, "kill", e))?;
    }
    // Either way the journal is removed when it is dropped.
    if !r.active {
        return Ok(Outcome::Nothing);
    }
    let stopped = match Stopped::all(r.pid) {
        Err(Error::Ended(_)) => return Ok(Outcome::Gone),
        other => other?,
    };
    connections(r.pid);
    // The journal is written before a thread is sent away and after it was sent back. So one that it names may be at home
    // and have gone on since: then its registers are its own, and so is its mask, unless it is the one that we set.
    let mut away = Vec::new();
    for a in r.away.iter().filter(|a| stopped.threads().contains(&a.tid)) {
        let now = ptrace::regs(a.tid).map_err(|e| Error::Ptrace(a.tid, "PTRACE_GETREGS", e))?;
        if r.vdso_tail != 0 && (r.vdso_tail..r.vdso_tail + 128).contains(&now.rip) {
            away.push(a);
        } else if ptrace::sigmask(a.tid)
            .map_err(|e| Error::Ptrace(a.tid, "PTRACE_GETSIGMASK", e))?
            == AWAY_MASK
        {
            put_mask(a.tid, a.sigmask)?;
        }
    }
    let tid = stopped.threads()[0];
    let there = what_is_there(tid, r.vdso_tail);
    match away.first() {
        Some(a) => clean_up(&stopped, &r, a.tid)?,
        None if there == There::Loop => clean_up_from_home(&stopped, &r, &mut journal)?,
        // The loop is the first thing that is put in and the last that is taken out: nothing else is there.
        None => {}
    }
    for a in away {
        let Some(regs) = ptrace::words_to_regs(&a.regs) else {
            continue;
        };
        ptrace::set_regs(a.tid, &regs).map_err(|e| Error::Ptrace(a.tid, "PTRACE_SETREGS", e))?;
        put_mask(a.tid, a.sigmask)?;
    }
    // When no thread is there.
    if there != There::Other {
        write_code(tid, r.vdso_tail, &[0; LOOP.len()])?;
    }
    journal.record = Record::idle(r.pid, r.start_time);
    journal.write()?;
    Ok(Outcome::Repaired)
}

fn put_mask(tid: i32, mask: u64) -> Result<(), Error> {
    ptrace::set_sigmask(tid, mask).map_err(|e| Error::Ptrace(tid, "PTRACE_SETSIGMASK", e))
}

/// Nobody is away, but the loop is left, and maybe the scratch or a descriptor: a thread is taken away for it, by the journal.
fn clean_up_from_home(stopped: &Stopped, r: &Record, journal: &mut Journal) -> Result<(), Error> {
    let tid = stopped.threads()[0];
    let regs = ptrace::regs(tid).map_err(|e| Error::Ptrace(tid, "PTRACE_GETREGS", e))?;
    let sigmask = ptrace::sigmask(tid).map_err(|e| Error::Ptrace(tid, "PTRACE_GETSIGMASK", e))?;
    journal.record.away.push(super::journal::Away {
        tid,
        sigmask,
        regs: ptrace::regs_to_words(&regs),
    });
    journal.write()?;
    put_mask(tid, AWAY_MASK)?;
    clean_up(stopped, r, tid)?;
    ptrace::set_regs(tid, &regs).map_err(|e| Error::Ptrace(tid, "PTRACE_SETREGS", e))?;
    put_mask(tid, sigmask)
}

/// What is at the tail of the vdso.
#[derive(Debug, PartialEq, Eq)]
enum There {
    /// The whole loop.
    Loop,
    /// A part of it; the rest is zero.
    Part,
    /// Something else, or nothing is mapped there: the process has started another program since.
    Other,
}

fn what_is_there(tid: i32, tail: u64) -> There {
    let mut bytes = [0u8; LOOP.len()];
    if tail == 0 || remote::read(tid, tail, &mut bytes).is_err() {
        return There::Other;
    }
    if bytes == LOOP {
        return There::Loop;
    }
    let part = bytes
        .chunks(8)
        .zip(LOOP.chunks(8))
        .all(|(b, l)| b == l || b == [0; 8]);
    if part && bytes != [0; LOOP.len()] {
        There::Part
    } else {
        There::Other
    }
}

/// Unmaps the scratch, closes descriptors. `tid` is away from its code.
fn clean_up(stopped: &Stopped, r: &Record, tid: i32) -> Result<(), Error> {
    let pid = stopped.pid();
    let scratch = find_scratch(tid, r)?;
    if let Some((start, len)) = scratch {
        call(tid, r.vdso_tail, libc::SYS_munmap, [start, len])
            .map_err(|e| Error::Call(pid, "munmap", e))?;
    }
    for fd in left_fds(tid, r) {
        // It may be closed already: the saver closes first and writes the journal after it.
        let _ = call(tid, r.vdso_tail, libc::SYS_close, [fd as u64, 0]);
    }
    Ok(())
}

/// The scratch as the journal has it, if it is still there and nothing else has taken its place.
fn find_scratch(tid: i32, r: &Record) -> Result<Option<(u64, u64)>, Error> {
    if r.scratch == 0 {
        return Ok(None);
    }
    let end = r.scratch.saturating_add(r.scratch_len);
    let there = proc::maps(tid)?
        .iter()
        .any(|m| m.start == r.scratch && m.end == end && m.ino == 0);
    Ok(there.then_some((r.scratch, r.scratch_len)))
}

/// Descriptors to close: those in the journal, and any userfaultfd, which a target that we drive never has of its own.
fn left_fds(tid: i32, r: &Record) -> Vec<i32> {
    let mut fds: Vec<i32> = r.fds.into_iter().filter(|&fd| fd >= 0).collect();
    if let Ok(dir) = std::fs::read_dir(proc::path(tid, "fd")) {
        for entry in dir.flatten() {
            let ours = std::fs::read_link(entry.path()).is_ok_and(|l| {
                l == Path::new("anon_inode:[userfaultfd]") || l == Path::new("/dev/userfaultfd")
            });
            if let (true, Some(fd)) = (
                ours,
                entry.file_name().to_str().and_then(|n| n.parse().ok()),
            ) && !fds.contains(&fd)
            {
                fds.push(fd);
            }
        }
    }
    fds
}

fn call(tid: i32, tail: u64, nr: i64, [rdi, rsi]: [u64; 2]) -> Result<u64, Errno> {
    call_at(tid, tail, &ptrace::regs(tid)?, nr, [rdi, rsi, 0, 0, 0, 0])
}

/// Waits until the process behind `saver` ends.
pub fn wait_for_end(saver: &std::os::fd::OwnedFd) {
    use std::os::fd::AsFd;
    let mut fds = [nix::poll::PollFd::new(
        saver.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    while matches!(
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE),
        Err(Errno::EINTR)
    ) {}
}

/// [`repair`], as soon as the kernel has detached the threads of a saver that has just ended.
pub fn repair_soon(path: &Path, connections: &dyn Fn(i32)) -> Result<Outcome, Error> {
    for _ in 0..400 {
        match repair(path, connections) {
            Err(Error::Traced(..) | Error::InUse(_) | Error::Busy(..)) => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            other => return other,
        }
    }
    repair(path, connections)
}
