//! Batches on a head (all or nothing, one log record) and plain reads of any tree.

use std::sync::MutexGuard;

use super::error::StoreError;
use super::{Core, Ordering, Store, log, pages};
use crate::fs::{Extent, FsError, Kv};
use crate::tree::{self, PageId};

/// Pages that few batches need more of; below this the store takes only batches that free something.
const RESERVE: u64 = 512;
/// Below this it takes none.
const RESERVE_FREEING: u64 = pages::FLOOR + 64;
/// Bytes of one batch's record at most.
const RECORD_MAX: usize = 192 << 20;

/// A batch in progress: holds the store's lock. Dropped without [`Txn::commit`], it leaves no trace.
#[derive(Debug)]
pub struct Txn<'a> {
    store: &'a Store,
    core: MutexGuard<'a, Core>,
    head: String,
    head_id: u32,
    root: PageId,
    next_ino: u64,
    base: u64,
    start: usize,
    undo: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    freed: Vec<Extent>,
    garbage: u64,
    data: Vec<(u32, u64, u32)>,
    done: bool,
}

impl From<StoreError> for FsError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::NoSpace => FsError::Errno(libc::ENOSPC),
            other => FsError::Store(Box::new(other)),
        }
    }
}

impl<'a> Txn<'a> {
    pub(super) fn begin(
        store: &'a Store,
        mut core: MutexGuard<'a, Core>,
        head: &str,
    ) -> Result<Self, StoreError> {
        if let Err(e) = core.pages.reserve(RESERVE)
            && core.pages.bitmap.free() < RESERVE_FREEING
        {
            return Err(e);
        }
        let h = core
            .catalog
            .any_head(head)
            .ok_or_else(|| StoreError::NotFound(format!("there is no head {head}")))?;
        let (head_id, root, next_ino, base) = (h.id, h.root, h.next_ino, h.base);
        core.pages.base = base;
        let start = core.log_buf.len();
        Ok(Self {
            store,
            core,
            head: head.to_owned(),
            head_id,
            root,
            next_ino,
            base,
            start,
            undo: Vec::new(),
            freed: Vec::new(),
            garbage: 0,
            data: Vec::new(),
            done: false,
        })
    }

    /// True when the store is short of space, so that only batches that free something should go on.
    pub fn is_tight(&self) -> bool {
        self.core.pages.bitmap.free() < RESERVE
    }

    /// The head's root page as the batch sees it.
    pub fn root(&self) -> PageId {
        self.root
    }

    /// Tells that file data was written, to be made durable before this batch is.
    pub fn note_data(&mut self, segment: u32, offset: u64, len: u32) {
        self.data.push((segment, offset, len));
    }

    fn write(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<bool, StoreError> {
        if self.core.log_buf.len() - self.start > RECORD_MAX {
            return Err(StoreError::NoSpace);
        }
        if self.undo.is_empty() {
            // From here on an error leaves a tree that the undo list can be applied to.
            self.root = tree::own_root(&mut self.core.pages, self.root)?;
        }
        let (root, old) = match value {
            Some(v) => tree::insert(&mut self.core.pages, self.root, key, v)?,
            None => tree::remove(&mut self.core.pages, self.root, key)?,
        };
        self.root = root;
        let had = old.is_some();
        if value.is_none() && !had {
            return Ok(false);
        }
        let core = &mut *self.core;
        if core.log_buf.len() == self.start {
            // Length, kind, number, generation and head; length and number are filled in by `commit`.
            core.log_buf.extend_from_slice(&[0; 4]);
            core.log_buf.push(log::BATCH);
            core.log_buf.extend_from_slice(&[0; 8]);
            core.log_buf
                .extend_from_slice(&core.pages.generation.to_le_bytes());
            core.log_buf.extend_from_slice(&self.head_id.to_le_bytes());
        }
        log::push_change(&mut core.log_buf, key, value);
        self.undo.push((key.to_vec(), old));
        Ok(had)
    }

    /// Makes the batch part of the head. Returns the number of its record (the last one's if nothing changed).
    pub fn commit(mut self) -> u64 {
        self.done = true;
        let core = &mut *self.core;
        if let Some(h) = core.catalog.any_head_mut(&self.head) {
            // Even when nothing changed: the root page may have been copied, and its old place given up.
            h.root = self.root;
            h.next_ino = self.next_ino;
        }
        if self.undo.is_empty() {
            core.log_buf.truncate(self.start);
            return core.seq;
        }
        core.seq += 1;
        let len = u32::try_from(core.log_buf.len() - self.start - 4).unwrap_or(0);
        core.log_buf[self.start..self.start + 4].copy_from_slice(&len.to_le_bytes());
        core.log_buf[self.start + 5..self.start + 13].copy_from_slice(&core.seq.to_le_bytes());
        for d in self.data.drain(..) {
            core.unsynced_bytes += u64::from(d.2);
            core.unsynced.push(d);
        }
        for e in self.freed.drain(..) {
            core.freed_bytes += u64::from(e.len);
            core.freed.push(e);
        }
        core.garbage_bytes += self.garbage;
        let kick = core.log_buf.len() > 4 << 20
            || core.unsynced.len() > 20_000
            || core.pages.dirty_len() > super::background::DIRTY_PAGES
            || core.freed_bytes > super::background::FREED_BYTES;
        let seq = core.seq;
        if core.pages.bitmap.free() < super::background::GROW_AT / 2
            && !self.store.no_room.load(Ordering::Relaxed)
        {
            self.store.want(|w| w.grow = true);
        }
        if kick {
            self.store.want(|w| w.flush = true);
        }
        seq
    }

    fn abort(&mut self) {
        self.core.pages.floor = 0;
        self.take_back();
        self.core.pages.floor = pages::FLOOR;
    }

    fn take_back(&mut self) {
        while let Some((key, old)) = self.undo.pop() {
            let back = match &old {
                Some(v) => tree::insert(&mut self.core.pages, self.root, &key, v),
                None => tree::remove(&mut self.core.pages, self.root, &key),
            };
            match back {
                Ok((root, _)) => self.root = root,
                Err(e) => {
                    tracing::error!(error = %e, "a failed change could not be taken back; the store stops");
                    self.core.failed = Some("the store stopped after an error on its disk");
                    return;
                }
            }
        }
        let start = self.start;
        self.core.log_buf.truncate(start);
        // Taking changes back may have moved the root to another place.
        let (head, root) = (self.head.clone(), self.root);
        if let Some(h) = self.core.catalog.any_head_mut(&head) {
            h.root = root;
        }
    }
}

impl Drop for Txn<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.abort();
        }
    }
}

