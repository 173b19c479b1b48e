//! A machine's memory, copied while it runs.
//!
//! Main's mappings are under a userfaultfd that notes writes without making anyone wait. User processes map the same
//! memory and cannot be tracked so; whatever one of them could write since it was last looked at counts as written if it
//! has run since. What was mapped and unmapped between two looks is in the kernel's record of new mappings.

use super::layout::{self, Memory};
use super::manifest::Piece;
use super::users::{self, Known, Stamp, Users};
use super::{Error, PAGE, image};
use crate::proc::{self, Map, MapKind};
use crate::sparse;
use crate::sys::mapfile;
use crate::sys::pagemap::{FILE, PRESENT, Pagemap, Region, SWAPPED};
use crate::sys::perf::{Mapping, Mappings, Record};
use crate::sys::procmem::ProcMem;
use crate::sys::uffd::{Uffd, WP};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Room for what is read in the stop is made for so many bytes at most.
const ROOM_MOST: u64 = 512 << 20;
/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// A set of pages of the guest's memory.
#[derive(Debug, Clone)]
pub struct Pages(Vec<u64>);

impl Pages {
    fn new(len: u64) -> Self {
        Self(vec![0; (len / PAGE).div_ceil(64) as usize])
    }

    /// Adds pages `first` to one before `end`; those past the memory's end are none.
    fn add(&mut self, first: u64, end: u64) {
        for page in first..end.min(self.0.len() as u64 * 64) {
            self.0[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Adds what a process could write to.
    fn add_user(&mut self, k: &Known) {
        k.space.pieces().for_each(|p| self.add_piece(&p));
    }

    fn add_piece(&mut self, p: &Piece) {
        if p.shared && p.prot & libc::PROT_WRITE != 0 {
            let (first, end) = layout::pages(p);
            self.add(first, end);
        }
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Runs of pages: first, and one past the last.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        for (i, &word) in self.0.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                let bit = u64::from(rest.trailing_zeros());
                rest &= rest - 1;
                let page = i as u64 * 64 + bit;
                match out.last_mut() {
                    Some(last) if last.1 == page => last.1 += 1,
                    _ => out.push((page, page + 1)),
                }
            }
        }
        out
    }
}

/// A mapping of main that is tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tracked {
    start: u64,
    end: u64,
    /// Where in the guest's memory; none for main's own memory.
    offset: Option<u64>,
}

impl Tracked {
    fn pages(&self) -> Option<(u64, u64)> {
        let at = self.offset?;
        Some((at / PAGE, (at + self.end - self.start) / PAGE))
    }
}

/// What was written, as found by [`Tracker::look`].
#[derive(Debug)]
pub struct Written {
    /// Of the guest's memory.
    pub pages: Pages,
    /// Of main's own: address ranges.
    pub own: Vec<(u64, u64)>,
}

/// Mappings that were made since the last look: main's and others', which may be gone again.
#[derive(Debug)]
struct Made {
    /// What of the guest's memory was mapped for writing.
    pages: Pages,
    /// What main has mapped: under no protection, though it may look like what was there before.
    main: Vec<(u64, u64)>,
}

impl Made {
    fn new(len: u64) -> Self {
        Self {
            pages: Pages::new(len),
            main: Vec::new(),
        }
    }
}

/// Content that was read in the stop, to be written after it.
#[derive(Debug, Default)]
pub struct Stash {
    pages: Vec<(u64, u64)>,
    bytes: Vec<u8>,
}

/// The memory of a machine that is being captured.
#[derive(Debug)]
pub struct Tracker<'a> {
    main: i32,
    memory: &'a Memory,
    out: &'a File,
    /// None when everything is copied in the stop.
    uffd: Option<Arc<Uffd>>,
    pagemap: Pagemap,
    own_memory: ProcMem,
    mappings: Option<Mappings>,
    made: Made,
    /// What user processes have mapped since each was last looked at; of those that are followed, by number.
    followed: HashMap<i32, Vec<Mapping>>,
    tracked: Vec<Tracked>,
    /// User processes as of the last look.
    pub users: Users,
    /// Main's own pages, by address.
    pub own: BTreeMap<u64, Vec<u8>>,
    /// Room for what is read in the stop, warm.
    room: Vec<u8>,
}

fn sys(what: &'static str) -> impl Fn(nix::errno::Errno) -> Error {
    move |e| Error::Sys(what, e)
}

/// Whether what is written to a mapping of main is main's own.
pub fn is_own(m: &Map) -> bool {
    !m.shared && !matches!(m.kind, MapKind::Special(_))
}

