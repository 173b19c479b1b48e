//! Unix sockets: pairs inside the tree, listeners, datagram sockets, with what is in their queues.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::capture::{Class, Group, Late, World};
use super::error::{Error, Refuse};
use super::options::{self, SocketOption};
use super::scan::{self, Description};
use super::{Blob, Kind, OpenFile, external, netns, path};
use crate::sys::sockopt;

/// A unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unix {
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    /// Its address (`sun_path`): a path, or a name after a zero byte.
    pub name: Option<Blob>,
    /// Permissions, user and group of the socket file.
    pub file: Option<(u32, u32, u32)>,
    /// What it is connected to.
    pub role: Role,
    /// What waits to be received: one piece, or one for each message.
    pub queue: Vec<Blob>,
    /// Bit 0: receives no more; bit 1: sends no more.
    pub shutdown: u8,
    /// Options.
    pub options: Vec<SocketOption>,
}

/// What a unix socket is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Role {
    /// Nothing.
    Unconnected,
    /// It listens.
    Listening {
        /// Connections that may wait.
        backlog: u32,
    },
    /// Another socket of the snapshot.
    Pair {
        /// In `Manifest::files`.
        peer: u32,
    },
    /// A socket that was closed.
    Closed,
    /// A datagram socket's destination, by its name.
    Connected {
        /// `sun_path`.
        to: Blob,
    },
}

/// What sock_diag(7) says about a socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Facts {
    state: u8,
    peer: Option<u32>,
    queue: (u32, u32),
    shutdown: u8,
}

const LISTEN: u8 = 10;

/// A sock_diag socket in the tree's network.
#[derive(Debug)]
pub(super) struct Diag(OwnedFd);

impl Diag {
    fn open(pid: i32) -> io::Result<Self> {
        const SOCK_DIAG: i32 = 4;
        netns::within(pid, || {
            sockopt::socket(libc::AF_NETLINK, libc::SOCK_RAW, SOCK_DIAG)
        })
        .map(Self)
    }

    fn ask(&self, inode: u32) -> io::Result<Facts> {
        let mut request = Vec::with_capacity(40);
        for word in [
            40u32,
            20 | (1 << 16),
            0,
            0,
            libc::AF_UNIX as u32,
            u32::MAX,
            inode,
            0x14,
            u32::MAX,
            u32::MAX,
        ] {
            request.extend_from_slice(&word.to_ne_bytes());
        }
        sockopt::send(self.0.as_fd(), &request, &[])?;
        let mut answer = [0; 4096];
        let n = nix::unistd::read(&self.0, &mut answer)?;
        parse(&answer[..n])
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "sock_diag does not know it"))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

/// A netlink message with a `unix_diag_msg` and its attributes.
pub(super) fn parse(answer: &[u8]) -> Option<Facts> {
    let total = word(answer, 0)? as usize;
    let kind = word(answer, 4)? & 0xffff;
    if kind != 20 || total > answer.len() {
        return None;
    }
    let mut facts = Facts {
        state: *answer.get(18)?,
        ..Facts::default()
    };
    let mut at = 32;
    while at + 4 <= total {
        let head = word(answer, at)?;
        let (len, kind) = ((head & 0xffff) as usize, head >> 16);
        if len < 4 {
            return None;
        }
        match kind {
            2 => facts.peer = word(answer, at + 4),
            4 => facts.queue = (word(answer, at + 4)?, word(answer, at + 8)?),
            6 => facts.shutdown = *answer.get(at + 4)?,
            _ => {}
        }
        at = at.checked_add(len.next_multiple_of(4))?;
    }
    Some(facts)
}

#[derive(Debug)]
pub(super) struct Plan {
    kind: i32,
    inode: u32,
}

/// `sun_path` of an address; none if it has no name.
fn name_of(address: &[u8]) -> Option<Blob> {
    let path = address.get(2..)?;
    match path.first()? {
        0 => Some(Blob(path.to_vec())),
        _ => Some(Blob(path.split(|byte| *byte == 0).next()?.to_vec())),
    }
}

