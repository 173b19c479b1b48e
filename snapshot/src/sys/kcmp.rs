//! kcmp(2): whether two processes share a kernel object.

use std::cmp::Ordering;
use std::io;

const KCMP_FILE: libc::c_long = 0;
const KCMP_FILES: libc::c_long = 2;
const KCMP_EPOLL_TFD: libc::c_long = 7;

fn order(result: libc::c_long) -> io::Result<Ordering> {
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        -1 => Err(io::Error::last_os_error()),
        other => Err(io::Error::other(format!("kcmp(2) gave {other}"))),
    }
}

/// How the open file descriptions of two descriptors are ordered; equal if they are the same.
pub fn files(a: (i32, i32), b: (i32, i32)) -> io::Result<Ordering> {
    let (fd_a, fd_b) = (libc::c_long::from(a.1), libc::c_long::from(b.1));
    // SAFETY: kcmp with KCMP_FILE takes numbers only.
    order(unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, fd_a, fd_b) })
}

/// Whether two tasks share their table of descriptors (CLONE_FILES).
pub fn same_table(a: i32, b: i32) -> io::Result<bool> {
    // SAFETY: kcmp with KCMP_FILES takes numbers only; the last two are not used.
    Ok(order(unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_FILES, 0, 0) })? == Ordering::Equal)
}

/// How the description of `a` (pid, descriptor) is ordered against the one that an epoll set watches under a number.
/// `epoll` is (pid, descriptor of the epoll set); `nth` counts watches of that number.
pub fn epoll_target(
    a: (i32, i32),
    epoll: (i32, i32),
    watched: u32,
    nth: u32,
) -> io::Result<Ordering> {
    let efd = u32::try_from(epoll.1).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // struct kcmp_epoll_slot
    let slot: [u32; 3] = [efd, watched, nth];
    // SAFETY: the last argument points to a kcmp_epoll_slot that lives through the call.
    order(unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            a.0,
            epoll.0,
            KCMP_EPOLL_TFD,
            libc::c_long::from(a.1),
            slot.as_ptr(),
        )
    })
}