impl<'a> Tracker<'a> {
    /// Puts main's mappings under protection, and starts to record new ones.
    pub fn new(
        main: i32,
        memory: &'a Memory,
        uffd: Option<Arc<Uffd>>,
        out: &'a File,
        maps: &[Map],
    ) -> Result<Self, Error> {
        let mappings = match uffd {
            Some(_) => Some(Mappings::record().map_err(sys("perf_event_open"))?),
            None => None,
        };
        let io = |what| move |e: std::io::Error| Error::Io(proc::path(main, what), "open", e);
        let mut tracker = Self {
            main,
            memory,
            out,
            uffd,
            pagemap: Pagemap::open(main).map_err(io("pagemap"))?,
            own_memory: ProcMem::open(main).map_err(io("mem"))?,
            mappings,
            made: Made::new(memory.len),
            followed: HashMap::new(),
            tracked: Vec::new(),
            users: Users::new(),
            own: BTreeMap::new(),
            room: vec![1; 8 << 20],
        };
        for m in maps.iter().filter(|m| memory.is(m) || is_own(m)) {
            let t = tracked(memory, m);
            tracker.track(t)?;
        }
        tracker.look_at_users(&mut Pages::new(memory.len))?;
        Ok(tracker)
    }

    fn track(&mut self, t: Tracked) -> Result<(), Error> {
        let Some(uffd) = &self.uffd else {
            return Ok(());
        };
        let len = t.end - t.start;
        uffd.register(t.start, len, WP)
            .and_then(|()| uffd.protect(t.start, len))
            .map_err(sys("userfaultfd on the guest's memory"))?;
        self.tracked.push(t);
        Ok(())
    }

    /// Copies everything.
    pub fn copy_all(&mut self, maps: &[Map]) -> Result<u64, Error> {
        let mut bytes = 0;
        let mut at = 0;
        let mut pages = Pages::new(self.memory.len);
        while at < self.memory.len {
            let next = sparse::next(&self.memory.file, at, self.memory.len);
            let Some((start, end)) = next.map_err(sys("SEEK_DATA"))? else {
                break;
            };
            pages.add(start / PAGE, end.div_ceil(PAGE));
            at = end;
        }
        let served = self.memory.is_served();
        if served {
            // Who serves the file knows what it has brought and what the kernel has given back, and not what it has yet.
            let resident = mapfile::resident(&self.memory.file)
                .map_err(|e| Error::Sys("mincore", image::errno_of(&e)))?;
            for (page, _) in resident.iter().enumerate().filter(|r| *r.1 != 0) {
                pages.add(page as u64, page as u64 + 1);
            }
        }
        for (first, end) in pages.runs() {
            bytes += self.copy_run(first, end, true)?;
        }
        if served {
            // What no process of the machine has touched need not stay in memory for our reading it.
            let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            let _ = nix::fcntl::posix_fadvise(&self.memory.file, 0, 0, advice);
        }
        let own = self.own_now(maps)?;
        bytes += self.read_own(&own)?;
        Ok(bytes)
    }

    /// Main's own pages that are there: address ranges.
    pub fn own_now(&self, maps: &[Map]) -> Result<Vec<(u64, u64)>, Error> {
        let mut found = Vec::new();
        for m in maps.iter().filter(|m| is_own(m)) {
            self.pagemap
                .scan(m.start, m.end, PRESENT | SWAPPED, FILE, |r| {
                    found.push((r.start, r.end));
                })
                .map_err(sys("PAGEMAP_SCAN"))?;
        }
        Ok(found)
    }

    /// Finds what was written since the last look, and takes note of mappings that changed. In the stop nothing new is
    /// put under protection.
    pub fn look(&mut self, maps: &[Map], stopped: bool) -> Result<Written, Error> {
        self.note_made();
        let made = std::mem::replace(&mut self.made, Made::new(self.memory.len));
        let (mut pages, mut own) = (made.pages, Vec::new());
        if self.mappings.is_some() {
            self.look_at_main(maps, stopped, &made.main, &mut pages, &mut own)?;
        }
        self.look_at_users(&mut pages)?;
        #[cfg(debug_assertions)]
        if stopped {
            self.prove_users()?;
        }
        Ok(Written { pages, own })
    }

