//! Keeps background work from slowing what programs do: beside a busy mount it rests nine times as long as it works. On few
//! CPUs a low priority alone is not enough, as a request wakes two threads in turn.

use std::time::{Duration, Instant};

use super::{Ordering, Store};

/// Work between two looks at the clock's reading.
const WORK: Duration = Duration::from_millis(1);
/// Rest for each part of work.
const REST: u32 = 9;
/// One rest at most.
const REST_MAX: Duration = Duration::from_millis(200);

/// The pace of one piece of background work.
#[derive(Debug)]
pub(crate) struct Pace<'a> {
    store: &'a Store,
    since: Instant,
    seen: u64,
}

impl<'a> Pace<'a> {
    /// Work that begins now.
    pub fn new(store: &'a Store) -> Self {
        Self {
            store,
            since: Instant::now(),
            seen: store.requests.load(Ordering::Relaxed),
        }
    }

    /// Rests, if it is time to and somebody else is at work.
    pub fn step(&mut self) {
        let worked = self.since.elapsed();
        if worked < WORK {
            return;
        }
        let now = self.store.requests.load(Ordering::Relaxed);
        if now != self.seen && !self.store.gc_stop.load(Ordering::Relaxed) {
            std::thread::sleep((worked * REST).min(REST_MAX));
        }
        self.seen = self.store.requests.load(Ordering::Relaxed);
        self.since = Instant::now();
    }
}

impl Store {
    /// Tells that a request of a program is being answered.
    pub fn note_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}
