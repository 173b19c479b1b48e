//! Removing inodes without a name when nobody has them open any more: small ones at once, others in the background.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use super::view::View;
use super::{MountFs, lock};
use crate::fs::{self, FsError};

/// Records removed in one batch: the store's lock is held for each.
const STEP: usize = 128;

/// An inode of a view.
type Lost = (Arc<View>, u64);

/// The thread that removes what takes more than one batch.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    thread: Mutex<Option<Worker>>,
}

#[derive(Debug)]
struct Worker {
    give: Sender<Lost>,
    thread: JoinHandle<()>,
}

impl Reaper {
    /// Begins the thread.
    pub fn start(&self, fs: &Arc<MountFs>) -> std::io::Result<()> {
        let (give, receive) = channel::<Lost>();
        let fs: Weak<MountFs> = Arc::downgrade(fs);
        let thread = std::thread::Builder::new()
            .name("cowfs-reaper".into())
            .spawn(move || {
                while let Ok((view, ino)) = receive.recv() {
                    let Some(fs) = fs.upgrade() else { return };
                    fs.reap_logged(&view, ino);
                }
            })?;
        *lock(&self.thread) = Some(Worker { give, thread });
        Ok(())
    }

    /// Gives the thread an inode; false if there is none.
    fn give(&self, view: &Arc<View>, ino: u64) -> bool {
        lock(&self.thread)
            .as_ref()
            .is_some_and(|w| w.give.send((Arc::clone(view), ino)).is_ok())
    }

    /// Lets the thread finish what it has, and ends it.
    pub fn stop(&self) {
        let worker = lock(&self.thread).take();
        if let Some(Worker { give, thread }) = worker {
            drop(give);
            // It cannot have anything to tell.
            let _ = thread.join();
        }
    }
}

impl MountFs {
    /// One batch of removing an inode; true when there is nothing left to do. After a rollback the number may belong to a
    /// file of the new state: then there is not.
    fn reap_step(&self, view: &View, ino: u64) -> Result<bool, FsError> {
        let mut txn = self.begin(true).map_err(|e| FsError::Errno(e.0))?;
        if view.fixed().is_some() {
            return Ok(true);
        }
        let gone = fs::data::reap(&mut txn, ino, STEP)?;
        txn.commit();
        if gone {
            lock(&self.tails).remove(&ino);
            lock(&self.atimes).remove(&ino);
        }
        Ok(gone)
    }

    fn reap_logged(&self, view: &View, ino: u64) {
        loop {
            match self.reap_step(view, ino) {
                Ok(false) => {}
                Ok(true) => return,
                Err(e) => {
                    tracing::error!(ino, error = %e, "a deleted file could not be removed yet");
                    return;
                }
            }
        }
    }

    /// Removes an inode without a name that nobody knows any more; what is left of it after one batch in the background.
    pub(super) fn reap_soon(&self, view: &Arc<View>, ino: u64) {
        match self.reap_step(view, ino) {
            Ok(true) => {}
            Ok(false) if self.reaper.give(view, ino) => {}
            Ok(false) => self.reap_logged(view, ino),
            Err(e) => {
                tracing::error!(ino, error = %e, "a deleted file could not be removed yet");
            }
        }
    }

    /// Removes all inodes without a name that the present view does not know.
    pub(super) fn reap_all(&self) -> Result<(), FsError> {
        let view = self.present();
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
                while !self.reap_step(&view, ino)? {}
            }
        }
    }
}
