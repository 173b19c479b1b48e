//! The order of a snapshot. `docs/snapshot.md`, sections 1 to 4.

use super::directory::Directory;
use super::exits;
use super::guardian::Guardian;
use super::plan::{self, Planned, Refusal};
use super::ranges::{Objects, Treatment, treatment};
use super::threads::{Known, Questions, hot_pages};
use super::{Error, hold, host, state, userfault};
use crate::files;
use crate::image::index::{Entry, Index};
use crate::image::manifest::{Manifest, Process, Range, Space};
use crate::image::pages::PagesWriter;
use crate::image::store;
use crate::memory::place::{Cpus, Place, Side};
use crate::memory::{self, Frozen, Parent, Span, Tracker};
use crate::proc::{self, Map};
use crate::sys::remote;
use crate::target::driver::Foothold;
use crate::target::journal::{self, Journal};
use crate::target::{Batch, Driver, Stopped};
use serde::Serialize;
use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What is left to be copied at the stop is copied in it, if it is not more than this.
const COPY_IN_STOP: u64 = 256 << 10;
const ATTEMPTS: u32 = 20;
/// So often is stopped anew when there is a process that was not there before, or one is missing.
const RESTLESS: u32 = 5;

/// What becomes of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// It runs on.
    Runs,
    /// It is left stopped, as by SIGSTOP.
    Stopped,
    /// It is killed.
    Killed,
}

/// How memory is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Write-protected and copied ahead of the stop.
    Tracked,
    /// Stopped, copied, let go. The pause grows with the size.
    StopAndCopy,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// The process.
    pub pid: i32,
    /// With its descendants.
    pub tree: bool,
    /// The directory to make.
    pub dir: PathBuf,
    /// An earlier snapshot to build on.
    pub since: Option<PathBuf>,
    /// Wait until all of it is on disk.
    pub durable: bool,
    /// What becomes of the target.
    pub after: After,
    /// How memory is saved.
    pub method: Method,
    /// Where journals are kept.
    pub journals: PathBuf,
    /// Where it is noted which snapshots were verified.
    pub records: PathBuf,
    /// The program that is started as guardian, as `PROGRAM rescue --watch`; none for tests.
    pub guardian: Option<PathBuf>,
    /// Terminals, pipes and sockets to the outside under the numbers 0, 1 and 2 become those of the resuming command.
    pub stdio: bool,
    /// More such numbers.
    pub external: Vec<i32>,
    /// Stream sockets to the outside are closed at a resume instead of being refused.
    pub close_outside: bool,
    /// Takes the silent TCP connections of a target that was killed ([`files::Held::from_sockets`]), and the directory of
    /// the snapshot, to hold them until it is resumed. If nobody does, the host answers a peer that sends with a reset.
    pub hold: Option<fn(Vec<OwnedFd>, &Path)>,
}

impl Options {
    /// The usual, for a process and a directory.
    #[must_use]
    pub fn new(pid: i32, dir: &Path) -> Self {
        Self {
            pid,
            tree: false,
            dir: dir.into(),
            since: None,
            durable: false,
            after: After::Runs,
            method: Method::Tracked,
            journals: journal::DIRECTORY.into(),
            records: crate::image::verified::DIRECTORY.into(),
            guardian: None,
            stdio: true,
            external: Vec::new(),
            close_outside: false,
            hold: None,
        }
    }
}

/// What it has cost. Times in microseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Until all threads were stopped.
    pub stop_us: u64,
    /// Reading registers, signals, mappings, open files.
    pub state_us: u64,
    /// Fixing the point in time for memory.
    pub mark_us: u64,
    /// Letting the threads go.
    pub detach_us: u64,
    /// The sum of these: how long the target stood still.
    pub pause_us: u64,
    /// The earlier, shorter stop of one thread, in which the userfaultfd is made.
    pub prepare_us: u64,
    /// From the start until all is on disk; none if that was not waited for.
    pub durable_us: Option<u64>,
    /// From the start until the snapshot was published.
    pub total_us: u64,
    /// Bytes of memory in this snapshot's own files.
    pub bytes_saved: u64,
    /// Pages copied ahead of the stop.
    pub pages_before_stop: u64,
    /// Pages copied after the stop because the target was about to write them.
    pub pages_by_fault: u64,
    /// Pages copied after the stop, in the background.
    pub pages_in_background: u64,
    /// Faults that the target took.
    pub faults: u64,
    /// Stops that were given up as too much had become writable, and repeated.
    pub stops_given_up: u32,
    /// Processes.
    pub processes: usize,
    /// Threads.
    pub threads: usize,
    /// The way that memory was saved.
    pub method: &'static str,
}

