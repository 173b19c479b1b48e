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
