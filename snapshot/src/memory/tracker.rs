//! The steps of a save, in their order.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Span;
use super::copy::{Room, Source};
use super::error::Error;
use super::faults;
use super::parent::Parent;
use super::place::{Cpus, Place, Side};
use super::plain;
use super::ranges::Ranges;
use super::shared::Shared;
use super::stats::{Round, Stats};
use crate::image::index::Entry;
use crate::image::pages::PagesWriter;
use crate::image::pageset::PageSet;
use crate::sys::sched;
use crate::sys::uffd::Uffd;

/// For how long faults are held back in a round that protects.
const HOLD: Duration = Duration::from_micros(300);

/// How a save is done.
#[derive(Debug, Clone)]
pub struct Options {
    /// Copy ahead of the point in time. Without it all is copied after it: slower to finish, and the way for targets
    /// whose pages may be written by a device while they are copied (O_DIRECT reads).
    pub precopy: bool,
    /// Threads that copy.
    pub threads: usize,
    /// Go on to the stop when so few pieces of 64 KiB are writable.
    pub few: u64,
    /// With more bytes than that to protect, a stop is given up and tried again: memory that is new, or that was
    /// written as the threads were slow to stop. 64 KiB take about 4 microseconds.
    pub most_new: u64,
    /// What the snapshot builds on (`--since`).
    pub parent: Option<Arc<Parent>>,
    /// Processors for the threads of the save.
    pub cpus: Cpus,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            precopy: true,
            threads: copying_threads(),
            few: 6,
            most_new: 8 << 20,
            parent: None,
            cpus: Cpus::of_this_thread(),
        }
    }
}

/// Two, but one CPU is left to the target: on two, a second one makes it wait for a CPU longer than it stands still.
fn copying_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| (n.get() - 1).clamp(1, 2))
}

/// The private anonymous mappings of a process.
#[derive(Debug, Clone, Default)]
pub struct Mappings {
    /// Each as `/proc/PID/maps` has it.
    pub spans: Vec<Span>,
    /// Pages that must never be protected, as the kernel writes there in a way that cannot wait for a fault. What was once
    /// among them stays so.
    pub open: Vec<u64>,
}

impl From<Vec<Span>> for Mappings {
    fn from(spans: Vec<Span>) -> Self {
        Self {
            spans,
            open: Vec::new(),
        }
    }
}

/// The point in time has been fixed.
#[derive(Debug, Clone, Default)]
pub struct Fence {
    /// Bytes that are still to be copied, at most.
    pub unsaved: u64,
    /// Ranges that cannot be tracked, and hot pages: the caller copies them now, with [`Tracker::copy_plain`].
    pub untracked: Vec<Span>,
}

/// What came of a stop.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// The point in time is now.
    Fixed(Fence),
    /// Too much memory can be written: let the target go on, call [`Tracker::tighten`], and stop it again.
    Again {
        /// How much, bytes.
        new: u64,
    },
}

/// The memory of one address space, saved.
#[derive(Debug)]
pub struct SavedSpace {
    /// For the index.
    pub entries: Vec<Entry>,
    /// What it has cost.
    pub stats: Stats,
}

/// In the stop, what was copied and has gone since is looked for in so many blocks at most; it takes some microseconds
/// for each.
const BLOCKS_IN_STOP: usize = 8;

/// A save of one address space. Dropped at any time, it leaves the target as it was.
#[derive(Debug)]
pub struct Tracker {
    shared: Arc<Shared>,
    threads: Option<[JoinHandle<()>; 2]>,
    options: Options,
    stats: Stats,
    complete: bool,
    /// What was read in the stop.
    stash: plain::Stash,
    /// Pages copied by the time of the stop.
    at_stop: u64,
}

