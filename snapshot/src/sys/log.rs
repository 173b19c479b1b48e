//! Messages of a userfaultfd in memory that several processes share. The kernel writes each one straight into its place:
//! there is no instant at which a message has been taken from the kernel and is not in the log, so that a reader may be
//! killed at any time.

use super::fill::MESSAGE;
use nix::errno::Errno;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of an entry: the message, and whose it is.
const ENTRY: usize = 64;

/// The log. Entry 0 is for flags.
#[derive(Debug)]
pub struct Log {
    base: *mut u8,
    entries: usize,
}

impl Log {
    /// Memory for so many entries; what is not used costs nothing.
    pub fn new(entries: usize) -> Result<Log, Errno> {
        let entries = entries.saturating_add(1);
        let len = entries.checked_mul(ENTRY).ok_or(Errno::ENOMEM)?;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Log {
            base: base.cast(),
            entries,
        })
    }

    /// How many messages it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.entries - 1
    }

    fn entry(&self, n: usize) -> *mut u8 {
        assert!(n < self.entries);
        // SAFETY: inside the mapping, as asserted.
        unsafe { self.base.add(n * ENTRY) }
    }

    /// Reads one message of the descriptor `fd` into entry `n`, which is noted as being of `owner`.
    pub fn read(&self, n: usize, fd: i32, owner: u32) -> Result<[u8; MESSAGE], Errno> {
        let entry = self.entry(n + 1);
        // SAFETY: inside the entry and aligned. This also makes the page present, so that the kernel's write cannot fail.
        unsafe { AtomicU32::from_ptr(entry.add(MESSAGE).cast()) }.store(owner, Ordering::Release);
        // SAFETY: the entry has room for a message, and only this process writes entries.
        let r = unsafe { libc::read(fd, entry.cast::<c_void>(), MESSAGE) };
        if Errno::result(r)? != MESSAGE as isize {
            return Err(Errno::EIO);
        }
        Ok(self.get(n).1)
    }

    /// Entry `n`: whose it is, and the message (zeroes if there is none).
    #[must_use]
    pub fn get(&self, n: usize) -> (u32, [u8; MESSAGE]) {
        let entry = self.entry(n + 1);
        // SAFETY: inside the entry and aligned.
        let owner =
            unsafe { AtomicU32::from_ptr(entry.add(MESSAGE).cast()) }.load(Ordering::Acquire);
        // SAFETY: inside the entry; the only writer is the process that reads messages, which is this one or dead.
        (owner, unsafe {
            entry.cast::<[u8; MESSAGE]>().read_volatile()
        })
    }

    /// The flag: set when there is nothing left to do.
    pub fn set_done(&self) {
        // SAFETY: entry 0 is aligned and only used as this word.
        unsafe { AtomicU32::from_ptr(self.entry(0).cast()) }.store(1, Ordering::Release);
    }

    /// Whether it is set.
    #[must_use]
    pub fn done(&self) -> bool {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.entry(0).cast()) }.load(Ordering::Acquire) == 1
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.entries * ENTRY) };
    }
}
