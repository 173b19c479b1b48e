//! userfaultfd(2): the calls and the messages.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Missing pages are reported (a register mode).
pub const MISSING: u64 = 1;
/// Writes to protected pages are reported (a register mode).
pub const WP: u64 = 2;

/// Writes to protected pages are noted by the kernel, and make nobody wait (UFFD_FEATURE_WP_ASYNC); pages that are not
/// there are protected too (WP_UNPOPULATED), in shared memory as well (WP_HUGETLBFS_SHMEM).
pub const FEATURES_ASYNC: u64 = 1 << 15 | 1 << 13 | 1 << 12;

const API: u64 = 0xAA;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE: usize = 32;

#[repr(C)]
#[derive(Debug, Default)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct RangeArg {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct ZeropageArg {
    range: RangeArg,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct ProtectArg {
    range: RangeArg,
    mode: u64,
}

mod raw {
    use super::{ApiArg, ProtectArg, RangeArg, RegisterArg, ZeropageArg};
    nix::ioctl_readwrite!(api, 0xAA, 0x3F, ApiArg);
    nix::ioctl_readwrite!(register, 0xAA, 0x00, RegisterArg);
    nix::ioctl_read!(unregister, 0xAA, 0x01, RangeArg);
    nix::ioctl_read!(wake, 0xAA, 0x02, RangeArg);
    nix::ioctl_readwrite!(zeropage, 0xAA, 0x04, ZeropageArg);
    nix::ioctl_readwrite!(protect, 0xAA, 0x06, ProtectArg);
}

/// A fault that a thread waits on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The address that was touched, rounded down to its page.
    pub address: u64,
    /// The page is there, and protected; otherwise it is missing.
    pub protected: bool,
}

/// A userfaultfd: of this process, or taken from another one.
#[derive(Debug)]
pub struct Uffd(Option<OwnedFd>);

impl Uffd {
    /// Takes a descriptor on which UFFDIO_API has not been called yet, asks for `features`, and makes it non-blocking.
    pub fn new(fd: OwnedFd, features: u64) -> io::Result<Self> {
        let mut arg = ApiArg {
            api: API,
            features,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `arg`, which has the layout of `struct uffdio_api`.
        unsafe { raw::api(fd.as_raw_fd(), &raw mut arg) }?;
        nix::fcntl::fcntl(
            &fd,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        Ok(Self(Some(fd)))
    }

    fn raw(&self) -> RawFd {
        self.0.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Closes it: the kernel unregisters what is left, and wakes who waits.
    pub fn close(&mut self) {
        self.0 = None;
    }

    /// Waits for faults, for so many milliseconds at most. True: there are some.
    pub fn wait(&self, timeout_ms: u8) -> bool {
        let Some(fd) = &self.0 else { return false };
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(timeout_ms)).is_ok_and(|n| n > 0)
    }

    /// Registers a range of the target for `mode`.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> nix::Result<()> {
        let mut arg = RegisterArg {
            range: RangeArg { start, len },
            mode,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `arg`, which has the layout of `struct uffdio_register`.
        unsafe { raw::register(self.raw(), &raw mut arg) }.map(drop)
    }

    /// Takes a range back; protection in it is lifted and waiting threads go on.
    pub fn unregister(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut arg = RangeArg { start, len };
        // SAFETY: the kernel reads `arg`, which has the layout of `struct uffdio_range`.
        unsafe { raw::unregister(self.raw(), &raw mut arg) }.map(drop)
    }

    /// Wakes the threads that wait in a range.
    pub fn wake(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut arg = RangeArg { start, len };
        // SAFETY: the kernel reads `arg`, which has the layout of `struct uffdio_range`.
        unsafe { raw::wake(self.raw(), &raw mut arg) }.map(drop)
    }

    /// Protects a range against writes. Pages that are not there stay missing.
    pub fn protect(&self, start: u64, len: u64) -> nix::Result<()> {
        self.write_protect(start, len, 1)
    }

    /// Lifts the protection of a range and wakes the threads that wait in it.
    pub fn lift(&self, start: u64, len: u64) -> nix::Result<()> {
        self.write_protect(start, len, 0)
    }

    fn write_protect(&self, start: u64, len: u64, mode: u64) -> nix::Result<()> {
        let mut arg = ProtectArg {
            range: RangeArg { start, len },
            mode,
        };
        // SAFETY: the kernel reads `arg`, which has the layout of `struct uffdio_writeprotect`.
        unsafe { raw::protect(self.raw(), &raw mut arg) }.map(drop)
    }

    /// Fills missing pages of a range with zeroes and wakes their threads; stops at the first page that is there.
    /// Gives the number of bytes that were filled.
    pub fn zero(&self, start: u64, len: u64) -> nix::Result<u64> {
        let mut arg = ZeropageArg {
            range: RangeArg { start, len },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: the kernel reads and writes `arg`, which has the layout of `struct uffdio_zeropage`.
        match unsafe { raw::zeropage(self.raw(), &raw mut arg) } {
            Ok(_) => Ok(len),
            Err(nix::Error::EAGAIN) if arg.zeropage > 0 => Ok(arg.zeropage.unsigned_abs()),
            Err(e) => Err(e),
        }
    }

    /// Adds the faults that wait to `faults`, as many as one read gives; none if there are none.
    pub fn read(&self, faults: &mut Vec<Fault>) -> nix::Result<()> {
        let mut buf = [0u8; MESSAGE * 64];
        let Some(fd) = &self.0 else { return Ok(()) };
        let n = match nix::unistd::read(fd, &mut buf) {
            Ok(n) => n,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(()),
            Err(e) => return Err(e),
        };
        faults.extend(buf[..n].chunks_exact(MESSAGE).filter_map(message));
        Ok(())
    }
}

/// One message (`struct uffd_msg`); other events than faults are not asked for.
#[must_use]
pub fn message(m: &[u8]) -> Option<Fault> {
    let word = |at: usize| m.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    if *m.first()? != EVENT_PAGEFAULT {
        return None;
    }
    Some(Fault {
        address: word(16)? & !4095,
        protected: word(8)? & 2 != 0,
    })
}

/// Makes a userfaultfd of the calling process (for tests and examples: a target is made to do this by itself).
pub fn create() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = nix::Error::result(fd)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_the_kernel_lays_them_out() {
        let mut m = [0u8; MESSAGE];
        m[0] = EVENT_PAGEFAULT;
        m[8] = 3;
        m[16..24].copy_from_slice(&0x7000_1234u64.to_ne_bytes());
        assert_eq!(
            message(&m),
            Some(Fault {
                address: 0x7000_1000,
                protected: true
            })
        );
        m[8] = 1;
        assert_eq!(
            message(&m),
            Some(Fault {
                address: 0x7000_1000,
                protected: false
            })
        );
        m[0] = 0x13;
        assert_eq!(message(&m), None);
    }
}
