//! System V shared memory.

use nix::errno::Errno;

/// A segment's bit: it goes away when nobody has it attached any more.
pub const DESTROYED: u32 = 0o1000;

/// What the kernel says of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its key; 0 is private.
    pub key: i32,
    /// Permissions, and [`DESTROYED`].
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// How many have it attached.
    pub attached: u64,
}

fn stat(id: i32) -> Result<libc::shmid_ds, Errno> {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut s: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives through the call.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut s) })?;
    Ok(s)
}

/// The segment of a number.
pub fn segment(id: i32) -> Result<Segment, Errno> {
    let s = stat(id)?;
    Ok(Segment {
        key: s.shm_perm.__key,
        mode: u32::from(s.shm_perm.mode),
        size: s.shm_segsz as u64,
        attached: s.shm_nattch,
    })
}

/// Makes a segment, under the next number that is free from `id` on.
pub fn create(id: i32, key: i32, size: u64, mode: u32) -> Result<i32, Errno> {
    // Only with checkpoint support in the kernel; without, the number shows that it did not work.
    let _ = std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string());
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32;
    let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::shmget(key, size, flags) })
}

/// Gives a segment to a user and a group.
pub fn give(id: i32, uid: u32, gid: u32) -> Result<(), Errno> {
    let mut s = stat(id)?;
    s.shm_perm.uid = uid;
    s.shm_perm.gid = gid;
    // SAFETY: the structure lives through the call.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut s) }).map(drop)
}

/// Lets a segment go when nobody has it attached any more.
pub fn remove(id: i32) -> Result<(), Errno> {
    // SAFETY: this command takes no structure.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// Attaches a segment for the time of the call, which gets its bytes (whole pages).
pub fn with<T>(id: i32, run: impl FnOnce(&mut [u8]) -> T) -> Result<T, Errno> {
    let len = segment(id)?.size.next_multiple_of(4096);
    let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel chooses the place.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at as isize == -1 {
        return Err(Errno::last());
    }
    // SAFETY: the segment's pages are mapped from `at` on until it is detached below; a segment cannot shrink. Nobody else
    // has attached it who would write now: it is new, or nobody's.
    let result = run(unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), len) });
    // SAFETY: nothing refers to it any more.
    unsafe { libc::shmdt(at) };
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_made_under_its_number_and_filled() {
        let probe = create(0x7000, libc::IPC_PRIVATE, 56, 0o600).unwrap();
        remove(probe).unwrap();
        let id = create(probe, libc::IPC_PRIVATE, 56, 0o640).unwrap();
        with(id, |b| b[..4].copy_from_slice(b"text")).unwrap();
        let seen = with(id, |b| (b.len(), b[..4].to_vec())).unwrap();
        let s = segment(id).unwrap();
        remove(id).unwrap();
        assert_eq!(id, probe);
        assert_eq!(seen, (4096, b"text".to_vec()));
        assert_eq!((s.size, s.mode, s.attached), (56, 0o640, 0));
        assert!(segment(id).is_err());
    }
}
