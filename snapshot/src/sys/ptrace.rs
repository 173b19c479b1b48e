//! ptrace(2), for threads that were attached with PTRACE_SEIZE. Every call must come from the thread that attached.

use nix::errno::Errno;
use std::ptr;

/// The general registers.
pub type Regs = libc::user_regs_struct;

/// Note type of the extended state (`include/uapi/linux/elf.h`).
pub const NT_X86_XSTATE: i32 = 0x202;

const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_GET_SYSCALL_INFO: u32 = 0x420e;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;

/// What a traced thread reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// It ended: the raw status of wait(2).
    Ended(i32),
    /// It is about to take this signal.
    Signal(i32),
    /// It stopped because of PTRACE_INTERRUPT.
    Interrupted,
    /// It is stopped by job control, with this signal.
    JobStop(i32),
    /// It enters or leaves a system call (PTRACE_SYSCALL with PTRACE_O_TRACESYSGOOD).
    Syscall,
    /// Another event of `PTRACE_EVENT_*`.
    Event(i32),
}

fn call(request: u32, tid: i32, addr: usize, data: usize) -> Result<i64, Errno> {
    // SAFETY: requests that write through `data` or `addr` are only made by the functions below, which pass pointers to
    // memory of the right size that lives through the call; others take numbers.
    let r = unsafe { libc::ptrace(request as _, tid, addr, data) };
    if r == -1 { Err(Errno::last()) } else { Ok(r) }
}

