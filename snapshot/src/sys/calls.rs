//! Counting the system calls of a thread by their numbers (perf_event_open(2), tracepoint `raw_syscalls:sys_enter`).

use nix::errno::Errno;
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};

const TYPE_TRACEPOINT: u64 = 2;
/// A bit of `struct perf_event_attr`: counts nothing until it is told to.
const DISABLED: u64 = 1;

mod raw {
    nix::ioctl_none!(enable, b'$', 0);
    nix::ioctl_write_ptr!(set_filter, b'$', 6, *const std::ffi::c_char);
}

/// The calls to count, by number. The kernel's number of the tracepoint is in it.
#[derive(Debug, Clone)]
pub struct Calls {
    tracepoint: u64,
    filter: CString,
}

impl Calls {
    /// None where the kernel's tracepoints cannot be seen.
    #[must_use]
    pub fn new(numbers: &[i64]) -> Option<Self> {
        let id = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
            .iter()
            .find_map(|d| {
                std::fs::read_to_string(format!("{d}/events/raw_syscalls/sys_enter/id")).ok()
            })?;
        let terms: Vec<String> = numbers.iter().map(|n| format!("id == {n}")).collect();
        Some(Self {
            tracepoint: id.trim().parse().ok()?,
            filter: CString::new(terms.join(" || ")).ok()?,
        })
    }

    /// Counts those of one thread from now on. Needs CAP_PERFMON.
    pub fn count(&self, tid: i32) -> Result<Counter, Errno> {
        // type; config; ...; flags.
        let mut attr = [0u64; 16];
        attr[0] = TYPE_TRACEPOINT;
        attr[1] = self.tracepoint;
        attr[5] = DISABLED;
        let fd = super::perf::open(attr, tid, -1)?;
        // SAFETY: the kernel copies the filter, a string with an end that lives through the call.
        unsafe { raw::set_filter(fd.as_raw_fd(), self.filter.as_ptr().cast()) }?;
        // SAFETY: the descriptor is a perf event's; the call takes no memory.
        unsafe { raw::enable(fd.as_raw_fd()) }?;
        Ok(Counter(fd))
    }
}

/// A count of the calls of one thread. Letting the last one of a process go takes the kernel some tens of milliseconds.
#[derive(Debug)]
pub struct Counter(OwnedFd);

impl Counter {
    /// How many there were.
    pub fn read(&self) -> Result<u64, Errno> {
        let mut n = [0; 8];
        match nix::unistd::read(&self.0, &mut n)? {
            8 => Ok(u64::from_ne_bytes(n)),
            _ => Err(Errno::EIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_a_thread_are_counted_and_others_are_not() {
        let Some(calls) = Calls::new(&[libc::SYS_getppid, libc::SYS_getpgid]) else {
            panic!("the kernel's tracepoints are not to be seen (tracefs)");
        };
        let me = nix::unistd::gettid().as_raw();
        let counter = match calls.count(me) {
            Ok(c) => c,
            Err(e) => panic!("counting needs CAP_PERFMON: {e}"),
        };
        let before = counter.read().unwrap();
        nix::unistd::getppid();
        nix::unistd::getpgid(None).unwrap();
        // Neither of these, nor those of another thread.
        let _ = nix::unistd::getuid();
        std::thread::spawn(nix::unistd::getppid).join().unwrap();
        assert_eq!((before, counter.read().unwrap()), (0, 2));
    }
}
