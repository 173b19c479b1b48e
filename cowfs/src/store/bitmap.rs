//! A bit for each page: which places of `meta` are taken.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::superblock::Run;

/// A bit per page.
#[derive(Debug, Clone, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: u64,
    free: u64,
    hint: usize,
}

impl Bitmap {
    /// From little-endian words that cover `bits` pages.
    pub fn from_bytes(bytes: &[u8], bits: u64) -> Option<Self> {
        let n = usize::try_from(bits.div_ceil(64)).ok()?;
        if bytes.len() != n * 8 {
            return None;
        }
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|c| c.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b)))
            .collect();
        // Bits of pages that there are not would be counted as taken.
        let beyond = bits % 64;
        if beyond != 0 && words.last().is_some_and(|w| w >> beyond != 0) {
            return None;
        }
        let used: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
        Some(Self {
            words,
            bits,
            free: bits.checked_sub(used)?,
            hint: 0,
        })
    }

    /// Little-endian words.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// True when it covers no page.
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// Pages covered.
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Free pages.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Makes room for more pages, free.
    pub fn grow(&mut self, bits: u64) {
        if bits > self.bits {
            self.free += bits - self.bits;
            self.bits = bits;
            self.words
                .resize(usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX), 0);
        }
    }

    fn place(bit: u64) -> (usize, u64) {
        (
            usize::try_from(bit / 64).unwrap_or(usize::MAX),
            1 << (bit % 64),
        )
    }

    /// True if the page is taken.
    pub fn is_set(&self, bit: u64) -> bool {
        let (w, m) = Self::place(bit);
        self.words.get(w).is_some_and(|v| v & m != 0)
    }

    /// Takes a page; false if it was taken or does not exist.
    pub fn set(&mut self, bit: u64) -> bool {
        let (w, m) = Self::place(bit);
        if bit >= self.bits || self.words[w] & m != 0 {
            return false;
        }
        self.words[w] |= m;
        self.free -= 1;
        true
    }

    /// Frees a page; false if it was free.
    pub fn clear(&mut self, bit: u64) -> bool {
        let (w, m) = Self::place(bit);
        if bit >= self.bits || self.words[w] & m == 0 {
            return false;
        }
        self.words[w] &= !m;
        self.free += 1;
        self.hint = self.hint.min(w);
        true
    }

    /// Takes the first free page.
    pub fn take(&mut self) -> Option<u64> {
        for w in self.hint..self.words.len() {
            let free = !self.words[w];
            if free != 0 {
                let bit = w as u64 * 64 + u64::from(free.trailing_zeros());
                if bit >= self.bits {
                    return None;
                }
                self.hint = w;
                self.set(bit);
                return Some(bit);
            }
        }
        None
    }

    /// Takes the first `n` free pages in a row; `None` if there are none.
    pub fn take_run(&mut self, n: u64) -> Option<Run> {
        let run = self.free_runs().find(|r| r.1 >= n)?;
        self.set_run((run.0, n));
        Some((run.0, n))
    }

    /// Takes `n` free pages in at most `max` runs, the longest there are; `None` if that is not possible.
    pub fn take_runs(&mut self, n: u64, max: usize) -> Option<Vec<Run>> {
        if n == 0 {
            return Some(Vec::new());
        }
        if n > self.free || max == 0 {
            return None;
        }
        if let Some(run) = self.take_run(n) {
            return Some(vec![run]);
        }
        let mut best = BinaryHeap::new();
        for (first, pages) in self.free_runs() {
            best.push(Reverse((pages, first)));
            if best.len() > max {
                best.pop();
            }
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut left = n;
        for Reverse((pages, first)) in best.into_sorted_vec() {
            let take = pages.min(left);
            left -= take;
            if take > 0 {
                runs.push((first, take));
            }
        }
        if left > 0 {
            return None;
        }
        for r in &runs {
            self.set_run(*r);
        }
        Some(runs)
    }

    /// Marks pages as taken.
    pub fn set_run(&mut self, run: Run) {
        for bit in run.0..run.0 + run.1 {
            self.set(bit);
        }
    }

    /// Frees pages.
    pub fn clear_run(&mut self, run: Run) {
        for bit in run.0..run.0 + run.1 {
            self.clear(bit);
        }
    }

    /// True if one of 64 pages from a multiple of 64 on is taken.
    pub fn any_in_word(&self, word: usize) -> bool {
        self.words.get(word).is_some_and(|w| *w != 0)
    }

    /// Runs of free pages, in order.
    fn free_runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut bit = (self.hint as u64 * 64).max(1);
        std::iter::from_fn(move || {
            bit = self.next(bit, false)?;
            let end = self.next(bit, true).unwrap_or(self.bits);
            let run = (bit, end - bit);
            bit = end;
            Some(run)
        })
    }

    /// The first page from `from` on that is taken (or free), by words.
    fn next(&self, from: u64, taken: bool) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let (mut w, _) = Self::place(from);
        let mut mask = u64::MAX << (from % 64);
        while let Some(word) = self.words.get(w) {
            let found = (if taken { *word } else { !*word }) & mask;
            if found != 0 {
                let bit = w as u64 * 64 + u64::from(found.trailing_zeros());
                return (bit < self.bits).then_some(bit);
            }
            mask = u64::MAX;
            w += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered() -> Bitmap {
        let mut b = Bitmap::default();
        b.grow(1000);
        b.set(0);
        for bit in 1..1000 {
            b.set(bit);
        }
        for bit in (2..600).step_by(3) {
            b.clear(bit);
        }
        b.clear_run((700, 5));
        b
    }

    #[test]
    fn a_blob_fits_in_pieces() {
        let mut b = scattered();
        let free = b.free();
        assert_eq!(b.take_run(5), Some((700, 5)));
        assert_eq!(b.take_run(2), None);
        b.clear_run((700, 5));
        assert_eq!(b.take_runs(20, 10), None, "not in so few runs");
        assert_eq!(b.free(), free, "nothing was taken");
        let runs = b.take_runs(20, 16).unwrap();
        assert_eq!(runs.iter().map(|r| r.1).sum::<u64>(), 20);
        assert_eq!(b.free(), free - 20);
        for r in runs {
            for bit in r.0..r.0 + r.1 {
                assert!(b.is_set(bit));
                assert!(b.clear(bit), "given out twice");
            }
        }
    }

    #[test]
    fn the_end_of_the_map_is_the_end_of_a_run() {
        let mut b = Bitmap::default();
        b.grow(70);
        b.set(0);
        assert_eq!(b.take_run(70), None);
        assert_eq!(b.take_run(69), Some((1, 69)));
        assert_eq!(b.take(), None);
        assert_eq!(b.take_runs(1, 1), None);
    }
}
