//! PAGEMAP_SCAN: which pages of a process are there.

use std::fs::File;
use std::os::fd::AsRawFd;

/// The page is under no userfaultfd write protection.
pub const WRITTEN: u64 = 1 << 1;
/// The page is a file's (or shared).
pub const FILE: u64 = 1 << 2;
/// In memory.
pub const PRESENT: u64 = 1 << 3;
/// Swapped out (or another entry that is no page).
pub const SWAPPED: u64 = 1 << 4;
/// The kernel's page of zeroes.
pub const ZERO: u64 = 1 << 5;
/// Mapped as a huge page.
pub const HUGE: u64 = 1 << 6;
/// A guard (MADV_GUARD_INSTALL).
pub const GUARD: u64 = 1 << 8;

/// `struct page_region`: pages in a row that are alike.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// What holds for all of them.
    pub categories: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    inverted: u64,
    mask: u64,
    anyof: u64,
    returned: u64,
}

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;

mod raw {
    nix::ioctl_readwrite!(scan, b'f', 16, super::ScanArg);
}

/// `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens that of a process.
    pub fn open(pid: i32) -> std::io::Result<Self> {
        Ok(Self(File::open(format!("/proc/{pid}/pagemap"))?))
    }

    /// Calls `found` with the regions of `start..end` whose pages have one of the categories `anyof` and none of `not`.
    pub fn scan(
        &self,
        start: u64,
        end: u64,
        anyof: u64,
        not: u64,
        found: impl FnMut(Region),
    ) -> nix::Result<()> {
        let arg = ScanArg {
            inverted: not,
            mask: not,
            anyof,
            returned: ZERO | HUGE | GUARD | FILE | PRESENT,
            ..ScanArg::default()
        };
        self.walk((start, end), arg, found)
    }

    /// Calls `found` with the regions of `start..end` that were written since they were last protected, and protects
    /// them again: each write is in the answer of this call or of the next one. All of the range must be registered with
    /// a userfaultfd that has UFFD_FEATURE_WP_ASYNC.
    pub fn take_written(&self, start: u64, end: u64, found: impl FnMut(Region)) -> nix::Result<()> {
        // The kernel has a way for just this question that takes a tenth of the time (`pagemap_scan_pmd_entry`).
        let arg = ScanArg {
            flags: WP_MATCHING | CHECK_WPASYNC,
            mask: WRITTEN,
            returned: WRITTEN,
            ..ScanArg::default()
        };
        self.walk((start, end), arg, found)
    }

    fn walk(
        &self,
        (start, end): (u64, u64),
        question: ScanArg,
        mut found: impl FnMut(Region),
    ) -> nix::Result<()> {
        let mut regions = [Region::default(); 128];
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                ..question
            };
            // SAFETY: `arg` has the layout of `struct pm_scan_arg`, and the kernel writes at most `vec_len` regions to
            // `regions`, which lives until after the call.
            let n = unsafe { raw::scan(self.0.as_raw_fd(), &raw mut arg) }?;
            for r in &regions[..(n as usize).min(regions.len())] {
                let (s, e) = (r.start.max(at), r.end.min(end));
                if s < e {
                    found(Region {
                        start: s,
                        end: e,
                        ..*r
                    });
                }
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_of_a_mapping_are_told_apart() {
        let mut m = memmap2::MmapMut::map_anon(16 * 4096).unwrap();
        m[3 * 4096] = 1;
        m[4 * 4096] = 1;
        std::hint::black_box(m[9 * 4096]);
        let start = m.as_ptr() as u64;
        let map = Pagemap::open(std::process::id() as i32).unwrap();
        let mut seen = Vec::new();
        let end = start + m.len() as u64;
        map.scan(start, end, PRESENT | SWAPPED, FILE, |r| {
            for a in (r.start..r.end).step_by(4096) {
                seen.push(((a - start) / 4096, r.categories & ZERO != 0));
            }
        })
        .unwrap();
        assert_eq!(seen, [(3, false), (4, false), (9, true)]);
    }
}
