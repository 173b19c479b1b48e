//! Memory and descriptors of another process.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Reads from another process's memory into `buf`; all of it, or an error.
pub fn read(pid: i32, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
    let local = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let remote = libc::iovec {
        iov_base: addr as *mut _,
        iov_len: buf.len(),
    };
    // SAFETY: the local vector is `buf`, valid for writing; the remote one is checked by the kernel.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    finish(n, buf.len())
}

/// Writes to another process's writable memory; all of it, or an error.
pub fn write(pid: i32, addr: u64, buf: &[u8]) -> Result<(), Errno> {
    let local = libc::iovec {
        iov_base: buf.as_ptr().cast_mut().cast(),
        iov_len: buf.len(),
    };
    let remote = libc::iovec {
        iov_base: addr as *mut _,
        iov_len: buf.len(),
    };
    // SAFETY: the local vector is `buf` and only read from; the remote one is checked by the kernel.
    let n = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    finish(n, buf.len())
}

fn finish(n: isize, want: usize) -> Result<(), Errno> {
    match usize::try_from(n) {
        Err(_) => Err(Errno::last()),
        Ok(n) if n == want => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
    }
}

/// A descriptor of a process, which can be polled for its end.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A copy of another process's descriptor `fd`; it shares the open file description.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(fd)
}

fn owned(fd: i64) -> Result<OwnedFd, Errno> {
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another thread's robust futex list: head, length.
pub fn robust_list(tid: i32) -> Result<(u64, u64), Errno> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both are valid for writing a word.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    if r == 0 {
        Ok((head, len))
    } else {
        Err(Errno::last())
    }
}

/// Whether two processes share one address space (KCMP_VM).
#[must_use]
pub fn same_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: takes numbers only.
    a != b && unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) } == 0
}
