//! System calls that nix does not wrap.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Makes `to` share all of `from`'s blocks.
///
/// # Errors
/// The errno; EOPNOTSUPP, ENOTTY, EXDEV or EINVAL where that cannot be done.
pub(super) fn reflink(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes a descriptor as its argument and touches no memory of ours; the borrows keep both open.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
