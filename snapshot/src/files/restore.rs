//! Making open files again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::error::Error;
use super::{
    Kind, OpenFile, epoll, event, external, inet, inotify, locks, netlink, path, pipe, regular,
    tcp, tty, unix,
};
use crate::sys::descriptor;

/// What becomes of established TCP connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Connections {
    /// They go on where they were; for a target that was killed at the snapshot.
    #[default]
    Repair,
    /// The program finds them reset; for copies beside a target that goes on.
    Reset,
}

/// What the resuming command provides.
pub struct Context<'a> {
    /// The target's root directory.
    pub root: BorrowedFd<'a>,
    /// Descriptors of the resuming command, by the number they stand for.
    pub external: BTreeMap<i32, OwnedFd>,
    /// Where output goes if a descriptor for it is not provided.
    pub log: Option<&'a Path>,
    /// Opens an object of `Manifest::shared`.
    pub shared: &'a OpenShared<'a>,
    /// What becomes of established TCP connections.
    pub connections: Connections,
    /// Called before the first connection is made again: lets go of what holds the old ones ([`super::Held::discard`]).
    pub before_connections: Option<&'a dyn Fn()>,
    /// Locks that another process holds are left to it, instead of failing.
    pub contended_locks: bool,
}

/// Gives a descriptor of an object of `Manifest::shared`, open for reading and writing.
pub type OpenShared<'a> = dyn Fn(u32) -> std::io::Result<OwnedFd> + 'a;

impl std::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("external", &self.external)
            .finish_non_exhaustive()
    }
}

/// Makes every open file description once, in the order of the manifest. It runs in an ordinary process with one
/// thread, the first of the tree to be; its children inherit what is made, and each calls [`super::install`] and, when
/// all processes are there, [`super::complete`].
pub fn restore(files: &[OpenFile], dir: &Path, ctx: &Context) -> Result<Vec<OwnedFd>, Error> {
    let mut made: Vec<Option<OwnedFd>> = Vec::new();
    made.resize_with(files.len(), || None);
    let mut contents = regular::Made::new();
    let mut pipes = pipe::Made::new();
    let mut pairs = unix::Made::new();
    for (at, file) in files.iter().enumerate() {
        let fd = match &file.kind {
            Kind::Path(reopened) => path::restore(at, file, reopened, ctx)?,
            Kind::Regular(regular) => regular::restore(at, file, regular, ctx)?,
            Kind::Unlinked(unlinked) => {
                regular::restore_unlinked(at, file, unlinked, (ctx, dir, &mut contents))?
            }
            Kind::Memfd(memfd) => regular::restore_memfd(at, file, memfd, (dir, &mut contents))?,
            Kind::SharedMemory { object } => {
                let what = format!("open shared object {object}");
                let object = (ctx.shared)(*object).map_err(Error::restore(at, what))?;
                regular::reopen(at, file, &object)?
            }
            Kind::Pipe(end) => pipe::restore(at, file, end, files, (ctx, &mut pipes))?,
            Kind::Eventfd(event) => event::restore_eventfd(at, file, event)?,
            Kind::Timerfd(timer) => event::restore_timerfd(at, file, timer)?,
            Kind::Signalfd(signal) => event::restore_signalfd(at, file, signal)?,
            Kind::Epoll(_) => epoll::restore(at)?,
            Kind::Inotify(inotify) => inotify::restore(at, file, inotify, ctx)?,
            // Its process may not be there yet: complete() puts the real one in place of this.
            Kind::Pidfd(_) => {
                descriptor::eventfd(libc::EFD_CLOEXEC).map_err(Error::restore(at, "eventfd"))?
            }
            Kind::Unix(unix) => unix::restore(at, file, unix, (files, &mut pairs))?,
            Kind::Inet(inet) => inet::restore(at, file, inet)?,
            // Last of all, as the peer hears of it.
            Kind::Tcp(_) => continue,
            Kind::Netlink(netlink) => netlink::restore(at, file, netlink)?,
            Kind::Master(master) => tty::restore_master(at, file, master)?,
            // After all masters.
            Kind::Slave(_) => continue,
            Kind::External(external) => external::restore(at, file, external, ctx)?,
        };
        made[at] = Some(fd);
    }
    for (at, file) in files.iter().enumerate() {
        if let Kind::Slave(slave) = &file.kind {
            let fd = tty::restore_slave(at, file, slave, (files, &made))?;
            made[at] = Some(fd);
        }
    }
    connect(files, &made)?;
    if let Some(call) = ctx.before_connections
        && files.iter().any(|file| matches!(file.kind, Kind::Tcp(_)))
    {
        call();
    }
    for (at, file) in files.iter().enumerate() {
        if let Kind::Tcp(tcp) = &file.kind {
            made[at] = Some(tcp::restore(at, file, tcp, ctx)?);
        }
    }
    for (at, file) in files.iter().enumerate() {
        let fd = got(&made, at)?;
        locks::restore(at, &file.locks, None, fd.as_fd(), ctx.contended_locks)?;
        if let Kind::Epoll(epoll) = &file.kind {
            epoll::fill(at, epoll, fd, (files, &made, false))?;
        }
    }
    (0..files.len())
        .map(|at| {
            made[at]
                .take()
                .ok_or_else(|| Error::damaged(at, "it was not made"))
        })
        .collect()
}

fn got(made: &[Option<OwnedFd>], at: usize) -> Result<&OwnedFd, Error> {
    made.get(at)
        .and_then(Option::as_ref)
        .ok_or_else(|| Error::damaged(at, "it was not made"))
}

/// What needs the other sockets and terminals to be there.
fn connect(files: &[OpenFile], made: &[Option<OwnedFd>]) -> Result<(), Error> {
    for (at, file) in files.iter().enumerate() {
        match &file.kind {
            Kind::Unix(socket) => unix::fill(at, socket, got(made, at)?, made)?,
            Kind::Master(master) => tty::lock(at, master, got(made, at)?)?,
            _ => {}
        }
    }
    for (at, file) in files.iter().enumerate() {
        if let Kind::Unix(socket) = &file.kind {
            unix::shut(at, socket, got(made, at)?)?;
        }
    }
    Ok(())
}
