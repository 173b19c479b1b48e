//! Making a userfaultfd that belongs to a target, and taking it.

use super::Error;
use crate::sys::remote;
use crate::target::{Batch, Driver};
use nix::errno::Errno;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `USERFAULTFD_IOC_NEW` (`include/uapi/linux/userfaultfd.h`).
const IOC_NEW: u64 = 0xaa00;
const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// Makes the target create a userfaultfd, takes it, and makes the target close its own. `pidfd` is of the target. The
/// driver's foothold must be settled. UFFDIO_API is still to be called.
pub fn create(pid: i32, pidfd: BorrowedFd<'_>, driver: &mut Driver<'_>) -> Result<OwnedFd, Error> {
    let mut batch = Batch::new();
    let made = batch.call(libc::SYS_userfaultfd, &[FLAGS.into()]);
    driver.run(&mut batch)?;
    match batch.result(made) {
        Ok(fd) => take_and_close(pid, pidfd, driver, [fd as i32, -1, -1, -1]),
        // Without CAP_SYS_PTRACE the call gives EPERM (vm.unprivileged_userfaultfd is 0).
        Err(Errno::EPERM) => by_device(pid, pidfd, driver),
        Err(Errno::ENOSYS) => Err(Error::NoUserfault(
            pid,
            "this kernel has none (CONFIG_USERFAULTFD)",
        )),
        Err(e) => Err(Error::Call(pid, "userfaultfd", e)),
    }
}

fn take_and_close(
    pid: i32,
    pidfd: BorrowedFd<'_>,
    driver: &mut Driver<'_>,
    fds: [i32; 4],
) -> Result<OwnedFd, Error> {
    driver.note_fds(fds)?;
    crate::fault::point("userfault.made");
    let taken = remote::pidfd_getfd(pidfd, fds[0]).map_err(|e| Error::Fetch(pid, fds[0], e));
    let mut batch = Batch::new();
    for fd in fds.into_iter().filter(|&fd| fd >= 0) {
        batch.call(libc::SYS_close, &[fd.into()]);
    }
    driver.run(&mut batch)?;
    driver.note_fds([-1; 4])?;
    taken
}

/// The target is handed our `/dev/userfaultfd`, through a socket pair that it makes.
fn by_device(pid: i32, pidfd: BorrowedFd<'_>, driver: &mut Driver<'_>) -> Result<OwnedFd, Error> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let device = device.map_err(|_| {
        Error::NoUserfault(
            pid,
            "/dev/userfaultfd cannot be opened, and it has no privilege",
        )
    })?;
    let mut batch = Batch::new();
    let pair = batch.room(8);
    let made = batch.call(
        libc::SYS_socketpair,
        &[
            libc::AF_UNIX.into(),
            (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC).into(),
            0.into(),
            pair,
        ],
    );
    driver.run(&mut batch)?;
    batch
        .result(made)
        .map_err(|e| Error::Call(pid, "socketpair", e))?;
    let both = batch.word(pair, 0);
    let (near, far) = (both as u32 as i32, (both >> 32) as i32);
    driver.note_fds([near, far, -1, -1])?;
    let socket = remote::pidfd_getfd(pidfd, near).map_err(|e| Error::Fetch(pid, near, e))?;
    let rights = [nix::sys::socket::ControlMessage::ScmRights(&[
        device.as_raw_fd()
    ])];
    nix::sys::socket::sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(b"u")],
        &rights,
        nix::sys::socket::MsgFlags::empty(),
        None,
    )
    .map_err(|e| Error::Call(pid, "sendmsg to it", e))?;
    drop(socket);

    let mut batch = Batch::new();
    let received = receive(driver, &mut batch, far)?;
    let got = batch
        .result(received.call)
        .map_err(|e| Error::Call(pid, "recvmsg", e))?;
    if got < 1 {
        return Err(Error::Call(pid, "recvmsg", Errno::EIO));
    }
    let dev = batch.word(received.control, 16) as u32 as i32;
    let mut batch = Batch::new();
    let new = batch.call(libc::SYS_ioctl, &[dev.into(), IOC_NEW.into(), FLAGS.into()]);
    driver.run(&mut batch)?;
    match batch.result(new) {
        Ok(fd) => take_and_close(pid, pidfd, driver, [fd as i32, dev, near, far]),
        Err(e) => {
            let mut batch = Batch::new();
            for fd in [dev, near, far] {
                batch.call(libc::SYS_close, &[fd.into()]);
            }
            driver.run(&mut batch)?;
            driver.note_fds([-1; 4])?;
            Err(Error::Call(pid, "USERFAULTFD_IOC_NEW", e))
        }
    }
}

struct Received {
    call: usize,
    control: crate::target::batch::Arg,
}

/// recvmsg(2) with room for one descriptor. `struct msghdr` is name, its length, iovec, their number, control, its length,
/// flags, a word each.
fn receive(driver: &mut Driver<'_>, batch: &mut Batch, socket: i32) -> Result<Received, Error> {
    use crate::target::batch::Arg;
    let byte = batch.room(8);
    let iov = batch.pointers(&[byte, Arg::Word(1)]);
    let control = batch.room(24);
    let header = batch.pointers(&[
        Arg::Word(0),
        Arg::Word(0),
        iov,
        Arg::Word(1),
        control,
        Arg::Word(24),
        Arg::Word(0),
    ]);
    let call = batch.call(
        libc::SYS_recvmsg,
        &[socket.into(), header, libc::MSG_CMSG_CLOEXEC.into()],
    );
    driver.run(batch)?;
    Ok(Received { call, control })
}
