//! Changes of attributes: mode, owner, size and times, with the rules for set-id bits and capabilities.

use super::inode::{self, Inode};
use super::{Ctx, FsError, Kv, Time, acl, data, fail};

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The present.
    Now,
    /// A given one.
    At(Time),
}

/// What to change; `None` leaves it.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs, reason = "as in stat(2)")]
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    pub ctime: Option<Time>,
    /// The kernel asks to clear set-id bits with a truncation by an unprivileged caller (FATTR_KILL_SUIDGID).
    pub kill_suidgid: bool,
    /// The kernel keeps the times of files: none changes by itself.
    pub kernel_times: bool,
}

/// Clears set-user-id, and set-group-id where the group may execute, of a file (as the kernel's `setattr_should_drop_suidgid`).
pub fn kill_suidgid(inode: &mut Inode) {
    if inode.is_dir() {
        return;
    }
    inode.mode &= !libc::S_ISUID;
    if inode.mode & libc::S_IXGRP != 0 {
        inode.mode &= !libc::S_ISGID;
    }
}

/// Drops file capabilities: whoever changes contents or owner of a file takes them away (FUSE_HANDLE_KILLPRIV_V2).
///
/// # Errors
/// The store's.
pub fn drop_capability<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    inode: &mut Inode,
) -> Result<(), FsError> {
    if inode.flags & inode::HAS_CAPABILITY != 0 {
        super::xattr::remove_pieces(kv, ino, super::xattr::CAPABILITY)?;
        inode.flags &= !inode::HAS_CAPABILITY;
    }
    Ok(())
}

/// Clears what a write by the caller takes away: capabilities, and set-id bits unless it is root's (who may keep them,
/// CAP_FSETID). The kernel asks for this before the write, with a SETATTR that sets nothing.
///
/// # Errors
/// ESTALE, corrupt, or the store's.
pub fn drop_privileges<K: Kv + ?Sized>(kv: &mut K, ino: u64, ctx: &Ctx) -> Result<Inode, FsError> {
    let mut inode = inode::load(kv, ino)?;
    if inode.is_dir() {
        return Ok(inode);
    }
    let before = inode;
    drop_capability(kv, ino, &mut inode)?;
    if ctx.uid != 0 {
        kill_suidgid(&mut inode);
    }
    if inode != before {
        inode.ctime = ctx.now;
        inode::save(kv, ino, &inode)?;
    }
    Ok(inode)
}

/// Applies a change. Permission was checked by the kernel.
///
/// # Errors
/// EINVAL, EISDIR, EFBIG, ESTALE, corrupt, or the store's.
pub fn set<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    change: &Change,
    ctx: &Ctx,
) -> Result<Inode, FsError> {
    let mut inode = inode::load(kv, ino)?;
    let told_only = change.kernel_times && inode.is_file();
    if let Some(size) = change.size {
        if inode.is_dir() {
            return fail(libc::EISDIR);
        }
        if !inode.is_file() {
            return fail(libc::EINVAL);
        }
        if size != inode.size {
            data::set_size(kv, ino, &mut inode, size)?;
        }
        drop_capability(kv, ino, &mut inode)?;
        if change.kill_suidgid {
            kill_suidgid(&mut inode);
        }
        if !told_only {
            inode.mtime = ctx.now;
        }
    }
    if let Some(mode) = change.mode {
        inode.mode = inode.mode & libc::S_IFMT | mode & 0o7777;
        acl::chmod(kv, ino, &inode)?;
    }
    if change.uid.is_some() || change.gid.is_some() {
        inode.uid = change.uid.unwrap_or(inode.uid);
        inode.gid = change.gid.unwrap_or(inode.gid);
        if change.mode.is_none() {
            kill_suidgid(&mut inode);
        }
        drop_capability(kv, ino, &mut inode)?;
    }
    let pick = |t: SetTime| match t {
        SetTime::Now => ctx.now,
        SetTime::At(t) => t,
    };
    if let Some(t) = change.atime {
        inode.atime = pick(t);
    }
    if let Some(t) = change.mtime {
        inode.mtime = pick(t);
    }
    let by_itself = if told_only { inode.ctime } else { ctx.now };
    inode.ctime = change.ctime.unwrap_or(by_itself);
    inode::save(kv, ino, &inode)?;
    Ok(inode)
}
