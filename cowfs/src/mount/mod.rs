//! One mounted head (or checkpoint, read-only): turns the kernel's requests into batches of the store.
//!
//! Node ids are `view << 40 | inode`. A view is what the mount shows between two rollbacks. A rollback begins a new one,
//! so everything the kernel has cached belongs to the old one and stays what it was, while every name is looked up anew.
//! The root keeps node id 1 and always means the present view.

mod atime;
mod drain;
mod handle;
mod io;
mod listing;
mod reap;
mod switch;
mod view;
mod writeback;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::fs::{self, Ctx, FsError, Inode};
use crate::fuse::{Attr, Errno, Negotiated, Notifier, step_aside};
use crate::store::{ReadTxn, Store, StoreError, Txn};
pub use atime::Atime;
use drain::Drain;
use io::Tail;
use reap::Reaper;
pub use switch::{RolledBack, Undo};
use view::{View, Views};
use writeback::Asker;

/// What a mount shows.
#[derive(Debug, Clone)]
pub enum What {
    /// A head, writable.
    Head(String),
    /// A fixed tree: its root page, which the mount keeps pinned, and the name that is shown.
    Fixed(u64, String),
}

/// A mount.
#[derive(Debug)]
pub struct MountFs {
    store: Arc<Store>,
    /// Head name, or name of the checkpoint shown.
    name: String,
    mountpoint: PathBuf,
    read_only: bool,
    atime: Atime,
    views: RwLock<Views>,
    /// Inodes without a name that the kernel still knows, of the present view.
    orphans: Mutex<FxHashSet<u64>>,
    tails: Mutex<FxHashMap<u64, Tail>>,
    /// Access times of the present view that are not in the tree yet.
    atimes: Mutex<FxHashMap<u64, fs::Time>>,
    drain: Drain,
    /// Searches for holes that wait for the kernel.
    seeking: AtomicUsize,
    reaper: Reaper,
    asker: Asker,
    /// One writer an inode.
    stripes: Vec<Mutex<()>>,
    notifier: OnceLock<Notifier>,
    negotiated: OnceLock<Negotiated>,
    requests: AtomicU64,
    /// One rollback at a time.
    switching: Mutex<()>,
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What these protect is whole after every step.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<FsError> for Errno {
    fn from(e: FsError) -> Self {
        if !matches!(e, FsError::Errno(_)) {
            tracing::error!(error = %e, "a request failed");
        }
        Errno(e.errno())
    }
}

impl From<StoreError> for Errno {
    fn from(e: StoreError) -> Self {
        if !matches!(e, StoreError::NoSpace) {
            tracing::error!(error = %e, "a request failed");
        }
        Errno(e.errno())
    }
}

/// Attributes as the kernel takes them.
fn attr_of(ino: u64, i: &Inode) -> Attr {
    Attr {
        ino,
        size: i.size,
        blocks: i.mapped.div_ceil(4096) * 8,
        atime: i.atime,
        mtime: i.mtime,
        ctime: i.ctime,
        btime: i.btime,
        mode: i.mode,
        nlink: i.nlink,
        uid: i.uid,
        gid: i.gid,
        rdev: i.rdev,
    }
}

impl MountFs {
    /// A mount of `what` at `mountpoint`. Of a head, inodes that a crash left without a name are removed first.
    ///
    /// # Errors
    /// The store's.
    pub fn new(
        store: Arc<Store>,
        what: What,
        mountpoint: PathBuf,
        read_only: bool,
        atime: Atime,
    ) -> Result<Arc<Self>, FsError> {
        let (name, fixed) = match what {
            What::Head(name) => (name, None),
            What::Fixed(root, name) => {
                store.pin_root(root)?;
                (name, Some(root))
            }
        };
        let fs = Self {
            store,
            name,
            mountpoint,
            read_only: read_only || fixed.is_some(),
            atime,
            views: RwLock::new(Views::new(fixed)),
            orphans: Mutex::default(),
            tails: Mutex::default(),
            atimes: Mutex::default(),
            drain: Drain::default(),
            seeking: AtomicUsize::new(0),
            reaper: Reaper::default(),
            asker: Asker::default(),
            stripes: (0..64).map(|_| Mutex::new(())).collect(),
            notifier: OnceLock::new(),
            negotiated: OnceLock::new(),
            requests: AtomicU64::new(0),
            switching: Mutex::new(()),
        };
        if !fs.read_only {
            fs.reap_all()?;
        }
        Ok(Arc::new(fs))
    }

    /// True if the kernel keeps what is written for a while. Then sizes and times of files are what it says.
    fn has_writeback(&self) -> bool {
        self.negotiated.get().is_some_and(Negotiated::has_writeback)
    }