fn facts(world: &mut World, description: &Description, inode: u32) -> Result<Facts, Refuse> {
    if world.diag.is_none() {
        world.diag = Some(Diag::open(description.pid).map_err(Refuse::failed("open sock_diag"))?);
    }
    let diag = world
        .diag
        .as_ref()
        .ok_or_else(|| Refuse::no("sock_diag is not there", "load unix_diag"))?;
    diag.ask(inode)
        .map_err(Refuse::failed("ask sock_diag about a unix socket"))
}

pub(super) fn classify(world: &mut World, description: &Description) -> Result<Class, Refuse> {
    let kind = sockopt::get_int(description.file.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE);
    let kind = kind.map_err(Refuse::failed("SO_TYPE"))?;
    let inode =
        scan::number_in(&description.link, "socket").and_then(|inode| u32::try_from(inode).ok());
    let inode = inode.ok_or_else(|| {
        Refuse::no(
            "its number is not known",
            "this kernel is not supported for it",
        )
    })?;
    let facts = facts(world, description, inode)?;
    let fd = description.file.as_fd();
    if let Some(peer) = facts.peer.filter(|peer| *peer != 0)
        && !inside(world, peer)
        && (kind != libc::SOCK_DGRAM
            || sockopt::peer_address(fd)
                .ok()
                .and_then(|peer| name_of(&peer))
                .is_none())
        && !world.options.close_outside
    {
        return external::classify(
            world,
            description,
            "it is connected to a process outside the tree",
        );
    }
    if let Some(Blob(name)) = sockopt::own_address(fd)
        .ok()
        .and_then(|address| name_of(&address))
        && name.first() != Some(&0)
    {
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&name));
        if path.is_relative() {
            return Err(Refuse::no(
                "it is bound to a relative path",
                "bind it to an absolute one",
            ));
        }
        if path::root_of(world, description.pid)?
            .inside(&path)
            .as_ref()
            != Some(&path)
        {
            return Err(Refuse::no(
                "it is bound to a path in a root of its own",
                "do without chroot",
            ));
        }
    }
    Ok(Class::Unix(Plan { kind, inode }))
}

/// Whether a socket is open in the tree.
fn inside(world: &World, inode: u32) -> bool {
    let wanted = PathBuf::from(format!("socket:[{inode}]"));
    world.pids.iter().any(|pid| {
        let list = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        list.into_iter()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == wanted))
    })
}

pub(super) fn state(
    world: &mut World,
    group: &Group,
    plan: &Plan,
    description: &Description,
    dry: bool,
) -> Result<Late, Refuse> {
    let fd = description.file.as_fd();
    let facts = facts(world, description, plan.inode)?;
    let name = sockopt::own_address(fd)
        .ok()
        .and_then(|address| name_of(&address));
    let role = role(world, group, plan, description, facts, dry)?;
    let queue = match role {
        Role::Listening { .. } => Vec::new(),
        _ if dry => Vec::new(),
        _ => queue(fd, plan.kind)?,
    };
    let file = name
        .as_ref()
        .filter(|name| name.0.first() != Some(&0))
        .and_then(|name| {
            let stat =
                fs::symlink_metadata(Path::new(std::ffi::OsStr::from_bytes(&name.0))).ok()?;
            stat.file_type()
                .is_socket()
                .then(|| (stat.mode() & 0o7777, stat.uid(), stat.gid()))
        });
    let kind = plan.kind;
    let copy = description
        .file
        .try_clone()
        .map_err(Refuse::failed("duplicate"))?;
    Ok(Late::Later(Box::new(move || {
        let options = options::capture(copy.as_fd(), libc::AF_UNIX, kind);
        Ok(Kind::Unix(Unix {
            kind,
            name,
            file,
            role,
            queue,
            shutdown: facts.shutdown & 3,
            options,
        }))
    })))
}

