//! Packed contents: chunks that checkpoints share, compressed, in `packs/NNNNNNNN`.
//!
//! Trees do not know of it. An extent names a place in a *logical* segment; an index (a hidden tree, [`records`]) says
//! which ranges of these are in a pack, by the names of their chunks, and `data/NNNNNNNN` has only the others. So packing
//! changes no tree, and rolling back to what is packed costs the same.
//!
//! Only what a checkpoint holds is packed: such bytes never change, and only a collection frees their places.

mod cache;
pub mod chunker;
pub mod frame;
mod pack;
pub(crate) mod ranges;
mod rebuild;
pub mod records;
pub(super) mod sweep;
mod verify;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::disk::{Disk, DiskFile};
use super::error::StoreError;
use super::segments::Place;
use super::{AtomicU64, CatalogOp, Ordering, Store, now_us};
use crate::fs::Kv;
use cache::Cache;
use frame::Frame;
pub use pack::{PackOptions, PackReport};
use records::{CHUNK, ChunkAt, ENTRY, Entry, FRAME, FrameInfo, Name};
pub use verify::{Damage, DataReport, Fetch, Keep, RepairReport};
pub(crate) use writer::Writer;

/// Name of the hidden head that is the index.
pub const HEAD: &str = "@packs";
/// Directory of the packs.
pub const DIR: &str = "packs";
/// Bytes of a pack at most.
const PACK_BYTES: u64 = 1 << 30;
/// Changes of the index in one batch, so that nobody waits long for the store's lock.
const BATCH: usize = 256;

/// A change of the index: a key, and its value or that it goes.
pub(crate) type Change = (Vec<u8>, Option<Vec<u8>>);

/// File name of a pack.
pub fn file_name(pack: u32) -> String {
    format!("{DIR}/{pack:08}")
}

/// Where new frames go.
#[derive(Debug, Default)]
struct Cursor {
    pack: Option<u32>,
    next: u64,
    next_pack: u32,
    /// The directory is there.
    made: bool,
}

