//! rename(2) in its three kinds.

use super::dir::{self, Target};
use super::inode::{self, Inode};
use super::node::{self, Unlinked};
use super::{Ctx, FsError, Kv, fail};

/// Flags of renameat2(2) that are known here.
const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;
const WHITEOUT: u32 = 4;

/// Both ends of a rename.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    /// Directory of the old name.
    pub from: u64,
    /// Old name.
    pub name: &'a [u8],
    /// Directory of the new name.
    pub to: u64,
    /// New name.
    pub new_name: &'a [u8],
}

/// True if `dir` is `ancestor` or lies below it.
fn is_below<K: Kv + ?Sized>(kv: &mut K, mut dir: u64, ancestor: u64) -> Result<bool, FsError> {
    // As many steps as a path can have, so that a damaged tree cannot hold us.
    for _ in 0..1 << 16 {
        if dir == ancestor {
            return Ok(true);
        }
        if dir == super::ROOT_INO {
            return Ok(false);
        }
        dir = inode::load(kv, dir)?.parent;
    }
    Err(FsError::Corrupt {
        ino: dir,
        what: "its parents form a loop",
    })
}

/// Renames. Returns what lost its name, if the new name was taken.
///
/// # Errors
/// As rename(2).
pub fn rename<K: Kv + ?Sized>(
    kv: &mut K,
    ends: &Ends<'_>,
    flags: u32,
    ctx: &Ctx,
) -> Result<Option<Unlinked>, FsError> {
    if flags & !(NOREPLACE | EXCHANGE | WHITEOUT) != 0 || flags & WHITEOUT != 0 {
        return fail(libc::EINVAL);
    }
    dir::check_name(ends.new_name)?;
    let mut from = dir::load(kv, ends.from)?;
    let mut to = dir::load(kv, ends.to)?;
    if to.nlink == 0 {
        return fail(libc::ENOENT);
    }
    let Some(moved) = dir::lookup(kv, ends.from, ends.name)? else {
        return fail(libc::ENOENT);
    };
    let there = dir::lookup(kv, ends.to, ends.new_name)?;
    if flags & EXCHANGE != 0 {
        let Some(there) = there else {
            return fail(libc::ENOENT);
        };
        return exchange(kv, ends, moved, there, ctx).map(|()| None);
    }
    if there.is_some() && flags & NOREPLACE != 0 {
        return fail(libc::EEXIST);
    }
    if there.is_some_and(|t| t.ino == moved.ino) {
        return Ok(None);
    }
    let mut inode = inode::load(kv, moved.ino)?;
    let same_dir = ends.from == ends.to;
    if inode.is_dir() && !same_dir && is_below(kv, ends.to, moved.ino)? {
        return fail(libc::EINVAL);
    }
    let mut gone = None;
    if let Some(there) = there {
        let old = inode::load(kv, there.ino)?;
        match (inode.is_dir(), old.is_dir()) {
            (true, false) => return fail(libc::ENOTDIR),
            (false, true) => return fail(libc::EISDIR),
            (true, true) if !dir::is_empty(kv, there.ino)? => return fail(libc::ENOTEMPTY),
            _ => {}
        }
        if old.is_dir() {
            to.nlink = to.nlink.saturating_sub(1);
            if same_dir {
                from.nlink = to.nlink;
            }
        }
        let last = node::drop_link(kv, there.ino, old, ctx)?;
        gone = Some(Unlinked {
            ino: there.ino,
            last,
        });
    }
    dir::unset(kv, ends.from, ends.name)?;
    dir::set(kv, ends.to, ends.new_name, moved)?;
    if inode.is_dir() && !same_dir {
        from.nlink = from.nlink.saturating_sub(1);
        to.nlink = to.nlink.saturating_add(1);
    }
    inode.named(ends.to, dir::hash(kv, ends.new_name));
    inode.ctime = ctx.now;
    inode::save(kv, moved.ino, &inode)?;
    stamp(kv, ends, from, to, ctx)?;
    Ok(gone)
}

/// Writes both directories back with new times.
fn stamp<K: Kv + ?Sized>(
    kv: &mut K,
    ends: &Ends<'_>,
    mut from: Inode,
    mut to: Inode,
    ctx: &Ctx,
) -> Result<(), FsError> {
    (from.mtime, from.ctime) = (ctx.now, ctx.now);
    inode::save(kv, ends.from, &from)?;
    if ends.from != ends.to {
        (to.mtime, to.ctime) = (ctx.now, ctx.now);
        inode::save(kv, ends.to, &to)?;
    }
    Ok(())
}

fn exchange<K: Kv + ?Sized>(
    kv: &mut K,
    ends: &Ends<'_>,
    a: Target,
    b: Target,
    ctx: &Ctx,
) -> Result<(), FsError> {
    if a.ino == b.ino {
        return Ok(());
    }
    let mut ia = inode::load(kv, a.ino)?;
    let mut ib = inode::load(kv, b.ino)?;
    let same_dir = ends.from == ends.to;
    if !same_dir
        && (ia.is_dir() && is_below(kv, ends.to, a.ino)?
            || ib.is_dir() && is_below(kv, ends.from, b.ino)?)
    {
        return fail(libc::EINVAL);
    }
    dir::set(kv, ends.from, ends.name, b)?;
    dir::set(kv, ends.to, ends.new_name, a)?;
    let mut from = dir::load(kv, ends.from)?;
    let mut to = dir::load(kv, ends.to)?;
    if !same_dir {
        if ia.is_dir() {
            from.nlink = from.nlink.saturating_sub(1);
            to.nlink = to.nlink.saturating_add(1);
        }
        if ib.is_dir() {
            to.nlink = to.nlink.saturating_sub(1);
            from.nlink = from.nlink.saturating_add(1);
        }
    }
    ia.named(ends.to, dir::hash(kv, ends.new_name));
    ib.named(ends.from, dir::hash(kv, ends.name));
    (ia.ctime, ib.ctime) = (ctx.now, ctx.now);
    inode::save(kv, a.ino, &ia)?;
    inode::save(kv, b.ino, &ib)?;
    // A directory that is exchanged with one of its own children's parents is loaded after the change above.
    for (ino, parent) in [(ends.from, &mut from), (ends.to, &mut to)] {
        if ino == a.ino || ino == b.ino {
            let fresh = inode::load(kv, ino)?;
            (parent.parent, parent.name) = (fresh.parent, fresh.name);
        }
    }
    stamp(kv, ends, from, to, ctx)
}
