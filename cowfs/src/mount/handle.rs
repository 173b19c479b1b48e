//! The requests, one by one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::listing::Want;
use super::view::View;
use super::{MountFs, attr_of, drain, lock};
use crate::fs::attr::{Change, SetTime as FsTime};
use crate::fs::node::{New, Unlinked};
use crate::fs::rename::Ends;
use crate::fs::{self, Ctx, FsError, Inode, attr, data, dir, inode, node, xattr};
use crate::fuse::{
    Attr, Create, Entry, Errno, Filesystem, Negotiated, Op, Reply, Request, SETXATTR_KILL_SGID,
    SetTime, Setattr, Statfs, WRITE_CACHE, open, step_aside,
};
use crate::store::Txn;

/// Nothing changes behind the kernel's back but by a rollback, which says so.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// But attributes of directories: the kernel may take an answer that a change of the directory has overtaken, which
/// then heals after this time.
const DIR_VALID: Duration = Duration::from_secs(10);
/// Searches for holes that ask the kernel for pages at a time.
const SEEKS_MAX: usize = 16;

impl Filesystem for MountFs {
    fn handle(&self, req: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.store.note_request();
        match drain::answer(&self.drain, req, reply) {
            Some(answered) => answered,
            None => self.dispatch(req, reply),
        }
    }

    fn forget(&self, nodeid: u64, nlookup: u64) {
        self.forget_node(nodeid, nlookup);
    }

    fn arrived(&self, req: &Request<'_>) -> usize {
        self.drain.arrived(req)
    }

    fn finished(&self, mark: usize) {
        self.drain.finished(mark);
    }

    fn ready(&self, negotiated: &Negotiated) {
        let _ = self.negotiated.set(*negotiated);
    }
}

