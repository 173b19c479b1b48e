//! The requests, one by one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::view::View;
use super::{MountFs, attr_of, ctx, lock};
use crate::fs::attr::{Change, SetTime as FsTime};
use crate::fs::node::{New, Unlinked};
use crate::fs::rename::Ends;
use crate::fs::{self, Ctx, FsError, Inode, ROOT_INO, attr, data, dir, inode, node, xattr};
use crate::fuse::{
    Attr, Create, Entry, Errno, Filesystem, Negotiated, Op, Reply, Request, SETXATTR_KILL_SGID,
    SetTime, Setattr, Statfs, open,
};

/// Nothing changes behind the kernel's back but by a rollback, which says so.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Reads and writes from this size on let another thread wait for requests meanwhile.
const SLOW_IO: usize = 128 << 10;

impl Filesystem for MountFs {
    fn handle(&self, req: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.dispatch(req, reply)
    }

    fn forget(&self, nodeid: u64, nlookup: u64) {
        self.forget_node(nodeid, nlookup);
    }

    fn is_slow(&self, op: &Op<'_>) -> bool {
        match op {
            Op::Read { size, .. } => *size as usize >= SLOW_IO,
            Op::Write { data, .. } => data.len() >= SLOW_IO,
            Op::Fsync { .. }
            | Op::Fsyncdir { .. }
            | Op::Fallocate { .. }
            | Op::CopyFileRange { .. }
            | Op::Syncfs => true,
            Op::Setattr(s) => s.size.is_some(),
            _ => false,
        }
    }

    fn ready(&self, negotiated: &Negotiated) {
        let _ = self.negotiated.set(*negotiated);
    }
}

fn time(t: SetTime) -> FsTime {
    match t {
        SetTime::Now => FsTime::Now,
        SetTime::At(s, n) => FsTime::At((s, n)),
    }
}

