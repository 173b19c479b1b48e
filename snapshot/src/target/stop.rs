//! Stopping all threads of a process, and letting them go.

use super::Error;
use crate::proc;
use crate::sys::ptrace::{self, Report};
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// How long a thread may take to stop: one that waits for a disk does so in tens of milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// A process whose threads are stopped. Dropping it lets them go.
#[derive(Debug)]
pub struct Stopped {
    pid: i32,
    threads: Vec<i32>,
    job_stop: Option<i32>,
}

impl Stopped {
    /// Attaches to all threads of `pid` and stops them.
    pub fn all(pid: i32) -> Result<Self, Error> {
        let mut stopped = Self {
            pid,
            threads: Vec::new(),
            job_stop: None,
        };
        // Threads that are made while we attach show up in the next listing; once all are stopped none is made.
        loop {
            let new: Vec<i32> = proc::threads(pid)?
                .into_iter()
                .filter(|t| !stopped.threads.contains(t))
                .collect();
            if new.is_empty() {
                break;
            }
            let started = stopped.threads.len();
            for tid in new {
                if attach(pid, tid)? {
                    stopped.threads.push(tid);
                }
            }
            stopped.wait_for(started)?;
        }
        if stopped.threads.is_empty() {
            Err(Error::Ended(pid))
        } else {
            Ok(stopped)
        }
    }

    /// Attaches to one thread only and stops it; the others run on.
    pub fn one(pid: i32, tid: i32) -> Result<Self, Error> {
        let mut stopped = Self {
            pid,
            threads: Vec::new(),
            job_stop: None,
        };
        if attach(pid, tid)? {
            stopped.threads.push(tid);
        }
        stopped.wait_for(0)?;
        if stopped.threads.is_empty() {
            Err(Error::Ended(pid))
        } else {
            Ok(stopped)
        }
    }

    /// Waits until the threads from number `from` on have stopped; those that ended are dropped from the list.
    fn wait_for(&mut self, from: usize) -> Result<(), Error> {
        let mut i = from;
        while i < self.threads.len() {
            match wait_stopped(self.threads[i])? {
                Some(Report::JobStop(signal)) => {
                    self.job_stop = Some(signal);
                    i += 1;
                }
                Some(_) => i += 1,
                None => {
                    self.threads.remove(i);
                }
            }
        }
        Ok(())
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its stopped threads; the leader first if it is among them.
    #[must_use]
    pub fn threads(&self) -> &[i32] {
        &self.threads
    }

    /// The signal that had stopped it (job control) before we did.
    #[must_use]
    pub fn job_stop(&self) -> Option<i32> {
        self.job_stop
    }

    /// Sets ptrace options on all threads.
    pub fn set_options(&self, options: i32) -> Result<(), Error> {
        for &tid in &self.threads {
            ptrace::set_options(tid, options)
                .map_err(|e| Error::Ptrace(tid, "PTRACE_SETOPTIONS", e))?;
        }
        Ok(())
    }

    /// Lets all threads go for good.
    pub fn release(self) {
        drop(self);
    }

    /// Gives the list of threads away, still stopped and attached; the caller detaches them.
    #[must_use]
    pub fn into_threads(mut self) -> Vec<i32> {
        std::mem::take(&mut self.threads)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for &tid in &self.threads {
            // A thread that has ended meanwhile needs no letting go.
            let _ = ptrace::detach(tid, 0);
        }
    }
}

/// Attaches and asks it to stop; false if the thread is gone.
fn attach(pid: i32, tid: i32) -> Result<bool, Error> {
    match ptrace::seize(tid, libc::PTRACE_O_TRACESYSGOOD) {
        Ok(()) => {}
        Err(Errno::ESRCH) => return Ok(false),
        Err(Errno::EPERM) => {
            let status = proc::status(tid)?;
            return match status.tracer {
                // A thread that is ending, or has ended and was not waited for, cannot be attached to.
                0 if matches!(proc::stat(tid), Ok(s) if "ZX".contains(s.state)) => Ok(false),
                0 => Err(Error::Permission(pid)),
                tracer => Err(Error::Traced(pid, tracer)),
            };
        }
        Err(e) => return Err(Error::Ptrace(tid, "PTRACE_SEIZE", e)),
    }
    match ptrace::interrupt(tid) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(e) => Err(Error::Ptrace(tid, "PTRACE_INTERRUPT", e)),
    }
}

/// Waits for the stop that PTRACE_INTERRUPT asked for. Signals that come first are passed on. `None`: it ended.
pub(super) fn wait_stopped(tid: i32) -> Result<Option<Report>, Error> {
    let begin = Instant::now();
    let mut spins = 0u32;
    loop {
        match ptrace::wait(tid, false) {
            Ok(None) => {
                spins += 1;
                // Sleeping, not yielding: this thread may run in real time.
                if spins < 20 {
                    std::hint::spin_loop();
                } else if spins < 400 {
                    std::thread::sleep(Duration::from_micros(2));
                } else if begin.elapsed() > PATIENCE {
                    let place = proc::read_bytes(tid, "wchan").unwrap_or_default();
                    let place = String::from_utf8_lossy(&place).into_owned();
                    // Still attached; the stop that is asked for is taken back by detaching, which needs a stop. The
                    // caller's drop detaches the others; this one is let go by our end, or by the next wait.
                    return Err(Error::Busy(tid, PATIENCE.as_millis() as u64, place));
                } else {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            Ok(Some((_, Report::Ended(_)))) | Err(Errno::ECHILD) => return Ok(None),
            Ok(Some((_, Report::Signal(signal)))) => pass(tid, signal)?,
            Ok(Some((_, Report::Syscall | Report::Event(_)))) => pass(tid, 0)?,
            Ok(Some((_, stop))) => return Ok(Some(stop)),
            Err(e) => return Err(Error::Ptrace(tid, "waitpid", e)),
        }
    }
}

fn pass(tid: i32, signal: i32) -> Result<(), Error> {
    match ptrace::cont(tid, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(e) => Err(Error::Ptrace(tid, "PTRACE_CONT", e)),
    }
}
