//! What is known of each block.

use std::collections::{BTreeMap, BTreeSet};

use super::Span;
use super::ranges::Ranges;
use crate::image::pageset::{BLOCK, PAGES, PageSet};

/// Protection is lifted in pieces of this many pages, 64 KiB.
pub(super) const PIECE_PAGES: usize = 16;
/// Bytes of a piece.
pub(super) const PIECE: u64 = (PIECE_PAGES * 4096) as u64;
/// All pieces of a block.
pub(super) const ALL: u32 = u32::MAX;

/// A set of the 32 pieces of a block.
pub(super) type Pieces = u32;

/// One block of 2 MiB.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// Its slot in `pages`, once it has one.
    pub slot: Option<u64>,
    /// Pages whose bytes in the slot count.
    pub own: PageSet,
    /// Pages that have bytes in the slot that no longer count.
    pub stale: PageSet,
    /// Pages that are as in the parent snapshot.
    pub same: PageSet,
    /// Pages that were copied in the stop, from memory that is not tracked.
    pub plain: PageSet,
    /// Pages that did not exist at the point in time and were touched since.
    pub born: PageSet,
    /// Pieces that can be written without a fault.
    pub writable: Pieces,
    /// Pieces that must be copied (again).
    pub unsaved: Pieces,
    /// Mapped as a huge page when last looked at: lifted and copied as a whole, which leaves it whole.
    pub huge: bool,
    /// The sum over `own`, if it is known.
    pub sum: Option<[u8; 32]>,
}

/// All that is known, under one lock.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub blocks: BTreeMap<u64, Block>,
    /// The tracked ranges: all of `mapped` but the hot pages.
    pub ranges: Ranges,
    /// What is registered.
    pub mapped: Ranges,
    /// Pages that are not protected but read in the stop: `open` and `soft`.
    pub hot: Ranges,
    /// Those that must not be protected.
    pub open: BTreeSet<u64>,
    /// Those that had better not be; not if it takes a huge page apart.
    pub soft: Ranges,
    /// Blocks with writable pieces.
    pub writable: Vec<u64>,
    /// The point in time has been fixed.
    pub after: bool,
}

impl Table {
    /// Notes that pieces of a block can be written, or have been.
    pub fn mark(&mut self, block: u64, pieces: Pieces) {
        let b = self.blocks.entry(block).or_default();
        if b.writable == 0 && pieces != 0 {
            self.writable.push(block);
        }
        b.writable |= pieces;
        b.unsaved |= pieces;
    }

    /// How many pieces can be written.
    pub fn count_writable(&self) -> u64 {
        self.writable
            .iter()
            .filter_map(|b| self.blocks.get(b))
            .map(|b| u64::from(b.writable.count_ones()))
            .sum()
    }

    /// The tracked pages among some pieces of a block.
    pub fn tracked(&self, block: u64, pieces: Pieces) -> PageSet {
        let mut set = PageSet::EMPTY;
        let base = block * BLOCK;
        for s in self.ranges.cut(base, base + BLOCK) {
            set |= PageSet::of_addresses(block, s.start, s.end);
        }
        set & pages_of(pieces)
    }
}

/// Splits addresses into blocks, with the pieces of each that are touched.
pub(super) fn blocks_of(span: Span) -> impl Iterator<Item = (u64, Pieces)> {
    let last = span.end.saturating_sub(1) / BLOCK;
    (span.start / BLOCK..=last)
        .filter(move |_| span.start < span.end)
        .map(move |b| {
            let from = (span.start.saturating_sub(b * BLOCK) / PIECE).min(31);
            let to = ((span.end - 1 - b * BLOCK) / PIECE).min(31);
            (b, pieces(from as u32, to as u32))
        })
}

/// The pieces `from..=to`.
fn pieces(from: u32, to: u32) -> Pieces {
    (ALL >> (31 - (to - from))) << from
}

/// The pages of pieces.
pub(super) fn pages_of(pieces: Pieces) -> PageSet {
    if pieces == ALL {
        return PageSet::FULL;
    }
    let mut set = PageSet::EMPTY;
    for p in (0..PAGES / PIECE_PAGES).filter(|p| pieces >> p & 1 != 0) {
        set.add(p * PIECE_PAGES..(p + 1) * PIECE_PAGES);
    }
    set
}

/// The pieces that some pages are in.
pub(super) fn touched(pages: &PageSet) -> Pieces {
    pages
        .runs()
        .flatten()
        .fold(0, |p, i| p | 1 << (i / PIECE_PAGES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_split_into_blocks_and_pieces() {
        let at = |b: u64, p: u64| b * BLOCK + p * PIECE;
        let of = |s: Span| blocks_of(s).collect::<Vec<_>>();
        assert_eq!(of(at(3, 1)..at(3, 3)), [(3, 0b110)]);
        assert_eq!(
            of(at(3, 31)..at(5, 0) + 4096),
            [(3, 1 << 31), (4, ALL), (5, 1)]
        );
        assert_eq!(of(at(3, 0)..at(4, 0)), [(3, ALL)]);
        assert_eq!(of(5..5), []);
        assert_eq!(pages_of(0b101), PageSet::of(0..16) | PageSet::of(32..48));
        assert_eq!(pages_of(ALL), PageSet::FULL);
    }
}
