//! The size of a terminal.

use std::os::fd::{AsFd, AsRawFd};

mod raw {
    #![allow(missing_docs, reason = "made by a macro that takes none")]
    nix::ioctl_read_bad!(tiocgwinsz, libc::TIOCGWINSZ, libc::winsize);
}

/// Rows and columns.
#[must_use]
pub fn size(fd: impl AsFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel fills one `winsize`, which lives through the call.
    unsafe { raw::tiocgwinsz(fd.as_fd().as_raw_fd(), &raw mut size) }.ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
