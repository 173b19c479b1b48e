//! What of a process's memory is still the snapshot's: which addresses, and which addresses they were at the snapshot. It
//! changes with what the process does, and is made from the log of that alone.

use crate::sys::fill::Event;
use std::collections::BTreeMap;

/// The memory of one process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owed {
    /// By first address: the end, and the address at the snapshot.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl Owed {
    /// All of some ranges.
    #[must_use]
    pub fn new(ranges: &[(u64, u64)]) -> Owed {
        Owed {
            pieces: ranges.iter().map(|&(a, b)| (a, (b, a))).collect(),
        }
    }

    /// The piece an address is in: its start, end, and address at the snapshot.
    #[must_use]
    pub fn piece(&self, addr: u64) -> Option<(u64, u64, u64)> {
        let (&start, &(end, was)) = self.pieces.range(..=addr).next_back()?;
        (addr < end).then_some((start, end, was))
    }

    /// The first piece that ends after an address.
    #[must_use]
    pub fn next(&self, addr: u64) -> Option<(u64, u64, u64)> {
        self.piece(addr).or_else(|| {
            let (&start, &(end, was)) = self.pieces.range(addr..).next()?;
            Some((start, end, was))
        })
    }

    /// A range is no longer the snapshot's.
    pub fn cut(&mut self, start: u64, end: u64) {
        self.take(start, end);
    }

    /// Takes a range out; its pieces.
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, u64, u64)> {
        let mut taken = Vec::new();
        if start >= end {
            return taken;
        }
        let first = self.piece(start).map_or(start, |p| p.0);
        let hit: Vec<u64> = self.pieces.range(first..end).map(|(&a, _)| a).collect();
        for a in hit {
            let Some((b, was)) = self.pieces.remove(&a) else {
                continue;
            };
            if a < start {
                self.pieces.insert(a, (start, was));
            }
            if b > end {
                self.pieces.insert(end, (b, was + (end - a)));
            }
            let (from, to) = (a.max(start), b.min(end));
            taken.push((from, to, was + (from - a)));
        }
        taken
    }

    /// Memory moved. What was at the new place is gone, as is the content of the old one, even if that is still mapped.
    pub fn moved(&mut self, from: u64, to: u64, len: u64) {
        let taken = self.take(from, from.saturating_add(len));
        self.cut(to, to.saturating_add(len));
        for (a, b, was) in taken {
            let at = to + (a - from);
            self.pieces.insert(at, (at + (b - a), was));
        }
    }

    /// Applies an event that is not a fork.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Remap(from, to, len) => self.moved(from, to, len),
            Event::Remove(start, end) | Event::Unmap(start, end) => self.cut(start, end),
            Event::Fault(_) | Event::Fork(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_are_cut_and_moved() {
        let mut o = Owed::new(&[(0x1000, 0x9000)]);
        o.cut(0x3000, 0x4000);
        assert_eq!(o.piece(0x2fff), Some((0x1000, 0x3000, 0x1000)));
        assert_eq!(o.piece(0x3000), None);
        o.moved(0x2000, 0x20000, 0x4000);
        assert_eq!(o.piece(0x20000), Some((0x20000, 0x21000, 0x2000)));
        assert_eq!(o.piece(0x21000), None);
        assert_eq!(o.piece(0x23000), Some((0x22000, 0x24000, 0x4000)));
        assert_eq!(o.piece(0x2000), None);
        assert_eq!(o.next(0x2000), Some((0x6000, 0x9000, 0x6000)));
    }

    proptest! {
        /// The same as an array with one element a page.
        #[test]
        fn it_is_what_an_array_would_be(
            ops in prop::collection::vec((0u8..2, 0u64..64, 0u64..64, 1u64..16), 0..60)
        ) {
            let mut o = Owed::new(&[(0, 40)]);
            let mut model: Vec<Option<u64>> = (0..100).map(|i| (i < 40).then_some(i)).collect();
            for (op, a, b, len) in ops {
                if op == 0 {
                    o.cut(a, a + len);
                    (a..a + len).for_each(|i| model[i as usize] = None);
                } else if a + len <= b || b + len <= a {
                    o.moved(a, b, len);
                    for i in 0..len {
                        model[(b + i) as usize] = model[(a + i) as usize].take();
                    }
                }
            }
            for (i, want) in model.iter().enumerate() {
                let i = i as u64;
                prop_assert_eq!(o.piece(i).map(|(s, _, was)| was + (i - s)), *want);
            }
        }
    }
}
