//! Making system calls in the name of stopped threads.

use super::journal::{Away, Journal};
use super::{Batch, Error, Stopped};
use crate::proc::{self, MapKind};
use crate::sys::ptrace::{self, Regs, Report};
use crate::sys::remote;
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// `syscall; jmp .`, then, at 8, the loop over a table: rbx is the next entry, r12 the number of entries left, r13 the
/// done word. An entry is the number of the call, six arguments, and room for the result. After the last it sets the done
/// word and sleeps in pause(2): a hundred threads that spun would take the processors from each other.
pub(super) const LOOP: [u8; 72] = [
    0x0f, 0x05, 0xeb, 0xfe, 0x0f, 0x1f, 0x40, 0x00, 0x4d, 0x85, 0xe4, 0x74, 0x2a, 0x48, 0x8b, 0x03,
    0x48, 0x8b, 0x7b, 0x08, 0x48, 0x8b, 0x73, 0x10, 0x48, 0x8b, 0x53, 0x18, 0x4c, 0x8b, 0x53, 0x20,
    0x4c, 0x8b, 0x43, 0x28, 0x4c, 0x8b, 0x4b, 0x30, 0x0f, 0x05, 0x48, 0x89, 0x43, 0x38, 0x48, 0x83,
    0xc3, 0x40, 0x49, 0xff, 0xcc, 0xeb, 0xd1, 0x41, 0xc7, 0x45, 0x00, 0x01, 0x00, 0x00, 0x00, 0xb8,
    0x22, 0x00, 0x00, 0x00, 0x0f, 0x05, 0xeb, 0xf7,
];
const LOOP_ENTRY: u64 = 8;
/// Room that is looked for at the end of the vdso.
const TAIL: u64 = 128;
/// How long a batch may take; none of the calls that are made waits for anything.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is blocked for a thread that is away from its own code: all but SIGSTKFLT, which nothing sends. So a repair can
/// tell it from the mask of a program that has blocked all signals by itself, as glibc does while it makes a thread.
pub(super) const AWAY_MASK: u64 =
    !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 1 << (libc::SIGSTKFLT - 1));

/// Where in a target the loop and its table are. It outlives a stop: made in one, used and removed in a later one.
#[derive(Debug, Clone, Copy)]
pub struct Foothold {
    tail: u64,
    scratch: u64,
    scratch_len: u64,
}

impl Foothold {
    /// First address and length of the scratch, which is not part of the target.
    #[must_use]
    pub fn scratch(&self) -> (u64, u64) {
        (self.scratch, self.scratch_len)
    }
}

/// Stopped threads of one process that are away from their own code. [`Driver::leave`] sends them back; so does dropping
/// it, as far as that works, and the guardian if we die.
#[derive(Debug)]
pub struct Driver<'a> {
    pid: i32,
    away: Vec<(i32, Regs, u64)>,
    journal: &'a mut Journal,
    foothold: Option<Foothold>,
    /// Between [`Driver::fasten`] and [`Driver::unfasten`].
    fastened: bool,
}

/// Batches that threads are at work on.
#[derive(Debug)]
pub struct Started {
    scratch: u64,
    bytes: Vec<u8>,
    places: Vec<usize>,
}

impl<'a> Driver<'a> {
    /// Takes threads away from their code; their registers and masks go into the journal first.
    pub fn enter(
        stopped: &Stopped,
        tids: &[i32],
        journal: &'a mut Journal,
        foothold: Option<Foothold>,
    ) -> Result<Self, Error> {
        let pid = stopped.pid();
        if let Some(f) = foothold {
            check_foothold(pid, tids[0], f, journal)?;
        }
        let mut away = Vec::with_capacity(tids.len());
        for &tid in tids {
            let regs = ptrace::regs(tid).map_err(|e| Error::Ptrace(tid, "PTRACE_GETREGS", e))?;
            let mask =
                ptrace::sigmask(tid).map_err(|e| Error::Ptrace(tid, "PTRACE_GETSIGMASK", e))?;
            away.push((tid, regs, mask));
        }
        journal.record.active = true;
        journal.record.away = away
            .iter()
            .map(|(tid, regs, mask)| Away {
                tid: *tid,
                sigmask: *mask,
                regs: ptrace::regs_to_words(regs),
            })
            .collect();
        if let Some(f) = foothold {
            (
                journal.record.vdso_tail,
                journal.record.scratch,
                journal.record.scratch_len,
            ) = (f.tail, f.scratch, f.scratch_len);
        }
        journal.write()?;
        let driver = Self {
            pid,
            away,
            journal,
            foothold,
            fastened: false,
        };
        crate::fault::point("driver.enter");
        for (tid, _, _) in &driver.away {
            ptrace::set_sigmask(*tid, AWAY_MASK)
                .map_err(|e| Error::Ptrace(*tid, "PTRACE_SETSIGMASK", e))?;
        }
        Ok(driver)
    }

