//! Established TCP connections, by TCP_REPAIR.
//!
//! The capture puts the connection into repair mode for some microseconds and takes it out again without a packet. The
//! kernel goes on receiving meanwhile, so what is read is read again until two looks agree.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::capture::{Late, World};
use super::error::{Error, Refuse};
use super::inet::raw;
use super::options::{self, SocketOption};
use super::restore::{Connections, Context};
use super::scan::Description;
use super::{Blob, Kind, OpenFile};
use crate::sys::{descriptor, fdioctl, sockopt};

/// An established connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tcp {
    /// AF_INET or AF_INET6.
    pub family: i32,
    /// Our address.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    /// The kernel's number of its state.
    pub state: u8,
    /// The next sequence number to be received.
    pub receive_seq: u32,
    /// The next to be written.
    pub send_seq: u32,
    /// Received, and not read yet.
    pub incoming: Blob,
    /// Written, and not acknowledged yet.
    pub outgoing: Blob,
    /// How much of the end of `outgoing` was never sent.
    pub unsent: u32,
    /// The peer's largest segment.
    pub mss: u32,
    /// TCPI_OPT_ bits that were agreed.
    pub agreed: u8,
    /// Window scales: the peer's, ours.
    pub scales: (u8, u8),
    /// The clock of our timestamps.
    pub timestamp: u32,
    /// struct tcp_repair_window.
    pub window: [u32; 5],
    /// Options.
    pub options: Vec<SocketOption>,
}

pub(super) const LISTEN: u8 = 10;
pub(super) const CLOSE: u8 = 7;
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;
/// States in which the peer has closed its direction.
const PEER_CLOSED: [u8; 3] = [CLOSE_WAIT, LAST_ACK, CLOSING];
/// States in which we have closed ours.
const WE_CLOSED: [u8; 4] = [FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING];

const LEVEL: i32 = libc::IPPROTO_TCP;
const REPAIR: i32 = 19;
const REPAIR_QUEUE: i32 = 20;
const QUEUE_SEQ: i32 = 21;
const REPAIR_OPTIONS: i32 = 22;
const TIMESTAMP: i32 = 24;
const REPAIR_WINDOW: i32 = 29;
const REPAIR_OFF: i32 = 0;
const REPAIR_ON: i32 = 1;
const REPAIR_OFF_SILENTLY: i32 = -1;
const RECEIVE: i32 = 1;
const SEND: i32 = 2;
const OPT_TIMESTAMPS: u8 = 1;
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;
const SO_DETACH_FILTER: i32 = 27;

/// What TCP_INFO says.
#[derive(Debug, Clone, Copy)]
pub(super) struct TcpInfo {
    pub state: u8,
    agreed: u8,
    scales: (u8, u8),
    /// A listener's.
    pub backlog: u32,
}

/// Whether it is a TCP socket that is connected.
pub(super) fn is_connection(fd: BorrowedFd) -> bool {
    info(fd).is_ok_and(|info| ![CLOSE, LISTEN].contains(&info.state))
}

pub(super) fn info(fd: BorrowedFd) -> Result<TcpInfo, Refuse> {
    let mut bytes = [0; 104];
    let n =
        sockopt::get(fd, LEVEL, libc::TCP_INFO, &mut bytes).map_err(Refuse::failed("TCP_INFO"))?;
    if n < bytes.len() {
        return Err(Refuse::no(
            "TCP_INFO has an unknown form",
            "this kernel is not supported for it",
        ));
    }
    let backlog = u32::from_ne_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]);
    Ok(TcpInfo {
        state: bytes[0],
        agreed: bytes[5],
        scales: (bytes[6] & 0xf, bytes[6] >> 4),
        backlog,
    })
}

fn get_word(fd: BorrowedFd, name: i32) -> io::Result<u32> {
    sockopt::get_int(fd, LEVEL, name).map(i32::cast_unsigned)
}

fn choose(fd: BorrowedFd, queue: i32) -> io::Result<()> {
    sockopt::set_int(fd, LEVEL, REPAIR_QUEUE, queue)
}

/// Both queues at one moment.
struct Queues {
    receive_seq: u32,
    send_seq: u32,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    unsent: usize,
    timestamp: u32,
    window: [u32; 5],
}

