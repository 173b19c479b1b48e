//! Making, linking and removing files of all types.

use super::dir::{self, Target};
use super::inode::{self, Inode};
use super::{Ctx, FsError, Kv, LINK_MAX, ROOT_INO, TARGET_MAX, acl, data, fail, key};

/// Bytes of a symlink's target in one record.
const CHUNK: usize = 1000;

/// What to make.
#[derive(Debug, Clone, Copy)]
pub struct New<'a> {
    /// Type and permissions.
    pub mode: u32,
    /// The caller's umask; it counts only where the directory has no default ACL.
    pub umask: u32,
    /// Device number, for devices.
    pub rdev: u32,
    /// Target, for symlinks.
    pub target: &'a [u8],
}

/// Makes the root directory of an empty tree.
///
/// # Errors
/// The store's.
pub fn mkfs<K: Kv + ?Sized>(kv: &mut K, ctx: &Ctx) -> Result<(), FsError> {
    let inode = Inode {
        mode: libc::S_IFDIR | 0o755,
        uid: ctx.uid,
        gid: ctx.gid,
        nlink: 2,
        size: 4096,
        atime: ctx.now,
        mtime: ctx.now,
        ctime: ctx.now,
        btime: ctx.now,
        parent: ROOT_INO,
        ..Inode::default()
    };
    inode::save(kv, ROOT_INO, &inode)
}

/// Makes an inode as a child of `dir`, to get a name there, or none.
fn make<K: Kv + ?Sized>(
    kv: &mut K,
    dir_ino: u64,
    dir: &Inode,
    name: Option<&[u8]>,
    new: &New<'_>,
    ctx: &Ctx,
) -> Result<(u64, Inode), FsError> {
    let is_dir = new.mode & libc::S_IFMT == libc::S_IFDIR;
    let is_link = new.mode & libc::S_IFMT == libc::S_IFLNK;
    let ino = kv.alloc_ino();
    let mut inode = Inode {
        mode: new.mode & (libc::S_IFMT | 0o7777),
        uid: ctx.uid,
        gid: ctx.gid,
        nlink: if is_dir { 2 } else { 1 },
        size: if is_dir { 4096 } else { 0 },
        rdev: new.rdev,
        atime: ctx.now,
        mtime: ctx.now,
        ctime: ctx.now,
        btime: ctx.now,
        ..Inode::default()
    };
    if let Some(name) = name {
        inode.named(dir_ino, dir::hash(kv, name));
    }
    // A set-group-id directory hands its group down, and to directories the bit as well (mkdir(2)).
    if dir.mode & libc::S_ISGID != 0 {
        inode.gid = dir.gid;
        if is_dir {
            inode.mode |= libc::S_ISGID;
        }
    }
    if is_link {
        inode.mode |= 0o777;
        inode.size = new.target.len() as u64;
        for (i, piece) in new.target.chunks(CHUNK).enumerate() {
            kv.put(
                &key::symlink(ino, u8::try_from(i).unwrap_or(u8::MAX)),
                piece,
            )?;
        }
    } else if dir.flags & inode::HAS_DEFAULT_ACL != 0 {
        acl::inherit(kv, dir_ino, ino, &mut inode)?;
    } else {
        inode.mode &= !(new.umask & 0o777);
    }
    inode::save(kv, ino, &inode)?;
    Ok((ino, inode))
}

fn touch(dir: &mut Inode, ctx: &Ctx) {
    dir.mtime = ctx.now;
    dir.ctime = ctx.now;
}

/// Makes a file of any type under a name.
///
/// # Errors
/// EEXIST, ENOTDIR, ENOENT (directory removed), EMLINK, ENAMETOOLONG, ENOSPC, EINVAL (a type that there is not).
pub fn create<K: Kv + ?Sized>(
    kv: &mut K,
    dir_ino: u64,
    name: &[u8],
    new: &New<'_>,
    ctx: &Ctx,
) -> Result<(u64, Inode), FsError> {
    dir::check_name(name)?;
    if new.target.len() > TARGET_MAX {
        return fail(libc::ENAMETOOLONG);
    }
    // Its record could not be read again.
    if !inode::has_type(new.mode) {
        return fail(libc::EINVAL);
    }
    let mut dir = dir::load(kv, dir_ino)?;
    if dir.nlink == 0 {
        return fail(libc::ENOENT);
    }
    if dir::lookup(kv, dir_ino, name)?.is_some() {
        return fail(libc::EEXIST);
    }
    let (ino, inode) = make(kv, dir_ino, &dir, Some(name), new, ctx)?;
    let target = Target {
        ino,
        dtype: inode.dtype(),
    };
    dir::set(kv, dir_ino, name, target)?;
    if inode.is_dir() {
        dir.nlink = dir.nlink.saturating_add(1);
    }
    touch(&mut dir, ctx);
    inode::save(kv, dir_ino, &dir)?;
    Ok((ino, inode))
}

/// Makes a file without a name (O_TMPFILE): an orphan until it is linked.
///
/// # Errors
/// ENOTDIR, ENOENT, ENOSPC.
pub fn tmpfile<K: Kv + ?Sized>(
    kv: &mut K,
    dir_ino: u64,
    new: &New<'_>,
    ctx: &Ctx,
) -> Result<(u64, Inode), FsError> {
    let dir = dir::load(kv, dir_ino)?;
    let (ino, mut inode) = make(kv, dir_ino, &dir, None, new, ctx)?;
    inode.nlink = 0;
    inode::save(kv, ino, &inode)?;
    kv.put(&key::orphan(ino), &[])?;
    Ok((ino, inode))
}

