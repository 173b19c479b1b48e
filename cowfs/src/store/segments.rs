//! File data: append-only segments `data/NNNNNNNN`, each up to 1 GiB.
//!
//! Bytes that an extent refers to are never overwritten while any head, checkpoint or the durable commit can reach them.
//! There are two streams: pieces below 32 KiB that do not fill their last block are packed at 8-byte steps, others begin at
//! a multiple of 4 KiB. Whole 4 KiB blocks that nothing refers to any more are given out again, or punched out of the
//! file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::disk::{Disk, DiskFile};
use super::error::StoreError;

/// Bytes in a segment at most.
pub const SEGMENT_BYTES: u64 = 1 << 30;
/// Block of the host.
pub const BLOCK: u64 = 4096;
/// Pieces below this that do not fill their last block are packed: rounded up, the files of a program tree would take a
/// sixth more.
const PACK_MAX: u64 = 32 << 10;
/// Freed ranges kept for reuse at most; more are punched.
const POOL_MAX: usize = 64 * 1024;
/// With less left in a segment the next one is made.
const AHEAD: u64 = 256 << 20;
/// Ranges that wait for a sync at most, more or less (see [`Segments::is_crowded`]).
const RANGES_MAX: usize = 32 * 1024;
/// Writes from this size on may belong to a stream, whose write-back is started in steps of so many bytes.
const STREAM_WRITE: u64 = 256 << 10;
const STREAM_STEP: u64 = 8 << 20;
/// Segment files kept open.
const OPEN_MAX: usize = 256;

/// A place in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Segment number.
    pub segment: u32,
    /// Byte offset in it.
    pub offset: u64,
}

#[derive(Debug, Default)]
struct Cursor {
    segment: u32,
    next: u64,
    end: u64,
}

#[derive(Debug)]
struct State {
    next_segment: u32,
    small: Cursor,
    large: Cursor,
    pool: BTreeMap<(u32, u64), u64>,
    pool_bytes: u64,
    hold: bool,
    /// A segment made ahead, for the large stream to go on in.
    next: Option<u32>,
    open: HashMap<u32, Arc<dyn DiskFile>>,
    dirty: BTreeMap<u32, Ranges>,
    /// Number of ranges in all of `dirty`.
    dirty_ranges: usize,
    /// Segments whose last sync failed. The host counts what was to be written as clean from then on, so it must be
    /// written again before another sync means anything.
    lost: BTreeSet<u32>,
    stream: Stream,
}

/// Large writes one behind the other, as of a large file that is being made. The host would begin to write them to its
/// disk only seconds later or at the sync, and the disk would idle till then.
#[derive(Debug, Default)]
struct Stream {
    segment: u32,
    /// Not asked to be written yet.
    from: u64,
    to: u64,
}

impl Stream {
    /// Notes a write; a range whose write-back should start now.
    fn wrote(&mut self, place: Place, end: u64) -> Option<(u64, u64)> {
        if end - place.offset < STREAM_WRITE {
            return None;
        }
        if place.segment != self.segment || place.offset != self.to {
            (self.segment, self.from) = (place.segment, place.offset);
        }
        self.to = end;
        if self.to - self.from < STREAM_STEP {
            return None;
        }
        let due = (self.from, self.to);
        self.from = self.to;
        Some(due)
    }
}

/// Byte ranges, start to end, joined where they touch.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn add(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start, end);
        if let Some((&s, &e)) = self.0.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.0.range(start..=end).next() {
            self.0.remove(&s);
            end = end.max(e);
        }
        self.0.insert(start, end);
    }
}

impl State {
    fn add_dirty(&mut self, segment: u32, ranges: impl IntoIterator<Item = (u64, u64)>) {
        let r = self.dirty.entry(segment).or_default();
        let before = r.0.len();
        for (start, end) in ranges {
            r.add(start, end);
        }
        self.dirty_ranges = self.dirty_ranges + r.0.len() - before;
    }
}