/// Numbers that tell whether a connection has moved: what is received, written, waiting, unacknowledged.
fn marks(fd: BorrowedFd) -> io::Result<(u32, u32, usize, usize)> {
    choose(fd, RECEIVE)?;
    let received = get_word(fd, QUEUE_SEQ)?;
    choose(fd, SEND)?;
    Ok((
        received,
        get_word(fd, QUEUE_SEQ)?,
        fdioctl::readable(fd)?,
        fdioctl::unsent(fd)?,
    ))
}

fn content(fd: BorrowedFd, queue: i32, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    if len > 0 {
        choose(fd, queue)?;
        let n = sockopt::peek(fd, &mut data)?.len;
        data.truncate(n);
    }
    Ok(data)
}

fn queues(fd: BorrowedFd, state: u8) -> io::Result<Queues> {
    for _ in 0..16 {
        let before = marks(fd)?;
        let mut written = before.3;
        // Our FIN has a number of its own and is counted until it is acknowledged.
        if WE_CLOSED.contains(&state) && state != FIN_WAIT2 {
            written = written.saturating_sub(1);
        }
        let incoming = content(fd, RECEIVE, before.2)?;
        let outgoing = content(fd, SEND, written)?;
        // So it is here, and it is the last to be sent.
        let never =
            fdioctl::never_sent(fd)?.saturating_sub(usize::from(WE_CLOSED.contains(&state)));
        let unsent = never.min(outgoing.len());
        let mut bytes = [0; 20];
        sockopt::get(fd, LEVEL, REPAIR_WINDOW, &mut bytes)?;
        let mut window = [0; 5];
        for (word, bytes) in window.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let timestamp = get_word(fd, TIMESTAMP)?;
        if marks(fd)? == before && incoming.len() == before.2 && outgoing.len() == written {
            let (receive_seq, send_seq) = (before.0, before.1);
            return Ok(Queues {
                receive_seq,
                send_seq,
                incoming,
                outgoing,
                unsent,
                timestamp,
                window,
            });
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// Runs something in repair mode, and leaves it without a packet and without a trace.
fn repaired<T>(fd: BorrowedFd, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let reuse = sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    let nothing = sockopt::get_int(fd, LEVEL, REPAIR)?;
    if nothing != 0 {
        return Err(io::Error::other(
            "it is in repair mode already: another tool captures it",
        ));
    }
    sockopt::set_int(fd, LEVEL, REPAIR, REPAIR_ON)?;
    let result = run();
    crate::fault::point("tcp.repair");
    let _ = choose(fd, 0);
    sockopt::set_int(fd, LEVEL, REPAIR, REPAIR_OFF_SILENTLY)?;
    // Repair mode takes this option for itself.
    sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    result
}

pub(super) fn state(
    world: &World,
    description: &Description,
    info: &TcpInfo,
    (local, remote): (Option<SocketAddr>, Option<SocketAddr>),
    dry: bool,
    held: &mut Vec<OwnedFd>,
) -> Result<Late, Refuse> {
    let fd = description.file.as_fd();
    let state = info.state;
    if state != ESTABLISHED && !PEER_CLOSED.contains(&state) && !WE_CLOSED.contains(&state) {
        return Err(Refuse::no(
            format!("a connection that is being made (state {state})"),
            "try again in a moment",
        ));
    }
    let (Some(local), Some(remote)) = (local, remote) else {
        return Err(Refuse::no(
            "a connection without addresses",
            "try again in a moment",
        ));
    };
    let family = sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)
        .map_err(Refuse::failed("SO_DOMAIN"))?;
    if dry {
        return Ok(Late::Now(Kind::SharedMemory { object: 0 }));
    }
    let copy = || {
        description
            .file
            .try_clone()
            .map_err(Refuse::failed("duplicate"))
    };
    if world.options.hold_connections {
        held.push(copy()?);
        sockopt::deafen(fd).map_err(Refuse::failed("silence a connection"))?;
    }
    // In repair mode this is the peer's limit, otherwise what is used at the moment.
    let found = repaired(fd, || {
        Ok((queues(fd, state)?, get_word(fd, libc::TCP_MAXSEG)?))
    });
    let (found, mss) = found.map_err(Refuse::failed(
        "TCP_REPAIR; CAP_NET_ADMIN in its network is needed",
    ))?;
    let copy = copy()?;
    let (agreed, scales) = (info.agreed, info.scales);
    Ok(Late::Later(Box::new(move || {
        let options = options::capture(copy.as_fd(), family, libc::SOCK_STREAM);
        Ok(Kind::Tcp(Tcp {
            family,
            local,
            remote,
            state,
            receive_seq: found.receive_seq,
            send_seq: found.send_seq,
            incoming: Blob(found.incoming),
            outgoing: Blob(found.outgoing),
            unsent: u32::try_from(found.unsent).unwrap_or(0),
            mss,
            agreed,
            scales,
            timestamp: found.timestamp,
            window: found.window,
            options,
        }))
    })))
}

/// Connections that were captured with [`super::Options::hold_connections`]: they drop every packet, so that the peer
/// neither gets an answer nor loses the connection, and sends again.
///
/// They live as long as this value, even when the target has been killed. Exactly one of the methods must be called;
/// a value that is dropped releases them.
#[derive(Debug, Default)]
pub struct Held(Vec<OwnedFd>);

impl Held {
    pub(super) fn sockets(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.0
    }

    /// The connections go on, as if nothing had been.
    pub fn release(mut self) {
        self.let_go();
    }

    fn let_go(&mut self) {
        for socket in self.0.drain(..) {
            let _ = sockopt::set_int(socket.as_fd(), libc::SOL_SOCKET, SO_DETACH_FILTER, 0);
        }
    }

    /// They end here and the peers are not told. The target must have been killed. From now on a packet of a peer is
    /// answered by a reset, until the connection has been made again: resume at once.
    pub fn discard(mut self) {
        for socket in self.0.drain(..) {
            let _ = sockopt::set_int(socket.as_fd(), LEVEL, REPAIR, REPAIR_ON);
        }
    }

    /// The sockets, to be kept open by another process: [`Held::from_sockets`] there.
    pub fn into_sockets(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0)
    }

    /// The other side of [`Held::into_sockets`].
    pub fn from_sockets(sockets: Vec<OwnedFd>) -> Self {
        Self(sockets)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.let_go();
    }
}

pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    tcp: &Tcp,
    ctx: &Context,
) -> Result<OwnedFd, Error> {
    if !matches!(tcp.family, libc::AF_INET | libc::AF_INET6) {
        return Err(Error::damaged(
            at,
            format!("a connection of family {}", tcp.family),
        ));
    }
    let fd = match ctx.connections {
        Connections::Repair => repair(at, tcp)?,
        Connections::Reset => reset(at, tcp.family)?,
    };
    if file.flags & libc::O_NONBLOCK != 0 {
        descriptor::fcntl(fd.as_fd(), libc::F_SETFL, libc::O_NONBLOCK)
            .map_err(Error::restore(at, "O_NONBLOCK"))?;
    }
    Ok(fd)
}