impl Tracker {
    /// Takes a userfaultfd that process `pid` has made, on which UFFDIO_API has not been called and of which the
    /// process has no copy any more. `space` is the address space's number in the index.
    pub fn new(
        pid: i32,
        uffd: OwnedFd,
        space: u32,
        pages: Arc<PagesWriter>,
        options: Options,
    ) -> Result<Self, Error> {
        // Features: faults on write-protected pages (bit 0). None of the events: what they tell is found out
        // otherwise, and they would make the target wait.
        let uffd = Uffd::new(uffd, 1).map_err(|source| Error::Open {
            pid,
            what: "userfaultfd",
            source,
        })?;
        let source = Source::new(pid, space, pages, options.parent.clone())?;
        let shared = Arc::new(Shared::new(source, uffd, options.cpus));
        let threads = faults::start(&shared).map_err(|source| Error::Open {
            pid,
            what: "threads",
            source,
        })?;
        Ok(Self {
            shared,
            threads: Some(threads),
            options,
            stats: Stats::default(),
            complete: false,
            stash: plain::Stash::default(),
            at_stop: 0,
        })
    }

    /// Registers the mappings that are to be tracked. The caller has stopped every thread of the target, for this only.
    pub fn register(&mut self, now: &[Span]) -> Result<(), Error> {
        // What cannot be tracked is found out again in the stop.
        now.iter()
            .try_for_each(|span| self.shared.register(span).map(drop))
    }

    fn look(&mut self, now: &Mappings) -> Result<(), Error> {
        let mut t = self.shared.table();
        self.shared.set_ranges(&mut t, now, false).map(drop)
    }

    /// Before any range is set: names pages that are about to be written whatever happens, as a thread cannot even be
    /// stopped, or make a call, without. They are not protected, but read in the stop. Huge pages stay whole, and
    /// are protected all the same.
    pub fn set_hot(&mut self, pages: &[u64]) {
        let spans: Vec<Span> = pages.iter().map(|&p| p..p + 4096).collect();
        self.shared.table().soft = Ranges::new(&spans);
    }

    /// Protects and copies everything while the target runs, until little of it is writable. `current` gives the
    /// mappings as they are now; it is asked before and between rounds. What was mapped since [`Tracker::register`] is left to
    /// [`Tracker::freeze`].
    pub fn track(&mut self, current: &mut dyn FnMut() -> Mappings) -> Result<(), Error> {
        self.look(&current())?;
        self.round(self.options.precopy)?;
        let mut last = self.stats.rounds[0].pieces;
        for _ in 0..4 {
            self.look(&current())?;
            let left = self.shared.table().count_writable();
            // Copying is slower than writing: what is not much less than before will not become less.
            if !self.options.precopy || left < self.options.few || left > last / 2 {
                break;
            }
            self.round(true)?;
            last = left;
        }
        self.tighten(current)
    }

    /// Protects what is writable, until it is little or becomes no less. The calling thread is scheduled in real time from
    /// here to [`Tracker::save_rest`]: on a busy machine the writers would otherwise be faster, and nothing converge.
    pub fn tighten(&mut self, current: &mut dyn FnMut() -> Mappings) -> Result<(), Error> {
        sched::prefer_this_thread();
        self.look(&current())?;
        let mut last = u64::MAX;
        for _ in 0..12 {
            let left = self.shared.table().count_writable();
            if left < self.options.few || (left >= last && left < 4 * self.options.few) {
                break;
            }
            self.round(false)?;
            last = left;
        }
        Ok(())
    }

    /// One round over what is writable.
    fn round(&mut self, copy: bool) -> Result<(), Error> {
        let begin = Instant::now();
        let (blocks, pieces) = {
            let mut t = self.shared.table();
            let pieces = t.count_writable();
            (std::mem::take(&mut t.writable), pieces)
        };
        let before = self.shared.counts.copied.load(Relaxed);
        let shared = &self.shared;
        let here = (shared.source.pid, self.options.cpus);
        if copy {
            each(here, &blocks, self.options.threads, |b, room| {
                shared.visit(b, room)
            })?;
        } else {
            let mut left = blocks.iter();
            // The table is held for a while: faults wait meanwhile, or several busy writers would take back pieces as
            // fast as they are protected, and the stop would find them all.
            while !left.as_slice().is_empty() {
                let mut t = shared.table();
                let held = Instant::now();
                while held.elapsed() < HOLD
                    && let Some(&b) = left.next()
                {
                    if shared.protect(&mut t, b)? {
                        t.writable.push(b);
                    }
                }
            }
        }
        self.shared.check()?;
        self.stats.copied_before += self.shared.counts.copied.load(Relaxed) - before;
        self.stats.rounds.push(Round {
            copied: copy,
            pieces,
            took: begin.elapsed(),
        });
        Ok(())
    }

