//! Pseudo-terminals of which both sides are in the tree.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::capture::{Class, Group, World};
use super::error::{Error, Refuse};
use super::fdinfo::Info;
use super::scan::Description;
use super::{Blob, Kind, OpenFile, external};
use crate::sys::fdioctl;

/// The master of a pseudo-terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Master {
    /// The number it had (`/dev/pts/N`); the new one is another.
    pub number: u32,
    /// struct termios2.
    pub termios: Blob,
    /// Rows, columns, x and y pixels.
    pub size: [u16; 4],
    /// TIOCSPTLCK.
    pub locked: bool,
    /// TIOCPKT.
    pub packet: bool,
    /// The session whose terminal it is; 0 is none.
    pub session: i32,
    /// Its foreground group; 0 is none.
    pub foreground: i32,
}

/// The slave of a pseudo-terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slave {
    /// The number that its master had.
    pub number: u32,
}

/// Whether it is `/dev/ptmx`, opened.
pub(super) fn is_master(description: &Description) -> bool {
    description.stat.file_type().is_char_device() && description.stat.rdev() == libc::makedev(5, 2)
}

/// The number of a master.
pub(super) fn number(description: &Description) -> Option<u32> {
    fdioctl::pty_number(description.file.as_fd()).ok()
}

pub(super) fn master_class(_info: &Info) -> Class {
    Class::Master
}

pub(super) fn slave_class(
    world: &mut World,
    description: &Description,
    number: u32,
) -> Result<Class, Refuse> {
    if world.masters.contains(&number) {
        return Ok(Class::Slave(number));
    }
    external::classify(
        world,
        description,
        "a terminal whose other side is outside the tree",
    )
}

fn empty(description: &Description, dry: bool) -> Result<(), Refuse> {
    if !dry && fdioctl::readable(description.file.as_fd()).unwrap_or(0) > 0 {
        return Err(Refuse::no(
            "text on its way through a pseudo-terminal",
            "try again in a moment",
        ));
    }
    Ok(())
}

pub(super) fn master_state(description: &Description, dry: bool) -> Result<Kind, Refuse> {
    empty(description, dry)?;
    let fd = description.file.as_fd();
    let fail = || Refuse::failed("the state of a terminal");
    let (locked, packet) = fdioctl::pty_state(fd).map_err(fail())?;
    let (session, foreground) = fdioctl::session(fd);
    Ok(Kind::Master(Master {
        number: fdioctl::pty_number(fd).map_err(fail())?,
        termios: Blob(fdioctl::termios(fd).map_err(fail())?.to_vec()),
        size: fdioctl::window_size(fd).map_err(fail())?,
        locked,
        packet,
        session,
        foreground,
    }))
}

pub(super) fn slave_state(
    _: &Group,
    number: u32,
    description: &Description,
    dry: bool,
) -> Result<Kind, Refuse> {
    empty(description, dry)?;
    Ok(Kind::Slave(Slave { number }))
}

pub(super) fn restore_master(
    at: usize,
    file: &OpenFile,
    master: &Master,
) -> Result<OwnedFd, Error> {
    let flags = OFlag::from_bits_retain(file.flags & (libc::O_NONBLOCK | libc::O_ACCMODE));
    let flags = flags | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open("/dev/ptmx", flags, nix::sys::stat::Mode::empty());
    let fd = fd.map_err(Error::errno(at, "open /dev/ptmx; is devpts mounted?"))?;
    let termios: &[u8; fdioctl::TERMIOS] = master
        .termios
        .0
        .as_slice()
        .try_into()
        .map_err(|_| Error::damaged(at, "a terminal's settings have a wrong size"))?;
    let fail = || Error::restore(at, "set a terminal as it was");
    fdioctl::lock_pty(fd.as_fd(), false).map_err(fail())?;
    fdioctl::set_termios(fd.as_fd(), termios).map_err(fail())?;
    fdioctl::set_window_size(fd.as_fd(), master.size).map_err(fail())?;
    fdioctl::set_packet_mode(fd.as_fd(), master.packet).map_err(fail())?;
    Ok(fd)
}

/// Opens the slave of a master that was made again.
pub(super) fn restore_slave(
    at: usize,
    file: &OpenFile,
    slave: &Slave,
    (files, made): (&[OpenFile], &[Option<OwnedFd>]),
) -> Result<OwnedFd, Error> {
    let master = files
        .iter()
        .position(|file| matches!(&file.kind, Kind::Master(m) if m.number == slave.number));
    let master = master.and_then(|master| made.get(master)?.as_ref());
    let master = master.ok_or_else(|| Error::damaged(at, "a terminal without its other side"))?;
    let flags =
        file.flags & (libc::O_NONBLOCK | libc::O_ACCMODE) | libc::O_NOCTTY | libc::O_CLOEXEC;
    fdioctl::open_slave(master.as_fd(), flags).map_err(Error::restore(at, "open a terminal"))
}

/// Locks masters that were locked; after the slaves have been opened.
pub(super) fn lock(at: usize, master: &Master, fd: &OwnedFd) -> Result<(), Error> {
    if master.locked {
        fdioctl::lock_pty(fd.as_fd(), true).map_err(Error::restore(at, "lock a terminal"))?;
    }
    Ok(())
}
