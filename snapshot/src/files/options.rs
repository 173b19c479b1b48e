//! Socket options: which are captured, and setting those that differ from a fresh socket's.

use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use super::Blob;
use super::error::Error;
use crate::sys::sockopt;

/// One option.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketOption {
    /// SOL_ number.
    pub level: i32,
    /// Its number.
    pub name: i32,
    /// Its value.
    pub value: Blob,
}

const TCP: i32 = libc::IPPROTO_TCP;
const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const SOCKET: i32 = libc::SOL_SOCKET;
const SO_BUF_LOCK: i32 = 72;

/// What is captured, in the order in which it is set: what matters to bind(2) first.
const TABLE: &[(i32, i32)] = &[
    (SOCKET, libc::SO_REUSEADDR),
    (SOCKET, libc::SO_REUSEPORT),
    (SOCKET, libc::SO_BINDTODEVICE),
    (SOCKET, libc::SO_MARK),
    (SOCKET, libc::SO_KEEPALIVE),
    (SOCKET, libc::SO_LINGER),
    (SOCKET, libc::SO_OOBINLINE),
    (SOCKET, libc::SO_BROADCAST),
    (SOCKET, libc::SO_PRIORITY),
    (SOCKET, libc::SO_RCVTIMEO),
    (SOCKET, libc::SO_SNDTIMEO),
    (SOCKET, libc::SO_RCVLOWAT),
    (SOCKET, libc::SO_PASSCRED),
    (SOCKET, libc::SO_TIMESTAMP),
    (SOCKET, libc::SO_TIMESTAMPNS),
    (SOCKET, libc::SO_NO_CHECK),
    (SOCKET, libc::SO_DONTROUTE),
    (SOCKET, libc::SO_BUSY_POLL),
    (IP, libc::IP_TOS),
    (IP, libc::IP_TTL),
    (IP, libc::IP_FREEBIND),
    (IP, libc::IP_TRANSPARENT),
    (IP, libc::IP_PKTINFO),
    (IP, libc::IP_RECVERR),
    (IP, libc::IP_RECVTOS),
    (IP, libc::IP_MTU_DISCOVER),
    (IP, libc::IP_MULTICAST_TTL),
    (IP, libc::IP_MULTICAST_LOOP),
    (IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IPV6, libc::IPV6_V6ONLY),
    (IPV6, libc::IPV6_TCLASS),
    (IPV6, libc::IPV6_UNICAST_HOPS),
    (IPV6, libc::IPV6_RECVPKTINFO),
    (IPV6, libc::IPV6_RECVERR),
    (IPV6, libc::IPV6_MTU_DISCOVER),
    (TCP, libc::TCP_NODELAY),
    (TCP, libc::TCP_CORK),
    (TCP, libc::TCP_KEEPIDLE),
    (TCP, libc::TCP_KEEPINTVL),
    (TCP, libc::TCP_KEEPCNT),
    (TCP, libc::TCP_SYNCNT),
    (TCP, libc::TCP_LINGER2),
    (TCP, libc::TCP_DEFER_ACCEPT),
    (TCP, libc::TCP_USER_TIMEOUT),
    (TCP, libc::TCP_FASTOPEN),
    (TCP, libc::TCP_NOTSENT_LOWAT),
    (TCP, libc::TCP_CONGESTION),
];

fn read(fd: BorrowedFd, level: i32, name: i32) -> Option<Vec<u8>> {
    let mut buffer = [0; 32];
    let n = sockopt::get(fd, level, name, &mut buffer).ok()?;
    Some(buffer[..n].to_vec())
}

/// The options of a socket that differ from those of a fresh one of its kind.
pub(super) fn capture(fd: BorrowedFd, family: i32, kind: i32) -> Vec<SocketOption> {
    let fresh = sockopt::socket(family, kind, 0).ok();
    let mut options = Vec::new();
    for &(level, name) in TABLE {
        if (family == libc::AF_UNIX && level != SOCKET)
            || (level == TCP && kind != libc::SOCK_STREAM)
            // An accepted connection shows what its peer's packet had, and nothing can be set there.
            || (kind == libc::SOCK_STREAM
                && matches!((level, name), (IP, libc::IP_MULTICAST_TTL | libc::IP_MULTICAST_LOOP)))
        {
            continue;
        }
        let usual = fresh
            .as_ref()
            .and_then(|fresh| read(fresh.as_fd(), level, name));
        if let Some(value) = read(fd, level, name)
            && Some(&value) != usual.as_ref()
        {
            options.push(SocketOption {
                level,
                name,
                value: Blob(value),
            });
        }
    }
    // Sizes of buffers that the program has set; others are the kernel's to tune.
    let locked = sockopt::get_int(fd, SOCKET, SO_BUF_LOCK).unwrap_or(0);
    for (bit, name) in [(1, libc::SO_SNDBUF), (2, libc::SO_RCVBUF)] {
        if locked & bit != 0
            && let Ok(doubled) = sockopt::get_int(fd, SOCKET, name)
        {
            options.push(SocketOption {
                level: SOCKET,
                name,
                value: Blob((doubled / 2).to_ne_bytes().to_vec()),
            });
        }
    }
    options
}

/// Sets options again. `before_bind` sets those that matter to bind(2) and the buffers', else the others.
pub(super) fn restore(at: usize, fd: BorrowedFd, options: &[SocketOption]) -> Result<(), Error> {
    for option in options {
        let (level, name, value) = (option.level, option.name, &option.value.0);
        let buffer = level == SOCKET && matches!(name, libc::SO_SNDBUF | libc::SO_RCVBUF);
        if !buffer && !TABLE.contains(&(level, name)) {
            return Err(Error::damaged(at, format!("socket option {level}:{name}")));
        }
        let name = match name {
            libc::SO_SNDBUF if buffer => libc::SO_SNDBUFFORCE,
            libc::SO_RCVBUF if buffer => libc::SO_RCVBUFFORCE,
            name => name,
        };
        if read(fd, level, name).as_ref() != Some(value) {
            sockopt::set(fd, level, name, value).map_err(Error::restore(
                at,
                format!("set socket option {level}:{name}"),
            ))?;
        }
    }
    Ok(())
}

/// Makes room in a socket's send buffer for a queue that is put back; the size goes back to the kernel's care.
pub(super) fn with_room<T>(
    at: usize,
    fd: BorrowedFd,
    (name, bytes): (i32, usize),
    run: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let fail = || Error::restore(at, "make room in a socket's buffer");
    let force = if name == libc::SO_SNDBUF {
        libc::SO_SNDBUFFORCE
    } else {
        libc::SO_RCVBUFFORCE
    };
    let before = sockopt::get_int(fd, SOCKET, name).map_err(fail())?;
    let lock = sockopt::get_int(fd, SOCKET, SO_BUF_LOCK).map_err(fail())?;
    let room =
        i32::try_from(bytes.saturating_mul(2).saturating_add(1 << 20)).unwrap_or(i32::MAX / 2);
    if before < room {
        sockopt::set_int(fd, SOCKET, force, room).map_err(fail())?;
    }
    let result = run()?;
    if before < room {
        sockopt::set_int(fd, SOCKET, force, before / 2).map_err(fail())?;
        sockopt::set_int(fd, SOCKET, SO_BUF_LOCK, lock).map_err(fail())?;
    }
    Ok(result)
}