    /// Writes the loop into the tail of the vdso and maps the scratch.
    pub fn settle(&mut self, scratch_len: u64) -> Result<Foothold, Error> {
        let (tid, tail) = (self.away[0].0, free_tail(self.pid)?);
        self.journal.record.vdso_tail = tail;
        self.journal.write()?;
        write_code(tid, tail, &LOOP)?;
        crate::fault::point("driver.loop");
        // The address goes into the journal before the mapping is made, so it is ours to choose.
        let len = scratch_len.next_multiple_of(4096);
        let scratch = free_range(&proc::maps(self.pid)?, len).ok_or(Error::NoVdso(self.pid))?;
        (self.journal.record.scratch, self.journal.record.scratch_len) = (scratch, len);
        self.journal.write()?;
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let args = [scratch, len, prot, flags, u64::MAX, 0];
        self.boot_call(tail, libc::SYS_mmap, args)
            .map_err(|e| call_failed(self.pid, "mmap", e))?;
        // A child that it makes meanwhile shall not have it.
        let args = [scratch, len, libc::MADV_DONTFORK as u64, 0, 0, 0];
        self.boot_call(tail, libc::SYS_madvise, args)
            .map_err(|e| call_failed(self.pid, "madvise", e))?;
        let foothold = Foothold {
            tail,
            scratch,
            scratch_len: len,
        };
        crate::fault::point("driver.scratch");
        self.foothold = Some(foothold);
        Ok(foothold)
    }

    /// Runs one batch in the first thread.
    pub fn run(&mut self, batch: &mut Batch) -> Result<(), Error> {
        let mut all = [std::mem::take(batch)];
        let r = self.run_all(&mut all);
        [*batch] = all;
        r
    }

    /// Runs a batch in each of the first threads, at the same time.
    pub fn run_all(&mut self, batches: &mut [Batch]) -> Result<(), Error> {
        let started = self.start(batches)?;
        self.finish(started, batches)
    }

    /// Sets a batch going in each of the first threads; [`Driver::finish`] waits for them. The caller has work of its own
    /// to do meanwhile. Dropped in between, the threads are brought back as after an error.
    pub fn start(&mut self, batches: &[Batch]) -> Result<Started, Error> {
        let Some(foothold) = self.foothold else {
            return Err(Error::NoVdso(self.pid));
        };
        let mut bytes = Vec::new();
        let mut places = Vec::new();
        for b in batches {
            let at = bytes.len();
            bytes.extend_from_slice(&b.encode(foothold.scratch + at as u64));
            places.push(at);
        }
        if bytes.len() as u64 > foothold.scratch_len || batches.len() > self.away.len() {
            return Err(Error::Memory(
                self.pid,
                "reserve scratch",
                foothold.scratch,
                Errno::ENOSPC,
            ));
        }
        self.write(foothold.scratch, &bytes)?;
        crate::fault::point("driver.table");
        for ((tid, regs, _), (b, at)) in self.away.iter().zip(batches.iter().zip(&places)) {
            let start = foothold.scratch + *at as u64;
            let regs = Regs {
                rip: foothold.tail + LOOP_ENTRY,
                rbx: start + 8,
                r12: b.len() as u64,
                r13: start,
                rax: 0,
                orig_rax: u64::MAX,
                ..*regs
            };
            ptrace::set_regs(*tid, &regs).map_err(|e| Error::Ptrace(*tid, "PTRACE_SETREGS", e))?;
            ptrace::cont(*tid, 0).map_err(|e| Error::Ptrace(*tid, "PTRACE_CONT", e))?;
        }
        crate::fault::point("driver.running");
        Ok(Started {
            scratch: foothold.scratch,
            bytes,
            places,
        })
    }

