//! A snapshot's file, mapped for reading.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps a file whole. It must not be cut while it is mapped: a touch beyond its end is a SIGBUS.
pub fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: snapshots are complete when they get their manifest and are not changed after; whoever cuts one in use
    // ends the reader by SIGBUS, and no memory of it is misread. The bytes are never taken for anything but bytes.
    unsafe { Mmap::map(file) }
}

/// Which pages of a file are in the kernel's cache, one byte each: not 0 if it is (mincore(2)).
pub fn resident(file: &File) -> io::Result<Vec<u8>> {
    let map = map(file)?;
    let mut pages = vec![0u8; map.len().div_ceil(4096)];
    // SAFETY: the range is the mapping's own, and there is a byte for each of its pages.
    let r = unsafe {
        libc::mincore(
            map.as_ptr().cast_mut().cast(),
            map.len(),
            pages.as_mut_ptr(),
        )
    };
    if r != 0 {
        return Err(io::Error::last_os_error());
    }
    pages.iter_mut().for_each(|p| *p &= 1);
    Ok(pages)
}
