//! Starting the processes, waiting for the end of their tables, and letting them go with their registers.

use super::memory::Fill;
use super::source::PageSource;
use super::{Error, Plan, Tables, child, sys};
use crate::image::manifest::{Backing, Manifest, Process, Thread};
use crate::sys::clone::{Fork, fork};
use crate::sys::ptrace::{self, Regs, Report};
use crate::sys::remote;
use base64::Engine;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use std::os::fd::AsFd;

/// How long a new process may take; far more than it needs, unless the disk is slow.
const PATIENCE_MS: i64 = 60_000;
/// How long numbers of processes that have ended are waited for.
const NUMBER_MS: i64 = 5_000;

/// Makes the root process, and waits until all of them have run their tables. On failure all are ended.
pub fn start(plan: &Plan<'_>, root: &Process) -> Result<i32, Error> {
    let mut old = SigSet::empty();
    sigprocmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut old),
    )
    .map_err(sys("sigprocmask"))?;
    let made = fork(0, libc::SIGCHLD, Some(root.pid));
    if made == Ok(Fork::Child) {
        child::become_process(plan, root, None);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&old), None).map_err(sys("sigprocmask"))?;
    let pid = match made {
        Ok(Fork::Parent(pid)) => pid,
        Err(Errno::EEXIST) => return Err(Error::PidTaken(root.pid)),
        Ok(Fork::Child) => return Err(Error::Sys("clone3", Errno::EINVAL)),
        Err(e) => return Err(Error::Sys("clone3", e)),
    };
    let result = ptrace::seize(pid, libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD)
        .map_err(sys("PTRACE_SEIZE"))
        .and_then(|()| plan.tables.iter().try_for_each(|t| wait(plan, pid, t)));
    if let Err(e) = result {
        end(pid);
        // One that could not be attached had ended before, and says why.
        let said = plan.scratch.word(super::table::MESSAGE) != 0;
        return Err(match plan.tables.first() {
            Some(t) if said => why(plan, t),
            _ => e,
        });
    }
    Ok(pid)
}

