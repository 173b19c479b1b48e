//! The store: heads and checkpoints of key-value trees, file data, a redo log and commits, in one host directory.
//!
//! `docs/design.md` draws the layout and what a crash leaves at each step.

mod background;
pub mod bitmap;
pub mod catalog;
mod check;
mod checkpoints;
mod commit;
pub mod disk;
mod error;
mod flush;
mod gc;
pub mod log;
mod open;
mod pace;
pub mod packs;
pub mod pages;
pub(crate) mod repair;
mod replay;
mod row;
pub mod segments;
pub mod superblock;
mod sys;
mod txn;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

pub use catalog::{Catalog, CatalogOp, Checkpoint, Checkpoints, Head, Origin, Source};
pub use check::CheckReport;
pub use error::StoreError;
pub use gc::GcReport;
pub use repair::LostPage;
pub use row::Row;
pub use txn::{ReadTxn, Txn};

use crate::fs::Extent;
use crate::tree::PageId;
use disk::{Disk, DiskFile};
use log::Log;
use pages::Pages;
use segments::Segments;
use superblock::{CATALOG_MAX, Run, Superblock};

/// Everything that changes under one lock.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) pages: Pages,
    pub(crate) catalog: Catalog,
    /// Bytes of its JSON, more or less.
    catalog_bytes: u64,
    /// Records since the last flush.
    log_buf: Vec<u8>,
    /// Number of the last record.
    seq: u64,
    /// File data written since the last flush, not yet durable.
    unsynced: Vec<(u32, u64, u32)>,
    unsynced_bytes: u64,
    /// Extents that a head dropped and nobody else has: reusable when a commit without them is durable.
    freed: Vec<Extent>,
    freed_bytes: u64,
    /// Bytes of extents left for garbage collection (an estimate).
    garbage_bytes: u64,
    /// Roots that live views hold, with their counts.
    pinned: HashMap<PageId, u32>,
    /// Set when an undo failed: memory is no longer to be trusted, so nothing more is done.
    failed: Option<&'static str>,
}

/// What the flusher keeps between flushes.
#[derive(Debug)]
struct FlushState {
    log: Log,
    /// Records taken but not yet durable, from a flush that failed.
    pending: Vec<u8>,
    /// Data of a failed flush.
    pending_data: Vec<(u32, u64, u32)>,
    /// Last durable record.
    flushed: u64,
    /// Number of the last commit.
    commit: u64,
    /// Pages of the last commit's blob.
    blob: Vec<Run>,
    /// Pages kept for the next one: those of the blob before. So a commit needs no place that is not there.
    spare: Vec<Run>,
    /// A commit whose superblock may be on disk or not, as its sync failed, with its blob.
    suspect: Option<(Superblock, Vec<Run>)>,
    /// The log went on in the other file for a commit that is not durable yet: the file before is still needed.
    switched: Option<[u8; 16]>,
    /// A commit took over file data that is not durable yet, so that a flush must sync all of it.
    sync_all: bool,
    superblock: Arc<dyn DiskFile>,
}

#[derive(Debug, Default)]
struct Wanted {
    flush: bool,
    commit: bool,
    gc: bool,
    /// Places in `meta` run low.
    grow: bool,
    stop: bool,
}

/// Numbers about a store.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Stats {
    pub generation: u64,
    pub meta_pages: u64,
    pub meta_free_pages: u64,
    pub dirty_pages: u64,
    pub log_bytes: u64,
    pub records: u64,
    pub durable_records: u64,
    pub commits: u64,
    pub garbage_pages: u64,
    pub garbage_bytes: u64,
    pub reuse_bytes: u64,
    pub gc_runs: u64,
    /// Pages that the collection which runs now has read, and will read (0: none runs).
    pub gc_done_pages: u64,
    pub gc_total_pages: u64,
    /// Bytes of files in packs, and what the packs take.
    pub packed_bytes: u64,
    pub pack_stored_bytes: u64,
    /// How far the pack is that runs or ran last.
    pub pack_done_bytes: u64,
    pub pack_total_bytes: u64,
}

/// A flush below this is quick, microseconds.
const QUICK_US: u64 = 400;

