//! Pipes and FIFOs, with what is in them.
//!
//! In the stop the content is only `tee`d into a pipe of ours, which shares its pages; it is read later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::capture::{Class, Group, Late, World};
use super::error::{Error, Refuse};
use super::fdinfo::Info;
use super::restore::Context;
use super::scan::{self, Description, identity};
use super::{Blob, Kind, OpenFile, external, path};
use crate::sys::{descriptor, fdioctl};

/// One end of a pipe, or an open FIFO; the flags say which end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Ends with the same number are of one pipe.
    pub pipe: u32,
    /// A FIFO's path in the target's root.
    pub path: Option<PathBuf>,
    /// F_GETPIPE_SZ.
    pub size: i32,
    /// What is in it; with one of the ends only. More than one piece if it is made of packets.
    pub content: Option<Vec<Blob>>,
}

#[derive(Debug)]
pub(super) struct Plan {
    path: Option<PathBuf>,
}

pub(super) fn classify(world: &mut World, description: &Description) -> Result<Class, Refuse> {
    let anonymous = scan::number_in(&description.link, "pipe");
    let outside = if let Some(number) = anonymous {
        if world.outside_pipes.is_none() {
            world.outside_pipes = Some(scan::held_outside(&world.pids, |link| {
                link.starts_with("pipe:[")
            }));
        }
        let link = PathBuf::from(format!("pipe:[{number}]"));
        world
            .outside_pipes
            .as_ref()
            .is_some_and(|held| held.contains(&link))
    } else {
        let link = description.link.to_string_lossy().into_owned();
        !scan::held_outside(&world.pids, |other| other == link).is_empty()
    };
    if outside {
        return external::classify(
            world,
            description,
            "a pipe that a process outside the tree has open too",
        );
    }
    let path = if anonymous.is_none() {
        Some(path::target_path(world, description)?)
    } else {
        None
    };
    Ok(Class::Pipe(Plan { path }))
}

fn reads(description: &Description) -> bool {
    let flags =
        descriptor::fcntl(description.file.as_fd(), libc::F_GETFL, 0).unwrap_or(libc::O_WRONLY);
    flags & libc::O_ACCMODE != libc::O_WRONLY
}

pub(super) fn state(
    group: &Group,
    plan: &Plan,
    description: &Description,
    info: &Info,
    dry: bool,
) -> Result<Late, Refuse> {
    let fd = description.file.as_fd();
    let size =
        descriptor::fcntl(fd, libc::F_GETPIPE_SZ, 0).map_err(Refuse::failed("F_GETPIPE_SZ"))?;
    let ends = group.with_inode(identity(&description.stat));
    let pipe = ends.first().map_or(0, |end| end.1);
    let path = plan.path.clone();
    let reader = ends.iter().find(|end| reads(&group.descriptions[end.0]));
    let ours =
        reader.is_some_and(|end| std::ptr::eq(&raw const group.descriptions[end.0], description));
    let end = move |content| {
        Kind::Pipe(End {
            pipe,
            path,
            size,
            content,
        })
    };
    if !ours || dry {
        return Ok(Late::Now(end(None)));
    }
    let len = fdioctl::readable(fd).map_err(Refuse::failed("FIONREAD"))?;
    if len == 0 {
        return Ok(Late::Now(end(Some(Vec::new()))));
    }
    let copy = tee(fd, len, size)?;
    // Packets keep their bounds if any end writes packets.
    let packets = info.flags & libc::O_DIRECT != 0
        || ends.iter().any(|end| {
            let file = group.descriptions[end.0].file.as_fd();
            descriptor::fcntl(file, libc::F_GETFL, 0).is_ok_and(|flags| flags & libc::O_DIRECT != 0)
        });
    let pid = description.pid;
    Ok(Late::Later(Box::new(move || {
        let content = drain(&copy, packets).map_err(|source| Error::Read {
            pid,
            what: "the content of a pipe".into(),
            source,
        })?;
        Ok(end(Some(content)))
    })))
}

