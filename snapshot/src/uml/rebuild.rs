//! Rebuilding a machine from its snapshot. The caller is the first process of a new pid namespace, and has one thread.
//!
//! A fork with main's number makes the open files in ordinary Rust, and then runs a table of calls (`resume::table`):
//! it exchanges its memory for main's, makes the user processes, each of which runs a table of its own and ends it in a
//! stop that main takes as their tracer, and makes the helpers. Then the caller gives all of them their registers.

use super::manifest::{Helper, Machine, Piece, User};
use super::{Error, PAGE, clock, image, text, traced};
use crate::fault;
use crate::files::{self, Connections, Context, OpenFile};
use crate::image::manifest::{Backing, SignalAction, Thread};
use crate::proc;
use crate::resume::memory::{self, Exchange, Fill, Helpers, OwnVdso, TOP};
use crate::resume::source::{BLOCK, PageSource, Run};
use crate::resume::table::{Expect, MESSAGE, Script, TableId};
use crate::resume::{child, drive, host, open, state};
use crate::sys::clone::{self, CloneArgs, Fork};
use crate::sys::ptrace::{self, Report};
use crate::sys::scratch::Scratch;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// Room for the tables; what some thousands of user processes need.
const RESERVE: u64 = 256 << 20;
/// Where user processes may have mappings, and a little more.
const USER_TOP: u64 = 0x7f_c000_2000;
/// How long the new processes may take; far more than they need.
const PATIENCE: Duration = Duration::from_secs(60);
const NUMBERS_MOST: usize = 32 << 10;

/// What is rebuilt, and from what.
pub struct Plan<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// The snapshot's directory.
    pub dir: &'a Path,
    /// Open files, at the paths that they have now.
    pub files: Vec<OpenFile>,
    /// The guest's memory.
    pub memory: OwnedFd,
    /// Descriptors for what is given anew, by their numbers in main.
    pub externals: BTreeMap<i32, OwnedFd>,
}

impl std::fmt::Debug for Plan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

/// Main's own pages, as they are in the file.
#[derive(Debug)]
struct Own {
    file: File,
    /// Address, bytes, offset in the file; by rising address.
    runs: Vec<(u64, u64, u64)>,
}

impl Own {
    fn open(machine: &Machine, dir: &Path) -> Result<Self, Error> {
        let (file, path) = image::open(dir, image::PRIVATE)?;
        if image::sum_of(&path)? != machine.private_sum {
            return Err(Error::Damaged(path, "its sum is wrong".into()));
        }
        let len = file
            .metadata()
            .map_err(|e| Error::Io(path.clone(), "look at", e))?
            .len();
        let mut runs = Vec::new();
        let (mut at, mut last) = (0u64, 0u64);
        for &(address, bytes) in &machine.private {
            let end = address.checked_add(bytes).filter(|&e| e <= TOP);
            let good =
                address >= last && address.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE);
            let Some(end) = end.filter(|_| good && bytes > 0) else {
                return Err(Error::Damaged(path, "its pages are out of order".into()));
            };
            runs.push((address, bytes, at));
            (at, last) = (at + bytes, end);
        }
        if at != len {
            return Err(Error::Damaged(path, "its length is wrong".into()));
        }
        Ok(Self { file, runs })
    }
}

impl PageSource for Own {
    fn blocks(&self, _: u32) -> Vec<u64> {
        let mut all: Vec<u64> = self
            .runs
            .iter()
            .flat_map(|r| r.0 / BLOCK..(r.0 + r.1).div_ceil(BLOCK))
            .collect();
        all.dedup();
        all
    }

    fn runs(&self, _: u32, block: u64) -> Vec<Run> {
        let (start, end) = (block * BLOCK, (block + 1) * BLOCK);
        let mut out = Vec::new();
        for &(address, bytes, offset) in &self.runs {
            let (from, to) = (address.max(start), (address + bytes).min(end));
            if from < to {
                out.push(Run {
                    first: ((from - start) / PAGE) as u32,
                    count: ((to - from) / PAGE) as u32,
                    layer: 0,
                    offset: offset + (from - address),
                });
            }
        }
        out
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.file.as_fd()]
    }
}

