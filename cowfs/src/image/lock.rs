//! Who uses an image. A guest holds a POSIX write lock on its COW file and a read lock on its base, unless it was started
//! with the flag `s`. The locks here belong to an open file, so they are dropped by closing it and by nothing else.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde::Serialize;

use super::error::{ImageError, Result};

/// A lock that somebody holds on an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Use {
    /// Its process; none if it is not of this pid namespace, or the lock is of an open file.
    pub pid: Option<i32>,
    /// It may write.
    pub write: bool,
}

impl std::fmt::Display for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("a process that cannot be seen from here"),
        }
    }
}

fn whole(kind: i32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Who holds a lock on this file, if anybody does.
///
/// # Errors
/// When the file's filesystem has no locks.
pub fn in_use(path: &Path, file: &File) -> Result<Option<Use>> {
    let mut l = whole(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut l))
        .map_err(ImageError::errno(path, "asking for locks"))?;
    Ok((i32::from(l.l_type) != libc::F_UNLCK).then(|| Use {
        pid: (l.l_pid > 0).then_some(l.l_pid),
        write: i32::from(l.l_type) == libc::F_WRLCK,
    }))
}

fn take(path: &Path, file: &File, kind: i32) -> Result<()> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole(kind))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(ImageError::InUse {
            path: path.to_owned(),
            by: match in_use(path, file)? {
                Some(u) => u.to_string(),
                None => "a process that has gone meanwhile".into(),
            },
        }),
        Err(e) => Err(ImageError::errno(path, "locking it")(e)),
    }
}

/// Keeps guests from starting on a file that is opened for writing, for as long as it is open.
pub(super) fn alone(path: &Path, file: &File) -> Result<()> {
    take(path, file, libc::F_WRLCK)
}

/// Keeps others from writing a file, for as long as it is open.
pub(super) fn shared(path: &Path, file: &File) -> Result<()> {
    take(path, file, libc::F_RDLCK)
}
