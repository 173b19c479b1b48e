//! Packing what checkpoints hold.
//!
//! What only checkpoints hold goes into packs. What heads hold as well stays where it is, so that it is read at full
//! speed, but gets sums, as it cannot change either. The space comes back by a collection at the end, which begins with a
//! commit: until then both copies are there, so a crash at any step leaves either.

use rustc_hash::FxHashMap;

use super::ranges::{self, Range};
use super::records::{Entry, Name, name_of};
use super::{HEAD, Writer, chunker};
use crate::fault;
use crate::fs::Extent;
use crate::store::pace::Pace;
use crate::store::segments::Place;
use crate::store::{Ordering, Store, StoreError};
use crate::tree::{self, PageId, Visit};

/// Segments looked at at a time, which bounds memory: all trees are walked once for each so many.
const WINDOW: u32 = 64;
/// Bytes packed before others may collect.
const SLICE: u64 = 32 << 20;
/// Bytes read at once.
const READ: usize = 1 << 20;

/// What to pack.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// Numbers of checkpoints; all of them if there is none.
    pub checkpoints: Vec<u64>,
    /// Everything that these hold; otherwise not what heads hold as well, which gets sums.
    pub whole: bool,
    /// Level of compression, 1 to 22.
    pub level: i32,
}

impl PackOptions {
    /// The level that is used unless told otherwise.
    pub const LEVEL: i32 = 9;
}

/// What packing did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PackReport {
    /// Bytes of files that are packed now and were not before.
    pub packed_bytes: u64,
    /// Of these, bytes of chunks that no pack had.
    pub new_bytes: u64,
    /// Bytes that the new chunks take in packs.
    pub stored_bytes: u64,
    /// Bytes that stay where they are, and have sums now.
    pub summed_bytes: u64,
    /// Bytes given back by the collection at the end.
    pub freed_bytes: u64,
    /// Places whose bytes do not have their sum, and stay as they are: segment, offset.
    pub damaged: Vec<(u32, u64)>,
}

/// Roots kept from collections.
struct Pins<'a> {
    store: &'a Store,
    roots: Vec<PageId>,
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        for r in &self.roots {
            self.store.unpin_root(*r);
        }
    }
}

/// What there is to do in a window.
#[derive(Debug, Default)]
struct Plan {
    pack: Vec<Range>,
    sum: Vec<Range>,
    /// Ranges that have a sum, to be packed as they are.
    promote: Vec<(Range, Name)>,
}

impl Store {
    /// Packs what checkpoints hold, then gives the space back.
    ///
    /// # Errors
    /// Not found; a pack that runs already; what the host says. What was packed by then stays packed.
    pub fn pack(&self, o: &PackOptions) -> Result<PackReport, StoreError> {
        let Ok(_one) = self.pack_lock.try_lock() else {
            return Err(StoreError::Refused(
                "another pack of this store is at work; wait for it".into(),
            ));
        };
        self.make_index()?;
        let mut report = PackReport::default();
        let pins = self.pin_checkpoints(o)?;
        self.packs.done.store(0, Ordering::Relaxed);
        self.packs.total.store(0, Ordering::Relaxed);
        let end = self.segments.next_segment();
        for first in (0..end).step_by(WINDOW as usize) {
            let window = (first, first.saturating_add(WINDOW).min(end));
            let plan = self.plan(&pins.roots, window, !o.whole)?;
            self.run_plan(&plan, o.level, &mut report)?;
        }
        drop(pins);
        fault::point("pack:done");
        report.freed_bytes = self.gc()?.freed_bytes;
        self.shrink_log();
        Ok(report)
    }

