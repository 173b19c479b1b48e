//! Things outside the tree, whose place a descriptor of the resuming command takes.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use serde::{Deserialize, Serialize};

use super::OpenFile;
use super::capture::{Class, World};
use super::error::{Error, Refuse};
use super::restore::Context;
use super::scan::{Description, identity};

/// Descriptor N of the resuming command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    /// Which number.
    pub number: i32,
    /// What it was, for people.
    pub was: String,
}

/// An object that is not inside the tree: given to a number if the user allows it, else refused.
pub(super) fn classify(
    world: &mut World,
    description: &Description,
    reason: &str,
) -> Result<Class, Refuse> {
    let object = identity(&description.stat);
    let fd = description.fd;
    let number = match world.externals.get(&object) {
        Some(&number) => number,
        None if world.options.may_be_external(fd) => fd,
        None => {
            let advice = format!(
                "close it, or name descriptor {fd} as one that the resuming command provides"
            );
            return Err(Refuse::no(reason, advice));
        }
    };
    world.externals.insert(object, number);
    let was = description.link.display().to_string();
    Ok(Class::Fixed(super::Kind::External(External {
        number,
        was,
    })))
}

/// The descriptor that takes its place: the caller's, or else /dev/null for reading and the log for writing.
pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    external: &External,
    ctx: &Context,
) -> Result<OwnedFd, Error> {
    let writes = file.flags & libc::O_ACCMODE != libc::O_RDONLY;
    if let Some(given) = ctx.external.get(&external.number) {
        // Its own description where that is possible, so that flags are not shared with the resuming command.
        let magic = format!("/proc/self/fd/{}", given.as_raw_fd());
        let flags = file.flags & (libc::O_NONBLOCK | libc::O_APPEND) | libc::O_NOCTTY;
        let mode = file.flags & libc::O_ACCMODE;
        let (read, write) = (mode != libc::O_WRONLY, mode != libc::O_RDONLY);
        if may_be_reopened(given.as_fd())
            && let Ok(own) = OpenOptions::new()
                .read(read)
                .write(write)
                .custom_flags(flags)
                .open(magic)
        {
            return Ok(own.into());
        }
        let own = given
            .as_fd()
            .try_clone_to_owned()
            .map_err(Error::restore(at, "duplicate an inherited descriptor"))?;
        let flags = file.flags & (libc::O_NONBLOCK | libc::O_APPEND);
        crate::sys::descriptor::fcntl(own.as_fd(), libc::F_SETFL, flags)
            .map_err(Error::restore(at, "set its flags"))?;
        return Ok(own);
    }
    let (path, what) = match ctx.log {
        Some(log) if writes => (log, "open the log for its output; is its directory there?"),
        _ => (std::path::Path::new("/dev/null"), "open /dev/null"),
    };
    let mut options = OpenOptions::new();
    options
        .read(file.flags & libc::O_ACCMODE != libc::O_WRONLY)
        .write(writes);
    if writes && ctx.log.is_some() {
        options.create(true).append(true);
    }
    options
        .custom_flags(file.flags & libc::O_NONBLOCK)
        .open(path)
        .map(Into::into)
        .map_err(Error::restore(at, what))
}

/// Files, pipes and terminals. Opening some devices anew (a tap) gives another one.
fn may_be_reopened(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    let Ok(stat) = nix::sys::stat::fstat(fd) else {
        return false;
    };
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG | libc::S_IFIFO => true,
        libc::S_IFCHR => nix::unistd::isatty(fd).unwrap_or(false),
        _ => false,
    }
}
