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

/// A time in which the calling thread is preferred.
#[derive(Debug)]
pub struct Preferred(());

impl Preferred {
    /// It begins.
    pub fn begin() -> Self {
        prefer_this_thread();
        sharp_timers();
        Self(())
    }
}

impl Drop for Preferred {
    fn drop(&mut self) {
        prefer_no_more();
    }
}

/// Another process, preferred for a time; one that is scheduled in a special way already is left as it is.
#[derive(Debug)]
pub struct Boost(i32);

impl Boost {
    /// It begins; none without the right to it.
    pub fn begin(pid: i32) -> Option<Self> {
        // SAFETY: the call takes a number only.
        if unsafe { libc::sched_getscheduler(pid) } != libc::SCHED_OTHER {
            return None;
        }
        let param = libc::sched_param { sched_priority: 1 };
        let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
        // SAFETY: the kernel reads `param`, which lives through the call.
        let done = unsafe { libc::sched_setscheduler(pid, policy, &raw const param) };
        (done == 0).then_some(Self(pid))
    }
}

impl Drop for Boost {
    fn drop(&mut self) {
        let param = libc::sched_param { sched_priority: 0 };
        // SAFETY: as above. One that has ended meanwhile is no matter.
        unsafe { libc::sched_setscheduler(self.0, libc::SCHED_OTHER, &raw const param) };
    }
}

/// Lets short sleeps of the calling thread, and of threads that it makes, end on time: the kernel adds 50 us otherwise.
pub fn sharp_timers() {
    // SAFETY: sets a number of the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}