    /// Fixes the point in time. The caller has stopped every thread of the target, and `now` are its mappings. With `force` it
    /// is not given up, however much is new.
    pub fn freeze(&mut self, now: &Mappings, force: bool) -> Result<Frozen, Error> {
        let begin = Instant::now();
        let mut t = self.shared.table_now();
        self.shared.check()?;
        let mut untracked = self.shared.set_ranges(&mut t, now, true)?;
        let new = t.count_writable() * super::table::PIECE;
        if new > self.options.most_new && !force {
            return Ok(Frozen::Again { new });
        }
        untracked.extend(t.mapped.both(&t.hot));
        self.stats.pieces_at_stop = t.count_writable();
        for block in std::mem::take(&mut t.writable) {
            if self.shared.protect(&mut t, block)? {
                let what = "the ranges given for the stop are not its mappings";
                return Err(Error::Order {
                    pid: self.shared.source.pid,
                    what,
                });
            }
        }
        t.after = true;
        self.at_stop = self.shared.counts.copied.load(Relaxed);
        self.stats.freeze = begin.elapsed();
        let pieces: u64 = t
            .blocks
            .values()
            .map(|b| u64::from(b.unsaved.count_ones()))
            .sum();
        Ok(Frozen::Fixed(Fence {
            unsaved: pieces * super::table::PIECE,
            untracked,
        }))
    }

    /// Before the stop: makes room for what [`Tracker::copy_plain`] will read.
    pub fn prepare_plain(&mut self, spans: &[Span]) -> Result<(), Error> {
        let t = self.shared.table();
        let hot = t.mapped.both(&t.hot);
        drop(t);
        let all: Vec<Span> = spans.iter().cloned().chain(hot).collect();
        self.stash.prepare(&self.shared.source, &all)
    }

    /// In the stop: reads the process's own pages of ranges that are not tracked (private file mappings, and what
    /// [`Fence::untracked`] names).
    pub fn copy_plain(&mut self, spans: &[Span]) -> Result<(), Error> {
        self.stash.read(&self.shared.source, spans)
    }

    /// In the stop: copies what is not saved yet, if it is at most `limit` bytes. True: nothing is left.
    pub fn copy_in_stop(&mut self, limit: u64) -> Result<bool, Error> {
        if self.shared.table().blocks.len() > BLOCKS_IN_STOP {
            return Ok(false);
        }
        let left = self.left();
        if (left.iter().map(|l| l.1).sum::<u64>()) * super::table::PIECE > limit {
            return Ok(false);
        }
        let mut room = Room::new();
        left.iter()
            .try_for_each(|&(b, _)| self.shared.save(b, &mut room))?;
        self.settle()?;
        Ok(true)
    }

    fn left(&self) -> Vec<(u64, u64)> {
        let t = self.shared.table();
        t.blocks
            .iter()
            .filter(|(_, b)| b.unsaved != 0)
            .map(|(&n, b)| (n, u64::from(b.unsaved.count_ones())))
            .collect()
    }

    /// Copies what is left while the target runs. The caller holds back its calls that destroy memory (munmap, mremap,
    /// madvise, brk, exit, exec, MAP_FIXED) until this has returned.
    pub fn save_rest(&mut self) -> Result<(), Error> {
        sched::prefer_no_more();
        if self.complete {
            return Ok(());
        }
        if !self.shared.table().after {
            return Err(Error::Order {
                pid: self.shared.source.pid,
                what: "the point in time has not been fixed",
            });
        }
        let begin = Instant::now();
        let blocks: Vec<u64> = self.left().into_iter().map(|l| l.0).collect();
        let shared = &self.shared;
        let here = (shared.source.pid, self.options.cpus);
        each(here, &blocks, self.options.threads, |b, room| {
            shared.save(b, room)
        })?;
        self.settle()?;
        self.shared.write_queued()?;
        self.stats.rest = begin.elapsed();
        self.stats.copied_after = self.shared.counts.copied.load(Relaxed) - self.at_stop;
        self.stats.by_fault = self.shared.counts.by_fault.load(Relaxed);
        Ok(())
    }

