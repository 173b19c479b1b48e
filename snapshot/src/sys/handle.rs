//! File handles: files named by their number in a filesystem.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAX_HANDLE: usize = 128;

#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

/// open_by_handle_at(2) with O_PATH, on the filesystem of `mount`.
pub fn open(mount: BorrowedFd, kind: i32, handle: &[u8]) -> io::Result<OwnedFd> {
    let mut raw = FileHandle {
        bytes: 0,
        kind,
        handle: [0; MAX_HANDLE],
    };
    let space = raw
        .handle
        .get_mut(..handle.len())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    space.copy_from_slice(handle);
    raw.bytes = u32::try_from(handle.len()).map_err(io::Error::other)?;
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle lives through the call and says how long it is.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw const raw,
            flags,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}
