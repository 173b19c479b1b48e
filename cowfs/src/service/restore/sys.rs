//! System calls that nix does not wrap: extended attributes by descriptor.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Room for all names, or for one value (XATTR_SIZE_MAX of Linux).
const MAX: usize = 65536;

fn filled(mut buf: Vec<u8>, n: isize) -> io::Result<Vec<u8>> {
    buf.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
    Ok(buf)
}

/// Names of the extended attributes.
fn names(file: &File) -> io::Result<Vec<CString>> {
    let mut buf = vec![0_u8; MAX];
    // SAFETY: the pointer and the length are those of `buf`, which the kernel fills; the borrow keeps the descriptor open.
    let n = unsafe { libc::flistxattr(file.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
    Ok(filled(buf, n)?
        .split_inclusive(|c| *c == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        .map(CStr::to_owned)
        .collect())
}

fn get(file: &File, name: &CStr) -> io::Result<Vec<u8>> {
    let mut buf = vec![0_u8; MAX];
    // SAFETY: the pointer and the length are those of `buf`, which the kernel fills, and the name ends with its nul.
    let n = unsafe {
        libc::fgetxattr(
            file.as_raw_fd(),
            name.as_ptr(),
            buf.as_mut_ptr().cast(),
            buf.len(),
        )
    };
    filled(buf, n)
}

/// Gives a file the extended attributes (and with them the ACLs) of another.
///
/// # Errors
/// The errno of the call that failed.
pub(super) fn copy_xattrs(from: &File, to: &File) -> io::Result<()> {
    for name in names(from)? {
        let value = get(from, &name)?;
        // SAFETY: the pointer and the length are those of `value`, which is only read, and the name ends with its nul.
        let r = unsafe {
            libc::fsetxattr(
                to.as_raw_fd(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        };
        if r != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Takes a directory's default ACL away, so that what is made in it inherits none.
///
/// # Errors
/// The errno of the call that failed.
pub(super) fn drop_default_acl(dir: &File) -> io::Result<()> {
    // SAFETY: the name is a literal that ends with its nul; the borrow keeps the descriptor open.
    let r = unsafe { libc::fremovexattr(dir.as_raw_fd(), c"system.posix_acl_default".as_ptr()) };
    match io::Error::last_os_error() {
        e if r != 0
            && ![Some(libc::ENODATA), Some(libc::EOPNOTSUPP)].contains(&e.raw_os_error()) =>
        {
            Err(e)
        }
        _ => Ok(()),
    }
}
