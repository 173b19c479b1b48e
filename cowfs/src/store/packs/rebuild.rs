//! Makes the index anew when pages of it are damaged: of what can still be read, of the tables of the frames, and of what
//! the segments have.
//!
//! Which chunk a range of a segment was cannot be had from the packs. Where the segment's file has the bytes they are right,
//! as what is packed leaves it only by holes, and what was received never was in it. Where it has a hole the range gets an
//! entry without a name ([`records::UNKNOWN`]): reading it is an error until somebody says what it was.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::frame;
use super::ranges::{self, Range};
use super::records::{self, CHUNK, CHUNK_MAX, ChunkAt, ENTRY, Entry, FRAME, FrameInfo, UNKNOWN};
use super::{BATCH, Change, HEAD, file_name};
use crate::fault;
use crate::fs::Kv;
use crate::store::segments::SEGMENT_BYTES;
use crate::store::{CatalogOp, Store, StoreError};
use crate::tree::{self, Lost, Visit};

/// The index while it is being made.
const NEW: &str = "@repair-packs";
/// Bytes of a pack looked through at once for frames.
const LOOK: usize = 1 << 20;
/// Bytes of a frame at most.
const FRAME_MAX: u64 = 2 * frame::RAW_MAX as u64 + (4 << 20);

/// True if a key may have been in what was lost.
fn was_in(lost: &[Lost], key: &[u8]) -> bool {
    let mut all = lost.iter();
    all.any(|l| &l.low[..] <= key && l.high.as_deref().is_none_or(|h| key < h))
}

/// Segment and offset that a bound of entries stands for; a bound may be a part of a key.
fn place_of_bound(bound: &[u8]) -> (u32, u64) {
    let mut key = [0; 13];
    let n = bound.len().min(13);
    key[..n].copy_from_slice(&bound[..n]);
    match key[0].cmp(&ENTRY) {
        std::cmp::Ordering::Less => (0, 0),
        std::cmp::Ordering::Greater => (u32::MAX, 0),
        std::cmp::Ordering::Equal => records::place_of(ENTRY, &key).unwrap_or((0, 0)),
    }
}

impl Store {
    /// Makes the index anew, and lets it take the damaged one's place in one record. Returns how many bytes of segments
    /// nobody can say of what they were.
    ///
    /// # Errors
    /// What the host says; the index is then as it was.
    pub(crate) fn rebuild_index(&self) -> Result<u64, StoreError> {
        let stopped = |_| {
            StoreError::Refused("the store stopped after an internal error in a collection".into())
        };
        let _one = self.gc_lock.lock().map_err(stopped)?;
        let root = self.catalog()?.any_head(HEAD).map_or(0, |h| h.root);
        // What is written from here on lies behind these.
        let ends = {
            let _gate = self
                .gate
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let ends = self.segments.set_hold(true);
            self.segments.set_hold(false);
            ends
        };
        self.hide_anew(NEW, None)?;
        let (mut batch, mut lost): (Vec<Change>, Vec<Lost>) = (Vec::new(), Vec::new());
        let mut failed = Ok(());
        tree::survey(
            &mut self.quiet(),
            root,
            &StoreError::is_damage,
            &mut |_| Visit::Descend,
            &mut |k, v| {
                batch.push((k.to_vec(), Some(v.to_vec())));
                if batch.len() >= BATCH && failed.is_ok() {
                    failed = self.add_records(&mut batch);
                }
            },
            &mut |l, _| lost.push(l),
        )?;
        failed?;
        self.add_records(&mut batch)?;
        self.add_frames(&lost)?;
        let unknown = self.add_unknown(&lost, &ends)?;
        self.commit()?;
        fault::point("repair:index");
        let op = CatalogOp::Rehide {
            from: NEW.into(),
            to: HEAD.into(),
        };
        self.change(|_| Ok((op, ())), |(), _| ())?;
        self.commit()?;
        self.packs.forget_all();
        self.load_packs()?;
        Ok(unknown)
    }

    fn add_records(&self, batch: &mut Vec<Change>) -> Result<(), StoreError> {
        self.change_records(NEW, &std::mem::take(batch))?;
        self.commit_if_many()
    }

