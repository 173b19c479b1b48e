//! System calls. The C library is declared here by hand, as the agent has no dependencies; for x86-64 only, as is the guest.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn umount2(target: *const c_char, flags: c_int) -> c_int;
    fn fork() -> c_int;
    fn setsid() -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn reboot(how: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int;
    fn dup2(from: c_int, to: c_int) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn signal(which: c_int, handler: usize) -> usize;
    fn sigprocmask(how: c_int, set: *const [u64; 16], old: *mut [u64; 16]) -> c_int;
    fn signalfd(fd: c_int, set: *const [u64; 16], flags: c_int) -> c_int;
    fn clock_settime(clock: c_int, time: *const [i64; 2]) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn sync();
    fn _exit(code: c_int) -> !;
}

/// Of mount(2).
pub const MS_RDONLY: c_ulong = 1;
/// Of mount(2).
pub const MS_REMOUNT: c_ulong = 32;
/// Of mount(2).
pub const MS_MOVE: c_ulong = 8192;
/// Of umount2(2).
pub const MNT_DETACH: c_int = 2;

/// Numbers of signals.
pub mod signals {
    /// Hang-up.
    pub const HUP: i32 = 1;
    /// At once.
    pub const KILL: i32 = 9;
    /// User-defined: for many inits, power off.
    pub const USR2: i32 = 12;
    /// Nobody reads.
    pub const PIPE: i32 = 13;
    /// Please end.
    pub const TERM: i32 = 15;
    /// A child has ended.
    pub const CHLD: i32 = 17;
}

const O_NONBLOCK: c_int = 0o4000;
const O_CLOEXEC: c_int = 0o2_000_000;
const CLONE_NONE: usize = 0;
const IGNORE: usize = 1;

fn text(s: &str) -> io::Result<CString> {
    CString::new(s).map_err(io::Error::other)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// mount(2)
pub fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: c_ulong,
    data: &str,
) -> io::Result<()> {
    let (source, target, kind, data) = (text(source)?, text(target)?, text(kind)?, text(data)?);
    // SAFETY: all pointers are to texts that end in a zero and live through the call.
    check(unsafe {
        mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })
    .map(drop)
}

/// umount2(2), detached.
pub fn unmount(target: &str) -> io::Result<()> {
    let target = text(target)?;
    // SAFETY: as for mount.
    check(unsafe { umount2(target.as_ptr(), MNT_DETACH) }).map(drop)
}

/// fork(2): 0 in the child. The agent has one thread, so that everything may be done in the child.
pub fn fork_process() -> io::Result<i32> {
    // SAFETY: one thread; nothing is locked.
    check(unsafe { fork() })
}

/// setsid(2)
pub fn new_session() {
    // SAFETY: no pointers.
    unsafe { setsid() };
}

/// kill(2)
pub fn send_signal(pid: i32, signal: i32) {
    // SAFETY: no pointers.
    unsafe { kill(pid, signal) };
}

/// A child that has ended: its number, whether by a signal, and the code or signal.
pub fn reap() -> Option<(i32, bool, i32)> {
    let mut status = 0;
    // SAFETY: the pointer is to a number that lives through the call. 1 is WNOHANG.
    let pid = unsafe { waitpid(-1, &raw mut status, 1) };
    let signal = status & 0x7f;
    (pid > 0).then_some(if signal == 0 {
        (pid, false, status >> 8 & 0xff)
    } else {
        (pid, true, signal)
    })
}

/// Off, without further ado.
pub fn power_off() {
    // SAFETY: no pointers.
    unsafe {
        sync();
        reboot(0x4321_fedc);
    }
}

/// sync(2)
pub fn sync_all() {
    // SAFETY: no pointers.
    unsafe { sync() };
}

/// Ends this process at once.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { _exit(code) }
}

