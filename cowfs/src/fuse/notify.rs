//! Notifications to the kernel about what it has cached.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use super::abi;

/// Sends notifications. Never call it while holding what a request needs: invalidation waits for requests in flight.
#[derive(Debug, Clone)]
pub struct Notifier {
    pub(super) dev: Arc<File>,
}

impl Notifier {
    fn send(&self, code: i32, payload: &[u8]) -> io::Result<()> {
        let len = u32::try_from(abi::OUT_HEADER + payload.len()).unwrap_or(0);
        let mut m = Vec::with_capacity(abi::OUT_HEADER + payload.len());
        m.extend_from_slice(&len.to_le_bytes());
        m.extend_from_slice(&code.to_le_bytes());
        m.extend_from_slice(&0u64.to_le_bytes());
        m.extend_from_slice(payload);
        match (&*self.dev).write(&m) {
            Ok(_) => Ok(()),
            // Not cached: nothing to do.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Drops cached attributes of a node, and its pages in a range (none if `off` is negative; all behind if `len` is 0).
    ///
    /// # Errors
    /// What the device says.
    pub fn inval_inode(&self, nodeid: u64, off: i64, len: i64) -> io::Result<()> {
        let mut p = nodeid.to_le_bytes().to_vec();
        p.extend_from_slice(&off.to_le_bytes());
        p.extend_from_slice(&len.to_le_bytes());
        self.send(abi::NOTIFY_INVAL_INODE, &p)
    }

    /// Drops a cached name.
    ///
    /// # Errors
    /// What the device says.
    pub fn inval_entry(&self, parent: u64, name: &[u8]) -> io::Result<()> {
        let mut p = parent.to_le_bytes().to_vec();
        p.extend_from_slice(&u32::try_from(name.len()).unwrap_or(0).to_le_bytes());
        p.extend_from_slice(&0u32.to_le_bytes());
        p.extend_from_slice(name);
        p.push(0);
        self.send(abi::NOTIFY_INVAL_ENTRY, &p)
    }

    /// Makes every cached name stale at once (Linux 6.16).
    ///
    /// # Errors
    /// EINVAL from older kernels.
    pub fn inc_epoch(&self) -> io::Result<()> {
        self.send(abi::NOTIFY_INC_EPOCH, &[])
    }
}
