//! Reading another process's memory.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

const PAGE: usize = 4096;

/// A process whose memory is read.
#[derive(Debug)]
pub struct ProcMem {
    pid: Pid,
    mem: File,
}

impl ProcMem {
    /// Opens `/proc/PID/mem`, which also reads what the process itself may not (PROT_NONE).
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid: Pid::from_raw(pid),
            mem: File::open(format!("/proc/{pid}/mem"))?,
        })
    }

    /// Reads the ranges (addresses) one behind the other into `buf`, which is as long as all of them; an error names the
    /// address of a page that cannot be read.
    pub fn gather(&self, ranges: &[Range<u64>], buf: &mut [u8]) -> Result<(), (u64, io::Error)> {
        let mut rest = &mut buf[..];
        for some in ranges.chunks(512) {
            let len: usize = some.iter().map(|r| (r.end - r.start) as usize).sum();
            let (now, later) = rest.split_at_mut(len);
            rest = later;
            let remote: Vec<RemoteIoVec> = some
                .iter()
                .map(|r| RemoteIoVec {
                    base: r.start as usize,
                    len: (r.end - r.start) as usize,
                })
                .collect();
            if process_vm_readv(self.pid, &mut [IoSliceMut::new(now)], &remote) == Ok(len) {
                continue;
            }
            let mut at = 0;
            for address in some.iter().flat_map(|r| (r.start..r.end).step_by(PAGE)) {
                self.mem
                    .read_exact_at(&mut now[at..at + PAGE], address)
                    .map_err(|e| (address, e))?;
                at += PAGE;
            }
        }
        Ok(())
    }

    /// Reads `runs` (offsets from `base`) to the same offsets of `buf`. Pages that cannot be read are given to
    /// `failed` with the reason, and left as they are in `buf`.
    pub fn read(
        &self,
        base: u64,
        runs: impl Iterator<Item = Range<usize>>,
        buf: &mut [u8],
        mut failed: impl FnMut(usize, io::Error),
    ) {
        let mut runs = runs.peekable();
        let mut batch: Vec<Range<usize>> = Vec::new();
        while runs.peek().is_some() {
            batch.clear();
            batch.extend(runs.by_ref().take(512));
            let mut done = self.read_batch(base, &batch, buf).unwrap_or(0);
            for run in &batch {
                let n = done.min(run.len());
                done -= n;
                // The call stops at the first page that it cannot read.
                let rest = run.start + n / PAGE * PAGE..run.end;
                for at in rest.step_by(PAGE) {
                    if let Err(e) = self
                        .mem
                        .read_exact_at(&mut buf[at..at + PAGE], base + at as u64)
                    {
                        failed(at, e);
                    }
                }
            }
        }
    }

    fn read_batch(&self, base: u64, runs: &[Range<usize>], buf: &mut [u8]) -> nix::Result<usize> {
        let remote: Vec<_> = runs
            .iter()
            .map(|r| RemoteIoVec {
                base: (base as usize) + r.start,
                len: r.len(),
            })
            .collect();
        let mut local = Vec::with_capacity(runs.len());
        let (mut rest, mut at) = (buf, 0);
        for r in runs {
            let (_, tail) = rest.split_at_mut(r.start - at);
            let (piece, tail) = tail.split_at_mut(r.len());
            local.push(IoSliceMut::new(piece));
            (rest, at) = (tail, r.end);
        }
        process_vm_readv(self.pid, &mut local, &remote)
    }
}
