//! Sockets in raw form: options by number, messages with their control data, addresses as bytes.

use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// socket(2).
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// socketpair(2) of unix sockets.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: two ints are written.
    check(unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    })?;
    // SAFETY: the kernel has just made both for us.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// getsockopt(2) into a buffer; how many bytes were written.
pub fn get(fd: BorrowedFd, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes into the buffer.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            buffer.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    Ok((len as usize).min(buffer.len()))
}

/// getsockopt(2) of an int.
pub fn get_int(fd: BorrowedFd, level: i32, name: i32) -> io::Result<i32> {
    let mut bytes = [0; 4];
    get(fd, level, name, &mut bytes)?;
    Ok(i32::from_ne_bytes(bytes))
}

/// setsockopt(2) from bytes.
pub fn set(fd: BorrowedFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let len = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `len` bytes of the buffer.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), len) })
        .map(drop)
}

/// setsockopt(2) of an int.
pub fn set_int(fd: BorrowedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(fd, level, name, &value.to_ne_bytes())
}

/// SO_ATTACH_FILTER with a program that drops every packet: the socket hears nothing more, and nobody is told.
pub fn deafen(fd: BorrowedFd) -> io::Result<()> {
    let drop_all = [libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let program = libc::sock_fprog {
        len: 1,
        filter: drop_all.as_ptr().cast_mut(),
    };
    let len = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let pointer = (&raw const program).cast();
    // SAFETY: the program and its one instruction live through the call; the kernel only reads them.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            pointer,
            len,
        )
    })
    .map(drop)
}

/// A socket address as the kernel gives it.
pub type Address = Vec<u8>;

type NameCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn name(fd: BorrowedFd, call: NameCall) -> io::Result<Address> {
    let mut bytes = [0u8; size_of::<libc::sockaddr_storage>()];
    let mut len = size_of_val(&bytes) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes; its copy needs no alignment.
    check(unsafe { call(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut len) })?;
    Ok(bytes[..(len as usize).min(bytes.len())].to_vec())
}

/// getsockname(2).
pub fn own_address(fd: BorrowedFd) -> io::Result<Address> {
    name(fd, libc::getsockname)
}

/// getpeername(2).
pub fn peer_address(fd: BorrowedFd) -> io::Result<Address> {
    name(fd, libc::getpeername)
}

fn length(address: &[u8]) -> io::Result<libc::socklen_t> {
    libc::socklen_t::try_from(address.len()).map_err(io::Error::other)
}

/// bind(2).
pub fn bind(fd: BorrowedFd, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the address has.
    check(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), length(address)?) })
        .map(drop)
}

/// connect(2).
pub fn connect(fd: BorrowedFd, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the address has.
    check(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), length(address)?) })
        .map(drop)
}

/// listen(2).
pub fn listen(fd: BorrowedFd, backlog: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// accept4(2).
pub fn accept(fd: BorrowedFd) -> io::Result<OwnedFd> {
    let null = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let new = check(unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            null,
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// shutdown(2).
pub fn shutdown(fd: BorrowedFd, how: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// send(2) without waiting and without SIGPIPE, to an address unless it is empty.
pub fn send(fd: BorrowedFd, data: &[u8], to: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let address = if to.is_empty() {
        std::ptr::null()
    } else {
        to.as_ptr().cast()
    };
    // SAFETY: the kernel reads `data` and `to`, both with their lengths.
    let n = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            flags,
            address,
            length(to)?,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A message that was looked at and left in its queue.
#[derive(Debug)]
pub struct Peeked {
    /// How many bytes of the buffer were filled.
    pub len: usize,
    /// Who sent it.
    pub from: Address,
    /// It did not fit into the buffer.
    pub truncated: bool,
    /// It carries descriptors (which were closed again).
    pub descriptors: bool,
    /// The end of a record (SOCK_SEQPACKET).
    pub end_of_record: bool,
}

/// recvmsg(2) with MSG_PEEK, without waiting.
pub fn peek(fd: BorrowedFd, buffer: &mut [u8]) -> io::Result<Peeked> {
    let mut from = [0u8; size_of::<libc::sockaddr_storage>()];
    let mut control = [0u64; 160];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = from.as_mut_ptr().cast();
    message.msg_namelen = size_of_val(&from) as libc::socklen_t;
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the buffers of the message live through the call, with the lengths given.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    let len = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    let mut descriptors = false;
    // SAFETY: the kernel has filled the control buffer, aligned to 8, and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give headers that lie wholly in the buffer.
        let (level, kind, total) = unsafe {
            (
                (*header).cmsg_level,
                (*header).cmsg_type,
                (*header).cmsg_len,
            )
        };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            descriptors = true;
            // SAFETY: only computes an offset.
            let start = unsafe { libc::CMSG_LEN(0) } as usize;
            for i in 0..total.saturating_sub(start) / 4 {
                // SAFETY: the kernel put that many ints behind the header; each is a new descriptor of ours.
                unsafe {
                    let number = libc::CMSG_DATA(header)
                        .cast::<i32>()
                        .add(i)
                        .read_unaligned();
                    drop(OwnedFd::from_raw_fd(number));
                }
            }
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(Peeked {
        len,
        from: from[..(message.msg_namelen as usize).min(from.len())].to_vec(),
        truncated: message.msg_flags & libc::MSG_TRUNC != 0,
        descriptors: descriptors || message.msg_flags & libc::MSG_CTRUNC != 0,
        end_of_record: message.msg_flags & libc::MSG_EOR != 0,
    })
}

/// SO_GET_FILTER: how many instructions the socket's filter has; the first is written to `first`.
pub fn get_filter(fd: BorrowedFd, first: &mut [u8; 8]) -> Result<u32, i32> {
    let mut program = [0u64; 4096];
    // This option counts instructions, not bytes.
    let mut len: libc::socklen_t = 4096;
    let pointer = program.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most 4096 instructions of 8 bytes.
    let n = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            pointer,
            &raw mut len,
        )
    };
    if n < 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    *first = program[0].to_ne_bytes();
    Ok(len)
}
