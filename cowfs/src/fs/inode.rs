//! The inode record, 96 bytes, little-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | mode (type and permissions, as `st_mode`) |
//! | 4 | 4 | user |
//! | 8 | 4 | group |
//! | 12 | 4 | links |
//! | 16 | 8 | size, bytes |
//! | 24 | 8 | bytes mapped by extents |
//! | 32 | 4 | device number (the kernel's 32-bit form) |
//! | 36 | 4 | flags |
//! | 40 | 48 | access, modification, change and birth time: seconds i64, nanoseconds u32 |
//! | 88 | 8 | parent (directories) |

use super::{FsError, Kv, Time, fail, key};

/// Bytes of a record.
pub const LEN: usize = 96;
/// Has `security.capability`.
pub const HAS_CAPABILITY: u32 = 1;
/// Has any extended attribute.
pub const HAS_XATTR: u32 = 2;
/// Has a POSIX access ACL.
pub const HAS_ACL: u32 = 4;
/// Has a POSIX default ACL.
pub const HAS_DEFAULT_ACL: u32 = 8;

/// What is known of a file apart from its name and contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "as in stat(2)")]
pub struct Inode {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub size: u64,
    /// Bytes mapped by extents.
    pub mapped: u64,
    /// Of devices only.
    pub rdev: u32,
    pub flags: u32,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub btime: Time,
    /// Directory that holds this one. Of what is no directory: where it got its latest name, a hint; 0 if that is not known.
    pub parent: u64,
    /// The upper 32 of the 63 bits of the hash of that name, a hint. Devices have none.
    pub name: u32,
}

fn put_time(b: &mut [u8; LEN], at: usize, t: Time) {
    b[at..at + 8].copy_from_slice(&t.0.to_le_bytes());
    b[at + 8..at + 12].copy_from_slice(&t.1.to_le_bytes());
}

impl Inode {
    /// The record.
    pub fn encode(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[0..4].copy_from_slice(&self.mode.to_le_bytes());
        b[4..8].copy_from_slice(&self.uid.to_le_bytes());
        b[8..12].copy_from_slice(&self.gid.to_le_bytes());
        b[12..16].copy_from_slice(&self.nlink.to_le_bytes());
        b[16..24].copy_from_slice(&self.size.to_le_bytes());
        b[24..32].copy_from_slice(&self.mapped.to_le_bytes());
        let slot = match self.is_device() {
            true => self.rdev,
            false => self.name,
        };
        b[32..36].copy_from_slice(&slot.to_le_bytes());
        b[36..40].copy_from_slice(&self.flags.to_le_bytes());
        put_time(&mut b, 40, self.atime);
        put_time(&mut b, 52, self.mtime);
        put_time(&mut b, 64, self.ctime);
        put_time(&mut b, 76, self.btime);
        b[88..96].copy_from_slice(&self.parent.to_le_bytes());
        b
    }

    /// Reads a record; `None` if it is none.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; LEN] = b.try_into().ok()?;
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let time_at = |at: usize| (u64_at(at).cast_signed(), u32_at(at + 8));
        let device = is_device(u32_at(0));
        let inode = Self {
            mode: u32_at(0),
            uid: u32_at(4),
            gid: u32_at(8),
            nlink: u32_at(12),
            size: u64_at(16),
            mapped: u64_at(24),
            rdev: if device { u32_at(32) } else { 0 },
            flags: u32_at(36),
            atime: time_at(40),
            mtime: time_at(52),
            ctime: time_at(64),
            btime: time_at(76),
            parent: u64_at(88),
            name: if device { 0 } else { u32_at(32) },
        };
        let sane_times = [inode.atime, inode.mtime, inode.ctime, inode.btime]
            .iter()
            .all(|t| t.1 < 1_000_000_000);
        // Extents do not overlap and end before FILE_MAX, so no more than that can be mapped: sums cannot overflow.
        let sane_sizes = inode.size <= super::FILE_MAX && inode.mapped <= super::FILE_MAX;
        (has_type(inode.mode) && sane_times && sane_sizes).then_some(inode)
    }

    fn is_device(&self) -> bool {
        is_device(self.mode)
    }

    /// Notes that it has got a name, whose hash this is, in a directory.
    pub fn named(&mut self, dir: u64, hash: u64) {
        self.parent = dir;
        self.name = u32::try_from(hash >> HINT_SHIFT).unwrap_or(u32::MAX);
    }

    /// The hashes of names, from the first to before the last, among which that of its latest name is.
    pub fn hint(&self) -> (u64, u64) {
        if self.is_device() {
            return key::HASHES;
        }
        let first = u64::from(self.name) << HINT_SHIFT;
        (first, first + (1 << HINT_SHIFT))
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// True for a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// True for a symlink.
    pub fn is_symlink(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFLNK
    }

    /// The type as in `d_type`.
    pub fn dtype(&self) -> u8 {
        dtype(self.mode)
    }
}

/// Hashes of names have 63 bits.
const HINT_SHIFT: u32 = 31;

fn is_device(mode: u32) -> bool {
    matches!(mode & libc::S_IFMT, libc::S_IFBLK | libc::S_IFCHR)
}

/// True if the mode has one of the types that files can have.
pub fn has_type(mode: u32) -> bool {
    matches!(
        mode & libc::S_IFMT,
        libc::S_IFREG
            | libc::S_IFDIR
            | libc::S_IFLNK
            | libc::S_IFCHR
            | libc::S_IFBLK
            | libc::S_IFIFO
            | libc::S_IFSOCK
    )
}

/// The type of a mode as in `d_type`.
pub fn dtype(mode: u32) -> u8 {
    u8::try_from((mode & libc::S_IFMT) >> 12).unwrap_or(0)
}

/// Loads an inode; ESTALE if there is none (someone still holds a number that is gone).
///
/// # Errors
/// ESTALE, corrupt, or the store's.
pub fn load<K: Kv + ?Sized>(kv: &mut K, ino: u64) -> Result<Inode, FsError> {
    match find(kv, ino)? {
        Some(i) => Ok(i),
        None => fail(libc::ESTALE),
    }
}

/// Loads an inode if it is there.
///
/// # Errors
/// Corrupt, or the store's.
pub fn find<K: Kv + ?Sized>(kv: &mut K, ino: u64) -> Result<Option<Inode>, FsError> {
    let mut got = None;
    if !kv.get(&key::inode(ino), &mut |v| got = Inode::decode(v))? {
        return Ok(None);
    }
    got.map(Some).ok_or(FsError::Corrupt {
        ino,
        what: "its record makes no sense",
    })
}

/// Stores an inode.
///
/// # Errors
/// The store's.
pub fn save<K: Kv + ?Sized>(kv: &mut K, ino: u64, inode: &Inode) -> Result<(), FsError> {
    kv.put(&key::inode(ino), &inode.encode())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_impossible_records() {
        let good = Inode {
            mode: libc::S_IFREG,
            ..Inode::default()
        };
        assert_eq!(Inode::decode(&good.encode()), Some(good));
        for bad in [
            Inode { mode: 0, ..good },
            Inode {
                size: u64::MAX,
                ..good
            },
            Inode {
                mapped: u64::MAX,
                ..good
            },
        ] {
            assert_eq!(Inode::decode(&bad.encode()), None);
        }
    }
}