fn role(
    world: &World,
    group: &Group,
    plan: &Plan,
    description: &Description,
    facts: Facts,
    dry: bool,
) -> Result<Role, Refuse> {
    if facts.state == LISTEN {
        if facts.queue.0 > 0 && !dry && !world.options.close_outside {
            return Err(Refuse::no(
                "connections wait to be accepted",
                "try again in a moment",
            ));
        }
        return Ok(Role::Listening {
            backlog: facts.queue.1,
        });
    }
    let Some(peer) = facts.peer else {
        return Ok(Role::Unconnected);
    };
    if peer == 0 {
        if facts.shutdown & 3 == 3 || plan.kind == libc::SOCK_DGRAM || world.options.close_outside {
            return Ok(Role::Closed);
        }
        return Err(Refuse::no(
            "its connection has not been accepted yet",
            "try again in a moment",
        ));
    }
    let device = description.stat.dev();
    let found = group.with_inode((device, u64::from(peer)));
    if plan.kind == libc::SOCK_DGRAM
        && let Some(to) = sockopt::peer_address(description.file.as_fd())
            .ok()
            .and_then(|peer| name_of(&peer))
    {
        return Ok(Role::Connected { to });
    }
    match found.first() {
        Some(&(_, peer)) => Ok(Role::Pair { peer }),
        None if world.options.close_outside => Ok(Role::Closed),
        None => Err(Refuse::no(
            "it is connected to a process outside the tree",
            "try again",
        )),
    }
}

const SO_PEEK_OFF: i32 = 42;
const LARGEST: usize = 1 << 24;

/// Looks at all that waits, and leaves it there.
pub(super) fn peek_all(
    fd: BorrowedFd,
    stream: bool,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), Refuse>,
) -> Result<(), Refuse> {
    let before = sockopt::get_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF).unwrap_or(-1);
    let set = |value| sockopt::set_int(fd, libc::SOL_SOCKET, SO_PEEK_OFF, value);
    let mut buffer = vec![0; 1 << 16];
    let mut offset: usize = 0;
    let mut messages = 0u32;
    let result = loop {
        if let Err(error) = i32::try_from(offset)
            .map_err(io::Error::other)
            .and_then(set)
        {
            break Err(Refuse::Failed("SO_PEEK_OFF".into(), error));
        }
        let peeked = match sockopt::peek(fd, &mut buffer) {
            Ok(peeked) => peeked,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::EINVAL)) => {
                break Ok(());
            }
            Err(error) => break Err(Refuse::Failed("look at a socket's queue".into(), error)),
        };
        if peeked.descriptors {
            break Err(Refuse::no(
                "descriptors are on their way through it (SCM_RIGHTS)",
                "try again in a moment",
            ));
        }
        if peeked.truncated && buffer.len() < LARGEST {
            buffer.resize(buffer.len() * 8, 0);
            continue;
        }
        messages += 1;
        // The end of a stream, and the end of what a hostile sender could make us read.
        if (peeked.len == 0 && (stream || messages > 1 << 16))
            || peeked.truncated
            || offset > LARGEST * 8
        {
            break Ok(());
        }
        if let Err(refuse) = each(&buffer[..peeked.len], &peeked.from) {
            break Err(refuse);
        }
        offset += peeked.len;
    };
    let _ = set(before);
    result
}

fn queue(fd: BorrowedFd, kind: i32) -> Result<Vec<Blob>, Refuse> {
    let stream = kind == libc::SOCK_STREAM;
    if stream && crate::sys::fdioctl::readable(fd).is_ok_and(|waiting| waiting == 0) {
        return Ok(Vec::new());
    }
    let mut queue: Vec<Blob> = Vec::new();
    // A SOCK_SEQPACKET whose peer has closed gives empty messages without end.
    let seqpacket = kind == libc::SOCK_SEQPACKET;
    peek_all(fd, stream || seqpacket, |data, from| {
        if kind == libc::SOCK_DGRAM && name_of(from).is_some() {
            let reason =
                "a datagram from a named socket waits, and its sender cannot be written in again";
            return Err(Refuse::no(reason, "try again in a moment"));
        }
        match queue.last_mut() {
            Some(Blob(last)) if stream => last.extend_from_slice(data),
            _ => queue.push(Blob(data.to_vec())),
        }
        Ok(())
    })?;
    Ok(queue)
}

