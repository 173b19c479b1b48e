//! What the tracker and the threads that serve faults share.

use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst,
};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::Span;
use super::copy::{Copied, Room, Source};
use super::error::Error;
use super::place::{Cpus, Place, Side};
use super::ranges::Ranges;
use super::table::{ALL, PIECE, PIECE_PAGES, Pieces, Table, blocks_of};
use super::tracker::Mappings;
use crate::image::pages::sum;
use crate::image::pageset::{BLOCK, PageSet};
use crate::sys::pagemap::{FILE, HUGE, PRESENT, SWAPPED};
use crate::sys::uffd::{Fault, MISSING, Uffd, WP};

/// How long a thread that somebody waits on looks for the table before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// As many pieces (64 MiB) may wait to be written; more do not help.
const MOST_QUEUED: usize = 1024;

#[derive(Debug)]
pub(super) struct Shared {
    pub source: Source,
    pub uffd: Uffd,
    table: Mutex<Table>,
    /// Threads that serve faults and want the table: copying lets them go first.
    pub urgent: AtomicUsize,
    failed: Mutex<Option<Error>>,
    pub stop: AtomicBool,
    pub counts: Counts,
    pub server: Server,
    pub aside: Aside,
    /// Offsets in `pages`, and bytes to be written there.
    queue: Mutex<Vec<(u64, Vec<u8>)>>,
    epoch: Instant,
    /// Processors for the threads of the save.
    pub cpus: Cpus,
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub copied: AtomicU64,
    pub by_fault: AtomicU64,
    pub faults: AtomicU64,
    pub missing: AtomicU64,
}

impl Counts {
    /// Faults that were served.
    pub fn served(&self) -> u64 {
        self.faults.load(Relaxed) + self.missing.load(Relaxed)
    }
}

/// The thread that serves faults.
#[derive(Debug, Default)]
pub(super) struct Server {
    pub tid: AtomicI32,
    /// It got no processor where it was put.
    pub late: AtomicBool,
}

/// What the stand-in leaves for the others when it has served faults in their place.
#[derive(Debug, Default)]
pub(super) struct Aside {
    /// Since when (microseconds since the epoch, plus one) the table's holder has been reading the target's memory.
    pub reading: AtomicU64,
    /// Pages that it has filled.
    pub filled: Mutex<Vec<u64>>,
    /// Faults that it has read and cannot serve.
    pub faults: Mutex<Vec<Fault>>,
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole enough to release the target.
pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(source: Source, uffd: Uffd, cpus: Cpus) -> Self {
        Self {
            source,
            uffd,
            table: Mutex::default(),
            urgent: AtomicUsize::new(0),
            failed: Mutex::default(),
            stop: AtomicBool::new(false),
            counts: Counts::default(),
            server: Server::default(),
            aside: Aside::default(),
            queue: Mutex::default(),
            epoch: Instant::now(),
            cpus,
        }
    }

