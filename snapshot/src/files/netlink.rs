//! Netlink sockets without a conversation under way.

use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::capture::Class;
use super::error::{Error, Refuse};
use super::options::{self, SocketOption};
use super::scan::Description;
use super::{Kind, OpenFile};
use crate::sys::sockopt;

/// A netlink socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Netlink {
    /// SOCK_RAW or SOCK_DGRAM.
    pub kind: i32,
    /// NETLINK_ROUTE or NETLINK_KOBJECT_UEVENT.
    pub protocol: i32,
    /// Its address; 0 if it was not bound.
    pub port: u32,
    /// Groups it hears, a bit each.
    pub groups: u32,
    /// Options.
    pub options: Vec<SocketOption>,
}

pub(super) fn classify(description: &Description) -> Result<Class, Refuse> {
    let protocol = sockopt::get_int(
        description.file.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_PROTOCOL,
    );
    match protocol.map_err(Refuse::failed("SO_PROTOCOL"))? {
        libc::NETLINK_ROUTE | libc::NETLINK_KOBJECT_UEVENT => Ok(Class::Netlink),
        other => Err(Refuse::no(
            format!("netlink protocol {other} is not captured"),
            "close it before the snapshot",
        )),
    }
}

fn word(address: &[u8], at: usize) -> u32 {
    address
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

pub(super) fn state(description: &Description, dry: bool) -> Result<Kind, Refuse> {
    let fd = description.file.as_fd();
    if !dry && sockopt::peek(fd, &mut [0; 16]).is_ok() {
        return Err(Refuse::no(
            "answers of the kernel wait to be read",
            "try again in a moment",
        ));
    }
    let get =
        |name| sockopt::get_int(fd, libc::SOL_SOCKET, name).map_err(Refuse::failed("getsockopt"));
    let address = sockopt::own_address(fd).map_err(Refuse::failed("getsockname"))?;
    let kind = get(libc::SO_TYPE)?;
    Ok(Kind::Netlink(Netlink {
        kind,
        protocol: get(libc::SO_PROTOCOL)?,
        port: word(&address, 4),
        groups: word(&address, 8),
        options: options::capture(fd, libc::AF_NETLINK, kind),
    }))
}

pub(super) fn restore(at: usize, file: &OpenFile, netlink: &Netlink) -> Result<OwnedFd, Error> {
    if !matches!(
        netlink.protocol,
        libc::NETLINK_ROUTE | libc::NETLINK_KOBJECT_UEVENT
    ) {
        return Err(Error::damaged(
            at,
            format!("netlink protocol {}", netlink.protocol),
        ));
    }
    let kind = netlink.kind & 0xf | (file.flags & libc::O_NONBLOCK);
    let fd = sockopt::socket(libc::AF_NETLINK, kind, netlink.protocol)
        .map_err(Error::restore(at, "netlink socket"))?;
    options::restore(at, fd.as_fd(), &netlink.options)?;
    if netlink.port == 0 && netlink.groups == 0 {
        return Ok(fd);
    }
    let bind = |port: u32| {
        let mut address = [0; 12];
        address[..2].copy_from_slice(&(libc::AF_NETLINK as u16).to_ne_bytes());
        address[4..8].copy_from_slice(&port.to_ne_bytes());
        address[8..].copy_from_slice(&netlink.groups.to_ne_bytes());
        sockopt::bind(fd.as_fd(), &address)
    };
    // Its number is most often the process's; another one does as well.
    bind(netlink.port)
        .or_else(|_| bind(0))
        .map_err(Error::restore(at, "bind a netlink socket"))?;
    Ok(fd)
}