fn address(name: &Blob) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend_from_slice(&name.0);
    if name.0.first() != Some(&0) {
        address.push(0);
    }
    address
}

/// Second ends of pairs that were made with the first, by number in the manifest.
pub(super) type Made = HashMap<usize, OwnedFd>;

pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    unix: &Unix,
    (files, made): (&[OpenFile], &mut Made),
) -> Result<OwnedFd, Error> {
    let kind = unix.kind & 0xf;
    let socket = || {
        sockopt::socket(libc::AF_UNIX, kind, 0).map_err(Error::restore(at, "make a unix socket"))
    };
    let fd = match &unix.role {
        Role::Pair { peer } => match made.remove(&at) {
            Some(fd) => fd,
            None => {
                let peer = *peer as usize;
                let mutual = matches!(files.get(peer).map(|file| &file.kind),
                    Some(Kind::Unix(other)) if other.role == Role::Pair { peer: at as u32 } && other.kind == unix.kind);
                if !mutual || peer <= at {
                    return Err(Error::damaged(
                        at,
                        "a pair of sockets of which one end is missing",
                    ));
                }
                let (fd, other) = sockopt::pair(kind).map_err(Error::restore(at, "socketpair"))?;
                made.insert(peer, other);
                fd
            }
        },
        Role::Closed => {
            let (fd, other) = sockopt::pair(kind).map_err(Error::restore(at, "socketpair"))?;
            deliver(at, &other, &unix.queue)?;
            fd
        }
        Role::Listening { .. } | Role::Unconnected | Role::Connected { .. } => socket()?,
    };
    options::restore(at, fd.as_fd(), &unix.options)?;
    if let Some(name) = &unix.name {
        bind(at, &fd, unix, name, files)?;
    }
    if let Role::Listening { backlog } = unix.role {
        let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
        sockopt::listen(fd.as_fd(), backlog).map_err(Error::restore(at, "listen"))?;
    }
    if file.flags & libc::O_NONBLOCK != 0 {
        crate::sys::descriptor::fcntl(fd.as_fd(), libc::F_SETFL, libc::O_NONBLOCK)
            .map_err(Error::restore(at, "O_NONBLOCK"))?;
    }
    Ok(fd)
}

fn bind(
    at: usize,
    fd: &OwnedFd,
    unix: &Unix,
    name: &Blob,
    files: &[OpenFile],
) -> Result<(), Error> {
    if name.0.len() > 108 {
        return Err(Error::damaged(at, "a socket's name is too long"));
    }
    // An accepted connection has its listener's name, which is the listener's alone.
    let accepted = matches!(unix.role, Role::Pair { .. } | Role::Closed)
        && (unix.file.is_some() || files.iter().any(|file| matches!(&file.kind,
            Kind::Unix(other) if other.name.as_ref() == Some(name) && matches!(other.role, Role::Listening { .. }))));
    if accepted {
        return Ok(());
    }
    let shown = String::from_utf8_lossy(&name.0).replace('\0', "@");
    let address = address(name);
    if name.0.first() != Some(&0) {
        let path = Path::new(std::ffi::OsStr::from_bytes(&name.0));
        if fs::symlink_metadata(path).is_ok_and(|stat| stat.file_type().is_socket()) {
            let probe = sockopt::socket(libc::AF_UNIX, unix.kind & 0xf, 0)
                .map_err(Error::restore(at, "socket"))?;
            if sockopt::connect(probe.as_fd(), &address).is_ok() {
                let what = format!("{shown} belongs to a running process; end that one first");
                return Err(Error::Changed { file: at, what });
            }
            fs::remove_file(path)
                .map_err(Error::restore(at, format!("remove the stale {shown}")))?;
        }
    }
    sockopt::bind(fd.as_fd(), &address).map_err(Error::restore(at, format!("bind to {shown}")))?;
    if let Some((mode, uid, gid)) = unix.file {
        let path = Path::new(std::ffi::OsStr::from_bytes(&name.0));
        let set = std::os::unix::fs::chown(path, Some(uid), Some(gid))
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777)));
        set.map_err(Error::restore(at, format!("set the owner of {shown}")))?;
    }
    Ok(())
}

