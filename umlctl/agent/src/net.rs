//! The guest's network: always the same addresses.

use crate::sys;
use std::io;

const SIOCADDRT: u64 = 0x890b;
const SIOCGIFFLAGS: u64 = 0x8913;
const SIOCSIFFLAGS: u64 = 0x8914;
const SIOCSIFADDR: u64 = 0x8916;
const SIOCSIFNETMASK: u64 = 0x891c;

const ADDRESS: [u8; 4] = [10, 83, 0, 2];
const MASK: [u8; 4] = [255, 255, 255, 0];
const GATEWAY: [u8; 4] = [10, 83, 0, 1];

/// `struct sockaddr_in`
fn address(to: &mut [u8], ip: [u8; 4]) {
    to[..2].copy_from_slice(&2u16.to_ne_bytes());
    to[4..8].copy_from_slice(&ip);
}

/// `struct ifreq`
fn interface(name: &str) -> [u8; 40] {
    let mut request = [0; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request
}

fn up(socket: &std::os::fd::OwnedFd, name: &str) -> io::Result<()> {
    let mut request = interface(name);
    sys::configure(socket, SIOCGIFFLAGS, &mut request)?;
    request[16] |= 1;
    sys::configure(socket, SIOCSIFFLAGS, &mut request)
}

/// Brings it up: loopback, and the Ethernet with its address and route.
pub fn configure() -> io::Result<()> {
    let socket = sys::inet_socket()?;
    up(&socket, "lo")?;
    for (what, ip) in [(SIOCSIFADDR, ADDRESS), (SIOCSIFNETMASK, MASK)] {
        let mut request = interface("vec0");
        address(&mut request[16..], ip);
        sys::configure(&socket, what, &mut request)?;
    }
    up(&socket, "vec0")?;
    // `struct rtentry`: destination at 8, gateway at 24, mask at 40, flags at 56 (up, by a gateway).
    let mut route = [0u8; 120];
    address(&mut route[8..], [0; 4]);
    address(&mut route[24..], GATEWAY);
    address(&mut route[40..], [0; 4]);
    route[56] = 3;
    sys::configure(&socket, SIOCADDRT, &mut route)
}