    /// The caller of a request, and when.
    fn ctx(&self, req: &crate::fuse::Request<'_>) -> Ctx {
        Ctx {
            uid: req.uid,
            gid: req.gid,
            // Times that the kernel sets itself are those of its ticks; a finer clock would be ahead of them.
            now: if self.has_writeback() {
                fs::now_by_ticks()
            } else {
                fs::now()
            },
        }
    }

    /// Notes that a file's contents change now, unless the kernel will say so.
    fn stamp(&self, i: &mut Inode, now: fs::Time) {
        if !self.has_writeback() {
            i.mtime = now;
            i.ctime = now;
        }
    }

    /// Name of the head or checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// True if it shows a checkpoint.
    pub fn is_fixed(&self) -> bool {
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        views.began_fixed()
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &std::path::Path {
        &self.mountpoint
    }

    /// Requests answered.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Gives it the way to notify the kernel, and begins its background work; `writeback_mib` is how much
    /// of what is written the kernel shall keep.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn begin_service(self: &Arc<Self>, n: Notifier, writeback_mib: u32) -> std::io::Result<()> {
        // Set once, by the one that mounts.
        let _ = self.notifier.set(n);
        if writeback_mib > 0 {
            self.asker.start(self, writeback_mib)?;
        }
        self.reaper.start(self)
    }

    /// View and inode of a node id.
    fn node(&self, nodeid: u64) -> Result<(Arc<View>, u64), Errno> {
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        views.find(nodeid).ok_or(Errno(libc::ESTALE))
    }

    /// Runs `f` on the tree that a node is in.
    fn read<T>(
        &self,
        nodeid: u64,
        f: impl FnOnce(&mut ReadTxn<'_>, &Arc<View>, u64) -> Result<T, FsError>,
    ) -> Result<T, Errno> {
        loop {
            let (view, ino) = self.node(nodeid)?;
            let mut txn = match view.fixed() {
                Some(root) => self.store.read(root)?,
                None => {
                    let txn = self.store.read_head(&self.name)?;
                    // A rollback may have come before the lock: then the head is another tree.
                    if view.fixed().is_some() {
                        continue;
                    }
                    txn
                }
            };
            return Ok(f(&mut txn, &view, ino)?);
        }
    }

    fn is_present(&self, view: &View) -> bool {
        self.present().id == view.id
    }

    fn present(&self) -> Arc<View> {
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(views.present())
    }

    /// Runs `f` in a batch on the head, if the node belongs to the present view. Never call it with the gate held: it may
    /// commit.
    fn change<T>(
        &self,
        nodeid: u64,
        frees: bool,
        f: impl FnOnce(&mut Txn<'_>, &Arc<View>, u64) -> Result<T, FsError>,
    ) -> Result<T, Errno> {
        if self.read_only {
            return Err(Errno(libc::EROFS));
        }
        self.batch(self.begin(frees)?, nodeid, f)
    }

    /// Runs `f` in a batch that was begun.
    fn batch<T>(
        &self,
        mut txn: Txn<'_>,
        nodeid: u64,
        f: impl FnOnce(&mut Txn<'_>, &Arc<View>, u64) -> Result<T, FsError>,
    ) -> Result<T, Errno> {
        // Under the store's lock a rollback is either past or yet to come.
        let (view, ino) = self.node(nodeid)?;
        if view.fixed().is_some() {
            return Err(Errno(libc::ESTALE));
        }
        let value = f(&mut txn, &view, ino)?;
        txn.commit();
        Ok(value)
    }

    /// As [`MountFs::change`] for something that needs space, without a commit.
    fn change_at_once<T>(
        &self,
        nodeid: u64,
        f: impl FnOnce(&mut Txn<'_>, &Arc<View>, u64) -> Result<T, FsError>,
    ) -> Result<T, Errno> {
        let txn = self.store.begin(&self.name)?;
        if txn.is_tight() {
            return Err(Errno(libc::ENOSPC));
        }
        self.batch(txn, nodeid, f)
    }

    /// Begins a batch; short of space, only one that frees something. What was deleted comes free with a commit, so one
    /// is made before the answer is no.
    fn begin(&self, frees: bool) -> Result<Txn<'_>, Errno> {
        let enough = |txn: &Txn<'_>| frees || !txn.is_tight();
        match self.store.begin(&self.name) {
            Ok(txn) if enough(&txn) => return Ok(txn),
            Ok(_) | Err(StoreError::NoSpace) => {}
            Err(e) => return Err(e.into()),
        }
        step_aside();
        self.store.commit()?;
        let txn = self.store.begin(&self.name)?;
        if enough(&txn) {
            Ok(txn)
        } else {
            Err(Errno(libc::ENOSPC))
        }
    }

    /// The inode of a second node of the same request, which must be in the same view.
    fn same_view(&self, view: &View, nodeid: u64) -> Result<u64, FsError> {
        match self.node(nodeid) {
            Ok((v, ino)) if v.id == view.id => Ok(ino),
            _ => Err(FsError::Errno(libc::ESTALE)),
        }
    }
}
