//! What of a machine does not change while it runs, and needs calls in main's name to be found out: asked once.

use super::calls::Calls;
use super::freeze::{Attached, Point, inner_number};
use super::manifest::Stub;
use super::users::Users;
use super::{Error, PAGE, image, traced};
use crate::image::manifest::{PosixTimer, SignalAction};
use crate::proc;
use crate::sys::ptrace::{self, Regs};
use crate::sys::remote;
use crate::sys::uffd::{FEATURES_ASYNC, Uffd};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The first address above a guest's user memory: the page of code by which main has calls made in a user process
/// (`arch/um/include/shared/as-layout.h`), and behind it one for its data.
const STUB_CODE: u64 = 0x7f_c000_0000;
const STUB_DATA: u64 = STUB_CODE + PAGE;

/// The answers.
#[derive(Debug, Clone)]
pub struct Learned {
    /// Main's signal actions; only those that are not the default.
    pub actions: Vec<SignalAction>,
    /// Main's signal stack: address, flags, bytes.
    pub altstack: (u64, u32, u64),
    /// Main's program break.
    pub brk: u64,
    /// How user processes take SIGSEGV.
    pub stub: Stub,
    /// Main's timers. How much time is left is of no use later: a guest kernel looks at its clock when one rings.
    pub timers: Vec<PosixTimer>,
    /// Signals that main caught and ignored when it was asked.
    pub signals: (u64, u64),
    /// A userfaultfd of main's memory, with nothing registered between captures. Kept, because only main can make one, and
    /// has to be stopped for it. None if the kernel has none that serves.
    pub uffd: Option<Arc<Uffd>>,
}

/// Whether a machine is known: something was learned, and main takes the signals that it took then.
pub fn known(learned: Option<&Learned>, main: i32) -> Result<bool, Error> {
    let status = proc::status(main)?;
    Ok(learned.is_some_and(|l| l.signals == (status.caught, status.ignored)))
}

/// Asks. Main is at rest.
pub fn learn(at: &mut Attached, point: Point, users: &Users) -> Result<Learned, Error> {
    let main = at.main;
    let status = proc::status(main)?;
    let timers = timers(main)?;
    let (&user, known) = users
        .iter()
        .find(|(_, k)| {
            k.space
                .pieces()
                .any(|p| p.start <= STUB_DATA && STUB_DATA < p.start + p.len)
        })
        .ok_or_else(|| Error::Foreign(main, "no user process runs in it yet".into()))?;
    let mut calls = Calls::begin(at, point)?;
    let mut actions = Vec::new();
    for signal in 1..=64 {
        let bit = 1u64 << (signal - 1);
        if status.ignored & bit != 0 {
            actions.push(action(signal, [1, 0, 0, 0]));
        }
        if status.caught & bit != 0 {
            let args = [signal as u64, 0, calls.data, 8];
            calls.ok("rt_sigaction", libc::SYS_rt_sigaction, &args)?;
            actions.push(action(signal, words(&calls)?));
        }
    }
    let args = [0, calls.data];
    calls.ok("sigaltstack", libc::SYS_sigaltstack, &args)?;
    let altstack = stack(words(&calls)?);
    let brk = calls.ok("brk", libc::SYS_brk, &[0])?;
    let stub = stub(&mut calls, user, known.number)?;
    let uffd = userfault(&mut calls, main)
        .inspect_err(|e| tracing::debug!("no userfaultfd: {e}"))
        .ok();
    calls.end()?;
    Ok(Learned {
        actions,
        altstack,
        brk,
        stub,
        timers,
        signals: (status.caught, status.ignored),
        uffd: uffd.map(Arc::new),
    })
}

fn action(signal: i32, [handler, flags, restorer, mask]: [u64; 4]) -> SignalAction {
    SignalAction {
        signal,
        handler,
        flags,
        restorer,
        mask,
    }
}

fn words(calls: &Calls<'_>) -> Result<[u64; 4], Error> {
    let mut bytes = [0; 32];
    calls.read(&mut bytes)?;
    Ok(unpack(&bytes))
}

fn unpack(bytes: &[u8; 32]) -> [u64; 4] {
    let mut out = [0; 4];
    for (word, chunk) in out.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(chunk.try_into().unwrap_or_default());
    }
    out
}

/// `stack_t`. SS_ONSTACK is what the kernel reports, not what it takes.
fn stack([sp, flags, size, _]: [u64; 4]) -> (u64, u32, u64) {
    (sp, flags as u32 & !(libc::SS_ONSTACK as u32), size)
}

