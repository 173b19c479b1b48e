//! How urgently the calling thread is run.

/// Asks for real-time scheduling of the calling thread, or else for the highest ordinary priority; without the right to
/// either, nothing changes. For threads that others wait on and that do little at a time. Threads that it makes do not
/// inherit it.
pub fn prefer_this_thread() {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads `param`, which lives through the call; 0 is the calling thread.
    let done = unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_RR | libc::SCHED_RESET_ON_FORK,
            &raw const param,
        )
    };
    if done != 0 {
        // SAFETY: the call takes numbers only; 0 is the calling thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    }
}

/// Takes that back.
pub fn prefer_no_more() {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: as above.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const param) };
}

/// Lets short sleeps of the calling thread, and of threads that it makes, end on time: the kernel adds 50 us otherwise.
pub fn sharp_timers() {
    // SAFETY: sets a number of the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}