/// Writes ranges again with the bytes that the host shows in them.
fn rewrite(n: u32, file: &dyn DiskFile, ranges: &Ranges) -> Result<(), StoreError> {
    let name = file_name(n);
    let mut buf = Vec::new();
    for (&start, &end) in &ranges.0 {
        let mut at = start;
        while at < end {
            let len = (end - at).min(1 << 20);
            buf.resize(usize::try_from(len).unwrap_or(0), 0);
            file.read_at(&mut buf, at)
                .map_err(StoreError::io(&name, "reading"))?;
            file.write_at(&buf, at)
                .map_err(StoreError::io(&name, "writing"))?;
            at += len;
        }
    }
    Ok(())
}

/// All segments of a store.
#[derive(Debug)]
pub struct Segments {
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    /// One sync at a time: a second one must not return before the first has made its files durable.
    syncing: Mutex<()>,
    epoch: AtomicU64,
}

/// File name of a segment.
pub fn file_name(segment: u32) -> String {
    format!("data/{segment:08}")
}

impl Segments {
    /// Segments of a disk; new ones are numbered from `next_segment`, so nothing that exists is appended to.
    pub fn new(disk: Arc<dyn Disk>, next_segment: u32) -> Self {
        Self {
            disk,
            state: Mutex::new(State {
                next_segment,
                small: Cursor::default(),
                large: Cursor::default(),
                pool: BTreeMap::new(),
                pool_bytes: 0,
                hold: false,
                next: None,
                open: HashMap::new(),
                dirty: BTreeMap::new(),
                dirty_ranges: 0,
                lost: BTreeSet::new(),
                stream: Stream::default(),
            }),
            syncing: Mutex::new(()),
            epoch: AtomicU64::new(0),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change of the state is complete before anything that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number that the next segment will get.
    pub fn next_segment(&self) -> u32 {
        self.state().next_segment
    }

    /// Makes sure that new segments are numbered above `segment`.
    pub fn saw_segment(&self, segment: u32) {
        let mut s = self.state();
        s.next_segment = s.next_segment.max(segment.saturating_add(1));
    }

    /// The file of a segment.
    ///
    /// # Errors
    /// Corrupt when there is no such file.
    pub fn file(&self, segment: u32) -> Result<Arc<dyn DiskFile>, StoreError> {
        let mut s = self.state();
        if let Some(f) = s.open.get(&segment) {
            return Ok(Arc::clone(f));
        }
        let name = file_name(segment);
        let f = self.disk.open(&name, false).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => StoreError::corrupt(&name, "a data segment is missing"),
            _ => StoreError::io(&name, "opening")(e),
        })?;
        if s.open.len() >= OPEN_MAX {
            let State { open, dirty, .. } = &mut *s;
            open.retain(|n, _| dirty.contains_key(n));
        }
        s.open.insert(segment, Arc::clone(&f));
        Ok(f)
    }

    /// A segment for the large stream.
    fn new_segment(&self, s: &mut State) -> Result<u32, StoreError> {
        if let Some(n) = s.next.take() {
            return Ok(n);
        }
        let n = s.next_segment;
        s.next_segment = n
            .checked_add(1)
            .ok_or_else(|| StoreError::Refused("out of segment numbers".into()))?;
        let f = self.make(n)?;
        s.open.insert(n, f);
        Ok(n)
    }

    fn make(&self, n: u32) -> Result<Arc<dyn DiskFile>, StoreError> {
        let name = file_name(n);
        let f = self
            .disk
            .open(&name, true)
            .map_err(StoreError::io(&name, "creating"))?;
        self.disk
            .sync_dir("data")
            .map_err(StoreError::sync("data"))?;
        Ok(f)
    }

    /// Makes the next segment when the present one is nearly full, so that no writer waits for the host to do it.
    /// A failure shows when the segment is needed.
    pub fn make_next(&self) {
        let (n, epoch) = {
            let mut s = self.state();
            let near = s.large.end > 0 && s.large.end - s.large.next < AHEAD;
            if !near || s.next.is_some() || s.hold || s.next_segment == u32::MAX {
                return;
            }
            s.next_segment += 1;
            (s.next_segment - 1, self.epoch())
        };
        if let Ok(f) = self.make(n) {
            let mut s = self.state();
            // A collection that began meanwhile may take the file for an old one, and remove it.
            if epoch == self.epoch() {
                s.open.insert(n, f);
                s.next = Some(n);
            }
        }
    }

