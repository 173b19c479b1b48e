//! The few calls that need `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

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
