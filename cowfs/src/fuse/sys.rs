//! System calls that nix does not wrap.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

/// CPUs that this thread may run on.
pub fn cpus() -> usize {
    nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).map_or(1, |set| {
        (0..nix::sched::CpuSet::count())
            .filter(|c| set.is_set(*c).unwrap_or(false))
            .count()
    })
}

/// Lets another thread run.
pub fn yield_now() {
    std::thread::yield_now();
}

/// mount(2) with the options string of FUSE.
///
/// # Errors
/// Its errno.
pub fn mount(
    source: &str,
    target: &std::path::Path,
    fstype: &str,
    flags: nix::mount::MsFlags,
    data: &str,
) -> nix::Result<()> {
    nix::mount::mount(Some(source), target, Some(fstype), flags, Some(data))
}

/// Opens a node that the kernel has cached, of the mount that `mount` is in, without a name: open_by_handle_at(2).
///
/// # Errors
/// ESTALE if it is not cached; EPERM without CAP_DAC_READ_SEARCH.
pub fn open_node(mount: &File, nodeid: u64) -> std::io::Result<File> {
    /// The kernel's `struct file_handle` with the three words of FUSE: node id, high half first, and generation.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        words: [u32; 3],
    }
    const FILEID_INO64_GEN: i32 = 0x81;
    let half = |n: u64| u32::try_from(n & 0xffff_ffff).unwrap_or(0);
    let mut handle = Handle {
        bytes: 12,
        kind: FILEID_INO64_GEN,
        words: [half(nodeid >> 32), half(nodeid), 0],
    };
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    // SAFETY: the handle lives over the call and says how long it is; the borrow keeps the descriptor open.
    let fd = unsafe { libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut handle).cast(), flags) };
    let fd = nix::errno::Errno::result(fd)?;
    // SAFETY: the call has just given us this descriptor, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// syncfs(2).
///
/// # Errors
/// Its errno.
pub fn syncfs(file: &File) -> std::io::Result<()> {
    // SAFETY: syncfs takes a descriptor and no pointers; the borrow keeps it open for the call.
    let r = unsafe { libc::syncfs(file.as_raw_fd()) };
    nix::errno::Errno::result(r).map(drop).map_err(Into::into)
}