/// A process under capture.
#[derive(Debug)]
struct Target {
    planned: Planned,
    space: u32,
    journal: Journal,
    foothold: Option<Foothold>,
    tracker: Option<Tracker>,
    known: Known,
    /// The first thread's word that is cleared as it ends.
    first_word: u64,
}

/// What was read of a process at the point in time.
#[derive(Debug)]
struct Fixed {
    process: Process,
    xstates: state::Xstates,
    space: Space,
    entries: Vec<Entry>,
}

/// Takes a snapshot.
pub fn snapshot(options: &Options) -> Result<Report, Error> {
    let begin = Instant::now();
    crate::sys::sched::sharp_timers();
    crate::sys::resident::code();
    let mut report = Report {
        method: match options.method {
            Method::Tracked => "tracked",
            Method::StopAndCopy => "stop-and-copy",
        },
        ..Report::default()
    };
    let objects = RefCell::new(Objects::default());
    let (planned, mut refusals) = plan::plan_filled(options.pid, options.tree)?;
    for p in &planned {
        for map in &p.maps {
            objects.borrow_mut().look_ahead(p.pid, map)?;
        }
    }
    let shared =
        |dev: u64, ino: u64, fd: BorrowedFd<'_>| objects.borrow_mut().of_descriptor(dev, ino, fd);
    let file_options = files::Options {
        stdio: options.stdio,
        external: options.external.clone(),
        close_outside: options.close_outside,
        hold_connections: options.after == After::Killed,
        ..files::Options::new(&options.dir, &shared)
    };
    let pids: Vec<i32> = planned
        .iter()
        .filter(|p| !p.zombie)
        .map(|p| p.pid)
        .collect();
    let dir = Directory::create(&options.dir)?;
    let mut capture = match files::Capture::prepare(&pids, &file_options) {
        Ok(c) => Some(c),
        Err(files::Error::Refused(list)) => {
            refusals.extend(list.into_iter().map(|r| Refusal {
                pid: r.pid,
                object: r.object,
                reason: r.reason,
                remedy: r.advice,
            }));
            None
        }
        Err(e) => return Err(e.into()),
    };
    let (Some(capture), true) = (&mut capture, refusals.is_empty()) else {
        return Err(Error::Refused(refusals));
    };
    let parent = match &options.since {
        Some(dir) => Some(Arc::new(Parent::open(dir, &store::load(dir)?)?)),
        None => None,
    };
    let pages = Arc::new(PagesWriter::create(&options.dir)?);
    let manifest_host = host::current()?;

    let mut targets = Vec::new();
    let mut zombies = Vec::new();
    for p in planned {
        if p.zombie {
            zombies.push(p.pid);
            continue;
        }
        let journal = Journal::create(&options.journals, p.pid, p.start_time)?;
        let space = targets.len() as u32;
        targets.push(Target {
            planned: p,
            space,
            journal,
            foothold: None,
            tracker: None,
            known: Known::default(),
            first_word: 0,
        });
    }
    let journals = targets.iter().map(|t| t.journal.path());
    let guardian = Guardian::start(options.guardian.as_deref(), journals)?;
    // Dropped before the guardian, which is needed until they are tidied up.
    let mut targets = targets;
    // A thread that is preferred, as this one is before and in the stop, must not be where the target runs.
    let cpus = Cpus::of_this_thread();
    let mut place = Place::new(options.pid, Side::Apart, cpus);
    place.follow();
    for t in &mut targets {
        t.prepare(options, &pages, (parent.as_ref(), cpus), &mut report)?;
    }
    crate::fault::point("snapshot.prepared");
    for t in &mut targets {
        t.track(&mut place)?;
    }
    crate::fault::point("snapshot.tracked");

    // The stop.
    let mut attempt = 0;
    let mut restless = 0;
    let mut known = [&pids[..], &zombies].concat();
    known.sort_unstable();
    let (stopped, fixed, frozen_files, object_entries, taken, t0) = loop {
        attempt += 1;
        // With a hundred threads it takes half a millisecond to list children; mostly nobody is born in the stop.
        let births = proc::births();
        let listed = proc::tree(options.pid).is_ok_and(|t| same(t, &known));
        let mut stopped = Vec::with_capacity(targets.len());
        for t in &targets {
            stopped.push(Stopped::all(t.planned.pid)?);
        }
        let t0 = stopped.first().map_or_else(Instant::now, Stopped::since);
        report.stop_us = us(t0.elapsed());
        crate::fault::point("snapshot.stopped");
        // What a process must be asked in its own name it is asked on the other processors, while the point in time is
        // fixed here: its own memory is not written by that.
        let t1 = Instant::now();
        let mut clock = Laps::new();
        let mut asking = Vec::with_capacity(targets.len());
        for (t, stopped) in targets.iter_mut().zip(&stopped) {
            asking.push(t.ask(stopped)?);
        }
        clock.lap("asking");
        let asking_us = us(t1.elapsed());
        let t1 = Instant::now();
        // What was made since the plan runs on, and would be missing in the snapshot: its parent would wait for nobody.
        let nobody = listed && births.is_some() && proc::births() == births;
        let calm = nobody || same(proc::tree(options.pid)?, &known);
        if !calm {
            restless += 1;
            if restless == RESTLESS {
                return Err(Error::Restless(options.pid, restless));
            }
        }
        clock.lap("tree");
        let mut again = !calm;
        let mut maps = Vec::with_capacity(asking.len());
        if calm {
            for a in &mut asking {
                let now = proc::maps(a.planned.pid)?;
                clock.lap("maps");
                again |= !a.freeze(&now, attempt >= ATTEMPTS)?;
                maps.push(now);
            }
        }
        report.mark_us = us(t1.elapsed());
        if again {
            for a in asking {
                a.answer()?;
            }
            drop(stopped);
            report.stops_given_up += 1;
            for t in &mut targets {
                t.tighten(&mut place)?;
            }
            continue;
        }
        crate::fault::point("snapshot.marked");
        let t2 = Instant::now();
        let taken = host::now();
        clock.lap("memory");
        // A connection that is read can neither send nor receive: should we die then, nobody may run who would.
        let connections = capture.list()? && !stopped.iter().any(|s| s.job_stop().is_some());
        if connections {
            asking.iter_mut().try_for_each(|a| a.driver.fasten())?;
            clock.lap("fastened");
        }
        let frozen = capture.freeze()?;
        clock.lap("open files");
        asking.iter_mut().try_for_each(|a| a.driver.unfasten())?;
        let mut fixed = Vec::with_capacity(asking.len());
        for (a, maps) in asking.into_iter().zip(&maps) {
            fixed.push(a.read(maps, &objects, options, &pages, parent.as_ref())?);
        }
        let mut object_entries = Vec::new();
        for (i, file) in objects.borrow().files.iter().enumerate() {
            let space = (targets.len() + i) as u32;
            object_entries.extend(memory::plain::copy_object(
                options.pid,
                space,
                &pages,
                parent.clone(),
                file,
            )?);
        }
        report.state_us = asking_us + us(t2.elapsed());
        break (stopped, fixed, frozen, object_entries, taken, t0);
    };
    crate::fault::point("snapshot.fixed");
    let t3 = Instant::now();
    let mut frozen_files = frozen_files;
    let silenced = frozen_files.held();
    let threads = stopped.iter().map(|s| s.threads().len()).sum();
    let kept = match options.after {
        After::Runs => {
            let complete = targets
                .iter()
                .all(|t| t.tracker.as_ref().is_none_or(Tracker::is_complete));
            if complete {
                drop(stopped);
                report.detach_us = us(t3.elapsed());
                report.pause_us = us(t0.elapsed());
            } else {
                report.pause_us = us(t0.elapsed());
                save_rest(&mut targets, stopped)?;
            }
            Vec::new()
        }
        After::Stopped | After::Killed => {
            report.pause_us = us(t0.elapsed());
            stopped
        }
    };
    crate::fault::point("snapshot.running");

    // The target runs, or is kept stopped; nothing more is asked of it.
    for t in &mut targets {
        std::mem::take(&mut t.known).forget();
    }
    let mut entries = object_entries;
    let mut manifest = Manifest {
        taken,
        host: manifest_host,
        processes: Vec::new(),
        spaces: Vec::new(),
        shared: std::mem::take(&mut objects.borrow_mut().objects),
        files: Vec::new(),
        index: String::new(),
        layers: parent
            .as_ref()
            .map(|p| p.layers().to_vec())
            .unwrap_or_default(),
    };
    for (t, mut f) in targets.iter_mut().zip(fixed) {
        f.xstates.put(&mut f.process);
        entries.extend(f.entries);
        if let Some(tracker) = t.tracker.take() {
            place.follow();
            let saved = tracker.finish()?;
            report.pages_before_stop += saved.stats.copied_before;
            report.pages_by_fault += saved.stats.by_fault;
            report.pages_in_background += saved
                .stats
                .copied_after
                .saturating_sub(saved.stats.by_fault);
            report.faults += saved.stats.faults;
            entries.extend(saved.entries);
        }
        manifest.processes.push(f.process);
        manifest.spaces.push(f.space);
    }
    // What is left takes a moment; the target may have gone elsewhere by now, and what is started from here on may run anywhere.
    drop(place);
    let (files, tables) = frozen_files.finish()?;
    manifest.files = files;
    for (process, fds) in manifest.processes.iter_mut().zip(tables) {
        process.fds = fds;
    }
    for pid in zombies {
        manifest.processes.push(state::zombie(pid)?);
    }
    order(&mut manifest.processes);
    report.processes = manifest.processes.len();
    report.threads = threads;
    report.bytes_saved = entries
        .iter()
        .filter(|e| e.layer == 0)
        .map(|e| e.pages.count() as u64 * 4096)
        .sum();
    pages.finish()?;
    if options.durable {
        pages.sync()?;
    }
    manifest.index = Index::new(entries)
        .write(&options.dir)?
        .to_hex()
        .to_string();
    crate::fault::point("snapshot.publish");
    store::publish(&options.dir, &manifest, options.durable)?;
    dir.keep();
    // The sums were made of the memory that was written. Without the record the first resume reads all of it.
    let _ = crate::image::verified::record(&options.records, &options.dir, &manifest);
    report.total_us = us(begin.elapsed());
    report.durable_us = options.durable.then(|| us(begin.elapsed()));
    if options.after == After::Killed {
        // What is killed need not be tidied up.
        for t in &mut targets {
            t.foothold = None;
        }
    }
    finish_target(options, kept, &targets, silenced)?;
    for mut t in targets {
        t.tidy_up();
        t.journal.remove();
    }
    guardian.end();
    Ok(report)
}