/// The tables of all processes.
struct Tables {
    main: TableId,
    users: Vec<(i32, TableId)>,
    helpers: Vec<TableId>,
}

/// Rebuilds the machine; it runs when this returns. Gives main's number in the namespace.
pub fn rebuild(plan: Plan<'_>) -> Result<i32, Error> {
    let machine = plan.machine;
    check(machine)?;
    // The caller's /proc may be that of another namespace, in which it has another number.
    let path = Path::new("/proc/self/maps");
    let maps = std::fs::read(path).map_err(|e| Error::Io(path.into(), "read", e))?;
    let maps = proc::parse_maps(&maps).map_err(|l| proc::Error::Parse(path.into(), l))?;
    let vdso = OwnVdso::find(&maps);
    let syscall = host::check(&machine.host, &vdso)?;
    let own = Own::open(machine, plan.dir)?;
    let helpers = helpers(machine, &own, plan.memory.as_fd())?;
    let mut used: Vec<(u64, u64)> = maps.iter().map(|m| (m.start, m.end)).collect();
    used.extend(machine.space.ranges.iter().map(|r| (r.start, r.end)));
    used.push((0, USER_TOP));
    let base = memory::free_place(&mut used, RESERVE)?;
    let aside = memory::free_place(&mut used, 1 << 20)?;
    let exchange = Exchange {
        number: 0,
        space: &machine.space,
        scratch: (base, RESERVE),
        aside,
        vdso: &vdso,
        helpers: &helpers,
        fill: Fill::Eager,
        template: None,
    };
    let mut script = Script::default();
    let tables = tables(&mut script, &plan, &exchange, &own)?;
    if script.len() as u64 > RESERVE {
        return Err(Error::Rebuild("it has too many processes".into()));
    }
    let scratch = Scratch::new(base, script.len()).map_err(|e| Error::Sys("mapping tables", e))?;
    script.install(&scratch);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let same_boot = boot.trim() == machine.host.boot_id;
    clock::enter(clock::offsets(
        &machine.taken,
        machine.clock,
        same_boot,
        &crate::capture::host::now(),
    ))?;
    fault::point("uml.prepared");

    let mut old = SigSet::empty();
    let mask = |how, new: &SigSet, old: Option<&mut SigSet>| {
        sigprocmask(how, Some(new), old).map_err(|e| Error::Sys("sigprocmask", e))
    };
    mask(SigmaskHow::SIG_SETMASK, &SigSet::all(), Some(&mut old))?;
    let number = machine.main.pid;
    let made = clone::fork(0, libc::SIGCHLD, Some(number));
    if made == Ok(Fork::Child) {
        become_main(plan, &helpers, &scratch, script.offset(tables.main));
    }
    mask(SigmaskHow::SIG_SETMASK, &old, None)?;
    let pid = match made {
        Ok(Fork::Parent(pid)) => pid,
        Ok(Fork::Child) => return Err(Error::Rebuild("it lives".into())),
        Err(e) => return Err(Error::Sys("clone3", e)),
    };
    wait(&script, &scratch, &tables, pid)?;
    fault::point("uml.made");
    release(machine, pid, syscall, &scratch)?;
    Ok(pid)
}

