//! Puts chunks into packs: frames are written and synced first, then the index is changed, in one log record a batch.

use std::collections::{BTreeSet, HashSet};

use super::frame::Builder;
use super::records::{self, ChunkAt, Entry, FrameInfo, Name, name_of};
use super::{Change, HEAD};
use crate::fault;
use crate::store::{Ordering, Store, StoreError};

/// Gathers chunks and entries until [`Writer::finish`]. Whoever has one holds the lock of collections.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    store: &'a Store,
    level: i32,
    frame: Builder,
    /// Name, offset in the frame, length, of the chunks in the open frame.
    in_frame: Vec<(Name, u32, u32)>,
    /// Chunks that are not in the index yet.
    new: HashSet<Name>,
    /// Changes that need the frames, in order.
    changes: Vec<Change>,
    /// Changes that need the chunks.
    entries: Vec<(u32, u64, Entry)>,
    packs: BTreeSet<u32>,
    /// Bytes of new chunks.
    pub new_bytes: u64,
    /// Bytes of frames written.
    pub stored_bytes: u64,
    /// New chunks.
    pub new_chunks: u64,
}

impl<'a> Writer<'a> {
    pub fn new(store: &'a Store, level: i32) -> Result<Self, StoreError> {
        store.make_index()?;
        Ok(Self {
            store,
            level,
            frame: Builder::default(),
            in_frame: Vec::new(),
            new: HashSet::new(),
            changes: Vec::new(),
            entries: Vec::new(),
            packs: BTreeSet::new(),
            new_bytes: 0,
            stored_bytes: 0,
            new_chunks: 0,
        })
    }

    /// True if the store has the chunk, or will have it.
    pub fn has(&self, name: &Name) -> Result<bool, StoreError> {
        Ok(self.new.contains(name) || self.store.find_chunk(name)?.is_some())
    }

    /// Adds a chunk unless the store has it; returns its name.
    pub fn put(&mut self, bytes: &[u8]) -> Result<Name, StoreError> {
        let name = name_of(bytes);
        if !self.has(&name)? {
            self.put_new(name, bytes)?;
        }
        Ok(name)
    }

    /// Adds a chunk, also if the store has it at another place; that one is given up.
    pub fn put_new(&mut self, name: Name, bytes: &[u8]) -> Result<(), StoreError> {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if len == 0 || len > records::CHUNK_MAX {
            return Err(StoreError::Refused("a chunk of impossible size".into()));
        }
        self.new.insert(name);
        let off = self.frame.add(name, bytes);
        self.in_frame.push((name, off, len));
        self.new_bytes += u64::from(len);
        self.new_chunks += 1;
        if self.frame.is_full() {
            self.close()?;
        }
        Ok(())
    }

    /// Says what a range of a segment holds.
    pub fn entry(&mut self, segment: u32, off: u64, entry: Entry) {
        self.entries.push((segment, off, entry));
    }

    /// Things that wait in memory.
    pub fn waiting(&self) -> usize {
        self.changes.len() + self.entries.len()
    }

    fn close(&mut self) -> Result<(), StoreError> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let raw = u32::try_from(self.frame.raw_len()).unwrap_or(u32::MAX);
        let chunks = u32::try_from(self.frame.count()).unwrap_or(u32::MAX);
        let bytes = self.frame.close(self.level);
        let (pack, off) = self.store.packs.append(&bytes)?;
        self.packs.insert(pack);
        self.stored_bytes += bytes.len() as u64;
        let frame_bytes = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let info = FrameInfo {
            bytes: frame_bytes,
            raw,
            chunks,
        };
        let key = records::frame_key(pack, off).to_vec();
        self.changes.push((key, Some(info.encode().to_vec())));
        for (name, at, len) in self.in_frame.drain(..) {
            let chunk = ChunkAt {
                pack,
                frame: off,
                frame_bytes,
                off: at,
                len,
            };
            let key = records::chunk_key(&name).to_vec();
            self.changes.push((key, Some(chunk.encode().to_vec())));
        }
        Ok(())
    }

    /// Makes the frames durable, then changes the index. It is durable with the next flush.
    pub fn finish(&mut self) -> Result<(), StoreError> {
        self.close()?;
        fault::point("pack:frames");
        for pack in std::mem::take(&mut self.packs) {
            self.store.packs.sync(pack)?;
        }
        fault::point("pack:synced");
        self.store
            .packs
            .stored
            .fetch_add(self.stored_bytes, Ordering::Relaxed);
        self.stored_bytes = 0;
        self.store
            .change_index(&std::mem::take(&mut self.changes))?;
        self.new.clear();
        fault::point("pack:chunks");
        for slice in std::mem::take(&mut self.entries).chunks(super::BATCH) {
            let changes: Vec<Change> = slice
                .iter()
                .map(|(seg, off, e)| {
                    let key = records::entry_key(*seg, *off).to_vec();
                    (key, Some(e.encode().to_vec()))
                })
                .collect();
            self.store.change_index(&changes)?;
            // Until here readers take the segment's own bytes, which are still there.
            for (seg, off, e) in slice.iter().filter(|(_, _, e)| e.packed) {
                self.store.packs.cover(*seg, *off, off + u64::from(e.len));
            }
        }
        fault::point("pack:mapped");
        Ok(())
    }
}

impl Store {
    /// Runs `f` with a writer, holding collections off.
    pub(crate) fn with_writer<T>(
        &self,
        level: i32,
        f: impl FnOnce(&mut Writer<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let stopped = |_| {
            StoreError::Refused("the store stopped after an internal error in a collection".into())
        };
        let _one = self.gc_lock.lock().map_err(stopped)?;
        let mut w = Writer::new(self, level)?;
        let value = f(&mut w)?;
        w.finish()?;
        Ok(value)
    }

    /// True if something is or was packed.
    pub fn has_index(&self) -> Result<bool, StoreError> {
        Ok(self.core()?.catalog.any_head(HEAD).is_some())
    }
}
