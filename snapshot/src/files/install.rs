//! Putting descriptors at their numbers, in each process.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::error::Error;
use super::{Kind, OpenFile, epoll, fdinfo, locks};
use crate::image::manifest::Fd;
use crate::sys::{descriptor, fdioctl};

/// Puts the descriptions at a process's numbers and closes everything else but `keep`, which comes back at numbers
/// above the highest of the table. Then takes the record locks of the process, which was `pid` in the snapshot.
///
/// All other descriptors of the calling process are closed, whoever owns them (forget the owners); it must be one that goes on to become
/// the target.
pub fn install(
    table: &[Fd],
    files: &[OpenFile],
    descriptions: Vec<OwnedFd>,
    keep: Vec<OwnedFd>,
    (pid, contended_locks): (i32, bool),
) -> Result<Vec<OwnedFd>, Error> {
    let mut before = -1;
    for fd in table {
        if fd.fd <= before || fd.file as usize >= descriptions.len().min(files.len()) {
            let what = format!("descriptor {} is there twice or is of no file", fd.fd);
            return Err(Error::damaged(fd.file as usize, what));
        }
        before = fd.fd;
    }
    let fail = |fd| move |source| Error::Install { fd, source };
    let above = before
        .checked_add(1)
        .ok_or_else(|| Error::damaged(0, "a descriptor's number is too large"))?;
    // What is still needed moves out of the way of all numbers to come.
    let keep: Vec<OwnedFd> = keep
        .into_iter()
        .map(|fd| {
            if fd.as_raw_fd() >= above {
                Ok(fd)
            } else {
                descriptor::duplicate_above(fd.as_fd(), above)
            }
        })
        .collect::<Result<_, _>>()
        .map_err(fail(above))?;
    let mut moved: Vec<Option<OwnedFd>> = Vec::new();
    moved.resize_with(descriptions.len(), || None);
    for fd in table {
        let file = fd.file as usize;
        if moved[file].is_none() {
            let copy = descriptor::duplicate_above(descriptions[file].as_fd(), above)
                .map_err(fail(fd.fd))?;
            moved[file] = Some(copy);
        }
    }
    for fd in table {
        if let Some(from) = &moved[fd.file as usize] {
            descriptor::place(from.as_fd(), fd.fd, fd.cloexec).map_err(fail(fd.fd))?;
        }
    }
    // Everything that is neither in the table nor kept.
    let mut stay: Vec<u32> = table.iter().map(|fd| fd.fd.cast_unsigned()).collect();
    stay.extend(keep.iter().map(|fd| fd.as_raw_fd().cast_unsigned()));
    stay.sort_unstable();
    // The numbers are closed below; their owners here must not do so again.
    descriptions.into_iter().for_each(std::mem::forget);
    moved.into_iter().flatten().for_each(std::mem::forget);
    let mut next = 0;
    for number in stay.into_iter().chain([u32::MAX]) {
        if number > next {
            descriptor::close_range(next, number - 1).map_err(fail(next.cast_signed()))?;
        }
        next = number.saturating_add(1);
    }
    // Closing any descriptor of a file drops the record locks on it, so they come last.
    let mut locked = std::collections::HashSet::new();
    for fd in table {
        let at = fd.file as usize;
        if !files[at].locks.is_empty() && locked.insert(at) {
            let own = descriptor::borrow(fd.fd).map_err(fail(fd.fd))?;
            locks::restore(at, &files[at].locks, Some(pid), own, contended_locks)?;
        }
    }
    Ok(keep)
}