fn tee(from: BorrowedFd, len: usize, size: i32) -> Result<OwnedFd, Refuse> {
    let (read, write) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(Refuse::errno("pipe"))?;
    descriptor::fcntl(write.as_fd(), libc::F_SETPIPE_SZ, size)
        .map_err(Refuse::failed("F_SETPIPE_SZ"))?;
    let copied = descriptor::tee(from, write.as_fd(), len).map_err(Refuse::failed("tee"))?;
    if copied != len {
        return Err(Refuse::no(
            "its content could not be copied whole",
            "try again",
        ));
    }
    Ok(read)
}

fn drain(pipe: &OwnedFd, packets: bool) -> std::io::Result<Vec<Blob>> {
    let mut content = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match nix::unistd::read(pipe, &mut buffer) {
            Ok(0) | Err(nix::Error::EAGAIN) => return Ok(content),
            n => n?,
        };
        match content.last_mut() {
            Some(Blob(last)) if !packets => last.extend_from_slice(&buffer[..n]),
            _ => content.push(Blob(buffer[..n].to_vec())),
        }
    }
}

/// Pipes that were made again, by number: both ends, or a FIFO open for both.
pub(super) type Made = HashMap<u32, (OwnedFd, OwnedFd)>;

/// Makes a pipe, filled, when its first end is met.
pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    end: &End,
    files: &[OpenFile],
    (ctx, made): (&Context, &mut Made),
) -> Result<OwnedFd, Error> {
    if let Entry::Vacant(vacant) = made.entry(end.pipe) {
        let (read, write) = match &end.path {
            None => nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .map_err(Error::errno(at, "pipe"))?,
            Some(path) => fifo(at, path, ctx)?,
        };
        descriptor::fcntl(write.as_fd(), libc::F_SETPIPE_SZ, end.size).map_err(Error::restore(
            at,
            format!("set a pipe's size to {}", end.size),
        ))?;
        let all = files.iter().filter_map(|file| match &file.kind {
            Kind::Pipe(other) if other.pipe == end.pipe => other.content.as_ref(),
            _ => None,
        });
        for content in all {
            fill(at, &write, content)?;
        }
        vacant.insert((read, write));
    }
    let (read, write) = &made[&end.pipe];
    let side = if file.flags & libc::O_ACCMODE == libc::O_RDONLY {
        read
    } else {
        write
    };
    let magic = format!("/proc/self/fd/{}", side.as_raw_fd());
    let keep = libc::O_ACCMODE | libc::O_NONBLOCK;
    let flags = OFlag::from_bits_retain(file.flags & keep) | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(&*magic, flags, nix::sys::stat::Mode::empty());
    let fd = fd.map_err(Error::errno(at, "open the end of a pipe"))?;
    if file.flags & libc::O_DIRECT != 0 {
        descriptor::fcntl(
            fd.as_fd(),
            libc::F_SETFL,
            file.flags & (libc::O_NONBLOCK | libc::O_DIRECT),
        )
        .map_err(Error::restore(at, "set a pipe to packets"))?;
    }
    Ok(fd)
}

fn fifo(at: usize, path: &Path, ctx: &Context) -> Result<(OwnedFd, OwnedFd), Error> {
    let what = format!("open the FIFO {}; bring it back", path.display());
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK;
    let fd = path::open_in(ctx.root, path, flags).map_err(Error::errno(at, &*what))?;
    let stat = scan::stat_of(&fd).map_err(Error::restore(at, &*what))?;
    if !stat.file_type().is_fifo() || stat.nlink() == 0 {
        return Err(Error::Changed {
            file: at,
            what: format!("{} is no FIFO now; bring it back", path.display()),
        });
    }
    let twin = fd.try_clone().map_err(Error::restore(at, "duplicate"))?;
    Ok((fd, twin))
}

fn fill(at: usize, write: &OwnedFd, content: &[Blob]) -> Result<(), Error> {
    let packets = if content.len() > 1 { libc::O_DIRECT } else { 0 };
    descriptor::fcntl(write.as_fd(), libc::F_SETFL, libc::O_NONBLOCK | packets)
        .map_err(Error::restore(at, "set a pipe to packets"))?;
    for Blob(piece) in content {
        let n = if piece.is_empty() {
            0
        } else {
            nix::unistd::write(write, piece).unwrap_or(0)
        };
        if n != piece.len() {
            return Err(Error::damaged(
                at,
                "more is said to be in a pipe than it can hold",
            ));
        }
    }
    Ok(())
}