/// A pipe: where is read, where is written. Closed at exec.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two numbers.
    check(unsafe { pipe2(fds.as_mut_ptr(), O_CLOEXEC) })?;
    // SAFETY: both were just made and belong to nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Whether reading and writing wait.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointers. 3 and 4 are F_GETFL and F_SETFL.
    let flags = check(unsafe { fcntl(fd.as_raw_fd(), 3) })?;
    // SAFETY: as above.
    check(unsafe { fcntl(fd.as_raw_fd(), 4, flags | O_NONBLOCK) }).map(drop)
}

/// Makes three descriptors 0, 1 and 2 and closes all others, in a child that is not going to use what else it has.
pub fn become_stdio(fds: [RawFd; 3]) {
    // SAFETY: numbers only; the child owns copies of its parent's descriptors, of which no object will be dropped, as it ends by
    // _exit.
    unsafe {
        // Out of each other's way first (1030 is F_DUPFD_CLOEXEC).
        let away = fds.map(|fd| fcntl(fd, 1030, 10));
        for (to, from) in (0..).zip(away) {
            dup2(from, to);
        }
        syscall(436, 3usize, usize::MAX >> 32, CLONE_NONE);
    }
}

/// Makes 0, 1 and 2 of this descriptor.
pub fn stdio(fd: RawFd) {
    for to in 0..3 {
        // SAFETY: numbers only; the three belong to the standard library's handles, which hold nothing of what they were.
        unsafe { dup2(fd, to) };
    }
}

/// Ignores a signal, or lets it do what it does.
pub fn ignore(which: i32, ignored: bool) {
    // SAFETY: no code is installed that would run in a signal's context.
    unsafe { signal(which, if ignored { IGNORE } else { 0 }) };
}

fn child_set() -> [u64; 16] {
    let mut set = [0; 16];
    set[0] = 1 << (signals::CHLD - 1);
    set
}

