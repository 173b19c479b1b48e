//! POSIX files and directories over an ordered key-value tree.
//!
//! Every function takes a [`Kv`], which is one head's tree inside a batch (all or nothing), or a read-only view of any
//! tree. Nothing here knows of FUSE, of pages or of segments.

pub mod acl;
pub mod attr;
pub mod check;
pub mod data;
pub mod dir;
pub mod inode;
pub mod key;
pub mod node;
pub mod rename;
pub mod xattr;

use std::ops::ControlFlow;

pub use data::{EXTENT_SHARED, Extent};
pub use inode::Inode;
pub use key::inode_of_key;
pub use node::mkfs;

/// Inode number of the root directory.
pub const ROOT_INO: u64 = 1;
/// Inode numbers are below this.
pub const INO_END: u64 = 1 << 40;
/// Longest file name, bytes.
pub const NAME_MAX: usize = 255;
/// Longest symlink target, bytes (PATH_MAX less the final zero).
pub const TARGET_MAX: usize = 4095;
/// Hard links of one inode at most (as ext4 with `dir_nlink`, but for files).
pub const LINK_MAX: u32 = 65_000;
/// Largest file, bytes.
pub const FILE_MAX: u64 = i64::MAX as u64 - (1 << 30);

/// What can go wrong in a filesystem operation.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The caller's fault or fate, as errno(3).
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// A record in the tree makes no sense.
    #[error("inode {ino}: {what}; run 'cowfs check'")]
    Corrupt {
        /// Inode (or directory) number.
        ino: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The store below failed.
    #[error(transparent)]
    Store(Box<dyn std::error::Error + Send + Sync>),
}

impl FsError {
    /// The errno that a caller of the mounted filesystem gets.
    pub fn errno(&self) -> i32 {
        match self {
            FsError::Errno(e) => *e,
            FsError::Corrupt { .. } | FsError::Store(_) => libc::EIO,
        }
    }
}

/// Short for an errno result.
pub(crate) fn fail<T>(errno: i32) -> Result<T, FsError> {
    Err(FsError::Errno(errno))
}

/// Called with the entries of a scan until it breaks.
pub type OnEntry<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// The key-value tree that a filesystem lives in.
pub trait Kv {
    /// Calls `f` with the value of a key, if it is there; tells whether it is.
    fn get(&mut self, key: &[u8], f: &mut dyn FnMut(&[u8])) -> Result<bool, FsError>;
    /// Sets a key.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), FsError>;
    /// Removes a key; tells whether it was there.
    fn del(&mut self, key: &[u8]) -> Result<bool, FsError>;
    /// Calls `f` with the entries in `from..to` in ascending order until it breaks.
    fn scan(&mut self, from: &[u8], to: &[u8], f: &mut OnEntry<'_>) -> Result<(), FsError>;
    /// The entry with the greatest key in `from..before`.
    #[allow(clippy::type_complexity, reason = "a key and a value")]
    fn last_before(
        &mut self,
        from: &[u8],
        before: &[u8],
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>, FsError>;
    /// A new inode number.
    fn alloc_ino(&mut self) -> u64;
    /// Present generation: the birth of new extents.
    fn generation(&self) -> u64;
    /// Key of the directory hash.
    fn hash_key(&self) -> [u8; 16];
    /// Tells that this tree no longer refers to an extent (or a part of one).
    fn drop_extent(&mut self, e: &Extent);
}

/// A time: seconds since 1970 and nanoseconds.
pub type Time = (i64, u32);

/// The present time.
pub fn now() -> Time {
    let t = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    (
        i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        t.subsec_nanos(),
    )
}

/// The present, as the kernel's own filesystems take it: the last tick of its clock.
pub fn now_by_ticks() -> Time {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME_COARSE) {
        Ok(t) => (t.tv_sec(), u32::try_from(t.tv_nsec()).unwrap_or(0)),
        Err(_) => now(),
    }
}

/// Who asks, and when.
#[derive(Debug, Clone, Copy)]
pub struct Ctx {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// The time that is written to inodes.
    pub now: Time,
}

impl Ctx {
    /// Root, at this moment.
    pub fn root_now() -> Self {
        Self {
            uid: 0,
            gid: 0,
            now: now(),
        }
    }
}