    /// Waits for what [`Driver::start`] has set going, stops the threads again, and gives `batches` their results.
    pub fn finish(&mut self, started: Started, batches: &mut [Batch]) -> Result<(), Error> {
        let Started {
            scratch,
            mut bytes,
            places,
        } = started;
        self.wait_done(scratch, &mut bytes, &places)?;
        crate::fault::point("driver.done");
        for (tid, _, _) in &self.away[..places.len()] {
            ptrace::interrupt(*tid).map_err(|e| Error::Ptrace(*tid, "PTRACE_INTERRUPT", e))?;
        }
        for (tid, _, _) in &self.away[..places.len()] {
            super::stop::wait_stopped(*tid)?.ok_or(Error::Ended(self.pid))?;
        }
        self.read(scratch, &mut bytes)?;
        for (b, at) in batches.iter_mut().zip(places) {
            b.decode(&bytes[at..]);
        }
        Ok(())
    }

    /// Waits until all done words are set; `bytes` is room for all tables. They are read together: with a hundred threads
    /// a look at each of them takes longer than what they do.
    fn wait_done(&self, addr: u64, bytes: &mut [u8], places: &[usize]) -> Result<(), Error> {
        let begin = Instant::now();
        let mut spins = 0u32;
        loop {
            self.read(addr, bytes)?;
            if places.iter().all(|&at| bytes[at..at + 4] == [1, 0, 0, 0]) {
                return Ok(());
            }
            spins += 1;
            // Sleeping, not yielding: this thread may run in real time, and would never yield to the one it waits for.
            // And less and less often: many savers at once would take all processors from their targets. (A shorter
            // sleep gives the processor to nobody, but takes as long.)
            if spins > 20 {
                std::thread::sleep(Duration::from_micros(match spins {
                    0..120 => 20,
                    120..200 => 50,
                    _ => 500,
                }));
            }
            // A signal that cannot be blocked (SIGSTOP) stops it: it is sent on. So this must not be looked for seldom.
            if spins >= 200 || spins.is_multiple_of(40) {
                if begin.elapsed() > PATIENCE {
                    return Err(Error::Busy(
                        self.pid,
                        PATIENCE.as_millis() as u64,
                        "a call made in its name".into(),
                    ));
                }
                for (tid, _, _) in &self.away {
                    let moved = match ptrace::wait(*tid, false) {
                        Ok(Some((_, report))) => go_on(*tid, report, ptrace::cont),
                        Ok(None) => Ok(()),
                        Err(e) => Err(e),
                    };
                    moved.map_err(|_| Error::Ended(self.pid))?;
                }
            }
        }
    }

    /// From here on to [`Driver::unfasten`], no thread of the process goes on in its own code if we die: it stays stopped, as by
    /// SIGSTOP, until it is repaired. For changes that its own code must not meet.
    ///
    /// Nobody runs who could take the signal; the kernel gives it to the first thread that goes on, and stops all. All threads
    /// of the process must be in stops, but for those that are away. A SIGSTOP that somebody else sends meanwhile is one with
    /// ours, and lost.
    pub fn fasten(&mut self) -> Result<(), Error> {
        for (tid, ..) in &self.away {
            ptrace::interrupt(*tid).map_err(|e| Error::Ptrace(*tid, "PTRACE_INTERRUPT", e))?;
        }
        for (tid, ..) in &self.away {
            super::stop::wait_stopped(*tid)?.ok_or(Error::Ended(self.pid))?;
        }
        self.journal.record.held = true;
        self.journal.write()?;
        self.fastened = true;
        let pid = nix::unistd::Pid::from_raw(self.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP)
            .map_err(|e| call_failed(self.pid, "kill", e))?;
        crate::fault::point("driver.fastened");
        Ok(())
    }

