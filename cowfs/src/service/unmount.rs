//! Unmounting, and what to say when the mount lives on elsewhere.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::Service;
use crate::control::{Answer, Failure};
use crate::fuse;
use crate::mountinfo;

/// How long the kernel may take to let a mount go that has been unmounted.
const LET_GO: Duration = Duration::from_secs(10);

impl Service {
    /// Unmounts everything that is mounted, also when it is in use (for SIGTERM).
    pub fn unmount_all(&self) {
        let targets: Vec<PathBuf> = crate::mount::lock(&self.mounts).keys().cloned().collect();
        for t in targets {
            if let Err(e) = fuse::unmount(&t, true) {
                tracing::error!(error = %e, mountpoint = %t.display(), "could not be unmounted");
            }
        }
    }

    pub(super) fn unmount(&self, mountpoint: &Path, lazy: bool) -> Result<Answer, Failure> {
        let mounts = crate::mount::lock(&self.mounts);
        let found = mounts.get(mountpoint);
        let Some((shown, fs)) = found.map(|m| (m.shown.clone(), Arc::clone(&m.fs))) else {
            return Err(Failure::new(format!(
                "{} is not mounted",
                mountpoint.display()
            )));
        };
        drop(mounts);
        // The daemon's own use of the mount must not look like a program's.
        let still = fs.still();
        fuse::unmount(mountpoint, lazy).map_err(|e| {
            let hint = if e.raw_os_error() == Some(libc::EBUSY) {
                "; programs use it: stop them, or use --lazy"
            } else {
                ""
            };
            Failure::new(format!("{}: {e}{hint}", mountpoint.display()))
        })?;
        drop(still);
        drop(fs);
        let let_go = lazy || self.wait_until_gone(mountpoint);
        self.store.sync()?;
        if let_go {
            return Ok(Answer::Done);
        }
        let found = mountinfo::elsewhere(&self.dir, &shown);
        let holders = if found.is_empty() {
            "a bind mount or another mount namespace".to_owned()
        } else {
            found.join(", ")
        };
        Err(Failure::new(format!(
            "{} is unmounted here, but something else still holds the mount: {holders}; it is served until that is unmounted, \
             too",
            mountpoint.display()
        )))
    }

    /// Waits until all that a mount had is in the store; false if the kernel does not let the mount go.
    fn wait_until_gone(&self, mountpoint: &Path) -> bool {
        let until = Instant::now() + LET_GO;
        let mut mounts = crate::mount::lock(&self.mounts);
        while let Some(m) = mounts.get(mountpoint) {
            let left = until.saturating_duration_since(Instant::now());
            // What has ended is only being written: that may take as long as it takes.
            if left.is_zero() && !m.ended {
                return false;
            }
            mounts = self
                .gone
                .wait_timeout(mounts, left.max(Duration::from_millis(100)))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}
