//! File contents: extents that map ranges of a file to places in segments. What no extent maps reads as zeros.
//!
//! An extent record, 25 bytes, little-endian, under the file offset: segment u32, offset in it u64, length u32 (at most
//! 1 GiB), flags u8, birth u64. Extents of a file never overlap.

use std::ops::ControlFlow;

use super::inode::{self, Inode};
use super::{FILE_MAX, FsError, Kv, fail, key};

/// Other files (or other ranges) may map the same bytes, so dropping this extent frees nothing by itself.
pub const EXTENT_SHARED: u8 = 1;
/// Bytes in an extent at most.
pub const EXTENT_MAX: u32 = 1 << 30;
/// Bytes of an extent record.
const LEN: usize = 25;

/// A run of bytes in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Segment.
    pub seg: u32,
    /// Offset in it, bytes.
    pub off: u64,
    /// Length, bytes.
    pub len: u32,
    /// [`EXTENT_SHARED`].
    pub flags: u8,
    /// Generation that wrote it (of a merged one: the oldest).
    pub birth: u64,
}

impl Extent {
    /// The record.
    pub(crate) fn encode(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[..4].copy_from_slice(&self.seg.to_le_bytes());
        b[4..12].copy_from_slice(&self.off.to_le_bytes());
        b[12..16].copy_from_slice(&self.len.to_le_bytes());
        b[16] = self.flags;
        b[17..].copy_from_slice(&self.birth.to_le_bytes());
        b
    }

    /// Reads a record; `None` if it is none.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; LEN] = b.try_into().ok()?;
        let e = Self {
            seg: u32::from_le_bytes(b[..4].try_into().ok()?),
            off: u64::from_le_bytes(b[4..12].try_into().ok()?),
            len: u32::from_le_bytes(b[12..16].try_into().ok()?),
            flags: b[16],
            birth: u64::from_le_bytes(b[17..].try_into().ok()?),
        };
        (e.len > 0 && e.len <= EXTENT_MAX && e.off <= 1 << 40).then_some(e)
    }

    /// The part from `skip` on, `len` bytes long.
    fn part(&self, skip: u64, len: u64) -> Self {
        Self {
            off: self.off + skip,
            len: u32::try_from(len).unwrap_or(self.len),
            ..*self
        }
    }
}

/// An extent and where it is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Offset in the file.
    pub at: u64,
    /// Where the bytes are.
    pub extent: Extent,
}

impl Mapped {
    /// Offset in the file behind the last byte.
    pub fn end(&self) -> u64 {
        self.at.saturating_add(u64::from(self.extent.len))
    }
}

const BAD: &str = "an extent makes no sense";

fn mapped(ino: u64, k: &[u8], v: &[u8]) -> Result<Mapped, FsError> {
    match (key::extent_offset(k), Extent::decode(v)) {
        (Some(at), Some(extent)) if at <= FILE_MAX => Ok(Mapped { at, extent }),
        _ => Err(FsError::Corrupt { ino, what: BAD }),
    }
}

/// The extents that touch `from..to`, whole, in order; `f` may break.
///
/// # Errors
/// Corrupt, or the store's.
pub fn each<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    from: u64,
    to: u64,
    f: &mut dyn FnMut(Mapped) -> ControlFlow<()>,
) -> Result<(), FsError> {
    if from >= to {
        return Ok(());
    }
    let first = key::kind(ino, key::EXTENT);
    let mut start = key::extent(ino, from);
    // One that begins before may reach in.
    if from > 0
        && let Some((k, v)) = kv.last_before(&first, &start)?
    {
        let m = mapped(ino, &k, &v)?;
        if m.end() > from {
            start = key::extent(ino, m.at);
        }
    }
    let mut bad = None;
    kv.scan(
        &start,
        &key::extent(ino, to),
        &mut |k, v| match mapped(ino, k, v) {
            Ok(m) => f(m),
            Err(e) => {
                bad = Some(e);
                ControlFlow::Break(())
            }
        },
    )?;
    bad.map_or(Ok(()), Err)
}

/// The extents that touch `from..to`, at most `max` of them.
///
/// # Errors
/// As [`each`].
pub fn list<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    from: u64,
    to: u64,
    max: usize,
) -> Result<Vec<Mapped>, FsError> {
    let mut out = Vec::new();
    each(kv, ino, from, to, &mut |m| {
        out.push(m);
        if out.len() < max {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })?;
    Ok(out)
}

/// Removes what is mapped in `from..to`. Returns the bytes that are no longer mapped. Works in steps, so that a batch
/// stays small: `more` is true when the caller should go on (in another batch, from the start).
///
/// # Errors
/// Corrupt, or the store's.
pub fn unmap<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    from: u64,
    to: u64,
    max: usize,
) -> Result<(u64, bool), FsError> {
    let found = list(kv, ino, from, to, max)?;
    let more = found.len() == max;
    let mut gone = 0;
    for m in found {
        let (cut_from, cut_to) = (m.at.max(from), m.end().min(to));
        kv.del(&key::extent(ino, m.at))?;
        if m.at < cut_from {
            let left = m.extent.part(0, cut_from - m.at);
            kv.put(&key::extent(ino, m.at), &left.encode())?;
        }
        if cut_to < m.end() {
            let right = m.extent.part(cut_to - m.at, m.end() - cut_to);
            kv.put(&key::extent(ino, cut_to), &right.encode())?;
        }
        kv.drop_extent(&m.extent.part(cut_from - m.at, cut_to - cut_from));
        gone += cut_to - cut_from;
    }
    Ok((gone, more))
}

