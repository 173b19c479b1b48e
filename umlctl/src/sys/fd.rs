//! Descriptors: fixed numbers for a program about to be started, and descriptors that came as numbers.

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A pair of sockets for messages, which may bring descriptors along.
///
/// # Errors
/// The kernel's.
pub fn messages() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// A message has at most so many bytes.
pub const MESSAGE: usize = 4096;

/// Sends a message, of at most [`MESSAGE`] bytes, and a descriptor along with it.
///
/// # Errors
/// The other end is closed, or the kernel's.
pub fn send(channel: &OwnedFd, text: &[u8], fd: Option<RawFd>) -> Result<(), Errno> {
    let fds: Vec<RawFd> = fd.into_iter().collect();
    let along = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        channel.as_raw_fd(),
        &[IoSlice::new(text)],
        if fds.is_empty() { &[] } else { &along },
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}

/// Waits for a message; no text and no descriptor if the other end is closed.
///
/// # Errors
/// The kernel's.
pub fn receive(channel: &OwnedFd) -> Result<(Vec<u8>, Option<OwnedFd>), Errno> {
    let mut text = [0; MESSAGE];
    let mut iov = [IoSliceMut::new(&mut text)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let got = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(channel.as_raw_fd(), &mut iov, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            fds.extend(received(numbers));
        }
    }
    let length = got.bytes;
    Ok((text[..length].to_vec(), fds.pop()))
}

/// Gives descriptors the numbers that stand beside them, open across exec, and closes every other one.
///
/// For a process that is about to become another program: no object of this one may use its descriptors afterwards, so
/// the caller must do nothing but exec or exit.
///
/// # Errors
/// The kernel's, for instance EMFILE.
pub fn arrange(
    wanted: &[(RawFd, RawFd)],
    report: Option<&OwnedFd>,
) -> Result<Option<RawFd>, Errno> {
    let top = wanted.iter().map(|w| w.1).max().unwrap_or(-1) + 1;
    // First out of the way of all numbers that are wanted, so that none is overwritten before it was moved.
    let away = |fd: RawFd| {
        // SAFETY: F_DUPFD_CLOEXEC takes no pointer; the new descriptor is used as a number only.
        Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, top + 1) })
    };
    let mut moved = Vec::with_capacity(wanted.len());
    for &(from, to) in wanted {
        moved.push((away(from)?, to));
    }
    let report = report.map(|r| away(r.as_raw_fd())).transpose()?;
    for &(from, to) in &moved {
        // SAFETY: no pointers; by the contract above nobody owns `to` any more. dup2 clears close-on-exec.
        Errno::result(unsafe { libc::dup2(from, to) })?;
    }
    // Gaps between the numbers are closed here, what lies above them by the second part.
    for fd in (0..top).filter(|fd| wanted.iter().all(|w| w.1 != *fd)) {
        // SAFETY: no pointers; nobody uses this number any more.
        unsafe { libc::close(fd) };
    }
    let close = |from: RawFd, to: RawFd| {
        if from <= to {
            // SAFETY: no pointers; nobody uses these numbers any more.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    };
    match report {
        Some(fd) => {
            close(top, fd - 1);
            close(fd + 1, RawFd::MAX);
        }
        None => close(top, RawFd::MAX),
    }
    Ok(report)
}

/// Writes to a descriptor that is only a number (see [`arrange`]).
pub fn write_raw(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the pointer and length are of a slice that lives through the call. That it may fail is accepted: there is
    // nobody to tell.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// Takes a descriptor that this process was started with. `None` if there is no such descriptor, or it is one of the first
/// three.
#[must_use]
pub fn inherited(fd: RawFd) -> Option<OwnedFd> {
    if fd < 3 {
        return None;
    }
    // SAFETY: no pointers; sets close-on-exec and tells whether it is open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return None;
    }
    // SAFETY: it is open, and whoever started us handed it over by its number; nothing else here knows that number.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes descriptors that recvmsg(2) has made.
fn received(fds: Vec<RawFd>) -> Vec<OwnedFd> {
    fds.into_iter()
        // SAFETY: the kernel made them for this process with the message they came with; nobody else has taken them.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}

/// Lets a program that is about to be started inherit descriptors under their own numbers.
pub fn pass(command: &mut std::process::Command, fds: &[RawFd]) {
    use std::os::unix::process::CommandExt;
    let fds = fds.to_vec();
    let keep = move || {
        for fd in &fds {
            // SAFETY: no pointers.
            Errno::result(unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) })?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec. It makes system calls and reads its own list; it neither allocates nor
    // takes a lock.
    unsafe { command.pre_exec(keep) };
}

/// Closes all descriptors but the first three and these. For a process that will never use its objects' other descriptors
/// again, nor drop them: it must end by exec or _exit.
pub fn close_except(keep: &[RawFd]) {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().chain([RawFd::MAX]) {
        if fd > from {
            // SAFETY: no pointers; by the contract above nobody uses these numbers any more.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = from.max(fd.saturating_add(1));
    }
}
