//! The user processes of a machine, and what each has mapped of the guest's memory.
//!
//! Reading all mappings of a process costs about a microsecond for each, and a guest with databases has tens of thousands.
//! So they are read once, and followed by the kernel's record of new mappings. That has no word of what is unmapped; but a
//! process that has as many bytes mapped as the old and the new mappings cover together has unmapped nothing that it has
//! not mapped again, so it has just these. All else is read anew.

use super::Error;
use super::layout::Memory;
use super::learn::user_number;
use super::manifest::{Piece, User};
use crate::proc::{self, Map};
use crate::sys::perf::Mapping;
use std::collections::{BTreeMap, HashMap};

/// By what it is seen that a process is the same, and has as much mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    start_time: u64,
    /// How much is mapped.
    bytes: u64,
}

impl Stamp {
    /// That of a process now.
    pub fn of(pid: i32) -> Result<Self, Error> {
        let stat = proc::stat(pid)?;
        Ok(Self {
            start_time: stat.start_time,
            bytes: stat.vsize,
        })
    }
}

/// What is mapped at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    end: u64,
    /// Of the guest's memory: shared, offset, PROT_ bits.
    of: Option<(bool, u64, i32)>,
}

impl Span {
    /// The same from `by` bytes on.
    fn behind(self, by: u64) -> Self {
        let of = self.of.map(|(shared, at, prot)| (shared, at + by, prot));
        Self { of, ..self }
    }
}

/// What a process has mapped, by first address.
#[derive(Debug, Clone, Default)]
pub struct Space(BTreeMap<u64, Span>);

impl Space {
    /// Of a list of mappings.
    pub fn new(maps: &[Map], memory: &Memory) -> Self {
        let span = |m: &Map| Span {
            end: m.end,
            of: memory
                .has(m.dev, m.ino)
                .then_some((m.shared, m.offset, m.prot)),
        };
        Self(maps.iter().map(|m| (m.start, span(m))).collect())
    }

    /// Maps something in the place of what is there. How many bytes had nothing before.
    fn put(&mut self, start: u64, span: Span) -> u64 {
        let end = span.end;
        let mut fresh = end - start;
        let before = self.0.range_mut(..start).next_back();
        if let Some((&at, old)) = before.filter(|(_, old)| old.end > start) {
            let cut = *old;
            old.end = start;
            fresh -= cut.end.min(end) - start;
            if cut.end > end {
                self.0.insert(end, cut.behind(end - at));
            }
        }
        while let Some((&at, &old)) = self.0.range(start..end).next() {
            self.0.remove(&at);
            fresh -= old.end.min(end) - at;
            if old.end > end {
                self.0.insert(end, old.behind(end - at));
            }
        }
        self.0.insert(start, span);
        fresh
    }

    /// Puts what was mapped, in the order of time, in its place. How many bytes had nothing before.
    fn follow(&mut self, mut made: Vec<Mapping>, memory: &Memory) -> u64 {
        made.sort_by_key(|m| m.time);
        let mut fresh = 0;
        for m in made.iter().filter(|m| m.len > 0) {
            let span = Span {
                end: m.start + m.len,
                of: memory
                    .has(m.dev, m.ino)
                    .then_some((m.shared, m.offset, m.prot as i32)),
            };
            fresh += self.put(m.start, span);
        }
        fresh
    }

    /// What is of the guest's memory, in the order of addresses, in as few pieces as can be. All else is left over from
    /// main, and no matter.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        let mut spans = self.0.iter().peekable();
        std::iter::from_fn(move || {
            loop {
                let (&start, span) = spans.next()?;
                let Some((shared, offset, prot)) = span.of else {
                    continue;
                };
                let mut end = span.end;
                let goes_on = |at: u64, next: &Span, end: u64| {
                    at == end && next.of == Some((shared, offset + (end - start), prot))
                };
                while let Some((_, next)) = spans.next_if(|(at, next)| goes_on(**at, next, end)) {
                    end = next.end;
                }
                return Some(Piece {
                    shared,
                    start,
                    len: end - start,
                    offset,
                    prot,
                });
            }
        })
    }
}

/// A user process as it was last seen.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its number in the machine.
    pub number: i32,
    /// When it was.
    pub ran: proc::Ran,
    /// What it had mapped.
    pub space: Space,
    /// As of when that was so; none if it was not to be said.
    pub stamp: Option<Stamp>,
}

impl Known {
    /// Reads it; `None` if it is no user process, or has ended.
    pub fn read(pid: i32, main: i32, memory: &Memory) -> Option<Self> {
        Some(Self {
            number: user_number(pid, main)?,
            ran: proc::ran(pid).ok()?,
            space: Space::new(&proc::maps(pid).ok()?, memory),
            stamp: None,
        })
    }

