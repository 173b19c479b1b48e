//! Stopping all threads of a process, and letting them go.

use super::Error;
use crate::proc;
use crate::sys::ptrace::{self, Report};
use crate::sys::remote;
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// How long a thread may take to stop while the others stand still: one that waits for a disk does so in tens of
/// milliseconds.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long is waited for it after that, while the others run.
const LONG_PATIENCE: Duration = Duration::from_secs(2);
/// How long is waited for a thread that could run, on a machine that has no processor for it.
const STARVED: Duration = Duration::from_secs(10);
/// How many times all are stopped.
const ATTEMPTS: u32 = 5;

/// A process whose threads are stopped. Dropping it lets them go.
#[derive(Debug)]
pub struct Stopped {
    pid: i32,
    threads: Vec<i32>,
    /// So many of them, the first ones, have been seen to stop; the others were asked to.
    seen: usize,
    job_stop: Option<i32>,
    since: Instant,
}

impl Stopped {
    /// Attaches to all threads of `pid` and stops them. A thread that does not stop soon (it waits for a disk, or for a
    /// child of vfork) is waited for while the others run, and then all are stopped again.
    pub fn all(pid: i32) -> Result<Self, Error> {
        let mut attempt = 1;
        loop {
            match Self::all_at_once(pid) {
                Err(Error::Busy(tid, ..)) if attempt < ATTEMPTS => {
                    let_go_late(tid)?;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    fn all_at_once(pid: i32) -> Result<Self, Error> {
        let mut stopped = Self {
            pid,
            threads: Vec::new(),
            seen: 0,
            job_stop: None,
            since: Instant::now(),
        };
        // Threads that are made while we attach show up in the next listing; once all are stopped none is made. A first
        // thread that has ended before the others stays in the list.
        let mut gone = Vec::new();
        loop {
            let new: Vec<i32> = proc::threads(pid)?
                .into_iter()
                .filter(|t| !stopped.threads.contains(t) && !gone.contains(t))
                .collect();
            if new.is_empty() {
                break;
            }
            let started = stopped.threads.len();
            // All are attached to before the first is asked to stop: until then they run.
            for tid in new {
                if attach(pid, tid)? {
                    stopped.threads.push(tid);
                } else {
                    gone.push(tid);
                }
            }
            if started == 0 {
                stopped.since = Instant::now();
            }
            for &tid in &stopped.threads[started..] {
                ask(tid)?;
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
            seen: 0,
            job_stop: None,
            since: Instant::now(),
        };
        if attach(pid, tid)? {
            stopped.threads.push(tid);
            stopped.since = Instant::now();
            ask(tid)?;
        }
        stopped.wait_for(0)?;
        if stopped.threads.is_empty() {
            Err(Error::Ended(pid))
        } else {
            Ok(stopped)
        }
    }

    /// The same, for a look at a thread: none if it has ended or does not stop soon.
    pub fn glance(pid: i32, tid: i32) -> Result<Option<Self>, Error> {
        match Self::one(pid, tid) {
            Ok(stopped) => Ok(Some(stopped)),
            Err(Error::Ended(_)) => Ok(None),
            Err(Error::Busy(tid, ..)) => {
                let_go_late(tid)?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Waits until the threads from number `from` on have stopped; those that ended are dropped from the list.
    fn wait_for(&mut self, from: usize) -> Result<(), Error> {
        let mut i = from;
        while i < self.threads.len() {
            let tid = self.threads[i];
            match wait_stopped(tid) {
                Ok(Some(report)) => {
                    if let Report::JobStop(signal) = report {
                        self.job_stop = Some(signal);
                    }
                    mend(tid);
                    i += 1;
                    self.seen = i;
                }
                Ok(None) => {
                    self.threads.remove(i);
                }
                Err(e) => {
                    // Whoever sees the error waits for this one; the others are let go by the drop.
                    self.threads.remove(i);
                    return Err(e);
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

    /// Since when: the first of its threads was asked to stop then.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
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
        // Only a stopped thread can be let go. One that has ended meanwhile needs no letting go. After an error some were
        // asked to stop and have not been waited for: one that stands there for a signal would lose it.
        let asked = self.threads.split_off(self.seen.min(self.threads.len()));
        self.threads
            .retain(|&tid| ptrace::detach(tid, 0) == Err(Errno::ESRCH));
        for &tid in self.threads.iter().chain(&asked) {
            // It may run if a call that was made in its name has failed.
            let _ = ptrace::interrupt(tid);
            if let Ok(Some(_)) = wait_stopped(tid) {
                mend(tid);
                let _ = ptrace::detach(tid, 0);
            }
        }
    }
}

/// Lets a thread go that was asked to stop and did not do so soon: it has to stop first.
fn let_go_late(tid: i32) -> Result<(), Error> {
    if wait_stopped_for(tid, LONG_PATIENCE)?.is_some() {
        mend(tid);
        let _ = ptrace::detach(tid, 0);
    }
    Ok(())
}

/// Attaches; false if the thread is gone.
fn attach(pid: i32, tid: i32) -> Result<bool, Error> {
    match ptrace::seize(tid, libc::PTRACE_O_TRACESYSGOOD) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(Errno::EPERM) => refused(pid, tid),
        Err(e) => Err(Error::Ptrace(tid, "PTRACE_SEIZE", e)),
    }
}

/// Asks a thread that we are attached to, to stop.
fn ask(tid: i32) -> Result<(), Error> {
    match ptrace::interrupt(tid) {
        // One that has ended since is reported as such to whoever waits for it.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(e) => Err(Error::Ptrace(tid, "PTRACE_INTERRUPT", e)),
    }
}

/// Why a thread could not be attached to: it is ending (`Ok(false)`), or was let go by a dead tracer just now, or may not.
fn refused(pid: i32, tid: i32) -> Result<bool, Error> {
    match proc::status(tid) {
        Ok(s) if s.tracer != 0 => return Err(Error::Traced(pid, s.tracer)),
        Err(proc::Error::Gone(_)) => return Ok(false),
        Ok(_) | Err(_) => {}
    }
    match proc::stat(tid) {
        Ok(s) if "ZX".contains(s.state) => return Ok(false),
        Err(_) => return Ok(false),
        Ok(_) => {}
    }
    match ptrace::seize(tid, libc::PTRACE_O_TRACESYSGOOD) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(_) => Err(Error::Permission(pid)),
    }
}

/// Makes the stop invisible where the kernel does not by itself. The thread is stopped on its way back to its own code.
///
/// A wait without a time limit that gives EINTR for a stop without a signal is made again: the result is replaced by
/// ERESTARTNOHAND, for which the kernel makes the call again, or gives EINTR after all if a handler is to run first (so
/// does it by itself for ppoll, pause, msgrcv and others). A wait with a limit would be made again with the whole limit.
///
/// A thread that was stopped in a restartable sequence (rseq(2)) and is used for calls would afterwards go on in the middle
/// of it: the kernel aborts a sequence only when the thread returns to it. So it is aborted here, which is what being
/// preempted does.
pub(crate) fn mend(tid: i32) {
    const EINTR: u64 = -(libc::EINTR as i64) as u64;
    const ERESTARTNOHAND: u64 = -514i64 as u64;
    let Ok(mut regs) = ptrace::regs(tid) else {
        return;
    };
    if (regs.orig_rax as i64) < 0 {
        if let Some(rip) = rseq_abort(tid, regs.rip) {
            regs.rip = rip;
            let _ = ptrace::set_regs(tid, &regs);
        }
    } else if regs.rax == EINTR && waits_forever(&regs) {
        regs.rax = ERESTARTNOHAND;
        let _ = ptrace::set_regs(tid, &regs);
    }
}

fn waits_forever(r: &ptrace::Regs) -> bool {
    match r.orig_rax as i64 {
        // An int.
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (r.r10 as i32) < 0,
        // A pointer to a time.
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => r.r10 == 0,
        libc::SYS_rt_sigtimedwait => r.rdx == 0,
        libc::SYS_semop => true,
        _ => false,
    }
}

/// Where a thread has to go on that was stopped at `rip` in a restartable sequence.
fn rseq_abort(tid: i32, rip: u64) -> Option<u64> {
    let (area, ..) = ptrace::rseq(tid).ok()?;
    let word = |addr: u64| {
        let mut bytes = [0u8; 8];
        remote::read(tid, addr, &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    if area == 0 {
        return None;
    }
    let sequence = word(area + 8)?;
    if sequence == 0 {
        return None;
    }
    // struct rseq_cs: version and flags, start, length, where to go.
    let (start, len, abort) = (
        word(sequence + 8)?,
        word(sequence + 16)?,
        word(sequence + 24)?,
    );
    (rip.wrapping_sub(start) < len).then_some(abort)
}

/// Waits for the stop that PTRACE_INTERRUPT asked for. Signals that come first are passed on. `None`: it ended.
pub(crate) fn wait_stopped(tid: i32) -> Result<Option<Report>, Error> {
    wait_stopped_for(tid, PATIENCE)
}

fn wait_stopped_for(tid: i32, patience: Duration) -> Result<Option<Report>, Error> {
    let begin = Instant::now();
    let mut spins = 0u32;
    loop {
        match ptrace::wait(tid, false) {
            Ok(None) => {
                spins += 1;
                // Sleeping, not yielding: this thread may run in real time, and a thread that is to stop may wait for just
                // this processor. A shorter sleep gives it to nobody, but takes as long.
                if spins < 40 {
                    std::hint::spin_loop();
                } else if spins < 170 {
                    std::thread::sleep(Duration::from_micros(20));
                } else if begin.elapsed() > patience && !runs(tid, begin.elapsed()) {
                    let place = proc::read_bytes(tid, "wchan").unwrap_or_default();
                    let place = String::from_utf8_lossy(&place).into_owned();
                    // Still attached: only a stopped thread can be let go. The next wait, or our end, does it.
                    return Err(Error::Busy(tid, patience.as_millis() as u64, place));
                } else {
                    let pause = if spins < 250 { 50 } else { 300 };
                    std::thread::sleep(Duration::from_micros(pause));
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

/// Whether a thread only waits for a processor: it will stop as soon as it gets one.
fn runs(tid: i32, since: Duration) -> bool {
    since < STARVED && proc::stat(tid).is_ok_and(|s| s.state == 'R')
}

fn pass(tid: i32, signal: i32) -> Result<(), Error> {
    match ptrace::cont(tid, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(e) => Err(Error::Ptrace(tid, "PTRACE_CONT", e)),
    }
}