/// Whether these are the processes that are `known`, which are sorted.
fn same(mut tree: Vec<i32>, known: &[i32]) -> bool {
    tree.sort_unstable();
    tree == known
}

/// Parents before children.
fn order(processes: &mut Vec<Process>) {
    let mut done: Vec<Process> = Vec::with_capacity(processes.len());
    while !processes.is_empty() {
        let ready = processes
            .iter()
            .position(|p| processes.iter().all(|q| q.pid != p.ppid))
            .unwrap_or_default();
        done.push(processes.remove(ready));
    }
    *processes = done;
}

/// Kills or leaves stopped what is to be.
fn finish_target(
    options: &Options,
    kept: Vec<Stopped>,
    targets: &[Target],
    held: files::Held,
) -> Result<(), Error> {
    let signal = match options.after {
        After::Runs => {
            held.release();
            return Ok(());
        }
        After::Stopped => nix::sys::signal::SIGSTOP,
        After::Killed => nix::sys::signal::SIGKILL,
    };
    for t in targets {
        let pid = nix::unistd::Pid::from_raw(t.planned.pid);
        nix::sys::signal::kill(pid, signal).map_err(|e| Error::Call(t.planned.pid, "kill", e))?;
    }
    if options.after == After::Killed {
        // A traced thread stays a zombie until its tracer has seen its end, and its number is taken that long.
        // The first thread ends last.
        let goes_on = |tid: i32| {
            let report = crate::sys::ptrace::wait(tid, true);
            matches!(report, Ok(Some((_, r))) if !matches!(r, crate::sys::ptrace::Report::Ended(_)))
        };
        for stopped in kept {
            for tid in stopped.into_threads().into_iter().rev() {
                while goes_on(tid) {}
            }
        }
        // The peers are told nothing, so that a resume finds their connections open.
        for t in targets {
            wait_until_gone(t);
        }
        match options.hold {
            Some(hold) if !held.is_empty() => hold(held.into_sockets(), &options.dir),
            _ => held.discard(),
        }
    } else {
        drop(kept);
        held.release();
    }
    Ok(())
}