/// A descriptor that can be read when a child has ended.
pub fn children() -> io::Result<OwnedFd> {
    let set = child_set();
    // SAFETY: the set has the C library's size (128 bytes) and lives through both calls.
    unsafe {
        check(sigprocmask(0, &raw const set, std::ptr::null_mut()))?;
        let fd = check(signalfd(-1, &raw const set, O_NONBLOCK | O_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// A child is not to ignore what the agent does.
pub fn own_signals() {
    for which in [signals::HUP, signals::TERM, signals::PIPE] {
        ignore(which, false);
    }
}

/// Unblocks all signals.
pub fn unblock() {
    let set = [0u64; 16];
    // SAFETY: as above; 2 is SIG_SETMASK.
    unsafe { sigprocmask(2, &raw const set, std::ptr::null_mut()) };
}

/// `struct pollfd`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct PollFd {
    /// Which.
    pub fd: RawFd,
    /// What is waited for.
    pub events: i16,
    /// What is so.
    pub revents: i16,
}

/// There is something to read.
pub const POLLIN: i16 = 1;
/// Something can be written.
pub const POLLOUT: i16 = 4;

/// Waits until something is so.
pub fn wait(fds: &mut [PollFd]) {
    // SAFETY: pointer and length are of a slice that lives through the call. If it is interrupted nothing is so, and the caller
    // goes round again.
    if unsafe { poll(fds.as_mut_ptr(), fds.len() as c_ulong, -1) } < 0 {
        fds.iter_mut().for_each(|f| f.revents = 0);
    }
}

/// Sets the clock: seconds since 1970, and nanoseconds.
pub fn set_clock(seconds: i64, nanoseconds: u32) -> io::Result<()> {
    let time = [seconds, i64::from(nanoseconds)];
    // SAFETY: a timespec is two of these; 0 is CLOCK_REALTIME.
    check(unsafe { clock_settime(0, &raw const time) }).map(drop)
}

/// Mixes bytes into the random-number generator of the kernel, counts them in full, and seeds the generator anew.
pub fn reseed(device: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let bytes = &bytes[..bytes.len().min(4096)];
    let length = i32::try_from(bytes.len()).unwrap_or_default();
    let mut info = Vec::with_capacity(8 + bytes.len());
    info.extend((length * 8).to_ne_bytes());
    info.extend(length.to_ne_bytes());
    info.extend(bytes);
    // SAFETY: RNDADDENTROPY reads two numbers and as many bytes as the second says, which `info` has; RNDRESEEDCRNG takes nothing.
    unsafe {
        check(ioctl(device.as_raw_fd(), 0x4008_5203, info.as_ptr()))?;
        check(ioctl(device.as_raw_fd(), 0x5207)).map(drop)
    }
}

/// `struct termios` of the kernel.
#[repr(C)]
#[derive(Debug, Default)]
struct Termios {
    modes: [u32; 4],
    line: u8,
    characters: [u8; 19],
}

/// Makes a terminal pass all bytes as they are.
pub fn make_raw(terminal: &OwnedFd) -> io::Result<()> {
    let mut t = Termios::default();
    // SAFETY: TCGETS fills and TCSETS reads a structure of this size.
    unsafe {
        check(ioctl(terminal.as_raw_fd(), 0x5401, &raw mut t))?;
        // No input, output or local modes; 8 bits, reading on.
        t.modes[0] = 0;
        t.modes[1] = 0;
        t.modes[2] = (t.modes[2] & !0o460) | 0o260;
        t.modes[3] = 0;
        // A read returns what there is (VTIME, VMIN).
        t.characters[5] = 0;
        t.characters[6] = 1;
        check(ioctl(terminal.as_raw_fd(), 0x5402, &raw const t)).map(drop)
    }
}

/// The number of the terminal behind a master, which is unlocked.
pub fn unlock_terminal(master: &OwnedFd) -> io::Result<u32> {
    let (mut number, zero) = (0u32, 0i32);
    // SAFETY: TIOCSPTLCK reads and TIOCGPTN writes one number.
    unsafe {
        check(ioctl(master.as_raw_fd(), 0x4004_5431, &raw const zero))?;
        check(ioctl(master.as_raw_fd(), 0x8004_5430, &raw mut number))?;
    }
    Ok(number)
}

/// The size of a terminal: rows and columns.
pub fn set_size(master: &OwnedFd, rows: u16, columns: u16) {
    let size = [rows, columns, 0, 0];
    // SAFETY: TIOCSWINSZ reads four of these.
    unsafe { ioctl(master.as_raw_fd(), 0x5414, &raw const size) };
}

/// Makes a terminal, which is descriptor 0, that of a new session.
pub fn take_terminal() {
    // SAFETY: no pointers (TIOCSCTTY).
    unsafe { ioctl(0, 0x540e, 0) };
}

/// Runs something in a child between fork and exec: a new session, and its terminal.
pub fn before_exec(command: &mut std::process::Command, terminal: bool) {
    use std::os::unix::process::CommandExt;
    let act = move || {
        own_signals();
        new_session();
        if terminal {
            take_terminal();
        }
        Ok(())
    };
    // SAFETY: system calls; nothing is allocated or locked.
    unsafe { command.pre_exec(act) };
}

/// A socket to configure interfaces with.
pub fn inet_socket() -> io::Result<OwnedFd> {
    // SAFETY: numbers only: AF_INET, SOCK_DGRAM.
    let fd = check(unsafe { socket(2, 2 | O_CLOEXEC, 0) })?;
    // SAFETY: just made.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An ioctl that takes or fills a structure of at least its size.
pub fn configure<const N: usize>(
    socket: &OwnedFd,
    request: c_ulong,
    data: &mut [u8; N],
) -> io::Result<()> {
    assert!(N >= 40, "an ifreq has 40 bytes, an rtentry 120");
    // SAFETY: the two structures the callers use are no longer than what they give; see the assertion and `net`.
    check(unsafe { ioctl(socket.as_raw_fd(), request, data.as_mut_ptr()) }).map(drop)
}