impl Kv for Txn<'_> {
    fn get(&mut self, key: &[u8], f: &mut dyn FnMut(&[u8])) -> Result<bool, FsError> {
        Ok(tree::get(&mut self.core.pages, self.root, key, |v| f(v))?.is_some())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), FsError> {
        self.write(key, Some(value))?;
        Ok(())
    }

    fn del(&mut self, key: &[u8]) -> Result<bool, FsError> {
        Ok(self.write(key, None)?)
    }

    fn scan(
        &mut self,
        from: &[u8],
        to: &[u8],
        f: &mut crate::fs::OnEntry<'_>,
    ) -> Result<(), FsError> {
        Ok(tree::scan(
            &mut self.core.pages,
            self.root,
            from,
            Some(to),
            f,
        )?)
    }

    fn last_before(
        &mut self,
        from: &[u8],
        before: &[u8],
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>, FsError> {
        Ok(tree::last_before(
            &mut self.core.pages,
            self.root,
            from,
            before,
        )?)
    }

    fn alloc_ino(&mut self) -> u64 {
        self.next_ino += 1;
        self.next_ino - 1
    }

    fn generation(&self) -> u64 {
        self.core.pages.generation
    }

    fn hash_key(&self) -> [u8; 16] {
        self.store.hash_key
    }

    fn drop_extent(&mut self, e: &Extent) {
        if e.flags & crate::fs::EXTENT_SHARED == 0 && e.birth > self.base {
            self.freed.push(*e);
        } else {
            self.garbage += u64::from(e.len);
        }
    }
}

/// Reads of one tree under the store's lock.
#[derive(Debug)]
pub struct ReadTxn<'a> {
    core: MutexGuard<'a, Core>,
    root: PageId,
    hash_key: [u8; 16],
}

impl<'a> ReadTxn<'a> {
    pub(super) fn new(core: MutexGuard<'a, Core>, root: PageId, hash_key: [u8; 16]) -> Self {
        Self {
            core,
            root,
            hash_key,
        }
    }

    /// The catalog, under the same lock.
    pub fn catalog(&self) -> &super::Catalog {
        &self.core.catalog
    }
}

impl Kv for ReadTxn<'_> {
    fn get(&mut self, key: &[u8], f: &mut dyn FnMut(&[u8])) -> Result<bool, FsError> {
        Ok(tree::get(&mut self.core.pages, self.root, key, |v| f(v))?.is_some())
    }

    fn put(&mut self, _: &[u8], _: &[u8]) -> Result<(), FsError> {
        Err(FsError::Errno(libc::EROFS))
    }

    fn del(&mut self, _: &[u8]) -> Result<bool, FsError> {
        Err(FsError::Errno(libc::EROFS))
    }

    fn scan(
        &mut self,
        from: &[u8],
        to: &[u8],
        f: &mut crate::fs::OnEntry<'_>,
    ) -> Result<(), FsError> {
        Ok(tree::scan(
            &mut self.core.pages,
            self.root,
            from,
            Some(to),
            f,
        )?)
    }

    fn last_before(
        &mut self,
        from: &[u8],
        before: &[u8],
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>, FsError> {
        Ok(tree::last_before(
            &mut self.core.pages,
            self.root,
            from,
            before,
        )?)
    }

    fn alloc_ino(&mut self) -> u64 {
        0
    }

    fn generation(&self) -> u64 {
        self.core.pages.generation
    }

    fn hash_key(&self) -> [u8; 16] {
        self.hash_key
    }

    fn drop_extent(&mut self, _: &Extent) {}
}
