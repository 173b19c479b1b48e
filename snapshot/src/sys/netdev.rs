//! Network interfaces.

use nix::errno::Errno;
use std::os::fd::AsRawFd;

/// Sets the loopback interface of the caller's network namespace up.
pub fn loopback_up() -> Result<(), Errno> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(|_| Errno::last())?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the structure lives through the call.
    let r = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
    Errno::result(r).map(drop)
}