impl MountFs {
    fn dispatch(&self, req: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let n = req.nodeid;
        let c = || ctx(req);
        match req.op {
            Op::Lookup { name } => self.lookup(n, name, reply),
            Op::Getattr => {
                let a = self.getattr(n)?;
                reply.attr(&a, FOREVER);
                Ok(())
            }
            Op::Statx => {
                let a = self.getattr(n)?;
                reply.statx(&a, FOREVER);
                Ok(())
            }
            Op::Setattr(s) => self.setattr(n, &s, &c(), reply),
            Op::Readlink => {
                let target = self.read(n, |t, _, ino| node::readlink(t, ino))?;
                reply.bytes(&target);
                Ok(())
            }
            Op::Symlink { name, target } => {
                self.make(n, name, libc::S_IFLNK, 0, 0, target, &c(), reply)
            }
            Op::Mknod {
                name,
                mode,
                rdev,
                umask,
            } => self.make(n, name, mode, umask, rdev, &[], &c(), reply),
            Op::Mkdir { name, mode, umask } => {
                let mode = libc::S_IFDIR | mode & 0o7777;
                self.make(n, name, mode, umask, 0, &[], &c(), reply)
            }
            Op::Unlink { name } => {
                let ctx = c();
                self.unname(n, |t, dir| node::unlink(t, dir, name, &ctx).map(Some))
            }
            Op::Rmdir { name } => {
                let ctx = c();
                self.unname(n, |t, dir| node::rmdir(t, dir, name, &ctx).map(Some))
            }
            Op::Rename {
                name,
                new_parent,
                new_name,
                flags,
            } => self.rename(n, name, new_parent, new_name, flags, &c()),
            Op::Link {
                node: old,
                new_name,
            } => self.link(old, n, new_name, &c(), reply),
            Op::Read { offset, size } => self.read_file(n, offset, size, reply),
            Op::Write {
                offset,
                data,
                write_flags,
            } => {
                let done = self.write_file(n, offset, data, write_flags, &c())?;
                reply.written(done);
                Ok(())
            }
            Op::Statfs => self.statfs(reply),
            Op::Fsync { .. } | Op::Fsyncdir { .. } | Op::Syncfs => Ok(self.store.sync()?),
            Op::Setxattr {
                name,
                value,
                flags,
                extra_flags,
            } => {
                let kill = extra_flags & SETXATTR_KILL_SGID != 0;
                let ctx = c();
                self.change(n, false, |t, _, ino| {
                    xattr::set(t, ino, name, value, flags, kill, &ctx)
                })
            }
            Op::Getxattr { name, size } => {
                let value = self.read(n, |t, _, ino| {
                    if inode::load(t, ino)?.flags & inode::HAS_XATTR == 0 {
                        return fs::fail(libc::ENODATA);
                    }
                    xattr::get(t, ino, name)
                })?;
                sized(&value, size, reply)
            }
            Op::Listxattr { size } => {
                let names = self.read(n, |t, _, ino| xattr::list(t, ino))?;
                sized(&names, size, reply)
            }
            Op::Removexattr { name } => {
                let ctx = c();
                self.change(n, true, |t, _, ino| xattr::remove(t, ino, name, &ctx))
            }
            Op::Readdir { offset, size } => self.readdir(n, offset, size, false, reply),
            Op::Readdirplus { offset, size } => self.readdir(n, offset, size, true, reply),
            Op::Create(ref create) => self.create(n, create, &c(), reply),
            Op::Tmpfile(ref create) => self.tmpfile(n, create, &c(), reply),
            Op::Fallocate {
                offset,
                length,
                mode,
            } => self.fallocate(n, offset, length, mode, &c()),
            Op::Lseek { offset, whence } => {
                let at = self.read(n, |t, _, ino| {
                    let i = inode::load(t, ino)?;
                    match whence.cast_signed() {
                        libc::SEEK_DATA => data::seek(t, ino, i.size, offset, false),
                        libc::SEEK_HOLE => data::seek(t, ino, i.size, offset, true),
                        _ => fs::fail(libc::EINVAL),
                    }
                })?;
                reply.lseek(at);
                Ok(())
            }
            Op::CopyFileRange {
                offset_in,
                node_out,
                offset_out,
                len,
            } => {
                let done = self.copy_range((n, offset_in), (node_out, offset_out), len, &c())?;
                reply.written(done);
                Ok(())
            }
            Op::Release | Op::Releasedir | Op::Destroy => Ok(()),
            // Without these the kernel opens, closes and caches by itself: no message at all.
            Op::Open { .. } | Op::Opendir | Op::Flush | Op::Access { .. } => {
                Err(Errno(libc::ENOSYS))
            }
            Op::Forget { .. } | Op::BatchForget { .. } | Op::Init { .. } | Op::Interrupt => Ok(()),
            Op::Other { .. } => Err(Errno(libc::ENOSYS)),
        }
    }

    /// Gives a node to the kernel.
    fn give(view: &View, ino: u64, i: &Inode) -> Entry {
        view.remember(ino);
        Entry {
            nodeid: view.nodeid(ino),
            attr: attr_of(ino, i),
            entry_valid: FOREVER,
            attr_valid: FOREVER,
        }
    }

    fn lookup(&self, parent: u64, name: &[u8], reply: &mut Reply) -> Result<(), Errno> {
        let found = self.read(parent, |t, view, dir_ino| {
            if view.fixed().is_some() && !self.is_fixed() {
                return fs::fail(libc::ESTALE);
            }
            let Some(target) = dir::lookup(t, dir_ino, name)? else {
                return Ok(None);
            };
            let i = inode::find(t, target.ino)?.ok_or(FsError::Corrupt {
                ino: target.ino,
                what: "a name leads to it, but it is not there",
            })?;
            Ok(Some(Self::give(view, target.ino, &i)))
        })?;
        match found {
            Some(e) => reply.entry(&e),
            None => reply.negative(FOREVER),
        }
        Ok(())
    }

    fn getattr(&self, nodeid: u64) -> Result<Attr, Errno> {
        self.read(nodeid, |t, _, ino| Ok(attr_of(ino, &inode::load(t, ino)?)))
    }