/// A killed process lets its descriptors go only when it has ended.
fn wait_until_gone(t: &Target) {
    for _ in 0..2000 {
        match proc::stat(t.planned.pid) {
            Ok(s) if s.start_time == t.planned.start_time && !"ZX".contains(s.state) => {
                std::thread::sleep(Duration::from_micros(500));
            }
            _ => return,
        }
    }
}

/// Copies the rest while the target runs, its calls watched.
fn save_rest(targets: &mut [Target], stopped: Vec<Stopped>) -> Result<(), Error> {
    let left = AtomicUsize::new(targets.len());
    std::thread::scope(|scope| {
        let workers: Vec<_> = targets
            .iter_mut()
            .map(|t| {
                let left = &left;
                scope.spawn(move || {
                    let r = t.tracker.as_mut().map_or(Ok(()), Tracker::save_rest);
                    left.fetch_sub(1, Ordering::Release);
                    r
                })
            })
            .collect();
        let held = hold::run(stopped, &|| left.load(Ordering::Acquire) == 0);
        for w in workers {
            match w.join() {
                Ok(r) => r?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        held.map_err(Error::from)
    })
}

impl Target {
    /// A short stop of the first thread: the scratch is mapped, the userfaultfd made.
    fn prepare(
        &mut self,
        options: &Options,
        pages: &Arc<PagesWriter>,
        (parent, cpus): (Option<&Arc<Parent>>, Cpus),
        report: &mut Report,
    ) -> Result<(), Error> {
        let pid = self.planned.pid;
        let pidfd = remote::pidfd_open(pid).map_err(|e| Error::Call(pid, "pidfd_open", e))?;
        let begin = Instant::now();
        let stopped = Stopped::one(pid, pid)?;
        if let Some(before) = &mut self.planned.before {
            before.note_interrupted(pid);
        }
        let mut driver = Driver::enter(&stopped, &[pid], &mut self.journal, None)?;
        let Some(before) = &self.planned.before else {
            return Err(crate::target::Error::Ended(pid).into());
        };
        let scratch = before.scratch_len(self.planned.threads + 64, self.planned.timers + 16);
        self.foothold = Some(driver.settle(scratch)?);
        let uffd = match options.method {
            Method::Tracked => {
                let uffd = userfault::create(pid, pidfd.as_fd(), &mut driver)?;
                let mut batch = Batch::new();
                let questions = Questions::ask(&mut batch);
                driver.run(&mut batch)?;
                self.first_word = questions.answers(&batch).clear_child_tid;
                Some(uffd)
            }
            Method::StopAndCopy => None,
        };
        driver.leave()?;
        let mut hot = hot_pages(pid);
        stopped.release();
        report.prepare_us = report.prepare_us.max(us(begin.elapsed()));
        if let Some(uffd) = uffd {
            let before = self.planned.before.as_mut();
            if let (Some(before), Some(foothold)) = (before, self.foothold) {
                let (known, more) = Known::look(pid, before, &mut self.journal, foothold)?;
                self.known = known;
                hot.extend(more);
            }
            let options = memory::Options {
                parent: parent.cloned(),
                cpus,
                ..memory::Options::default()
            };
            let mut tracker = Tracker::new(pid, uffd, self.space, pages.clone(), options)?;
            tracker.set_hot(&hot);
            self.tracker = Some(tracker);
        }
        Ok(())
    }

    /// Protects and copies while the target runs.
    fn track(&mut self, place: &mut Place) -> Result<(), Error> {
        let (pid, foothold, first) = (self.planned.pid, self.foothold, self.first_word);
        if let Some(tracker) = &mut self.tracker {
            let stopped = Stopped::all(pid)?;
            tracker.register(&spans(&proc::maps(pid)?, foothold, Treatment::Tracked))?;
            stopped.release();
            let mut current = || {
                place.follow();
                mappings(pid, foothold, first)
            };
            tracker.track(&mut current)?;
            let maps = proc::maps(pid)?;
            tracker.prepare_plain(&spans(&maps, foothold, Treatment::Written))?;
        }
        Ok(())
    }

    fn tighten(&mut self, place: &mut Place) -> Result<(), Error> {
        let (pid, foothold, first) = (self.planned.pid, self.foothold, self.first_word);
        if let Some(tracker) = &mut self.tracker {
            tracker.tighten(&mut || {
                place.follow();
                mappings(pid, foothold, first)
            })?;
        }
        Ok(())
    }

    /// In the stop: reads registers, and has the threads ask the rest themselves.
    fn ask<'a>(&'a mut self, stopped: &'a Stopped) -> Result<Asking<'a>, Error> {
        let pid = self.planned.pid;
        let Some(before) = &self.planned.before else {
            return Err(crate::target::Error::Ended(pid).into());
        };
        let mut clock = Laps::new();
        let threads = state::Threads::read(stopped, before)?;
        clock.lap("registers");
        let known = self.known.still();
        let all = stopped.threads();
        let silent: Vec<i32> = all
            .iter()
            .enumerate()
            .filter(|(i, t)| *i == 0 || !known.contains_key(t))
            .map(|(_, &t)| t)
            .collect();
        let mut driver = Driver::enter(stopped, &silent, &mut self.journal, self.foothold)?;
        clock.lap("driver entered");
        let asked = state::ask(&mut driver, before, threads, &known)?;
        Ok(Asking {
            planned: &self.planned,
            before,
            stopped,
            tracker: self.tracker.as_mut(),
            first_word: self.first_word,
            foothold: self.foothold,
            space: self.space,
            driver,
            asked,
        })
    }
}

/// A stopped process whose threads are asked what only they can tell.
#[derive(Debug)]
struct Asking<'a> {
    planned: &'a Planned,
    before: &'a state::Before,
    stopped: &'a Stopped,
    tracker: Option<&'a mut Tracker>,
    first_word: u64,
    foothold: Option<Foothold>,
    space: u32,
    driver: Driver<'a>,
    asked: state::Asked,
}

impl Asking<'_> {
    /// Fixes the point in time. False: too much can be written; try again.
    fn freeze(&mut self, maps: &[Map], force: bool) -> Result<bool, Error> {
        let foothold = self.foothold;
        let Some(tracker) = &mut self.tracker else {
            return Ok(true);
        };
        let (pid, tids) = (self.planned.pid, self.stopped.threads());
        let now = memory::Mappings {
            spans: spans(maps, foothold, Treatment::Tracked),
            // Nobody changes a list now.
            open: exits::pages(pid, self.first_word, tids, 1),
        };
        match tracker.freeze(&now, force)? {
            Frozen::Again { .. } => Ok(false),
            Frozen::Fixed(fence) => {
                let mut plain = fence.untracked;
                plain.extend(spans(maps, foothold, Treatment::Written));
                let mut clock = Laps::new();
                tracker.copy_plain(&plain)?;
                clock.lap("plain");
                tracker.copy_in_stop(COPY_IN_STOP)?;
                clock.lap("in stop");
                Ok(true)
            }
        }
    }

    /// Takes the answers and sends the threads back to their own code, where they stand still.
    fn answer(mut self) -> Result<(Process, Space, state::Xstates), Error> {
        let answers = state::put_together(&mut self.driver, self.before, self.asked, self.stopped)?;
        self.driver.leave()?;
        Ok(answers)
    }

    /// Everything else of the process.
    fn read(
        self,
        maps: &[Map],
        objects: &RefCell<Objects>,
        options: &Options,
        pages: &Arc<PagesWriter>,
        parent: Option<&Arc<Parent>>,
    ) -> Result<Fixed, Error> {
        let (planned, foothold, space_number) = (self.planned, self.foothold, self.space);
        let pid = planned.pid;
        let mut clock = Laps::new();
        let (mut process, layout, xstates) = self.answer()?;
        clock.lap("answered");
        process.space = space_number;
        let mut ranges: Vec<Range> = Vec::with_capacity(maps.len());
        for map in maps.iter().filter(|m| !is_scratch(m, foothold)) {
            ranges.push(
                objects
                    .borrow_mut()
                    .range(pid, map, planned.vm_flags.get(&map.start))?,
            );
        }
        clock.lap("ranges");
        let space = Space { ranges, ..layout };
        let entries = match options.method {
            Method::Tracked => Vec::new(),
            Method::StopAndCopy => {
                let mut all = spans(maps, foothold, Treatment::Tracked);
                all.extend(spans(maps, foothold, Treatment::Written));
                memory::plain::copy_all(pid, space_number, pages, parent.cloned(), &all)?
            }
        };
        Ok(Fixed {
            process,
            xstates,
            space,
            entries,
        })
    }
}

