//! Keys of a head's tree. Integers are big-endian, so that keys sort by inode, kind and offset.
//!
//! | key | value |
//! |---|---|
//! | ino u64, 0x01 | inode record (see [`super::inode`]) |
//! | ino u64, 0x02, name, 0, chunk u16 | a piece of up to 1,000 bytes of an extended attribute |
//! | ino u64, 0x03, chunk u8 | a piece of up to 1,000 bytes of a symlink's target |
//! | ino u64, 0x04, hash u64, name | directory entry: inode u64 and type u8, little-endian |
//! | ino u64, 0x05, file offset u64 | extent record (see [`super::data`]) |
//! | 0 u64, 0x11, ino u64 | nothing: an inode without links that was open |

use std::hash::Hasher;

/// Inode record.
pub const INODE: u8 = 1;
/// Piece of an extended attribute.
pub const XATTR: u8 = 2;
/// Piece of a symlink's target.
pub const SYMLINK: u8 = 3;
/// Directory entry.
pub const DIRENT: u8 = 4;
/// File extent.
pub const EXTENT: u8 = 5;
/// Inode without links.
pub const ORPHAN: u8 = 0x11;

/// Among these hashes are those of all names: from the first to before the last.
pub const HASHES: (u64, u64) = (0, 1 << 63);

/// Lowest hash of a name: places 1 and 2 are those of `.` and `..`.
const HASH_MIN: u64 = 3;

/// A short key on the stack.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    bytes: [u8; 288],
    len: usize,
}

impl std::ops::Deref for Key {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Key {
    fn new(ino: u64, kind: u8) -> Self {
        let mut bytes = [0; 288];
        bytes[..8].copy_from_slice(&ino.to_be_bytes());
        bytes[8] = kind;
        Self { bytes, len: 9 }
    }

    /// Adds bytes; callers stay below 288 (names have at most 255).
    fn push(mut self, b: &[u8]) -> Self {
        let n = b.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&b[..n]);
        self.len += n;
        self
    }
}

/// Key of an inode record.
pub fn inode(ino: u64) -> Key {
    Key::new(ino, INODE)
}

/// First key of a kind of an inode, or the first one after the kind before.
pub fn kind(ino: u64, kind: u8) -> Key {
    Key::new(ino, kind)
}

/// Key of an extent.
pub fn extent(ino: u64, off: u64) -> Key {
    Key::new(ino, EXTENT).push(&off.to_be_bytes())
}

/// Key of a directory entry.
pub fn dirent(dir: u64, hash: u64, name: &[u8]) -> Key {
    Key::new(dir, DIRENT).push(&hash.to_be_bytes()).push(name)
}

/// First key of the entries of a hash.
pub fn dirent_from(dir: u64, hash: u64) -> Key {
    Key::new(dir, DIRENT).push(&hash.to_be_bytes())
}

/// Key of a piece of a symlink.
pub fn symlink(ino: u64, chunk: u8) -> Key {
    Key::new(ino, SYMLINK).push(&[chunk])
}

/// Key of a piece of an attribute.
pub fn xattr(ino: u64, name: &[u8], chunk: u16) -> Key {
    Key::new(ino, XATTR)
        .push(name)
        .push(&[0])
        .push(&chunk.to_be_bytes())
}

/// Key of an orphan.
pub fn orphan(ino: u64) -> Key {
    Key::new(0, ORPHAN).push(&ino.to_be_bytes())
}

fn u64_be(b: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(b.get(..8)?.try_into().ok()?))
}

/// Inode number and kind of any key.
pub fn split(key: &[u8]) -> Option<(u64, u8, &[u8])> {
    Some((u64_be(key)?, *key.get(8)?, key.get(9..)?))
}

/// The inode number, if this is the key of an inode record.
pub fn inode_of_key(key: &[u8]) -> Option<u64> {
    match split(key) {
        Some((ino, INODE, [])) => Some(ino),
        _ => None,
    }
}

/// Hash and name of a directory entry's key. A hash that no name has is refused: as a place it would lead a listing back
/// to its beginning.
pub fn dirent_parts(key: &[u8]) -> Option<(u64, &[u8])> {
    let hash = u64_be(key.get(9..)?)?;
    (HASH_MIN..=u64::MAX >> 1)
        .contains(&hash)
        .then_some((hash, key.get(17..)?))
}

/// The number behind inode and kind. A longer key is none of ours: one that is read, but made anew without the rest to be
/// deleted, would be there for ever.
fn number(key: &[u8]) -> Option<u64> {
    let rest: [u8; 8] = key.get(9..)?.try_into().ok()?;
    Some(u64::from_be_bytes(rest))
}

/// File offset of an extent's key.
pub fn extent_offset(key: &[u8]) -> Option<u64> {
    number(key)
}

/// Number of an orphan's key.
pub fn orphan_ino(key: &[u8]) -> Option<u64> {
    number(key)
}

/// The hash of a name, which is also its place in the directory's order: 63 bits (offsets are signed), and above the
/// places of `.` and `..`. It is keyed with a secret of the store, so nobody can make names collide.
pub fn name_hash(key: &[u8; 16], name: &[u8]) -> u64 {
    let mut h = siphasher::sip::SipHasher13::new_with_key(key);
    h.write(name);
    (h.finish() >> 1).max(HASH_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_places_that_lead_back() {
        assert_eq!(dirent_parts(&dirent(1, 3, b"a")), Some((3, &b"a"[..])));
        for hash in [0, 2, 1 << 63, u64::MAX] {
            assert_eq!(dirent_parts(&dirent(1, hash, b"a")), None, "{hash}");
        }
    }
}
