//! The checkpoint to restore from, mounted where only root can go.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Service, failed};
use crate::control::{Failure, MountSpec};

/// A mount of a checkpoint, in a directory that only root can enter; it goes away by itself.
pub(super) struct Shown<'a> {
    service: &'a Arc<Service>,
    pub private: PathBuf,
    mounted: bool,
}

impl<'a> Shown<'a> {
    pub fn new(service: &'a Arc<Service>, head: &str, checkpoint: &str) -> Result<Self, Failure> {
        let make = |dir: &Path| nix::unistd::mkdtemp(&dir.join("cowfs-restore-XXXXXX"));
        let private = make(Path::new("/run"))
            .or_else(|_| make(&std::env::temp_dir()))
            .map_err(|e| failed("a directory for the checkpoint", e))?;
        let mut shown = Self {
            service,
            private,
            mounted: false,
        };
        let mountpoint = shown.dir();
        std::fs::create_dir(&mountpoint)
            .map_err(|e| failed("a directory for the checkpoint", e))?;
        service.mount(&MountSpec {
            mountpoint,
            head: Some(head.to_owned()),
            at: Some(checkpoint.to_owned()),
            options: ["noatime", "nosuid", "nodev", "noexec"]
                .map(Into::into)
                .into(),
        })?;
        shown.mounted = true;
        Ok(shown)
    }

    pub fn dir(&self) -> PathBuf {
        self.private.join("at")
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if self.mounted
            && let Err(e) = self.service.unmount(&self.dir(), true)
        {
            tracing::warn!(error = %e, "a checkpoint stays mounted");
        }
        let _ = std::fs::remove_dir(self.dir());
        let _ = std::fs::remove_dir(&self.private);
    }
}
