//! The store: heads and checkpoints of key-value trees, file data, a redo log and commits, in one host directory.
//!
//! `docs/design.md` draws the layout and what a crash leaves at each step.

pub mod catalog;
mod check;
mod commit;
pub mod disk;
mod error;
mod gc;
pub mod log;
pub mod pages;
pub mod segments;
pub mod superblock;
mod txn;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

pub use catalog::{Catalog, CatalogOp, Checkpoint, Head, Origin};
pub use check::CheckReport;
pub use error::StoreError;
pub use gc::GcReport;
pub use txn::{ReadTxn, Txn};

use crate::fs::Extent;
use crate::tree::PageId;
use disk::{Disk, DiskFile};
use log::Log;
use pages::{Bitmap, Pages};
use segments::Segments;
use superblock::Superblock;

/// Everything that changes under one lock.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) pages: Pages,
    pub(crate) catalog: Catalog,
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
    blob: (PageId, u64),
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
}

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
    /// Held (shared) by whoever uses a place in a segment: a reader from looking it up to having read it, a writer from
    /// getting it to referring to it.
    pub gate: RwLock<()>,
    wanted: Mutex<Wanted>,
    wake: Condvar,
    uuid: [u8; 16],
    hash_key: [u8; 16],
    gc_runs: AtomicU64,
    gc_stop: AtomicBool,
    /// Lock file; held while the store is open.
    _lock: Option<std::fs::File>,
}

/// Microseconds since 1970.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.map_or(0, |d| d.as_micros())).unwrap_or(i64::MAX)
}

fn random16() -> Result<[u8; 16], StoreError> {
    use std::io::Read;
    let mut b = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut b))
        .map_err(StoreError::io("/dev/urandom", "reading"))?;
    Ok(b)
}

/// Takes the store's lock.
fn lock_dir(dir: &Path) -> Result<std::fs::File, StoreError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(dir.join("lock"))
        .map_err(StoreError::io("lock", "opening"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::Locked),
        Err(std::fs::TryLockError::Error(e)) => Err(StoreError::io("lock", "locking")(e)),
    }
}

