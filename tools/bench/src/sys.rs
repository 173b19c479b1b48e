//! The few calls that need `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static USR1: AtomicU32 = AtomicU32::new(0);
static USR2: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Makes SIGINT, SIGTERM and SIGHUP only set a flag, so that what was mounted is unmounted on the way out.
pub fn catch_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("handler of {signal}"))?;
    }
    Ok(())
}

/// Has one of them come?
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

extern "C" fn count(signal: libc::c_int) {
    let counter = if signal == libc::SIGUSR1 {
        &USR1
    } else {
        &USR2
    };
    counter.fetch_add(1, Ordering::SeqCst);
}

/// Makes SIGUSR1 and SIGUSR2 be counted, for `usr1` and `usr2`.
pub fn count_signals() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(count),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2] {
        // SAFETY: the handler only adds to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("handler of {signal}"))?;
    }
    Ok(())
}

/// How often SIGUSR1 has come.
pub fn usr1() -> u32 {
    USR1.load(Ordering::Relaxed)
}

/// How often SIGUSR2 has come.
pub fn usr2() -> u32 {
    USR2.load(Ordering::Relaxed)
}

/// Anonymous memory in pages of 4 KiB, never huge ones. It stays until the process ends.
pub fn small_pages(bytes: usize) -> Result<&'static [AtomicU64]> {
    let size = NonZeroUsize::new(bytes).context("no memory is asked for")?;
    // SAFETY: a new private mapping at an address of the kernel's choice.
    let at = unsafe {
        mmap_anonymous(
            None,
            size,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
        )
    }
    .context("mmap")?;
    // SAFETY: the advice is about the mapping made above and does not change what is in it.
    unsafe { madvise(at, bytes, MmapAdvise::MADV_NOHUGEPAGE) }.context("madvise")?;
    // SAFETY: `at` is page-aligned, `bytes` long, zeroed, never unmapped, and only used through this slice of atomics.
    Ok(unsafe { std::slice::from_raw_parts(at.as_ptr().cast::<AtomicU64>(), bytes / 8) })
}

/// Keeps all descriptors but 0, 1 and 2 from programs that are started: the shell may have left some open.
pub fn keep_descriptors() -> Result<()> {
    // SAFETY: only flags of descriptors are changed.
    let r = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    nix::errno::Errno::result(r)
        .map(drop)
        .context("close_range")
}

/// A descriptor that is readable when a process has ended.
pub fn pidfd(pid: i32) -> Result<OwnedFd> {
    // SAFETY: takes a number and flags; touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = nix::errno::Errno::result(fd).context("pidfd_open")?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).context("pidfd_open")?) })
}

/// Maps `len` bytes of a file shared and reads all of them, front to back; returns the sum of the words.
pub fn mmap_sum(file: &File, len: usize) -> Result<u64> {
    let size = NonZeroUsize::new(len).context("the file is empty")?;
    // SAFETY: a new read-only mapping at an address of the kernel's choice, removed below.
    let at = unsafe {
        mmap(
            None,
            size,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            file,
            0,
        )
    }
    .context("mmap")?;
    // SAFETY: `at` is page-aligned and `len` bytes long; the file is not shortened while the bench reads it.
    let words = unsafe { std::slice::from_raw_parts(at.as_ptr().cast::<u64>(), len / 8) };
    let sum = words.iter().fold(0_u64, |a, w| a.wrapping_add(*w));
    // SAFETY: `at` is the mapping made above and `words` is not used any more.
    unsafe { munmap(at, len) }.context("munmap")?;
    Ok(sum)
}