    /// Brings it up to date by what the process has mapped since. Says whether that is all.
    pub fn follow(&mut self, made: Vec<Mapping>, now: Stamp, memory: &Memory) -> bool {
        let Some(then) = self.stamp.take() else {
            return false;
        };
        let bytes = then.bytes + self.space.follow(made, memory);
        let all = Stamp { bytes, ..then } == now;
        self.stamp = all.then_some(now);
        all
    }
}

/// The user processes, by our number.
pub type Users = HashMap<i32, Known>;

/// As the manifest has them, by rising number.
pub fn list(all: &Users) -> Vec<User> {
    let mut out: Vec<User> = all
        .values()
        .map(|k| User {
            pid: k.number,
            pieces: k.space.pieces().collect(),
        })
        .collect();
    out.sort_unstable_by_key(|u| u.pid);
    out
}

/// The user processes as they are now.
pub fn present(main: i32, memory: &Memory) -> Result<Users, Error> {
    let all = proc::children(main)?.into_iter();
    Ok(all
        .filter_map(|pid| Some((pid, Known::read(pid, main, memory)?)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn memory() -> Memory {
        Memory {
            id: (1, 2),
            fd: 3,
            file: tempfile::tempfile().unwrap(),
            len: 1 << 20,
        }
    }

    /// The mappings of a process, page by page: what is the guest's memory there.
    type Model = BTreeMap<u64, Option<(bool, u64, i32)>>;

    fn pages(pieces: impl Iterator<Item = Piece>) -> Model {
        let mut out = Model::new();
        for p in pieces {
            for i in 0..p.len / PAGE {
                let of = (p.shared, p.offset + i * PAGE, p.prot);
                assert!(out.insert(p.start / PAGE + i, Some(of)).is_none());
            }
        }
        out
    }

    #[derive(Debug, Clone)]
    enum Op {
        Map(u64, u64, u64, i32, bool),
        Unmap(u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let place = (0..24u64, 1..6u64);
        prop_oneof![
            3 => (place.clone(), 0..64u64, 0..8i32, any::<bool>())
                .prop_map(|((at, n), offset, prot, ours)| Op::Map(at, n, offset, prot, ours)),
            1 => place.prop_map(|(at, n)| Op::Unmap(at, n)),
        ]
    }

    proptest! {
        /// Whenever it says that it has followed, it has what the process has; and it says so if nothing was unmapped.
        #[test]
        fn followed_is_what_is_there(rounds in prop::collection::vec(prop::collection::vec(op(), 0..6), 1..8)) {
            let memory = memory();
            let mut model = Model::new();
            let stamp = |m: &Model| Stamp { start_time: 7, bytes: m.len() as u64 * PAGE };
            let mut known = Known {
                number: 1,
                ran: [0; 3],
                space: Space::default(),
                stamp: Some(stamp(&model)),
            };
            let mut time = 0;
            for round in rounds {
                let (mut made, mut unmapped) = (Vec::new(), false);
                for op in round {
                    time += 1;
                    match op {
                        Op::Map(at, n, offset, prot, ours) => {
                            for i in 0..n {
                                let of = ours.then_some((true, (offset + i) * PAGE, prot));
                                model.insert(at + i, of);
                            }
                            made.push(Mapping {
                                pid: 9,
                                start: at * PAGE,
                                dev: 1,
                                ino: if ours { 2 } else { 0 },
                                offset: offset * PAGE,
                                len: n * PAGE,
                                prot: prot as u32,
                                shared: true,
                                time,
                            });
                        }
                        Op::Unmap(at, n) => {
                            unmapped |= (at..at + n).any(|p| model.remove(&p).is_some());
                        }
                    }
                }
                // Two processors' records, one behind the other.
                made.sort_by_key(|m| m.time % 2);
                let ours = |m: &Model| m.clone().into_iter().filter(|p| p.1.is_some()).collect::<Model>();
                if known.follow(made, stamp(&model), &memory) {
                    prop_assert_eq!(pages(known.space.pieces()), ours(&model));
                } else {
                    prop_assert!(unmapped);
                    known.space = Space::default();
                    for (&page, &of) in &model {
                        known.space.put(page * PAGE, Span { end: (page + 1) * PAGE, of });
                    }
                    known.stamp = Some(stamp(&model));
                }
            }
        }
    }

    #[test]
    fn neighbours_that_go_on_are_one_piece() {
        let mut space = Space::default();
        let of = |offset| Some((true, offset, 3));
        for (start, offset) in [(0, PAGE), (PAGE, 2 * PAGE), (2 * PAGE, 9 * PAGE)] {
            let end = start + PAGE;
            space.put(
                start,
                Span {
                    end,
                    of: of(offset),
                },
            );
        }
        let found: Vec<_> = space.pieces().map(|p| (p.start, p.len, p.offset)).collect();
        assert_eq!(found, [(0, 2 * PAGE, PAGE), (2 * PAGE, PAGE, 9 * PAGE)]);
    }
}
