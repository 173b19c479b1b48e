//! The host's end of a VM's Ethernet.

use nix::errno::Errno;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};

mod raw {
    #![allow(missing_docs, reason = "made by a macro that takes none")]
    nix::ioctl_write_int!(tunsetiff, b'T', 202);
    nix::ioctl_write_int!(tunsetpersist, b'T', 203);
    nix::ioctl_read_bad!(siocgifflags, libc::SIOCGIFFLAGS, libc::ifreq);
    nix::ioctl_write_ptr_bad!(siocsifflags, libc::SIOCSIFFLAGS, libc::ifreq);
}

/// A request about the interface of a name.
fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(Errno::ENAMETOOLONG.into());
    }
    // SAFETY: all zeros is a valid value of this structure of integers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Makes a tap in the current network namespace that stays when nobody has it open, and puts it up, so that what is written
/// to it is no error. See [`open`].
///
/// # Errors
/// As of [`open`].
pub fn make(name: &str) -> io::Result<OwnedFd> {
    let tap = open(name)?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut request = request(name)?;
    // SAFETY: the first takes a number; the kernel reads or writes one `ifreq` by the others, which lives through the calls,
    // and of whose union they use the flags.
    unsafe {
        raw::tunsetpersist(tap.as_raw_fd(), 1)?;
        raw::siocgifflags(socket.as_raw_fd(), &raw mut request)?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16;
        raw::siocsifflags(socket.as_raw_fd(), &raw const request)?;
    }
    Ok(tap)
}

/// Opens a tap of the current network namespace, and makes it if it is not there.
///
/// Without a header before each frame: that is what the guest's `fd` transport speaks. So the host computes checksums and
/// cuts large segments before a frame gets here.
///
/// # Errors
/// There is no /dev/net/tun, the name is taken by something else, or somebody has it open.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: the kernel reads and writes one `ifreq`, which lives through the call.
    unsafe { raw::tunsetiff(file.as_raw_fd(), &raw mut request as u64) }?;
    Ok(file.into())
}