/// Whether the numbers of all processes and threads are free. Those of processes that have just been killed may not be,
/// for a moment: zombies have them, or are in groups and sessions of that number. They are waited for.
pub fn numbers_free(m: &Manifest) -> Result<(), Error> {
    let used = |n: i32| {
        let group = nix::unistd::Pid::from_raw(-n);
        std::path::Path::new(&format!("/proc/{n}")).exists()
            || (n > 1 && nix::sys::signal::kill(group, None) != Err(Errno::ESRCH))
    };
    let all = |p: &Process| -> Vec<i32> {
        let threads = p.threads.iter().map(|t| t.tid);
        threads.chain([p.pid]).collect()
    };
    for n in m.processes.iter().flat_map(all) {
        let mut waited = 0;
        while used(n) {
            let lives = crate::proc::stat(n).is_ok_and(|s| !"ZX".contains(s.state));
            if lives || waited > NUMBER_MS {
                return Err(Error::PidTaken(n));
            }
            waited += 10;
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    Ok(())
}

fn wait(plan: &Plan<'_>, root: i32, t: &Tables) -> Result<(), Error> {
    let mut waited = 0;
    while !plan.script.wait(&plan.scratch, t.leader, 20) {
        waited += 20;
        if plan.scratch.word(super::table::MESSAGE) != 0 {
            // Its text is complete when the process that wrote it has ended.
            std::thread::sleep(std::time::Duration::from_millis(5));
            return Err(why(plan, t));
        }
        // Not reaped: its end is noticed by a stop or an end of the root only; others are the root's children.
        let gone = match ptrace::wait(root, false) {
            Ok(None) => waited > PATIENCE_MS,
            Ok(Some((_, Report::Ended(_)))) | Err(_) => true,
            Ok(Some((_, Report::Signal(_) | Report::JobStop(_)))) => true,
            Ok(Some(_)) => false,
        };
        if gone {
            return Err(why(plan, t));
        }
    }
    for &table in t.threads.iter().chain([&t.leader]) {
        plan.script
            .check(&plan.scratch, table)
            .map_err(|e| Error::Call(t.pid, e))?;
    }
    Ok(())
}

fn why(plan: &Plan<'_>, t: &Tables) -> Error {
    let message = plan.scratch.read(super::table::MESSAGE, 1001);
    let end = message.iter().position(|&b| b == 0).unwrap_or(0);
    if end > 0 {
        let message = String::from_utf8_lossy(&message[..end]).into_owned();
        let (pid, message) = message.split_once(' ').unwrap_or(("", &message));
        return Error::Child(pid.parse().unwrap_or(t.pid), message.to_owned());
    }
    for &table in t.threads.iter().chain([&t.leader]) {
        if let Err(e) = plan.script.check(&plan.scratch, table) {
            return Error::Call(t.pid, e);
        }
    }
    let last = plan.script.last(&plan.scratch, t.leader);
    Error::Child(t.pid, format!("it stopped after {last}"))
}

/// Ends a process tree that was not finished: descendants have the root's death as theirs.
fn end(pid: i32) {
    let tree = crate::proc::tree(pid).unwrap_or_default();
    for p in tree.iter().rev().chain([&pid]) {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(*p),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    while let Ok(Some((_, report))) = ptrace::wait(pid, true) {
        if matches!(report, Report::Ended(_)) {
            break;
        }
    }
}

/// Gives every thread its registers, starts the pager, and lets all go.
pub fn release(plan: &Plan<'_>, source: &dyn PageSource, root: i32) -> Result<Option<i32>, Error> {
    let done = attach_all(plan, root).and_then(|all| {
        let pager = start_pager(plan, source, &all)?;
        for (p, tids) in &all {
            set_process(plan, p, tids)?;
        }
        Ok((all, pager))
    });
    match done {
        Ok((all, pager)) => {
            for (p, tids) in all {
                if p.stopped {
                    let pid = nix::unistd::Pid::from_raw(tids[0]);
                    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP);
                }
                for tid in tids {
                    let _ = ptrace::detach(tid, 0);
                }
            }
            Ok(pager)
        }
        Err(e) => {
            end(root);
            Err(e)
        }
    }
}

/// The pager gets copies of the processes' userfaultfds; theirs are closed with the scratch memory.
fn start_pager(
    plan: &Plan<'_>,
    source: &dyn PageSource,
    all: &[(&Process, Vec<i32>)],
) -> Result<Option<i32>, Error> {
    if plan.fill != Fill::Lazy {
        return Ok(None);
    }
    let mut memories = Vec::new();
    for (p, tids) in all {
        let pidfd = remote::pidfd_open(tids[0]).map_err(sys("pidfd_open"))?;
        let fd = remote::pidfd_getfd(pidfd.as_fd(), plan.helpers.uffd);
        memories.push((p.space, fd.map_err(sys("pidfd_getfd"))?));
    }
    super::pager::spawn(plan, source, memories).map(Some)
}

/// Stops all threads; the numbers of each process's threads as we see them, in the manifest's order.
fn attach_all<'a>(plan: &Plan<'a>, root: i32) -> Result<Vec<(&'a Process, Vec<i32>)>, Error> {
    let m = plan.manifest;
    let mut all = Vec::new();
    for p in m.processes.iter().filter(|p| p.zombie.is_none()) {
        let shift = root == m.processes[0].pid;
        let host = |n: i32| if shift { Ok(n) } else { seen_as(root, n) };
        let tids: Vec<i32> = p
            .threads
            .iter()
            .map(|t| host(t.tid))
            .collect::<Result<_, _>>()?;
        for &tid in &tids {
            if tid != root {
                ptrace::seize(tid, libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD)
                    .map_err(sys("PTRACE_SEIZE"))?;
            }
            ptrace::interrupt(tid).map_err(sys("PTRACE_INTERRUPT"))?;
        }
        for &tid in &tids {
            expect(tid, Report::Interrupted)?;
        }
        all.push((p, tids));
    }
    Ok(all)
}

fn seen_as(root: i32, n: i32) -> Result<i32, Error> {
    // In a namespace of its own: the numbers are in `status`.
    for pid in crate::proc::tree(root)? {
        for tid in crate::proc::threads(pid)? {
            if crate::proc::status(tid)?.ns_pid.last() == Some(&n) {
                return Ok(tid);
            }
        }
    }
    Err(Error::Manifest("a thread was not made"))
}

pub(crate) fn expect(tid: i32, wanted: Report) -> Result<(), Error> {
    match ptrace::wait(tid, true).map_err(sys("waiting for a thread"))? {
        Some((_, r)) if r == wanted => Ok(()),
        r => Err(Error::Child(tid, format!("it did not stop: {r:?}"))),
    }
}

fn set_process(plan: &Plan<'_>, p: &Process, tids: &[i32]) -> Result<(), Error> {
    for (t, &tid) in p.threads.iter().zip(tids).skip(1) {
        set_thread(t, tid)?;
    }
    let space = &plan.manifest.spaces[p.space as usize];
    let vdso = space.ranges.iter().find(|r| r.backing == Backing::Vdso);
    let vdso = vdso.ok_or(Error::Manifest("it has no vdso"))?;
    let syscall = vdso.start + plan.syscall;
    if plan.fill == Fill::Lazy {
        call(
            tids[0],
            syscall,
            libc::SYS_close,
            [plan.helpers.uffd as u64, 0],
        )?;
    }
    let scratch = [plan.scratch.base(), plan.scratch.len() as u64];
    call(tids[0], syscall, libc::SYS_munmap, scratch)?;
    set_thread(&p.threads[0], tids[0])
}

/// The last calls are made from the vdso: after them nothing of ours is left.
pub(crate) fn call(tid: i32, syscall: u64, nr: libc::c_long, args: [u64; 2]) -> Result<(), Error> {
    let mut regs = ptrace::regs(tid).map_err(sys("PTRACE_GETREGS"))?;
    regs.rip = syscall;
    regs.rax = nr as u64;
    regs.orig_rax = u64::MAX;
    [regs.rdi, regs.rsi] = args;
    ptrace::set_regs(tid, &regs).map_err(sys("PTRACE_SETREGS"))?;
    for _ in 0..2 {
        ptrace::syscall(tid, 0).map_err(sys("PTRACE_SYSCALL"))?;
        expect(tid, Report::Syscall)?;
    }
    let after = ptrace::regs(tid).map_err(sys("PTRACE_GETREGS"))?;
    if after.rax != 0 {
        let errno = Errno::from_raw(-(after.rax as i64) as i32);
        return Err(Error::Sys("leaving the new process", errno));
    }
    Ok(())
}

pub(crate) fn set_thread(t: &Thread, tid: i32) -> Result<(), Error> {
    let regs = ptrace::words_to_regs(&t.regs).ok_or(Error::Manifest("registers are missing"))?;
    ptrace::set_regs(tid, &restart(regs)).map_err(sys("PTRACE_SETREGS"))?;
    let state = base64::engine::general_purpose::STANDARD
        .decode(&t.xstate)
        .map_err(|_| Error::Manifest("extended state is not base64"))?;
    ptrace::set_xstate(tid, &state).map_err(sys("PTRACE_SETREGSET"))?;
    ptrace::set_sigmask(tid, t.sigmask).map_err(sys("PTRACE_SETSIGMASK"))
}

/// A call that was interrupted by the stop is made again: what the kernel would have done after a stop without a signal.
/// For ERESTART_RESTARTBLOCK the kernel holds how much of a timeout is left, which a new process does not have: made
/// again from its start.
pub(crate) fn restart(mut regs: Regs) -> Regs {
    let result = regs.rax as i64;
    if (regs.orig_rax as i64) >= 0 && matches!(-result, 512 | 513 | 514 | 516) {
        regs.rax = regs.orig_rax;
        regs.rip = regs.rip.wrapping_sub(2);
    }
    regs.orig_rax = u64::MAX;
    regs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_calls_are_made_again() {
        let base = ptrace::words_to_regs(&[0; 27]).unwrap();
        for (rax, orig, rip, want) in [
            (-512i64, 7i64, 100, (7, 98)),
            (-513, 7, 100, (7, 98)),
            (-514, 7, 100, (7, 98)),
            (-516, 230, 100, (230, 98)),
            (-4, 7, 100, (-4, 100)),
            (-515, 7, 100, (-515, 100)),
            (-512, -1, 100, (-512, 100)),
        ] {
            let mut r = base;
            r.rax = rax as u64;
            r.orig_rax = orig as u64;
            r.rip = rip;
            let r = restart(r);
            assert_eq!((r.rax as i64, r.rip), want, "{rax} {orig}");
            assert_eq!(r.orig_rax, u64::MAX);
        }
    }
}
