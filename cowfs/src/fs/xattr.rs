//! Extended attributes, in pieces of up to 1,000 bytes. The two POSIX ACL attributes are kept as they come, and mirrored
//! in the inode's mode and flags.

use std::ops::ControlFlow;

use super::inode::{self, Inode};
use super::{Ctx, FsError, Kv, acl, fail, key};

/// Bytes of a value in one record.
const PIECE: usize = 1000;
/// Longest value, bytes (the kernel's XATTR_SIZE_MAX).
pub const VALUE_MAX: usize = 65_536;
/// Longest list of names, bytes (the kernel's XATTR_LIST_MAX).
const LIST_MAX: usize = 65_536;
/// File capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";

fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.is_empty() || name.len() > 255 || name.contains(&0) {
        return fail(libc::ERANGE);
    }
    Ok(())
}

/// The value of an attribute.
///
/// # Errors
/// ENODATA, corrupt, or the store's.
pub fn get<K: Kv + ?Sized>(kv: &mut K, ino: u64, name: &[u8]) -> Result<Vec<u8>, FsError> {
    match find(kv, ino, name)? {
        Some(v) => Ok(v),
        None => fail(libc::ENODATA),
    }
}

/// The value of an attribute, if it is there.
///
/// # Errors
/// Corrupt, or the store's.
pub fn find<K: Kv + ?Sized>(kv: &mut K, ino: u64, name: &[u8]) -> Result<Option<Vec<u8>>, FsError> {
    check_name(name)?;
    let mut value = Vec::new();
    let mut found = false;
    let (from, to) = range(ino, name);
    kv.scan(&from, &to, &mut |_, v| {
        found = true;
        value.extend_from_slice(v);
        // A damaged tree may hold any number of pieces.
        if value.len() > VALUE_MAX {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    if value.len() > VALUE_MAX {
        return Err(FsError::Corrupt {
            ino,
            what: "an attribute is too long",
        });
    }
    Ok(found.then_some(value))
}

fn range(ino: u64, name: &[u8]) -> (key::Key, Vec<u8>) {
    let from = key::xattr(ino, name, 0);
    let mut to = key::xattr(ino, name, u16::MAX).to_vec();
    to.push(0);
    (from, to)
}

/// Removes all pieces; tells whether there were any.
///
/// # Errors
/// The store's.
pub fn remove_pieces<K: Kv + ?Sized>(kv: &mut K, ino: u64, name: &[u8]) -> Result<bool, FsError> {
    let (from, to) = range(ino, name);
    let mut keys = Vec::new();
    kv.scan(&from, &to, &mut |k, _| {
        keys.push(k.to_vec());
        ControlFlow::Continue(())
    })?;
    for k in &keys {
        kv.del(k)?;
    }
    Ok(!keys.is_empty())
}

/// Writes the pieces of a value, in place of what was there.
///
/// # Errors
/// The store's.
pub fn put_pieces<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    name: &[u8],
    value: &[u8],
) -> Result<(), FsError> {
    remove_pieces(kv, ino, name)?;
    if value.is_empty() {
        return kv.put(&key::xattr(ino, name, 0), &[]);
    }
    for (i, piece) in value.chunks(PIECE).enumerate() {
        let n = u16::try_from(i).unwrap_or(u16::MAX);
        kv.put(&key::xattr(ino, name, n), piece)?;
    }
    Ok(())
}

fn set_flag(inode: &mut Inode, name: &[u8], on: bool) {
    let flag = match name {
        CAPABILITY => inode::HAS_CAPABILITY,
        acl::ACCESS => inode::HAS_ACL,
        acl::DEFAULT => inode::HAS_DEFAULT_ACL,
        _ => 0,
    };
    if on {
        inode.flags |= flag | inode::HAS_XATTR;
    } else {
        inode.flags &= !flag;
    }
}

/// Sets an attribute. `flags` are those of setxattr(2); `kill_sgid` is set by the kernel when an ACL is set by one who
/// is not in the file's group.
///
/// # Errors
/// EEXIST, ENODATA, E2BIG, EINVAL (an ACL that is none), EACCES.
pub fn set<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    name: &[u8],
    value: &[u8],
    flags: u32,
    kill_sgid: bool,
    ctx: &Ctx,
) -> Result<(), FsError> {
    check_name(name)?;
    if value.len() > VALUE_MAX {
        return fail(libc::E2BIG);
    }
    let mut inode = inode::load(kv, ino)?;
    let there = find(kv, ino, name)?.is_some();
    if there && flags & libc::XATTR_CREATE.cast_unsigned() != 0 {
        return fail(libc::EEXIST);
    }
    if !there && flags & libc::XATTR_REPLACE.cast_unsigned() != 0 {
        return fail(libc::ENODATA);
    }
    if name == acl::ACCESS || name == acl::DEFAULT {
        acl::set(kv, ino, &mut inode, name, value)?;
        if kill_sgid {
            inode.mode &= !libc::S_ISGID;
        }
    } else {
        put_pieces(kv, ino, name, value)?;
        set_flag(&mut inode, name, true);
    }
    inode.ctime = ctx.now;
    inode::save(kv, ino, &inode)
}

/// Removes an attribute.
///
/// # Errors
/// ENODATA, corrupt, or the store's.
pub fn remove<K: Kv + ?Sized>(kv: &mut K, ino: u64, name: &[u8], ctx: &Ctx) -> Result<(), FsError> {
    check_name(name)?;
    let mut inode = inode::load(kv, ino)?;
    if !remove_pieces(kv, ino, name)? {
        // There is no difference between no ACL and one that was never set (as ext4 has it).
        let is_acl = name == acl::ACCESS || name == acl::DEFAULT;
        return if is_acl { Ok(()) } else { fail(libc::ENODATA) };
    }
    set_flag(&mut inode, name, false);
    inode.ctime = ctx.now;
    inode::save(kv, ino, &inode)
}

/// The names, each with a final zero; those in `trusted.` only for one who may read `all` (CAP_SYS_ADMIN).
///
/// # Errors
/// E2BIG, or the store's.
pub fn list<K: Kv + ?Sized>(kv: &mut K, ino: u64, all: bool) -> Result<Vec<u8>, FsError> {
    let mut out = Vec::new();
    let mut last: Vec<u8> = Vec::new();
    if inode::load(kv, ino)?.flags & inode::HAS_XATTR == 0 {
        return Ok(out);
    }
    kv.scan(
        &key::kind(ino, key::XATTR),
        &key::kind(ino, key::XATTR + 1),
        &mut |k, _| {
            // Inode and kind in front; a zero and the piece's number behind.
            let name = k.get(9..k.len().saturating_sub(3)).unwrap_or_default();
            if name != last && (all || !name.starts_with(b"trusted.")) {
                last = name.to_vec();
                out.extend_from_slice(name);
                out.push(0);
            }
            if out.len() > LIST_MAX {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        },
    )?;
    if out.len() > LIST_MAX {
        return fail(libc::E2BIG);
    }
    Ok(out)
}
