//! What is needed besides when the kernel keeps what is written (mount option `writeback`): it is asked for it every few
//! seconds, and files that are written all the time are brought one by one.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustc_hash::FxHashSet;

use super::{MountFs, lock};
use crate::fuse::{self, CONGESTION};

/// How often the kernel is asked. What it has is then in the store, and on disk with the store's next flush.
const EVERY: Duration = Duration::from_secs(5);

/// What the kernel may keep while writers are slowed down, MiB.
const SLOW_MIB: u32 = 1;

/// The thread that asks.
#[derive(Debug, Default)]
pub(super) struct Asker {
    thread: Mutex<Option<(Sender<()>, JoinHandle<()>)>>,
    /// What the kernel may keep, MiB.
    limit_mib: AtomicU32,
    /// The mount's device, once it is known for certain: something else may be mounted over the mount.
    device: OnceLock<u64>,
    /// How many pages had come when it asked last.
    came: AtomicU64,
}

impl Asker {
    /// Begins the thread.
    pub fn start(&self, fs: &Arc<MountFs>, limit_mib: u32) -> std::io::Result<()> {
        self.limit_mib.store(limit_mib, Ordering::Relaxed);
        let (stop, stopped) = channel::<()>();
        let fs = Arc::downgrade(fs);
        let thread = std::thread::Builder::new()
            .name("cowfs-writeback".into())
            .spawn(move || {
                while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                    let Some(fs) = fs.upgrade() else { return };
                    fs.ask_for_pages();
                }
            })?;
        *lock(&self.thread) = Some((stop, thread));
        Ok(())
    }

    /// A file of the mount.
    pub fn know_device(&self, file: &File) {
        if self.device.get().is_none()
            && let Ok(m) = file.metadata()
        {
            // Nobody knows better.
            let _ = self.device.set(m.dev());
        }
    }

    fn limit(&self, mib: u32) {
        if let Some(device) = self.device.get() {
            fuse::limit_writeback(*device, mib);
        }
    }

    /// Ends it.
    pub fn stop(&self) {
        if let Some((stop, thread)) = lock(&self.thread).take() {
            drop(stop);
            // It cannot have anything to tell.
            let _ = thread.join();
        }
    }
}

/// As long as it lives, whoever writes waits until almost nothing is kept.
#[derive(Debug)]
pub(super) struct SlowedDown<'a>(&'a MountFs);

impl Drop for SlowedDown<'_> {
    fn drop(&mut self) {
        let asker = &self.0.asker;
        asker.limit(asker.limit_mib.load(Ordering::Relaxed));
    }
}

impl MountFs {
    /// True if much was written in the last seconds, and so will be in the next.
    pub(super) fn is_written_much(&self) -> bool {
        let before = self.asker.came.load(Ordering::Relaxed);
        self.has_writeback() && self.drain.count() - before >= u64::from(CONGESTION)
    }

    /// Has writers wait, so that what was written before does not have to share the way with what they go on to write.
    pub(super) fn slow_down(&self) -> SlowedDown<'_> {
        self.asker.limit(SLOW_MIB);
        SlowedDown(self)
    }

    /// Has the kernel begin to write what it keeps.
    fn ask_for_pages(&self) {
        let _still = self.still();
        let came = self.drain.count();
        self.asker.came.store(came, Ordering::Relaxed);
        // While something is mounted over the mount, or when it is going, nothing can be asked.
        if let Err(e) = self.start_round() {
            tracing::debug!(error = %e, "the kernel could not be asked for its pages");
        }
    }

    /// Brings all pages of the nodes that wrote since the drain began and are not in `done` yet. A round may leave pages of
    /// a file that is written meanwhile: it takes no more pages than were dirty when it began, in any order. Returns
    /// whether there was no such node; `None` if nodes cannot be opened here.
    pub(super) fn bring_nodes(&self, done: &mut FxHashSet<u64>) -> Option<bool> {
        let dir = File::open(&self.mountpoint).ok()?;
        let mut none = true;
        for nodeid in self.drain.written() {
            if !done.insert(nodeid) {
                continue;
            }
            none = false;
            // Those of an old view have nothing to bring.
            if self.node(nodeid).is_ok_and(|(v, _)| v.fixed().is_some()) {
                continue;
            }
            match fuse::open_node(&dir, nodeid) {
                // A close brings all that was dirty when it began, and waits, whoever wrote it. An error is counted by
                // whoever takes the page.
                Ok(file) => drop(file),
                // The kernel does not know it any more.
                Err(e) if e.raw_os_error() == Some(libc::ESTALE) => {}
                Err(e) => {
                    tracing::debug!(error = %e, "a file could not be opened by its node");
                    return None;
                }
            }
        }
        Some(none)
    }
}