/// An open store.
#[derive(Debug)]
pub struct Store {
    disk: Arc<dyn Disk>,
    core: Mutex<Core>,
    flush: Mutex<FlushState>,
    commit_lock: Mutex<()>,
    gc_lock: Mutex<()>,
    /// Data segments.
    pub segments: Segments,
    /// Packed contents.
    pub packs: packs::Packs,
    /// One pack at a time.
    pack_lock: Mutex<()>,
    /// Pages that a collection has read, and will read.
    gc_done: AtomicU64,
    gc_total: AtomicU64,
    /// Held (shared) by whoever uses a place in a segment: a reader from looking it up to having read it, a writer from
    /// getting it to referring to it.
    pub gate: RwLock<()>,
    wanted: Mutex<Wanted>,
    wake: Condvar,
    uuid: [u8; 16],
    hash_key: [u8; 16],
    gc_runs: AtomicU64,
    /// Blocks of segments that a collection has punched.
    punched: Mutex<rustc_hash::FxHashMap<u32, bitmap::Bitmap>>,
    /// Requests of programs, so that background work knows whether it is alone.
    requests: AtomicU64,
    /// Collections that were asked for, and how many of these requests have been served.
    gc_asked: AtomicU64,
    gc_served: AtomicU64,
    gc_stop: AtomicBool,
    /// A thread collects, and shall collect once more.
    gc_busy: AtomicBool,
    /// The last collection in the background.
    gc_thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    gc_again: AtomicBool,
    gc_backoff: background::Backoff,
    /// The host had no room when `meta` was to grow ahead; not tried again for a while.
    no_room: AtomicBool,
    /// Bytes of records that a flush has taken but not made durable.
    waiting: AtomicU64,
    /// How long a flush takes of late, microseconds (a moving average).
    flush_us: AtomicU64,
    /// Lock file; held while the store is open.
    _lock: Option<std::fs::File>,
}

/// Microseconds since 1970.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.map_or(0, |d| d.as_micros())).unwrap_or(i64::MAX)
}