/// Attaches without stopping. `options` are `PTRACE_O_*`.
pub fn seize(tid: i32, options: i32) -> Result<(), Errno> {
    call(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Changes the options.
pub fn set_options(tid: i32, options: i32) -> Result<(), Errno> {
    call(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// Asks a running thread to stop.
pub fn interrupt(tid: i32) -> Result<(), Errno> {
    call(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go on, with a signal or 0.
pub fn cont(tid: i32, signal: i32) -> Result<(), Errno> {
    call(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets it go on to the next entry to or exit from a system call.
pub fn syscall(tid: i32, signal: i32) -> Result<(), Errno> {
    call(libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// Leaves a thread in its job-control stop, but reports when that ends.
pub fn listen(tid: i32) -> Result<(), Errno> {
    call(libc::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Lets it go for good, with a signal or 0.
pub fn detach(tid: i32, signal: i32) -> Result<(), Errno> {
    call(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The general registers of a stopped thread.
pub fn regs(tid: i32) -> Result<Regs, Errno> {
    // SAFETY: all zeroes is a value of this plain structure.
    let mut regs: Regs = unsafe { std::mem::zeroed() };
    call(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Sets the general registers.
pub fn set_regs(tid: i32, regs: &Regs) -> Result<(), Errno> {
    call(libc::PTRACE_SETREGS, tid, 0, ptr::from_ref(regs) as usize).map(drop)
}

/// The registers as 27 words, in the order of `struct user_regs_struct`.
#[must_use]
pub fn regs_to_words(regs: &Regs) -> Vec<u64> {
    // SAFETY: the structure is 27 unsigned words without padding, and the slice does not outlive the borrow.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(regs).cast::<u64>(), 27) }.to_vec()
}

/// The reverse of [`regs_to_words`]; `None` if there are not 27 words.
#[must_use]
pub fn words_to_regs(words: &[u64]) -> Option<Regs> {
    // SAFETY: all zeroes is a value of this plain structure.
    let mut regs: Regs = unsafe { std::mem::zeroed() };
    if words.len() != 27 {
        return None;
    }
    // SAFETY: 27 words are read and the structure is 27 words long; they do not overlap.
    unsafe { ptr::copy_nonoverlapping(words.as_ptr(), (&raw mut regs).cast::<u64>(), 27) };
    Some(regs)
}

/// The extended state (x87, SSE, AVX, ...), in the layout of XSAVE.
pub fn xstate(tid: i32) -> Result<Vec<u8>, Errno> {
    // Given away as long as it is and no longer: fresh memory for each of a hundred threads takes time.
    let mut buf = [0u8; 16384];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    call(
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE as usize,
        &raw mut iov as usize,
    )?;
    Ok(buf[..iov.iov_len.min(buf.len())].to_vec())
}

/// Sets the extended state.
pub fn set_xstate(tid: i32, state: &[u8]) -> Result<(), Errno> {
    let mut iov = libc::iovec {
        iov_base: state.as_ptr().cast_mut().cast(),
        iov_len: state.len(),
    };
    call(
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE as usize,
        &raw mut iov as usize,
    )
    .map(drop)
}

/// The signals that the thread blocks (bit n-1 is signal n); in a call that swaps the mask for its duration, the mask
/// that will be back after it.
pub fn sigmask(tid: i32) -> Result<u64, Errno> {
    let mut mask = 0u64;
    call(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals.
pub fn set_sigmask(tid: i32, mask: u64) -> Result<(), Errno> {
    call(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// Signals that wait: for the thread, or for the process as a whole. They stay where they are. At most 4,096 are read.
pub fn pending(tid: i32, shared: bool) -> Result<Vec<[u8; 128]>, Errno> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut all = Vec::new();
    loop {
        let mut chunk = [[0u8; 128]; 32];
        let args = Args {
            off: all.len() as u64,
            flags: u32::from(shared),
            nr: 32,
        };
        let n = call(
            PTRACE_PEEKSIGINFO,
            tid,
            &raw const args as usize,
            chunk.as_mut_ptr() as usize,
        )?;
        let n = usize::try_from(n).unwrap_or(0).min(32);
        all.extend_from_slice(&chunk[..n]);
        if n < 32 || all.len() >= 4096 {
            return Ok(all);
        }
    }
}

/// The thread's rseq(2) registration: address, size, signature, flags; all zero if there is none.
pub fn rseq(tid: i32) -> Result<(u64, u32, u32, u32), Errno> {
    #[repr(C)]
    #[derive(Default)]
    struct Config {
        pointer: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut c = Config::default();
    call(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<Config>(),
        &raw mut c as usize,
    )?;
    Ok((c.pointer, c.size, c.signature, c.flags))
}

/// Whether the thread has system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH).
pub fn user_dispatch(tid: i32) -> Result<bool, Errno> {
    let mut c = [0u64; 4];
    call(
        PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        32,
        c.as_mut_ptr() as usize,
    )?;
    Ok(c[0] != 0)
}

/// The message of the last event (a new thread's number, an exit status).
pub fn event_message(tid: i32) -> Result<u64, Errno> {
    let mut message = 0u64;
    call(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// Writes 8 bytes to any mapped address, also a read-only one (the page becomes the target's own).
pub fn poke(tid: i32, addr: u64, word: u64) -> Result<(), Errno> {
    call(libc::PTRACE_POKEDATA, tid, addr as usize, word as usize).map(drop)
}

/// Where in a system call a thread has stopped (PTRACE_GET_SYSCALL_INFO, `include/uapi/linux/ptrace.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// At no call.
    None,
    /// Before it is made: its number and arguments.
    Entry(i64, [u64; 6]),
    /// After it was made: what it gave.
    Exit(i64),
}

/// Where in a system call a stopped thread is.
pub fn syscall_info(tid: i32) -> Result<Call, Errno> {
    // op, arch, instruction and stack pointer, then the number and six arguments, or the result.
    let mut info = [0u64; 11];
    let size = size_of_val(&info);
    call(
        PTRACE_GET_SYSCALL_INFO,
        tid,
        size,
        info.as_mut_ptr() as usize,
    )?;
    Ok(match info[0] & 0xff {
        1 => {
            let mut args = [0; 6];
            args.copy_from_slice(&info[4..10]);
            Call::Entry(info[3].cast_signed(), args)
        }
        2 => Call::Exit(info[3].cast_signed()),
        _ => Call::None,
    })
}

/// The next report of one thread (`tid`), or of any (`-1`); `None` if there is none and `block` is not set.
pub fn wait(tid: i32, block: bool) -> Result<Option<(i32, Report)>, Errno> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: `status` is valid for writing.
        let r = unsafe { libc::waitpid(tid, &raw mut status, flags) };
        match r {
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(Errno::last()),
            0 => return Ok(None),
            tid => return Ok(Some((tid, decode(status)))),
        }
    }
}

fn decode(status: i32) -> Report {
    if !libc::WIFSTOPPED(status) {
        return Report::Ended(status);
    }
    let signal = libc::WSTOPSIG(status);
    let event = status >> 16;
    match (event, signal) {
        (0, s) if s == libc::SIGTRAP | 0x80 => Report::Syscall,
        (0, s) => Report::Signal(s),
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => Report::Interrupted,
        (libc::PTRACE_EVENT_STOP, s) => Report::JobStop(s),
        (e, _) => Report::Event(e),
    }
}

/// The next report of any thread that the calling thread traces (or of its children), without waiting.
pub fn wait_own() -> Result<Option<(i32, Report)>, Errno> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
    // SAFETY: `status` is valid for writing.
    match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
        -1 if Errno::last() == Errno::EINTR => Ok(None),
        -1 => Err(Errno::last()),
        0 => Ok(None),
        tid => Ok(Some((tid, decode(status)))),
    }
}
