//! Commits: writing the trees, so that the log before is no longer needed.
//!
//! Order on disk, which is what makes a crash leave a prefix: flush; then, with the lock held for a moment, the log goes
//! on in the other file and the generation moves on; then data, pages and blob, synced; then the superblock. A crash before
//! the superblock is whole replays the old file, then the new.
//!
//! When the superblock was written but its sync failed, nobody knows which of two commits a crash would leave. Both are
//! kept whole then (pages, blobs, both log files), and the next commit begins with writing the same superblock again.

use std::sync::{Arc, MutexGuard};

use super::disk::DiskFile;
use super::error::StoreError;
use super::packs;
use super::pages::{self, Bitmap, PageMap};
use super::segments::Place;
use super::superblock::{CATALOG_MAX, Run, Superblock, run_pages};
use super::{Catalog, FlushState, Ordering, Store};
use crate::fault;
use crate::fs::Extent;
use crate::tree::{PAGE_SIZE, Page, PageId};

/// Freed file space that is kept for reuse rather than given to the host.
const POOL_KEEP: u64 = 64 << 20;
/// Pages handled with the lock held once.
const SLICE: usize = 256;

/// What a commit holds.
pub(super) struct Committed {
    /// Every root of a head, a checkpoint or a live view.
    pub roots: Vec<PageId>,
    /// Root of the index of packed contents.
    pub packs: PageId,
    /// The places taken by tree pages, reachable or not.
    pub map: Bitmap,
    /// The page file.
    pub file: Arc<dyn DiskFile>,
}

/// The state that a commit writes, taken with the lock held.
struct Snapshot {
    catalog: Catalog,
    /// Roots of live views.
    pinned: Vec<PageId>,
    pages: Arc<PageMap>,
    /// Places free when the commit is durable.
    freed: Vec<PageId>,
    map: Bitmap,
    generation: u64,
    last_seq: u64,
    file: Arc<dyn DiskFile>,
    data_freed: Vec<Extent>,
}

impl Store {
    /// Writes the trees as they are now, so that the log up to here is no longer needed.
    ///
    /// # Errors
    /// What the host says; the state on disk is then the one before, plus the log.
    pub fn commit(&self) -> Result<(), StoreError> {
        self.commit_snapshot().map(|_| ())
    }

    /// As [`Store::commit`]; tells what the commit holds.
    pub(super) fn commit_snapshot(&self) -> Result<Committed, StoreError> {
        // Half a commit, left by a panic, must not be taken for a whole one.
        let stopped =
            |_| StoreError::Refused("the store stopped after an internal error in a commit".into());
        let _one = self.commit_lock.lock().map_err(stopped)?;
        // So that the sync of all data below, which flushes wait for, has little to do.
        self.segments.sync()?;
        let mut state = self.flush_state();
        self.settle(&mut state)?;
        // On a full disk the log may not grow, but a commit gives space back and needs none: the records that wait are
        // part of it. Nobody may flush until it is known whether they can go.
        let full = match self.flush_locked(&mut state) {
            Ok(()) => false,
            Err(StoreError::NoSpace) => true,
            Err(e) => return Err(e),
        };
        fault::point("commit:begin");
        let chain = match state.switched {
            // The last commit failed: the file before is still the one that replay would begin with.
            Some(chain) => chain,
            None => {
                let chain = state.log.chain();
                state.log.switch()?;
                state.switched = Some(chain);
                chain
            }
        };
        let mut snap = self.snapshot(&mut state, full)?;
        let log_file = state.log.active();
        let commit = state.commit + 1;
        let mut blob_runs = std::mem::take(&mut state.spare);
        let old_blob = state.blob.clone();
        let sb_file = Arc::clone(&state.superblock);
        let kept = full.then_some(state);

        let mut sb = Superblock {
            uuid: self.uuid,
            hash_key: self.hash_key,
            commit,
            generation: snap.generation,
            last_seq: snap.last_seq,
            log: u32::try_from(log_file).unwrap_or(0),
            next_segment: 0,
            meta_pages: 0,
            runs: Vec::new(),
            blob_len: 0,
            catalog_len: 0,
            chain,
            blob_sum: [0; 32],
        };
        let written = self.write_commit(&mut snap, &mut sb, &mut blob_runs, &old_blob);
        let stored = written.map(|()| {
            fault::point("commit:superblock");
            sb.store(sb_file.as_ref())
        });
        fault::point("commit:written");
        let mut state = kept.unwrap_or_else(|| self.flush_state());
        if let Err(e) | Ok(Err(e)) = &stored {
            tracing::debug!(error = %e, commit, "a commit failed");
            snap.pages = Arc::default();
            let mut core = self.core()?;
            core.pages.abort_commit(std::mem::take(&mut snap.freed));
            core.freed_bytes += total(&snap.data_freed);
            core.freed.append(&mut snap.data_freed);
            drop(core);
        }
        match stored {
            Ok(Ok(())) => {}
            Ok(Err(e)) => {
                state.suspect = Some((sb, blob_runs));
                return Err(e);
            }
            Err(e) => {
                state.spare = blob_runs;
                return Err(e);
            }
        }
        state.commit = commit;
        state.spare = std::mem::replace(&mut state.blob, blob_runs.clone());
        state.switched = None;
        state.sync_all = false;
        state.log.trim();
        if full {
            state.pending.clear();
            state.pending.shrink_to(8 << 20);
            state.pending_data.clear();
            state.flushed = state.flushed.max(snap.last_seq);
            self.waiting.store(0, Ordering::Relaxed);
        }
        drop(state);
        self.end_commit(&snap)?;
        let mut map = snap.map;
        for run in blob_runs.iter().chain(&old_blob) {
            map.clear_run(*run);
        }
        map.clear(0);
        let mut roots = snap.pinned;
        roots.extend(snap.catalog.heads.values().map(|h| h.root));
        let mut hidden = snap.catalog.hidden;
        let packs = hidden.remove(packs::HEAD).map_or(0, |h| h.root);
        roots.extend(hidden.values().map(|h| h.root));
        roots.extend(snap.catalog.checkpoints.values().map(|c| c.root));
        Ok(Committed {
            roots,
            packs,
            map,
            file: snap.file,
        })
    }