impl Store {
    /// The lock of the core. A thread that panicked while it held it may have left half a change: nothing goes on then.
    pub(crate) fn core(&self) -> Result<MutexGuard<'_, Core>, StoreError> {
        let core = self
            .core
            .lock()
            .map_err(|_| StoreError::Refused("the store stopped after an internal error".into()))?;
        if let Some(why) = core.failed {
            return Err(StoreError::Refused(why.into()));
        }
        Ok(core)
    }

    fn flush_state(&self) -> MutexGuard<'_, FlushState> {
        self.flush
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Store uuid.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// The key of the directory hash.
    pub fn hash_key(&self) -> [u8; 16] {
        self.hash_key
    }

    /// Free space of the host.
    ///
    /// # Errors
    /// What the host says.
    pub fn space(&self) -> Result<disk::Space, StoreError> {
        self.disk
            .space()
            .map_err(StoreError::io("", "asking for its free space"))
    }

    /// A copy of the catalog.
    ///
    /// # Errors
    /// When the store has stopped.
    pub fn catalog(&self) -> Result<Catalog, StoreError> {
        Ok(self.core()?.catalog.clone())
    }

    /// Begins a batch on a head.
    ///
    /// # Errors
    /// Not found; no space for the pages that a batch may need.
    pub fn begin(&self, head: &str) -> Result<Txn<'_>, StoreError> {
        loop {
            let core = self.core()?;
            if !self.is_overfull(&core) {
                return Txn::begin(self, core, head);
            }
            // Faster than the disk: wait for it.
            drop(core);
            self.push_back()?;
        }
    }

    /// Reads a tree as it is.
    ///
    /// # Errors
    /// When the store has stopped.
    pub fn read(&self, root: PageId) -> Result<ReadTxn<'_>, StoreError> {
        Ok(ReadTxn::new(self.core()?, root, self.hash_key))
    }

    /// Reads a head as it is now.
    ///
    /// # Errors
    /// Not found.
    pub fn read_head(&self, head: &str) -> Result<ReadTxn<'_>, StoreError> {
        let core = self.core()?;
        let root = core
            .catalog
            .any_head(head)
            .ok_or_else(|| StoreError::NotFound(format!("there is no head {head}")))?
            .root;
        Ok(ReadTxn::new(core, root, self.hash_key))
    }

    /// Applies and logs a catalog operation that `make` builds under the lock, then runs `then` under it as well, with the
    /// pinned roots.
    /// Returns what `make` returned beside the operation, and the record's number.
    ///
    /// # Errors
    /// What `make` refuses, or when it does not fit.
    pub fn change<T>(
        &self,
        make: impl FnOnce(&Catalog) -> Result<(CatalogOp, T), StoreError>,
        then: impl FnOnce(&T, &mut HashMap<PageId, u32>),
    ) -> Result<(T, u64), StoreError> {
        let mut guard = self.core()?;
        let core = &mut *guard;
        let (op, value) = make(&core.catalog)?;
        let json = serde_json::to_vec(&op).unwrap_or_default();
        if Catalog::adds(&op) {
            // What opening a store refuses must not be written. A record has all that the catalog gets by it, but numbers.
            let grown = core.catalog_bytes + json.len() as u64 + 256;
            if grown > CATALOG_MAX / 4 * 3 {
                return Err(StoreError::Refused(
                    "the catalog has grown too large; delete checkpoints or heads".into(),
                ));
            }
        }
        let generation = core.pages.generation;
        core.catalog.apply(&op, generation)?;
        if Catalog::adds(&op) {
            // The next commit counts anew.
            core.catalog_bytes += json.len() as u64 + 256;
        }
        if Catalog::fixes_state(&op) {
            core.pages.generation += 1;
        }
        core.seq += 1;
        let len = u32::try_from(17 + json.len()).unwrap_or(0);
        core.log_buf.extend_from_slice(&len.to_le_bytes());
        core.log_buf.push(log::CATALOG);
        core.log_buf.extend_from_slice(&core.seq.to_le_bytes());
        core.log_buf.extend_from_slice(&generation.to_le_bytes());
        core.log_buf.extend_from_slice(&json);
        let seq = core.seq;
        then(&value, &mut core.pinned);
        drop(guard);
        self.want(|w| w.flush = true);
        Ok((value, seq))
    }

    /// Makes everything that has happened durable.
    ///
    /// # Errors
    /// What the host says.
    pub fn sync(&self) -> Result<(), StoreError> {
        let seq = self.core()?.seq;
        self.flush(seq)
    }

    /// Keeps a root from garbage collection until [`Store::unpin_root`].
    ///
    /// # Errors
    /// When the store has stopped.
    pub fn pin_root(&self, root: PageId) -> Result<(), StoreError> {
        *self.core()?.pinned.entry(root).or_insert(0) += 1;
        Ok(())
    }

    /// Fixes a head as it is now and pins that tree; returns its root, for [`Store::unpin_root`]. Unlike the root of a
    /// checkpoint, a head's root is not enough to keep its tree: the head would go on to change or free the pages that
    /// nothing else has. So its base is raised, as for a checkpoint. That is not logged: a pin ends with the process, and
    /// a head that replay finds with a lower base only frees at once what it would have left for a collection.
    ///
    /// # Errors
    /// Not found; when the store has stopped.
    pub fn pin_head(&self, head: &str) -> Result<PageId, StoreError> {
        let mut guard = self.core()?;
        let core = &mut *guard;
        let generation = core.pages.generation;
        let h = core
            .catalog
            .any_head_mut(head)
            .ok_or_else(|| StoreError::NotFound(format!("there is no head {head}")))?;
        h.base = generation;
        let root = h.root;
        core.pages.generation += 1;
        *core.pinned.entry(root).or_insert(0) += 1;
        Ok(root)
    }

    /// Finds a root in the catalog and pins it under the same lock, so that nobody can delete it in between. Returns what
    /// `find` returned; [`Store::unpin_root`] lets the root go.
    ///
    /// # Errors
    /// What `find` refuses; when the store has stopped.
    pub fn pin_found<T>(
        &self,
        find: impl FnOnce(&Catalog) -> Result<(PageId, T), StoreError>,
    ) -> Result<(PageId, T), StoreError> {
        let mut core = self.core()?;
        let (root, value) = find(&core.catalog)?;
        *core.pinned.entry(root).or_insert(0) += 1;
        Ok((root, value))
    }

    /// Lets a root go.
    pub fn unpin_root(&self, root: PageId) {
        if let Ok(mut core) = self.core()
            && let Some(n) = core.pinned.get_mut(&root)
        {
            *n -= 1;
            if *n == 0 {
                core.pinned.remove(&root);
            }
        }
    }

    fn want(&self, f: impl FnOnce(&mut Wanted)) {
        let mut w = self
            .wanted
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        f(&mut w);
        drop(w);
        self.wake.notify_all();
    }

    /// What differs between two trees, key by key. Both must be fixed and pinned: the lock is taken for each page only, so
    /// that the filesystem goes on meanwhile.
    ///
    /// # Errors
    /// Corrupt, or what the host says.
    pub fn diff(
        &self,
        a: PageId,
        b: PageId,
        f: &mut crate::tree::OnDifference<'_>,
    ) -> Result<(), StoreError> {
        crate::tree::diff(&mut PageByPage(self), a, b, f)
    }

    /// Gives the calling thread a low priority, for good.
    pub(crate) fn lower_priority() {
        sys::lower_priority();
    }

    /// Asks the background thread to collect garbage.
    pub fn want_gc(&self) {
        self.gc_asked.fetch_add(1, Ordering::AcqRel);
        self.want(|w| w.gc = true);
    }

    /// Numbers about the store.
    ///
    /// # Errors
    /// When the store has stopped.
    pub fn stats(&self) -> Result<Stats, StoreError> {
        let (durable, commits, log_bytes) = {
            let f = self.flush_state();
            (f.flushed, f.commit, f.log.used())
        };
        let (gc_done_pages, gc_total_pages) = self.gc_progress().unwrap_or_default();
        let (pack_done_bytes, pack_total_bytes) = self.pack_progress();
        let core = self.core()?;
        Ok(Stats {
            generation: core.pages.generation,
            meta_pages: core.pages.bitmap.len(),
            meta_free_pages: core.pages.bitmap.free(),
            dirty_pages: core.pages.dirty_len() as u64,
            log_bytes,
            records: core.seq,
            durable_records: durable,
            commits,
            garbage_pages: core.pages.garbage,
            garbage_bytes: core.garbage_bytes,
            reuse_bytes: self.segments.pool_bytes(),
            gc_runs: self.gc_runs.load(Ordering::Relaxed),
            gc_done_pages,
            gc_total_pages,
            packed_bytes: self.packs.packed_bytes(),
            pack_stored_bytes: self.packs.stored_bytes(),
            pack_done_bytes,
            pack_total_bytes,
        })
    }
}

