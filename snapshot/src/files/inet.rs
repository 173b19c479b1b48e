//! Internet sockets that are not established connections: TCP listeners, UDP, and those that are not connected.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::capture::{Class, Late, World};
use super::error::{Error, Refuse};
use super::options::{self, SocketOption};
use super::scan::Description;
use super::{Blob, Kind, OpenFile, tcp, unix};
use crate::sys::sockopt;

/// An internet socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inet {
    /// AF_INET or AF_INET6.
    pub family: i32,
    /// SOCK_STREAM or SOCK_DGRAM.
    pub kind: i32,
    /// Its own address, if it is bound.
    pub local: Option<SocketAddr>,
    /// Where a UDP socket is connected to.
    pub remote: Option<SocketAddr>,
    /// A listener's backlog.
    pub backlog: Option<u32>,
    /// Datagrams that wait, with their senders.
    pub queue: Vec<(SocketAddr, Blob)>,
    /// Options.
    pub options: Vec<SocketOption>,
}

/// An address from the kernel's form.
pub(super) fn parse(raw: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(raw.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(raw.get(2..4)?.try_into().ok()?);
    match family {
        libc::AF_INET => {
            let ip: [u8; 4] = raw.get(4..8)?.try_into().ok()?;
            Some((ip, port).into())
        }
        libc::AF_INET6 => {
            let ip: [u8; 16] = raw.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(raw.get(24..28)?.try_into().ok()?);
            Some(std::net::SocketAddrV6::new(ip.into(), port, 0, scope).into())
        }
        _ => None,
    }
}

/// An address in the kernel's form.
pub(super) fn raw(address: &SocketAddr) -> Vec<u8> {
    let mut raw = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(v4) => {
            raw.extend_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            raw.extend_from_slice(&v4.port().to_be_bytes());
            raw.extend_from_slice(&v4.ip().octets());
            raw.extend_from_slice(&[0; 8]);
        }
        SocketAddr::V6(v6) => {
            raw.extend_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            raw.extend_from_slice(&v6.port().to_be_bytes());
            raw.extend_from_slice(&[0; 4]);
            raw.extend_from_slice(&v6.ip().octets());
            raw.extend_from_slice(&v6.scope_id().to_ne_bytes());
        }
    }
    raw
}

pub(super) fn classify(description: &Description) -> Result<Class, Refuse> {
    let protocol = sockopt::get_int(
        description.file.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_PROTOCOL,
    );
    match protocol.map_err(Refuse::failed("SO_PROTOCOL"))? {
        libc::IPPROTO_TCP | libc::IPPROTO_UDP => Ok(Class::Inet),
        other => Err(Refuse::no(
            format!("internet protocol {other} is not captured"),
            "close it before the snapshot",
        )),
    }
}

pub(super) fn state(
    world: &World,
    description: &Description,
    dry: bool,
    held: &mut Vec<OwnedFd>,
) -> Result<Late, Refuse> {
    let fd = description.file.as_fd();
    let get =
        |name| sockopt::get_int(fd, libc::SOL_SOCKET, name).map_err(Refuse::failed("getsockopt"));
    let (family, kind) = (get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?);
    let local = sockopt::own_address(fd)
        .ok()
        .and_then(|raw| parse(&raw))
        .filter(|address| address.port() != 0);
    let remote = sockopt::peer_address(fd).ok().and_then(|raw| parse(&raw));
    let mut backlog = None;
    if kind == libc::SOCK_STREAM {
        let info = tcp::info(fd)?;
        match info.state {
            tcp::LISTEN => backlog = Some(info.backlog),
            tcp::CLOSE => {}
            _ => return tcp::state(world, description, &info, (local, remote), dry, held),
        }
    }
    let mut queue = Vec::new();
    if kind == libc::SOCK_DGRAM && !dry {
        unix::peek_all(fd, false, |data, from| {
            queue.extend(parse(from).map(|from| (from, Blob(data.to_vec()))));
            Ok(())
        })?;
    }
    let remote = if kind == libc::SOCK_DGRAM {
        remote
    } else {
        None
    };
    let copy = description
        .file
        .try_clone()
        .map_err(Refuse::failed("duplicate"))?;
    Ok(Late::Later(Box::new(move || {
        let options = options::capture(copy.as_fd(), family, kind);
        Ok(Kind::Inet(Inet {
            family,
            kind,
            local,
            remote,
            backlog,
            queue,
            options,
        }))
    })))
}

pub(super) fn restore(at: usize, file: &OpenFile, inet: &Inet) -> Result<OwnedFd, Error> {
    if !matches!(inet.family, libc::AF_INET | libc::AF_INET6)
        || !matches!(inet.kind, libc::SOCK_STREAM | libc::SOCK_DGRAM)
    {
        return Err(Error::damaged(
            at,
            format!("a socket of family {}, type {}", inet.family, inet.kind),
        ));
    }
    let kind = inet.kind | (file.flags & libc::O_NONBLOCK);
    let fd = sockopt::socket(inet.family, kind, 0).map_err(Error::restore(at, "make a socket"))?;
    options::restore(at, fd.as_fd(), &inet.options)?;
    if let Some(local) = &inet.local {
        let reuse = sockopt::get_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap_or(0);
        let set = |value| sockopt::set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, value);
        let fail = || Error::restore(at, "SO_REUSEADDR");
        // Connections that just ended must not keep a listener from its port.
        let lend = inet.kind == libc::SOCK_STREAM && reuse == 0;
        if lend {
            set(1).map_err(fail())?;
        }
        let what = format!("bind to {local}; end what uses it now, or bring the address back");
        sockopt::bind(fd.as_fd(), &raw(local)).map_err(Error::restore(at, what))?;
        if let Some(backlog) = inet.backlog {
            let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
            let what = format!("listen at {local}; end what listens there now");
            sockopt::listen(fd.as_fd(), backlog).map_err(Error::restore(at, what))?;
        }
        if lend {
            set(0).map_err(fail())?;
        }
        for (from, Blob(data)) in &inet.queue {
            if let Err(error) = replay(local, from, data) {
                tracing::warn!(file = at, %from, %error, "a datagram that waited is lost");
            }
        }
    }
    if let Some(remote) = &inet.remote {
        let what = format!("connect to {remote}; bring the network back as it was");
        sockopt::connect(fd.as_fd(), &raw(remote)).map_err(Error::restore(at, what))?;
    }
    Ok(fd)
}

/// Sends a datagram as if from its sender. It may fail, as datagrams may.
fn replay(local: &SocketAddr, from: &SocketAddr, data: &[u8]) -> std::io::Result<()> {
    let family = if from.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let socket = sockopt::socket(family, libc::SOCK_DGRAM, 0)?;
    let fd = socket.as_fd();
    sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let (level, name) = match from {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    sockopt::set_int(fd, level, name, 1)?;
    sockopt::bind(fd, &raw(from))?;
    let mut to = *local;
    if to.ip().is_unspecified() {
        to.set_ip(if from.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    sockopt::send(fd, data, &raw(&to)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_both_ways() {
        for text in ["127.0.0.1:80", "[::1]:443", "[fe80::1%3]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(parse(&raw(&address)), Some(address));
        }
        assert_eq!(parse(&[2, 0, 0]), None);
    }
}