/// The packs of a store.
#[derive(Debug)]
pub struct Packs {
    disk: Arc<dyn Disk>,
    /// Ranges that are packed, by segment, joined where they touch.
    covered: RwLock<HashMap<u32, BTreeMap<u64, u64>>>,
    cache: Mutex<Cache>,
    open: Mutex<HashMap<u32, Arc<dyn DiskFile>>>,
    cursor: Mutex<Cursor>,
    /// The index could not be read: then nobody can tell what is packed.
    broken: Mutex<Option<String>>,
    /// Bytes of all frames.
    stored: AtomicU64,
    /// Bytes packed of late, and to be packed.
    pub(super) done: AtomicU64,
    pub(super) total: AtomicU64,
    /// Ranges of frames that a crash may have left were given back.
    pub(super) gaps_done: std::sync::atomic::AtomicBool,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What these protect is whole after every step.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Packs {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        Self {
            disk,
            covered: RwLock::default(),
            cache: Mutex::default(),
            open: Mutex::default(),
            cursor: Mutex::default(),
            broken: Mutex::default(),
            stored: AtomicU64::new(0),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            gaps_done: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// Whether the byte at a place is packed, and for how many bytes (at most `max`) that holds.
    pub fn run(&self, segment: u32, at: u64, max: u64) -> (bool, u64) {
        let all = self.covered.read().unwrap_or_else(PoisonError::into_inner);
        let Some(ranges) = all.get(&segment) else {
            return (false, max);
        };
        if let Some((_, end)) = ranges.range(..=at).next_back()
            && *end > at
        {
            return (true, max.min(end - at));
        }
        let next = ranges.range(at + 1..).next().map_or(u64::MAX, |r| *r.0);
        (false, max.min(next - at))
    }

    /// Bytes of files that are packed.
    pub fn packed_bytes(&self) -> u64 {
        let all = self.covered.read().unwrap_or_else(PoisonError::into_inner);
        let ranges = all.values().flat_map(BTreeMap::iter);
        ranges.map(|(from, to)| to - from).sum()
    }

    /// Bytes of all frames.
    pub fn stored_bytes(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    fn cover(&self, segment: u32, from: u64, to: u64) {
        let mut all = self.covered.write().unwrap_or_else(PoisonError::into_inner);
        let ranges = all.entry(segment).or_default();
        let (mut from, mut to) = (from, to);
        if let Some((&s, &e)) = ranges.range(..=from).next_back()
            && e >= from
        {
            from = s;
            to = to.max(e);
        }
        while let Some((&s, &e)) = ranges.range(from..=to).next() {
            ranges.remove(&s);
            to = to.max(e);
        }
        ranges.insert(from, to);
    }

    fn uncover(&self, segment: u32, from: u64, to: u64) {
        let mut all = self.covered.write().unwrap_or_else(PoisonError::into_inner);
        let Some(ranges) = all.get_mut(&segment) else {
            return;
        };
        let touching: Vec<(u64, u64)> = ranges
            .range(..to)
            .rev()
            .take_while(|(_, e)| **e > from)
            .map(|(s, e)| (*s, *e))
            .collect();
        for (s, e) in touching {
            ranges.remove(&s);
            if s < from {
                ranges.insert(s, from);
            }
            if e > to {
                ranges.insert(to, e);
            }
        }
        if ranges.is_empty() {
            all.remove(&segment);
        }
    }

    fn file(&self, pack: u32) -> Result<Arc<dyn DiskFile>, StoreError> {
        let mut open = lock(&self.open);
        if let Some(f) = open.get(&pack) {
            return Ok(Arc::clone(f));
        }
        let name = file_name(pack);
        let f = self.disk.open(&name, false).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => StoreError::corrupt(&name, "the pack is missing"),
            _ => StoreError::io(&name, "opening")(e),
        })?;
        if open.len() >= 64 {
            open.clear();
        }
        open.insert(pack, Arc::clone(&f));
        Ok(f)
    }

    /// Writes a frame behind the others; nothing refers to it yet.
    fn append(&self, bytes: &[u8]) -> Result<(u32, u64), StoreError> {
        let mut c = lock(&self.cursor);
        if !c.made {
            self.disk
                .make_dir(DIR)
                .and_then(|()| self.disk.sync_dir(""))
                .map_err(StoreError::io(DIR, "creating"))?;
            c.made = true;
        }
        let fits = c.next + bytes.len() as u64 <= PACK_BYTES;
        let pack = match c.pack.filter(|_| fits) {
            Some(p) => p,
            None => {
                let n = c.next_pack;
                c.next_pack = n
                    .checked_add(1)
                    .ok_or_else(|| StoreError::Refused("out of pack numbers".into()))?;
                let name = file_name(n);
                let f = self
                    .disk
                    .open(&name, true)
                    .map_err(StoreError::io(&name, "creating"))?;
                self.disk.sync_dir(DIR).map_err(StoreError::sync(DIR))?;
                lock(&self.open).insert(n, f);
                (c.pack, c.next) = (Some(n), 0);
                n
            }
        };
        let off = c.next;
        self.file(pack)?
            .write_at(bytes, off)
            .map_err(StoreError::io(&file_name(pack), "writing"))?;
        c.next = (off + bytes.len() as u64).next_multiple_of(8);
        Ok((pack, off))
    }

    /// Makes what was appended to a pack durable. After an error the next frames go to another pack: what a failed sync
    /// has lost must not be taken for written.
    fn sync(&self, pack: u32) -> Result<(), StoreError> {
        let done = self
            .file(pack)
            .and_then(|f| f.sync().map_err(StoreError::sync(&file_name(pack))));
        if done.is_err() {
            lock(&self.cursor).pack = None;
        }
        done
    }

    /// The pack that frames are appended to, which a collection must leave alone, and its end.
    fn appended_to(&self) -> Option<u32> {
        lock(&self.cursor).pack
    }

    /// A frame, unpacked. The gate is held, or collections are.
    fn frame(&self, pack: u32, off: u64, bytes: u32) -> Result<Arc<Frame>, StoreError> {
        if let Some(f) = lock(&self.cache).get((pack, off)) {
            return Ok(f);
        }
        let f = Arc::new(self.frame_of_disk(pack, off, bytes)?);
        lock(&self.cache).insert((pack, off), Arc::clone(&f));
        Ok(f)
    }

    fn frame_of_disk(&self, pack: u32, off: u64, bytes: u32) -> Result<Frame, StoreError> {
        let name = file_name(pack);
        if bytes as usize > 2 * frame::RAW_MAX + (4 << 20) {
            return Err(StoreError::corrupt(&name, "a frame of impossible size"));
        }
        let mut buf = vec![0; bytes as usize];
        self.file(pack)?
            .read_at(&mut buf, off)
            .map_err(StoreError::io(&name, "reading"))?;
        frame::open(&buf).map_err(|e| StoreError::corrupt(&name, format!("at {off}: {e}")))
    }

    fn forget_all(&self) {
        *lock(&self.cache) = Cache::default();
    }

    fn forget_frame(&self, pack: u32, off: u64) {
        lock(&self.cache).remove((pack, off));
    }

    fn punch(&self, pack: u32, off: u64, len: u64) {
        if let Err(e) = self.file(pack).and_then(|f| {
            f.punch(off, len)
                .map_err(StoreError::io(&file_name(pack), "punching"))
        }) {
            tracing::warn!(pack, off, len, error = %e, "could not give space back");
        }
    }

    fn remove(&self, pack: u32) {
        lock(&self.open).remove(&pack);
        if let Err(e) = self.disk.remove(&file_name(pack)) {
            tracing::warn!(pack, error = %e, "could not remove an empty pack");
        }
    }

    fn existing(&self) -> Result<Vec<u32>, StoreError> {
        match self.disk.list(DIR) {
            Ok(names) => {
                let mut v: Vec<u32> = names.iter().filter_map(|n| n.parse().ok()).collect();
                v.sort_unstable();
                Ok(v)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(StoreError::io(DIR, "listing")(e)),
        }
    }
}

/// A piece of a read that comes from a chunk.
struct Piece {
    name: Name,
    at: ChunkAt,
    /// Offset in the chunk.
    skip: usize,
    len: usize,
}

impl Store {
    /// Reads contents, packed or not. The gate is held (shared), or collections are.
    ///
    /// # Errors
    /// What the host says; corrupt, naming the pack, when the bytes do not have the name that they should.
    pub fn read_data(&self, place: Place, buf: &mut [u8]) -> Result<(), StoreError> {
        if let Some(why) = lock(&self.packs.broken).as_ref() {
            return Err(StoreError::corrupt(
                "meta",
                format!("the index of packed contents: {why}"),
            ));
        }
        let mut done = 0;
        while done < buf.len() {
            let at = place.offset + done as u64;
            let left = (buf.len() - done) as u64;
            let (packed, n) = self.packs.run(place.segment, at, left);
            let n = usize::try_from(n).unwrap_or(buf.len() - done);
            let piece = &mut buf[done..done + n];
            let here = Place {
                segment: place.segment,
                offset: at,
            };
            if packed {
                self.read_packed(here, piece)?;
            } else {
                self.segments.read_unpacked(here, piece)?;
            }
            done += n;
        }
        Ok(())
    }

    /// True if any byte of a range is packed.
    pub fn is_packed(&self, place: Place, len: u64) -> bool {
        let (packed, n) = self.packs.run(place.segment, place.offset, len);
        packed || n < len
    }

    fn read_packed(&self, place: Place, buf: &mut [u8]) -> Result<(), StoreError> {
        let pieces = self.pieces(place, buf.len())?;
        let mut rest = buf;
        for p in pieces {
            let frame = self.packs.frame(p.at.pack, p.at.frame, p.at.frame_bytes)?;
            let bytes = frame
                .chunk(&p.name)
                .and_then(|c| c.get(p.skip..p.skip + p.len));
            let Some(bytes) = bytes else {
                return Err(StoreError::corrupt(
                    &file_name(p.at.pack),
                    format!("chunk {} is damaged", records::hex(&p.name)),
                ));
            };
            let (now, later) = rest.split_at_mut(p.len);
            now.copy_from_slice(bytes);
            rest = later;
        }
        Ok(())
    }

    /// The chunks that a packed range is made of.
    fn pieces(&self, place: Place, len: usize) -> Result<Vec<Piece>, StoreError> {
        let bad = |what: &str| {
            StoreError::corrupt(
                "meta",
                format!(
                    "the index of packed contents: {what} at {} of segment {}",
                    place.offset, place.segment
                ),
            )
        };
        let mut txn = self.read_head(HEAD)?;
        let first = records::entry_key(place.segment, 0);
        let start = records::entry_key(place.segment, place.offset);
        let after = records::entry_key(place.segment, place.offset + 1);
        let from = match txn.last_before(&first, &after).map_err(unwrap_fs)? {
            Some((k, _)) => k,
            None => start.to_vec(),
        };
        let end = place.offset + len as u64;
        let mut found: Vec<(u64, Entry)> = Vec::new();
        let mut wrong = false;
        txn.scan(
            &from,
            &records::entry_key(place.segment, end),
            &mut |k, v| {
                match (records::place_of(ENTRY, k), Entry::decode(v)) {
                    (Some((_, off)), Some(e)) => found.push((off, e)),
                    _ => wrong = true,
                }
                ControlFlow::Continue(())
            },
        )
        .map_err(unwrap_fs)?;
        if wrong {
            return Err(bad("an entry makes no sense"));
        }
        let mut out = Vec::with_capacity(found.len());
        let mut at = place.offset;
        for (off, e) in found {
            let to = (off + u64::from(e.len)).min(end);
            if to <= at {
                continue;
            }
            if off > at || !e.packed {
                return Err(bad("a gap"));
            }
            let mut chunk = None;
            txn.get(&records::chunk_key(&e.name), &mut |v| {
                chunk = ChunkAt::decode(v);
            })
            .map_err(unwrap_fs)?;
            let Some(chunk) = chunk.filter(|c| c.len == e.len) else {
                return Err(bad("a chunk is missing"));
            };
            out.push(Piece {
                name: e.name,
                at: chunk,
                skip: usize::try_from(at - off).unwrap_or(usize::MAX),
                len: usize::try_from(to - at).unwrap_or(0),
            });
            at = to;
        }
        if at < end {
            return Err(bad("a gap"));
        }
        Ok(out)
    }

    /// Where a chunk is, if it is in a pack.
    ///
    /// # Errors
    /// Corrupt, or what the host says.
    pub fn find_chunk(&self, name: &Name) -> Result<Option<ChunkAt>, StoreError> {
        if self.core()?.catalog.any_head(HEAD).is_none() {
            return Ok(None);
        }
        let mut txn = self.read_head(HEAD)?;
        let mut found = None;
        txn.get(&records::chunk_key(name), &mut |v| {
            found = ChunkAt::decode(v)
        })
        .map_err(unwrap_fs)?;
        Ok(found)
    }

    /// The bytes of a chunk, if it is in a pack and whole. The gate is held, or collections are.
    ///
    /// # Errors
    /// Corrupt, or what the host says.
    pub fn chunk(&self, name: &Name) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(at) = self.find_chunk(name)? else {
            return Ok(None);
        };
        let frame = self.packs.frame(at.pack, at.frame, at.frame_bytes)?;
        Ok(frame.chunk(name).map(<[u8]>::to_vec))
    }

    /// Entries of the index between two places, in slices, so that the lock is not held for long.
    pub(crate) fn each_entry(
        &self,
        from: (u32, u64),
        to: (u32, u64),
        f: &mut dyn FnMut(u32, u64, Entry),
    ) -> Result<(), StoreError> {
        let end = records::entry_key(to.0, to.1).to_vec();
        self.each_index(
            records::entry_key(from.0, from.1).to_vec(),
            &end,
            &mut |k, v| {
                if let (Some((seg, off)), Some(e)) = (records::place_of(ENTRY, k), Entry::decode(v))
                {
                    f(seg, off, e);
                }
            },
        )
    }

    /// Records of the index from `from` up to `to`, in slices.
    pub(crate) fn each_index(
        &self,
        from: Vec<u8>,
        to: &[u8],
        f: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), StoreError> {
        self.each_record(HEAD, from, to, f)
    }

    fn each_record(
        &self,
        head: &str,
        from: Vec<u8>,
        to: &[u8],
        f: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), StoreError> {
        let mut from = from;
        if self.core()?.catalog.any_head(head).is_none() {
            return Ok(());
        }
        loop {
            let (mut n, mut last) = (0, Vec::new());
            let mut txn = self.read_head(head)?;
            txn.scan(&from, to, &mut |k, v| {
                f(k, v);
                n += 1;
                if n >= 1000 {
                    last = k.to_vec();
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
            .map_err(unwrap_fs)?;
            drop(txn);
            if last.is_empty() {
                return Ok(());
            }
            last.push(0);
            from = last;
        }
    }

    /// Calls `f` with the name of every chunk that is in a pack.
    ///
    /// # Errors
    /// Corrupt, or what the host says.
    pub fn each_chunk(&self, f: &mut dyn FnMut(&Name)) -> Result<(), StoreError> {
        self.each_index(vec![CHUNK], &[CHUNK + 1], &mut |k, _| {
            if let Some(name) = records::chunk_name(k) {
                f(&name);
            }
        })
    }

    /// Makes the index, if there is none yet.
    pub(crate) fn make_index(&self) -> Result<(), StoreError> {
        if self.core()?.catalog.hidden.contains_key(HEAD) {
            return Ok(());
        }
        let op = |c: &super::Catalog| {
            Ok((
                CatalogOp::Hide {
                    id: c.next_head,
                    name: HEAD.into(),
                    from: None,
                    created_us: now_us(),
                },
                (),
            ))
        };
        match self.change(op, |(), _| ()) {
            Ok(_) | Err(StoreError::Exists(_)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Changes the index, in batches.
    pub(crate) fn change_index(&self, changes: &[Change]) -> Result<(), StoreError> {
        self.change_records(HEAD, changes)
    }

    /// Changes a hidden tree of the index's kind, in batches.
    fn change_records(&self, head: &str, changes: &[Change]) -> Result<(), StoreError> {
        for slice in changes.chunks(BATCH) {
            let mut txn = self.begin(head)?;
            for (k, v) in slice {
                match v {
                    Some(v) => txn.put(k, v).map_err(unwrap_fs)?,
                    None => drop(txn.del(k).map_err(unwrap_fs)?),
                }
            }
            txn.commit();
        }
        Ok(())
    }

    /// Reads what is packed, when a store is opened.
    pub(super) fn load_packs(&self) -> Result<(), StoreError> {
        self.packs
            .covered
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.packs.stored.store(0, Ordering::Relaxed);
        *lock(&self.packs.broken) = None;
        let last = self.packs.existing()?.last().copied();
        {
            let mut c = lock(&self.packs.cursor);
            c.next_pack = last.map_or(0, |n| n.saturating_add(1));
        }
        let loaded = self
            .each_index(vec![ENTRY], &[ENTRY + 1], &mut |k, v| {
                if let (Some((seg, off)), Some(e)) = (records::place_of(ENTRY, k), Entry::decode(v))
                    && e.packed
                {
                    self.packs.cover(seg, off, off + u64::from(e.len));
                }
            })
            .and_then(|()| {
                self.each_index(vec![FRAME], &[FRAME + 1], &mut |_, v| {
                    if let Some(f) = FrameInfo::decode(v) {
                        let bytes = u64::from(f.bytes);
                        self.packs.stored.fetch_add(bytes, Ordering::Relaxed);
                    }
                })
            });
        if let Err(e) = loaded {
            tracing::error!(error = %e, "the index of packed contents cannot be read");
            *lock(&self.packs.broken) = Some(e.to_string());
        }
        Ok(())
    }
}

/// The store's own error, if that is what it is.
pub(crate) fn unwrap_fs(e: crate::fs::FsError) -> StoreError {
    match e {
        crate::fs::FsError::Errno(libc::ENOSPC) => StoreError::NoSpace,
        crate::fs::FsError::Store(e) => match e.downcast::<StoreError>() {
            Ok(e) => *e,
            Err(e) => StoreError::Refused(e.to_string()),
        },
        e => StoreError::corrupt("meta", e.to_string()),
    }
}
