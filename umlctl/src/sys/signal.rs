//! Dispositions of signals, without handlers.

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};

/// Sets a signal to be ignored, or to do what it does by itself.
///
/// # Errors
/// EINVAL for a handler, which is not for here.
pub fn set(which: Signal, to: SigHandler) -> Result<(), Errno> {
    if !matches!(to, SigHandler::SigDfl | SigHandler::SigIgn) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: no code is installed that would run in a signal's context.
    unsafe { signal(which, to) }.map(drop)
}
