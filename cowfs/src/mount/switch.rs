//! Checkpoints and rollbacks of a live mount.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::view::View;
use super::{MountFs, lock};
use crate::store::{CatalogOp, StoreError};

/// What a rollback leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undo {
    /// A checkpoint of this name.
    Keep(String),
    /// Nothing.
    Discard,
}

/// A rollback that was done.
#[derive(Debug, Clone, Copy)]
pub struct RolledBack {
    /// Number of its record in the log.
    pub seq: u64,
    /// From the request until the mount shows the checkpoint, microseconds.
    pub elapsed_us: u64,
}

impl MountFs {
    /// Rolls the head back to a checkpoint, live.
    ///
    /// # Errors
    /// Refused on a read-only mount; not found; the store's.
    pub fn rollback(&self, to: u64, undo: &Undo, start: Instant) -> Result<RolledBack, StoreError> {
        if self.read_only {
            return Err(StoreError::Refused(
                "the mount is read-only; a rollback needs a mounted head".into(),
            ));
        }
        let _one = lock(&self.switching);
        self.sync_kernel()
            .map_err(StoreError::io("the mount", "bringing mapped pages back"))?;
        let mut before: Option<Arc<View>> = None;
        // What belongs to the old state goes under the store's lock, before anything of the new one can come.
        let (_, seq) = self.store.change(
            |catalog| {
                let head = catalog.heads.get(&self.name).ok_or_else(|| {
                    StoreError::NotFound(format!("there is no head {}", self.name))
                })?;
                let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
                if views.is_full() {
                    return Err(StoreError::Refused(
                        "too many rolled back states are still open; close some programs".into(),
                    ));
                }
                drop(views);
                let left = match undo {
                    Undo::Keep(name) => Some((catalog.next_checkpoint, name.clone())),
                    Undo::Discard => None,
                };
                let op = CatalogOp::Rollback {
                    head: self.name.clone(),
                    to,
                    left,
                    created_us: crate::store::now_us(),
                };
                Ok((op, head.root))
            },
            |old_root, pins| {
                let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
                before = Some(views.begin(*old_root));
                *pins.entry(*old_root).or_insert(0) += 1;
                lock(&self.tails).clear();
                lock(&self.orphans).clear();
                lock(&self.atimes).clear();
            },
        )?;
        self.invalidate();
        let elapsed_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(v) = before {
            self.drop_if_unused(&v);
        }
        if let Err(e) = self.reap_all() {
            tracing::error!(error = %e, "files that were deleted while open could not be removed yet");
        }
        Ok(RolledBack { seq, elapsed_us })
    }

    /// Tells the kernel that every name and the root's contents are stale.
    fn invalidate(&self) {
        let Some(n) = self.notifier.get() else {
            return;
        };
        let epoch = self
            .negotiated
            .get()
            .is_some_and(crate::fuse::Negotiated::has_epoch);
        let done = if epoch {
            n.inc_epoch()
        } else {
            // Older kernels: drop the names in the root, and with each all that is below.
            self.root_names()
                .iter()
                .try_for_each(|name| n.inval_entry(1, name))
        };
        if let Err(e) = done.and_then(|()| n.inval_inode(1, 0, 0)) {
            tracing::error!(error = %e, "the kernel could not be told of the rollback");
        }
    }

    /// Names in the root of the present and of the old views.
    fn root_names(&self) -> Vec<Vec<u8>> {
        let mut roots: Vec<Option<u64>> = vec![None];
        {
            let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
            roots.extend(views.old().map(|v| v.fixed()));
        }
        let mut names = Vec::new();
        for root in roots {
            let txn = match root {
                Some(r) => self.store.read(r),
                None => self.store.read_head(&self.name),
            };
            if let Ok(mut txn) = txn
                && let Ok(list) = crate::fs::dir::list(&mut txn, crate::fs::ROOT_INO, 0, usize::MAX)
            {
                names.extend(list.into_iter().map(|e| e.name));
            }
        }
        names
    }

    /// Takes the kernel's references back.
    pub(super) fn forget_node(&self, nodeid: u64, n: u64) {
        let Ok((view, ino)) = self.node(nodeid) else {
            return;
        };
        if nodeid == 1 {
            return;
        }
        let last = view.forget(ino, n);
        if view.fixed().is_some() {
            self.drop_if_unused(&view);
        } else if last {
            self.drop_tail(ino);
            if lock(&self.orphans).remove(&ino) {
                self.reap_soon(&view, ino);
            }
        }
    }

    /// Lets an old view's tree go when the kernel has forgotten all of it.
    fn drop_if_unused(&self, view: &View) {
        let Some(root) = view.fixed() else { return };
        if view.refs() == 0 && !self.is_present(view) && view.take_drop() {
            let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
            views.remove(view.id);
            drop(views);
            self.store.unpin_root(root);
        }
    }

    /// The mount is gone: nothing is known to the kernel any more.
    pub fn close(&self) {
        let old: Vec<Arc<View>> = {
            let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
            views.old().map(Arc::clone).collect()
        };
        for v in old {
            if v.take_drop()
                && let Some(root) = v.fixed()
            {
                self.store.unpin_root(root);
            }
        }
        let present = {
            let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(views.present())
        };
        if let Some(root) = present.fixed()
            && present.take_drop()
        {
            self.store.unpin_root(root);
        }
        lock(&self.orphans).clear();
        self.asker.stop();
        self.reaper.stop();
        if let Err(e) = self.keep_atimes() {
            tracing::warn!(error = e.0, "the last access times were not kept");
        }
        if !self.read_only
            && let Err(e) = self.reap_all()
        {
            tracing::error!(error = %e, "deleted files could not be removed yet");
        }
        tracing::info!(
            requests = self.requests.load(Ordering::Relaxed),
            "unmounted"
        );
    }
}