    /// Gives back what the log has grown by, where nobody waits for it to grow again.
    pub(super) fn shrink_log(&self) {
        let mut state = self.flush_state();
        // As long as a commit is not durable, replay needs both files.
        if state.switched.is_none() {
            state.log.shrink();
        }
    }

    /// Finds out about a commit whose superblock may or may not be on disk.
    fn settle(&self, state: &mut MutexGuard<'_, FlushState>) -> Result<(), StoreError> {
        let Some((sb, runs)) = state.suspect.take() else {
            return Ok(());
        };
        if let Err(e) = sb.store(state.superblock.as_ref()) {
            state.suspect = Some((sb, runs));
            return Err(e);
        }
        // It counts now. What it freed stays taken until the next one, and the log goes on where it is.
        state.commit = sb.commit;
        state.spare = std::mem::replace(&mut state.blob, runs);
        Ok(())
    }

    /// Takes what is to be written. Nothing here depends on how much that is, but for copying the page map.
    fn snapshot(
        &self,
        state: &mut MutexGuard<'_, FlushState>,
        full: bool,
    ) -> Result<Snapshot, StoreError> {
        let pool = self.segments.pool_bytes();
        let mut guard = self.core()?;
        let core = &mut *guard;
        let mut catalog = core.catalog.clone();
        let data_freed = std::mem::take(&mut core.freed);
        catalog.garbage_pages = core.pages.garbage;
        // What is freed for reuse now is forgotten if the store is closed after this commit.
        catalog.garbage_bytes = core.garbage_bytes + core.freed_bytes + pool;
        core.freed_bytes = 0;
        let (pages, freed) = core.pages.begin_commit();
        let unsynced = std::mem::take(&mut core.unsynced);
        core.unsynced_bytes = 0;
        // The data of these records becomes durable with this commit. It must not be copied into a later chunk: the places
        // may belong to others by the time that chunk is replayed.
        state.sync_all = true;
        if full {
            state.pending.append(&mut core.log_buf);
            self.waiting
                .store(state.pending.len() as u64, Ordering::Relaxed);
        }
        let snap = Snapshot {
            catalog,
            pinned: core.pinned.keys().copied().collect(),
            pages,
            freed,
            map: core.pages.bitmap.clone(),
            generation: core.pages.committed,
            // Records between the flush and now are in the commit, and will be in the new file: replay passes them over.
            last_seq: core.seq,
            file: core.pages.file(),
            data_freed,
        };
        drop(guard);
        if full {
            state.pending_data.extend(unsynced);
        }
        Ok(snap)
    }

