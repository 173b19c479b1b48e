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
