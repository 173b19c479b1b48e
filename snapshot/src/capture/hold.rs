//! Letting a stopped target run on while the rest of its memory is saved: its system calls are traced, and those that
//! could take memory away wait until all is saved.

use crate::sys::ptrace::{self, Report};
use crate::target::{Error, Stopped};
use nix::errno::Errno;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXIT;

/// Threads that are being held.
#[derive(Debug)]
struct Held {
    /// In a system call: the next report is its end.
    inside: bool,
    /// It waits for the end of the save.
    waits: bool,
}

/// Lets all threads of `stopped` run until `done` says so, and lets them go for good.
///
/// A thread that cannot be stopped again at the end (it waits for a disk) is waited for.
pub fn run(stopped: Vec<Stopped>, done: &dyn Fn() -> bool) -> Result<(), Error> {
    let mut threads = HashMap::new();
    for s in stopped {
        for tid in s.into_threads() {
            // One that is gone is found so at the next request.
            let _ = ptrace::set_options(tid, OPTIONS);
            threads.insert(
                tid,
                Held {
                    inside: false,
                    waits: false,
                },
            );
            let _ = ptrace::syscall(tid, 0);
        }
    }
    let mut idle = 0u32;
    while !done() && !threads.is_empty() {
        match ptrace::wait_own() {
            Ok(Some((tid, report))) => {
                idle = 0;
                handle(&mut threads, tid, report);
            }
            Ok(None) => {
                idle += 1;
                let pause = if idle > 200 { 30 } else { 2 };
                std::thread::sleep(Duration::from_micros(pause));
            }
            Err(Errno::ECHILD) => break,
            Err(e) => return Err(Error::Ptrace(-1, "waitpid", e)),
        }
    }
    let_go(threads)
}

fn handle(threads: &mut HashMap<i32, Held>, tid: i32, report: Report) {
    // A new thread, or the child of a fork, reports before or after its parent does.
    let held = threads.entry(tid).or_insert(Held {
        inside: false,
        waits: false,
    });
    // A request fails only if the thread was killed meanwhile: then its end is reported next.
    let _ = match report {
        Report::Ended(_) => {
            threads.remove(&tid);
            Ok(())
        }
        Report::Syscall if held.inside => {
            held.inside = false;
            ptrace::syscall(tid, 0)
        }
        Report::Syscall => {
            held.inside = true;
            held.waits = ptrace::regs(tid)
                .is_ok_and(|r| takes_memory_away(r.orig_rax as i64, &[r.rdi, r.rsi, r.rdx, r.r10]));
            if held.waits {
                Ok(())
            } else {
                ptrace::syscall(tid, 0)
            }
        }
        Report::Event(libc::PTRACE_EVENT_EXIT) => {
            held.waits = true;
            Ok(())
        }
        Report::Signal(signal) => ptrace::syscall(tid, signal),
        Report::JobStop(_) => ptrace::listen(tid),
        Report::Interrupted | Report::Event(_) => ptrace::syscall(tid, 0),
    };
}

/// Stops every thread once more, where it may be let go, and lets it go.
fn let_go(threads: HashMap<i32, Held>) -> Result<(), Error> {
    let mut running = Vec::new();
    for (tid, held) in threads {
        if held.waits {
            let _ = ptrace::detach(tid, 0);
        } else if ptrace::interrupt(tid).is_ok() {
            running.push(tid);
        }
    }
    let begin = Instant::now();
    let mut warned = false;
    while !running.is_empty() {
        running.retain(|&tid| match ptrace::wait(tid, false) {
            Ok(None) => true,
            Ok(Some((_, Report::Signal(signal)))) => {
                ptrace::detach(tid, signal).is_err_and(|e| e != Errno::ESRCH)
            }
            Ok(Some((_, Report::Ended(_)))) | Err(_) => false,
            Ok(Some(_)) => ptrace::detach(tid, 0).is_err_and(|e| e != Errno::ESRCH),
        });
        if begin.elapsed() > Duration::from_millis(2) {
            std::thread::sleep(Duration::from_micros(100));
        }
        if !warned && begin.elapsed() > Duration::from_secs(5) {
            warned = true;
            tracing::warn!(
                ?running,
                "threads wait in the kernel and cannot be let go yet"
            );
        }
    }
    Ok(())
}

/// Whether a system call can make memory of the process, or its content, go away.
#[must_use]
pub fn takes_memory_away(nr: i64, args: &[u64; 4]) -> bool {
    match nr {
        libc::SYS_munmap
        | libc::SYS_mremap
        | libc::SYS_madvise
        | libc::SYS_process_madvise
        | libc::SYS_brk
        | libc::SYS_exit
        | libc::SYS_exit_group
        | libc::SYS_execve
        | libc::SYS_execveat
        | libc::SYS_shmdt
        | libc::SYS_remap_file_pages => true,
        libc::SYS_mmap => args[3] & libc::MAP_FIXED as u64 != 0,
        libc::SYS_shmat => args[2] & libc::SHM_REMAP as u64 != 0,
        _ => false,
    }
}
