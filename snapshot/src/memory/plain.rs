//! Copying in the stop, without tracking: what cannot be tracked, and everything where userfaultfd is missing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::Span;
use super::copy::{Copied, Room, Source};
use super::error::Error;
use super::parent::Parent;
use super::place::Cpus;
use super::shared::lock;
use super::table::{Block, blocks_of};
use super::tracker::each;
use crate::image::index::Entry;
use crate::image::pages::PagesWriter;
use crate::image::pageset::{BLOCK, PageSet};
use crate::sparse;
use crate::sys::pagemap::{FILE, GUARD, PRESENT, SWAPPED, ZERO};

/// Copies all of a stopped process's own pages in `spans` (private mappings, of files too).
pub fn copy_all(
    pid: i32,
    space: u32,
    pages: &Arc<PagesWriter>,
    parent: Option<Arc<Parent>>,
    spans: &[Span],
) -> Result<Vec<Entry>, Error> {
    let source = Source::new(pid, space, pages.clone(), parent)?;
    let mut blocks = BTreeMap::new();
    copy_spans(&source, spans, &mut blocks)?;
    let blocks: Vec<_> = blocks.into_iter().collect();
    entries(&source, Cpus::of_this_thread(), &blocks, 2)
}

/// Copies a shared memory object, all of its data, while nobody writes it.
pub fn copy_object(
    pid: i32,
    space: u32,
    pages: &Arc<PagesWriter>,
    parent: Option<Arc<Parent>>,
    object: &File,
) -> Result<Vec<Entry>, Error> {
    let source = Source::new(pid, space, pages.clone(), parent)?;
    let failed = |source| Error::Open {
        pid,
        what: "shared memory",
        source,
    };
    let size = object.metadata().map_err(failed)?.len();
    let mut parts: BTreeMap<u64, PageSet> = BTreeMap::new();
    let mut at = 0;
    while at < size
        && let Some((data, hole)) = sparse::next(object, at, size).map_err(|e| failed(e.into()))?
    {
        for (block, _) in blocks_of(data..hole) {
            *parts.entry(block).or_default() |= PageSet::of_addresses(block, data, hole);
        }
        at = hole.max(at + 1);
    }
    let mut room = Room::new();
    let mut blocks = Vec::new();
    for (number, set) in parts {
        for r in set.byte_runs() {
            let offset = number * BLOCK + r.start as u64;
            // The last page may end beyond the object.
            let have = ((size.saturating_sub(offset)) as usize).min(r.len());
            room.block[r.start + have..r.end].fill(0);
            object
                .read_exact_at(&mut room.block[r.start..r.start + have], offset)
                .map_err(failed)?;
        }
        let c = source.sort(number, set, &set, &mut room)?;
        let mut b = Block::default();
        if let Some(slot) = b.merge(&c, pages) {
            pages.write(slot, &c.own, &room.block)?;
            b.sum = Some(crate::image::pages::sum(&c.own, &room.block));
        }
        blocks.push((number, b));
    }
    entries(&source, Cpus::of_this_thread(), &blocks, 1)
}

/// Pages that were read in the stop and are worked up after it: the stop pays for the reading only.
#[derive(Debug, Default)]
pub(super) struct Stash {
    spans: Vec<Span>,
    own: Vec<Span>,
    bytes: Vec<u8>,
}

impl Stash {
    /// Makes warm room for what the spans hold now, and some more.
    pub fn prepare(&mut self, source: &Source, spans: &[Span]) -> Result<(), Error> {
        let own = own_pages(source, spans)?;
        let len: u64 = own.iter().map(|r| r.end - r.start).sum();
        // Written, so that the pages are there.
        self.bytes = vec![1; len as usize + (256 << 10)];
        self.own.reserve(own.len() + 64);
        Ok(())
    }

    /// Reads the process's own pages of `spans`.
    pub fn read(&mut self, source: &Source, spans: &[Span]) -> Result<(), Error> {
        self.own = own_pages(source, spans)?;
        let len: u64 = self.own.iter().map(|r| r.end - r.start).sum();
        self.bytes.resize(len as usize, 0);
        self.spans = spans.to_vec();
        let read = source.mem.gather(&self.own, &mut self.bytes);
        read.map_err(|(address, source_error)| Error::Read {
            pid: source.pid,
            address,
            source: source_error,
        })
    }