    /// Writes pages and blob, and fills in the superblock.
    fn write_commit(
        &self,
        snap: &mut Snapshot,
        sb: &mut Superblock,
        runs: &mut Vec<Run>,
        old_blob: &[Run],
    ) -> Result<(), StoreError> {
        write_pages(&snap.pages, snap.file.as_ref())?;
        fault::point("commit:pages");
        let mut blob = snap.catalog.encode();
        sb.catalog_len = blob.len() as u64;
        if sb.catalog_len > CATALOG_MAX {
            return Err(StoreError::Refused(
                "the catalog has grown too large; delete checkpoints".into(),
            ));
        }
        let (map_pages, released) = {
            let mut core = self.core()?;
            core.catalog_bytes = sb.catalog_len;
            // The map may grow by what the blob takes.
            let bytes = blob.len() as u64 + core.pages.bitmap.len() / 8 + 512;
            let need = (bytes + bytes / 8192).div_ceil(PAGE_SIZE as u64);
            let released = core.pages.take_blob(runs, need)?;
            (core.pages.bitmap.len(), released)
        };
        let map = &mut snap.map;
        map.grow(map_pages);
        for id in &snap.freed {
            map.clear(*id);
        }
        // Places that are free in memory from now on must not stay in the map: a collection would free them again.
        for run in old_blob.iter().chain(&released) {
            map.clear_run(*run);
        }
        for run in runs.iter() {
            map.set_run(*run);
        }
        blob.extend_from_slice(&map.to_bytes());
        sb.meta_pages = map.len();
        sb.blob_len = blob.len() as u64;
        sb.blob_sum = *blake3::hash(&blob).as_bytes();
        sb.runs.clone_from(runs);
        if blob.len().div_ceil(PAGE_SIZE) as u64 > run_pages(runs) {
            return Err(StoreError::NoSpace);
        }
        let mut rest = blob.as_slice();
        for (first, pages) in runs.iter() {
            let len = usize::try_from(pages * PAGE_SIZE as u64).unwrap_or(usize::MAX);
            let (piece, after) = rest.split_at(len.min(rest.len()));
            if !piece.is_empty() {
                write(snap.file.as_ref(), piece, *first)?;
            }
            rest = after;
        }
        self.segments.sync()?;
        sb.next_segment = self.segments.next_segment();
        snap.file.sync().map_err(StoreError::sync(pages::FILE))
    }

    /// Gives free what a durable commit no longer needs, with the lock held for a moment at a time.
    fn end_commit(&self, snap: &Snapshot) -> Result<(), StoreError> {
        let ids: Vec<PageId> = snap.pages.keys().copied().collect();
        for slice in ids.chunks(SLICE) {
            self.core()?.pages.keep_written(slice);
        }
        let written = self.core()?.pages.end_commit();
        drop(written);
        for slice in snap.freed.chunks(SLICE) {
            self.core()?.pages.free_places(slice);
        }
        if !snap.data_freed.is_empty() {
            // Wait for readers that looked a place up before it was freed.
            drop(self.gate.write());
            for e in &snap.data_freed {
                let place = Place {
                    segment: e.seg,
                    offset: e.off,
                };
                self.segments.give_back(place, u64::from(e.len));
            }
            self.segments.trim_pool(POOL_KEEP);
        }
        Ok(())
    }
}

fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|e| u64::from(e.len)).sum()
}

fn write(file: &dyn DiskFile, bytes: &[u8], page: PageId) -> Result<(), StoreError> {
    file.write_at(bytes, page * PAGE_SIZE as u64)
        .map_err(StoreError::io(pages::FILE, "writing"))
}

/// Writes pages in the order of their places, up to 1 MiB at a time.
fn write_pages(all: &PageMap, file: &dyn DiskFile) -> Result<(), StoreError> {
    const RUN: usize = 256;
    let mut list: Vec<_> = all.iter().collect();
    list.sort_unstable_by_key(|(id, _)| **id);
    let mut buf: Vec<u8> = Vec::with_capacity(RUN.min(list.len()) * PAGE_SIZE);
    let (mut first, mut next) = (0, 0);
    for (&id, page) in list {
        if id != next || buf.len() >= RUN * PAGE_SIZE {
            if !buf.is_empty() {
                write(file, &buf, first)?;
                buf.clear();
            }
            first = id;
        }
        let mut sealed = Page::clone(page);
        sealed.seal(id);
        buf.extend_from_slice(sealed.as_bytes());
        next = id + 1;
    }
    if buf.is_empty() {
        return Ok(());
    }
    write(file, &buf, first)
}
