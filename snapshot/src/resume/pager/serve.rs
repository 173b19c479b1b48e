//! Answering faults and filling the rest.

use super::super::memory::TOP;
use super::super::source::{BLOCK, PAGE, PageSource, pieces};
use super::state::Owed;
use crate::sys::fill::{self, Event, Filled};
use crate::sys::log::Log;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::Duration;

/// Filled around a fault before its thread goes on.
const WINDOW: u64 = 64 << 10;
/// Filled in the background before faults are looked for again.
const CHUNK: u64 = 256 << 10;

/// The memory of one process.
struct Memory {
    fd: i32,
    space: u32,
    blocks: Rc<Vec<u64>>,
    owed: Owed,
    /// Where the background has come to.
    cursor: u64,
    gone: bool,
}

/// Why a filling was not finished.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// Events must be read first.
    Changing,
    /// The process is gone.
    Gone,
}

/// All that a pager knows.
pub struct Pager<'a> {
    log: &'a Log,
    source: &'a dyn PageSource,
    memories: Vec<Memory>,
    /// The next entry of the log.
    next: usize,
    faults: VecDeque<(usize, u64)>,
    buffer: Vec<u8>,
}

impl<'a> Pager<'a> {
    /// From the descriptors that there were at first, and the log.
    pub fn new(
        log: &'a Log,
        source: &'a dyn PageSource,
        first: &[(u32, i32)],
        ranges: impl Fn(u32) -> Vec<(u64, u64)>,
    ) -> Pager<'a> {
        let memories = first.iter().map(|&(space, fd)| Memory {
            fd,
            space,
            blocks: Rc::new(source.blocks(space)),
            owed: Owed::new(&ranges(space)),
            cursor: 0,
            gone: false,
        });
        let mut pager = Pager {
            log,
            source,
            memories: memories.collect(),
            next: 0,
            faults: VecDeque::new(),
            buffer: vec![0; CHUNK as usize],
        };
        while pager.next < log.capacity() {
            let (owner, message) = log.get(pager.next);
            match fill::decode(&message) {
                // A fault does not stay: its thread is woken, and faults again.
                None | Some(Event::Fault(_)) => break,
                Some(event) => pager.apply(owner as usize, event),
            }
            pager.next += 1;
        }
        pager
    }

    /// Threads whose faults a dead pager had taken try again.
    pub fn take_over(&self) {
        let start = 1 << 20;
        for m in &self.memories {
            let _ = fill::wake(fd(m.fd), start, TOP - start);
        }
    }

    fn apply(&mut self, owner: usize, event: Event) {
        let Some(m) = self.memories.get_mut(owner) else {
            return;
        };
        m.owed.apply(event);
        match event {
            Event::Remap(_, to, _) => m.cursor = m.cursor.min(to),
            Event::Fork(fd) => {
                let child = Memory {
                    fd,
                    space: m.space,
                    blocks: m.blocks.clone(),
                    owed: m.owed.clone(),
                    cursor: 0,
                    gone: false,
                };
                self.memories.push(child);
            }
            _ => {}
        }
    }

    /// Takes all messages there are; whether there were any.
    fn drain(&mut self) -> bool {
        let mut any = false;
        let mut i = 0;
        while i < self.memories.len() {
            while !self.memories[i].gone && self.next < self.log.capacity() {
                let read = self.log.read(self.next, self.memories[i].fd, i as u32);
                let Ok(message) = read else {
                    break;
                };
                any = true;
                match fill::decode(&message) {
                    Some(Event::Fault(addr)) => self.faults.push_back((i, addr)),
                    Some(event) => {
                        self.apply(i, event);
                        self.next += 1;
                    }
                    None => {}
                }
            }
            i += 1;
        }
        any
    }

    /// One round; false when all is filled.
    pub fn step(&mut self) -> bool {
        let mut any = self.drain();
        for _ in 0..self.faults.len() {
            let Some((i, addr)) = self.faults.pop_front() else {
                break;
            };
            any = true;
            match self.fault(i, addr) {
                Ok(()) => {}
                Err(Stop::Gone) => self.memories[i].gone = true,
                Err(Stop::Changing) => {
                    self.faults.push_back((i, addr));
                    self.drain();
                }
            }
        }
        // The newest first: a child that was just forked waits for more than its parent.
        for i in (0..self.memories.len()).rev() {
            match self.background(i) {
                Ok(false) => {}
                Ok(true) | Err(Stop::Changing) => return true,
                Err(Stop::Gone) => self.memories[i].gone = true,
            }
        }
        any || !self.faults.is_empty()
    }

    fn fault(&mut self, i: usize, addr: u64) -> Result<(), Stop> {
        let m = &self.memories[i];
        let (uffd, space) = (m.fd, m.space);
        let mut zero = PAGE;
        if let Some((start, end, was)) = m.owed.piece(addr) {
            let from = (addr & !(WINDOW - 1)).max(start);
            let to = ((addr & !(WINDOW - 1)) + WINDOW).min(end);
            self.fill(i, from, to, was + (from - start))?;
            // From here to the next page that is in the snapshot.
            let rest = was + (addr - start);
            let next = pieces(self.source, space, rest, was + (to - start));
            zero = next.first().map_or(to - addr, |n| n.0 - rest);
        }
        if zero > 0 {
            // A piece may end at the end of a mapping: the page alone is what must be there.
            for len in [zero, PAGE] {
                match fill::zero(fd(uffd), addr, len) {
                    Ok(Filled::Changing) => return Err(Stop::Changing),
                    Ok(Filled::Gone) => return Err(Stop::Gone),
                    Ok(Filled::Nothing) => {}
                    _ => break,
                }
            }
        }
        let _ = fill::wake(fd(uffd), addr, PAGE);
        Ok(())
    }

    /// Fills one chunk; false if nothing is left.
    fn background(&mut self, i: usize) -> Result<bool, Stop> {
        loop {
            let m = &mut self.memories[i];
            if m.gone {
                return Ok(false);
            }
            let Some((start, end, was)) = m.owed.next(m.cursor) else {
                return Ok(false);
            };
            let from = m.cursor.max(start);
            let at = was + (from - start);
            let n = m.blocks.partition_point(|&b| b < at / BLOCK);
            let Some(&block) = m.blocks.get(n) else {
                m.cursor = end;
                continue;
            };
            let skip = (block * BLOCK).saturating_sub(at);
            if skip >= end - from {
                m.cursor = end;
                continue;
            }
            let from = from + skip;
            let to = ((from & !(CHUNK - 1)) + CHUNK).min(end);
            self.fill(i, from, to, was + (from - start))?;
            self.memories[i].cursor = to;
            return Ok(true);
        }
    }

    /// Fills `[from, to)` from the snapshot's pages at `was`.
    fn fill(&mut self, i: usize, from: u64, to: u64, was: u64) -> Result<(), Stop> {
        let (uffd, space) = (self.memories[i].fd, self.memories[i].space);
        for (at, len, layer, offset) in pieces(self.source, space, was, was + (to - from)) {
            let mut done = 0;
            while done < len {
                let n = (len - done).min(CHUNK) as usize;
                read(self.source, layer, offset + done, &mut self.buffer[..n]);
                put(fd(uffd), from + (at - was) + done, &self.buffer[..n])?;
                done += n as u64;
            }
        }
        Ok(())
    }
}