/// A second name for an inode.
///
/// # Errors
/// EEXIST, EPERM (a directory), EMLINK, ENOENT, ENAMETOOLONG.
pub fn link<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    dir_ino: u64,
    name: &[u8],
    ctx: &Ctx,
) -> Result<Inode, FsError> {
    dir::check_name(name)?;
    let mut dir = dir::load(kv, dir_ino)?;
    if dir.nlink == 0 {
        return fail(libc::ENOENT);
    }
    let mut inode = inode::load(kv, ino)?;
    if inode.is_dir() {
        return fail(libc::EPERM);
    }
    if inode.nlink >= LINK_MAX {
        return fail(libc::EMLINK);
    }
    if dir::lookup(kv, dir_ino, name)?.is_some() {
        return fail(libc::EEXIST);
    }
    if inode.nlink == 0 {
        // linkat(2) of an O_TMPFILE file; the kernel has seen to O_EXCL.
        kv.del(&key::orphan(ino))?;
    }
    inode.nlink += 1;
    inode.named(dir_ino, dir::hash(kv, name));
    inode.ctime = ctx.now;
    inode::save(kv, ino, &inode)?;
    let target = Target {
        ino,
        dtype: inode.dtype(),
    };
    dir::set(kv, dir_ino, name, target)?;
    touch(&mut dir, ctx);
    inode::save(kv, dir_ino, &dir)?;
    Ok(inode)
}

/// Takes one link off an inode whose name is gone: it becomes an orphan when that was the last.
/// The caller reaps it when nobody has it open.
pub(super) fn drop_link<K: Kv + ?Sized>(
    kv: &mut K,
    ino: u64,
    mut inode: Inode,
    ctx: &Ctx,
) -> Result<bool, FsError> {
    inode.nlink = if inode.is_dir() {
        0
    } else {
        inode.nlink.saturating_sub(1)
    };
    inode.ctime = ctx.now;
    inode::save(kv, ino, &inode)?;
    if inode.nlink == 0 {
        kv.put(&key::orphan(ino), &[])?;
        return Ok(true);
    }
    Ok(false)
}

/// An inode that lost a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unlinked {
    /// Its number.
    pub ino: u64,
    /// True if it was the last name: the inode is an orphan now.
    pub last: bool,
}

/// Removes a name that is not a directory's.
///
/// # Errors
/// ENOENT, EISDIR.
pub fn unlink<K: Kv + ?Sized>(
    kv: &mut K,
    dir_ino: u64,
    name: &[u8],
    ctx: &Ctx,
) -> Result<Unlinked, FsError> {
    let mut dir = dir::load(kv, dir_ino)?;
    let Some(target) = dir::lookup(kv, dir_ino, name)? else {
        return fail(libc::ENOENT);
    };
    let inode = inode::load(kv, target.ino)?;
    if inode.is_dir() {
        return fail(libc::EISDIR);
    }
    dir::unset(kv, dir_ino, name)?;
    touch(&mut dir, ctx);
    inode::save(kv, dir_ino, &dir)?;
    let last = drop_link(kv, target.ino, inode, ctx)?;
    Ok(Unlinked {
        ino: target.ino,
        last,
    })
}

/// Removes an empty directory.
///
/// # Errors
/// ENOENT, ENOTDIR, ENOTEMPTY.
pub fn rmdir<K: Kv + ?Sized>(
    kv: &mut K,
    dir_ino: u64,
    name: &[u8],
    ctx: &Ctx,
) -> Result<Unlinked, FsError> {
    let mut dir = dir::load(kv, dir_ino)?;
    let Some(target) = dir::lookup(kv, dir_ino, name)? else {
        return fail(libc::ENOENT);
    };
    let inode = inode::load(kv, target.ino)?;
    if !inode.is_dir() {
        return fail(libc::ENOTDIR);
    }
    if !dir::is_empty(kv, target.ino)? {
        return fail(libc::ENOTEMPTY);
    }
    dir::unset(kv, dir_ino, name)?;
    dir.nlink = dir.nlink.saturating_sub(1);
    touch(&mut dir, ctx);
    inode::save(kv, dir_ino, &dir)?;
    drop_link(kv, target.ino, inode, ctx)?;
    Ok(Unlinked {
        ino: target.ino,
        last: true,
    })
}

/// The target of a symlink.
///
/// # Errors
/// EINVAL when it is none, corrupt.
pub fn readlink<K: Kv + ?Sized>(kv: &mut K, ino: u64) -> Result<Vec<u8>, FsError> {
    let inode = inode::load(kv, ino)?;
    if !inode.is_symlink() {
        return fail(libc::EINVAL);
    }
    let mut target = Vec::new();
    kv.scan(
        &key::kind(ino, key::SYMLINK),
        &key::kind(ino, key::SYMLINK + 1),
        &mut |_, v| {
            target.extend_from_slice(v);
            // A damaged tree may hold any number of pieces.
            if target.len() > TARGET_MAX {
                return std::ops::ControlFlow::Break(());
            }
            std::ops::ControlFlow::Continue(())
        },
    )?;
    if target.len() > TARGET_MAX || target.len() as u64 != inode.size {
        return Err(FsError::Corrupt {
            ino,
            what: "its target has another length than its record says",
        });
    }
    Ok(target)
}

/// Removes an orphan altogether in one batch (small ones).
///
/// # Errors
/// Corrupt, or the store's.
pub fn reap_now<K: Kv + ?Sized>(kv: &mut K, ino: u64) -> Result<bool, FsError> {
    data::reap(kv, ino, 1024)
}