/// How long the kernel may keep the attributes of a file of this mode.
fn valid(mode: u32) -> Duration {
    if mode & libc::S_IFMT == libc::S_IFDIR {
        DIR_VALID
    } else {
        FOREVER
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
        let c = || self.ctx(req);
        match req.op {
            Op::Lookup { name } => self.lookup(n, name, reply),
            Op::Getattr => {
                let a = self.getattr(n)?;
                reply.attr(&a, valid(a.mode));
                Ok(())
            }
            Op::Statx => {
                let a = self.getattr(n)?;
                reply.statx(&a, valid(a.mode));
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
                self.unname(n, |t, _, dir| node::unlink(t, dir, name, &ctx).map(Some))
            }
            Op::Rmdir { name } => {
                let ctx = c();
                self.unname(n, |t, _, dir| node::rmdir(t, dir, name, &ctx).map(Some))
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
                open_flags,
            } => {
                let done = self.write_file(n, offset, data, write_flags, &c());
                if let Err(Errno(e)) = done
                    && write_flags & WRITE_CACHE != 0
                    && e != libc::ESTALE
                {
                    self.drain.fail(e);
                }
                let done = done?;
                // With the page cache the kernel asks for an fsync of its own; past it this is all it says.
                if open_flags & libc::O_DSYNC.cast_unsigned() != 0 {
                    step_aside();
                    self.store.sync()?;
                }
                reply.written(done);
                Ok(())
            }
            Op::Statfs => self.statfs(reply),
            Op::Fsync { .. } | Op::Fsyncdir { .. } | Op::Syncfs => {
                let (view, _) = self.node(n)?;
                if view.fixed().is_some() && !self.is_fixed() {
                    return Err(Errno(libc::ESTALE));
                }
                if self.store.sync_at_once()? {
                    return Ok(());
                }
                step_aside();
                Ok(self.store.sync()?)
            }
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
                let all = req.uid == 0;
                let names = self.read(n, |t, _, ino| xattr::list(t, ino, all))?;
                sized(&names, size, reply)
            }
            Op::Removexattr { name } => {
                let ctx = c();
                self.change(n, true, |t, _, ino| xattr::remove(t, ino, name, &ctx))
            }
            Op::Readdir { offset, size } => {
                let plus = false;
                self.readdir(n, Want { offset, size, plus }, reply)
            }
            Op::Readdirplus { offset, size } => {
                let plus = true;
                self.readdir(n, Want { offset, size, plus }, reply)
            }
            Op::Create(ref create) => self.create(n, create, &c(), reply),
            Op::Tmpfile(ref create) => self.tmpfile(n, create, &c(), reply),
            Op::Fallocate {
                offset,
                length,
                mode,
            } => self.fallocate(n, offset, length, mode, &c()),
            Op::Lseek { offset, whence } => {
                let at = self.seek(n, offset, whence.cast_signed())?;
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
    pub(super) fn give(view: &View, ino: u64, i: &Inode) -> Entry {
        view.remember(ino);
        Entry {
            nodeid: view.nodeid(ino),
            attr: attr_of(ino, i),
            entry_valid: FOREVER,
            attr_valid: valid(i.mode),
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
            let i = self.find(t, view, target.ino)?;
            Ok(Some(Self::give(view, target.ino, &i)))
        })?;
        match found {
            Some(e) => reply.entry(&e),
            None => reply.negative(FOREVER),
        }
        Ok(())
    }

    /// The inode that a name leads to, as it is shown.
    pub(super) fn find<K: fs::Kv>(
        &self,
        t: &mut K,
        view: &View,
        ino: u64,
    ) -> Result<Inode, FsError> {
        let mut i = inode::find(t, ino)?.ok_or(FsError::Corrupt {
            ino,
            what: "a name leads to it, but it is not there",
        })?;
        self.with_atime(view, ino, &mut i);
        Ok(i)
    }

    fn getattr(&self, nodeid: u64) -> Result<Attr, Errno> {
        self.read(nodeid, |t, view, ino| {
            let mut i = inode::load(t, ino)?;
            self.with_atime(view, ino, &mut i);
            Ok(attr_of(ino, &i))
        })
    }

    /// lseek(2) with SEEK_DATA or SEEK_HOLE. What looks like a hole may have been stored to through a memory map: before
    /// it is told, the kernel brings such pages. With a writeback cache there may also be more behind the end.
    fn seek(&self, nodeid: u64, offset: u64, whence: i32) -> Result<u64, Errno> {
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return Err(Errno(libc::EINVAL)),
        };
        // Where it is, and the size; the search may begin behind the end of what has come.
        let find = |from: u64, hole: bool| {
            self.read(nodeid, |t, _, ino| {
                let i = inode::load(t, ino)?;
                match data::seek(t, ino, i.size, from, hole) {
                    Ok(at) => Ok((at, i.size)),
                    // Nothing but a hole up to the end.
                    Err(FsError::Errno(libc::ENXIO)) => Ok((i.size.max(from), i.size)),
                    Err(e) => Err(e),
                }
            })
        };
        let (mut at, mut size) = find(offset, hole)?;
        let begin = if hole { at } else { offset };
        let end = if hole && at < size {
            find(at, false)?.0
        } else {
            at
        };
        let open_end = self.has_writeback() && end >= size;
        if (begin < end.min(size) || open_end)
            && let Some(n) = self.notifier.get()
        {
            // Each waits for a write that another thread has to take. When many wait already, everything is data: that is
            // always allowed, and only costs the caller time.
            let Some(_few) = Few::enter(&self.seeking) else {
                return match hole {
                    false => Ok(offset),
                    true if open_end => Err(Errno(libc::EAGAIN)),
                    true => Ok(size),
                };
            };
            step_aside();
            let len = if open_end { 0 } else { end - begin };
            let len = i64::try_from(len).unwrap_or(0);
            let from = i64::try_from(begin).map_err(|_| Errno(libc::EINVAL))?;
            if let Err(e) = n.inval_inode(nodeid, from, len) {
                tracing::debug!(error = %e, "mapped pages in a hole could not be asked for");
            }
            (at, size) = find(offset, hole)?;
        }
        if offset >= size {
            return Err(Errno(libc::ENXIO));
        }
        if !hole && at >= size {
            return Err(Errno(libc::ENXIO));
        }
        Ok(at)
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
            kernel_times: self.has_writeback(),
        };
        let (_, ino) = self.node(nodeid)?;
        let _stripe = s.size.map(|_| self.stripe(ino));
        if s.size.is_some() {
            self.drop_tail(ino);
        }
        let i = self.change(nodeid, true, |t, view, ino| {
            if s.is_empty() {
                return attr::drop_privileges(t, ino, ctx);
            }
            if s.atime.is_some() {
                lock(&self.atimes).remove(&ino);
            }
            let mut i = attr::set(t, ino, &change, ctx)?;
            self.with_atime(view, ino, &mut i);
            Ok(i)
        })?;
        reply.attr(&attr_of(ino, &i), valid(i.mode));
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
        reply.created(&e, 0, self.open_flags(c.flags));
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
        reply.created(&e, 0, self.open_flags(c.flags));
        Ok(())
    }

    /// Removes a name by `f`, and the inode behind it if that was the last one and nobody knows it.
    fn unname(
        &self,
        parent: u64,
        f: impl FnOnce(&mut Txn<'_>, &View, u64) -> Result<Option<Unlinked>, FsError>,
    ) -> Result<(), Errno> {
        let gone = self.change(parent, true, |t, view, dir_ino| {
            let gone = f(t, view, dir_ino)?;
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
            self.reap_soon(&view, u.ino);
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
        self.unname(parent, |t, view, from| {
            let to = self.same_view(view, new_parent)?;
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

    /// A file that is made to be written only bypasses the page cache: its bytes go to the daemon with one copy less. Not
    /// where the kernel keeps the times of files, as it forgets the time of such a write.
    fn open_flags(&self, flags: u32) -> u32 {
        let write_only = flags & libc::O_ACCMODE.cast_unsigned() == libc::O_WRONLY.cast_unsigned();
        if write_only && !self.has_writeback() {
            open::DIRECT_IO | open::NOFLUSH
        } else {
            open::KEEP_CACHE | open::NOFLUSH
        }
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

/// One of the few that may do something at a time.
struct Few<'a>(&'a AtomicUsize);

impl<'a> Few<'a> {
    fn enter(count: &'a AtomicUsize) -> Option<Self> {
        let me = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < SEEKS_MAX).then_some(me)
    }
}

impl Drop for Few<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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
