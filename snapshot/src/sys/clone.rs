//! clone3(2), and what a new process must know of the thread it was made by.

use nix::errno::Errno;

/// `struct clone_args`, as far as `set_tid_size`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct CloneArgs {
    /// CLONE_ flags.
    pub flags: u64,
    /// Where a pidfd is stored.
    pub pidfd: u64,
    /// Where the child's number is stored in the child.
    pub child_tid: u64,
    /// Where it is stored in the parent.
    pub parent_tid: u64,
    /// The signal at its end.
    pub exit_signal: u64,
    /// Lowest address of the stack.
    pub stack: u64,
    /// The stack's size.
    pub stack_size: u64,
    /// Thread-local storage.
    pub tls: u64,
    /// Where the wanted numbers are, innermost namespace first (32 bits each).
    pub set_tid: u64,
    /// How many.
    pub set_tid_size: u64,
}

impl CloneArgs {
    /// As bytes, for a table of calls.
    #[must_use]
    pub fn words(&self) -> [u64; 10] {
        [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
        ]
    }
}

/// CLONE_CLEAR_SIGHAND: handlers become the default.
pub const CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Which process one is after [`fork`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The new one.
    Child,
    /// The old one; the number of the new one.
    Parent(i32),
}

/// A fork with flags (none that share memory), a signal at its end, and the wanted number in the innermost namespace.
/// The process must have a single thread: locks of others would stay locked in the child.
pub fn fork(flags: u64, exit_signal: i32, pid: Option<i32>) -> Result<Fork, Errno> {
    let shares =
        (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_THREAD | libc::CLONE_SETTLS) as u64;
    if flags & shares != 0 {
        return Err(Errno::EINVAL);
    }
    let set_tid = pid.unwrap_or(0);
    let args = CloneArgs {
        flags,
        exit_signal: u64::try_from(exit_signal).map_err(|_| Errno::EINVAL)?,
        set_tid: if pid.is_some() {
            &raw const set_tid as u64
        } else {
            0
        },
        set_tid_size: u64::from(pid.is_some()),
        ..CloneArgs::default()
    };
    // SAFETY: the structure lives through the call; no memory is shared with the child, so that it is a plain fork.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match r {
        -1 => Err(Errno::last()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid as i32)),
    }
}

/// The rseq(2) area that the C library has registered for the calling thread: address and size.
#[must_use]
pub fn own_rseq() -> Option<(u64, u32)> {
    // SAFETY: both names are looked up, not assumed; the C library says that they are a ptrdiff_t and an unsigned int. The
    // first word of the thread's block is its own address in this ABI.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        if offset.is_null() || size.is_null() || size.read() == 0 {
            return None;
        }
        let tp: u64;
        std::arch::asm!("mov {}, fs:0", out(reg) tp);
        Some((tp.wrapping_add_signed(offset.read() as i64), size.read()))
    }
}

/// The address of our vdso.
#[must_use]
pub fn own_vdso() -> u64 {
    // SAFETY: a plain look-up.
    unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) }
}

/// The bytes of our vdso.
#[must_use]
pub fn own_vdso_bytes(start: u64, end: u64) -> Vec<u8> {
    if start == 0 || start != own_vdso() || end < start || end - start > 1 << 20 {
        return Vec::new();
    }
    // SAFETY: the kernel mapped the vdso readable at this address, and the caller has its end from our own maps.
    unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) }.to_vec()
}

/// Ends the process at once, without running anything of it.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Closes descriptors `from` to one before `to`.
pub fn close_range(from: i32, to: i32) -> Result<(), Errno> {
    if from >= to {
        return Ok(());
    }
    // SAFETY: for a process that is about to become another one: no object of ours will use the descriptors again.
    let r = unsafe { libc::syscall(libc::SYS_close_range, from, to - 1, 0) };
    Errno::result(r).map(drop)
}

/// Gives a descriptor another number (closed at exec); what was open there is closed.
pub fn move_to(fd: std::os::fd::OwnedFd, to: i32) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    // SAFETY: no pointers; the number belongs to the caller.
    Errno::result(unsafe { libc::dup3(fd.as_raw_fd(), to, libc::O_CLOEXEC) }).map(drop)
}

/// Takes a descriptor that a system call gave as a number.
#[must_use]
pub fn own(fd: i32) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the caller has it from a call that made it, and gives it to nobody else.
    unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) }
}

/// A descriptor that stays open as long as this process lives.
#[must_use]
pub fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: the caller never closes it; used for descriptors that a table shared with another process holds.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}