/// What needs all processes of the tree to be there: who gets signals, descriptors of processes, and the terminal of a
/// session. Each process calls it after [`install`]; `pid` is what it was in the snapshot,
/// and `now` tells the number that a process of the snapshot has now.
pub fn complete(
    table: &[Fd],
    files: &[OpenFile],
    pid: i32,
    now: &dyn Fn(i32) -> i32,
) -> Result<(), Error> {
    let fail = |fd| move |source| Error::Install { fd, source };
    let mut seen: std::collections::HashMap<u32, i32> = std::collections::HashMap::new();
    for fd in table {
        let at = fd.file as usize;
        let Some(file) = files.get(at) else {
            return Err(Error::damaged(at, "no such file"));
        };
        if let Kind::Pidfd(process) = &file.kind {
            if let Some(first) = seen.get(&fd.file) {
                let first = descriptor::borrow(*first).map_err(fail(fd.fd))?;
                descriptor::place(first, fd.fd, fd.cloexec).map_err(fail(fd.fd))?;
            } else {
                let flags = (file.flags & libc::O_NONBLOCK).cast_unsigned();
                let what = format!("open a descriptor of process {}", process.pid);
                let made = descriptor::pidfd_open(now(process.pid), flags)
                    .map_err(Error::restore(at, what))?;
                descriptor::place(made.as_fd(), fd.fd, fd.cloexec).map_err(fail(fd.fd))?;
            }
        }
        if seen.insert(fd.file, fd.fd).is_some() {
            continue;
        }
        let own = || descriptor::borrow(fd.fd).map_err(fail(fd.fd));
        if let Some(owner) = file.owner {
            descriptor::set_owner(own()?, owner.kind, now(owner.pid))
                .and_then(|()| descriptor::fcntl(own_fd(fd.fd)?, F_SETSIG, owner.signal))
                .map_err(Error::restore(
                    at,
                    format!("set the receiver of its signals, {}", owner.pid),
                ))?;
        }
        if file.flags & libc::O_ASYNC != 0 {
            let flags = descriptor::fcntl(own()?, libc::F_GETFL, 0).map_err(fail(fd.fd))?;
            descriptor::fcntl(own()?, libc::F_SETFL, flags | libc::O_ASYNC)
                .map_err(Error::restore(at, "O_ASYNC"))?;
        }
        if let Kind::Slave(slave) = &file.kind {
            let master = files.iter().find_map(|file| match &file.kind {
                Kind::Master(master) if master.number == slave.number => Some(master),
                _ => None,
            });
            if let Some(master) = master.filter(|master| master.session == pid) {
                let what = "make it the terminal of its session";
                match fdioctl::take_terminal(own()?) {
                    Err(error) if error.raw_os_error() != Some(libc::EPERM) => {
                        Err(Error::restore(at, what)(error))?
                    }
                    // Another descriptor of it has done it already, or the caller has.
                    _ => {}
                }
                let _ = fdioctl::set_foreground(own()?, now(master.foreground));
            }
        }
    }
    for fd in table {
        let at = fd.file as usize;
        if let Kind::Epoll(set) = &files[at].kind
            && set.watches.iter().any(|watch| {
                matches!(
                    files.get(watch.file as usize),
                    Some(OpenFile {
                        kind: Kind::Pidfd(_),
                        ..
                    })
                )
            })
        {
            watch_processes(at, set, (fd.fd, files), &seen)?;
        }
    }
    Ok(())
}

/// Adds pidfds to an epoll set, unless another process that has the set has done so.
fn watch_processes(
    at: usize,
    set: &epoll::Epoll,
    (number, files): (i32, &[OpenFile]),
    seen: &std::collections::HashMap<u32, i32>,
) -> Result<(), Error> {
    let fail = |source| Error::Install { fd: number, source };
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).map_err(fail)?;
    let info = fdinfo::Info::parse(&info).unwrap_or_default();
    let mut made: Vec<Option<OwnedFd>> = Vec::new();
    made.resize_with(files.len(), || None);
    let mut left = epoll::Epoll {
        watches: Vec::new(),
    };
    for watch in &set.watches {
        let there = info
            .values("tfd:")
            .any(|line| line.split_ascii_whitespace().next() == Some(&*watch.fd.to_string()));
        let Some(fd) = seen.get(&watch.file).filter(|_| !there) else {
            continue;
        };
        if let Some(slot) = made.get_mut(watch.file as usize) {
            *slot = Some(descriptor::duplicate_number(*fd, 0).map_err(fail)?);
            left.watches.push(watch.clone());
        }
    }
    let own = descriptor::duplicate_number(number, 0).map_err(fail)?;
    epoll::fill(at, &left, &own, (files, &made, true))
}

fn own_fd(fd: i32) -> std::io::Result<std::os::fd::BorrowedFd<'static>> {
    descriptor::borrow(fd)
}

const F_SETSIG: i32 = 10;