/// Sends messages out of a socket.
fn deliver(at: usize, from: &OwnedFd, queue: &[Blob]) -> Result<(), Error> {
    let total = queue
        .iter()
        .map(|piece| piece.0.len().saturating_add(4096))
        .fold(0, usize::saturating_add);
    options::with_room(at, from.as_fd(), (libc::SO_SNDBUF, total), || {
        for Blob(piece) in queue {
            let sent = sockopt::send(from.as_fd(), piece, &[])
                .map_err(Error::restore(at, "fill a socket's queue"))?;
            if sent != piece.len() {
                return Err(Error::damaged(
                    at,
                    "more is said to wait in a socket than it can hold",
                ));
            }
        }
        Ok(())
    })
}

/// Fills queues and connects by name; after all sockets have been made.
pub(super) fn fill(
    at: usize,
    unix: &Unix,
    fd: &OwnedFd,
    made: &[Option<OwnedFd>],
) -> Result<(), Error> {
    match &unix.role {
        Role::Pair { peer } => {
            let other = made.get(*peer as usize).and_then(Option::as_ref);
            deliver(
                at,
                other.ok_or_else(|| Error::damaged(at, "a socket without its peer"))?,
                &unix.queue,
            )?;
        }
        Role::Unconnected | Role::Connected { .. } if !unix.queue.is_empty() => {
            let Some(name) = &unix.name else {
                return Err(Error::damaged(at, "messages for a socket without a name"));
            };
            let sender = sockopt::socket(libc::AF_UNIX, unix.kind & 0xf, 0)
                .map_err(Error::restore(at, "socket"))?;
            sockopt::connect(sender.as_fd(), &address(name))
                .map_err(Error::restore(at, "fill a socket's queue"))?;
            deliver(at, &sender, &unix.queue)?;
        }
        _ => {}
    }
    if let Role::Connected { to } = &unix.role {
        let what = format!(
            "connect to {}",
            String::from_utf8_lossy(&to.0).replace('\0', "@")
        );
        if to.0.len() > 108 {
            return Err(Error::damaged(at, "a socket's name is too long"));
        }
        if let Err(error) = sockopt::connect(fd.as_fd(), &address(to)) {
            // Programs that send datagrams to a log live with one that is not there.
            tracing::warn!(file = at, %error, "cannot {what}; going on without");
        }
    }
    Ok(())
}

/// Closes directions that were closed; after all queues are filled.
pub(super) fn shut(at: usize, unix: &Unix, fd: &OwnedFd) -> Result<(), Error> {
    let how = match unix.shutdown & 3 {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 if !matches!(unix.role, Role::Closed) => libc::SHUT_RDWR,
        _ => return Ok(()),
    };
    match sockopt::shutdown(fd.as_fd(), how) {
        Err(error) if error.raw_os_error() != Some(libc::ENOTCONN) => {
            Err(Error::restore(at, "shutdown")(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_sock_diag_is_not_trusted() {
        assert_eq!(parse(&[]), None);
        let mut answer = vec![0; 44];
        answer[0] = 44;
        answer[4] = 20;
        answer[18] = 1;
        answer[32..36].copy_from_slice(&[8, 0, 2, 0]);
        answer[36..40].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(parse(&answer[..43]), None);
        // An attribute of length 0 would be read for ever.
        assert_eq!(parse(&answer), None);
        answer[0] = 40;
        assert_eq!(parse(&answer).unwrap().peer, Some(7));
    }
}