    /// Finds room for `len` bytes (at most a segment); the caller writes there and then refers to it.
    ///
    /// # Errors
    /// Host errors when a new segment cannot be made.
    pub fn allocate(&self, len: u64, align_blocks: bool) -> Result<Place, StoreError> {
        self.find(len, align_blocks, true)
    }

    /// Ranges of a segment in which its file has nothing; all of it, if there is no file.
    ///
    /// # Errors
    /// What the host says.
    pub fn holes(&self, segment: u32) -> Result<Vec<(u64, u64)>, StoreError> {
        use nix::unistd::{Whence, lseek64};
        let name = file_name(segment);
        let file = match self.file(segment) {
            Ok(f) => f,
            Err(StoreError::Corrupt { .. }) => return Ok(vec![(0, SEGMENT_BYTES)]),
            Err(e) => return Err(e),
        };
        let len = file.len().map_err(StoreError::io(&name, "reading"))?;
        let len = len.min(SEGMENT_BYTES);
        let mut holes = Vec::new();
        let mut at = 0;
        if let Some(host) = file.host() {
            let seek = |at: u64, whence| {
                let found = lseek64(host, i64::try_from(at).unwrap_or(i64::MAX), whence);
                found.map(|n| u64::try_from(n).unwrap_or(0))
            };
            let err = |e: nix::Error| StoreError::io(&name, "looking for holes")(e.into());
            while at < len {
                let hole = seek(at, Whence::SeekHole).map_err(err)?.min(len);
                let data = match seek(hole, Whence::SeekData) {
                    Ok(n) => n.min(len),
                    Err(nix::Error::ENXIO) => len,
                    Err(e) => return Err(err(e)),
                };
                if data > hole {
                    holes.push((hole, data));
                }
                at = data.max(hole + 1);
            }
        } else {
            // A disk that cannot say: nobody has written what has nothing but zeros.
            let mut block = vec![0; BLOCK as usize];
            while at < len {
                file.read_at(&mut block, at)
                    .map_err(StoreError::io(&name, "reading"))?;
                if block.iter().all(|b| *b == 0) {
                    holes.push((at, at + BLOCK));
                }
                at += BLOCK;
            }
        }
        holes.push((len, SEGMENT_BYTES));
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (from, to) in holes.into_iter().filter(|h| h.0 < h.1) {
            match joined.last_mut() {
                Some(last) if last.1 >= from => last.1 = to,
                _ => joined.push((from, to)),
            }
        }
        Ok(joined)
    }

    /// Finds room of which only the numbers are used: nothing was ever written there, and nothing may be. So the segment's
    /// file has a hole there, which tells a repair that the bytes are elsewhere.
    ///
    /// # Errors
    /// As [`Segments::allocate`].
    pub fn allocate_void(&self, len: u64) -> Result<Place, StoreError> {
        self.find(len, true, false)
    }

    fn find(&self, len: u64, align_blocks: bool, used: bool) -> Result<Place, StoreError> {
        let mut s = self.state();
        // What fills its blocks goes to whole blocks, which can be given out again one by one; the rest is packed.
        let large = align_blocks || len >= PACK_MAX || len.is_multiple_of(BLOCK);
        let step = if large { BLOCK } else { 8 };
        let want = len.next_multiple_of(step);
        if large && used && !s.hold && want <= 1 << 20 {
            let found = s
                .pool
                .iter()
                .take(8)
                .find(|(_, l)| **l >= want)
                .map(|(k, l)| (*k, *l));
            if let Some((key, have)) = found {
                s.pool.remove(&key);
                if have > want {
                    s.pool.insert((key.0, key.1 + want), have - want);
                }
                s.pool_bytes -= want;
                return Ok(Place {
                    segment: key.0,
                    offset: key.1,
                });
            }
        }
        let full = {
            let c = if large { &s.large } else { &s.small };
            c.next + want > c.end
        };
        if full {
            // The small stream takes one block group at a time from the large one, so that both share segments.
            let fresh = if large {
                Cursor {
                    segment: self.new_segment(&mut s)?,
                    next: 0,
                    end: SEGMENT_BYTES,
                }
            } else {
                drop(s);
                let group = self.allocate(1 << 20, true)?;
                s = self.state();
                Cursor {
                    segment: group.segment,
                    next: group.offset,
                    end: group.offset + (1 << 20),
                }
            };
            if large {
                s.large = fresh;
            } else {
                s.small = fresh;
            }
        }
        let s = &mut *s;
        let c = if large { &mut s.large } else { &mut s.small };
        let place = Place {
            segment: c.segment,
            offset: c.next,
        };
        c.next += want;
        Ok(place)
    }