/// What a damaged or hostile manifest could say that would lead us astray.
pub(crate) fn check(machine: &Machine) -> Result<(), Error> {
    let bad = |what: &str| Err(Error::Damaged(image::MEMORY.into(), what.into()));
    let len = machine.memory_len;
    if len == 0 || !len.is_multiple_of(PAGE) || len > 1 << 40 {
        return bad("the length of its memory makes no sense");
    }
    let fits = |offset: u64, bytes: u64| offset.checked_add(bytes).is_some_and(|e| e <= len);
    let mut last = 0;
    for r in &machine.space.ranges {
        let special = matches!(r.backing, Backing::Vsyscall);
        if r.start < last || r.end <= r.start || (r.end > TOP && !special) {
            return bad("main's ranges are out of order");
        }
        last = r.end;
        if let Backing::Shared { object, offset } = r.backing
            && (object != 0 || !fits(offset, r.end - r.start))
        {
            return bad("main maps what is not there");
        }
    }
    let mut numbers = std::collections::BTreeSet::from([1]);
    let all = machine.users.iter().map(|u| u.pid);
    let others = machine.helpers.iter().map(|h| h.thread.tid);
    for n in all.chain(others).chain([machine.main.pid]) {
        if n < 1 || !numbers.insert(n) {
            return bad("a process number makes no sense");
        }
    }
    if numbers.len() > NUMBERS_MOST {
        return bad("it has too many processes");
    }
    for u in &machine.users {
        let mut last = 0;
        for p in &u.pieces {
            let end = p.start.checked_add(p.len).filter(|&e| e <= USER_TOP);
            if p.start < last || p.len == 0 || end.is_none() || !fits(p.offset, p.len) {
                return bad("the mappings of a user process make no sense");
            }
            last = p.start + p.len;
        }
    }
    Ok(())
}

/// Opens what main maps from.
fn helpers(machine: &Machine, own: &Own, guest: BorrowedFd<'_>) -> Result<Helpers, Error> {
    let top = machine.main.fds.iter().map(|f| f.fd).max().unwrap_or(0);
    let mut h = Helpers::from(top.clamp(1022, 1 << 20) + 2);
    let pages = open::raise(&mut h, own.file.as_fd())?;
    h.pages.push(pages);
    let shared = open::raise(&mut h, guest)?;
    h.shared.insert(0, shared);
    let exe = File::open(&machine.kernel.path)
        .map_err(|e| Error::Io(machine.kernel.path.clone(), "open", e))?;
    let exe = open::raise(&mut h, exe.as_fd())?;
    h.exe.insert(machine.main.pid, exe);
    for r in &machine.space.ranges {
        let Backing::File { path, identity, .. } = &r.backing else {
            continue;
        };
        let key = (path.clone(), false);
        if !h.files.contains_key(&key) {
            let file = open::open_same(path, identity, false)?;
            let fd = open::raise(&mut h, file.as_fd())?;
            h.files.insert(key, fd);
        }
    }
    Ok(h)
}

fn tables(
    script: &mut Script,
    plan: &Plan<'_>,
    exchange: &Exchange<'_>,
    own: &Own,
) -> Result<Tables, Error> {
    let machine = plan.machine;
    let main = script.table();
    child::leave_rseq(script, main);
    memory::exchange(script, main, exchange, &machine.main, own)?;
    crate::resume::files::locks(script, main, &plan.files, &machine.main, false);
    state::process(script, main, &machine.main)?;
    state::limits(script, main, &machine.main, &host::own_limits());
    let mut users = Vec::new();
    for u in &machine.users {
        let table = script.table();
        user(script, table, machine, u, exchange.scratch);
        start_user(script, main, table, u.pid);
        users.push((u.pid, table));
    }
    let mut helpers = Vec::new();
    for h in &machine.helpers {
        let table = script.table();
        helper(script, table, h);
        let flags = (libc::CLONE_VM | libc::CLONE_FILES) as u64;
        start(script, main, table, h.thread.tid, flags, h.exit_signal);
        helpers.push(table);
    }
    let thread = machine.main.threads.first();
    let thread = thread.ok_or_else(|| Error::Rebuild("main has no registers".into()))?;
    main_thread(script, main, thread);
    for &h in &helpers {
        script.wait_for(main, h);
    }
    Ok(Tables {
        main,
        users,
        helpers,
    })
}

fn ok(script: &mut Script, table: TableId, what: &'static str, nr: i64, args: &[u64]) {
    let args: Vec<_> = args.iter().map(|&a| a.into()).collect();
    script.call(table, what, nr, &args, Expect::Success);
}