/// The pages of fixed and pinned trees, read beside the cache, so that a walk of everything does not empty it. The lock is
/// held for a moment only.
#[derive(Debug)]
pub(crate) struct Quiet<'a>(&'a Store, Option<&'a pages::PageMap>);

impl Store {
    /// Reads fixed and pinned trees without disturbing others.
    pub(crate) fn quiet(&self) -> Quiet<'_> {
        Quiet(self, None)
    }

    /// Reads fixed trees as they were if these pages were where some are.
    pub(crate) fn quiet_with<'a>(&'a self, over: &'a pages::PageMap) -> Quiet<'a> {
        Quiet(self, Some(over))
    }
}

impl crate::tree::Pages for Quiet<'_> {
    type Error = StoreError;

    fn read(&mut self, id: PageId) -> Result<Arc<crate::tree::Page>, StoreError> {
        if let Some(page) = self.1.and_then(|over| over.get(&id)) {
            return Ok(Arc::clone(page));
        }
        let (file, pages) = {
            let core = self.0.core()?;
            if let Some(page) = core.pages.peek(id) {
                return Ok(page);
            }
            (core.pages.file(), core.pages.bitmap.len())
        };
        // Not in memory, so it is on disk, and as it is pinned it stays there.
        pages::read_page(file.as_ref(), pages, id)
    }

    fn modify(&mut self, _: PageId) -> Result<(PageId, &mut crate::tree::Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn alloc(&mut self) -> Result<(PageId, &mut crate::tree::Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn release(&mut self, _: PageId) {}
}

/// The pages of fixed trees, with the lock taken for one page at a time.
struct PageByPage<'a>(&'a Store);

impl crate::tree::Pages for PageByPage<'_> {
    type Error = StoreError;

    fn read(&mut self, id: PageId) -> Result<Arc<crate::tree::Page>, StoreError> {
        crate::tree::Pages::read(&mut self.0.core()?.pages, id)
    }

    fn modify(&mut self, _: PageId) -> Result<(PageId, &mut crate::tree::Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn alloc(&mut self) -> Result<(PageId, &mut crate::tree::Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn release(&mut self, _: PageId) {}
}