    /// Writes bytes at a place that nothing refers to yet.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&self, place: Place, bytes: &[u8]) -> Result<(), StoreError> {
        let file = self.file(place.segment)?;
        file.write_at(bytes, place.offset)
            .map_err(StoreError::io(&file_name(place.segment), "writing"))?;
        // Not before: somebody else's sync meanwhile would take the mark, but perhaps not the bytes. And a range that is
        // marked may be written again from what the host shows, which must be all of it.
        let end = place.offset + bytes.len() as u64;
        let mut s = self.state();
        s.add_dirty(place.segment, [(place.offset, end)]);
        let due = s.stream.wrote(place, end);
        drop(s);
        if let Some((from, to)) = due {
            file.start_writeback(from, to - from);
        }
        Ok(())
    }

    /// True when so many separate ranges wait for a sync that one should come soon.
    pub fn is_crowded(&self) -> bool {
        self.state().dirty_ranges > RANGES_MAX
    }

    /// Reads bytes from a place of a segment's file. Where contents may be packed, use
    /// [`Store::read_data`](super::Store::read_data).
    ///
    /// # Errors
    /// What the host says.
    pub fn read_unpacked(&self, place: Place, buf: &mut [u8]) -> Result<(), StoreError> {
        self.file(place.segment)?
            .read_at(buf, place.offset)
            .map_err(StoreError::io(&file_name(place.segment), "reading"))
    }

    /// Makes every segment that was written durable.
    ///
    /// # Errors
    /// What the host says; what was not synced stays marked. The next call writes it again before it syncs: a host that
    /// failed to write pages counts them as clean, and a second sync alone would say that all is well.
    pub fn sync(&self) -> Result<(), StoreError> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut dirty, lost) = {
            let mut s = self.state();
            s.dirty_ranges = 0;
            (std::mem::take(&mut s.dirty), s.lost.clone())
        };
        let mut result = Ok(());
        while let Some((n, ranges)) = dirty.pop_first() {
            let done = self.sync_one(n, &ranges, lost.contains(&n));
            let mut s = self.state();
            match done {
                Ok(()) => {
                    s.lost.remove(&n);
                }
                Err((e, is_lost)) => {
                    s.add_dirty(n, ranges.0);
                    if is_lost {
                        s.lost.insert(n);
                    }
                    for (n, ranges) in std::mem::take(&mut dirty) {
                        s.add_dirty(n, ranges.0);
                    }
                    result = Err(e);
                }
            }
        }
        result
    }

    /// Syncs a segment. With an error: whether its ranges must be written again.
    fn sync_one(&self, n: u32, ranges: &Ranges, lost: bool) -> Result<(), (StoreError, bool)> {
        let file = self.file(n).map_err(|e| (e, lost))?;
        if lost {
            rewrite(n, file.as_ref(), ranges).map_err(|e| (e, true))?;
        }
        if let Err(e) = file.sync() {
            // At once, as the host still has the bytes in its cache.
            let again = rewrite(n, file.as_ref(), ranges);
            if let Err(e) = &again {
                tracing::error!(segment = n, error = %e, "what a failed sync may have lost could not be written again yet");
            }
            return Err((StoreError::sync(&file_name(n))(e), again.is_err()));
        }
        Ok(())
    }

    /// Gives whole blocks inside a range out again. Nothing durable or in memory may refer to them,
    /// no reader may be using them, and no log record that replay could read may write to them.
    pub fn give_back(&self, place: Place, len: u64) {
        let start = place.offset.next_multiple_of(BLOCK);
        let end = (place.offset + len) / BLOCK * BLOCK;
        if start >= end {
            return;
        }
        let mut s = self.state();
        if s.hold || s.pool.len() >= POOL_MAX {
            drop(s);
            self.punch(place.segment, start, end - start);
            return;
        }
        s.pool_bytes += end - start;
        let (mut start, mut end) = (start, end);
        if let Some((&(seg, off), &l)) = s.pool.range(..(place.segment, start)).next_back()
            && seg == place.segment
            && off + l == start
        {
            s.pool.remove(&(seg, off));
            start = off;
        }
        if let Some(l) = s.pool.remove(&(place.segment, end)) {
            end += l;
        }
        s.pool.insert((place.segment, start), end - start);
    }

    /// Punches what waits for reuse beyond `keep` bytes, so that the host gets the space back.
    pub fn trim_pool(&self, keep: u64) {
        loop {
            let mut s = self.state();
            if s.pool_bytes <= keep {
                return;
            }
            let Some(((seg, off), len)) = s.pool.pop_last() else {
                return;
            };
            s.pool_bytes -= len;
            drop(s);
            self.punch(seg, off, len);
        }
    }

    /// Bytes that wait for reuse.
    pub fn pool_bytes(&self) -> u64 {
        self.state().pool_bytes
    }

    /// Changes whenever places that were given out, but not yet referred to, are void (see [`Segments::set_hold`]).
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Starts (or ends) a time in which nothing freed is given out again and both streams go on in new places.
    /// Returns, when it starts, the first place of each segment that is beyond all that was given out before, and under
    /// `u32::MAX` the number of the next segment. Call it with the store's gate held for writing.
    pub fn set_hold(&self, hold: bool) -> BTreeMap<u32, u64> {
        let mut s = self.state();
        s.hold = hold;
        let mut ends = BTreeMap::new();
        if hold {
            self.epoch.fetch_add(1, Ordering::AcqRel);
            s.pool.clear();
            s.pool_bytes = 0;
            // The small stream's group is left; the large stream goes on where it is.
            s.small = Cursor::default();
            let large = (s.large.segment, s.large.next, s.large.end);
            if large.2 > 0 {
                ends.insert(large.0, large.1);
            }
            if let Some(n) = s.next {
                ends.insert(n, 0);
            }
            ends.insert(u32::MAX, u64::from(s.next_segment));
        }
        ends
    }

    /// Gives a range back to the host. A failure only keeps the space.
    pub fn punch(&self, segment: u32, offset: u64, len: u64) {
        if let Err(e) = self.file(segment).and_then(|f| {
            f.punch(offset, len)
                .map_err(StoreError::io(&file_name(segment), "punching"))
        }) {
            tracing::warn!(segment, offset, len, error = %e, "could not give space back");
        }
    }

    /// Removes a whole segment that nothing refers to.
    pub fn remove(&self, segment: u32) {
        // A sync that runs would not find it.
        let _none = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut s = self.state();
        s.open.remove(&segment);
        s.lost.remove(&segment);
        if let Some(r) = s.dirty.remove(&segment) {
            s.dirty_ranges = s.dirty_ranges.saturating_sub(r.0.len());
        }
        drop(s);
        if let Err(e) = self.disk.remove(&file_name(segment)) {
            tracing::warn!(segment, error = %e, "could not remove an empty segment");
        }
    }

    /// Numbers of the segments that exist.
    ///
    /// # Errors
    /// What the host says.
    pub fn existing(&self) -> Result<Vec<u32>, StoreError> {
        let mut v: Vec<u32> = self
            .disk
            .list("data")
            .map_err(StoreError::io("data", "listing"))?
            .iter()
            .filter_map(|n| n.parse().ok())
            .collect();
        v.sort_unstable();
        Ok(v)
    }
}
