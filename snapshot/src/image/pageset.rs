//! Sets of the pages of one block.

use std::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, Not, Range};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a block, and of a slot.
pub const BLOCK: u64 = 2 << 20;
/// Pages of a block.
pub const PAGES: usize = 512;

/// Some of the 512 pages of a block.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PageSet([u64; 8]);

impl PageSet {
    /// None of them.
    pub const EMPTY: Self = Self([0; 8]);
    /// All.
    pub const FULL: Self = Self([u64::MAX; 8]);

    /// The pages whose numbers are in `pages`.
    pub fn of(pages: Range<usize>) -> Self {
        let mut set = Self::EMPTY;
        set.add(pages);
        set
    }

    /// Those that lie wholly or in part in the addresses `start..end` of block number `block`.
    pub fn of_addresses(block: u64, start: u64, end: u64) -> Self {
        let base = block.saturating_mul(BLOCK);
        let from = start.saturating_sub(base).min(BLOCK) as usize / PAGE;
        let to = (end.saturating_sub(base).min(BLOCK) as usize).div_ceil(PAGE);
        Self::of(from..to)
    }

    /// Whether page `i` is in it.
    pub fn has(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 != 0
    }

    /// Adds pages.
    pub fn add(&mut self, pages: Range<usize>) {
        for (w, word) in self.0.iter_mut().enumerate() {
            let (from, to) = (pages.start.max(w * 64), pages.end.min(w * 64 + 64));
            if from < to {
                *word |= (u64::MAX >> (64 - (to - from))) << (from - w * 64);
            }
        }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// How many pages.
    pub fn count(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// The pages in rows, by rising number.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let set = *self;
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = set.next(at, true)?;
            at = set.next(start, false).unwrap_or(PAGES);
            Some(start..at)
        })
    }

    /// The same in bytes from the block's start.
    pub fn byte_runs(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        self.runs().map(|r| r.start * PAGE..r.end * PAGE)
    }

    fn next(&self, from: usize, value: bool) -> Option<usize> {
        let mut at = from;
        while at < PAGES {
            let word = if value {
                self.0[at / 64]
            } else {
                !self.0[at / 64]
            } >> (at % 64);
            if word != 0 {
                return Some(at + word.trailing_zeros() as usize);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// As in the index: bit i in byte i/8, lowest first.
    pub fn to_bytes(&self) -> [u8; 64] {
        let mut out = [0; 64];
        for (o, w) in out.chunks_exact_mut(8).zip(self.0) {
            o.copy_from_slice(&w.to_le_bytes());
        }
        out
    }

    /// From the index.
    pub fn from_bytes(bytes: &[u8; 64]) -> Self {
        let mut set = Self::EMPTY;
        for (word, b) in set.0.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*b);
        }
        set
    }
}

impl BitAnd for PageSet {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }
}

impl BitOr for PageSet {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }
}

impl Not for PageSet {
    type Output = Self;
    fn not(self) -> Self {
        Self(self.0.map(|w| !w))
    }
}

impl BitAndAssign for PageSet {
    fn bitand_assign(&mut self, other: Self) {
        *self = *self & other;
    }
}

impl BitOrAssign for PageSet {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_name_exactly_the_pages_of_the_set(ranges in prop::collection::vec((0usize..=512, 0usize..=512), 0..6)) {
            let mut model = [false; PAGES];
            let mut set = PageSet::EMPTY;
            for (a, b) in ranges {
                set.add(a..b);
                (a..b).for_each(|i| model[i] = true);
            }
            let listed: Vec<usize> = set.runs().flatten().collect();
            let wanted: Vec<usize> = (0..PAGES).filter(|&i| model[i]).collect();
            prop_assert_eq!(&listed, &wanted);
            prop_assert_eq!(set.count(), wanted.len());
            prop_assert!((0..PAGES).all(|i| set.has(i) == model[i]));
            prop_assert_eq!(PageSet::from_bytes(&set.to_bytes()), set);
            prop_assert_eq!((!set).runs().flatten().count(), PAGES - wanted.len());
        }
    }

    #[test]
    fn addresses_are_cut_to_the_block() {
        let base = 7 * BLOCK;
        assert_eq!(PageSet::of_addresses(7, 0, u64::MAX), PageSet::FULL);
        assert_eq!(
            PageSet::of_addresses(7, base + 4096, base + 8192),
            PageSet::of(1..2)
        );
        assert!(PageSet::of_addresses(7, 0, base).is_empty());
        assert!(PageSet::of_addresses(7, base + BLOCK, u64::MAX).is_empty());
    }
}
