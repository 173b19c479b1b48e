//! Flushes of the log, commits of the trees, replay, and the background thread that does them.
//!
//! Order on disk, which is what makes a crash leave a prefix:
//! - flush: file data of the records (synced in place, or, if little, copied into the chunk), then the chunk, synced;
//! - commit: flush; then, with the lock held for a moment, the log switches files and the generation moves on; then data,
//!   pages and blob, synced; then the superblock. A crash before the superblock is whole replays the old file, then the new.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::StoreError;
use super::log::{self, Record};
use super::pages::{self, Bitmap};
use super::segments::Place;
use super::superblock::Superblock;
use super::{Catalog, CatalogOp, FlushState, Store};
use crate::fault;
use crate::tree::{self, PAGE_SIZE, Page, PageId};

/// Dirty pages at which a commit begins.
pub(super) const DIRTY_PAGES: usize = 10 * 1024;
/// Freed data at which a commit begins, so that the space can be used again.
pub(super) const FREED_BYTES: u64 = 512 << 20;
/// Log length at which a commit begins.
const LOG_BYTES: u64 = 48 << 20;
/// Up to this much unsynced file data is copied into the log instead of being synced in place.
const EMBED_BYTES: u64 = 256 << 10;
const EMBED_PIECES: usize = 512;
/// A flush happens at least this often when there is something to flush.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// Freed file space that is kept for reuse rather than given to the host.
const POOL_KEEP: u64 = 64 << 20;

/// What a commit holds.
pub(super) struct Committed {
    /// Every root of a head, a checkpoint or a live view.
    pub roots: Vec<PageId>,
    /// The places taken by tree pages, reachable or not.
    pub map: Bitmap,
    /// The page file.
    pub file: Arc<dyn super::disk::DiskFile>,
}

impl Store {
    /// Makes all records up to `seq` durable.
    ///
    /// # Errors
    /// What the host says; the records are kept and tried again.
    pub fn flush(&self, seq: u64) -> Result<(), StoreError> {
        let mut state = self.flush_state();
        if state.flushed >= seq {
            return Ok(());
        }
        self.flush_locked(&mut state)
    }

