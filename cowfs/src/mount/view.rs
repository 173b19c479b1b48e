//! Views: what a mount shows between two rollbacks, and what the kernel knows of each.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rustc_hash::FxHashMap;

use super::lock;
use crate::fs::ROOT_INO;
use crate::tree::PageId;

/// Bits of an inode number in a node id.
const INO_BITS: u32 = 40;
/// Views that can be told apart.
const VIEWS: u32 = 1 << 23;

/// A view.
#[derive(Debug)]
pub(super) struct View {
    pub id: u32,
    /// The tree, once it no longer is the head's.
    fixed: OnceLock<PageId>,
    /// The kernel's references by inode (the root is not counted).
    nodes: Mutex<FxHashMap<u64, u64>>,
    /// Their sum.
    refs: AtomicU64,
    /// Set when its root page was unpinned.
    dropped: AtomicBool,
}

impl View {
    fn new(id: u32, root: Option<PageId>) -> Self {
        let fixed = OnceLock::new();
        if let Some(root) = root {
            let _ = fixed.set(root);
        }
        Self {
            id,
            fixed,
            nodes: Mutex::default(),
            refs: AtomicU64::new(0),
            dropped: AtomicBool::new(false),
        }
    }

    /// Its tree, if that is not the head's.
    pub fn fixed(&self) -> Option<PageId> {
        self.fixed.get().copied()
    }

    /// Leaves the head: from now on it shows a fixed tree.
    pub fn fix(&self, root: PageId) {
        let _ = self.fixed.set(root);
    }

    /// The node id of an inode.
    pub fn nodeid(&self, ino: u64) -> u64 {
        if ino == ROOT_INO {
            1
        } else {
            u64::from(self.id) << INO_BITS | ino
        }
    }

    /// Counts a reference that a reply gives to the kernel.
    pub fn remember(&self, ino: u64) {
        if ino != ROOT_INO {
            *lock(&self.nodes).entry(ino).or_insert(0) += 1;
            self.refs.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes references back; true if those were the last of the inode.
    pub fn forget(&self, ino: u64, n: u64) -> bool {
        let mut nodes = lock(&self.nodes);
        let Some(count) = nodes.get_mut(&ino) else {
            return false;
        };
        let n = n.min(*count);
        *count -= n;
        self.refs.fetch_sub(n, Ordering::Relaxed);
        if *count > 0 {
            return false;
        }
        nodes.remove(&ino);
        // After a walk of many files the kernel drops them all; so do we.
        if nodes.capacity() > 1024 && nodes.len() < nodes.capacity() / 8 {
            nodes.shrink_to(1024);
        }
        true
    }

    /// True if the kernel knows the inode.
    pub fn knows(&self, ino: u64) -> bool {
        lock(&self.nodes).contains_key(&ino)
    }

    /// References in all.
    pub fn refs(&self) -> u64 {
        self.refs.load(Ordering::Relaxed)
    }

    /// True once: for the caller that shall unpin its root.
    pub fn take_drop(&self) -> bool {
        !self.dropped.swap(true, Ordering::AcqRel)
    }
}

/// All views of a mount.
#[derive(Debug)]
pub(super) struct Views {
    present: Arc<View>,
    old: FxHashMap<u32, Arc<View>>,
    fixed: bool,
}

impl Views {
    /// One view, of the head or of a fixed tree.
    pub fn new(fixed: Option<PageId>) -> Self {
        Self {
            present: Arc::new(View::new(1, fixed)),
            old: FxHashMap::default(),
            fixed: fixed.is_some(),
        }
    }

    /// True if the mount shows a checkpoint.
    pub fn began_fixed(&self) -> bool {
        self.fixed
    }

    /// The view that new lookups go to.
    pub fn present(&self) -> &Arc<View> {
        &self.present
    }

    /// View and inode of a node id.
    pub fn find(&self, nodeid: u64) -> Option<(Arc<View>, u64)> {
        if nodeid == 1 {
            return Some((Arc::clone(&self.present), ROOT_INO));
        }
        let id = u32::try_from(nodeid >> INO_BITS).ok()?;
        let ino = nodeid & ((1 << INO_BITS) - 1);
        let view = if self.present.id == id {
            &self.present
        } else {
            self.old.get(&id)?
        };
        Some((Arc::clone(view), ino))
    }

    /// True when no more views can be told apart.
    pub fn is_full(&self) -> bool {
        self.old.len() >= VIEWS as usize / 2
    }

    /// Begins a new view; the one before keeps showing `root`.
    pub fn begin(&mut self, root: PageId) -> Arc<View> {
        let mut id = self.present.id;
        loop {
            id = id % (VIEWS - 1) + 1;
            if id != self.present.id && !self.old.contains_key(&id) {
                break;
            }
        }
        let before = std::mem::replace(&mut self.present, Arc::new(View::new(id, None)));
        before.fix(root);
        self.old.insert(before.id, Arc::clone(&before));
        before
    }

    /// Lets an old view go.
    pub fn remove(&mut self, id: u32) {
        self.old.remove(&id);
    }

    /// Old views that the kernel still knows something of.
    pub fn old(&self) -> impl Iterator<Item = &Arc<View>> {
        self.old.values()
    }
}