    /// Empties the kernel's record of new mappings, which has room for tens of thousands: a guest that starts programs fills
    /// it in less time than a copy of its memory takes.
    fn note_made(&mut self) {
        let Some(mappings) = &self.mappings else {
            return;
        };
        let (ino, all) = (self.memory.id.1, self.memory.len / PAGE);
        let (main, made, followed) = (self.main, &mut self.made, &mut self.followed);
        mappings.read(|r| match r {
            Record::Mapping(m) => {
                if m.ino == ino && m.prot & libc::PROT_WRITE as u32 != 0 {
                    let end = (m.offset + m.len).div_ceil(PAGE);
                    made.pages.add(m.offset / PAGE, end);
                }
                if m.pid == main {
                    made.main.push((m.start, m.start + m.len));
                }
                if let Some(list) = followed.get_mut(&m.pid) {
                    list.push(m);
                }
            }
            Record::Lost => {
                // All of them are to be read anew.
                followed.clear();
                made.pages.add(0, all);
                made.main.push((0, u64::MAX));
            }
        });
    }

    fn look_at_main(
        &mut self,
        maps: &[Map],
        stopped: bool,
        mapped: &[(u64, u64)],
        pages: &mut Pages,
        own: &mut Vec<(u64, u64)>,
    ) -> Result<(), Error> {
        let before: HashMap<u64, Tracked> = self.tracked.iter().map(|t| (t.start, *t)).collect();
        // Runs of mappings that are still under protection, with nothing else between them: a scan costs some
        // microseconds however little it finds, and fails at what is under none.
        let mut runs: Vec<Vec<Tracked>> = vec![Vec::new()];
        let mut fresh = Vec::new();
        for m in maps {
            let wanted = self.memory.is(m) || is_own(m);
            let t = tracked(self.memory, m);
            let again = mapped.iter().any(|r| r.0 < m.end && m.start < r.1);
            match runs.last_mut() {
                Some(run) if wanted && !again && before.get(&t.start) == Some(&t) => run.push(t),
                _ => runs.push(Vec::new()),
            }
            if wanted && runs.last().is_some_and(Vec::is_empty) {
                fresh.push(t);
            }
        }
        let mut stay = Vec::with_capacity(self.tracked.len());
        for run in runs.iter().filter(|r| !r.is_empty()) {
            if self.scan(run, pages, own) {
                stay.extend_from_slice(run);
            } else {
                // What it found before it failed is protected anew, and not told: all may have been written.
                fresh.extend_from_slice(run);
            }
        }
        let known: HashSet<u64> = stay.iter().map(|t| t.start).collect();
        for t in self.tracked.iter().filter(|t| !known.contains(&t.start)) {
            // Unmapped, or mapped anew: anything may have been written before.
            if let Some((first, end)) = t.pages() {
                pages.add(first, end);
            }
        }
        self.tracked = stay;
        for t in fresh {
            match t.pages() {
                Some((first, end)) => pages.add(first, end),
                None => own.push((t.start, t.end)),
            }
            // It may be gone again by now; the next look sees to it.
            if !stopped && let Err(e) = self.track(t) {
                tracing::debug!("not tracked: {e}");
            }
        }
        self.tracked.sort_unstable_by_key(|t| t.start);
        Ok(())
    }

    /// Finds what was written in a run of mappings.
    fn scan(&self, run: &[Tracked], pages: &mut Pages, own: &mut Vec<(u64, u64)>) -> bool {
        let (start, end) = (run[0].start, run[run.len() - 1].end);
        let found = |r: Region| {
            let first = run.partition_point(|t| t.end <= r.start);
            for t in run[first..].iter().take_while(|t| t.start < r.end) {
                let (from, to) = (r.start.max(t.start), r.end.min(t.end));
                match t.offset {
                    Some(offset) => {
                        let at = offset + from - t.start;
                        pages.add(at / PAGE, (at + to - from) / PAGE);
                    }
                    None => own.push((from, to)),
                }
            }
        };
        self.pagemap.take_written(start, end, found).is_ok()
    }

    fn look_at_users(&mut self, pages: &mut Pages) -> Result<(), Error> {
        let mut before = std::mem::take(&mut self.users);
        for pid in proc::children(self.main)? {
            let old = before.remove(&pid);
            let Ok(ran) = proc::ran(pid) else {
                // It has ended: as below.
                before.extend(old.map(|o| (pid, o)));
                continue;
            };
            let now = match old {
                Some(old) if old.ran == ran => Some(old),
                old => self.look_at_user(pid, ran, old, pages),
            };
            self.users.extend(now.map(|known| (pid, known)));
        }
        before.values().for_each(|gone| pages.add_user(gone));
        let users = &self.users;
        self.followed.retain(|pid, _| users.contains_key(pid));
        Ok(())
    }

