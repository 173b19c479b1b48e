//! Open files: what is captured of each kind, and how it is made again. `docs/captured.md` has the table.
//!
//! Capture needs no code in the target. The saver holds duplicates of the target's open file descriptions
//! (`pidfd_getfd`) and asks them; [`Capture::prepare`] does what it can while the target runs, [`Capture::freeze`] reads
//! in the stop what can change, and [`Frozen::finish`] does the rest after it.

mod capture;
mod content;
mod epoll;
mod error;
mod event;
mod external;
mod fdinfo;
#[doc(hidden)]
pub mod fuzz;
mod inet;
mod inotify;
mod install;
mod locks;
mod netlink;
mod netns;
mod options;
mod path;
mod pidfd;
mod pipe;
mod regular;
mod relocate;
mod restore;
mod scan;
mod tcp;
mod tty;
mod unix;

pub use capture::{Capture, Frozen, Options};
pub use content::check_contents;
pub use error::{Error, Refusal};
pub use install::{complete, install};
pub use locks::{Lock, LockKind};
pub use regular::Regular;
pub use relocate::{paths, relocate};
pub use restore::{Connections, Context, restore};
pub use tcp::{Held, rescue_connections};

use serde::{Deserialize, Serialize};

/// An open file description: what descriptors that were duplicated or inherited share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenFile {
    /// Access mode and status flags, as of F_GETFL.
    pub flags: i32,
    /// Offset, bytes.
    pub offset: u64,
    /// Who gets signals about it.
    pub owner: Option<Owner>,
    /// Locks that hang on it.
    pub locks: Vec<Lock>,
    /// What it is.
    pub kind: Kind,
}

/// Who gets signals about a file (F_SETOWN_EX, F_SETSIG).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// F_OWNER_TID, F_OWNER_PID or F_OWNER_PGRP.
    pub kind: i32,
    /// Thread, process or group; 0 is nobody.
    pub pid: i32,
    /// F_SETSIG; 0 is SIGIO.
    pub signal: i32,
}

/// Kinds of open files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Kind {
    /// A path that is opened again: a directory, a device that holds no state (`/dev/null`), a file of /proc.
    Path(path::Reopened),
    /// A regular file that has a name.
    Regular(regular::Regular),
    /// A regular file without a name; its content is in the snapshot.
    Unlinked(regular::Unlinked),
    /// A memfd that is mapped nowhere; its content is in the snapshot.
    Memfd(regular::Memfd),
    /// A file whose content is an object in `Manifest::shared`.
    SharedMemory {
        /// Which.
        object: u32,
    },
    /// One end of a pipe or FIFO.
    Pipe(pipe::End),
    /// eventfd(2).
    Eventfd(event::Eventfd),
    /// timerfd_create(2).
    Timerfd(event::Timerfd),
    /// signalfd(2).
    Signalfd(event::Signalfd),
    /// epoll_create(2).
    Epoll(epoll::Epoll),
    /// inotify_init(2).
    Inotify(inotify::Inotify),
    /// pidfd_open(2).
    Pidfd(pidfd::Pidfd),
    /// A unix socket.
    Unix(unix::Unix),
    /// An internet socket that is not an established connection.
    Inet(inet::Inet),
    /// An established TCP connection.
    Tcp(tcp::Tcp),
    /// A netlink socket.
    Netlink(netlink::Netlink),
    /// The master of a pseudo-terminal.
    Master(tty::Master),
    /// The slave of a pseudo-terminal whose master is in the snapshot too.
    Slave(tty::Slave),
    /// Something outside: descriptor N of the resuming command takes its place.
    External(external::External),
}

/// Bytes; base64 in JSON.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use base64::Engine as _;
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use base64::Engine as _;
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(text.as_bytes());
        Ok(Self(bytes.map_err(serde::de::Error::custom)?))
    }
}
