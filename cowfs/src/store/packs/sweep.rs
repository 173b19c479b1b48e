//! The part of a collection that is about packed contents: which entries, chunks and frames are still needed.
//!
//! In memory, while it runs: 24 bytes for each entry, 8 for each live chunk, about 40 for each frame.

use std::collections::BTreeMap;

use rustc_hash::{FxHashMap, FxHashSet};

use super::records::{self, CHUNK, ChunkAt, ENTRY, Entry, FRAME, FrameInfo, Name};
use super::{Change, DIR, Writer};
use crate::fault;
use crate::fs::Extent;
use crate::store::gc::{Blocks, Reader};
use crate::store::pace::Pace;
use crate::store::segments::SEGMENT_BYTES;
use crate::store::{Ordering, Store, StoreError};
use crate::tree::{self, PageId};

/// A frame of which less than this part of a hundred is needed is written anew.
const SPARSE: u64 = 40;
/// Dead records removed at a time.
const SLICE: usize = 2048;
/// Records removed while the store's lock is held.
const AT_ONCE: usize = 32;
/// Bytes written anew before they are synced and the index is changed: programs that sync meanwhile wait for no more.
const REWRITE: u64 = 2 << 20;

/// An entry.
#[derive(Debug, Clone, Copy)]
struct Slot {
    off: u32,
    len: u32,
    packed: bool,
    live: bool,
    tag: u64,
}

