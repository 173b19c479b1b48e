//! ioctl(2) on the descriptors that `files` captures.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn get_int(fd: BorrowedFd, request: libc::Ioctl) -> io::Result<i32> {
    let mut value: i32 = 0;
    // SAFETY: only used with requests that write one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// FIONREAD: bytes that can be read.
pub fn readable(fd: BorrowedFd) -> io::Result<usize> {
    Ok(usize::try_from(get_int(fd, libc::FIONREAD)?).unwrap_or(0))
}

/// TIOCOUTQ (SIOCOUTQ): bytes written that the other side has not taken.
pub fn unsent(fd: BorrowedFd) -> io::Result<usize> {
    Ok(usize::try_from(get_int(fd, libc::TIOCOUTQ)?).unwrap_or(0))
}

/// SIOCOUTQNSD: bytes in a TCP send queue that were never sent.
pub fn never_sent(fd: BorrowedFd) -> io::Result<usize> {
    Ok(usize::try_from(get_int(fd, 0x894b_u32 as _)?).unwrap_or(0))
}

/// TFD_IOC_SET_TICKS: expirations that were not read yet.
pub fn set_ticks(fd: BorrowedFd, ticks: u64) -> io::Result<()> {
    // SAFETY: _IOW('T', 0, u64) reads 8 bytes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), 0x4008_5400_u32 as _, &raw const ticks) }).map(drop)
}

/// INOTIFY_IOC_SETNEXTWD: the number that the next watch gets.
pub fn set_next_watch(fd: BorrowedFd, wd: i32) -> io::Result<()> {
    // SAFETY: _IOW('I', 0, s32) takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), 0x4004_4900_u32 as _, libc::c_long::from(wd)) })
        .map(drop)
}

/// TIOCGWINSZ: rows, columns, x and y pixels.
pub fn window_size(fd: BorrowedFd) -> io::Result<[u16; 4]> {
    let mut size = [0u16; 4];
    // SAFETY: TIOCGWINSZ writes a struct winsize, four shorts.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) })?;
    Ok(size)
}

/// TIOCSWINSZ.
pub fn set_window_size(fd: BorrowedFd, size: [u16; 4]) -> io::Result<()> {
    // SAFETY: TIOCSWINSZ reads a struct winsize, four shorts.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, size.as_ptr()) }).map(drop)
}

/// Size of the kernel's struct termios2.
pub const TERMIOS: usize = 44;

/// TCGETS2: struct termios2 as it is.
pub fn termios(fd: BorrowedFd) -> io::Result<[u8; TERMIOS]> {
    let mut bytes = [0u32; TERMIOS / 4];
    // SAFETY: TCGETS2 writes a struct termios2, 44 bytes, aligned to 4.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), 0x802c_542a_u32 as _, bytes.as_mut_ptr()) })?;
    let mut out = [0; TERMIOS];
    for (to, from) in out.chunks_exact_mut(4).zip(bytes) {
        to.copy_from_slice(&from.to_ne_bytes());
    }
    Ok(out)
}

/// TCSETS2.
pub fn set_termios(fd: BorrowedFd, termios: &[u8; TERMIOS]) -> io::Result<()> {
    // SAFETY: TCSETS2 reads 44 bytes; the kernel copies them, alignment does not matter.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), 0x402c_542b_u32 as _, termios.as_ptr()) }).map(drop)
}

/// TIOCGPTPEER: opens the slave of a pty master.
pub fn open_slave(master: BorrowedFd, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes flags by value and gives a new descriptor.
    let fd = check(unsafe {
        libc::ioctl(
            master.as_raw_fd(),
            0x5441_u32 as _,
            libc::c_long::from(flags),
        )
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// TIOCSPTLCK: locks or unlocks a pty.
pub fn lock_pty(master: BorrowedFd, lock: bool) -> io::Result<()> {
    let value = i32::from(lock);
    // SAFETY: reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const value) }).map(drop)
}

/// TIOCGPTLCK and TIOCGPKT: locked, packet mode.
pub fn pty_state(master: BorrowedFd) -> io::Result<(bool, bool)> {
    Ok((
        get_int(master, 0x8004_5439_u32 as _)? != 0,
        get_int(master, 0x8004_5438_u32 as _)? != 0,
    ))
}

/// TIOCPKT: packet mode.
pub fn set_packet_mode(master: BorrowedFd, on: bool) -> io::Result<()> {
    let value = i32::from(on);
    // SAFETY: reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCPKT, &raw const value) }).map(drop)
}

/// TIOCGPTN: number of a pty.
pub fn pty_number(master: BorrowedFd) -> io::Result<u32> {
    Ok(u32::try_from(get_int(master, 0x8004_5430_u32 as _)?).unwrap_or(0))
}

/// TIOCGSID and TIOCGPGRP: the session and foreground group of a terminal, asked through its master; 0 is none.
pub fn session(master: BorrowedFd) -> (i32, i32) {
    (
        get_int(master, libc::TIOCGSID).unwrap_or(0),
        get_int(master, libc::TIOCGPGRP).unwrap_or(0),
    )
}

/// TIOCSCTTY: the terminal becomes the one of our session.
pub fn take_terminal(slave: BorrowedFd) -> io::Result<()> {
    // SAFETY: takes a number.
    check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// TIOCSPGRP: the foreground group.
pub fn set_foreground(slave: BorrowedFd, group: i32) -> io::Result<()> {
    // SAFETY: reads one int.
    check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSPGRP, &raw const group) }).map(drop)
}

/// timerfd_gettime(2), for what it does besides: an interval timer that has expired and was not read is started
/// again, with its expirations counted as if it had run on.
pub fn restart_timer(fd: BorrowedFd) -> io::Result<()> {
    let mut spec = [0u64; 4];
    // SAFETY: the kernel writes a struct itimerspec, four words.
    check(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), spec.as_mut_ptr().cast()) }).map(drop)
}
