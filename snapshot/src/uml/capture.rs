//! Capturing a machine: copy ahead, a short stop, and the rest while it runs on.

use super::clock;
use super::freeze::{Attached, Point, inner_number};
use super::layout::{self, Memory};
use super::learn;
pub use super::learn::Learned;
use super::manifest::{self, Helper, Kernel, Machine};
use super::tracker::{Tracker, Written};
use super::users;
use super::{Error, PAGE, image, text, traced};
use crate::capture::host;
use crate::capture::ranges::Objects;
use crate::fault;
use crate::files;
use crate::image::manifest::{Fd, Process, Space, Thread};
use crate::proc;
use crate::resume::restart;
use crate::sys::ptrace::{self, Regs};
use crate::sys::sched::Preferred;
use crate::sys::{limits, remote};
use base64::Engine;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The stop is made when a round finds no more than this, bytes; or when rounds no longer find less.
const FEW: u64 = 1 << 20;
const ROUNDS: u32 = 8;

/// What is captured, and how.
pub struct Request<'a> {
    /// Our number of the guest kernel's process.
    pub main: i32,
    /// Where the files are put; it exists, and is empty.
    pub dir: &'a Path,
    /// Descriptors of main that the resuming side provides anew.
    pub externals: &'a [i32],
    /// What was learned about the machine before, by [`meet`] or a capture.
    pub learned: &'a mut Option<Learned>,
    /// Everything reaches the disk before this returns; otherwise it has been written, and no more.
    pub durable: bool,
    /// Copy everything in the stop: the simple way, to compare with.
    pub stop_and_copy: bool,
    /// The machine does not go on after the point in time: called in the stop, when all of it has been read.
    pub kill: Option<&'a mut dyn FnMut()>,
    /// Called when the point in time is fixed and the machine runs again (or is not to): nothing is saved for good yet.
    pub fixed: Option<&'a mut dyn FnMut(&Stats)>,
    /// Copies the disk. The machine runs, but nothing is read from or written to its disk.
    pub disk: Option<&'a mut dyn FnMut() -> Result<(), String>>,
    /// Called in the stop, for tests: everything can be read from the processes.
    pub inspect: Option<&'a mut dyn FnMut()>,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("main", &self.main)
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

/// What it has cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// An earlier stop, in which the machine is asked what never changes. None if it was met before.
    pub first: Duration,
    /// From asking main to stop to its coming to rest: the machine runs, slowed down.
    pub rest: Duration,
    /// In the stop: until the helpers stood still.
    pub stop: Duration,
    /// In the stop: finding out what was written.
    pub scan: Duration,
    /// In the stop: registers and open files.
    pub state: Duration,
    /// In the stop: copying what was written.
    pub copy: Duration,
    /// The whole stop.
    pub pause: Duration,
    /// How long the disk stood still after it.
    pub disk: Duration,
    /// From the request to everything being on disk.
    pub durable: Duration,
    /// Bytes that were copied ahead of the stop, and in it.
    pub ahead_bytes: u64,
    /// Bytes that were copied in the stop.
    pub stop_bytes: u64,
    /// Rounds of copying ahead.
    pub rounds: u32,
    /// User processes.
    pub users: usize,
}

