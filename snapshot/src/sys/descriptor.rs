//! Descriptors by number: fetched from other processes, placed at a number, closed in ranges.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor of a process.
pub fn pidfd_open(pid: i32, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })
}

/// dup3(2) to a number; what was there is closed. Only for a process that gives its numbers away on purpose: no
/// `OwnedFd` may stand for `to`.
pub fn place(from: BorrowedFd, to: RawFd, cloexec: bool) -> io::Result<()> {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: numbers only.
    check(libc::c_long::from(unsafe {
        libc::dup3(from.as_raw_fd(), to, flags)
    }))
    .map(drop)
}

/// A duplicate with the lowest free number that is at least `least`; close-on-exec.
pub fn duplicate_above(from: BorrowedFd, least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(libc::c_long::from(unsafe {
        libc::fcntl(from.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least)
    }))
}

/// Whether a number is in use in this process.
pub fn in_use(fd: RawFd) -> bool {
    // SAFETY: numbers only.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// A duplicate of a number of this process, which need not be owned by anything (like 0).
pub fn duplicate_number(fd: RawFd, least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(libc::c_long::from(unsafe {
        libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, least)
    }))
}

/// Closes one number, if it is open.
pub fn close_number(fd: RawFd) {
    // SAFETY: numbers only; callers give away the number (see `place`).
    unsafe { libc::close(fd) };
}

/// Closes all numbers from `first` to `last`.
pub fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: numbers only; callers give away the numbers (see `place`).
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Takes over a number that the caller says is open and nobody else's.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if !in_use(fd) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open; the caller says that no other value owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// eventfd2(2).
pub fn eventfd(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(libc::c_long::from(unsafe { libc::eventfd(0, flags) }))
}

/// signalfd4(2) with a mask in the kernel's form.
pub fn signalfd(mask: u64, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: the mask lives through the call and its size is given.
    owned(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags) })
}

/// memfd_create(2).
pub fn memfd(name: &std::ffi::CStr, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string that lives through the call.
    owned(libc::c_long::from(unsafe {
        libc::memfd_create(name.as_ptr(), flags)
    }))
}

/// tee(2), without waiting: how many bytes are now in both pipes.
pub fn tee(from: BorrowedFd, to: BorrowedFd, len: usize) -> io::Result<usize> {
    // SAFETY: numbers only.
    let n = unsafe {
        libc::tee(
            from.as_raw_fd(),
            to.as_raw_fd(),
            len,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// fcntl(2) with a number as argument.
pub fn fcntl(fd: BorrowedFd, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: only used with commands that take a number (F_GETFL, F_SETFL, F_SETPIPE_SZ, F_SETSIG, ...).
    let n = unsafe { libc::fcntl(fd.as_raw_fd(), command, libc::c_long::from(argument)) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n)
    }
}

/// F_GETOWN_EX: (type, number).
pub fn owner(fd: BorrowedFd) -> io::Result<(i32, i32)> {
    let mut owner = [0i32; 2];
    // SAFETY: F_GETOWN_EX writes a struct f_owner_ex, two ints, which is what it is given.
    let n = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok((owner[0], owner[1]))
    }
}

/// F_SETOWN_EX.
pub fn set_owner(fd: BorrowedFd, kind: i32, pid: i32) -> io::Result<()> {
    let owner = [kind, pid];
    // SAFETY: F_SETOWN_EX reads a struct f_owner_ex, two ints.
    let n = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// Sets a record lock without waiting: `ofd` for one of the description, else one of this process. `kind` is F_RDLCK
/// or F_WRLCK; a length of 0 reaches to the end.
pub fn record_lock(fd: BorrowedFd, ofd: bool, kind: i32, start: i64, len: i64) -> io::Result<()> {
    let kind = libc::c_short::try_from(kind).map_err(io::Error::other)?;
    let lock = libc::flock {
        l_type: kind,
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    let command = if ofd {
        libc::F_OFD_SETLK
    } else {
        libc::F_SETLK
    };
    // SAFETY: both commands read a struct flock that lives through the call.
    let n = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw const lock) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// flock(2) without waiting.
pub fn flock(fd: BorrowedFd, operation: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    let n = unsafe { libc::flock(fd.as_raw_fd(), operation | libc::LOCK_NB) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// setns(2) for the calling thread: its network.
pub fn enter_network(ns: BorrowedFd) -> io::Result<()> {
    // SAFETY: numbers only.
    let n = unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// epoll_create1(2).
pub fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(libc::c_long::from(unsafe {
        libc::epoll_create1(libc::EPOLL_CLOEXEC)
    }))
}

/// EPOLL_CTL_ADD of a number.
pub fn epoll_add(epoll: BorrowedFd, number: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event lives through the call.
    let n = unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            number,
            &raw mut event,
        )
    };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// inotify_init1(2).
pub fn inotify(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(libc::c_long::from(unsafe { libc::inotify_init1(flags) }))
}

/// inotify_add_watch(2): the watch's number.
pub fn inotify_watch(fd: BorrowedFd, path: &std::ffi::CStr, mask: u32) -> io::Result<i32> {
    // SAFETY: the path is a C string that lives through the call.
    let n = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n)
    }
}

/// A number of this process that is open and stays so: one that [`place`] has filled in a process that becomes the
/// target.
pub fn borrow(fd: RawFd) -> io::Result<BorrowedFd<'static>> {
    if fd < 0 || !in_use(fd) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and the process that is being rebuilt does not close its target's descriptors.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
