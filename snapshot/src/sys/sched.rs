//! How urgently the calling thread is run.

/// Asks for the highest ordinary priority for the calling thread; without the right to it, nothing changes.
pub fn prefer_this_thread() {
    // SAFETY: the call takes numbers only; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
}