impl Target {
    /// Takes the scratch and the loop out of the target again, in a short stop of one thread.
    fn tidy_up(&mut self) {
        let Some(foothold) = self.foothold.take() else {
            return;
        };
        self.tracker = None;
        let pid = self.planned.pid;
        let undo = |journal: &mut Journal| -> Result<(), crate::target::Error> {
            let stopped = Stopped::one(pid, pid)?;
            let driver = Driver::enter(&stopped, &[pid], journal, Some(foothold))?;
            driver.unsettle()
        };
        if let Err(e) = undo(&mut self.journal)
            && !matches!(
                e,
                crate::target::Error::Ended(_)
                    | crate::target::Error::Changed(_)
                    | crate::target::Error::Proc(_)
            )
        {
            tracing::error!(pid, error = %e, "could not tidy the process up; `umlctl rescue` can");
        }
    }
}

impl Drop for Target {
    /// Also after a snapshot that failed.
    fn drop(&mut self) {
        self.tidy_up();
    }
}

fn is_scratch(map: &Map, foothold: Option<Foothold>) -> bool {
    foothold.is_some_and(|f| map.start == f.scratch().0)
}

fn spans(maps: &[Map], foothold: Option<Foothold>, wanted: Treatment) -> Vec<Span> {
    maps.iter()
        .filter(|m| treatment(m) == wanted && !is_scratch(m, foothold))
        .map(|m| m.start..m.end)
        .collect()
}

/// What is tracked of a process, as its mappings are now.
fn mappings(pid: i32, foothold: Option<Foothold>, first_word: u64) -> memory::Mappings {
    let Ok(maps) = proc::maps(pid) else {
        return memory::Mappings::default();
    };
    let tids = proc::threads(pid).unwrap_or_default();
    memory::Mappings {
        spans: spans(&maps, foothold, Treatment::Tracked),
        open: exits::pages(pid, first_word, &tids, exits::TRIES),
    }
}

/// Times of the steps in the stop, for the log.
#[derive(Debug)]
struct Laps(Instant);

impl Laps {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, what: &str) {
        let now = Instant::now();
        tracing::debug!(us = us(now - self.0), what);
        self.0 = Instant::now();
    }
}

fn us(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}
