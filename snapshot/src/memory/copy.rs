//! Copying pages out of a process into `pages`.

use std::sync::Arc;

use super::error::Error;
use super::parent::Parent;
use super::table::Block;
use crate::image::index::Entry;
use crate::image::pages::{PagesWriter, not_zero, sum};
use crate::image::pageset::{BLOCK, PageSet};
use crate::sys::pagemap::{FILE, GUARD, PRESENT, Pagemap, SWAPPED, ZERO};
use crate::sys::procmem::ProcMem;

/// Where pages come from, and where they go.
#[derive(Debug)]
pub(super) struct Source {
    pub pid: i32,
    pub space: u32,
    pub mem: ProcMem,
    pub map: Pagemap,
    pub pages: Arc<PagesWriter>,
    pub parent: Option<Arc<Parent>>,
}

/// Room to work in, one for each thread: warm memory is twice as fast as fresh.
#[derive(Debug)]
pub(super) struct Room {
    pub block: Vec<u8>,
    other: Vec<u8>,
}

impl Room {
    pub fn new() -> Self {
        Self {
            block: vec![0; BLOCK as usize],
            other: vec![0; BLOCK as usize],
        }
    }
}

/// Pages of a block that were read, and what is to become of them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Copied {
    /// The pages that were looked at.
    pub seen: PageSet,
    /// Of these, those to write into the slot.
    pub own: PageSet,
    /// Those that are the parent's.
    pub same: PageSet,
}

impl Source {
    pub fn new(
        pid: i32,
        space: u32,
        pages: Arc<PagesWriter>,
        parent: Option<Arc<Parent>>,
    ) -> Result<Self, Error> {
        let mem = ProcMem::open(pid).map_err(|source| Error::Open {
            pid,
            what: "mem",
            source,
        })?;
        let map = Pagemap::open(pid).map_err(|source| Error::Open {
            pid,
            what: "pagemap",
            source,
        })?;
        Ok(Self {
            pid,
            space,
            mem,
            map,
            pages,
            parent,
        })
    }

    /// The pages of `set` that exist and are the process's own, not zero pages or guards.
    pub fn existing(&self, block: u64, set: &PageSet) -> Result<PageSet, Error> {
        let mut found = PageSet::EMPTY;
        let base = block * BLOCK;
        let (Some(first), Some(last)) = (set.byte_runs().next(), set.byte_runs().last()) else {
            return Ok(found);
        };
        let (start, end) = (base + first.start as u64, base + last.end as u64);
        self.map
            .scan(start, end, PRESENT | SWAPPED, FILE | ZERO, |r| {
                if r.categories & GUARD == 0 {
                    found |= PageSet::of_addresses(block, r.start, r.end);
                }
            })
            .map_err(|source| self.scan_error(start, end, source))?;
        Ok(found & *set)
    }

    pub fn scan_error(&self, start: u64, end: u64, source: nix::Error) -> Error {
        match source {
            nix::Error::ESRCH => Error::Gone { pid: self.pid },
            _ => Error::Uffd {
                pid: self.pid,
                what: "scan the pages of",
                start,
                end,
                source,
            },
        }
    }

    /// Reads the pages `exist` of a block to their places in `room`; gives those that could not be read.
    pub fn fetch(&self, block: u64, exist: &PageSet, room: &mut Room) -> PageSet {
        let mut failed = PageSet::EMPTY;
        self.mem.read(
            block * BLOCK,
            exist.byte_runs(),
            &mut room.block,
            |at, _| {
                failed.add(at / 4096..at / 4096 + 1);
            },
        );
        failed
    }

    /// Sorts pages that are in `room`; those of `seen` that are not `there` are zero.
    pub fn sort(
        &self,
        block: u64,
        seen: PageSet,
        there: &PageSet,
        room: &mut Room,
    ) -> Result<Copied, Error> {
        let filled = not_zero(there, &room.block);
        let same = match &self.parent {
            Some(p) => p.same((self.space, block), &filled, &room.block, &mut room.other)?,
            None => PageSet::EMPTY,
        };
        Ok(Copied {
            seen,
            own: filled & !same,
            same,
        })
    }

    /// Pages that could not be read although they must be there.
    pub fn must_read(&self, block: u64, failed: &PageSet) -> Result<(), Error> {
        let Some(first) = failed.byte_runs().next() else {
            return Ok(());
        };
        let source = std::io::Error::from_raw_os_error(libc::EIO);
        Err(Error::Read {
            pid: self.pid,
            address: block * BLOCK + first.start as u64,
            source,
        })
    }

    /// The index's entries of a block, with its sums; also makes holes of what no longer counts.
    pub fn entries(
        &self,
        number: u64,
        b: &Block,
        room: &mut Room,
        out: &mut Vec<Entry>,
    ) -> Result<(), Error> {
        if let (Some(slot), false) = (b.slot, b.stale.is_empty()) {
            self.pages.punch(slot, &b.stale)?;
        }
        if let (Some(slot), false) = (b.slot, b.own.is_empty()) {
            let sum = match b.sum {
                Some(sum) => sum,
                None => {
                    self.pages.read(slot, &b.own, &mut room.block)?;
                    sum(&b.own, &room.block)
                }
            };
            out.push(Entry {
                space: self.space,
                layer: 0,
                block: number,
                slot,
                pages: b.own,
                sum,
            });
        }
        if let Some(p) = &self.parent {
            p.entries((self.space, number), &b.same, &mut room.other, out)?;
        }
        Ok(())
    }
}

impl Block {
    /// Takes over what was copied; the bytes are written by the caller to the slot that this gives, if any are.
    pub fn merge(&mut self, c: &Copied, pages: &PagesWriter) -> Option<u64> {
        self.sum = None;
        self.stale |= self.own & c.seen;
        self.own = (self.own & !c.seen) | c.own;
        self.stale &= !c.own;
        self.same = (self.same & !c.seen) | c.same;
        if c.own.is_empty() {
            return None;
        }
        Some(*self.slot.get_or_insert_with(|| pages.slot()))
    }

    /// The same with pages that are not tracked.
    pub fn take_plain(&mut self, c: &Copied, pages: &PagesWriter) -> Option<u64> {
        self.plain |= c.seen;
        self.merge(c, pages)
    }

    /// Keeps of the pages `among` only those in `keep`.
    pub fn keep(&mut self, among: &PageSet, keep: &PageSet) {
        let gone = *among & !*keep;
        let lost = self.own & gone;
        if !lost.is_empty() {
            self.stale |= lost;
            self.own &= !lost;
            self.sum = None;
        }
        self.same &= !gone;
    }
}
