//! Memory that many copies share: the resuming process has it filled, aside, and each copy, which is a fork of it, moves it
//! to its place. What nobody writes is there once.

use super::memory::{free_place, is_lazy};
use super::source::{BLOCK, PageSource, pieces};
use super::{Error, sys};
use crate::image::manifest::{Manifest, Range};
use crate::sys::template::Mapped;
use std::collections::HashMap;

/// The private memory of all processes of a snapshot.
#[derive(Debug, Default)]
pub struct Template {
    /// Where a range of a space is, by space and first address.
    at: HashMap<(u32, u64), u64>,
    mapped: Vec<Mapped>,
}

impl Template {
    /// Maps and fills it.
    pub fn new(m: &Manifest, source: &dyn PageSource) -> Result<Template, Error> {
        let maps = crate::proc::maps(std::process::id().cast_signed())?;
        let mut used: Vec<(u64, u64)> = maps.iter().map(|m| (m.start, m.end)).collect();
        let all = || {
            let spaces = m.spaces.iter().zip(0u32..);
            spaces.flat_map(|(s, n)| s.ranges.iter().filter(|r| is_lazy(r)).map(move |r| (n, r)))
        };
        for s in &m.spaces {
            used.extend(s.ranges.iter().map(|r| (r.start, r.end)));
        }
        let room = |r: &Range| (r.end - r.start).saturating_add(2 * BLOCK);
        let total = all().fold(0u64, |sum, (_, r)| sum.saturating_add(room(r)));
        let mut next = free_place(&mut used, total.max(BLOCK))?;
        let mut t = Template::default();
        let files = source.files();
        for (space, r) in all() {
            let found = pieces(source, space, r.start, r.end);
            if found.is_empty() && r.prot & libc::PROT_WRITE == 0 {
                // Room that is kept free: nothing to share.
                continue;
            }
            // As far into a block as at its place: then whole page tables can be moved. A gap keeps ranges apart.
            let at = next + (r.start % BLOCK + BLOCK - next % BLOCK) % BLOCK;
            next = at + (r.end - r.start) + 4096;
            let mapped = Mapped::new(at, r.end - r.start, r.flags).map_err(sys("mmap"))?;
            for run in filled(r, &found) {
                mapped.make_huge(run.start - r.start..run.end - r.start);
            }
            for (addr, len, layer, offset) in found {
                let file = files.get(layer as usize);
                let file = file.ok_or(Error::Manifest("no such layer"))?;
                mapped
                    .read(addr - r.start, len, *file, offset)
                    .map_err(sys("reading pages"))?;
            }
            t.at.insert((space, r.start), at);
            t.mapped.push(mapped);
        }
        Ok(t)
    }

    /// Where a range of a space is.
    pub(super) fn place(&self, space: u32, r: &Range) -> Option<u64> {
        self.at.get(&(space, r.start)).copied()
    }

    /// A fork that needs it no more unmaps it.
    pub(super) fn leave(&self) {
        self.mapped.iter().for_each(Mapped::leave);
    }
}

/// Blocks of a range, those in a row together, that are filled by half at least: with less, huge pages would take much more
/// than what is there.
fn filled(r: &Range, found: &[(u64, u64, u32, u64)]) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    for part in found.chunk_by(|a, b| a.0 / BLOCK == b.0 / BLOCK) {
        let start = part[0].0 / BLOCK * BLOCK;
        let bytes: u64 = part.iter().map(|p| p.1).sum();
        if bytes < BLOCK / 2 || start < r.start || r.end - start < BLOCK {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += BLOCK,
            _ => runs.push(start..start + BLOCK),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::Backing;

    #[test]
    fn blocks_that_are_well_filled_are_found() {
        let r = Range {
            start: BLOCK / 2,
            end: 6 * BLOCK,
            prot: 3,
            flags: 0,
            backing: Backing::Anonymous,
            advice: Vec::new(),
            name: None,
        };
        let half = BLOCK / 2;
        let found = [
            // Not all of the first block is the range's.
            (half, half, 0, 0),
            (BLOCK, BLOCK, 0, 0),
            (2 * BLOCK, half / 2, 0, 0),
            (2 * BLOCK + half, half / 2, 0, 0),
            (3 * BLOCK, half - 4096, 0, 0),
            (5 * BLOCK, half, 0, 0),
        ];
        assert_eq!(filled(&r, &found), [BLOCK..3 * BLOCK, 5 * BLOCK..6 * BLOCK]);
    }
}
