//! POSIX ACLs (acl(5)) in the kernel's attribute form, version 2: a u32 version, then entries of tag u16, permissions
//! u16, id u32. The kernel checks permissions; kept here are the mirror of the access ACL in the mode, chmod's effect on
//! the mask, and what a default ACL hands down.

use super::inode::{self, Inode};
use super::{FsError, Kv, fail, xattr};

/// Attribute of the access ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// Attribute of the default ACL.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Debug, Clone, Copy)]
struct Ace {
    tag: u16,
    perm: u16,
    id: u32,
}

fn decode(value: &[u8]) -> Option<Vec<Ace>> {
    let (version, rest) = value.split_first_chunk::<4>()?;
    let (entries, odd) = rest.as_chunks::<8>();
    if u32::from_le_bytes(*version) != VERSION || !odd.is_empty() {
        return None;
    }
    let list: Vec<Ace> = entries
        .iter()
        .map(|e| Ace {
            tag: u16::from_le_bytes([e[0], e[1]]),
            perm: u16::from_le_bytes([e[2], e[3]]),
            id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
        })
        .collect();
    let count = |tag| list.iter().filter(|a| a.tag == tag).count();
    let named = count(USER) + count(GROUP) > 0;
    let sane = list.iter().all(|a| {
        a.perm <= 7 && matches!(a.tag, USER_OBJ | USER | GROUP_OBJ | GROUP | MASK | OTHER)
    }) && count(USER_OBJ) == 1
        && count(GROUP_OBJ) == 1
        && count(OTHER) == 1
        && count(MASK) <= 1
        && (!named || count(MASK) == 1);
    sane.then_some(list)
}

fn encode(list: &[Ace]) -> Vec<u8> {
    let mut v = VERSION.to_le_bytes().to_vec();
    for a in list {
        v.extend_from_slice(&a.tag.to_le_bytes());
        v.extend_from_slice(&a.perm.to_le_bytes());
        v.extend_from_slice(&a.id.to_le_bytes());
    }
    v
}

/// The permission bits that an access ACL shows as: owner, mask (or group), other.
fn mode_of(list: &[Ace]) -> u32 {
    let perm = |tag| {
        list.iter()
            .find(|a| a.tag == tag)
            .map(|a| u32::from(a.perm))
    };
    let group = perm(MASK).or(perm(GROUP_OBJ)).unwrap_or(0);
    perm(USER_OBJ).unwrap_or(0) << 6 | group << 3 | perm(OTHER).unwrap_or(0)
}

/// Writes permission bits into an access ACL.
fn apply_mode(list: &mut [Ace], mode: u32) {
    let has_mask = list.iter().any(|a| a.tag == MASK);
    for a in list {
        let shift = match a.tag {
            USER_OBJ => 6,
            MASK => 3,
            GROUP_OBJ if !has_mask => 3,
            OTHER => 0,
            _ => continue,
        };
        a.perm = u16::try_from(mode >> shift & 7).unwrap_or(0);
    }
}

fn is_minimal(list: &[Ace]) -> bool {
    list.len() == 3
}

/// Sets one of the two ACLs and mirrors it in the inode (which the caller saves).
///
/// # Errors
/// EINVAL, EACCES (a default ACL on what is no directory).
pub(super) fn set<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    inode: &mut Inode,
    name: &[u8],
    value: &[u8],
) -> Result<(), FsError> {
    let flag = if name == ACCESS {
        inode::HAS_ACL
    } else {
        inode::HAS_DEFAULT_ACL
    };
    if name == DEFAULT && !inode.is_dir() {
        return if value.is_empty() {
            Ok(())
        } else {
            fail(libc::EACCES)
        };
    }
    let list = match value.len() {
        0..=4 => Vec::new(),
        _ => match decode(value) {
            Some(l) => l,
            None => return fail(libc::EINVAL),
        },
    };
    if name == ACCESS && !list.is_empty() {
        inode.mode = inode.mode & !0o777 | mode_of(&list);
    }
    // An access ACL that says no more than the mode is not kept.
    if list.is_empty() || name == ACCESS && is_minimal(&list) {
        xattr::remove_pieces(kv, ino, name)?;
        inode.flags &= !flag;
    } else {
        xattr::put_pieces(kv, ino, name, value)?;
        inode.flags |= flag | inode::HAS_XATTR;
    }
    Ok(())
}

/// After chmod: the access ACL follows the mode.
///
/// # Errors
/// The store's.
pub(super) fn chmod<K: Kv + ?Sized>(kv: &mut K, ino: u64, inode: &Inode) -> Result<(), FsError> {
    if inode.flags & inode::HAS_ACL == 0 {
        return Ok(());
    }
    if let Some(mut list) = xattr::find(kv, ino, ACCESS)?.and_then(|v| decode(&v)) {
        apply_mode(&mut list, inode.mode);
        xattr::put_pieces(kv, ino, ACCESS, &encode(&list))?;
    }
    Ok(())
}

/// A new inode takes over its directory's default ACL: as its access ACL, limited by the mode asked for (no umask), and,
/// if it is a directory, as its default one.
///
/// # Errors
/// The store's.
pub(super) fn inherit<K: Kv + ?Sized>(
    kv: &mut K,
    dir: u64,
    ino: u64,
    inode: &mut Inode,
) -> Result<(), FsError> {
    let Some(value) = xattr::find(kv, dir, DEFAULT)? else {
        return Ok(());
    };
    let Some(mut list) = decode(&value) else {
        return Err(FsError::Corrupt {
            ino: dir,
            what: "its default ACL makes no sense",
        });
    };
    if inode.is_dir() {
        xattr::put_pieces(kv, ino, DEFAULT, &value)?;
        inode.flags |= inode::HAS_DEFAULT_ACL | inode::HAS_XATTR;
    }
    let perm = mode_of(&list) & inode.mode & 0o777;
    apply_mode(&mut list, perm);
    inode.mode = inode.mode & !0o777 | perm;
    if !is_minimal(&list) {
        xattr::put_pieces(kv, ino, ACCESS, &encode(&list))?;
        inode.flags |= inode::HAS_ACL | inode::HAS_XATTR;
    }
    Ok(())
}
