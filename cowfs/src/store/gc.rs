//! Garbage collection: marks what heads, checkpoints and live views reach, and gives the rest back.
//!
//! It runs beside everything else. First, for a moment with all writers out, places that were given out but not used are
//! declared void and nothing freed is given out again ("hold"). Then a commit fixes what is reachable. What came later
//! lies in new places, or is reachable from that commit, so marking reads only durable pages, without any lock.

use std::time::Instant;

use super::error::StoreError;
use super::pace::Pace;
use super::packs::sweep::Entries;
use super::pages::{Bitmap, read_page};
use super::segments::{BLOCK, SEGMENT_BYTES};
use super::{Ordering, Store};
use crate::fault;
use crate::fs::Extent;
use crate::tree::{self, Page, PageId, Visit};

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Tree pages freed.
    pub freed_pages: u64,
    /// Bytes of file data given back (for the first collection after opening: also those that were before).
    pub freed_bytes: u64,
    /// Tree pages in use.
    pub live_pages: u64,
    /// Time, microseconds.
    pub elapsed_us: u64,
}

/// Reads durable pages for marking.
pub(super) struct Reader<'a> {
    store: &'a Store,
    pub(super) pace: Pace<'a>,
    file: &'a dyn super::disk::DiskFile,
    pages: u64,
}

impl tree::Pages for Reader<'_> {
    type Error = StoreError;

    fn read(&mut self, id: PageId) -> Result<std::sync::Arc<Page>, StoreError> {
        self.store.gc_may_go()?;
        self.store.gc_done.fetch_add(1, Ordering::Relaxed);
        self.pace.step();
        read_page(self.file, self.pages, id)
    }

    fn modify(&mut self, _: PageId) -> Result<(PageId, &mut Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn alloc(&mut self) -> Result<(PageId, &mut Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn release(&mut self, _: PageId) {}
}

/// Which 4 KiB blocks of the segments are in use.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    segments: rustc_hash::FxHashMap<u32, Bitmap>,
}

impl Blocks {
    /// Blocks of segments that exist; extents in others (of a damaged tree) take no memory.
    fn new(existing: &[u32]) -> Self {
        let segments = existing.iter().map(|n| (*n, Bitmap::default()));
        Self {
            segments: segments.collect(),
        }
    }

    /// Marks an extent; false if it cannot be in a segment.
    pub(super) fn mark(&mut self, e: &Extent) -> bool {
        self.mark_range(e.seg, e.off, e.off.saturating_add(u64::from(e.len)))
    }

    /// True if all blocks of a range are marked.
    pub(super) fn has_range(&self, segment: u32, from: u64, to: u64) -> bool {
        let map = self.segments.get(&segment);
        map.is_some_and(|m| (from / BLOCK..to.div_ceil(BLOCK)).all(|b| m.is_set(b)))
    }

    /// Marks a range of a segment; false if there is none.
    pub(super) fn mark_range(&mut self, segment: u32, from: u64, to: u64) -> bool {
        let Some(map) = self.segments.get_mut(&segment) else {
            return false;
        };
        if to > SEGMENT_BYTES {
            return false;
        }
        map.grow(SEGMENT_BYTES / BLOCK);
        for b in from / BLOCK..to.div_ceil(BLOCK) {
            map.set(b);
        }
        true
    }
}

impl Store {
    /// Gives back what nothing refers to any more.
    ///
    /// # Errors
    /// What the host says, or a damaged page; nothing was freed then.
    pub fn gc(&self) -> Result<GcReport, StoreError> {
        let start = Instant::now();
        let stopped = |_| {
            StoreError::Refused("the store stopped after an internal error in a collection".into())
        };
        let _one = self.gc_lock.lock().map_err(stopped)?;
        let asked = self.gc_asked.load(Ordering::Acquire);
        self.gc_done.store(0, Ordering::Relaxed);
        self.gc_total.store(self.gc_pages()?, Ordering::Relaxed);
        let ends = {
            let _gate = self
                .gate
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            self.core()?.pages.hold = true;
            self.segments.set_hold(true)
        };
        let result = self.collect(&ends);
        if let Ok(mut core) = self.core() {
            core.pages.hold = false;
        }
        self.segments.set_hold(false);
        self.gc_total.store(0, Ordering::Relaxed);
        let mut report = result?;
        self.gc_runs.fetch_add(1, Ordering::Relaxed);
        self.gc_served.fetch_max(asked, Ordering::AcqRel);
        report.elapsed_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(
            pages = report.freed_pages,
            bytes = report.freed_bytes,
            us = report.elapsed_us,
            "garbage collected"
        );
        Ok(report)
    }

    /// Refuses to go on with a collection when the store is being closed.
    pub(super) fn gc_may_go(&self) -> Result<(), StoreError> {
        if self.gc_stop.load(Ordering::Relaxed) {
            return Err(StoreError::Refused("garbage collection was stopped".into()));
        }
        Ok(())
    }

    /// Pages in use: what a collection reads, more or less.
    fn gc_pages(&self) -> Result<u64, StoreError> {
        let core = self.core()?;
        Ok(core.pages.bitmap.len() - core.pages.bitmap.free())
    }

    /// Pages that a collection which runs now has read, and about how many it will read; nothing if none runs.
    pub fn gc_progress(&self) -> Option<(u64, u64)> {
        let (done, total) = (
            self.gc_done.load(Ordering::Relaxed),
            self.gc_total.load(Ordering::Relaxed),
        );
        (total > 0).then(|| (done.min(total), total))
    }