impl Store {
    /// Makes a store in a directory, which must be empty or absent. The directory is made 0700.
    ///
    /// # Errors
    /// Exists, or what the host says.
    pub fn init(dir: &Path) -> Result<(), StoreError> {
        use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
        let name = dir.display().to_string();
        if dir.join(superblock::FILE).exists() {
            return Err(StoreError::Exists(format!(
                "{name} is a cowfs store already"
            )));
        }
        match std::fs::read_dir(dir) {
            Ok(mut entries) => {
                // Whoever owns the directory, or the symlink to it, could put something else in its place.
                let own = nix::unistd::geteuid().as_raw();
                for meta in [dir.metadata(), dir.symlink_metadata()] {
                    if meta.map_err(StoreError::io(&name, "reading"))?.uid() != own {
                        return Err(StoreError::Refused(format!(
                            "{name} belongs to another user; a store's directory must be one's own"
                        )));
                    }
                }
                if entries.next().is_some() {
                    return Err(StoreError::Exists(format!(
                        "{name} is not empty; give a new or empty directory"
                    )));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if let Some(up) = dir.parent() {
                    std::fs::create_dir_all(up).map_err(StoreError::io(&name, "creating"))?;
                }
                std::fs::DirBuilder::new()
                    .mode(0o700)
                    .create(dir)
                    .map_err(StoreError::io(&name, "creating"))?;
            }
            Err(e) => return Err(StoreError::io(&name, "reading")(e)),
        }
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .map_err(StoreError::io(&name, "setting its mode"))?;
        Self::init_on(Arc::new(disk::HostDisk::new(dir)))
    }

    /// Makes a store on a disk.
    ///
    /// # Errors
    /// What the host says.
    pub fn init_on(disk: Arc<dyn Disk>) -> Result<(), StoreError> {
        for dir in ["data", "logs", "upgrades"] {
            disk.make_dir(dir)
                .map_err(StoreError::io(dir, "creating"))?;
        }
        let meta = disk
            .open(pages::FILE, true)
            .map_err(StoreError::io(pages::FILE, "creating"))?;
        let sb_file = disk
            .open(superblock::FILE, true)
            .map_err(StoreError::io(superblock::FILE, "creating"))?;
        // Both slots get their blocks now: a commit must not need space for its last step.
        sb_file
            .write_at(&[0; 2 * superblock::SLOT_BYTES], 0)
            .map_err(StoreError::io(superblock::FILE, "writing"))?;
        let log = Log::open(disk.as_ref(), 0, [0; 16])?;
        let store = Store {
            core: Mutex::new(Core {
                pages: Pages::new(meta, Bitmap::default(), 0),
                catalog: Catalog::new(0, crate::fs::ROOT_INO + 1, now_us()),
                log_buf: Vec::new(),
                seq: 0,
                unsynced: Vec::new(),
                unsynced_bytes: 0,
                freed: Vec::new(),
                freed_bytes: 0,
                garbage_bytes: 0,
                pinned: HashMap::new(),
                failed: None,
            }),
            flush: Mutex::new(FlushState {
                log,
                pending: Vec::new(),
                pending_data: Vec::new(),
                flushed: 0,
                commit: 0,
                blob: (0, 0),
                switched: None,
                sync_all: false,
                superblock: sb_file,
            }),
            commit_lock: Mutex::new(()),
            gc_lock: Mutex::new(()),
            segments: Segments::new(Arc::clone(&disk), 1),
            gate: RwLock::new(()),
            wanted: Mutex::default(),
            wake: Condvar::new(),
            uuid: random16()?,
            hash_key: random16()?,
            gc_runs: AtomicU64::new(0),
            gc_stop: AtomicBool::new(false),
            disk: Arc::clone(&disk),
            _lock: None,
        };
        let mut txn = store.begin("main")?;
        crate::fs::mkfs(&mut txn, &crate::fs::Ctx::root_now())
            .map_err(|e| StoreError::Refused(e.to_string()))?;
        txn.commit();
        store.commit()?;
        disk.sync_dir("").map_err(StoreError::io("", "syncing"))?;
        Ok(())
    }

    /// Opens a store of a directory: takes the lock, replays the log.
    ///
    /// # Errors
    /// No store, locked, newer, corrupt, or what the host says.
    pub fn open(dir: &Path) -> Result<Arc<Self>, StoreError> {
        if !dir.join(superblock::FILE).exists() {
            return Err(StoreError::NoStore(dir.display().to_string()));
        }
        let lock = lock_dir(dir)?;
        Self::open_on(Arc::new(disk::HostDisk::new(dir)), Some(lock))
    }

    /// Opens a store of a disk.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(
        disk: Arc<dyn Disk>,
        lock: Option<std::fs::File>,
    ) -> Result<Arc<Self>, StoreError> {
        let open = |name: &'static str| {
            disk.open(name, false)
                .map_err(StoreError::io(name, "opening"))
        };
        let sb_file = open(superblock::FILE)?;
        let sb = Superblock::load(sb_file.as_ref())?;
        let meta = open(pages::FILE)?;
        let (catalog, bitmap) = load_blob(&sb, meta.as_ref())?;
        let log = Log::open(disk.as_ref(), sb.log as usize, sb.chain)?;
        let segments = Segments::new(Arc::clone(&disk), sb.next_segment);
        for n in segments.existing()? {
            segments.saw_segment(n);
        }
        let store = Arc::new(Store {
            core: Mutex::new(Core {
                pages: Pages::new(meta, bitmap, sb.generation),
                catalog,
                log_buf: Vec::new(),
                seq: sb.last_seq,
                unsynced: Vec::new(),
                unsynced_bytes: 0,
                freed: Vec::new(),
                freed_bytes: 0,
                garbage_bytes: 0,
                pinned: HashMap::new(),
                failed: None,
            }),
            flush: Mutex::new(FlushState {
                log,
                pending: Vec::new(),
                pending_data: Vec::new(),
                flushed: sb.last_seq,
                commit: sb.commit,
                blob: (sb.blob_page, sb.blob_len.div_ceil(4096)),
                switched: None,
                sync_all: false,
                superblock: sb_file,
            }),
            commit_lock: Mutex::new(()),
            gc_lock: Mutex::new(()),
            segments,
            gate: RwLock::new(()),
            wanted: Mutex::default(),
            wake: Condvar::new(),
            uuid: sb.uuid,
            hash_key: sb.hash_key,
            gc_runs: AtomicU64::new(0),
            gc_stop: AtomicBool::new(false),
            disk,
            _lock: lock,
        });
        store.replay(&sb)?;
        Ok(store)
    }

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
        Txn::begin(self, self.core()?, head)
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
            .heads
            .get(head)
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
        let generation = core.pages.generation;
        core.catalog.apply(&op, generation)?;
        if Catalog::fixes_state(&op) {
            core.pages.generation += 1;
        }
        core.seq += 1;
        let json = serde_json::to_vec(&op).unwrap_or_default();
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
        f: &mut dyn FnMut(&[u8], Option<&[u8]>, Option<&[u8]>) -> std::ops::ControlFlow<()>,
    ) -> Result<(), StoreError> {
        crate::tree::diff(&mut PageByPage(self), a, b, f)
    }

    /// Asks the background thread to collect garbage.
    pub fn want_gc(&self) {
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
        })
    }
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

/// Reads and checks the blob of a commit.
fn load_blob(sb: &Superblock, meta: &dyn DiskFile) -> Result<(Catalog, Bitmap), StoreError> {
    let have = meta.len().map_err(StoreError::io(pages::FILE, "reading"))?;
    if sb
        .blob_page
        .saturating_mul(4096)
        .saturating_add(sb.blob_len)
        > have
    {
        return Err(StoreError::corrupt(
            pages::FILE,
            "it is shorter than the last commit",
        ));
    }
    let len = usize::try_from(sb.blob_len).map_err(|_| StoreError::NoSpace)?;
    let mut blob = vec![0; len];
    meta.read_at(&mut blob, sb.blob_page * 4096)
        .map_err(StoreError::io(pages::FILE, "reading"))?;
    if blake3::hash(&blob).as_bytes() != &sb.blob_sum {
        return Err(StoreError::corrupt(
            pages::FILE,
            "the catalog of the last commit has a wrong checksum",
        ));
    }
    let (json, bits) = blob.split_at(usize::try_from(sb.catalog_len).unwrap_or(0));
    let catalog = Catalog::decode(json)?;
    let bitmap = Bitmap::from_bytes(bits, sb.meta_pages)
        .ok_or_else(|| StoreError::corrupt(pages::FILE, "the page map has a wrong length"))?;
    Ok((catalog, bitmap))
}