/// Captures a machine, which goes on. The manifest is not written yet: the caller adds what it knows, and publishes.
pub fn capture(request: &mut Request<'_>) -> Result<(Machine, Stats), Error> {
    let start = Instant::now();
    let main = request.main;
    let mut stats = Stats::default();
    let maps = proc::maps(main)?;
    let memory = Memory::find(main, &maps)?;
    let out = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(request.dir.join(image::MEMORY))
        .and_then(|f| f.set_len(memory.len).map(|()| f))
        .map_err(|e| Error::Io(request.dir.join(image::MEMORY), "make", e))?;
    let mut before = Before::read(main, &maps, &memory)?;
    let shared = |dev, ino, _: std::os::fd::BorrowedFd<'_>| {
        let same = memory
            .file
            .metadata()
            .is_ok_and(|m| m.dev() == dev && m.ino() == ino);
        same.then_some(0)
    };
    let mut options = files::Options::new(request.dir, &shared);
    options.external = request.externals.to_vec();
    let mut files = files::Capture::prepare(&[main], &options)?;

    let (helpers, clock) = (helpers(main)?, clock::of(main));
    let mut tracker = prepare(request, &memory, &out, &maps, &mut stats)?;
    fault::point("uml.copied");

    // Whoever competes for the CPUs, the machine waits for nobody but us from here on.
    let preferred = Preferred::begin();
    let asked = Instant::now();
    let mut at = Attached::new(main)?;
    fault::point("uml.attached");
    let point = at.stop()?;
    let stopped = Instant::now();
    stats.rest = stopped - asked;
    fault::point("uml.stopped");
    at.hold_helpers(&helpers)?;
    stats.stop = stopped.elapsed();
    fault::point("uml.held");
    let t = Instant::now();
    let maps = proc::maps(main)?;
    let written = tracker.look(&maps, true)?;
    stats.scan = t.elapsed();
    let t = Instant::now();
    let taken = clock::now(clock);
    let thread = main_thread(&at, point, &before)?;
    let others = helpers
        .iter()
        .map(|&pid| helper(pid))
        .collect::<Result<Vec<_>, _>>()?;
    let frozen = files.freeze()?;
    stats.state = t.elapsed();
    let t = Instant::now();
    let (stash, pages) = if request.stop_and_copy {
        stats.stop_bytes = tracker.copy_all(&maps)?;
        (None, tracker.own_now(&maps)?)
    } else {
        stats.stop_bytes = written.pages.count() * PAGE;
        (Some(tracker.stash(&written)?), tracker.own_now(&maps)?)
    };
    stats.copy = t.elapsed();
    fault::point("uml.read");
    if let Some(inspect) = &mut request.inspect {
        inspect();
    }
    let killed = request.kill.is_some();
    if killed {
        stats.pause = stopped.elapsed();
    } else {
        at.detach_main()?;
        stats.pause = stopped.elapsed();
        fault::point("uml.released");
    }
    drop(preferred);
    if let Some(fixed) = &mut request.fixed {
        fixed(&stats);
    }

    let t = Instant::now();
    if let Some(disk) = &mut request.disk {
        disk().map_err(Error::Caller)?;
    }
    let spaces = layout::ranges(main, &maps, &memory, &mut before.objects, &before.flags)?;
    if let Some(kill) = &mut request.kill {
        kill();
        // Nothing of it may run before it is dead: what it sent then, its peers would know of and the snapshot not.
        at.wait_for_end()?;
    }
    let _ = at.release_helpers();
    drop(at);
    stats.disk = t.elapsed();
    fault::point("uml.disk");

    if let Some(stash) = stash {
        tracker.write(stash)?;
    }
    let own = std::mem::take(&mut tracker.own);
    let users = users::list(&tracker.users);
    stats.users = users.len();
    drop(tracker);
    let (mut list, mut fds) = frozen.finish()?;
    renumber(&mut list, main, before.pid);
    let learned = request
        .learned
        .clone()
        .ok_or_else(|| Error::Foreign(main, "nothing is known of it".into()))?;
    let (private, private_sum) = write_own(request.dir, &own, &pages)?;
    let memory_sums = {
        let path = request.dir.join(image::MEMORY);
        let sums = image::Sums::of(&out, &path)?;
        if request.durable {
            out.sync_all().map_err(|e| Error::Io(path, "sync", e))?;
        }
        sums.write(&request.dir.join(image::MEMORY_SUMS))?
    };
    fault::point("uml.saved");
    let machine = Machine {
        taken,
        clock,
        host: host::current().map_err(|e| Error::Host(text(&e)))?,
        kernel: Kernel {
            path: before.exe.clone(),
            sum: image::sum_of(&proc::path(main, "exe")).or_else(|_| image::sum_of(&before.exe))?,
        },
        main: before.process(thread, &learned, fds.pop().unwrap_or_default()),
        space: Space {
            layout: before.layout(learned.brk),
            auxv: before.auxv.clone(),
            ranges: spaces,
            thp_disabled: false,
        },
        helpers: others,
        users,
        stub: learned.stub,
        files: list,
        memory_fd: memory.fd,
        memory_len: memory.len,
        private,
        private_sum,
        memory_sums,
        disk_sums: None,
    };
    stats.durable = start.elapsed();
    Ok((machine, stats))
}

/// Learns what is needed to capture a machine and never changes while it runs, in a stop of its own: captures after this
/// make one stop only. At least one user process must have run. Nothing is done if all is known already.
pub fn meet(main: i32, learned: &mut Option<Learned>) -> Result<(), Error> {
    if learn::known(learned.as_ref(), main)? {
        return Ok(());
    }
    let maps = proc::maps(main)?;
    let memory = Memory::find(main, &maps)?;
    ask(main, &memory, learned).map(drop)
}

