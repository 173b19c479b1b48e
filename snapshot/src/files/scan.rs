//! The descriptors of a process: listed, duplicated, and checked again in the stop.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::capture::Class;
use super::error::Error;
use super::fdinfo::Info;
use crate::sys::{descriptor, kcmp};

/// An open file description of the target, and our duplicate of it.
#[derive(Debug)]
pub(super) struct Description {
    /// A process that has it, and under which number.
    pub pid: i32,
    /// The number.
    pub fd: i32,
    /// Our duplicate.
    pub file: OwnedFd,
    /// fdinfo of that number.
    pub info: File,
    /// Where `/proc/PID/fd/N` points to.
    pub link: PathBuf,
    /// fstat(2).
    pub stat: fs::Metadata,
    /// What it is; set once it has been looked at.
    pub class: Option<Class>,
}

impl Description {
    /// Name of the object for people.
    pub(super) fn object(&self) -> String {
        format!("descriptor {} ({})", self.fd, self.link.display())
    }

    /// Its duplicate, opened anew: another description of the same file.
    pub(super) fn magic(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// One descriptor of a process.
#[derive(Debug)]
pub(super) struct Slot {
    pub fd: i32,
    pub info: File,
    /// Number of its description in the capture.
    pub description: usize,
}

/// The table of descriptors of a process.
#[derive(Debug)]
pub(super) struct Table {
    pub pid: i32,
    pub pidfd: OwnedFd,
    /// `/proc/PID/fd`, open: its size is the number of descriptors.
    dir: File,
    pub slots: Vec<Slot>,
}

fn read_error(pid: i32, what: &str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Read {
        pid,
        what: what.to_owned(),
        source,
    }
}

impl Table {
    pub(super) fn open(pid: i32) -> Result<Self, Error> {
        let pidfd = descriptor::pidfd_open(pid, 0).map_err(read_error(pid, "pidfd_open"))?;
        let dir = File::open(format!("/proc/{pid}/fd")).map_err(read_error(pid, "/proc/PID/fd"))?;
        Ok(Self {
            pid,
            pidfd,
            dir,
            slots: Vec::new(),
        })
    }

    /// Numbers in use now.
    pub(super) fn list(&self) -> Result<Vec<i32>, Error> {
        let pid = self.pid;
        let entries =
            fs::read_dir(format!("/proc/{pid}/fd")).map_err(read_error(pid, "/proc/PID/fd"))?;
        let mut list = Vec::new();
        for entry in entries {
            let entry = entry.map_err(read_error(pid, "/proc/PID/fd"))?;
            if let Some(fd) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                list.push(fd);
            }
        }
        list.sort_unstable();
        Ok(list)
    }

    /// Whether as many descriptors are open as there are slots.
    pub(super) fn same_count(&self) -> Result<bool, Error> {
        let stat = self
            .dir
            .metadata()
            .map_err(read_error(self.pid, "/proc/PID/fd"))?;
        Ok(stat.len() == self.slots.len() as u64)
    }

    /// Opens what is needed of one number; none if it was closed meanwhile.
    pub(super) fn fetch(&self, fd: i32) -> Result<Option<(Description, File)>, Error> {
        let pid = self.pid;
        match self.fetch_now(fd) {
            Ok(found) => Ok(Some(found)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOENT)) => {
                Ok(None)
            }
            Err(source) => Err(Error::Read {
                pid,
                what: format!("descriptor {fd}"),
                source,
            }),
        }
    }

    fn fetch_now(&self, fd: i32) -> io::Result<(Description, File)> {
        let pid = self.pid;
        let file = crate::sys::remote::pidfd_getfd(self.pidfd.as_fd(), fd)?;
        let path = format!("/proc/{pid}/fdinfo/{fd}");
        let (info, slot) = (File::open(&path)?, File::open(&path)?);
        let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let stat = stat_of(&file)?;
        Ok((
            Description {
                pid,
                fd,
                file,
                info,
                link,
                stat,
                class: None,
            },
            slot,
        ))
    }
}

/// fstat(2) of a descriptor, of whatever it is.
pub(super) fn stat_of(file: &OwnedFd) -> io::Result<fs::Metadata> {
    File::from(file.try_clone()?).metadata()
}

/// How two of our duplicates are ordered.
pub(super) fn order(a: &OwnedFd, b: &OwnedFd) -> io::Result<Ordering> {
    let me = std::process::id().cast_signed();
    kcmp::files((me, a.as_raw_fd()), (me, b.as_raw_fd()))
}

/// Whether a slot still stands for a description.
pub(super) fn unchanged(table: &Table, slot: &Slot, description: &Description) -> io::Result<bool> {
    let me = std::process::id().cast_signed();
    match kcmp::files((table.pid, slot.fd), (me, description.file.as_raw_fd())) {
        Ok(order) => Ok(order == Ordering::Equal),
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a slot's fdinfo.
pub(super) fn info_of(pid: i32, file: &File, buffer: &mut Vec<u8>) -> Result<Info, Error> {
    Info::read(file, buffer).map_err(read_error(pid, "fdinfo"))
}

/// Links of descriptors, of those that satisfy a condition, that processes other than `inside` have open.
pub(super) fn held_outside(
    inside: &[i32],
    wanted: impl Fn(&str) -> bool,
) -> std::collections::HashSet<PathBuf> {
    let mut held = std::collections::HashSet::new();
    let me = std::process::id().cast_signed();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if pid == me || inside.contains(&pid) {
            continue;
        }
        for entry in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let link = fs::read_link(entry.path()).unwrap_or_default();
            if link.to_str().is_some_and(&wanted) {
                held.insert(link);
            }
        }
    }
    held
}

/// N of `prefix:[N]`.
pub(super) fn number_in(link: &Path, prefix: &str) -> Option<u64> {
    link.to_str()?
        .strip_prefix(prefix)?
        .strip_prefix(":[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Device and inode.
pub(super) fn identity(stat: &fs::Metadata) -> (u64, u64) {
    (stat.dev(), stat.ino())
}