    /// A user process that has run, or is new.
    fn look_at_user(
        &mut self,
        pid: i32,
        ran: proc::Ran,
        old: Option<Known>,
        pages: &mut Pages,
    ) -> Option<Known> {
        old.iter().for_each(|old| pages.add_user(old));
        let now = match old.and_then(|old| self.follow(pid, old)) {
            Some(known) => Known { ran, ..known },
            None => self.read_user(pid)?,
        };
        pages.add_user(&now);
        Some(now)
    }

    /// Brings what is known of a user process up to date, if that can be done without reading it all.
    fn follow(&mut self, pid: i32, mut old: Known) -> Option<Known> {
        self.note_made();
        let made = std::mem::take(self.followed.get_mut(&pid)?);
        let now = Stamp::of(pid).ok()?;
        // What was made meanwhile may be in the stamp already, or not.
        (self.is_quiet(pid) && old.follow(made, now, self.memory)).then_some(old)
    }

    /// Reads all of a user process, and from then on has it followed.
    fn read_user(&mut self, pid: i32) -> Option<Known> {
        self.note_made();
        if self.mappings.is_some() {
            self.followed.insert(pid, Vec::new());
        }
        let before = Stamp::of(pid).ok()?;
        let mut known = Known::read(pid, self.main, self.memory)?;
        let same = self.is_quiet(pid) && Stamp::of(pid).is_ok_and(|after| before == after);
        known.stamp = same.then_some(before);
        Some(known)
    }

    /// Whether a user process is followed, and has mapped nothing since its record was taken.
    fn is_quiet(&mut self, pid: i32) -> bool {
        self.note_made();
        self.followed.get(&pid).is_some_and(Vec::is_empty)
    }

    /// Whether what is followed is what is there. All stand still.
    #[cfg(debug_assertions)]
    fn prove_users(&self) -> Result<(), Error> {
        for (&pid, known) in &self.users {
            let Ok(maps) = proc::maps(pid) else { continue };
            let there = users::Space::new(&maps, self.memory);
            if !there.pieces().eq(known.space.pieces()) {
                let why = "its mappings were not followed: please report this";
                return Err(Error::Foreign(pid, why.into()));
            }
        }
        Ok(())
    }

    /// Copies what was written to the snapshot.
    pub fn copy(&mut self, w: &Written) -> Result<u64, Error> {
        let mut bytes = self.read_own(&w.own)?;
        for (first, end) in w.pages.runs() {
            bytes += self.copy_run(first, end, false)?;
        }
        Ok(bytes)
    }

    fn copy_run(&mut self, first: u64, end: u64, fresh: bool) -> Result<u64, Error> {
        let io = |e| Error::Io("memory".into(), "copy", e);
        let (mut at, end) = (first * PAGE, (end * PAGE).min(self.memory.len));
        let mut bytes = 0;
        while at < end {
            let len = (end - at).min(PIECE as u64) as usize;
            let buffer = &mut self.room[..len];
            self.memory.file.read_exact_at(buffer, at).map_err(io)?;
            if fresh {
                // Pages of zeroes stay holes.
                bytes += write_sparse(self.out, buffer, at).map_err(io)?;
            } else {
                self.out.write_all_at(buffer, at).map_err(io)?;
                bytes += len as u64;
            }
            at += len as u64;
            self.note_made();
        }
        Ok(bytes)
    }

    fn read_own(&mut self, ranges: &[(u64, u64)]) -> Result<u64, Error> {
        let all: Vec<_> = ranges.iter().map(|&(s, e)| s..e).collect();
        let len: u64 = ranges.iter().map(|r| r.1 - r.0).sum();
        if len as usize > self.room.len() {
            self.room.resize(len as usize, 0);
        }
        let buffer = &mut self.room[..len as usize];
        if self.own_memory.gather(&all, buffer).is_err() {
            // Something is gone: what is left is read page by page. What is there at the point in time and was not read is
            // an error then.
            return Ok(self.read_pages(&all));
        }
        let mut rest = &buffer[..];
        for address in all.into_iter().flat_map(|r| r.step_by(PAGE as usize)) {
            let (page, more) = rest.split_at(PAGE as usize);
            match self.own.get_mut(&address) {
                Some(old) => old.copy_from_slice(page),
                None => drop(self.own.insert(address, page.to_vec())),
            }
            rest = more;
        }
        Ok(len)
    }

