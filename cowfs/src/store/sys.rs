//! System calls that nix does not wrap.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Starts writing a range of a file to its disk, without waiting: sync_file_range(2) with SYNC_FILE_RANGE_WRITE.
///
/// # Errors
/// Its errno.
pub fn start_writeback(file: &File, off: i64, len: i64) -> io::Result<()> {
    // SAFETY: takes a descriptor, which the borrow keeps open, and numbers.
    let r =
        unsafe { libc::sync_file_range(file.as_raw_fd(), off, len, libc::SYNC_FILE_RANGE_WRITE) };
    nix::errno::Errno::result(r).map(drop).map_err(Into::into)
}

/// Gives the calling thread a low priority, for good: setpriority(2), which on Linux is about one thread. Others hardly
/// notice it then. A failure only leaves it as fast as they are.
pub fn lower_priority() {
    // SAFETY: takes numbers only.
    let r = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 15) };
    if r != 0 {
        tracing::debug!("the priority of a background thread was not lowered");
    }
}