    /// Sorts and writes what was read. `take` notes what was copied of a block, of all pages that were looked at, and gives
    /// the slot for it ([`Block::take_plain`]).
    pub fn work_up(
        &mut self,
        source: &Source,
        take: &mut dyn FnMut(u64, &Copied) -> Option<u64>,
    ) -> Result<(), Error> {
        let (own, bytes) = (
            std::mem::take(&mut self.own),
            std::mem::take(&mut self.bytes),
        );
        let mut parts: BTreeMap<u64, (PageSet, PageSet)> = BTreeMap::new();
        for span in std::mem::take(&mut self.spans) {
            for (block, _) in blocks_of(span.clone()) {
                parts.entry(block).or_default().0 |=
                    PageSet::of_addresses(block, span.start, span.end);
            }
        }
        let mut places: BTreeMap<u64, Vec<(u64, u64, usize)>> = BTreeMap::new();
        let mut at = 0;
        for r in own {
            for (block, _) in blocks_of(r.clone()) {
                let base = block * BLOCK;
                let (start, end) = (r.start.max(base), r.end.min(base + BLOCK));
                parts.entry(block).or_default().1 |= PageSet::of_addresses(block, start, end);
                let from = at + (start - r.start) as usize;
                places.entry(block).or_default().push((start, end, from));
            }
            at += (r.end - r.start) as usize;
        }
        let mut room = Room::new();
        for (number, (seen, there)) in parts {
            for &(start, end, from) in places.get(&number).into_iter().flatten() {
                let to = (start - number * BLOCK) as usize;
                let len = (end - start) as usize;
                room.block[to..to + len].copy_from_slice(&bytes[from..from + len]);
            }
            let c = source.sort(number, seen, &there, &mut room)?;
            if let Some(slot) = take(number, &c) {
                source.pages.write(slot, &c.own, &room.block)?;
            }
        }
        Ok(())
    }
}

/// The process's own pages of `spans`, by rising address. Spans that touch are looked at together.
fn own_pages(source: &Source, spans: &[Span]) -> Result<Vec<Span>, Error> {
    let mut joined: Vec<Span> = Vec::with_capacity(spans.len());
    let mut sorted = spans.to_vec();
    sorted.sort_unstable_by_key(|s| s.start);
    for s in sorted {
        match joined.last_mut() {
            Some(last) if last.end == s.start => last.end = s.end,
            _ => joined.push(s),
        }
    }
    let mut own: Vec<Span> = Vec::new();
    for s in joined {
        source
            .map
            .scan(s.start, s.end, PRESENT | SWAPPED, FILE | ZERO, |r| {
                if r.categories & GUARD == 0 {
                    own.push(r.start..r.end);
                }
            })
            .map_err(|e| source.scan_error(s.start, s.end, e))?;
    }
    Ok(own)
}

/// Copies the process's own pages of `spans` into `blocks`.
pub(super) fn copy_spans(
    source: &Source,
    spans: &[Span],
    blocks: &mut BTreeMap<u64, Block>,
) -> Result<(), Error> {
    // A piece at a time: a process may have gigabytes.
    for span in spans {
        let mut start = span.start;
        while start < span.end {
            let end = span.end.min((start / BLOCK + 16) * BLOCK);
            let mut stash = Stash::default();
            stash.read(source, std::slice::from_ref(&(start..end)))?;
            stash.work_up(source, &mut |number, copied| {
                let block = blocks.entry(number).or_default();
                block.take_plain(copied, &source.pages)
            })?;
            start = end;
        }
    }
    Ok(())
}

/// The index's entries of all blocks, with the sums that are still missing.
pub(super) fn entries(
    source: &Source,
    cpus: Cpus,
    blocks: &[(u64, Block)],
    threads: usize,
) -> Result<Vec<Entry>, Error> {
    let all = Mutex::new(Vec::with_capacity(blocks.len()));
    let numbers: Vec<u64> = (0..blocks.len() as u64).collect();
    each((source.pid, cpus), &numbers, threads, |i, room| {
        let (number, block) = &blocks[i as usize];
        let mut some = Vec::new();
        source.entries(*number, block, room, &mut some)?;
        lock(&all).append(&mut some);
        Ok(())
    })?;
    Ok(all
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner))
}