fn repair(at: usize, tcp: &Tcp) -> Result<OwnedFd, Error> {
    let (local, remote) = (tcp.local, tcp.remote);
    let socket = sockopt::socket(tcp.family, libc::SOCK_STREAM, 0)
        .map_err(Error::restore(at, "make a socket"))?;
    let fd = socket.as_fd();
    let fail = |what: &str| {
        Error::restore(
            at,
            format!("repair the connection {local} to {remote}: {what}"),
        )
    };
    let set = |name, value: u32| sockopt::set_int(fd, LEVEL, name, value.cast_signed());
    let later = |option: &&SocketOption| {
        option.level != libc::SOL_SOCKET || option.name != libc::SO_REUSEADDR
    };
    set(REPAIR, 1).map_err(fail("enter repair mode (CAP_NET_ADMIN is needed)"))?;
    let what = "bind; bring the address back";
    sockopt::bind(fd, &raw(&local)).map_err(fail(what))?;
    let (incoming, outgoing) = (&tcp.incoming.0, &tcp.outgoing.0);
    let length = |data: &[u8]| {
        u32::try_from(data.len()).map_err(|_| Error::damaged(at, "a queue is too long"))
    };
    let peer_closed = PEER_CLOSED.contains(&tcp.state);
    let we_closed = WE_CLOSED.contains(&tcp.state);
    let start = tcp
        .receive_seq
        .wrapping_sub(length(incoming)?)
        .wrapping_sub(u32::from(peer_closed));
    let unacknowledged = tcp
        .send_seq
        .wrapping_sub(length(outgoing)?)
        .wrapping_sub(u32::from(we_closed));
    for (queue, seq) in [(SEND, unacknowledged), (RECEIVE, start)] {
        choose(fd, queue)
            .and_then(|()| set(QUEUE_SEQ, seq))
            .map_err(fail("sequence numbers"))?;
    }
    let what = "connect; the old connection may still be there: end its process, or resume with connections reset";
    sockopt::connect(fd, &raw(&remote)).map_err(fail(what))?;
    let mut agreed = vec![(2u32, tcp.mss)];
    if tcp.agreed & OPT_WSCALE != 0 {
        agreed.push((
            3,
            u32::from(tcp.scales.0 & 0xf) | u32::from(tcp.scales.1 & 0xf) << 16,
        ));
    }
    if tcp.agreed & OPT_SACK != 0 {
        agreed.push((4, 0));
    }
    if tcp.agreed & OPT_TIMESTAMPS != 0 {
        agreed.push((8, 0));
    }
    let bytes: Vec<u8> = agreed
        .iter()
        .flat_map(|(code, value)| [code.to_ne_bytes(), value.to_ne_bytes()].concat())
        .collect();
    sockopt::set(fd, LEVEL, REPAIR_OPTIONS, &bytes).map_err(fail("options"))?;
    // The size of segments was worked out at connect(2), without the peer's limit. Setting no IP options makes the
    // kernel do it again.
    let _ = sockopt::set(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, &[]);
    if tcp.family == libc::AF_INET6 {
        let _ = sockopt::set(fd, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &[]);
    }
    if tcp.agreed & OPT_TIMESTAMPS != 0 {
        set(TIMESTAMP, tcp.timestamp).map_err(fail("timestamps"))?;
    }
    options::with_room(at, fd, (libc::SO_RCVBUF, incoming.len()), || {
        choose(fd, RECEIVE)
            .and_then(|()| write(fd, incoming))
            .map_err(fail("received data"))
    })?;
    let unsent = (tcp.unsent as usize).min(outgoing.len());
    let (sent, unsent) = outgoing.split_at(outgoing.len() - unsent);
    options::with_room(at, fd, (libc::SO_SNDBUF, outgoing.len()), || {
        choose(fd, SEND)
            .and_then(|()| write(fd, sent))
            .map_err(fail("sent data"))?;
        choose(fd, 0).map_err(fail("leave the queues"))?;
        let mut window = tcp.window;
        if peer_closed {
            // Its FIN, which comes again below, has been counted in.
            window[4] = window[4].wrapping_sub(1);
        }
        let bytes: Vec<u8> = window.iter().flat_map(|word| word.to_ne_bytes()).collect();
        sockopt::set(fd, LEVEL, REPAIR_WINDOW, &bytes).map_err(fail("window"))?;
        if peer_closed {
            // While nothing of ours can have been acknowledged anew: what is too old is dropped. It acknowledges
            // nothing itself: what the peer has got, only the peer can say.
            let (next, window) = (
                tcp.receive_seq.wrapping_sub(1),
                tcp.window[1] >> (tcp.scales.0 & 0xf),
            );
            send_fin(&remote, &local, next, unacknowledged, window)
                .map_err(fail("the end of what the peer sends"))?;
        }
        // Leaving repair mode sends a probe, which makes the peer tell where it is.
        sockopt::set_int(fd, LEVEL, REPAIR, REPAIR_OFF).map_err(fail("leave repair mode"))?;
        write(fd, unsent).map_err(fail("data that was not sent"))
    })?;
    let chosen: Vec<SocketOption> = tcp.options.iter().filter(later).cloned().collect();
    options::restore(at, fd, &chosen)?;
    if let Some(reuse) = tcp.options.iter().find(|option| !later(option)) {
        options::restore(at, fd, std::slice::from_ref(reuse))?;
    }
    if we_closed {
        sockopt::shutdown(fd, libc::SHUT_WR).map_err(fail("the end of what we send"))?;
    }
    Ok(socket)
}