/// How long the machine stood still for it.
fn ask(main: i32, memory: &Memory, learned: &mut Option<Learned>) -> Result<Duration, Error> {
    let _preferred = Preferred::begin();
    let mut at = Attached::new(main)?;
    let point = at.stop()?;
    let stopped = Instant::now();
    let users = users::present(main, memory)?;
    *learned = Some(learn::learn(&mut at, point, &users)?);
    at.detach_main()?;
    Ok(stopped.elapsed())
}

/// Everything before the stop: what is not known yet is learned, and memory is copied until little is left.
fn prepare<'a>(
    request: &mut Request<'_>,
    memory: &'a Memory,
    out: &'a File,
    maps: &[proc::Map],
    stats: &mut Stats,
) -> Result<Tracker<'a>, Error> {
    let main = request.main;
    if !learn::known(request.learned.as_ref(), main)? {
        stats.first = ask(main, memory, request.learned)?;
    }
    if request.stop_and_copy {
        return Tracker::new(main, memory, None, out, maps);
    }
    let uffd = request.learned.as_ref().and_then(|l| l.uffd.clone());
    let Some(uffd) = uffd else {
        let what = "userfaultfd with asynchronous write protection";
        return Err(Error::Sys(what, nix::errno::Errno::EOPNOTSUPP));
    };
    let mut tracker = Tracker::new(main, memory, Some(uffd), out, maps)?;
    stats.ahead_bytes = tracker.copy_all(maps)?;
    let mut last = u64::MAX;
    for _ in 0..ROUNDS {
        let maps = proc::maps(main)?;
        let written: Written = tracker.look(&maps, false)?;
        let bytes = tracker.copy(&written)?;
        stats.ahead_bytes += bytes;
        stats.rounds += 1;
        if stats.rounds > 1 {
            tracker.make_room(bytes);
        }
        if bytes <= FEW || bytes > last / 2 {
            break;
        }
        last = bytes;
    }
    Ok(tracker)
}

/// Owners and locks have main's number as we see it; in its own namespace it has another.
fn renumber(files: &mut [files::OpenFile], from: i32, to: i32) {
    for file in files {
        if let Some(owner) = &mut file.owner
            && owner.pid == from
        {
            owner.pid = to;
        }
        for lock in &mut file.locks {
            if lock.kind == files::LockKind::Posix(from) {
                lock.kind = files::LockKind::Posix(to);
            }
        }
    }
}

/// Processes that share main's memory, by their number.
fn helpers(main: i32) -> Result<Vec<i32>, Error> {
    let mut all: Vec<i32> = proc::children(main)?
        .into_iter()
        .filter(|&pid| remote::same_memory(pid, main))
        .collect();
    all.sort_unstable();
    Ok(all)
}

/// What is read before the stop, and does not change.
struct Before {
    pid: i32,
    stat: proc::Stat,
    exe: PathBuf,
    cwd: PathBuf,
    umask: u32,
    limits: Vec<(u64, u64)>,
    personality: u32,
    auxv: Vec<u64>,
    sched: (i32, i32, i32),
    affinity: Vec<u64>,
    flags: HashMap<u64, Vec<String>>,
    objects: Objects,
}

impl Before {
    fn read(main: i32, maps: &[proc::Map], memory: &Memory) -> Result<Self, Error> {
        let stat = proc::stat(main)?;
        let personality = proc::read_bytes(main, "personality")?;
        let personality = String::from_utf8_lossy(&personality);
        let auxv = proc::read_bytes(main, "auxv")?;
        let mut objects = Objects::default();
        for m in maps.iter().filter(|m| !memory.is(m)) {
            let seen = objects.look_ahead(main, m);
            seen.map_err(|e| Error::Foreign(main, text(&e)))?;
        }
        Ok(Self {
            pid: inner_number(main).unwrap_or(main),
            exe: proc::link(main, "exe")?,
            cwd: proc::link(main, "cwd")?,
            umask: proc::status(main)?.umask,
            limits: limits::all(main),
            personality: u32::from_str_radix(personality.trim(), 16).unwrap_or(0),
            auxv: auxv
                .chunks_exact(8)
                .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
                .collect(),
            sched: (stat.policy, stat.nice, stat.rt_priority),
            affinity: limits::affinity(main),
            flags: proc::vm_flags(main)?,
            stat,
            objects,
        })
    }

    fn layout(&self, brk: u64) -> [u64; 11] {
        let mut layout = self.stat.layout;
        layout[5] = brk;
        layout
    }

