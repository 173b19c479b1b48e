//! One mounted head (or checkpoint, read-only): turns the kernel's requests into batches of the store.
//!
//! Node ids are `view << 40 | inode`. A view is what the mount shows between two rollbacks. A rollback begins a new one,
//! so everything the kernel has cached belongs to the old one and stays what it was, while every name is looked up anew.
//! The root keeps node id 1 and always means the present view.

mod handle;
mod io;
mod switch;
mod view;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::fs::{self, Ctx, FsError, Inode};
use crate::fuse::{Attr, Errno, Negotiated, Notifier};
use crate::store::{ReadTxn, Store, StoreError, Txn};
use io::Tail;
pub use switch::{RolledBack, Undo};
use view::{View, Views};

/// Which access times are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Atime {
    /// Only if it is older than the last change, or than a day (relatime).
    #[default]
    Relative,
    /// Every read that reaches the daemon.
    Strict,
    /// None.
    None,
}

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
            stripes: (0..64).map(|_| Mutex::new(())).collect(),
            notifier: OnceLock::new(),
            negotiated: OnceLock::new(),
            requests: AtomicU64::new(0),
            switching: Mutex::new(()),
        };
        if fixed.is_none() {
            fs.reap_all()?;
        }
        Ok(Arc::new(fs))
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

    /// Gives it the way to notify the kernel.
    pub fn set_notifier(&self, n: Notifier) {
        // Set once, by the one that mounts.
        let _ = self.notifier.set(n);
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
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        views.present().id == view.id
    }

    /// Runs `f` in a batch on the head, if the node belongs to the present view.
    fn change<T>(
        &self,
        nodeid: u64,
        frees: bool,
        f: impl FnOnce(&mut Txn<'_>, &Arc<View>, u64) -> Result<T, FsError>,
    ) -> Result<T, Errno> {
        if self.read_only {
            return Err(Errno(libc::EROFS));
        }
        let mut txn = self.begin(frees)?;
        // Under the store's lock a rollback is either past or yet to come.
        let (view, ino) = self.node(nodeid)?;
        if view.fixed().is_some() {
            return Err(Errno(libc::ESTALE));
        }
        let value = f(&mut txn, &view, ino)?;
        txn.commit();
        Ok(value)
    }

    /// Begins a batch; short of space, only one that frees something.
    fn begin(&self, frees: bool) -> Result<Txn<'_>, Errno> {
        let txn = self.store.begin(&self.name)?;
        if !frees && txn.is_tight() {
            return Err(Errno(libc::ENOSPC));
        }
        Ok(txn)
    }

    /// The inode of a second node of the same request, which must be in the same view.
    fn same_view(&self, view: &View, nodeid: u64) -> Result<u64, FsError> {
        match self.node(nodeid) {
            Ok((v, ino)) if v.id == view.id => Ok(ino),
            _ => Err(FsError::Errno(libc::ESTALE)),
        }
    }

    /// Removes an inode without a name that nobody knows any more.
    fn reap(&self, ino: u64) -> Result<(), FsError> {
        loop {
            let mut txn = self.store.begin(&self.name)?;
            let gone = fs::data::reap(&mut txn, ino, 1024)?;
            txn.commit();
            if gone {
                lock(&self.tails).remove(&ino);
                return Ok(());
            }
        }
    }

    /// Removes all inodes without a name that the present view does not know.
    fn reap_all(&self) -> Result<(), FsError> {
        loop {
            let found = fs::data::orphans(&mut self.store.read_head(&self.name)?, 256)?;
            let known = lock(&self.orphans);
            let left: Vec<u64> = found
                .iter()
                .copied()
                .filter(|i| !known.contains(i))
                .collect();
            drop(known);
            if left.is_empty() {
                return Ok(());
            }
            for ino in left {
                self.reap(ino)?;
            }
        }
    }
}

/// The caller of a request.
fn ctx(req: &crate::fuse::Request<'_>) -> Ctx {
    Ctx {
        uid: req.uid,
        gid: req.gid,
        now: fs::now(),
    }
}
