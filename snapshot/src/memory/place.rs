//! Where the threads of a save run: the one that serves the target's faults beside the target's thread, on its processor,
//! and those that copy on others.
//!
//! A fault puts its thread to sleep. Whoever serves it on the same processor begins within a microsecond, and the thread
//! goes on as soon as it is done; on another one both have to be woken out of an idle processor, which takes ten times as
//! long. A thread that copies, on the other hand, is in nobody's way only where the target does not run; the kernel's
//! balancing takes tens of milliseconds to find that out.

use std::collections::HashMap;
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
    /// When each of several threads was looked at, and how long it had run by then, nanoseconds.
    seen: HashMap<i32, (Instant, u64)>,
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
            seen: HashMap::new(),
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
        let running = self.running();
        self.next = Some(now + FRESH.max(now.elapsed() * SHARE));
        if !running.is_empty() {
            self.ran = Some(now);
        } else if self.ran.is_some_and(|r| now - r < REST) {
            return;
        }
        let wanted = choose(self.side, &all, &running);
        // At first it has what the thread had that made it.
        if self.now != Some(wanted) && sched_setaffinity(SELF, &wanted).is_ok() {
            self.now = Some(wanted);
        }
    }

    /// Processors of the target's threads; none if no place is better than another.
    fn running(&mut self) -> Vec<usize> {
        let threads = proc::threads(self.pid).unwrap_or_default();
        let processor = |tid| usize::try_from(proc::stat(tid).ok()?.processor).ok();
        match (self.side, &threads[..]) {
            // While it waits for a fault it leaves its processor free. (Of several threads, another one may need it.)
            (Side::With, &[tid]) => processor(tid).into_iter().collect(),
            (Side::With, _) => Vec::new(),
            (Side::Apart, &[tid]) if !runs(tid) => Vec::new(),
            (Side::Apart, &[tid]) => processor(tid).into_iter().collect(),
            (Side::Apart, many) if many.len() > MOST_THREADS => Vec::new(),
            (Side::Apart, many) => {
                let busy: Vec<i32> = many.iter().copied().filter(|&t| self.is_busy(t)).collect();
                busy.into_iter().filter_map(processor).collect()
            }
        }
    }

    /// Whether one of several threads has run for a quarter of the time since it was looked at before. Those that wake up for a
    /// moment, or are stopped and asked by us, would else be taken for threads that need a processor.
    fn is_busy(&mut self, tid: i32) -> bool {
        let (now, Ok([ran, ..])) = (Instant::now(), proc::ran(tid)) else {
            return false;
        };
        match self.seen.insert(tid, (now, ran)) {
            Some((at, before)) => {
                u128::from(ran.saturating_sub(before)) * 4 >= (now - at).as_nanos()
            }
            None => runs(tid),
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

/// Whether a thread runs, or waits for a processor only.
fn runs(tid: i32) -> bool {
    proc::stat(tid).is_ok_and(|s| s.state == 'R')
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
