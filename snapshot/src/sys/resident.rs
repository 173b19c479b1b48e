//! This program's own code in memory.

use crate::proc::{self, MapKind};

/// Reads in the code of this program and of its libraries: a thread that others wait on must not wait for a disk to give it
/// its next instruction. What cannot be read in comes when it is needed, as always.
pub fn code() {
    let me = std::process::id().cast_signed();
    for map in proc::maps(me).unwrap_or_default() {
        if map.prot & libc::PROT_EXEC != 0 && matches!(map.kind, MapKind::File { .. }) {
            let length = (map.end - map.start) as usize;
            // SAFETY: the call changes nothing that can be seen; an address that is no longer mapped is an error.
            unsafe { libc::madvise(map.start as *mut _, length, libc::MADV_POPULATE_READ) };
        }
    }
}
