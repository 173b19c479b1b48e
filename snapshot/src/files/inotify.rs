//! inotify.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::capture::{Class, World};
use super::error::{Error, Refuse};
use super::fdinfo::{Info, field};
use super::path::{open_in, root_of, stat_in};
use super::restore::Context;
use super::scan::Description;
use super::{Kind, OpenFile};
use crate::sys::{descriptor, fdioctl, handle};

/// inotify_init(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inotify {
    /// What it watches.
    pub watches: Vec<Watch>,
}

/// A watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// Its number.
    pub wd: i32,
    /// IN_ bits.
    pub mask: u32,
    /// Path in the target's root.
    pub path: PathBuf,
    /// Inode.
    pub ino: u64,
}

/// Lines of fdinfo whose paths were found ahead of the stop.
#[derive(Debug)]
pub(super) struct Plan {
    known: Vec<(String, Watch)>,
}

pub(super) fn classify(
    world: &World,
    description: &Description,
    info: &Info,
) -> Result<Class, Refuse> {
    let known = info
        .values("inotify ")
        .map(|line| Ok((line.to_owned(), watch(world, description, line)?)))
        .collect::<Result<_, _>>()?;
    Ok(Class::Inotify(Plan { known }))
}

fn watch(world: &World, description: &Description, line: &str) -> Result<Watch, Refuse> {
    let hex = |key| field(line, key).and_then(|text| u64::from_str_radix(text, 16).ok());
    let parsed = (|| {
        let wd = i32::try_from(hex("wd")?).ok()?;
        let mask = u32::try_from(hex("mask")?).ok()?;
        let kind = i32::try_from(hex("fhandle-type")?).ok()?;
        let text = field(line, "f_handle")?;
        let bytes = text.as_bytes().chunks(2).map(|two| {
            std::str::from_utf8(two)
                .ok()
                .and_then(|two| u8::from_str_radix(two, 16).ok())
        });
        Some((
            wd,
            mask,
            hex("ino")?,
            hex("sdev")?,
            kind,
            bytes.collect::<Option<Vec<u8>>>()?,
        ))
    })();
    let Some((wd, mask, ino, sdev, kind, bytes)) = parsed else {
        return Err(Refuse::no(
            "it watches a file on a filesystem without file handles",
            "remove the watch",
        ));
    };
    let path = by_handle(world, description.pid, (sdev, ino), kind, &bytes).ok_or_else(|| {
        Refuse::no(
            format!("no path was found for its watch {wd} (inode {ino})"),
            "remove the watch",
        )
    })?;
    Ok(Watch {
        wd,
        mask,
        path,
        ino,
    })
}

/// The path of a file handle, through any mount of its filesystem in the process's view.
fn by_handle(
    world: &World,
    pid: i32,
    (sdev, ino): (u64, u64),
    kind: i32,
    bytes: &[u8],
) -> Option<PathBuf> {
    let root = root_of(world, pid).ok()?;
    // The kernel's own form of a device number: 12 bits, 20 bits.
    let device = format!("{}:{}", sdev >> 20, sdev & 0xf_ffff);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(2);
        if words.next()? != device {
            return None;
        }
        let point = words.nth(1)?;
        let mount = open_in(
            root.dir(),
            Path::new(point),
            OFlag::O_RDONLY | OFlag::O_NONBLOCK,
        )
        .ok()?;
        let found = handle::open(mount.as_fd(), kind, bytes).ok()?;
        let seen = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
        let path = root.inside(&seen)?;
        (stat_in(root.dir(), &path).ok()?.ino() == ino).then_some(path)
    })
}

pub(super) fn state(
    world: &World,
    plan: &Plan,
    description: &Description,
    info: &Info,
    dry: bool,
) -> Result<Kind, Refuse> {
    if !dry && fdioctl::readable(description.file.as_fd()).map_err(Refuse::failed("FIONREAD"))? > 0
    {
        return Err(Refuse::no(
            "events wait to be read, and cannot be looked at",
            "try again in a moment",
        ));
    }
    let mut watches = Vec::new();
    for line in info.values("inotify ") {
        match plan.known.iter().find(|(known, _)| known == line) {
            Some((_, found)) => watches.push(found.clone()),
            None => watches.push(watch(world, description, line)?),
        }
    }
    Ok(Kind::Inotify(Inotify { watches }))
}

pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    inotify: &Inotify,
    ctx: &Context,
) -> Result<OwnedFd, Error> {
    let fd = descriptor::inotify(libc::IN_CLOEXEC | (file.flags & libc::O_NONBLOCK));
    let fd = fd.map_err(Error::restore(at, "inotify_init"))?;
    for watch in &inotify.watches {
        let what = format!("watch {}; bring it back as it was", watch.path.display());
        let target =
            open_in(ctx.root, &watch.path, OFlag::O_PATH).map_err(Error::errno(at, &*what))?;
        if super::scan::stat_of(&target)
            .map_err(Error::restore(at, &*what))?
            .ino()
            != watch.ino
        {
            let what = format!(
                "{} was replaced; bring the old one back",
                watch.path.display()
            );
            return Err(Error::Changed { file: at, what });
        }
        let magic = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
        let magic =
            CString::new(magic.as_os_str().as_bytes()).map_err(|_| Error::damaged(at, "a path"))?;
        fdioctl::set_next_watch(fd.as_fd(), watch.wd)
            .map_err(Error::restore(at, "INOTIFY_IOC_SETNEXTWD"))?;
        let got = descriptor::inotify_watch(fd.as_fd(), &magic, watch.mask)
            .map_err(Error::restore(at, &*what))?;
        if got != watch.wd {
            return Err(Error::damaged(
                at,
                format!("watch {} is there twice", watch.wd),
            ));
        }
    }
    Ok(fd)
}