/// Copies what is not there yet, skipping what is no longer mapped.
fn put(uffd: BorrowedFd<'_>, to: u64, bytes: &[u8]) -> Result<(), Stop> {
    let mut done = 0;
    let mut most = bytes.len();
    while done < bytes.len() {
        let n = most.min(bytes.len() - done);
        match fill::copy(uffd, to + done as u64, &bytes[done..done + n]) {
            Ok(Filled::Bytes(0)) | Err(_) => std::thread::sleep(Duration::from_millis(1)),
            Ok(Filled::Bytes(b)) => done += b as usize,
            Ok(Filled::There) => done += PAGE as usize,
            Ok(Filled::Changing) => return Err(Stop::Changing),
            Ok(Filled::Gone) => return Err(Stop::Gone),
            // A copy must lie in one mapping: in smaller parts up to its end.
            Ok(Filled::Nothing) if n > PAGE as usize => {
                most = (n / 2).next_multiple_of(PAGE as usize)
            }
            Ok(Filled::Nothing) => done += PAGE as usize,
        }
    }
    Ok(())
}

/// Reads pages. If the disk fails there is nothing right to give: the process waits until it does not.
fn read(source: &dyn PageSource, layer: u32, offset: u64, into: &mut [u8]) {
    let files = source.files();
    let mut done = 0;
    while done < into.len() {
        let r = files.get(layer as usize).map_or(Err(Errno::EBADF), |f| {
            nix::sys::uio::pread(f.as_fd(), &mut into[done..], (offset + done as u64) as i64)
        });
        match r {
            Ok(n) if n > 0 => done += n,
            Err(Errno::EINTR) => {}
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn fd(number: i32) -> BorrowedFd<'static> {
    crate::sys::clone::borrow(number)
}
