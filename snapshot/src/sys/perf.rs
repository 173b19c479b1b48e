//! The kernel's record of mappings that are made (perf_event_open(2), PERF_RECORD_MMAP2): of all processes, as those of
//! a machine come and go.

use nix::errno::Errno;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;
/// Pages of records for each processor; some ten thousands of records. A guest makes a mapping for nearly every page that a
/// process touches, and all that the host starts makes some, too: on a busy host 512 KiB are full in less than a second.
const RING: usize = 1024;
/// More than any record takes, with the one about lost ones before it: the longest path, and some words.
const LONGEST: u64 = 8192;
const TYPE_SOFTWARE: u64 = 1;
const COUNT_DUMMY: u64 = 9;
const RECORD_LOST: u32 = 2;
const RECORD_MMAP2: u32 = 10;
/// Offsets in `struct perf_event_mmap_page`.
const HEAD: usize = 1024;
const TAIL: usize = 1032;
/// Bits of `struct perf_event_attr`: mmap, mmap_data, sample_id_all, mmap2, use_clockid.
const FLAGS: u64 = 1 << 8 | 1 << 17 | 1 << 18 | 1 << 23 | 1 << 25;
/// `PERF_SAMPLE_TIME`: with sample_id_all the last word of each record.
const TIME: u64 = 1 << 2;

/// A mapping that was made, or whose protection was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The process, as the recorder sees it.
    pub pid: i32,
    /// Address.
    pub start: u64,
    /// Device of the file.
    pub dev: u64,
    /// Inode of the file.
    pub ino: u64,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// PROT_ bits.
    pub prot: u32,
    /// MAP_SHARED; else private.
    pub shared: bool,
    /// When, by CLOCK_MONOTONIC: records of one process may be in the rings of several processors.
    pub time: u64,
}

/// What was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// A mapping.
    Mapping(Mapping),
    /// The kernel had no room for some.
    Lost,
}

/// Rings of records, one for each processor.
#[derive(Debug)]
pub struct Mappings(Vec<Ring>);

#[derive(Debug)]
struct Ring {
    base: usize,
    _event: OwnedFd,
}

impl Mappings {
    /// Starts recording. Needs CAP_PERFMON.
    pub fn record() -> Result<Self, Errno> {
        let text = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let mut rings = Vec::new();
        for cpu in processors(&text) {
            match Ring::open(cpu) {
                Ok(ring) => rings.push(ring),
                // It was taken out meanwhile.
                Err(Errno::ENODEV) => {}
                Err(e) => return Err(e),
            }
        }
        if rings.is_empty() {
            return Err(Errno::ENODEV);
        }
        Ok(Self(rings))
    }

    /// Calls `found` with what was recorded since the last time.
    pub fn read(&self, mut found: impl FnMut(Record)) {
        for ring in &self.0 {
            ring.read(&mut found);
        }
    }
}

/// `0-3,5`.
fn processors(text: &str) -> Vec<i32> {
    let mut all = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) {
            all.extend(first..=last);
        }
    }
    all
}

/// perf_event_open(2): `attr` is `struct perf_event_attr` (include/uapi/linux/perf_event.h) without its size; of one thread
/// or of all (-1), on one processor or on all (-1).
pub(super) fn open(mut attr: [u64; 16], tid: i32, cpu: i32) -> Result<OwnedFd, Errno> {
    const CLOEXEC: u64 = 8;
    attr[0] |= (size_of_val(&attr) as u64) << 32;
    // SAFETY: the kernel reads `attr`, whose size it is told, and gives a new descriptor.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attr.as_ptr(),
            tid,
            cpu,
            -1,
            CLOEXEC,
        )
    };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

