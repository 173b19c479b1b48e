//! Letting a stopped target run on while the rest of its memory is saved: its system calls are traced, and those that
//! could take memory away wait until all is saved.

use crate::sys::ptrace::{self, Report};
use crate::target::stop::mend;
use crate::target::{Error, Stopped};
use nix::errno::Errno;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXIT;

/// How long is waited for threads that cannot be stopped.
const GIVE_UP: Duration = Duration::from_secs(5);

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
                // On two CPUs this is where others copy.
                let pause = if idle > 200 { 100 } else { 2 };
                std::thread::sleep(Duration::from_micros(pause));
            }
            Err(Errno::ECHILD) => break,
            Err(e) => return Err(Error::Ptrace(-1, "waitpid", e)),
        }
    }
    let_go(threads)
}

fn handle(threads: &mut HashMap<i32, Held>, tid: i32, report: Report) {
    if let Report::Event(event) = report
        && makes(event)
        && let Ok(new) = ptrace::event_message(tid)
    {
        threads.entry(new as i32).or_insert(Held {
            inside: false,
            waits: false,
        });
    }
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
///
/// A thread that waits in the kernel for long (for a child of vfork that does not start its program, or a dead disk) is
/// given up: the kernel lets it go when this program ends.
fn let_go(threads: HashMap<i32, Held>) -> Result<(), Error> {
    let mut running = HashSet::new();
    for (tid, held) in threads {
        // One that waits and was killed meanwhile is on its way to its end, and stops once more there.
        if !held.waits || ptrace::detach(tid, 0).is_err() {
            let _ = ptrace::interrupt(tid);
            running.insert(tid);
        }
    }
    let begin = Instant::now();
    while !running.is_empty() {
        let (tid, report) = match ptrace::wait_own() {
            Ok(Some(r)) => r,
            Ok(None) => {
                if begin.elapsed() > Duration::from_millis(2) {
                    std::thread::sleep(Duration::from_micros(100));
                }
                if begin.elapsed() > GIVE_UP {
                    tracing::warn!(
                        ?running,
                        "threads wait in the kernel and are let go when this program ends"
                    );
                    return Ok(());
                }
                continue;
            }
            Err(Errno::ECHILD) => break,
            Err(e) => return Err(Error::Ptrace(-1, "waitpid", e)),
        };
        running.remove(&tid);
        let signal = match report {
            Report::Ended(_) => continue,
            Report::Signal(signal) => signal,
            Report::Event(event) => {
                // What it has just made is attached too, and has stopped or is about to.
                if makes(event)
                    && let Ok(new) = ptrace::event_message(tid)
                {
                    running.insert(new as i32);
                }
                0
            }
            Report::Interrupted => {
                mend(tid);
                0
            }
            _ => 0,
        };
        if ptrace::detach(tid, signal).is_err() {
            // Killed while it stood still: its end is reported next.
            running.insert(tid);
        }
    }
    Ok(())
}

fn makes(event: i32) -> bool {
    matches!(
        event,
        libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK
    )
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