/// Has a user process asked: main traces it, so main makes it call, from its page of stub code.
fn stub(calls: &mut Calls<'_>, pid: i32, number: i32) -> Result<Stub, Error> {
    let memory = |e| Error::Memory(pid, STUB_CODE, e);
    // It may be executed, and not even read.
    let mut code = vec![0; PAGE as usize];
    File::open(proc::path(pid, "mem"))
        .and_then(|f| f.read_exact_at(&mut code, STUB_CODE))
        .map_err(|e| memory(image::errno_of(&e)))?;
    let at = code.windows(2).position(|w| w == [0x0f, 0x05]);
    let at = at.ok_or_else(|| Error::Foreign(pid, "its stub has no system call".into()))?;
    let mut saved = [0; 32];
    remote::read(pid, STUB_DATA, &mut saved).map_err(memory)?;
    let own = registers(calls, number)?;
    let mut ask = |nr: i64, args: [u64; 4]| -> Result<[u64; 4], Error> {
        let mut r = own;
        r.rip = STUB_CODE + at as u64;
        r.rax = nr as u64;
        r.orig_rax = u64::MAX;
        [r.rdi, r.rsi, r.rdx, r.r10] = args;
        user_call(calls, number, &r)?;
        let mut out = [0; 32];
        remote::read(pid, STUB_DATA, &mut out).map_err(memory)?;
        Ok(unpack(&out))
    };
    let segv = ask(
        libc::SYS_rt_sigaction,
        [libc::SIGSEGV as u64, 0, STUB_DATA, 8],
    )?;
    let alt = ask(libc::SYS_sigaltstack, [0, STUB_DATA, 0, 0])?;
    set_registers(calls, number, &own)?;
    remote::write(pid, STUB_DATA, &saved).map_err(memory)?;
    Ok(Stub {
        segv: action(libc::SIGSEGV, segv),
        altstack: stack(alt),
    })
}

fn registers(calls: &mut Calls<'_>, number: i32) -> Result<Regs, Error> {
    let args = [libc::PTRACE_GETREGS as u64, number as u64, 0, calls.data];
    calls.ok("ptrace", libc::SYS_ptrace, &args)?;
    let mut bytes = [0; 216];
    calls.read(&mut bytes)?;
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|c| u64::from_ne_bytes(c.try_into().unwrap_or_default()))
        .collect();
    ptrace::words_to_regs(&words).ok_or_else(|| Error::Rebuild("registers".into()))
}

fn set_registers(calls: &mut Calls<'_>, number: i32, regs: &Regs) -> Result<(), Error> {
    let bytes: Vec<u8> = ptrace::regs_to_words(regs)
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    calls.write(&bytes)?;
    let args = [libc::PTRACE_SETREGS as u64, number as u64, 0, calls.data];
    calls.ok("ptrace", libc::SYS_ptrace, &args).map(drop)
}

/// Lets a user process make one call. How many stops there are before it depends on where it had stopped.
fn user_call(calls: &mut Calls<'_>, number: i32, regs: &Regs) -> Result<(), Error> {
    set_registers(calls, number, regs)?;
    for _ in 0..6 {
        let args = [libc::PTRACE_SYSCALL as u64, number as u64, 0, 0];
        calls.ok("ptrace", libc::SYS_ptrace, &args)?;
        let args = [number as u64, 0, libc::__WALL as u64, 0];
        calls.ok("wait4", libc::SYS_wait4, &args)?;
        let now = registers(calls, number)?;
        if now.rip == regs.rip + 2 && now.rax.cast_signed() != -i64::from(libc::ENOSYS) {
            return if now.rax == 0 {
                Ok(())
            } else {
                Err(Error::Foreign(number, "its stub cannot be used".into()))
            };
        }
        if now.rip != regs.rip + 2 {
            set_registers(calls, number, regs)?;
        }
    }
    Err(Error::Foreign(number, "its stub does not run".into()))
}

/// `/proc/PID/timers` (proc_pid_timers(5)).
fn timers(main: i32) -> Result<Vec<PosixTimer>, Error> {
    let bytes = proc::read_bytes(main, "timers")?;
    let text = String::from_utf8_lossy(&bytes);
    let mut out: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        if key == "ID" {
            out.push(PosixTimer {
                id: value.parse().unwrap_or(0),
                clock: libc::CLOCK_MONOTONIC,
                notify: libc::SIGEV_SIGNAL,
                signal: libc::SIGALRM,
                value: 0,
                tid: 0,
                interval_ns: 0,
                left_ns: 1_000_000,
            });
        }
        let Some(timer) = out.last_mut() else {
            continue;
        };
        match key {
            "signal" => {
                let (signal, pointer) = value.split_once('/').unwrap_or((value, "0"));
                timer.signal = signal.parse().unwrap_or(libc::SIGALRM);
                timer.value = u64::from_str_radix(pointer, 16).unwrap_or(0);
            }
            "notify" if !value.starts_with("signal") => {
                return Err(Error::Foreign(
                    main,
                    format!("its timer notifies by {value}"),
                ));
            }
            "ClockID" => timer.clock = value.parse().unwrap_or(libc::CLOCK_MONOTONIC),
            _ => {}
        }
    }
    Ok(out)
}

/// Makes a userfaultfd in main, and takes it away from it.
fn userfault(calls: &mut Calls<'_>, main: i32) -> Result<Uffd, Error> {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let number = calls.ok("userfaultfd", libc::SYS_userfaultfd, &[flags])?;
    let fd = remote::pidfd_open(main)
        .and_then(|p| remote::pidfd_getfd(p.as_fd(), number as i32))
        .map_err(traced(main, "pidfd_getfd"));
    calls.ok("close", libc::SYS_close, &[number])?;
    Uffd::new(fd?, FEATURES_ASYNC).map_err(|e| {
        let what = "UFFDIO_API with asynchronous write protection";
        Error::Sys(what, image::errno_of(&e))
    })
}

/// Whether `pid` is traced by main, and so a user process; its number in the machine.
pub fn user_number(pid: i32, main: i32) -> Option<i32> {
    let status = proc::status(pid).ok()?;
    (status.tracer == main).then(|| inner_number(pid)).flatten()
}
