//! A piece of shared memory at a fixed address that a parent and its forks have in common, with a loop of code in it that
//! makes system calls from a table. `docs/snapshot.md`, section 5, says what it is for.

use nix::errno::Errno;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};

// The cursor into the table is the stack pointer. So a thread or a child that a clone3 of the table makes with a stack of
// its own starts on a table of its own. Nothing is pushed, and no signal may arrive (all are blocked).
// An entry is the number, six arguments, and room for the result. Number -1 ends the table: the thread waits there.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".globl snapshot_loop_start",
    ".hidden snapshot_loop_start",
    ".globl snapshot_loop_end",
    ".hidden snapshot_loop_end",
    "snapshot_loop_start:",
    "2: mov rax, [rsp]",
    "cmp rax, -1",
    "je 3f",
    "mov rdi, [rsp + 8]",
    "mov rsi, [rsp + 16]",
    "mov rdx, [rsp + 24]",
    "mov r10, [rsp + 32]",
    "mov r8, [rsp + 40]",
    "mov r9, [rsp + 48]",
    "syscall",
    "mov [rsp + 56], rax",
    "add rsp, 64",
    "jmp 2b",
    "3: mov eax, 34", // pause
    "syscall",
    "jmp 3b",
    "snapshot_loop_end:",
    ".popsection",
);

unsafe extern "C" {
    static snapshot_loop_start: u8;
    static snapshot_loop_end: u8;
}

/// The code of the loop; it does not depend on its address.
#[must_use]
pub fn code() -> &'static [u8] {
    // SAFETY: the two symbols enclose the bytes that are assembled above, which are never written.
    unsafe {
        let start = &raw const snapshot_loop_start;
        std::slice::from_raw_parts(
            start,
            (&raw const snapshot_loop_end).offset_from_unsigned(start),
        )
    }
}

/// Shared, executable memory at a fixed address.
#[derive(Debug)]
pub struct Scratch {
    base: u64,
    len: usize,
    fd: OwnedFd,
}

impl Scratch {
    /// Maps `len` bytes (whole pages) at `base`, where nothing may be mapped yet.
    pub fn new(base: u64, len: usize) -> Result<Scratch, Errno> {
        let fd = nix::sys::memfd::memfd_create(
            c"umlctl-scratch",
            nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
        )?;
        nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(|_| Errno::EINVAL)?)?;
        // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping of ours; the memory is only used through `self`, and by forks.
        let at = unsafe {
            libc::mmap(
                base as *mut c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Scratch { base, len, fd })
    }

    /// Its first address.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Its length, bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The memory's descriptor.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Writes bytes at an offset. Panics outside: offsets are computed by this program.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        // SAFETY: inside the mapping, as asserted; other processes that write here at the same time only write result words,
        // which this program does not write then.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                (self.base as *mut u8).add(offset),
                bytes.len(),
            );
        }
    }

    /// Reads bytes at an offset.
    #[must_use]
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: inside the mapping, as asserted; what another process writes meanwhile is plain bytes.
        (offset..offset + len)
            .map(|i| unsafe { (self.base as *const u8).add(i).read_volatile() })
            .collect()
    }

    /// The word at an offset that is a multiple of 8.
    #[must_use]
    pub fn word(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: inside the mapping and aligned, as asserted.
        unsafe { std::sync::atomic::AtomicU64::from_ptr((self.base as *mut u64).add(offset / 8)) }
            .load(std::sync::atomic::Ordering::Acquire)
    }

    /// Adds one to the word at an offset that is a multiple of 8, and wakes all who wait for it.
    pub fn increment(&self, offset: usize) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: inside the mapping and aligned, as asserted.
        unsafe { std::sync::atomic::AtomicU64::from_ptr((self.base as *mut u64).add(offset / 8)) }
            .fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        // SAFETY: the address is inside the mapping.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.base + offset as u64,
                libc::FUTEX_WAKE,
                i32::MAX,
            )
        };
    }

    /// Waits until the lower half of the word is no longer `not`, for at most `ms` milliseconds.
    pub fn wait(&self, offset: usize, not: u32, ms: i64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        let timeout = libc::timespec {
            tv_sec: ms / 1000,
            tv_nsec: ms % 1000 * 1_000_000,
        };
        // SAFETY: the address is inside the mapping, and the timeout lives through the call.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.base + offset as u64,
                libc::FUTEX_WAIT,
                not,
                &raw const timeout,
            );
        }
    }

    /// Leaves this program for good: the calling thread runs the table at an offset, by the code at the start.
    pub fn enter(&self, table: usize) -> ! {
        // SAFETY: the code is in place (written by whoever made the table), and never comes back.
        unsafe {
            std::arch::asm!(
                "mov rsp, {table}",
                "jmp {code}",
                table = in(reg) self.base + table as u64,
                code = in(reg) self.base,
                options(noreturn)
            );
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.base as *mut c_void, self.len) };
    }
}