    fn pin_checkpoints(&self, o: &PackOptions) -> Result<Pins<'_>, StoreError> {
        let mut pins = Pins {
            store: self,
            roots: Vec::new(),
        };
        let ids: Vec<u64> = if o.checkpoints.is_empty() {
            let catalog = self.catalog()?;
            catalog.checkpoints.values().map(|c| c.id).collect()
        } else {
            o.checkpoints.clone()
        };
        for id in ids {
            let found = self.pin_found(|c| match c.checkpoints.get(&id) {
                Some(k) => Ok((k.root, ())),
                None => Err(StoreError::NotFound("a checkpoint was deleted".into())),
            });
            match found {
                Ok((root, ())) => pins.roots.push(root),
                // Deleted in between: nobody asked for it by name.
                Err(StoreError::NotFound(_)) if !o.whole => {}
                Err(e) => return Err(e),
            }
        }
        Ok(pins)
    }

    /// What trees hold in a window of segments.
    fn held(&self, roots: &[PageId], window: (u32, u32)) -> Result<Vec<Range>, StoreError> {
        let mut seen = crate::store::bitmap::Bitmap::default();
        let mut quiet = self.quiet();
        let mut pace = Pace::new(self);
        let mut out = Vec::new();
        for root in roots {
            tree::mark(
                &mut quiet,
                *root,
                &mut |id, _| {
                    pace.step();
                    seen.grow((id + 1).next_multiple_of(1 << 16));
                    if seen.set(id) {
                        Visit::Descend
                    } else {
                        Visit::Skip
                    }
                },
                Some(&mut |key: &[u8], value: &[u8]| {
                    if let Some((_, crate::fs::key::EXTENT, _)) = crate::fs::key::split(key)
                        && let Some(e) = Extent::decode(value)
                        && (window.0..window.1).contains(&e.seg)
                    {
                        out.extend(ranges::of_extent(&e));
                    }
                }),
            )?;
        }
        ranges::disjoint(&mut out);
        Ok(out)
    }

    fn plan(
        &self,
        roots: &[PageId],
        window: (u32, u32),
        spare_heads: bool,
    ) -> Result<Plan, StoreError> {
        let held = self.held(roots, window)?;
        let mut heads = Pins {
            store: self,
            roots: Vec::new(),
        };
        if spare_heads {
            let catalog = self.catalog()?;
            let names = catalog.heads.keys().chain(catalog.hidden.keys());
            for name in names.filter(|n| *n != HEAD) {
                match self.pin_head(name) {
                    Ok(root) => heads.roots.push(root),
                    Err(StoreError::NotFound(_)) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        let by_heads = self.held(&heads.roots, window)?;
        drop(heads);
        let (mut packed, mut summed) = (Vec::new(), Vec::new());
        self.each_entry((window.0, 0), (window.1, 0), &mut |seg, off, e| {
            let from = ranges::address(seg, off);
            let range = (from, from + u64::from(e.len));
            if e.packed {
                packed.push(range);
            } else {
                summed.push((range, e.name));
            }
        })?;
        let (cold, warm) = ranges::split(&held, &by_heads);
        let mut known: Vec<Range> = packed;
        known.extend(summed.iter().map(|s| s.0));
        ranges::disjoint(&mut known);
        let promote = summed
            .into_iter()
            .filter(|(r, _)| ranges::touches(*r, &cold) && !ranges::touches(*r, &by_heads))
            .collect();
        Ok(Plan {
            pack: ranges::split(&cold, &known).0,
            sum: ranges::split(&warm, &known).0,
            promote,
        })
    }

    fn run_plan(&self, plan: &Plan, level: i32, report: &mut PackReport) -> Result<(), StoreError> {
        let bytes = |v: &[Range]| v.iter().map(|r| r.1 - r.0).sum::<u64>();
        let promote: Vec<Range> = plan.promote.iter().map(|p| p.0).collect();
        let total = bytes(&plan.pack) + bytes(&plan.sum) + bytes(&promote);
        self.packs.total.fetch_add(total, Ordering::Relaxed);
        let names: FxHashMap<Range, Name> = plan.promote.iter().copied().collect();
        // In the order of places: what was written together is read together.
        let mut work: Vec<(Range, Job)> = Vec::new();
        work.extend(plan.pack.iter().map(|r| (*r, Job::Pack)));
        work.extend(plan.sum.iter().map(|r| (*r, Job::Sum)));
        work.extend(names.iter().map(|(r, n)| (*r, Job::Promote(*n))));
        work.sort_unstable_by_key(|w| w.0);
        let mut work = work.into_iter();
        let mut pace = Pace::new(self);
        let mut at = work.next();
        while at.is_some() {
            self.with_writer(level, |w| {
                let mut done = 0;
                while let Some((range, job)) = at
                    && done < SLICE
                    && w.waiting() < 1 << 16
                {
                    let to = range.1.min(range.0 + SLICE);
                    let used = self.do_range(w, (range.0, to), job, report, &mut pace)?;
                    done += used;
                    self.packs.done.fetch_add(used, Ordering::Relaxed);
                    at = if range.0 + used < range.1 {
                        Some(((range.0 + used, range.1), job))
                    } else {
                        work.next()
                    };
                    if self.gc_stop.load(Ordering::Relaxed) {
                        at = None;
                    }
                }
                report.new_bytes += std::mem::take(&mut w.new_bytes);
                let before = self.packs.stored_bytes();
                w.finish()?;
                report.stored_bytes += self.packs.stored_bytes().saturating_sub(before);
                Ok(())
            })?;
            if self.gc_stop.load(Ordering::Relaxed) {
                return Err(StoreError::Refused("packing was stopped".into()));
            }
        }
        Ok(())
    }

    /// Does a range; returns how much of it was done.
    fn do_range(
        &self,
        w: &mut Writer<'_>,
        range: Range,
        job: Job,
        report: &mut PackReport,
        pace: &mut Pace<'_>,
    ) -> Result<u64, StoreError> {
        let mut buf = Vec::new();
        let (segment, from) = ranges::place(range.0);
        let len = range.1 - range.0;
        let mut done = 0;
        let mut start = 0;
        while done < len {
            pace.step();
            // A chunk is cut from its longest possible length, or from all that is left.
            let have = buf.len() - start;
            let left = len - done;
            if (have as u64) < left && have < chunker::MAX {
                buf.drain(..start);
                start = 0;
                let want = usize::try_from(left).unwrap_or(READ).min(READ);
                buf.resize(want, 0);
                let place = Place {
                    segment,
                    offset: from + done + have as u64,
                };
                self.segments.read_unpacked(place, &mut buf[have..])?;
            }
            let piece = &buf[start..];
            let n = match job {
                Job::Promote(_) => piece.len(),
                _ => chunker::cut(&piece[..piece.len().min(chunker::MAX)]),
            };
            let bytes = &piece[..n];
            let off = from + done;
            let packed = !matches!(job, Job::Sum);
            let name = match job {
                Job::Pack => w.put(bytes)?,
                Job::Sum => name_of(bytes),
                Job::Promote(want) => {
                    let name = name_of(bytes);
                    if name != want {
                        report.damaged.push((segment, off));
                        return Ok(len);
                    }
                    w.put(bytes)?
                }
            };
            let n32 = u32::try_from(n).unwrap_or(u32::MAX);
            let entry = Entry {
                len: n32,
                packed,
                name,
            };
            w.entry(segment, off, entry);
            if packed {
                report.packed_bytes += n as u64;
            } else {
                report.summed_bytes += n as u64;
            }
            done += n as u64;
            start += n;
        }
        Ok(done)
    }

    /// Bytes packed, and to be packed, by the pack that runs or ran last.
    pub fn pack_progress(&self) -> (u64, u64) {
        let load = |a: &crate::store::AtomicU64| a.load(Ordering::Relaxed);
        (load(&self.packs.done), load(&self.packs.total))
    }
}

/// What to do with a range.
#[derive(Debug, Clone, Copy)]
enum Job {
    Pack,
    Sum,
    Promote(Name),
}
