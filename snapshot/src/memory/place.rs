//! Where the threads of a save run: the one that serves the target's faults beside the target's thread, on its processor,
//! and those that copy on others.
//!
//! A fault puts its thread to sleep. Whoever serves it on the same processor begins within a microsecond, and the thread
//! goes on as soon as it is done; on another one both have to be woken out of an idle processor, which takes ten times as
//! long. A thread that copies, on the other hand, is in nobody's way only where the target does not run; the kernel's
//! balancing takes tens of milliseconds to find that out.

use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::proc;

/// How long what was seen of the target counts, at least. The kernel seldom moves a thread that runs.
const FRESH: Duration = Duration::from_millis(1);
/// ... and how many times as long as looking took.
const SHARE: u32 = 30;
/// A target that is not seen to run for so long stands still: before, it may wait for a fault.
const REST: Duration = Duration::from_millis(20);
/// Of a process with more threads it is not asked where they run: it takes too long, and they run everywhere.
const MOST_THREADS: usize = 16;
/// The calling thread, by sched_setaffinity(2).
const SELF: Pid = Pid::from_raw(0);

/// Processors that threads of this process may use; all, if that could not be found out.
#[derive(Debug, Clone, Copy)]
pub struct Cpus(Option<CpuSet>);

impl Cpus {
    /// Those of the calling thread.
    #[must_use]
    pub fn of_this_thread() -> Self {
        Self(sched_getaffinity(SELF).ok())
    }
}

/// Lets another thread of this process run anywhere again.
pub(super) fn free(tid: i32, cpus: Cpus) {
    if let Some(all) = cpus.0 {
        // One that has ended meanwhile needs no place.
        let _ = sched_setaffinity(Pid::from_raw(tid), &all);
    }
}

/// Which side of the target a thread is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where it runs.
    With,
    /// Where it does not.
    Apart,
}

/// The place of the calling thread, which gets back the processors that it had when this is dropped.
#[derive(Debug)]
pub struct Place {
    pid: i32,
    side: Side,
    all: Cpus,
    before: Cpus,
    now: Option<CpuSet>,
    /// When to look again.
    next: Option<Instant>,
    /// When the target was seen to run.
    ran: Option<Instant>,
}

impl Place {
    /// Nothing changes before [`Place::follow`].
    #[must_use]
    pub fn new(pid: i32, side: Side, all: Cpus) -> Self {
        Self {
            pid,
            side,
            all,
            before: Cpus::of_this_thread(),
            now: None,
            next: None,
            ran: None,
        }
    }

    /// Stays where it is from here on.
    pub fn stay(&mut self) {
        self.all = Cpus(None);
    }

    /// Moves the thread, if the target has moved. Cheap enough for every block, and for every fault.
    pub fn follow(&mut self) {
        let Some(all) = self.all.0 else { return };
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return;
        }
        let running = running(self.pid, self.side);
        self.next = Some(now + FRESH.max(now.elapsed() * SHARE));
        if !running.is_empty() {
            self.ran = Some(now);
        } else if self.ran.is_some_and(|r| now - r < REST) {
            return;
        }
        let wanted = choose(self.side, &all, &running);
        if self.now.unwrap_or(all) != wanted && sched_setaffinity(SELF, &wanted).is_ok() {
            self.now = Some(wanted);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let (Some(before), Some(_)) = (self.before.0, self.now) {
            let _ = sched_setaffinity(SELF, &before);
        }
    }
}

/// Processors that the target's threads run on, or wait for; none if no place is better than another.
fn running(pid: i32, side: Side) -> Vec<usize> {
    let threads = proc::threads(pid).unwrap_or_default();
    // One thread that waits for a fault leaves its processor free; of several, another one may be there, and need it.
    if threads.len() > MOST_THREADS || (side == Side::With && threads.len() > 1) {
        return Vec::new();
    }
    let stats = threads.iter().filter_map(|&tid| proc::stat(tid).ok());
    let busy = stats.filter(|s| s.state == 'R');
    busy.filter_map(|s| usize::try_from(s.processor).ok())
        .collect()
}

/// The processors for a thread. All that it may use, if the target does not run, or runs everywhere.
fn choose(side: Side, all: &CpuSet, target: &[usize]) -> CpuSet {
    let mut chosen = CpuSet::new();
    let mut any = false;
    for cpu in 0..CpuSet::count() {
        let with = target.contains(&cpu);
        if all.is_set(cpu).unwrap_or(false) && with == (side == Side::With) {
            any |= chosen.set(cpu).is_ok();
        }
    }
    if any { chosen } else { *all }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        cpus.iter().for_each(|&c| set.set(c).unwrap());
        set
    }

    #[test]
    fn beside_the_target_and_apart_from_it() {
        let all = set(&[0, 1, 3]);
        assert_eq!(choose(Side::With, &all, &[1]), set(&[1]));
        assert_eq!(choose(Side::Apart, &all, &[1]), set(&[0, 3]));
        // It runs where this thread may not.
        assert_eq!(choose(Side::With, &all, &[2]), all);
        assert_eq!(choose(Side::Apart, &all, &[2]), all);
        // It stands still; it runs everywhere.
        assert_eq!(choose(Side::With, &all, &[]), all);
        assert_eq!(choose(Side::Apart, &all, &[0, 1, 3]), all);
    }

    #[test]
    fn a_thread_gets_its_processors_back() {
        let before = sched_getaffinity(SELF).unwrap();
        let me = std::process::id().cast_signed();
        let mut place = Place::new(me, Side::Apart, Cpus::of_this_thread());
        place.follow();
        drop(place);
        assert_eq!(sched_getaffinity(SELF).unwrap(), before);
    }
}