fn write(fd: BorrowedFd, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        // In repair mode a piece must fit into one buffer of the kernel's.
        let n = sockopt::send(fd, &data[..data.len().min(16 << 10)], &[])?;
        if n == 0 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        data = &data[n..];
    }
    Ok(())
}

/// A connection that the peer has reset.
fn reset(at: usize, family: i32) -> Result<OwnedFd, Error> {
    let fail = || Error::restore(at, "make a connection that is reset");
    let any: SocketAddr = if family == libc::AF_INET {
        ([127, 0, 0, 1], 0).into()
    } else {
        (std::net::Ipv6Addr::LOCALHOST, 0).into()
    };
    let listener = sockopt::socket(family, libc::SOCK_STREAM, 0).map_err(fail())?;
    sockopt::bind(listener.as_fd(), &raw(&any)).map_err(fail())?;
    sockopt::listen(listener.as_fd(), 1).map_err(fail())?;
    let address = sockopt::own_address(listener.as_fd()).map_err(fail())?;
    let socket = sockopt::socket(family, libc::SOCK_STREAM, 0).map_err(fail())?;
    sockopt::connect(socket.as_fd(), &address).map_err(fail())?;
    let peer = sockopt::accept(listener.as_fd()).map_err(fail())?;
    // To linger for no time is to reset.
    let linger = [1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat();
    sockopt::set(peer.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger).map_err(fail())?;
    Ok(socket)
}

/// Sends a FIN as if from the peer, through the loopback: the peer has sent it before and will not do so again.
fn send_fin(from: &SocketAddr, to: &SocketAddr, seq: u32, ack: u32, window: u32) -> io::Result<()> {
    let plain = |ip: IpAddr| match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        v4 => v4,
    };
    let (source, target) = (plain(from.ip()), plain(to.ip()));
    let mut tcp = Vec::with_capacity(20);
    tcp.extend_from_slice(&from.port().to_be_bytes());
    tcp.extend_from_slice(&to.port().to_be_bytes());
    tcp.extend_from_slice(&seq.to_be_bytes());
    tcp.extend_from_slice(&ack.to_be_bytes());
    tcp.extend_from_slice(&[0x50, 0x11]);
    tcp.extend_from_slice(&u16::try_from(window).unwrap_or(u16::MAX).to_be_bytes());
    tcp.extend_from_slice(&[0; 4]);
    let (packet, family) = match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let pseudo = [&source.octets()[..], &target.octets(), &[0, 6, 0, 20]].concat();
            let sum = checksum(&[&pseudo, &tcp]);
            tcp[16..18].copy_from_slice(&sum.to_be_bytes());
            let mut ip = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
            ip.extend_from_slice(&source.octets());
            ip.extend_from_slice(&target.octets());
            ([ip, tcp].concat(), libc::AF_INET)
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let pseudo = [
                &source.octets()[..],
                &target.octets(),
                &[0, 0, 0, 20, 0, 0, 0, 6],
            ]
            .concat();
            let sum = checksum(&[&pseudo, &tcp]);
            tcp[16..18].copy_from_slice(&sum.to_be_bytes());
            let mut ip = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
            ip.extend_from_slice(&source.octets());
            ip.extend_from_slice(&target.octets());
            ([ip, tcp].concat(), libc::AF_INET6)
        }
        _ => return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
    };
    let socket = sockopt::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let mut target = SocketAddr::new(target, 0);
    if let (SocketAddr::V6(target), SocketAddr::V6(to)) = (&mut target, to) {
        target.set_scope_id(to.scope_id());
    }
    sockopt::send(socket.as_fd(), &packet, &raw(&target)).map(drop)
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for two in part.chunks(2) {
            sum += u32::from(two[0]) << 8 | u32::from(two.get(1).copied().unwrap_or(0));
        }
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Undoes what a saver that was killed has left on a process's connections: silence ([`super::Options::hold_connections`]) and
/// repair mode. For the guardian and for `umlctl rescue`.
pub fn rescue_connections(pid: i32) -> io::Result<()> {
    let pidfd = descriptor::pidfd_open(pid, 0)?;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let socket = std::fs::read_link(entry.path())
            .is_ok_and(|link| link.to_string_lossy().starts_with("socket:["));
        let Some(fd) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
            .filter(|_| socket)
        else {
            continue;
        };
        let Ok(fd) = crate::sys::remote::pidfd_getfd(pidfd.as_fd(), fd) else {
            continue;
        };
        let fd = fd.as_fd();
        if !sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .is_ok_and(|protocol| protocol == LEVEL)
        {
            continue;
        }
        // SO_GET_FILTER: one instruction, "return 0", is ours.
        let mut program = [0; 8];
        let ours =
            sockopt::get_filter(fd, &mut program) == Ok(1) && program == [6, 0, 0, 0, 0, 0, 0, 0];
        if ours {
            sockopt::set_int(fd, libc::SOL_SOCKET, SO_DETACH_FILTER, 0)?;
        }
        if get_word(fd, REPAIR).is_ok_and(|on| on != 0) {
            sockopt::set_int(fd, LEVEL, REPAIR, REPAIR_OFF_SILENTLY)?;
        }
    }
    Ok(())
}