/// Unmaps all of a range in one batch.
fn unmap_all<K: Kv + ?Sized>(kv: &mut K, ino: u64, from: u64, to: u64) -> Result<u64, FsError> {
    let mut gone = 0;
    loop {
        let (n, more) = unmap(kv, ino, from, to, 1024)?;
        gone += n;
        if !more {
            return Ok(gone);
        }
    }
}

/// Maps `extent` at `at`, in place of whatever was there, and keeps the inode's size and mapped bytes in step.
/// Joins it with the extent before when both lie in a row.
///
/// # Errors
/// EFBIG, corrupt, or the store's.
pub fn map<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    inode: &mut Inode,
    at: u64,
    extent: Extent,
) -> Result<(), FsError> {
    let end = at
        .checked_add(u64::from(extent.len))
        .filter(|e| *e <= FILE_MAX);
    let Some(end) = end else {
        return fail(libc::EFBIG);
    };
    if inode.mapped > 0 {
        let gone = unmap_all(kv, ino, at, end)?;
        inode.mapped = inode.mapped.saturating_sub(gone);
    }
    let mut placed = Mapped { at, extent };
    if at > 0
        && inode.mapped > 0
        && let Some((k, v)) = kv.last_before(&key::kind(ino, key::EXTENT), &key::extent(ino, at))?
    {
        let before = mapped(ino, &k, &v)?;
        let b = before.extent;
        let joins = before.end() == at
            && b.seg == extent.seg
            && b.off + u64::from(b.len) == extent.off
            && b.flags == extent.flags
            && u64::from(b.len) + u64::from(extent.len) <= u64::from(EXTENT_MAX);
        if joins {
            placed = Mapped {
                at: before.at,
                extent: Extent {
                    len: b.len + extent.len,
                    birth: b.birth.min(extent.birth),
                    ..b
                },
            };
        }
    }
    kv.put(&key::extent(ino, placed.at), &placed.extent.encode())?;
    inode.mapped += u64::from(extent.len);
    inode.size = inode.size.max(end);
    Ok(())
}

/// Sets the size; what lies beyond is unmapped.
///
/// # Errors
/// EFBIG, corrupt, or the store's.
pub fn set_size<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    inode: &mut Inode,
    size: u64,
) -> Result<(), FsError> {
    if size > FILE_MAX {
        return fail(libc::EFBIG);
    }
    if size < inode.size && inode.mapped > 0 {
        let gone = unmap_all(kv, ino, size, u64::MAX)?;
        inode.mapped = inode.mapped.saturating_sub(gone);
    }
    inode.size = size;
    Ok(())
}

/// Makes a hole; the size stays.
///
/// # Errors
/// Corrupt, or the store's.
pub fn punch<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    inode: &mut Inode,
    from: u64,
    to: u64,
) -> Result<(), FsError> {
    let gone = unmap_all(kv, ino, from, to)?;
    inode.mapped = inode.mapped.saturating_sub(gone);
    Ok(())
}

/// Cuts `from..to` out of a file or opens a gap of that length at `from`: the rest moves down or up.
///
/// # Errors
/// EINVAL and EFBIG as in fallocate(2), corrupt, or the store's.
pub fn shift<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    inode: &mut Inode,
    at: u64,
    len: u64,
    collapse: bool,
) -> Result<(), FsError> {
    if !at.is_multiple_of(4096) || !len.is_multiple_of(4096) || len == 0 {
        return fail(libc::EINVAL);
    }
    if collapse && at.checked_add(len).is_none_or(|e| e >= inode.size) {
        return fail(libc::EINVAL);
    }
    if !collapse && at >= inode.size {
        return fail(libc::EINVAL);
    }
    if !collapse && inode.size.checked_add(len).is_none_or(|e| e > FILE_MAX) {
        return fail(libc::EFBIG);
    }
    let from = if collapse {
        punch(kv, ino, inode, at, at + len)?;
        at + len
    } else {
        at
    };
    let moved = list(kv, ino, from, u64::MAX, usize::MAX)?;
    for m in &moved {
        kv.del(&key::extent(ino, m.at))?;
        if m.at < from {
            // Reaches across the place: its first part stays.
            let first = m.extent.part(0, from - m.at);
            kv.put(&key::extent(ino, m.at), &first.encode())?;
        }
    }
    for m in &moved {
        let skip = from.saturating_sub(m.at);
        let e = m.extent.part(skip, u64::from(m.extent.len) - skip);
        let was = m.at + skip;
        let to = if collapse { was - len } else { was + len };
        kv.put(&key::extent(ino, to), &e.encode())?;
    }
    inode.size = if collapse {
        inode.size - len
    } else {
        inode.size + len
    };
    Ok(())
}

