//! userfaultfd(2) for memory that is filled when it is touched.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `UFFDIO_REGISTER`.
pub const REGISTER: u64 = 0xc020_aa00;
const API: u64 = 0xc018_aa3f;
const WAKE: u64 = 0x8010_aa02;
const COPY: u64 = 0xc028_aa03;
const ZEROPAGE: u64 = 0xc020_aa04;
const MODE_MISSING: u64 = 1;
/// UFFD_FEATURE_EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// Bytes of a message.
pub const MESSAGE: usize = 32;

/// The argument of [`REGISTER`] for a range that is filled on first touch.
#[must_use]
pub fn register_words(start: u64, len: u64) -> [u64; 4] {
    [start, len, MODE_MISSING, 0]
}

/// Makes one for the calling process, with events for all that it does to its memory.
pub fn create() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = Errno::result(fd)? as i32;
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = [0xaa_u64, FEATURES, 0];
    ioctl(fd.as_raw_fd(), API, &mut api)?;
    Ok(fd)
}

fn ioctl<const N: usize>(fd: i32, request: u64, words: &mut [u64; N]) -> Result<(), Errno> {
    // SAFETY: each request's structure has the size of the array that its caller passes, which lives through the call. What
    // a request does to memory it does to the process that made the descriptor, or reads ours where the caller allows.
    let r = unsafe { libc::ioctl(fd, request as _, words.as_mut_ptr()) };
    Errno::result(r).map(drop)
}

/// What became of a filling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes from the start of the range were filled; if not all, the next one says why when it is tried.
    Bytes(u64),
    /// The first page is there already.
    There,
    /// The process is changing its mappings: read events first.
    Changing,
    /// Nothing that can be filled is at the address (any more).
    Nothing,
    /// The process is gone.
    Gone,
}

fn outcome(r: Result<(), Errno>, done: u64) -> Result<Filled, Errno> {
    let done = done as i64;
    match r {
        Ok(()) => Ok(Filled::Bytes(done.max(0) as u64)),
        Err(_) if done > 0 => Ok(Filled::Bytes(done as u64)),
        Err(Errno::EEXIST) => Ok(Filled::There),
        Err(Errno::EAGAIN) => Ok(Filled::Changing),
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(Filled::Nothing),
        Err(Errno::ESRCH) => Ok(Filled::Gone),
        Err(e) => Err(e),
    }
}

/// Copies `from` to an address of the process; its waiting threads go on.
pub fn copy(fd: BorrowedFd<'_>, to: u64, from: &[u8]) -> Result<Filled, Errno> {
    let mut words = [to, from.as_ptr() as u64, from.len() as u64, 0, 0];
    let r = ioctl(fd.as_raw_fd(), COPY, &mut words);
    outcome(r, words[4])
}

/// Fills with zeroes.
pub fn zero(fd: BorrowedFd<'_>, to: u64, len: u64) -> Result<Filled, Errno> {
    let mut words = [to, len, 0, 0];
    let r = ioctl(fd.as_raw_fd(), ZEROPAGE, &mut words);
    outcome(r, words[3])
}

/// Lets threads that wait for pages of a range try again.
pub fn wake(fd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    ioctl(fd.as_raw_fd(), WAKE, &mut [start, len])
}

/// What a process did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page.
    Fault(u64),
    /// A child was made; the number of a new descriptor for its memory.
    Fork(i32),
    /// Memory moved: from, to, length.
    Remap(u64, u64, u64),
    /// The content of a range was given up: start, end.
    Remove(u64, u64),
    /// A range was unmapped: start, end.
    Unmap(u64, u64),
}

/// Decodes a message; `None` if there is none, or one that was not asked for.
#[must_use]
pub fn decode(m: &[u8; MESSAGE]) -> Option<Event> {
    let word = |i: usize| u64::from_ne_bytes(m[i..i + 8].try_into().unwrap_or_default());
    match m[0] {
        0x12 => Some(Event::Fault(word(16) & !0xfff)),
        0x13 => Some(Event::Fork(word(8) as u32 as i32)),
        0x14 => Some(Event::Remap(word(8), word(16), word(24))),
        0x15 => Some(Event::Remove(word(8), word(16))),
        0x16 => Some(Event::Unmap(word(8), word(16))),
        _ => None,
    }
}
