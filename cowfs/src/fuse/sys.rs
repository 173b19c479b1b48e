//! System calls that nix does not wrap.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

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

/// syncfs(2).
///
/// # Errors
/// Its errno.
pub fn syncfs(file: &std::fs::File) -> std::io::Result<()> {
    // SAFETY: syncfs takes a descriptor and no pointers; the borrow keeps it open for the call.
    let r = unsafe { libc::syncfs(file.as_raw_fd()) };
    nix::errno::Errno::result(r).map(drop).map_err(Into::into)
}
