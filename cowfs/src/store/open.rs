//! Making and opening stores.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, RwLock};

use super::disk::{Disk, DiskFile, HostDisk};
use super::error::StoreError;
use super::log::Log;
use super::pages::{self, Bitmap, Pages};
use super::segments::Segments;
use super::superblock::{self, RUNS_MAX, Superblock, run_pages};
use super::{AtomicBool, AtomicU64, Catalog, Core, FlushState, Store, now_us};
use crate::tree::PAGE_SIZE;

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
        Self::init_on(Arc::new(HostDisk::new(dir)))
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
        let sb = Superblock {
            uuid: random16()?,
            hash_key: random16()?,
            commit: 0,
            generation: 0,
            last_seq: 0,
            log: 0,
            next_segment: 1,
            meta_pages: 0,
            runs: Vec::new(),
            blob_len: 0,
            catalog_len: 0,
            chain: [0; 16],
            blob_sum: [0; 32],
        };
        let catalog = Catalog::new(0, crate::fs::ROOT_INO + 1, now_us());
        let pages = Pages::new(meta, Bitmap::default(), 0);
        let store = Self::assemble(Arc::clone(&disk), None, &sb, sb_file, pages, catalog)?;
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
        Self::open_on(Arc::new(HostDisk::new(dir)), Some(lock))
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
        let (catalog, mut bitmap) = load_blob(&sb, meta.as_ref())?;
        // For the next blob; the same places as it had, if nothing else is free.
        let spare = bitmap.take_runs(run_pages(&sb.runs), RUNS_MAX);
        let mut pages = Pages::new(meta, bitmap, sb.generation);
        pages.garbage = catalog.garbage_pages;
        let store = Self::assemble(disk, lock, &sb, sb_file, pages, catalog)?;
        for n in store.segments.existing()? {
            store.segments.saw_segment(n);
        }
        store.flush_state().spare = spare.unwrap_or_default();
        let store = Arc::new(store);
        store.replay(&sb)?;
        store.load_packs()?;
        Ok(store)
    }

    fn assemble(
        disk: Arc<dyn Disk>,
        lock: Option<std::fs::File>,
        sb: &Superblock,
        superblock: Arc<dyn DiskFile>,
        pages: Pages,
        catalog: Catalog,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            core: Mutex::new(Core {
                pages,
                garbage_bytes: catalog.garbage_bytes,
                catalog,
                catalog_bytes: sb.catalog_len,
                log_buf: Vec::new(),
                seq: sb.last_seq,
                unsynced: Vec::new(),
                unsynced_bytes: 0,
                freed: Vec::new(),
                freed_bytes: 0,
                pinned: HashMap::new(),
                failed: None,
            }),
            flush: Mutex::new(FlushState {
                log: Log::open(disk.as_ref(), sb.log as usize, 0, sb.chain)?,
                pending: Vec::new(),
                pending_data: Vec::new(),
                flushed: sb.last_seq,
                commit: sb.commit,
                blob: sb.runs.clone(),
                spare: Vec::new(),
                suspect: None,
                switched: None,
                sync_all: false,
                superblock,
            }),
            commit_lock: Mutex::new(()),
            gc_lock: Mutex::new(()),
            segments: Segments::new(Arc::clone(&disk), sb.next_segment),
            packs: super::packs::Packs::new(Arc::clone(&disk)),
            pack_lock: Mutex::new(()),
            gc_done: AtomicU64::new(0),
            gc_total: AtomicU64::new(0),
            gate: RwLock::new(()),
            wanted: Mutex::default(),
            wake: Condvar::new(),
            uuid: sb.uuid,
            hash_key: sb.hash_key,
            gc_runs: AtomicU64::new(0),
            punched: Mutex::default(),
            requests: AtomicU64::new(0),
            gc_asked: AtomicU64::new(0),
            gc_served: AtomicU64::new(0),
            gc_stop: AtomicBool::new(false),
            gc_busy: AtomicBool::new(false),
            gc_thread: Mutex::default(),
            gc_again: AtomicBool::new(false),
            gc_backoff: super::background::Backoff::default(),
            no_room: AtomicBool::new(false),
            waiting: AtomicU64::new(0),
            // Slow until it has shown otherwise.
            flush_us: AtomicU64::new(8 * super::QUICK_US),
            disk,
            _lock: lock,
        })
    }
}

/// Reads and checks the blob of a commit.
fn load_blob(sb: &Superblock, meta: &dyn DiskFile) -> Result<(Catalog, Bitmap), StoreError> {
    let have = meta.len().map_err(StoreError::io(pages::FILE, "reading"))?;
    let end = sb.runs.iter().map(|r| r.0 + r.1).max().unwrap_or(0);
    if end.saturating_mul(PAGE_SIZE as u64) > have {
        return Err(StoreError::corrupt(
            pages::FILE,
            "it is shorter than the last commit",
        ));
    }
    // The superblock was checked: this is at most the largest catalog and page map there can be.
    let len = usize::try_from(sb.blob_len).map_err(|_| StoreError::NoSpace)?;
    let mut blob = vec![0; len];
    let mut rest = blob.as_mut_slice();
    for (first, pages) in &sb.runs {
        let n = usize::try_from(pages * PAGE_SIZE as u64).unwrap_or(usize::MAX);
        let (piece, after) = rest.split_at_mut(n.min(rest.len()));
        meta.read_at(piece, first * PAGE_SIZE as u64)
            .map_err(StoreError::io(pages::FILE, "reading"))?;
        rest = after;
    }
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