/// Has a process made that starts on its own table, as `child::thread` does with threads.
fn start(
    script: &mut Script,
    by: TableId,
    table: TableId,
    number: i32,
    flags: u64,
    exit_signal: i32,
) {
    let wanted = script.words(&[number as u64]);
    let args = CloneArgs {
        flags,
        exit_signal: exit_signal as u64,
        stack_size: 64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let args = script.words(&args.words());
    script.relocate_back(args, 5, crate::resume::table::Arg::Table(table), 128);
    script.relocate(args, 8, wanted.into());
    script.call(
        by,
        "making a process",
        libc::SYS_clone3,
        &[args.into(), (size_of::<CloneArgs>() as u64).into()],
        Expect::Exactly(number as u64),
    );
}

/// Has a user process made, and becomes its tracer: its table ends in a stop.
fn start_user(script: &mut Script, main: TableId, table: TableId, number: i32) {
    start(
        script,
        main,
        table,
        number,
        libc::CLONE_FILES as u64,
        libc::SIGCHLD,
    );
    let n = number as u64;
    script.call(
        main,
        "waiting for a user process",
        libc::SYS_wait4,
        &[n.into(), 0.into(), (libc::__WALL as u64).into(), 0.into()],
        Expect::Exactly(n),
    );
    // The guest kernel does not ask for the second; with it nothing of the guest outlives main.
    let options = (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as u64;
    let args = [libc::PTRACE_SETOPTIONS as u64, n, 0, options];
    ok(
        script,
        main,
        "tracing a user process",
        libc::SYS_ptrace,
        &args,
    );
}

/// The calls of a user process. The last takes away the memory that it runs in: it stops with SIGSEGV, which main sees
/// and nobody delivers.
fn user(
    script: &mut Script,
    table: TableId,
    machine: &Machine,
    u: &User,
    (scratch, reserve): (u64, u64),
) {
    let trace = [libc::PTRACE_TRACEME as u64];
    ok(
        script,
        table,
        "asking to be traced",
        libc::SYS_ptrace,
        &trace,
    );
    // Main has put its own restartable sequence aside by now; that is for its own thread, at the end of its table.
    for (signal, handler) in [(libc::SIGTERM, 0), (libc::SIGWINCH, 1)] {
        action(script, table, &plain(signal, handler));
    }
    action(script, table, &machine.stub.segv);
    let (sp, flags, size) = machine.stub.altstack;
    let stack = script.words(&[sp, u64::from(flags), size]);
    let unmapped = [(0, scratch), (scratch + reserve, TOP)];
    for (start, end) in unmapped {
        ok(
            script,
            table,
            "unmapping",
            libc::SYS_munmap,
            &[start, end - start],
        );
    }
    let fd = machine.memory_fd as u64;
    for p in &u.pieces {
        piece(script, table, p, fd);
    }
    script.call(
        table,
        "setting the signal stack",
        libc::SYS_sigaltstack,
        &[stack.into(), 0.into()],
        Expect::Success,
    );
    let none = script.words(&[0]);
    script.call(
        table,
        "setting the signal mask",
        libc::SYS_rt_sigprocmask,
        &[2.into(), none.into(), 0.into(), 8.into()],
        Expect::Success,
    );
    let args = [scratch, reserve];
    ok(script, table, "leaving", libc::SYS_munmap, &args);
}

fn piece(script: &mut Script, table: TableId, p: &Piece, fd: u64) {
    let kind = if p.shared {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    let flags = (kind | libc::MAP_FIXED) as u64;
    script.call(
        table,
        "mapping memory of a user process",
        libc::SYS_mmap,
        &[p.start, p.len, p.prot as u64, flags, fd, p.offset].map(Into::into),
        Expect::Exactly(p.start),
    );
}

fn plain(signal: i32, handler: u64) -> SignalAction {
    SignalAction {
        signal,
        handler,
        flags: 0,
        restorer: 0,
        mask: 0,
    }
}

fn action(script: &mut Script, table: TableId, a: &SignalAction) {
    let words = script.words(&[a.handler, a.flags, a.restorer, a.mask]);
    script.call(
        table,
        "setting a signal action",
        libc::SYS_rt_sigaction,
        &[(a.signal as u64).into(), words.into(), 0.into(), 8.into()],
        Expect::Success,
    );
}

/// A helper has main's actions, but for those that it ignores or has given back.
fn helper(script: &mut Script, table: TableId, h: &Helper) {
    for signal in 1..=64 {
        let bit = 1u64 << (signal - 1);
        if signal == libc::SIGKILL || signal == libc::SIGSTOP || h.caught & bit != 0 {
            continue;
        }
        let handler = u64::from(h.ignored & bit != 0);
        action(script, table, &plain(signal, handler));
    }
    name(script, table, &h.thread);
}

fn name(script: &mut Script, table: TableId, t: &Thread) {
    let mut name = t.comm.as_bytes().to_vec();
    name.truncate(15);
    name.push(0);
    let name = script.bytes(&name);
    script.call(
        table,
        "setting a name",
        libc::SYS_prctl,
        &[(libc::PR_SET_NAME as u64).into(), name.into()],
        Expect::Success,
    );
}

fn main_thread(script: &mut Script, table: TableId, t: &Thread) {
    name(script, table, t);
    let (sp, flags, size) = t.altstack;
    let stack = script.words(&[sp, u64::from(flags), size]);
    script.call(
        table,
        "setting the signal stack",
        libc::SYS_sigaltstack,
        &[stack.into(), 0.into()],
        Expect::Success,
    );
    if t.robust.0 != 0 {
        let args = [t.robust.0, t.robust.1];
        ok(
            script,
            table,
            "setting the list of robust futexes",
            libc::SYS_set_robust_list,
            &args,
        );
    }
    let (area, size, signature, flags) = t.rseq;
    if area != 0 {
        let args = [
            area,
            u64::from(size),
            u64::from(flags),
            u64::from(signature),
        ];
        ok(
            script,
            table,
            "registering restartable sequences",
            libc::SYS_rseq,
            &args,
        );
    }
}

/// Becomes main: never comes back.
fn become_main(plan: Plan<'_>, helpers: &Helpers, scratch: &Scratch, table: usize) -> ! {
    let run = std::panic::AssertUnwindSafe(|| prepare(plan, helpers));
    let message = match std::panic::catch_unwind(run) {
        Ok(Ok(())) => scratch.enter(table),
        Ok(Err(message)) => message,
        Err(_) => "panic".into(),
    };
    let mut bytes = message.into_bytes();
    bytes.truncate(1000);
    bytes.push(0);
    scratch.write(MESSAGE, &bytes);
    clone::exit_now(127)
}

fn to<T: std::fmt::Display>(what: &'static str) -> impl Fn(T) -> String {
    move |e| format!("{what} failed: {e}")
}

fn prepare(plan: Plan<'_>, helpers: &Helpers) -> Result<(), String> {
    let main = &plan.machine.main;
    nix::unistd::setsid().map_err(to("setsid"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(main.umask));
    let persona = nix::sys::personality::Persona::from_bits_retain(main.personality as i32);
    nix::sys::personality::set(persona).map_err(to("personality"))?;
    // Where it was started from may be gone; a guest kernel makes no use of it.
    if std::env::set_current_dir(&main.cwd).is_err() {
        std::env::set_current_dir("/").map_err(to("chdir"))?;
    }
    let root = std::mem::ManuallyDrop::new(File::open("/").map_err(to("opening /"))?);
    let memory = std::mem::ManuallyDrop::new(plan.memory);
    let shared = |_| memory.try_clone();
    let context = Context {
        root: root.as_fd(),
        external: plan.externals,
        log: None,
        shared: &shared,
        connections: Connections::Reset,
        before_connections: None,
        contended_locks: false,
    };
    let made = files::restore(&plan.files, plan.dir, &context).map_err(|e| text(&e))?;
    let keep = helpers.numbers().map(clone::own).collect();
    let (number, all) = (main.pid, &plan.files);
    let kept = files::install(&main.fds, all, made, keep, (number, false));
    kept.map_err(|e| text(&e))?
        .into_iter()
        .for_each(std::mem::forget);
    files::complete(&main.fds, all, number, &|n| n).map_err(|e| text(&e))?;
    // Their numbers are closed already, or are another file's.
    std::mem::forget(context);
    Ok(())
}

/// Waits until all have run their tables.
fn wait(script: &Script, scratch: &Scratch, tables: &Tables, pid: i32) -> Result<(), Error> {
    let start = Instant::now();
    while !script.wait(scratch, tables.main, 20) {
        let flags = nix::sys::wait::WaitPidFlag::WNOHANG;
        let ended = nix::sys::wait::waitpid(Pid::from_raw(pid), Some(flags));
        let alive = matches!(ended, Ok(nix::sys::wait::WaitStatus::StillAlive));
        if !alive || start.elapsed() > PATIENCE {
            return Err(why(script, scratch, tables));
        }
    }
    checked(script, scratch, tables)
}

fn checked(script: &Script, scratch: &Scratch, tables: &Tables) -> Result<(), Error> {
    let failed = |who: &str| {
        let who = who.to_owned();
        move |e: crate::resume::table::CallFailed| Error::Rebuild(format!("{who}: {e}"))
    };
    for (number, table) in &tables.users {
        let who = format!("user process {number}");
        script.check(scratch, *table).map_err(failed(&who))?;
    }
    for &table in &tables.helpers {
        script.check(scratch, table).map_err(failed("helper"))?;
    }
    script.check(scratch, tables.main).map_err(failed("main"))
}

fn why(script: &Script, scratch: &Scratch, tables: &Tables) -> Error {
    let message = scratch.read(MESSAGE, 1001);
    let end = message.iter().position(|&b| b == 0).unwrap_or(0);
    if end > 0 {
        return Error::Rebuild(String::from_utf8_lossy(&message[..end]).into_owned());
    }
    if let Err(e) = checked(script, scratch, tables) {
        return e;
    }
    let last = script.last(scratch, tables.main);
    Error::Rebuild(format!("its kernel process stopped after {last}"))
}

/// Gives main and the helpers their registers, and lets all go.
fn release(machine: &Machine, main: i32, syscall: u64, scratch: &Scratch) -> Result<(), Error> {
    let numbers = machine.helpers.iter().map(|h| h.thread.tid);
    let all: Vec<i32> = numbers.chain([main]).collect();
    for &pid in &all {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        ptrace::seize(pid, options).map_err(traced(pid, "PTRACE_SEIZE"))?;
        ptrace::interrupt(pid).map_err(traced(pid, "PTRACE_INTERRUPT"))?;
        drive::expect(pid, Report::Interrupted)?;
    }
    for h in &machine.helpers {
        drive::set_thread(&h.thread, h.thread.tid)?;
    }
    let vdso = machine
        .space
        .ranges
        .iter()
        .find(|r| r.backing == Backing::Vdso)
        .ok_or_else(|| Error::Rebuild("main has no vdso".into()))?;
    let area = [scratch.base(), scratch.len() as u64];
    drive::call(main, vdso.start + syscall, libc::SYS_munmap, area)?;
    let thread = machine.main.threads.first();
    drive::set_thread(
        thread.ok_or_else(|| Error::Rebuild("main has no registers".into()))?,
        main,
    )?;
    fault::point("uml.registers");
    for &pid in &all {
        ptrace::detach(pid, 0).map_err(traced(pid, "PTRACE_DETACH"))?;
    }
    // What arrived while nobody listened raised no signal: the guest kernel looks once.
    kill(Pid::from_raw(main), Signal::SIGIO).map_err(|e| Error::Sys("kill", e))
}
