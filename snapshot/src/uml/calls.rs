//! System calls in main's name, while it is at rest.

use super::freeze::{Attached, Point};
use super::{Error, traced};
use crate::sys::ptrace::{self, Regs, Report};
use crate::sys::remote;
use nix::errno::Errno;

/// Bytes below the stack pointer that are left alone: the ABI's red zone, with room to spare.
const BELOW: u64 = 256;
/// Bytes for data of a call.
pub const DATA: usize = 512;

/// Main, made to make calls. What it had in the memory that is used is put back at the end.
#[derive(Debug)]
pub struct Calls<'a> {
    at: &'a mut Attached,
    point: Point,
    regs: Regs,
    mask: u64,
    saved: [u8; DATA],
    /// Address of the data.
    pub data: u64,
    ended: bool,
}

impl<'a> Calls<'a> {
    /// Begins. No signal is taken until [`Calls::end`].
    pub fn begin(at: &'a mut Attached, point: Point) -> Result<Self, Error> {
        let main = at.main;
        let regs = ptrace::regs(main).map_err(traced(main, "PTRACE_GETREGS"))?;
        let mask = ptrace::sigmask(main).map_err(traced(main, "PTRACE_GETSIGMASK"))?;
        let data = (regs.rsp - BELOW - DATA as u64) & !15;
        let mut saved = [0; DATA];
        remote::read(main, data, &mut saved).map_err(|e| Error::Memory(main, data, e))?;
        ptrace::set_sigmask(main, u64::MAX).map_err(traced(main, "PTRACE_SETSIGMASK"))?;
        let mut calls = Self {
            at,
            point,
            regs,
            mask,
            saved,
            data,
            ended: false,
        };
        if point == Point::Idle {
            // The call that it is about to make is left out, and made when all is done.
            let mut skip = regs;
            skip.orig_rax = u64::MAX;
            calls.set(&skip)?;
            calls.step()?;
        }
        Ok(calls)
    }

    fn set(&self, regs: &Regs) -> Result<(), Error> {
        ptrace::set_regs(self.at.main, regs).map_err(traced(self.at.main, "PTRACE_SETREGS"))
    }

    /// On to the next entry or exit of a call.
    fn step(&mut self) -> Result<(), Error> {
        let main = self.at.main;
        loop {
            ptrace::syscall(main, 0).map_err(traced(main, "PTRACE_SYSCALL"))?;
            match ptrace::wait(main, true).map_err(traced(main, "waiting"))? {
                Some((_, Report::Syscall)) => return Ok(()),
                Some((_, Report::Ended(_))) | None => return Err(Error::Ended(main)),
                // Only what cannot be blocked gets here, and none of it is meant for main.
                Some(_) => {}
            }
        }
    }

    /// Makes a call; its result, errors as negative numbers.
    pub fn raw(&mut self, nr: i64, args: &[u64]) -> Result<i64, Error> {
        let mut regs = self.regs;
        // Main is behind a `syscall` instruction at both points.
        regs.rip = self.regs.rip - 2;
        regs.rax = nr as u64;
        regs.orig_rax = u64::MAX;
        let arg = |i: usize| args.get(i).copied().unwrap_or(0);
        (regs.rdi, regs.rsi, regs.rdx) = (arg(0), arg(1), arg(2));
        (regs.r10, regs.r8, regs.r9) = (arg(3), arg(4), arg(5));
        self.set(&regs)?;
        self.step()?;
        self.step()?;
        let after = ptrace::regs(self.at.main).map_err(traced(self.at.main, "PTRACE_GETREGS"))?;
        Ok(after.rax.cast_signed())
    }

    /// Makes a call that must not fail.
    pub fn ok(&mut self, what: &'static str, nr: i64, args: &[u64]) -> Result<u64, Error> {
        match self.raw(nr, args)? {
            e @ -4095..0 => Err(Error::Call(self.at.main, what, Errno::from_raw(-e as i32))),
            r => Ok(r.cast_unsigned()),
        }
    }

    /// Writes data of a call; at most [`DATA`] bytes.
    pub fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        remote::write(self.at.main, self.data, bytes)
            .map_err(|e| Error::Memory(self.at.main, self.data, e))
    }

    /// Reads what a call wrote.
    pub fn read(&self, out: &mut [u8]) -> Result<(), Error> {
        remote::read(self.at.main, self.data, out)
            .map_err(|e| Error::Memory(self.at.main, self.data, e))
    }

    /// Puts main back to the point where it was, stopped.
    pub fn end(mut self) -> Result<(), Error> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let main = self.at.main;
        remote::write(main, self.data, &self.saved)
            .map_err(|e| Error::Memory(main, self.data, e))?;
        let mut regs = self.regs;
        if self.point == Point::Idle {
            regs.rip -= 2;
            regs.rax = regs.orig_rax;
        }
        regs.orig_rax = u64::MAX;
        self.set(&regs)?;
        if self.point == Point::Idle {
            self.step()?;
        }
        ptrace::set_sigmask(main, self.mask).map_err(traced(main, "PTRACE_SETSIGMASK"))
    }
}

impl Drop for Calls<'_> {
    fn drop(&mut self) {
        // After an error: what can be put back is.
        let _ = self.finish();
    }
}