    /// Puts frames and chunks back whose records were lost: every frame has a table of its chunks.
    fn add_frames(&self, lost: &[Lost]) -> Result<(), StoreError> {
        let any = lost.iter().any(|l| {
            l.high.as_deref().is_none_or(|h| h > &[CHUNK][..]) && l.low[..] < [FRAME + 1][..]
        });
        if !any {
            return Ok(());
        }
        for pack in self.packs.existing()? {
            self.each_frame(pack, &mut |off, bytes, f| {
                let mut batch: Vec<Change> = Vec::new();
                let key = records::frame_key(pack, off);
                let mut txn = self.read_head(NEW)?;
                let mut has = |k: &[u8]| txn.get(k, &mut |_| ()).map_err(super::unwrap_fs);
                let known = has(&key)?;
                // What the index knew, but not this frame, was nothing that anybody needed.
                if !known && !was_in(lost, &key) {
                    return Ok(());
                }
                if !known {
                    let info = FrameInfo {
                        bytes,
                        raw: u32::try_from(f.raw.len()).unwrap_or(u32::MAX),
                        chunks: u32::try_from(f.chunks.len()).unwrap_or(u32::MAX),
                    };
                    batch.push((key.to_vec(), Some(info.encode().to_vec())));
                }
                for c in f.chunks.iter().filter(|c| c.good) {
                    let key = records::chunk_key(&c.name);
                    if !was_in(lost, &key) || has(&key)? {
                        continue;
                    }
                    let at = ChunkAt {
                        pack,
                        frame: off,
                        frame_bytes: bytes,
                        off: u32::try_from(c.off).unwrap_or(u32::MAX),
                        len: u32::try_from(c.len).unwrap_or(u32::MAX),
                    };
                    batch.push((key.to_vec(), Some(at.encode().to_vec())));
                }
                drop(txn);
                self.add_records(&mut batch)
            })?;
        }
        Ok(())
    }

    /// Calls `f` with every frame of a pack that can be opened: offset, bytes, and what is in it.
    fn each_frame(
        &self,
        pack: u32,
        f: &mut dyn FnMut(u64, u32, &frame::Frame) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let file = self.packs.file(pack)?;
        let err = |e| StoreError::io(&file_name(pack), "reading")(e);
        let len = file.len().map_err(err)?;
        let (mut at, mut buf) = (0, vec![0; LOOK]);
        while at < len {
            file.read_at(&mut buf, at).map_err(err)?;
            let found = buf
                .chunks_exact(8)
                .position(|b| b.starts_with(frame::MAGIC));
            let Some(found) = found else {
                at += LOOK as u64;
                continue;
            };
            at += found as u64 * 8;
            let mut head = [0; frame::HEADER];
            file.read_at(&mut head, at).map_err(err)?;
            let bytes = frame::len_of(&head).filter(|n| *n <= FRAME_MAX);
            let opened = match bytes {
                Some(n) => {
                    let mut whole = vec![0; usize::try_from(n).unwrap_or(0)];
                    file.read_at(&mut whole, at).map_err(err)?;
                    frame::open(&whole).ok().map(|f| (n, f))
                }
                None => None,
            };
            match opened {
                Some((n, opened)) => {
                    f(at, u32::try_from(n).unwrap_or(u32::MAX), &opened)?;
                    at = (at + n).next_multiple_of(8);
                }
                None => at += 8,
            }
        }
        Ok(())
    }