    pub fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64 + 1
    }

    /// The table, for a thread that somebody waits on.
    pub fn table_now(&self) -> MutexGuard<'_, Table> {
        self.urgent.fetch_add(1, SeqCst);
        let t = self.spin().unwrap_or_else(|| lock(&self.table));
        self.urgent.fetch_sub(1, SeqCst);
        t
    }

    /// Who copies lets go of the table within this time, mostly; to be woken out of an idle processor would take as long
    /// again. Nobody else needs this processor: the thread that it belongs to waits for us.
    fn spin(&self) -> Option<MutexGuard<'_, Table>> {
        let begin = Instant::now();
        while begin.elapsed() < SPIN {
            match self.table.try_lock() {
                Ok(t) => return Some(t),
                Err(TryLockError::Poisoned(p)) => return Some(p.into_inner()),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        None
    }

    /// The table, for work in the background.
    pub fn table(&self) -> MutexGuard<'_, Table> {
        while self.urgent.load(SeqCst) > 0 {
            std::thread::yield_now();
        }
        lock(&self.table)
    }

    /// Keeps the first failure of a thread that cannot return it.
    pub fn fail(&self, e: Error) {
        lock(&self.failed).get_or_insert(e);
    }

    pub fn check(&self) -> Result<(), Error> {
        match lock(&self.failed).take() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    pub fn error(&self, what: &'static str, start: u64, end: u64, source: nix::Error) -> Error {
        match source {
            nix::Error::ESRCH => Error::Gone {
                pid: self.source.pid,
            },
            _ => Error::Uffd {
                pid: self.source.pid,
                what,
                start,
                end,
                source,
            },
        }
    }

    /// Registers a mapping. False: it cannot be tracked. The process must stand still: of a mapping that has become another
    /// one since it was listed a part might be registered, which the kernel makes a mapping of its own; the process could not
    /// move both as one (mremap gives EFAULT).
    pub fn register(&self, span: &Span) -> Result<bool, Error> {
        match self
            .uffd
            .register(span.start, span.end - span.start, MISSING | WP)
        {
            Ok(()) => Ok(true),
            Err(nix::Error::EINVAL | nix::Error::EPERM | nix::Error::ENOMEM) => Ok(false),
            Err(e) => Err(self.error("register", span.start, span.end, e)),
        }
    }

    /// Takes over the list of mappings as they are now. In the stop (`stopped`) those that are new are registered, and those
    /// that cannot be tracked are given; while the process runs new ones are passed by.
    ///
    /// All that exists of what was not in the list before counts as not saved: it was registered before it is looked at, so
    /// that what appears meanwhile is reported as missing.
    /// A mapping that is registered may have grown (a stack, mremap): what was touched beyond the list that we had was
    /// reported, but could not be protected when its turn came, so all that is there counts as written.
    pub fn set_ranges(
        &self,
        t: &mut Table,
        now: &Mappings,
        stopped: bool,
    ) -> Result<Vec<Span>, Error> {
        let old = std::mem::take(&mut t.mapped);
        let (mut tracked, mut untracked) = (Vec::new(), Vec::new());
        for span in &now.spans {
            if self.is_registered(t, span)? {
                for grown in old.without(span) {
                    self.note(t, &grown)?;
                }
            } else if stopped && self.register(span)? {
                self.note(t, span)?;
            } else {
                untracked.push(span.clone());
                continue;
            }
            tracked.push(span.clone());
        }
        t.mapped = Ranges::new(&tracked);
        self.leave_open(t, &now.open);
        t.ranges = t.mapped.less(&t.hot);
        Ok(untracked)
    }

    /// Takes the protection off hot pages that were protected as others were before.
    fn leave_open(&self, t: &mut Table, more: &[u64]) {
        t.open.extend(more);
        let Table { soft, blocks, .. } = t;
        // Huge pages stay whole.
        soft.retain(|s| !blocks.get(&(s.start / BLOCK)).is_some_and(|b| b.huge));
        let open: Vec<Span> = t.open.iter().map(|&p| p..p + 4096).collect();
        let all: Vec<Span> = t.soft.iter().cloned().chain(open).collect();
        let old = std::mem::replace(&mut t.hot, Ranges::new(&all));
        for page in t.hot.less(&old).iter() {
            // One that is not mapped, or not there, needs nothing.
            let _ = self.uffd.lift(page.start, page.end - page.start);
        }
    }

    /// Notes all that exists in some addresses as written.
    fn note(&self, t: &mut Table, span: &Span) -> Result<(), Error> {
        self.source
            .map
            .scan(span.start, span.end, PRESENT | SWAPPED, FILE, |r| {
                for (block, pieces) in blocks_of(r.start..r.end) {
                    let huge = r.categories & HUGE != 0 && pieces == ALL;
                    t.mark(block, pieces);
                    if let Some(b) = t.blocks.get_mut(&block) {
                        b.huge |= huge;
                    }
                }
            })
            .map_err(|e| self.source.scan_error(span.start, span.end, e))
    }

    /// Whether a mapping is registered with us. A page of it is protected by the question, which does no harm; not a hot one.
    /// A mapping is registered as a whole or not at all: the kernel never joins one that is with one that is not.
    fn is_registered(&self, t: &Table, span: &Span) -> Result<bool, Error> {
        let cold = t.hot.without(span);
        let page = cold.first().map_or(span.start, |s| s.start);
        match self.uffd.protect(page, 4096) {
            Ok(()) => Ok(true),
            Err(nix::Error::ENOENT) => Ok(false),
            Err(e) => Err(self.error("protect", page, page + 4096, e)),
        }
    }

    /// Protects the writable pieces of a block; those that cannot be, as their mapping has gone, stay noted as
    /// writable, and the caller puts the block on the list again if this gives true.
    pub fn protect(&self, t: &mut Table, block: u64) -> Result<bool, Error> {
        let Some(b) = t.blocks.get_mut(&block) else {
            return Ok(false);
        };
        let mut kept = 0;
        for (start, end, pieces) in piece_runs(block, b.writable) {
            for s in t.ranges.cut(start, end) {
                match self.uffd.protect(s.start, s.end - s.start) {
                    Ok(()) => {}
                    Err(nix::Error::ENOENT) => kept |= pieces,
                    Err(e) => return Err(self.error("protect", s.start, s.end, e)),
                }
            }
        }
        b.writable = kept;
        Ok(kept != 0)
    }

    /// Lifts the protection of pieces, at least that of the page at `fault`, and wakes who waits there.
    fn lift(&self, t: &Table, block: u64, pieces: Pieces, fault: u64) {
        let mut woken = false;
        for (start, end, _) in piece_runs(block, pieces) {
            for s in t.ranges.cut(start, end) {
                let done = self.uffd.lift(s.start, s.end - s.start).is_ok();
                woken |= done && (s.start..s.end).contains(&fault);
            }
        }
        if !woken && self.uffd.lift(fault, 4096).is_err() {
            // The mapping has gone, or another one is there that is not ours: the thread tries again and sees.
            let _ = self.uffd.wake(fault, 4096);
        }
    }

    /// Serves one fault.
    pub fn serve(&self, f: Fault, room: &mut Room) {
        let (block, piece) = (f.address / BLOCK, (f.address % BLOCK / PIECE) as u32);
        let mut t = self.table_now();
        if !f.protected {
            self.counts.missing.fetch_add(1, Relaxed);
            return self.fill(&mut t, f.address);
        }
        self.counts.faults.fetch_add(1, Relaxed);
        let known = t.blocks.get(&block);
        let pieces = if known.is_some_and(|b| b.huge) {
            ALL
        } else {
            1 << piece
        };
        let unsaved = known.map_or(0, |b| b.unsaved) & pieces;
        if !t.after {
            t.mark(block, pieces);
            return self.lift(&t, block, pieces, f.address);
        }
        if unsaved == 0 {
            return self.lift(&t, block, pieces, f.address);
        }
        let fetched = self.fetch(&mut t, block, unsaved, room);
        self.lift(&t, block, pieces, f.address);
        let done = fetched.and_then(|(seen, there)| {
            let c = self.source.sort(block, seen, &there, room)?;
            let slot = self.take_over(&mut t, block, unsaved, &c);
            drop(t);
            self.counts
                .by_fault
                .fetch_add(there.count() as u64, Relaxed);
            self.hand_over(slot, &c, room)
        });
        if let Err(e) = done {
            self.fail(e);
        }
    }

    /// Answers a missing page with zeroes, and those behind it in its piece.
    fn fill(&self, t: &mut Table, address: u64) {
        let end = address / PIECE * PIECE + PIECE;
        let end = t
            .ranges
            .cut(address, end)
            .next()
            .map_or(address + 4096, |s| s.end);
        let (block, piece) = (address / BLOCK, (address % BLOCK / PIECE) as u32);
        if !t.after {
            t.mark(block, 1 << piece);
        }
        let filled = match self.uffd.zero(address, end - address) {
            Ok(n) => n,
            // Not one mapping any more; the page itself is what is waited for.
            Err(nix::Error::ENOENT) => self.uffd.zero(address, 4096).unwrap_or(0),
            Err(_) => 0,
        };
        if filled == 0 {
            let _ = self.uffd.wake(address, 4096);
        }
        if t.after && filled > 0 {
            let born = PageSet::of_addresses(block, address, address + filled);
            t.blocks.entry(block).or_default().born |= born;
        }
    }

    /// Reads pieces as they were at the point in time: the table is held, so that nobody lifts their protection.
    /// Gives the pages looked at, and those of them that were there.
    fn fetch(
        &self,
        t: &mut Table,
        block: u64,
        pieces: Pieces,
        room: &mut Room,
    ) -> Result<(PageSet, PageSet), Error> {
        let seen = t.tracked(block, pieces);
        let exist = self.existed(t, block, &seen)?;
        self.aside.reading.store(self.now_us(), SeqCst);
        let failed = self.source.fetch(block, &exist, room);
        self.aside.reading.store(0, SeqCst);
        self.source.must_read(block, &failed)?;
        Ok((seen, exist))
    }

    /// The pages of `set` that were there at the point in time.
    pub fn existed(&self, t: &mut Table, block: u64, set: &PageSet) -> Result<PageSet, Error> {
        let exist = self.source.existing(block, set)?;
        for a in lock(&self.aside.filled).drain(..) {
            let b = t.blocks.entry(a / BLOCK).or_default();
            b.born |= PageSet::of_addresses(a / BLOCK, a, a + 4096);
        }
        Ok(exist & !t.blocks.get(&block).map_or(PageSet::EMPTY, |b| b.born))
    }

    fn take_over(&self, t: &mut Table, block: u64, pieces: Pieces, c: &Copied) -> Option<u64> {
        let b = t.blocks.entry(block).or_default();
        b.unsaved &= !pieces;
        b.merge(c, &self.source.pages)
    }

    fn write(&self, slot: Option<u64>, c: &Copied, room: &Room) -> Result<(), Error> {
        self.counts
            .copied
            .fetch_add((c.own.count() + c.same.count()) as u64, Relaxed);
        match slot {
            Some(slot) => Ok(self.source.pages.write(slot, &c.own, &room.block)?),
            None => Ok(()),
        }
    }

    /// Leaves pages for a thread that copies to write: a file system may make a writer wait for its disk, and the
    /// thread that serves faults must not. With too many left already, it does wait.
    fn hand_over(&self, slot: Option<u64>, c: &Copied, room: &Room) -> Result<(), Error> {
        let Some(slot) = slot else { return Ok(()) };
        let mut queue = lock(&self.queue);
        if queue.len() >= MOST_QUEUED {
            drop(queue);
            return self.write(Some(slot), c, room);
        }
        self.counts
            .copied
            .fetch_add((c.own.count() + c.same.count()) as u64, Relaxed);
        queue.extend(c.own.runs().flat_map(pieces_of).map(|r| {
            let at = slot * BLOCK + (r.start * 4096) as u64;
            (at, room.block[r.start * 4096..r.end * 4096].to_vec())
        }));
        Ok(())
    }

    /// Writes what was left so.
    pub fn write_queued(&self) -> Result<(), Error> {
        loop {
            let Some((at, bytes)) = lock(&self.queue).pop() else {
                return Ok(());
            };
            self.source.pages.write_at(at, &bytes)?;
        }
    }

    /// Before the point in time: protects what is writable of a block and copies what is not saved.
    pub fn visit(&self, block: u64, room: &mut Room) -> Result<(), Error> {
        let mut t = self.table();
        if self.protect(&mut t, block)? {
            t.writable.push(block);
        }
        let Some(b) = t.blocks.get_mut(&block) else {
            return Ok(());
        };
        let todo = b.unsaved & !b.writable;
        if todo == 0 {
            return Ok(());
        }
        b.unsaved &= !todo;
        let seen = t.tracked(block, todo);
        drop(t);
        let exist = self.source.existing(block, &seen)?;
        let failed = self.source.fetch(block, &exist, room);
        let c = self.source.sort(block, seen, &(exist & !failed), room)?;
        let again = super::table::touched(&failed);
        let mut t = self.table();
        let b = t.blocks.entry(block).or_default();
        b.unsaved |= again;
        let slot = b.merge(&c, &self.source.pages);
        let quiet = b.own == c.own && b.unsaved == 0;
        drop(t);
        self.write(slot, &c, room)?;
        if quiet {
            self.note_sum(block, &c.own, room);
        }
        Ok(())
    }

    /// After it: copies what is not saved of a block, a little at a time, so that a fault need not wait long.
    pub fn save(&self, block: u64, room: &mut Room) -> Result<(), Error> {
        let mut all = Copied::default();
        let mut at = None;
        loop {
            let mut t = self.table();
            let left = t.blocks.get(&block).map_or(0, |b| b.unsaved);
            if left == 0 {
                break;
            }
            let some = 1 << left.trailing_zeros();
            let (seen, there) = self.fetch(&mut t, block, some, room)?;
            let c = self.source.sort(block, seen, &there, room)?;
            at = self.take_over(&mut t, block, some, &c).or(at);
            all.own |= c.own;
            all.same |= c.same;
        }
        self.write(at, &all, room)?;
        self.write_queued()?;
        self.note_sum(block, &all.own, room);
        Ok(())
    }

    /// The sum of a block whose pages are all in `room`, as long as these are all that it has.
    fn note_sum(&self, block: u64, own: &PageSet, room: &Room) {
        let fits = |b: &super::table::Block| b.own == *own && b.unsaved == 0 && b.sum.is_none();
        if own.is_empty() || !self.table().blocks.get(&block).is_some_and(fits) {
            return;
        }
        let sum = sum(own, &room.block);
        if let Some(b) = self.table().blocks.get_mut(&block).filter(|b| fits(b)) {
            b.sum = Some(sum);
        }
    }

    /// Lifts all protection, in small steps, so that the target does not wait long for its page tables. What is registered
    /// stays so until the userfaultfd is closed: a list that is not of this moment would take mappings apart.
    pub fn release(&self) {
        const STEP: u64 = 16 << 20;
        let spans: Vec<Span> = self.table().mapped.iter().cloned().collect();
        let blocks: Vec<u64> = self.table().blocks.keys().copied().collect();
        let mut place = Place::new(self.source.pid, Side::Apart, self.cpus);
        for s in spans {
            // Parts without a block hold nothing that is protected.
            let mut at = s.start;
            loop {
                let i = blocks.partition_point(|&b| b < at / BLOCK);
                let Some(&next) = blocks.get(i) else { break };
                at = at.max(next * BLOCK);
                if at >= s.end {
                    break;
                }
                let end = ((at / STEP + 1) * STEP).min(s.end);
                place.follow();
                // What has gone meanwhile needs nothing.
                let _ = self.uffd.lift(at, end - at);
                at = end;
            }
        }
    }
}

/// Splits pages in a row at the borders of pieces.
fn pieces_of(pages: std::ops::Range<usize>) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut at = pages.start;
    std::iter::from_fn(move || {
        let run = at..((at / PIECE_PAGES + 1) * PIECE_PAGES).min(pages.end);
        at = run.end;
        (!run.is_empty()).then_some(run)
    })
}

/// Rows of pieces with their addresses.
fn piece_runs(block: u64, pieces: Pieces) -> impl Iterator<Item = (u64, u64, Pieces)> {
    let mut left = pieces;
    std::iter::from_fn(move || {
        (left != 0).then(|| {
            let from = left.trailing_zeros();
            let n = (left >> from).trailing_ones();
            let run = (ALL >> (32 - n)) << from;
            left &= !run;
            let start = block * BLOCK + u64::from(from) * PIECE;
            (start, start + u64::from(n) * PIECE, run)
        })
    })
}

const _: () = assert!(PIECE_PAGES * 32 == 512);