    /// Takes out what was copied and had gone by the point in time.
    fn settle(&mut self) -> Result<(), Error> {
        let mut stash = std::mem::take(&mut self.stash);
        // The table is held for moments only: faults wait for it.
        let shared = &self.shared;
        stash.work_up(&shared.source, &mut |number, copied| {
            let mut t = shared.table();
            let block = t.blocks.entry(number).or_default();
            block.take_plain(copied, &shared.source.pages)
        })?;
        let blocks: Vec<u64> = self.shared.table().blocks.keys().copied().collect();
        for number in blocks {
            let mut t = self.shared.table();
            let tracked = t.tracked(number, super::table::ALL);
            let existed = self.shared.existed(&mut t, number, &tracked)?;
            if let Some(b) = t.blocks.get_mut(&number) {
                let plain = b.plain & !tracked;
                b.keep(&PageSet::FULL, &(existed | plain));
            }
        }
        self.shared.check()?;
        self.complete = true;
        Ok(())
    }

    /// Whether the target may destroy memory again.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Leaves the target and gives what was saved. Calls [`Tracker::save_rest`] if it has not been.
    pub fn finish(mut self) -> Result<SavedSpace, Error> {
        self.save_rest()?;
        let begin = Instant::now();
        self.leave();
        self.stats.release = begin.elapsed();
        // Faults that came last may have left more.
        self.shared.write_queued()?;
        self.shared.check()?;
        let begin = Instant::now();
        let table = std::mem::take(&mut *self.shared.table());
        let blocks: Vec<_> = table.blocks.into_iter().collect();
        let entries = plain::entries(
            &self.shared.source,
            self.options.cpus,
            &blocks,
            self.options.threads,
        )?;
        self.stats.sums = begin.elapsed();
        self.stats.faults = self.shared.counts.faults.load(Relaxed);
        self.stats.missing = self.shared.counts.missing.load(Relaxed);
        Ok(SavedSpace {
            entries,
            stats: std::mem::take(&mut self.stats),
        })
    }

    /// What it has cost so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Lifts all protection while faults are still served, then ends the threads.
    fn leave(&mut self) {
        let Some(threads) = self.threads.take() else {
            return;
        };
        self.shared.release();
        self.shared.stop.store(true, Relaxed);
        for t in threads {
            if t.join().is_err() {
                let what = "a thread that served its faults has panicked";
                self.shared.fail(Error::Order {
                    pid: self.shared.source.pid,
                    what,
                });
            }
        }
        // Whoever waits for a missing page must not wait for the sums.
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.uffd.close();
        }
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        sched::prefer_no_more();
        self.leave();
    }
}

/// Does something for each block, on several threads apart from the target. The first error ends all.
pub(super) fn each(
    (pid, cpus): (i32, Cpus),
    blocks: &[u64],
    threads: usize,
    work: impl Fn(u64, &mut Room) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut room = Room::new();
        let mut place = Place::new(pid, Side::Apart, cpus);
        while let Some(&b) = blocks.get(next.fetch_add(1, Relaxed)) {
            place.follow();
            work(b, &mut room).inspect_err(|_| next.store(blocks.len(), Relaxed))?;
        }
        Ok(())
    };
    let others = threads.min(blocks.len()).saturating_sub(1);
    std::thread::scope(|s| {
        let others: Vec<_> = (0..others).map(|_| s.spawn(run)).collect();
        let mine = run();
        others.into_iter().fold(mine, |r, t| {
            r.and(t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
        })
    })
}