    /// Puts entries without a name where entries may have been lost whose bytes the segments have not.
    fn add_unknown(&self, lost: &[Lost], ends: &BTreeMap<u32, u64>) -> Result<u64, StoreError> {
        let mut unknown = 0;
        let next = ends.get(&u32::MAX).copied().unwrap_or(0);
        let last = u32::try_from(next.saturating_sub(1)).unwrap_or(u32::MAX);
        for l in lost {
            let from = place_of_bound(&l.low);
            let to = l.high.as_deref().map_or((u32::MAX, 0), place_of_bound);
            for segment in from.0..=to.0.min(last) {
                let begin = if segment == from.0 { from.1 } else { 0 };
                // The last one that was lost may go on behind the bound, up to the next that is known.
                let end = match segment == to.0 {
                    true => to.1 + u64::from(CHUNK_MAX),
                    false => SEGMENT_BYTES,
                };
                let limit = ends.get(&segment).map_or(SEGMENT_BYTES, |e| *e);
                let gap = (begin.min(limit), end.min(limit));
                if gap.0 >= gap.1 {
                    continue;
                }
                let mut known: Vec<Range> = Vec::new();
                let all = records::entry_key(segment, u64::MAX).to_vec();
                let first = records::entry_key(segment, 0).to_vec();
                self.each_record(NEW, first, &all, &mut |k, v| {
                    if let (Some((_, off)), Some(e)) =
                        (records::place_of(ENTRY, k), Entry::decode(v))
                    {
                        known.push((off, off + u64::from(e.len)));
                    }
                })?;
                ranges::disjoint(&mut known);
                let gaps = ranges::split(&[gap], &known).0;
                let holes = self.segments.holes(segment)?;
                let mut batch: Vec<Change> = Vec::new();
                for (mut at, end) in ranges::split(&gaps, &holes).1 {
                    unknown += end - at;
                    while at < end {
                        let len = (end - at).min(u64::from(CHUNK_MAX));
                        let entry = Entry {
                            len: u32::try_from(len).unwrap_or(CHUNK_MAX),
                            packed: true,
                            name: UNKNOWN,
                        };
                        let key = records::entry_key(segment, at).to_vec();
                        batch.push((key, Some(entry.encode().to_vec())));
                        at += len;
                    }
                }
                self.add_records(&mut batch)?;
            }
        }
        Ok(unknown)
    }

    /// Ranges of which nobody knows what they were, as addresses, one for each entry.
    pub(crate) fn unknown(&self) -> Result<Vec<Range>, StoreError> {
        let mut out = Vec::new();
        self.each_entry((0, 0), (u32::MAX, u64::MAX), &mut |seg, off, e| {
            if e.packed && e.name == UNKNOWN {
                let at = ranges::address(seg, off);
                out.push((at, at + u64::from(e.len)));
            }
        })?;
        Ok(out)
    }

    /// Says what a part of an entry without a name is; the rest of it stays without. One record has all of it. The chunks
    /// must be in packs.
    pub(crate) fn name_unknown(
        &self,
        whole: Range,
        parts: &[(Range, records::Name)],
    ) -> Result<(), StoreError> {
        let named: Vec<Range> = parts.iter().map(|p| p.0).collect();
        let mut all: Vec<(Range, records::Name)> = parts.to_vec();
        let rest = ranges::split(&[whole], &named).0;
        all.extend(rest.into_iter().map(|r| (r, UNKNOWN)));
        let mut txn = self.begin(HEAD)?;
        let (segment, off) = ranges::place(whole.0);
        txn.del(&records::entry_key(segment, off))
            .map_err(super::unwrap_fs)?;
        for ((from, to), name) in all {
            let (segment, off) = ranges::place(from);
            let entry = Entry {
                len: u32::try_from(to - from).unwrap_or(u32::MAX),
                packed: true,
                name,
            };
            txn.put(&records::entry_key(segment, off), &entry.encode())
                .map_err(super::unwrap_fs)?;
        }
        txn.commit();
        Ok(())
    }

    /// Names and places of what has a sum, but is in no pack.
    pub(crate) fn unpacked_chunks(
        &self,
    ) -> Result<std::collections::HashMap<records::Name, (u32, u64, u32)>, StoreError> {
        let mut out = std::collections::HashMap::new();
        self.each_entry((0, 0), (u32::MAX, u64::MAX), &mut |seg, off, e| {
            if !e.packed {
                out.insert(e.name, (seg, off, e.len));
            }
        })?;
        Ok(out)
    }

    /// What of a range of addresses a tree maps: inode, offset in the file, addresses.
    pub(crate) fn mapped_in(
        &self,
        root: tree::PageId,
        within: &[Range],
    ) -> Result<Vec<(u64, u64, Range)>, StoreError> {
        let mut out = Vec::new();
        tree::scan(&mut self.quiet(), root, &[], None, &mut |k, v| {
            if let Some((ino, crate::fs::key::EXTENT, _)) = crate::fs::key::split(k)
                && let Some(at) = crate::fs::key::extent_offset(k)
                && let Some(r) = crate::fs::Extent::decode(v).and_then(|e| ranges::of_extent(&e))
            {
                for part in ranges::split(&[r], within).1 {
                    out.push((ino, at + (part.0 - r.0), part));
                }
            }
            ControlFlow::Continue(())
        })?;
        Ok(out)
    }
}