    /// Reads pages one by one; those that are not there are no pages any more. How many bytes there were.
    fn read_pages(&mut self, all: &[std::ops::Range<u64>]) -> u64 {
        let mut bytes = 0;
        for at in all.iter().cloned().flat_map(|r| r.step_by(PAGE as usize)) {
            let mut page = vec![0; PAGE as usize];
            let range = at..at + PAGE;
            if self.own_memory.gather(&[range], &mut page).is_ok() {
                self.own.insert(at, page);
                bytes += PAGE;
            } else {
                self.own.remove(&at);
            }
        }
        bytes
    }

    /// Makes room for what the stop will find, if that is about as much as was found now: memory that has never been used
    /// costs more than the copy.
    pub fn make_room(&mut self, found: u64) {
        let wanted = (found.saturating_mul(2).min(ROOM_MOST)) as usize;
        if self.room.len() < wanted {
            self.room.resize(wanted, 1);
        }
    }

    /// Reads what was written, in the stop; main's own pages are kept at once.
    pub fn stash(&mut self, w: &Written) -> Result<Stash, Error> {
        self.read_own(&w.own)?;
        let pages = w.pages.runs();
        let len: u64 = pages.iter().map(|r| (r.1 - r.0) * PAGE).sum();
        let mut bytes = std::mem::take(&mut self.room);
        if bytes.len() < len as usize {
            bytes.resize(len as usize, 0);
        }
        let mut at = 0;
        for &(first, end) in &pages {
            let n = ((end - first) * PAGE) as usize;
            let past = (end * PAGE).saturating_sub(self.memory.len) as usize;
            self.memory
                .file
                .read_exact_at(&mut bytes[at..at + n - past], first * PAGE)
                .map_err(|e| Error::Io("memory".into(), "read", e))?;
            at += n;
        }
        Ok(Stash { pages, bytes })
    }

    /// Writes what was read in the stop.
    pub fn write(&mut self, stash: Stash) -> Result<u64, Error> {
        let mut at = 0;
        for &(first, end) in &stash.pages {
            let n = ((end - first) * PAGE) as usize;
            self.out
                .write_all_at(&stash.bytes[at..at + n], first * PAGE)
                .map_err(|e| Error::Io("memory".into(), "write", e))?;
            at += n;
        }
        Ok(at as u64)
    }
}

impl Drop for Tracker<'_> {
    fn drop(&mut self) {
        let Some(uffd) = &self.uffd else { return };
        // By what is mapped now: a mapping of which a part was unmapped in the stop is on our list no more. An error means
        // that the machine is gone.
        for m in proc::maps(self.main).unwrap_or_default() {
            if self.memory.is(&m) || is_own(&m) {
                let _ = uffd.unregister(m.start, m.end - m.start);
            }
        }
    }
}

fn tracked(memory: &Memory, m: &Map) -> Tracked {
    Tracked {
        start: m.start,
        end: m.end,
        offset: memory.is(m).then_some(m.offset),
    }
}

/// Writes a buffer of whole pages, but for those of zeroes. How many bytes were written.
fn write_sparse(out: &File, buffer: &[u8], at: u64) -> std::io::Result<u64> {
    let page = PAGE as usize;
    let mut bytes = 0;
    let mut from = 0;
    while from < buffer.len() {
        if zero(&buffer[from..from + page]) {
            from += page;
            continue;
        }
        let mut to = from + page;
        while to < buffer.len() && !zero(&buffer[to..to + page]) {
            to += page;
        }
        out.write_all_at(&buffer[from..to], at + from as u64)?;
        bytes += (to - from) as u64;
        from = to;
    }
    Ok(bytes)
}

fn zero(page: &[u8]) -> bool {
    // SAFETY-free way to compare words: most pages differ in the first few.
    page.chunks_exact(16)
        .all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_pages() {
        let mut p = Pages::new(200 * PAGE);
        p.add(0, 2);
        p.add(62, 66);
        p.add(199, 1000);
        assert_eq!(p.runs()[..2], [(0, 2), (62, 66)]);
        assert_eq!(p.runs()[2].0, 199);
        assert!(p.runs()[2].1 >= 200);
    }

    #[test]
    fn pages_of_zeroes_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        let mut bytes = vec![0; 4 * PAGE as usize];
        bytes[4096 + 4095] = 7;
        assert_eq!(write_sparse(&file, &bytes, 0).unwrap(), PAGE);
        let mut back = vec![1; bytes.len()];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, bytes);
    }
}