    fn setattr(&self, nodeid: u64, s: &Setattr, ctx: &Ctx, reply: &mut Reply) -> Result<(), Errno> {
        let change = Change {
            mode: s.mode,
            uid: s.uid,
            gid: s.gid,
            size: s.size,
            atime: s.atime.map(time),
            mtime: s.mtime.map(time),
            ctime: s.ctime,
            kill_suidgid: s.kill_suidgid,
        };
        let (_, ino) = self.node(nodeid)?;
        let _stripe = s.size.map(|_| self.stripe(ino));
        if s.size.is_some() {
            self.drop_tail(ino);
        }
        let i = self.change(nodeid, true, |t, _, ino| attr::set(t, ino, &change, ctx))?;
        reply.attr(&attr_of(ino, &i), FOREVER);
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "those of mknod(2)")]
    fn make(
        &self,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
        rdev: u32,
        target: &[u8],
        ctx: &Ctx,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let new = New {
            mode,
            umask,
            rdev,
            target,
        };
        let e = self.change(parent, false, |t, view, dir_ino| {
            let (ino, i) = node::create(t, dir_ino, name, &new, ctx)?;
            Ok(Self::give(view, ino, &i))
        })?;
        reply.entry(&e);
        Ok(())
    }

    fn create(
        &self,
        parent: u64,
        c: &Create<'_>,
        ctx: &Ctx,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let new = New {
            mode: libc::S_IFREG | c.mode & 0o7777,
            umask: c.umask,
            rdev: 0,
            target: &[],
        };
        let e = self.change(parent, false, |t, view, dir_ino| {
            let (ino, i) = node::create(t, dir_ino, c.name, &new, ctx)?;
            Ok(Self::give(view, ino, &i))
        })?;
        reply.created(&e, 0, open_flags(c.flags));
        Ok(())
    }

    fn tmpfile(
        &self,
        parent: u64,
        c: &Create<'_>,
        ctx: &Ctx,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let new = New {
            mode: libc::S_IFREG | c.mode & 0o7777,
            umask: c.umask,
            rdev: 0,
            target: &[],
        };
        let e = self.change(parent, false, |t, view, dir_ino| {
            let (ino, i) = node::tmpfile(t, dir_ino, &new, ctx)?;
            lock(&self.orphans).insert(ino);
            Ok(Self::give(view, ino, &i))
        })?;
        reply.created(&e, 0, open_flags(c.flags));
        Ok(())
    }

    /// Removes a name by `f`, and the inode behind it if that was the last one and nobody knows it.
    fn unname(
        &self,
        parent: u64,
        f: impl FnOnce(&mut crate::store::Txn<'_>, u64) -> Result<Option<Unlinked>, FsError>,
    ) -> Result<(), Errno> {
        let gone = self.change(parent, true, |t, view, dir_ino| {
            let gone = f(t, dir_ino)?;
            if let Some(u) = gone.filter(|u| u.last) {
                lock(&self.orphans).insert(u.ino);
            }
            Ok(gone.map(|u| (u, Arc::clone(view))))
        })?;
        if let Some((u, view)) = gone
            && u.last
            && !view.knows(u.ino)
            && lock(&self.orphans).remove(&u.ino)
        {
            self.reap(u.ino)?;
        }
        Ok(())
    }

    fn rename(
        &self,
        parent: u64,
        name: &[u8],
        new_parent: u64,
        new_name: &[u8],
        flags: u32,
        ctx: &Ctx,
    ) -> Result<(), Errno> {
        let (view, _) = self.node(parent)?;
        let to = self.same_view(&view, new_parent)?;
        self.unname(parent, |t, from| {
            let ends = Ends {
                from,
                name,
                to,
                new_name,
            };
            fs::rename::rename(t, &ends, flags, ctx)
        })
    }

    fn link(
        &self,
        old: u64,
        parent: u64,
        name: &[u8],
        ctx: &Ctx,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let e = self.change(parent, false, |t, view, dir_ino| {
            let ino = self.same_view(view, old)?;
            let i = node::link(t, ino, dir_ino, name, ctx)?;
            lock(&self.orphans).remove(&ino);
            Ok(Self::give(view, ino, &i))
        })?;
        reply.entry(&e);
        Ok(())
    }

    fn readdir(
        &self,
        nodeid: u64,
        offset: u64,
        size: u32,
        plus: bool,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let most = size as usize / if plus { 160 } else { 32 } + 1;
        let mut touch = false;
        self.read(nodeid, |t, view, ino| {
            if view.fixed().is_some() && !self.is_fixed() {
                return fs::fail(libc::ESTALE);
            }
            let d = dir::load(t, ino)?;
            touch = self.atime != super::Atime::None && (d.atime <= d.mtime || d.atime <= d.ctime);
            reply.set_len(0);
            let from = if offset <= 2 { 0 } else { offset + 1 };
            let entries = dir::list(t, ino, from, most)?;
            let mut out = reply.dir(size);
            // The names that every directory has carry no attributes.
            let bare = |ino: u64| Entry {
                nodeid: 0,
                attr: Attr {
                    ino,
                    mode: libc::S_IFDIR,
                    ..Attr::default()
                },
                entry_valid: Duration::ZERO,
                attr_valid: Duration::ZERO,
            };
            let parent = if ino == ROOT_INO { ROOT_INO } else { d.parent };
            for (at, ino, name) in [(1, ino, &b"."[..]), (2, parent, &b".."[..])] {
                if offset < at {
                    let done = if plus {
                        out.add_plus(&bare(ino), at, 4, name)
                    } else {
                        out.add(ino, at, 4, name)
                    };
                    if !done {
                        return Ok(());
                    }
                }
            }
            let mut before = offset.max(2);
            for (k, e) in entries.iter().enumerate() {
                // Of names that share a place all but the last lead back to it: better twice than never.
                let shares = entries.get(k + 1).is_some_and(|n| n.place == e.place);
                let next = if shares { before } else { e.place };
                let done = if plus {
                    if !out.has_room_plus(&e.name) {
                        return Ok(());
                    }
                    let i = inode::find(t, e.target.ino)?.ok_or(FsError::Corrupt {
                        ino: e.target.ino,
                        what: "a name leads to it, but it is not there",
                    })?;
                    out.add_plus(
                        &Self::give(view, e.target.ino, &i),
                        next,
                        e.target.dtype,
                        &e.name,
                    )
                } else {
                    out.add(e.target.ino, next, e.target.dtype, &e.name)
                };
                if !done {
                    return Ok(());
                }
                before = next;
            }
            Ok(())
        })?;
        if touch && offset == 0 && !self.read_only {
            let now = fs::now();
            // An access time that cannot be kept is no reason to fail a listing.
            let _ = self.change(nodeid, true, |t, _, ino| {
                let mut d = inode::load(t, ino)?;
                d.atime = now;
                inode::save(t, ino, &d)
            });
        }
        Ok(())
    }

    fn statfs(&self, reply: &mut Reply) -> Result<(), Errno> {
        let s = self.store.space()?;
        let free = s.avail_bytes / 4096;
        reply.statfs(&Statfs {
            blocks: s.total_bytes / 4096,
            bfree: s.free_bytes / 4096,
            bavail: free,
            files: s.total_bytes / 4096,
            ffree: free,
        });
        Ok(())
    }
}

/// A file that is made to be written only bypasses the page cache: its bytes go to the daemon with one copy less.
fn open_flags(flags: u32) -> u32 {
    if flags & libc::O_ACCMODE.cast_unsigned() == libc::O_WRONLY.cast_unsigned() {
        open::DIRECT_IO | open::NOFLUSH
    } else {
        open::KEEP_CACHE | open::NOFLUSH
    }
}

/// Answers a request for an attribute's value or for their names.
fn sized(value: &[u8], size: u32, reply: &mut Reply) -> Result<(), Errno> {
    if size == 0 {
        reply.xattr_size(u32::try_from(value.len()).unwrap_or(u32::MAX));
        return Ok(());
    }
    if value.len() > size as usize {
        return Err(Errno(libc::ERANGE));
    }
    reply.bytes(value);
    Ok(())
}