/// The first bytes of a name: two chunks that share them only live longer.
fn tag(name: &Name) -> u64 {
    name.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

/// All entries, by segment.
#[derive(Debug, Default)]
pub(in crate::store) struct Entries {
    segments: FxHashMap<u32, Vec<Slot>>,
}

impl Entries {
    /// Reads the entries of an index.
    pub fn load(reader: &mut Reader<'_>, index: PageId) -> Result<Self, StoreError> {
        let mut all = Self::default();
        tree::scan(reader, index, &[ENTRY], Some(&[ENTRY + 1]), &mut |k, v| {
            if let (Some((seg, off)), Some(e)) = (records::place_of(ENTRY, k), Entry::decode(v))
                && let Ok(off) = u32::try_from(off)
            {
                all.segments.entry(seg).or_default().push(Slot {
                    off,
                    len: e.len,
                    packed: e.packed,
                    live: false,
                    tag: tag(&e.name),
                });
            }
            std::ops::ControlFlow::Continue(())
        })?;
        for v in all.segments.values_mut() {
            v.shrink_to_fit();
        }
        Ok(all)
    }

    /// Marks an extent: entries that it needs, and blocks for the rest.
    pub fn mark(&mut self, e: &Extent, blocks: &mut Blocks) {
        let Some(slots) = self.segments.get_mut(&e.seg) else {
            blocks.mark(e);
            return;
        };
        let end = e.off.saturating_add(u64::from(e.len));
        if end > SEGMENT_BYTES {
            return;
        }
        let mut at = e.off;
        let first = slots.partition_point(|s| u64::from(s.off) + u64::from(s.len) <= at);
        for s in &mut slots[first..] {
            let off = u64::from(s.off);
            if off >= end {
                break;
            }
            s.live = true;
            if !s.packed {
                continue;
            }
            if off > at {
                blocks.mark_range(e.seg, at, off);
            }
            at = at.max(off + u64::from(s.len));
        }
        if at < end {
            blocks.mark_range(e.seg, at, end);
        }
    }

    /// Gives up sums over bytes of which a part is about to be given back; `blocks` has all that stays.
    pub fn settle(&mut self, blocks: &Blocks) {
        for (seg, slots) in &mut self.segments {
            for s in slots.iter_mut().filter(|s| !s.packed && s.live) {
                let off = u64::from(s.off);
                s.live = blocks.has_range(*seg, off, off + u64::from(s.len));
            }
        }
    }

    /// Tags of the chunks that live entries name, sorted.
    fn tags(&self) -> Vec<u64> {
        let slots = self.segments.values().flatten();
        let mut tags: Vec<u64> = slots
            .filter(|s| s.live && s.packed)
            .map(|s| s.tag)
            .collect();
        tags.sort_unstable();
        tags.dedup();
        tags
    }
}

/// A frame, as a collection sees it.
#[derive(Debug, Default, Clone, Copy)]
struct Use {
    bytes: u32,
    raw: u32,
    live: u64,
}

type Frames = BTreeMap<(u32, u64), Use>;

impl Store {
    /// Removes what no tree needs from the index and from the packs; returns the bytes given back. Runs inside of a
    /// collection.
    pub(in crate::store) fn sweep_packs(
        &self,
        reader: &mut Reader<'_>,
        index: PageId,
        entries: &Entries,
    ) -> Result<u64, StoreError> {
        if index == 0 {
            // Of a pack or a receive that came to nothing frames may be left.
            self.clear_packs(&Frames::new(), self.packs.appended_to())?;
            return Ok(0);
        }
        fault::point("gc:index");
        let tags = entries.tags();
        let is_live = |name: &Name| tags.binary_search(&tag(name)).is_ok();
        let mut frames = Frames::new();
        tree::scan(reader, index, &[FRAME], Some(&[FRAME + 1]), &mut |k, v| {
            if let (Some(at), Some(f)) = (records::place_of(FRAME, k), FrameInfo::decode(v)) {
                let (bytes, raw) = (f.bytes, f.raw);
                frames.insert(
                    at,
                    Use {
                        bytes,
                        raw,
                        live: 0,
                    },
                );
            }
            std::ops::ControlFlow::Continue(())
        })?;
        each_chunk(reader, index, &mut |name, at| {
            if is_live(name)
                && let Some(f) = frames.get_mut(&(at.pack, at.frame))
            {
                f.live += u64::from(at.len);
            }
        })?;
        let busy = self.packs.appended_to();
        let mut gone: Frames = frames.clone();
        gone.retain(|_, f| f.live * 100 < u64::from(f.raw) * SPARSE || f.raw == 0);
        let moved = self.rewrite(&mut gone, &is_live, &mut reader.pace)?;
        // Records of chunks that are not needed, in frames that go.
        let mut dead: Vec<Change> = Vec::new();
        let mut done = Ok(());
        let mut pace = Pace::new(self);
        each_chunk(reader, index, &mut |name, at| {
            if gone.contains_key(&(at.pack, at.frame)) && !moved.contains(name) && done.is_ok() {
                dead.push((records::chunk_key(name).to_vec(), None));
                if dead.len() >= SLICE {
                    done = self.change_gently(&std::mem::take(&mut dead), &mut pace);
                }
            }
        })?;
        done?;
        let keys = gone
            .keys()
            .map(|(pack, off)| records::frame_key(*pack, *off));
        dead.extend(keys.map(|k| (k.to_vec(), None)));
        self.change_gently(&dead, &mut pace)?;
        // The index on disk must not name what goes.
        self.sync()?;
        drop(self.gate.write());
        fault::point("gc:packs");
        let mut freed = 0;
        for ((pack, off), f) in &gone {
            self.packs.forget_frame(*pack, *off);
            self.packs.punch(*pack, *off, u64::from(f.bytes));
            freed += u64::from(f.bytes);
            frames.remove(&(*pack, *off));
            pace.step();
        }
        self.packs
            .stored
            .fetch_sub(freed.min(self.packs.stored_bytes()), Ordering::Relaxed);
        self.clear_packs(&frames, busy)?;
        Ok(freed)
    }

    /// Removes entries whose ranges no tree has, before anything of these ranges is given back: a sum must not outlive its
    /// bytes.
    pub(in crate::store) fn drop_entries(
        &self,
        entries: &Entries,
        pace: &mut Pace<'_>,
    ) -> Result<(), StoreError> {
        let mut dead: Vec<Change> = Vec::new();
        let mut ranges: Vec<(u32, u64, u64)> = Vec::new();
        for (seg, slots) in &entries.segments {
            for s in slots.iter().filter(|s| !s.live) {
                let off = u64::from(s.off);
                dead.push((records::entry_key(*seg, off).to_vec(), None));
                if s.packed {
                    ranges.push((*seg, off, off + u64::from(s.len)));
                }
                if dead.len() >= SLICE {
                    self.change_gently(&std::mem::take(&mut dead), pace)?;
                }
            }
        }
        self.change_gently(&dead, pace)?;
        for (seg, from, to) in ranges {
            self.packs.uncover(seg, from, to);
        }
        self.sync()
    }

    /// Changes the index a little at a time, with rests: whoever waits for the store's lock waits for a few records, also
    /// when this thread is put aside while it has it.
    fn change_gently(&self, changes: &[Change], pace: &mut Pace<'_>) -> Result<(), StoreError> {
        for slice in changes.chunks(AT_ONCE) {
            self.change_index(slice)?;
            pace.step();
        }
        Ok(())
    }

    /// Writes the live chunks of sparse frames anew. Frames that are damaged stay.
    fn rewrite(
        &self,
        gone: &mut Frames,
        is_live: &dyn Fn(&Name) -> bool,
        pace: &mut Pace<'_>,
    ) -> Result<FxHashSet<Name>, StoreError> {
        let mut moved: FxHashSet<Name> = FxHashSet::default();
        let sparse: Vec<((u32, u64), Use)> = gone
            .iter()
            .filter(|(_, f)| f.live > 0)
            .map(|(k, f)| (*k, *f))
            .collect();
        let mut w = Writer::new(self, super::PackOptions::LEVEL)?;
        for ((pack, off), f) in sparse {
            self.gc_may_go()?;
            let frame = self.packs.frame_of_disk(pack, off, f.bytes);
            let Some(frame) = frame.ok().filter(|f| f.chunks.iter().all(|c| c.good)) else {
                gone.remove(&(pack, off));
                continue;
            };
            for c in &frame.chunks {
                if !is_live(&c.name) || moved.contains(&c.name) {
                    continue;
                }
                // The index may know it at another place by now.
                let at = self.find_chunk(&c.name)?;
                if at.is_some_and(|at| (at.pack, at.frame) == (pack, off)) {
                    w.put_new(c.name, &frame.raw[c.off..c.off + c.len])?;
                    moved.insert(c.name);
                }
            }
            pace.step();
            if w.new_bytes >= REWRITE {
                w.finish()?;
                w.new_bytes = 0;
                pace.step();
            }
        }
        w.finish()?;
        Ok(moved)
    }

    /// Gives back what no frame has: whole packs, and once after opening what a crash has left between frames.
    fn clear_packs(&self, frames: &Frames, busy: Option<u32>) -> Result<(), StoreError> {
        let gaps = !self.packs.gaps_done.swap(true, Ordering::AcqRel);
        let mut removed = false;
        for pack in self.packs.existing()? {
            // Frames that were written meanwhile go to the last one.
            if Some(pack) == self.packs.appended_to() || Some(pack) == busy {
                continue;
            }
            let mut used = frames.range((pack, 0)..=(pack, u64::MAX)).peekable();
            if used.peek().is_none() && !self.has_frames(pack)? {
                self.packs.remove(pack);
                removed = true;
                continue;
            }
            if !gaps {
                continue;
            }
            let mut at = 0;
            for ((_, off), f) in used {
                let from = u64::next_multiple_of(at, 4096);
                let to = off / 4096 * 4096;
                if to > from {
                    self.packs.punch(pack, from, to - from);
                }
                at = off + u64::from(f.bytes);
            }
        }
        if removed {
            self.packs
                .disk
                .sync_dir(DIR)
                .map_err(StoreError::sync(DIR))?;
        }
        Ok(())
    }

    /// True if the present index has a frame in a pack.
    fn has_frames(&self, pack: u32) -> Result<bool, StoreError> {
        let mut any = false;
        let from = records::frame_key(pack, 0).to_vec();
        self.each_index(from, &records::frame_key(pack, u64::MAX), &mut |_, _| {
            any = true
        })?;
        Ok(any)
    }
}

/// Calls `f` with every chunk of an index.
fn each_chunk(
    reader: &mut Reader<'_>,
    index: PageId,
    f: &mut dyn FnMut(&Name, &ChunkAt),
) -> Result<(), StoreError> {
    tree::scan(reader, index, &[CHUNK], Some(&[CHUNK + 1]), &mut |k, v| {
        if let (Some(name), Some(at)) = (records::chunk_name(k), ChunkAt::decode(v)) {
            f(&name, &at);
        }
        std::ops::ControlFlow::Continue(())
    })
}
