//! Resource limits and CPU affinity of another process.

/// All resource limits (soft, hard), by number of the resource.
#[must_use]
pub fn all(pid: i32) -> Vec<(u64, u64)> {
    (0..16)
        .map(|resource| {
            let mut old = libc::rlimit64 {
                rlim_cur: u64::MAX,
                rlim_max: u64::MAX,
            };
            // SAFETY: `old` is valid for writing; nothing is set.
            unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &raw mut old) };
            (old.rlim_cur, old.rlim_max)
        })
        .collect()
}

/// The CPUs a thread may run on; empty if all that there are.
#[must_use]
pub fn affinity(tid: i32) -> Vec<u64> {
    let mut mask = [0u64; 128];
    // SAFETY: `mask` is valid for writing its whole length.
    let n = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid,
            size_of_val(&mask),
            mask.as_mut_ptr(),
        )
    };
    let words = usize::try_from(n).unwrap_or_default() / 8;
    let set: u32 = mask.iter().map(|w| w.count_ones()).sum();
    // SAFETY: takes a number only.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    if i64::from(set) >= online {
        Vec::new()
    } else {
        mask[..words].to_vec()
    }
}
