//! Access times. They are gathered in memory and put into the tree many at a time, as with ext4's lazytime: a batch for
//! every first read of a file would cost more than the read. A crash loses those that were not put in yet, and a
//! checkpoint may lack them.

use super::view::View;
use super::{MountFs, lock};
use crate::fs::{Inode, Time, inode};
use crate::fuse::Errno;

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

/// Access times gathered at most.
const GATHER: usize = 256;
const DAY: i64 = 86_400;

impl MountFs {
    /// Notes that a file or directory was read.
    pub(super) fn touch(&self, view: &View, ino: u64, i: &Inode, now: Time) {
        let due = match self.atime {
            Atime::None => false,
            Atime::Strict => true,
            Atime::Relative => {
                i.atime <= i.mtime || i.atime <= i.ctime || now.0.saturating_sub(i.atime.0) > DAY
            }
        };
        if !due || self.read_only || view.fixed().is_some() {
            return;
        }
        let mut times = lock(&self.atimes);
        // It may have been noted already, and is only not in the inode.
        if self.atime == Atime::Relative
            && times
                .get(&ino)
                .is_some_and(|t| *t > i.mtime && *t > i.ctime)
        {
            return;
        }
        times.insert(ino, now);
        let full = times.len() >= GATHER;
        drop(times);
        if full && let Err(e) = self.keep_atimes() {
            tracing::debug!(error = e.0, "access times were not kept");
        }
    }

    /// Puts the access time into an inode that is to be shown.
    pub(super) fn with_atime(&self, view: &View, ino: u64, i: &mut Inode) {
        if view.fixed().is_none()
            && let Some(t) = lock(&self.atimes).get(&ino)
        {
            i.atime = *t;
        }
    }

    /// Puts what was gathered into the tree.
    pub(super) fn keep_atimes(&self) -> Result<(), Errno> {
        if lock(&self.atimes).is_empty() {
            return Ok(());
        }
        let view = self.present();
        let mut txn = self.begin(true)?;
        if view.fixed().is_some() {
            return Ok(());
        }
        // Taken under the store's lock, so that nobody sees an inode without its time.
        let times = std::mem::take(&mut *lock(&self.atimes));
        for (ino, t) in times {
            if let Some(mut i) = inode::find(&mut txn, ino)? {
                i.atime = t;
                inode::save(&mut txn, ino, &i)?;
            }
        }
        txn.commit();
        Ok(())
    }
}