/// Where data (or a hole) is next, as lseek(2) with SEEK_DATA or SEEK_HOLE.
///
/// # Errors
/// ENXIO, corrupt, or the store's.
pub fn seek<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    size: u64,
    from: u64,
    hole: bool,
) -> Result<u64, FsError> {
    if from >= size {
        return fail(libc::ENXIO);
    }
    let mut at = from;
    let mut data = None;
    each(kv, ino, from, size, &mut |m| {
        if hole {
            if m.at > at {
                return ControlFlow::Break(());
            }
            at = m.end();
            ControlFlow::Continue(())
        } else {
            data = Some(m.at.max(from));
            ControlFlow::Break(())
        }
    })?;
    match (hole, data) {
        (true, _) => Ok(at.min(size)),
        (false, Some(d)) => Ok(d),
        (false, None) => fail(libc::ENXIO),
    }
}

/// Makes `dst` at `to` map the same bytes as `src` at `from`: a copy without copying. `len` is within the source.
///
/// # Errors
/// EFBIG, corrupt, or the store's.
pub fn share<K: Kv + ?Sized>(
    kv: &mut K,
    (src, from): (u64, u64),
    (dst, to): (u64, u64),
    len: u64,
    dst_inode: &mut Inode,
) -> Result<(), FsError> {
    let end = to.checked_add(len).filter(|e| *e <= FILE_MAX);
    let Some(end) = end else {
        return fail(libc::EFBIG);
    };
    let found = list(kv, src, from, from + len, usize::MAX)?;
    // First, as both ranges may lie in one extent, which the next step splits.
    for m in &found {
        if m.extent.flags & EXTENT_SHARED == 0 {
            let marked = Extent {
                flags: m.extent.flags | EXTENT_SHARED,
                ..m.extent
            };
            kv.put(&key::extent(src, m.at), &marked.encode())?;
        }
    }
    let gone = unmap_all(kv, dst, to, end)?;
    dst_inode.mapped = dst_inode.mapped.saturating_sub(gone);
    for m in found {
        let (cut_from, cut_to) = (m.at.max(from), m.end().min(from + len));
        let mut part = m.extent.part(cut_from - m.at, cut_to - cut_from);
        part.flags |= EXTENT_SHARED;
        kv.put(&key::extent(dst, to + (cut_from - from)), &part.encode())?;
        dst_inode.mapped += cut_to - cut_from;
    }
    dst_inode.size = dst_inode.size.max(end);
    Ok(())
}

/// Removes an inode that has no links and all that belongs to it, in steps of at most `max` records.
/// True when it is gone.
///
/// # Errors
/// Corrupt, or the store's.
pub fn reap<K: Kv + ?Sized>(kv: &mut K, ino: u64, max: usize) -> Result<bool, FsError> {
    let Some(mut inode) = inode::find(kv, ino)? else {
        kv.del(&key::orphan(ino))?;
        return Ok(true);
    };
    if inode.nlink > 0 {
        // The list is wrong (a damaged store): a file that has a name stays.
        kv.del(&key::orphan(ino))?;
        return Ok(true);
    }
    if inode.mapped > 0 {
        let (gone, more) = unmap(kv, ino, 0, u64::MAX, max)?;
        if more {
            inode.mapped = inode.mapped.saturating_sub(gone);
            inode::save(kv, ino, &inode)?;
            return Ok(false);
        }
    }
    if inode.flags & inode::HAS_XATTR != 0 || inode.is_symlink() {
        let mut keys = Vec::new();
        kv.scan(
            &key::kind(ino, key::XATTR),
            &key::kind(ino, key::DIRENT),
            &mut |k, _| {
                keys.push(k.to_vec());
                ControlFlow::Continue(())
            },
        )?;
        for k in keys {
            kv.del(&k)?;
        }
    }
    kv.del(&key::inode(ino))?;
    kv.del(&key::orphan(ino))?;
    Ok(true)
}

/// The inodes without links that the tree keeps, at most `max`.
///
/// # Errors
/// The store's.
pub fn orphans<K: Kv + ?Sized>(kv: &mut K, max: usize) -> Result<Vec<u64>, FsError> {
    let mut out = Vec::new();
    kv.scan(
        &key::kind(0, key::ORPHAN),
        &key::kind(0, key::ORPHAN + 1),
        &mut |k, _| {
            out.extend(key::orphan_ino(k));
            if out.len() < max {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        },
    )?;
    Ok(out)
}
