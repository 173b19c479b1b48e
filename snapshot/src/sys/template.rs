//! Anonymous memory at chosen addresses, for forks to take over.

use nix::errno::Errno;
use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Private anonymous memory that is mapped, readable and writable.
#[derive(Debug)]
pub struct Mapped {
    at: u64,
    len: usize,
}

impl Mapped {
    /// Maps `len` bytes at `at`, where nothing may be mapped yet; with MAP_GROWSDOWN or MAP_NORESERVE if `flags` say so.
    pub fn new(at: u64, len: u64, flags: i32) -> Result<Mapped, Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        let flags = flags & (libc::MAP_GROWSDOWN | libc::MAP_NORESERVE);
        // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping of ours; the memory is only used through `self`, and by forks.
        let r = unsafe {
            libc::mmap(
                at as *mut c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | flags,
                -1,
                0,
            )
        };
        if r == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Mapped { at, len })
    }

    /// Reads bytes of a file to an offset. `EINVAL` outside, `ENODATA` at the file's end.
    pub fn read(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        from: u64,
    ) -> Result<(), Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        let offset = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
        if offset > self.len || len > self.len - offset {
            return Err(Errno::EINVAL);
        }
        let mut done = 0;
        while done < len {
            // SAFETY: inside the mapping, as checked; no reference to that memory exists.
            let r = unsafe {
                libc::pread(
                    file.as_raw_fd(),
                    (self.at as *mut c_void).add(offset + done),
                    len - done,
                    (from + done as u64) as i64,
                )
            };
            match Errno::result(r) {
                Ok(0) => return Err(Errno::ENODATA),
                Ok(n) => done += n as usize,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Has a part of it, whole blocks of 2 MiB that nothing was read to yet, be of huge pages, as far as there are any: a
    /// fork copies one entry for each instead of 512. A fork that writes gets small pages, and those it writes only.
    /// The mapping itself stays as any other.
    pub fn make_huge(&self, part: Range<u64>) {
        const HUGE: usize = 2 << 20;
        let inside = part.start < part.end && part.end <= self.len as u64;
        if !inside || !(self.at + part.start).is_multiple_of(HUGE as u64) {
            return;
        }
        let (start, len) = (part.start as usize, (part.end - part.start) as usize);
        for offset in (start..start + len).step_by(HUGE) {
            // A block without any page is not looked at.
            // SAFETY: inside the mapping, as checked, which is writable; no reference to that memory exists.
            unsafe { (self.at as *mut u8).add(offset).write_volatile(0) };
        }
        // SAFETY: inside the mapping; the call changes how it is stored, not what it holds. Its failure is no matter.
        unsafe {
            libc::madvise(
                (self.at as *mut c_void).add(start),
                len,
                libc::MADV_COLLAPSE,
            )
        };
    }

    /// Unmaps it in this process, which is a fork that needs it no more and ends without dropping it.
    pub fn leave(&self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.at as *mut c_void, self.len) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.leave();
    }
}