impl Ring {
    fn open(cpu: i32) -> Result<Self, Errno> {
        // type, size; config; period, what is in a record; flags; the clock, behind sample_stack_user.
        let mut attr = [0u64; 16];
        attr[0] = TYPE_SOFTWARE;
        attr[1] = COUNT_DUMMY;
        attr[3] = TIME;
        attr[5] = FLAGS;
        attr[11] = (libc::CLOCK_MONOTONIC as u64) << 32;
        let event = open(attr, -1, cpu)?;
        // SAFETY: a new mapping, which is only used through `Ring`.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (1 + RING) * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self {
            base: base as usize,
            _event: event,
        })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: both offsets are aligned and inside the first page, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr((self.base + at) as *mut u64) }
    }

    /// Copies bytes out of the ring, from a position that counts up for ever.
    fn copy(&self, at: u64, out: &mut [u8]) {
        let len = RING * PAGE;
        for (i, byte) in out.iter_mut().enumerate() {
            let place = (at as usize + i) % len;
            // SAFETY: inside the data pages; the kernel does not write between tail and head.
            *byte = unsafe { ((self.base + PAGE + place) as *const u8).read_volatile() };
        }
    }

    fn read(&self, found: &mut impl FnMut(Record)) {
        let head = self.word(HEAD).load(Ordering::Acquire);
        let tail = self.word(TAIL).load(Ordering::Relaxed);
        // That there was no room for some the kernel tells with the next one for which there is room, which may never come:
        // a ring without room for one more may have lost some.
        if head - tail > (RING * PAGE) as u64 - LONGEST {
            found(Record::Lost);
        }
        walk(tail..head, |at, out| self.copy(at, out), found);
        self.word(TAIL).store(head, Ordering::Release);
    }
}

/// Calls `found` with the records in a piece of a ring, whose bytes `copy` gives.
pub fn walk(
    piece: std::ops::Range<u64>,
    copy: impl Fn(u64, &mut [u8]),
    found: &mut impl FnMut(Record),
) {
    let mut at = piece.start;
    while at < piece.end {
        let mut start = [0; 8];
        copy(at, &mut start);
        let kind = u32::from_ne_bytes([start[0], start[1], start[2], start[3]]);
        let size = u64::from(u16::from_ne_bytes([start[6], start[7]]));
        if size < 8 || size > piece.end - at {
            // It cannot be, and nothing behind it can be told apart.
            return found(Record::Lost);
        }
        if kind == RECORD_LOST {
            found(Record::Lost);
        } else if kind == RECORD_MMAP2 {
            let (mut body, mut time) = ([0; 72], [0; 8]);
            copy(at, &mut body);
            copy(at + size - 8, &mut time);
            found(parse(&body, u64::from_ne_bytes(time)));
        }
        at += size;
    }
}

/// header, pid, tid, addr, len, pgoff (bytes), major, minor, inode, generation, protection, flags.
fn parse(body: &[u8; 72], time: u64) -> Record {
    let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap_or_default());
    let half = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap_or_default());
    Record::Mapping(Mapping {
        pid: word(8) as u32 as i32,
        start: word(16),
        len: word(24),
        offset: word(32),
        dev: libc::makedev(half(40), half(44)),
        ino: word(48),
        prot: half(64),
        shared: half(68) & libc::MAP_SHARED as u32 != 0,
        time,
    })
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.base as *mut c_void, (1 + RING) * PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(processors("0-1\n"), [0, 1]);
        assert_eq!(processors("0,2-3"), [0, 2, 3]);
        assert!(processors("").is_empty());
    }

    #[test]
    fn a_full_ring_tells_that_some_are_lost() {
        let record = match Mappings::record() {
            Ok(record) => record,
            Err(e) => panic!("recording needs CAP_PERFMON: {e}"),
        };
        // All on one processor, and all of the same length: none is small enough for what is left of the room.
        for _ in 0..RING * PAGE / 32 {
            drop(memmap2::MmapOptions::new().len(PAGE).map_anon().unwrap());
        }
        let mut lost = false;
        record.read(|r| lost |= r == Record::Lost);
        assert!(lost);
    }

    #[test]
    fn a_mapping_is_recorded_with_its_file_and_place() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * 4096).unwrap();
        let of = file.metadata().unwrap();
        let ino = of.ino();
        let now = || {
            let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
            t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
        };
        let begun = now();
        let record = match Mappings::record() {
            Ok(record) => record,
            Err(e) => panic!("recording needs CAP_PERFMON: {e}"),
        };
        let map = {
            let mut options = memmap2::MmapOptions::new();
            options.offset(8192).len(4096);
            // SAFETY: nobody else has the file.
            unsafe { options.map_mut(&file) }.unwrap()
        };
        drop(map);
        let mut seen = Vec::new();
        record.read(|r| {
            if let Record::Mapping(m) = r
                && m.ino == ino
            {
                seen.push(m);
            }
        });
        let (start, time) = seen.first().map_or((0, 0), |m: &Mapping| (m.start, m.time));
        assert!(start > 0);
        assert!((begun..now()).contains(&time));
        let want = Mapping {
            pid: std::process::id() as i32,
            start,
            dev: of.dev(),
            ino,
            offset: 8192,
            len: 4096,
            prot: 3,
            shared: true,
            time,
        };
        assert_eq!(seen, [want]);
    }
}