    /// Waits until all collections are done that were asked for before the call. If nobody sees to one, does it.
    ///
    /// # Errors
    /// As [`Store::gc`].
    pub fn gc_wait(&self) -> Result<GcReport, StoreError> {
        let start = Instant::now();
        let asked = self.gc_asked.load(Ordering::Acquire);
        let mut idle = 0;
        while self.gc_served.load(Ordering::Acquire) < asked {
            let busy = self.gc_busy.load(Ordering::Acquire);
            idle = if busy { 0 } else { idle + 1 };
            // The background thread takes a request at once, unless there is none, or a collection has failed.
            if idle > 100 {
                return self.gc();
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(GcReport {
            elapsed_us: u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX),
            ..GcReport::default()
        })
    }

    fn collect(&self, ends: &std::collections::BTreeMap<u32, u64>) -> Result<GcReport, StoreError> {
        let committed = self.commit_snapshot()?;
        let mut reader = Reader {
            store: self,
            pace: Pace::new(self),
            file: committed.file.as_ref(),
            pages: committed.map.len(),
        };
        fault::point("gc:mark");
        let mut garbage = committed.map;
        let mut report = GcReport::default();
        let existing = self.segments.existing()?;
        let mut blocks = Blocks::new(&existing);
        // What is packed needs no blocks, but its entries.
        let mut entries = Entries::load(&mut reader, committed.packs)?;
        tree::mark(
            &mut reader,
            committed.packs,
            &mut |id, _| {
                garbage.clear(id);
                report.live_pages += 1;
                Visit::Descend
            },
            None,
        )?;
        for root in committed.roots {
            tree::mark(
                &mut reader,
                root,
                &mut |id, _| {
                    if garbage.clear(id) {
                        report.live_pages += 1;
                        Visit::Descend
                    } else {
                        Visit::Skip
                    }
                },
                Some(&mut |key: &[u8], value: &[u8]| {
                    if crate::fs::key::split(key).is_some_and(|k| k.1 == crate::fs::key::EXTENT)
                        && let Some(e) = Extent::decode(value)
                    {
                        entries.mark(&e, &mut blocks);
                    }
                }),
            )?;
        }
        entries.settle(&blocks);
        if committed.packs != 0 {
            // Whoever looked a packed place up before it was dropped has read it when this returns.
            drop(self.gate.write());
            self.drop_entries(&entries, &mut reader.pace)?;
        }
        fault::point("gc:free");
        // Whoever looked a place up before it was dropped has read it when this returns.
        drop(self.gate.write());
        report.freed_bytes = self.sweep_segments(&existing, &blocks, ends)?;
        // In slices, with the lock free in between. While places are on hold nobody else frees any of these.
        self.core()?.pages.forget_deferred(&garbage);
        let words = usize::try_from(garbage.len().div_ceil(64)).unwrap_or(0);
        for slice in (0..words).step_by(16) {
            if (slice..slice + 16).any(|w| garbage.any_in_word(w)) {
                let from = slice as u64 * 64;
                let n = self.core()?.pages.free_garbage(&garbage, from, from + 1024);
                report.freed_pages += n;
                reader.pace.step();
            }
        }
        report.freed_bytes += self.sweep_packs(&mut reader, committed.packs, &entries)?;
        let mut core = self.core()?;
        core.pages.garbage = 0;
        core.garbage_bytes = 0;
        Ok(report)
    }

    fn sweep_segments(
        &self,
        existing: &[u32],
        blocks: &Blocks,
        ends: &std::collections::BTreeMap<u32, u64>,
    ) -> Result<u64, StoreError> {
        let mut freed = 0;
        let mut pace = Pace::new(self);
        // Blocks that were punched are never given out again, so one hole is made once: each time the host's writers of
        // that file wait.
        let mut punched = self.punched.lock().map_err(|_| {
            StoreError::Refused("the store stopped after an internal error in a collection".into())
        })?;
        punched.retain(|n, _| existing.binary_search(n).is_ok());
        let next = ends.get(&u32::MAX).copied().unwrap_or(0);
        for &n in existing {
            if u64::from(n) >= next {
                continue;
            }
            let len = self
                .segments
                .file(n)?
                .len()
                .map_err(StoreError::io("data", "reading a length"))?;
            let in_use = ends.get(&n).copied();
            let limit = in_use.unwrap_or(len).min(len.next_multiple_of(BLOCK));
            let Some(map) = blocks.segments.get(&n).filter(|m| !m.is_empty()) else {
                if limit == 0 && in_use.is_some() {
                    continue;
                }
                if in_use.is_none() {
                    self.segments.remove(n);
                } else {
                    self.segments.punch(n, 0, limit);
                }
                freed += limit;
                continue;
            };
            let holes = punched.entry(n).or_default();
            holes.grow(SEGMENT_BYTES / BLOCK);
            let mut from = 0;
            for b in 0..=limit / BLOCK {
                if b < limit / BLOCK && !map.is_set(b) && !holes.is_set(b) {
                    continue;
                }
                if b > from {
                    self.gc_may_go()?;
                    self.segments.punch(n, from * BLOCK, (b - from) * BLOCK);
                    for hole in from..b {
                        holes.set(hole);
                    }
                    pace.step();
                    freed += (b - from) * BLOCK;
                }
                from = b + 1;
            }
        }
        Ok(freed)
    }
}
