//! Record locks (of a process), OFD locks and flock (of a description).

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::error::{Error, Refuse};
use super::fdinfo::Info;
use crate::sys::descriptor;

/// A lock on a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Which kind.
    pub kind: LockKind,
    /// Exclusive (for writing), or shared.
    pub exclusive: bool,
    /// First byte.
    pub start: i64,
    /// Bytes; 0 is to the end.
    pub len: i64,
}

/// Kinds of locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum LockKind {
    /// POSIX record lock of this process.
    Posix(i32),
    /// F_OFD_SETLK.
    Ofd,
    /// flock(2).
    Flock,
    /// A lease or something else that is not captured.
    Other,
}

/// Adds the locks that one process's fdinfo shows.
pub(super) fn capture(info: &Info, pid: i32, into: &mut Vec<Lock>) {
    for line in info.values("lock:") {
        let lock = parse(line, pid).unwrap_or(Lock {
            kind: LockKind::Other,
            exclusive: false,
            start: 0,
            len: 0,
        });
        if !into.contains(&lock) {
            into.push(lock);
        }
    }
}

/// `1: POSIX  ADVISORY  WRITE 12345 00:2a:1234 0 EOF`.
fn parse(line: &str, pid: i32) -> Option<Lock> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let kind = match words.next()? {
        "POSIX" => LockKind::Posix(pid),
        "OFDLCK" => LockKind::Ofd,
        "FLOCK" => LockKind::Flock,
        _ => LockKind::Other,
    };
    words.next()?;
    let exclusive = words.next()? == "WRITE";
    let (_, _) = (words.next()?, words.next()?);
    let start: i64 = words.next()?.parse().ok()?;
    let len = match words.next()? {
        "EOF" => 0,
        end => end
            .parse::<i64>()
            .ok()?
            .checked_sub(start)?
            .checked_add(1)
            .filter(|len| *len > 0)?,
    };
    Some(Lock {
        kind,
        exclusive,
        start,
        len,
    })
}

pub(super) fn check(locks: &[Lock]) -> Result<(), Refuse> {
    if locks.iter().any(|lock| lock.kind == LockKind::Other) {
        return Err(Refuse::no(
            "it has a lease",
            "leases are not captured; release it",
        ));
    }
    Ok(())
}

/// Takes the locks of a description, or (with `pid`) those of that process, again.
pub(super) fn restore(
    at: usize,
    locks: &[Lock],
    pid: Option<i32>,
    fd: BorrowedFd,
    contended: bool,
) -> Result<(), Error> {
    for lock in locks {
        let kind = if lock.exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        };
        let taken = match (lock.kind, pid) {
            (LockKind::Posix(owner), Some(pid)) if owner == pid => {
                descriptor::record_lock(fd, false, kind, lock.start, lock.len)
            }
            (LockKind::Ofd, None) => descriptor::record_lock(fd, true, kind, lock.start, lock.len),
            (LockKind::Flock, None) => descriptor::flock(
                fd,
                if lock.exclusive {
                    libc::LOCK_EX
                } else {
                    libc::LOCK_SH
                },
            ),
            (LockKind::Other, _) => return Err(Error::damaged(at, "a lock of an unknown kind")),
            _ => Ok(()),
        };
        match taken {
            Err(error)
                if contended
                    && matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) =>
            {
                tracing::warn!(file = at, "another process has its lock; going on without");
            }
            taken => taken.map_err(Error::restore(
                at,
                "its lock is held by another process; end that one first",
            ))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_locks() {
        let lock = parse("1: POSIX  ADVISORY  WRITE 12345 00:2a:1234 10 19", 7).unwrap();
        assert_eq!(
            lock,
            Lock {
                kind: LockKind::Posix(7),
                exclusive: true,
                start: 10,
                len: 10
            }
        );
        let lock = parse("1: FLOCK  ADVISORY  READ  12345 00:2a:1234 0 EOF", 7).unwrap();
        assert_eq!(
            lock,
            Lock {
                kind: LockKind::Flock,
                exclusive: false,
                start: 0,
                len: 0
            }
        );
        assert_eq!(
            parse("1: LEASE  ACTIVE    READ  1 00:2a:1234 0 EOF", 7)
                .unwrap()
                .kind,
            LockKind::Other
        );
        assert_eq!(
            parse("1: POSIX  ADVISORY  WRITE 1 0:0:1 9223372036854775807 0", 7),
            None
        );
    }
}