    /// Makes everything that happened so far durable.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush_all(&self) -> Result<(), StoreError> {
        let mut state = self.flush_state();
        self.flush_locked(&mut state)
    }

    fn flush_locked(&self, state: &mut FlushState) -> Result<(), StoreError> {
        let last = {
            let mut core = self.core()?;
            let core = &mut *core;
            if state.pending.is_empty() {
                std::mem::swap(&mut state.pending, &mut core.log_buf);
            } else {
                state.pending.append(&mut core.log_buf);
            }
            state.pending_data.append(&mut core.unsynced);
            core.unsynced_bytes = 0;
            core.seq
        };
        if state.pending.is_empty() && state.pending_data.is_empty() {
            state.flushed = last;
            return Ok(());
        }
        fault::point("flush:data");
        let embedded = if state.sync_all {
            self.segments.sync()?;
            Vec::new()
        } else {
            self.embed_or_sync(&state.pending_data)?
        };
        fault::point("flush:chunk");
        let first = state.flushed + 1;
        let FlushState { log, pending, .. } = state;
        log.append(first, last, &[&embedded, pending])?;
        fault::point("flush:done");
        state.pending.clear();
        state.pending_data.clear();
        state.flushed = last;
        Ok(())
    }

    /// Data records for the chunk, or nothing after a sync of the segments.
    fn embed_or_sync(&self, data: &[(u32, u64, u32)]) -> Result<Vec<u8>, StoreError> {
        let bytes: u64 = data.iter().map(|d| u64::from(d.2)).sum();
        if bytes > EMBED_BYTES || data.len() > EMBED_PIECES || self.segments.is_crowded() {
            self.segments.sync()?;
            return Ok(Vec::new());
        }
        let mut out = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0) + data.len() * 32);
        let mut buf = Vec::new();
        for &(segment, offset, len) in data {
            buf.resize(len as usize, 0);
            self.segments.read(Place { segment, offset }, &mut buf)?;
            log::push_data(&mut out, segment, offset, &buf);
        }
        Ok(out)
    }

    /// Writes the trees as they are now, so that the log up to here is no longer needed.
    ///
    /// # Errors
    /// What the host says; the state on disk is then the one before, plus the log.
    pub fn commit(&self) -> Result<(), StoreError> {
        self.commit_snapshot().map(|_| ())
    }

    /// As [`Store::commit`]; tells what the commit holds.
    pub(super) fn commit_snapshot(&self) -> Result<Committed, StoreError> {
        let _one = self
            .commit_lock
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut state = self.flush_state();
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
                state.log.switch();
                state.switched = Some(chain);
                chain
            }
        };
        let mut core = self.core()?;
        let catalog_json = core.catalog.encode();
        let blob_bytes = catalog_json.len() as u64 + core.pages.bitmap.len() / 8 + 4096;
        let blob_pages = blob_bytes.div_ceil(PAGE_SIZE as u64) + 1;
        let blob_page = core.pages.take_blob(blob_pages)?;
        let (list, freed) = core.pages.begin_commit();
        let mut map: Bitmap = core.pages.bitmap.clone();
        let generation = core.pages.committed;
        // Records between the flush and now are in the commit, and will be in the new file: replay passes them over.
        let last_seq = core.seq;
        let file = core.pages.file();
        let data_freed = std::mem::take(&mut core.freed);
        core.freed_bytes = 0;
        if full {
            let late = std::mem::take(&mut core.log_buf);
            state.pending.extend_from_slice(&late);
        }
        // Their data becomes durable with this commit. It must not be copied into a later chunk: the places may belong
        // to others by the time that chunk is replayed.
        if full {
            let late = std::mem::take(&mut core.unsynced);
            state.pending_data.extend(late);
        }
        core.unsynced.clear();
        core.unsynced_bytes = 0;
        state.sync_all = true;
        let mut roots: Vec<PageId> = core.pinned.keys().copied().collect();
        roots.extend(core.catalog.heads.values().map(|h| h.root));
        roots.extend(core.catalog.checkpoints.values().map(|c| c.root));
        drop(core);
        let log_file = state.log.active();
        let commit = state.commit + 1;
        let old_blob = state.blob;
        let sb_file = Arc::clone(&state.superblock);
        let kept = full.then_some(state);

        for id in freed
            .iter()
            .copied()
            .chain(old_blob.0..old_blob.0 + old_blob.1)
        {
            if id != 0 {
                map.clear(id);
            }
        }
        let catalog_len = catalog_json.len() as u64;
        let mut blob = catalog_json;
        blob.extend_from_slice(&map.to_bytes());
        let result = self
            .write_commit(&list, &file, &blob, blob_page)
            .and_then(|()| {
                let sb = Superblock {
                    uuid: self.uuid,
                    hash_key: self.hash_key,
                    commit,
                    generation,
                    last_seq,
                    log: u32::try_from(log_file).unwrap_or(0),
                    next_segment: self.segments.next_segment(),
                    meta_pages: map.len(),
                    blob_page,
                    blob_len: blob.len() as u64,
                    catalog_len,
                    chain,
                    blob_sum: *blake3::hash(&blob).as_bytes(),
                };
                fault::point("commit:superblock");
                sb.store(sb_file.as_ref())
            });
        fault::point("commit:written");
        let mut state = kept.unwrap_or_else(|| self.flush_state());
        let mut core = self.core()?;
        if let Err(e) = result {
            core.pages.abort_commit(freed);
            for id in blob_page..blob_page + blob_pages {
                core.pages.bitmap.clear(id);
            }
            core.freed_bytes += data_freed.iter().map(|e| u64::from(e.len)).sum::<u64>();
            core.freed.extend(data_freed);
            return Err(e);
        }
        core.pages.end_commit(&freed);
        for id in old_blob.0..old_blob.0 + old_blob.1 {
            if id != 0 {
                core.pages.bitmap.clear(id);
            }
        }
        drop(core);
        state.commit = commit;
        state.blob = (blob_page, blob_pages);
        state.switched = None;
        state.sync_all = false;
        if full {
            state.pending.clear();
            state.pending_data.clear();
            state.flushed = state.flushed.max(last_seq);
        }
        drop(state);
        if !data_freed.is_empty() {
            // Wait for readers that looked a place up before it was freed.
            drop(self.gate.write());
            for e in &data_freed {
                let place = Place {
                    segment: e.seg,
                    offset: e.off,
                };
                self.segments.give_back(place, u64::from(e.len));
            }
            self.segments.trim_pool(POOL_KEEP);
        }
        for id in blob_page..blob_page + blob_pages {
            map.clear(id);
        }
        map.clear(0);
        Ok(Committed { roots, map, file })
    }

    fn write_commit(
        &self,
        list: &[(PageId, Arc<Page>)],
        file: &Arc<dyn super::disk::DiskFile>,
        blob: &[u8],
        blob_page: PageId,
    ) -> Result<(), StoreError> {
        let write = |bytes: &[u8], page: PageId| {
            file.write_at(bytes, page * PAGE_SIZE as u64)
                .map_err(StoreError::io(pages::FILE, "writing"))
        };
        const RUN: usize = 256;
        let mut buf: Vec<u8> = Vec::with_capacity(RUN * PAGE_SIZE);
        let (mut first, mut next) = (0, 0);
        for (id, page) in list {
            if *id != next || buf.len() >= RUN * PAGE_SIZE {
                if !buf.is_empty() {
                    write(&buf, first)?;
                    buf.clear();
                }
                first = *id;
            }
            let mut sealed = Page::clone(page);
            sealed.seal(*id);
            buf.extend_from_slice(sealed.as_bytes());
            next = id + 1;
        }
        if !buf.is_empty() {
            write(&buf, first)?;
        }
        fault::point("commit:pages");
        write(blob, blob_page)?;
        self.segments.sync()?;
        file.sync().map_err(StoreError::sync(pages::FILE))
    }

    /// Replays the log after opening, and commits what it brought.
    pub(super) fn replay(&self, sb: &Superblock) -> Result<(), StoreError> {
        let mut applied = 0u64;
        let end = log::replay(
            self.disk.as_ref(),
            sb.log as usize,
            sb.chain,
            sb.last_seq,
            &mut |last, payload| {
                // A chunk that the commit holds whole: its data may have been replaced since.
                if last <= sb.last_seq {
                    return Ok(());
                }
                let mut rest = payload;
                while let Some(record) = log::next_record(&mut rest)? {
                    self.replay_record(&record, sb.generation)?;
                    applied += 1;
                }
                Ok(())
            },
        )?;
        {
            let mut state = self.flush_state();
            state.flushed = end.last_seq.max(sb.last_seq);
            // Go on after what was replayed, in the file that replay would read next.
            state.log = log::Log::open(self.disk.as_ref(), end.file, end.chain)?;
            let mut core = self.core()?;
            core.seq = core.seq.max(end.last_seq);
        }
        if end.chunks > 0 {
            tracing::info!(
                records = applied,
                chunks = end.chunks,
                "replayed the log after an unclean end"
            );
            // A commit switches the log to the other file, which replay may have read. That is safe, as nothing is
            // written to the log before that commit is durable.
            self.commit()?;
        }
        Ok(())
    }

    fn replay_record(&self, record: &Record<'_>, durable: u64) -> Result<(), StoreError> {
        match *record {
            Record::Data {
                segment,
                offset,
                bytes,
            } => {
                if segment >= self.segments.next_segment()
                    || offset.saturating_add(bytes.len() as u64) > super::segments::SEGMENT_BYTES
                {
                    return Err(StoreError::corrupt(
                        "log",
                        "a data record outside of any segment",
                    ));
                }
                self.segments.write(Place { segment, offset }, bytes)
            }
            Record::Batch {
                seq,
                generation,
                head,
                mut changes,
            } => {
                let mut guard = self.core()?;
                let core = &mut *guard;
                if seq <= core.seq {
                    return Ok(());
                }
                core.pages.generation = core.pages.generation.max(generation).max(durable + 1);
                core.pages.reserve(1024)?;
                let h = core.catalog.head_by_id(head).ok_or_else(|| {
                    StoreError::corrupt(
                        "log",
                        format!("a batch for head {head}, which is not there"),
                    )
                })?;
                core.pages.base = h.base;
                while let Some((key, value)) = log::next_change(&mut changes)? {
                    let (root, _) = match value {
                        Some(v) => tree::insert(&mut core.pages, h.root, key, v)?,
                        None => tree::remove(&mut core.pages, h.root, key)?,
                    };
                    h.root = root;
                    if let Some(ino) = crate::fs::inode_of_key(key) {
                        h.next_ino = h.next_ino.max(ino + 1);
                    }
                }
                core.seq = seq;
                Ok(())
            }
            Record::Catalog {
                seq,
                generation,
                json,
            } => {
                let mut guard = self.core()?;
                let core = &mut *guard;
                if seq <= core.seq {
                    return Ok(());
                }
                let op: CatalogOp = serde_json::from_slice(json)
                    .map_err(|e| StoreError::corrupt("log", format!("a catalog record: {e}")))?;
                core.pages.generation = core.pages.generation.max(generation);
                let generation = core.pages.generation;
                core.catalog.apply(&op, generation)?;
                if Catalog::fixes_state(&op) {
                    core.pages.generation += 1;
                }
                core.seq = seq;
                Ok(())
            }
        }
    }

    /// Starts the thread that flushes, commits and collects garbage in the background.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start_background(self: &Arc<Self>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let store = Arc::clone(self);
        std::thread::Builder::new()
            .name("cowfs-store".into())
            .spawn(move || store.background())
    }

    fn background(self: &Arc<Self>) {
        let mut last_flush = Instant::now();
        loop {
            let (stop, commit, gc) = {
                let mut w = self
                    .wanted
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                while !(w.flush || w.commit || w.gc || w.stop) && last_flush.elapsed() < FLUSH_EVERY
                {
                    let left = FLUSH_EVERY.saturating_sub(last_flush.elapsed());
                    w = self
                        .wake
                        .wait_timeout(w, left)
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .0;
                }
                let got = (w.stop, w.commit, w.gc);
                w.flush = false;
                w.commit = false;
                w.gc = false;
                got
            };
            if stop {
                return;
            }
            last_flush = Instant::now();
            if let Err(e) = self.flush_all() {
                tracing::error!(error = %e, "flush failed; it will be tried again");
            }
            if commit || self.commit_is_due() {
                if let Err(e) = self.commit() {
                    tracing::error!(error = %e, "commit failed; it will be tried again");
                }
            }
            if gc || self.gc_is_due() {
                let store = Arc::clone(self);
                // Apart, so that flushes go on meanwhile. A second one waits for the first.
                let spawned =
                    std::thread::Builder::new()
                        .name("cowfs-gc".into())
                        .spawn(move || {
                            if let Err(e) = store.gc() {
                                tracing::error!(error = %e, "garbage collection failed");
                            }
                        });
                if let Err(e) = spawned {
                    tracing::error!(error = %e, "no thread for garbage collection");
                }
            }
        }
    }

    fn commit_is_due(&self) -> bool {
        let log = self.flush_state().log.used();
        self.core().is_ok_and(|c| {
            log > LOG_BYTES || c.pages.dirty_len() > DIRTY_PAGES || c.freed_bytes > FREED_BYTES
        })
    }

    /// True when a quarter of the pages, or much file data, may be garbage.
    fn gc_is_due(&self) -> bool {
        if self.gc_lock.try_lock().is_err() {
            return false;
        }
        self.core().is_ok_and(|c| {
            c.pages.garbage > 4096.max(c.pages.bitmap.len() / 4) || c.garbage_bytes > 1 << 30
        })
    }

    /// Ends the background thread's loop.
    pub fn stop_background(&self) {
        self.gc_stop
            .store(true, std::sync::atomic::Ordering::Relaxed);
        self.want(|w| w.stop = true);
    }
}
