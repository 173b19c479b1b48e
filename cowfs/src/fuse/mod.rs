//! The kernel's FUSE protocol (include/uapi/linux/fuse.h, protocol 7.33 to 7.45): mounting, requests, replies and
//! notifications. It knows nothing of cowfs; `docs/design.md` says why it is not a library of others.

mod abi;
mod mount;
mod notify;
mod reply;
mod request;
mod session;
mod splice;
mod sys;

use std::sync::Arc;

pub use mount::{MountOptions, limit_writeback, unmount};
pub use notify::Notifier;
pub use reply::{Attr, DirBuf, Entry, Reply, Statfs};
pub use request::{Create, Op, Request, SetTime, Setattr};
pub use session::{CONGESTION, Session, mount, step_aside};
pub use splice::Piece;
pub use sys::{open_node, syncfs};

/// An errno that a request is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// What can go wrong in serving a mount.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// /dev/fuse cannot be opened.
    #[error("/dev/fuse cannot be opened; is the fuse module there ('modprobe fuse')?")]
    Device(#[source] std::io::Error),
    /// mount(2) refused.
    #[error("mounting on {path} failed")]
    Mount {
        /// Mount point.
        path: String,
        /// Its reason.
        #[source]
        source: std::io::Error,
    },
    /// The kernel's protocol is too old.
    #[error("the kernel speaks FUSE {major}.{minor}; 7.33 or newer is needed (Linux 5.12)")]
    TooOld {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
    },
    /// Reading or writing the device failed.
    #[error("talking to the kernel's FUSE device failed")]
    Io(#[from] std::io::Error),
}

/// What the kernel agreed to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Negotiated {
    /// Minor protocol version of the kernel.
    pub minor: u32,
    /// INIT flags in force (both words).
    pub flags: u64,
}

impl Negotiated {
    /// True if the kernel keeps what is written, with sizes and times of files (FUSE_WRITEBACK_CACHE).
    pub fn has_writeback(&self) -> bool {
        self.flags & abi::WRITEBACK_CACHE != 0
    }

    /// True if all names can be made stale at once (FUSE_NOTIFY_INC_EPOCH, Linux 6.16).
    pub fn has_epoch(&self) -> bool {
        self.minor >= 44
    }
}

/// The flags of [`Reply::open`] and [`Reply::created`].
pub mod open {
    /// Bypass the page cache.
    pub const DIRECT_IO: u32 = 1;
    /// Keep cached pages over this open.
    pub const KEEP_CACHE: u32 = 2;
    /// No FLUSH when it is closed.
    pub const NOFLUSH: u32 = 32;
}

/// FUSE_WRITE_KILL_SUIDGID: clear set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 4;
/// FUSE_WRITE_CACHE: written back from the page cache (a memory map, or anything with a writeback cache), on nobody's behalf.
pub const WRITE_CACHE: u32 = 1;
/// FUSE_SETXATTR_ACL_KILL_SGID.
pub const SETXATTR_KILL_SGID: u32 = 1;

/// A filesystem as the session calls it, from several threads.
pub trait Filesystem: Send + Sync + 'static {
    /// Answers a request. An error becomes its errno; a panic becomes EIO.
    ///
    /// # Errors
    /// The errno for the caller.
    fn handle(&self, req: &Request<'_>, reply: &mut Reply) -> Result<(), Errno>;
    /// The kernel dropped `nlookup` references to a node.
    fn forget(&self, nodeid: u64, nlookup: u64);
    /// Called for every request when it was read, in the kernel's order; what it returns goes to
    /// [`Filesystem::finished`].
    fn arrived(&self, _req: &Request<'_>) -> usize {
        0
    }
    /// The request of this mark has been answered.
    fn finished(&self, _mark: usize) {}
    /// The mount works.
    fn ready(&self, _negotiated: &Negotiated) {}
}

/// A filesystem behind a pointer.
pub type SharedFs = Arc<dyn Filesystem>;