    fn process(&self, thread: Thread, learned: &Learned, fds: Vec<Fd>) -> Process {
        Process {
            pid: self.pid,
            ppid: 1,
            pgid: self.pid,
            sid: self.pid,
            exit_signal: libc::SIGCHLD,
            zombie: None,
            space: 0,
            exe: self.exe.clone(),
            cwd: self.cwd.clone(),
            root: "/".into(),
            umask: self.umask,
            credentials: Default::default(),
            limits: self.limits.clone(),
            personality: self.personality,
            oom_score_adj: 0,
            prctl: Default::default(),
            actions: learned.actions.clone(),
            pending: Vec::new(),
            itimers: [(0, 0); 3],
            timers: learned.timers.clone(),
            fds,
            threads: vec![Thread {
                altstack: learned.altstack,
                ..thread
            }],
            stopped: false,
        }
    }
}

/// Registers and the like of a thread that is stopped; its address of restartable sequences and robust futexes too.
fn thread(pid: i32, regs: &Regs) -> Result<Thread, Error> {
    let get = |what| traced(pid, what);
    let xstate = ptrace::xstate(pid).map_err(get("PTRACE_GETREGSET"))?;
    Ok(Thread {
        tid: inner_number(pid).ok_or(Error::Ended(pid))?,
        regs: ptrace::regs_to_words(regs),
        xstate: base64::engine::general_purpose::STANDARD.encode(xstate),
        sigmask: ptrace::sigmask(pid).map_err(get("PTRACE_GETSIGMASK"))?,
        altstack: (0, 0, 0),
        robust: remote::robust_list(pid).map_err(get("get_robust_list"))?,
        rseq: ptrace::rseq(pid).map_err(get("PTRACE_GET_RSEQ_CONFIGURATION"))?,
        clear_child_tid: 0,
        comm: "linux.uml".into(),
        pending: Vec::new(),
        sched: (0, 0, 0),
        affinity: Vec::new(),
    })
}

fn main_thread(at: &Attached, point: Point, before: &Before) -> Result<Thread, Error> {
    let mut regs = ptrace::regs(at.main).map_err(traced(at.main, "PTRACE_GETREGS"))?;
    if point == Point::Idle {
        regs.rip -= 2;
        regs.rax = regs.orig_rax;
    }
    regs.orig_rax = u64::MAX;
    Ok(Thread {
        comm: before.stat.comm.clone(),
        sched: before.sched,
        affinity: before.affinity.clone(),
        ..thread(at.main, &regs)?
    })
}

fn helper(pid: i32) -> Result<Helper, Error> {
    let mut regs = ptrace::regs(pid).map_err(traced(pid, "PTRACE_GETREGS"))?;
    if regs.orig_rax.cast_signed() == libc::SYS_restart_syscall {
        // The only call with a timeout that they make.
        regs.orig_rax = libc::SYS_poll as u64;
    }
    let status = proc::status(pid)?;
    Ok(Helper {
        thread: thread(pid, &restart(regs))?,
        exit_signal: proc::stat(pid)?.exit_signal,
        caught: status.caught,
        ignored: status.ignored,
    })
}

/// Writes main's own pages that were there at the point in time.
fn write_own(
    dir: &Path,
    own: &std::collections::BTreeMap<u64, Vec<u8>>,
    pages: &[(u64, u64)],
) -> Result<(Vec<(u64, u64)>, String), Error> {
    let path = dir.join(image::PRIVATE);
    let io = |e| Error::Io(path.clone(), "write", e);
    let mut bytes = Vec::with_capacity(own.len() * PAGE as usize);
    let mut list: Vec<(u64, u64)> = Vec::new();
    for at in pages.iter().flat_map(|r| (r.0..r.1).step_by(PAGE as usize)) {
        let Some(page) = own.get(&at) else {
            let what = format!("the page at {at:#x} was not read");
            return Err(Error::Rebuild(what));
        };
        bytes.extend_from_slice(page);
        match list.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += PAGE,
            _ => list.push((at, PAGE)),
        }
    }
    let sum = blake3::hash(&bytes).to_hex().to_string();
    let mut file = File::create(&path).map_err(io)?;
    std::io::Write::write_all(&mut file, &bytes).map_err(io)?;
    file.sync_all().map_err(io)?;
    Ok((list, sum))
}

/// Publishes a snapshot that was captured to `staging`: when this returns it is at `dir`, whole and on the disk; before,
/// nothing is there.
pub fn publish(staging: &Path, dir: &Path, machine: &Machine) -> Result<(), Error> {
    manifest::write(staging, machine)?;
    image::sync_dir(staging)?;
    fault::point("uml.rename");
    std::fs::rename(staging, dir).map_err(|e| Error::Io(dir.into(), "rename to", e))?;
    if let Some(parent) = dir.parent() {
        image::sync_dir(parent)?;
    }
    Ok(())
}
