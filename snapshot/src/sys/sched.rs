//! How urgently the calling thread is run.

/// The calling thread, by sched(7)'s number.
const SELF: i32 = 0;

/// Priorities in real time: of what is preferred, and of what that must wait for.
const PREFERRED: i32 = 1;
const FIRST: i32 = 2;

/// Schedules a thread in real time, which threads that it makes do not inherit.
fn real_time(tid: i32, priority: i32) -> bool {
    set(tid, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, priority)
}

/// Schedules a thread as most are.
fn ordinary(tid: i32) {
    // One that has ended meanwhile is no matter.
    set(tid, libc::SCHED_OTHER, 0);
}

fn set(tid: i32, policy: i32, priority: i32) -> bool {
    let param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the kernel reads `param`, which lives through the call.
    unsafe { libc::sched_setscheduler(tid, policy, &raw const param) == 0 }
}

/// Asks for real-time scheduling of the calling thread, or else for the highest ordinary priority; without the right to
/// either, nothing changes. For threads that others wait on and that do little at a time. Threads that it makes do not
/// inherit it.
pub fn prefer_this_thread() {
    prefer(PREFERRED);
}

/// The same, before all other threads of ours: for one that must not wait until they sleep.
pub fn prefer_this_thread_most() {
    prefer(FIRST);
}

fn prefer(priority: i32) {
    if !real_time(SELF, priority) {
        // SAFETY: the call takes numbers only; 0 is the calling thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    }
}

/// Takes that back.
pub fn prefer_no_more() {
    ordinary(SELF);
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
        real_time(pid, PREFERRED).then_some(Self(pid))
    }
}

impl Drop for Boost {
    fn drop(&mut self) {
        ordinary(self.0);
    }
}

/// Lets short sleeps of the calling thread, and of threads that it makes, end on time: the kernel adds 50 us otherwise.
pub fn sharp_timers() {
    // SAFETY: sets a number of the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}