    /// Takes the signal back, and lets the threads that are away go on there. Nothing to do without [`Driver::fasten`].
    pub fn unfasten(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.fastened) {
            return Ok(());
        }
        let failed = |e| call_failed(self.pid, "take SIGSTOP back", e);
        // All other signals are blocked there, so it is the next that the thread reports.
        let first = self.away[0].0;
        loop {
            ptrace::cont(first, 0).map_err(failed)?;
            match ptrace::wait(first, true).map_err(failed)? {
                Some((_, Report::Signal(libc::SIGSTOP))) => break,
                Some((_, Report::Ended(_))) | None => return Err(Error::Ended(self.pid)),
                Some(_) => {}
            }
        }
        // The next record says so.
        self.journal.record.held = false;
        for (tid, ..) in &self.away {
            ptrace::cont(*tid, 0).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes the scratch, sends the threads back to their own code, where they stay stopped, and removes the loop: in this
    /// order, as a thread that is let go by our death must not stand where the loop was.
    pub fn unsettle(mut self) -> Result<(), Error> {
        let Some(f) = self.foothold.take() else {
            return self.send_back();
        };
        let tid = self.away[0].0;
        self.boot_call(
            f.tail,
            libc::SYS_munmap,
            [f.scratch, f.scratch_len, 0, 0, 0, 0],
        )
        .map_err(|e| call_failed(self.pid, "munmap", e))?;
        self.journal.record.scratch = 0;
        self.journal.write()?;
        crate::fault::point("driver.unmapped");
        self.send_back()?;
        write_code(tid, f.tail, &[0; LOOP.len()])?;
        self.journal.record.vdso_tail = 0;
        self.note_rest()
    }

    /// All threads are at home: a repair has something to do only if anything else of ours is left.
    fn note_rest(&mut self) -> Result<(), Error> {
        let r = &mut self.journal.record;
        r.active = r.vdso_tail != 0 || r.fds != [-1; 4];
        self.journal.write()
    }

    /// Notes descriptors of the target that a repair would have to close.
    pub fn note_fds(&mut self, fds: [i32; 4]) -> Result<(), Error> {
        self.journal.record.fds = fds;
        self.journal.write()
    }

    /// Sends the threads back to their own code. They stay stopped.
    pub fn leave(mut self) -> Result<(), Error> {
        self.send_back()
    }

    fn send_back(&mut self) -> Result<(), Error> {
        self.unfasten()?;
        for (tid, ..) in &self.away {
            // After an error it may still run in the loop, where its registers cannot be set.
            if ptrace::regs(*tid) == Err(Errno::ESRCH) {
                let _ = ptrace::interrupt(*tid);
                super::stop::wait_stopped(*tid)?;
            }
        }
        for (tid, regs, mask) in std::mem::take(&mut self.away) {
            for (what, r) in [
                ("PTRACE_SETREGS", ptrace::set_regs(tid, &regs)),
                ("PTRACE_SETSIGMASK", ptrace::set_sigmask(tid, mask)),
            ] {
                match r {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(e) => return Err(Error::Ptrace(tid, what, e)),
                }
            }
        }
        crate::fault::point("driver.back");
        self.journal.record.away.clear();
        self.note_rest()
    }

    /// One call by the bare `syscall` in front of the loop; used where there is no scratch.
    fn boot_call(&mut self, tail: u64, nr: i64, args: [u64; 6]) -> Result<u64, Errno> {
        let (tid, regs, _) = self.away[0];
        call_at(tid, tail, &regs, nr, args)
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Error> {
        remote::read(self.pid, addr, buf).map_err(|e| Error::Memory(self.pid, "read", addr, e))
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), Error> {
        remote::write(self.pid, addr, buf).map_err(|e| Error::Memory(self.pid, "write", addr, e))
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        if !self.away.is_empty() && self.send_back().is_err() {
            tracing::error!(
                pid = self.pid,
                "could not send threads back to their code; `umlctl rescue` can"
            );
        }
    }
}

/// A thread that makes a call for us reports something else: it is to go on. A SIGSTOP, which cannot be blocked, is handed
/// to it; the kernel then stops the process, of which this thread takes no notice until it is let go.
pub(super) fn go_on(
    tid: i32,
    report: Report,
    how: fn(i32, i32) -> Result<(), Errno>,
) -> Result<(), Errno> {
    match report {
        Report::Ended(_) => Err(Errno::ESRCH),
        Report::Signal(signal) => how(tid, signal),
        _ => how(tid, 0),
    }
}

fn call_failed(pid: i32, what: &'static str, e: Errno) -> Error {
    match e {
        Errno::ESRCH | Errno::ECHILD => Error::Ended(pid),
        e => Error::Call(pid, what, e),
    }
}

/// Whether the loop and the scratch are still there: after an execve a thread would be sent nowhere. If not, nothing of
/// ours is in the process any more.
fn check_foothold(pid: i32, tid: i32, f: Foothold, journal: &mut Journal) -> Result<(), Error> {
    let (mut code, mut word) = ([0u8; LOOP.len()], [0u8; 8]);
    let code_there = remote::read(pid, f.tail, &mut code).is_ok() && code == LOOP;
    if code_there && remote::read(pid, f.scratch, &mut word).is_ok() {
        return Ok(());
    }
    if code_there {
        write_code(tid, f.tail, &[0; LOOP.len()])?;
    }
    journal.record = super::journal::Record::idle(journal.record.pid, journal.record.start_time);
    journal.write()?;
    Err(Error::Changed(pid))
}

/// Makes a stopped thread do one call by the bare `syscall` at `tail`. `regs` are those that it keeps otherwise.
pub(super) fn call_at(
    tid: i32,
    tail: u64,
    regs: &Regs,
    nr: i64,
    [rdi, rsi, rdx, r10, r8, r9]: [u64; 6],
) -> Result<u64, Errno> {
    let regs = Regs {
        rip: tail,
        rax: nr as u64,
        rdi,
        rsi,
        rdx,
        r10,
        r8,
        r9,
        orig_rax: u64::MAX,
        ..*regs
    };
    ptrace::set_regs(tid, &regs)?;
    for _ in 0..2 {
        ptrace::syscall(tid, 0)?;
        loop {
            match ptrace::wait(tid, true)? {
                Some((_, Report::Syscall)) => break,
                Some((_, report)) => go_on(tid, report, ptrace::syscall)?,
                None => {}
            }
        }
    }
    let result = ptrace::regs(tid)?.rax;
    // A stop at the exit of a call is not one from which the kernel restarts interrupted calls: an interrupt is.
    ptrace::interrupt(tid)?;
    ptrace::cont(tid, 0)?;
    super::stop::wait_stopped(tid)
        .map_err(|_| Errno::ESRCH)?
        .ok_or(Errno::ESRCH)?;
    if (-4095..0).contains(&result.cast_signed()) {
        return Err(Errno::from_raw(-(result as i32)));
    }
    Ok(result)
}

/// Writes code where the target has it read-only.
pub(super) fn write_code(tid: i32, addr: u64, code: &[u8]) -> Result<(), Error> {
    for (i, chunk) in code.chunks(8).enumerate() {
        let mut word = [0u8; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let at = addr + 8 * i as u64;
        ptrace::poke(tid, at, u64::from_le_bytes(word))
            .map_err(|e| Error::Memory(tid, "write", at, e))?;
    }
    Ok(())
}

/// An address in the zeroes behind the end of the vdso's code.
fn free_tail(pid: i32) -> Result<u64, Error> {
    let maps = proc::maps(pid)?;
    let vdso = maps
        .iter()
        .find(|m| m.kind == MapKind::Special("[vdso]".into()))
        .ok_or(Error::NoVdso(pid))?;
    if vdso.end - vdso.start < TAIL {
        return Err(Error::NoVdso(pid));
    }
    let addr = vdso.end - TAIL;
    let mut tail = [0u8; TAIL as usize];
    remote::read(pid, addr, &mut tail).map_err(|e| Error::Memory(pid, "read", addr, e))?;
    // A loop that a killed saver left behind is overwritten with the same bytes.
    let ours = tail[..LOOP.len()] == LOOP;
    if tail.iter().any(|&b| b != 0) && !ours {
        Err(Error::NoVdso(pid))
    } else {
        Ok(addr)
    }
}

/// A free range of addresses that is in nobody's way: behind the vdso, else in the middle of the widest gap.
fn free_range(maps: &[proc::Map], len: u64) -> Option<u64> {
    const TOP: u64 = 0x7fff_ffff_f000;
    let vdso = maps
        .iter()
        .find(|m| m.kind == MapKind::Special("[vdso]".into()))?;
    let next = maps
        .iter()
        .map(|m| m.start)
        .filter(|&s| s >= vdso.end)
        .min()
        .unwrap_or(TOP)
        .min(TOP);
    if next.saturating_sub(vdso.end) >= len + 0x4000 {
        return Some(vdso.end + 0x2000);
    }
    let gaps = maps
        .windows(2)
        .map(|w| (w[0].end, w[1].start))
        .filter(|g| g.1 <= TOP);
    let (start, end) = gaps.max_by_key(|g| g.1.saturating_sub(g.0))?;
    (end - start > len * 4).then(|| (start + (end - start) / 2) & !0xfff)
}
