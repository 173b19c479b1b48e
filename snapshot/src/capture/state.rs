//! What a process is beside its memory and open files: identity, signals, timers, threads.

use super::Error;
use super::threads::{Own, Questions};
use crate::image::manifest::{
    Credentials, PosixTimer, Prctl, Process, SignalAction, Space, Thread,
};
use crate::proc::{self, Stat, Status};
use crate::sys::{limits, ptrace, remote};
use crate::target::batch::Arg;
use crate::target::driver::Started;
use crate::target::{Batch, Driver, Error as TargetError, Stopped};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::collections::HashMap;
use std::path::PathBuf;

const SIGNALS: i32 = 64;
/// The kernel's ERESTART_RESTARTBLOCK (`include/linux/errno.h`).
const RESTARTBLOCK: i64 = -516;

/// What is read before the stop: what only the process itself could change, and seldom does, or what is looked at again
/// in the stop.
#[derive(Debug, Clone)]
pub struct Before {
    pid: i32,
    limits: Vec<(u64, u64)>,
    personality: u32,
    oom_score_adj: i32,
    scheds: HashMap<i32, Sched>,
    status: Status,
    stat: Stat,
    exe: PathBuf,
    auxv: Vec<u64>,
    /// Threads that our first look at them has interrupted in a call with a timeout: where, and in which one.
    interrupted: HashMap<i32, (u64, u64)>,
}

#[derive(Debug, Clone, Default)]
struct Sched {
    comm: String,
    sched: (i32, i32, i32),
    affinity: Vec<u64>,
}

impl Before {
    /// Reads it.
    pub fn read(pid: i32) -> Result<Self, Error> {
        let text = |name: &str| {
            proc::read_bytes(pid, name).map(|b| String::from_utf8_lossy(&b).trim().to_owned())
        };
        let mut scheds = HashMap::new();
        for tid in proc::threads(pid)? {
            scheds.insert(tid, Sched::read(pid, tid));
        }
        Ok(Self {
            pid,
            limits: limits::all(pid),
            personality: u32::from_str_radix(&text("personality")?, 16).unwrap_or_default(),
            oom_score_adj: text("oom_score_adj")?.parse().unwrap_or_default(),
            scheds,
            status: proc::status(pid)?,
            stat: proc::stat(pid)?,
            exe: proc::link(pid, "exe")?,
            auxv: auxv(pid)?,
            interrupted: HashMap::new(),
        })
    }
}

impl Before {
    /// Groups that there is room for: a process that takes on more meanwhile is an error of the call.
    fn most_groups(&self) -> usize {
        self.status.groups.len() + 16
    }

    /// Notes in which call the first stop of a thread has interrupted it.
    pub fn note_interrupted(&mut self, tid: i32) {
        if let Ok(r) = ptrace::regs(tid)
            && r.rax.cast_signed() == RESTARTBLOCK
            && r.orig_rax.cast_signed() != libc::SYS_restart_syscall
        {
            self.interrupted.insert(tid, (r.rip, r.orig_rax));
        }
    }

    /// Bytes of scratch that are needed for so many threads and timers.
    #[must_use]
    pub fn scratch_len(&self, threads: usize, timers: usize) -> u64 {
        // Table entries are 64 bytes; an action is 32, a timer's answer 32.
        let process = (SIGNALS as usize + 48 + timers) * (64 + 32) + 4 * self.most_groups();
        ((process + threads * 256) as u64).next_multiple_of(4096)
    }
}

impl Sched {
    fn read(pid: i32, tid: i32) -> Self {
        let stat = proc::stat(tid);
        let comm = proc::read_bytes(pid, &format!("task/{tid}/comm")).unwrap_or_default();
        Self {
            comm: String::from_utf8_lossy(&comm)
                .trim_end_matches('\n')
                .to_owned(),
            sched: stat
                .map(|s| (s.policy, s.nice, s.rt_priority))
                .unwrap_or_default(),
            affinity: limits::affinity(tid),
        }
    }
}

/// What each thread looked like at the stop, and the calls that are still to be made in its name.
#[derive(Debug)]
pub struct Threads {
    threads: Vec<Thread>,
    xstates: Xstates,
    shared: Vec<String>,
}

/// The extended states of threads as they were read. A manifest has them as text, which is made after the stop.
#[derive(Debug, Default)]
pub struct Xstates(Vec<Vec<u8>>);

impl Xstates {
    /// Puts them into the threads that they are of.
    pub fn put(self, process: &mut Process) {
        for (thread, state) in process.threads.iter_mut().zip(self.0) {
            thread.xstate = BASE64.encode(state);
        }
    }
}

impl Thread {
    fn take(&mut self, own: Own) {
        self.altstack = own.altstack;
        self.clear_child_tid = own.clear_child_tid;
    }
}

impl Threads {
    /// Reads the registers of stopped threads, and what else can be had without a call.
    pub fn read(stopped: &Stopped, before: &Before) -> Result<Self, Error> {
        let leader = stopped.threads()[0];
        let mut threads = Vec::with_capacity(stopped.threads().len());
        let mut xstates = Xstates(Vec::with_capacity(stopped.threads().len()));
        for &tid in stopped.threads() {
            let fail = |what| move |e| Error::Target(TargetError::Ptrace(tid, what, e));
            let sched = before
                .scheds
                .get(&tid)
                .cloned()
                .unwrap_or_else(|| Sched::read(before.pid, tid));
            let xstate = ptrace::xstate(tid).map_err(fail("PTRACE_GETREGSET"))?;
            xstates.0.push(xstate);
            threads.push(Thread {
                tid,
                regs: ptrace::regs_to_words(&name_restarted(
                    before,
                    tid,
                    ptrace::regs(tid).map_err(fail("PTRACE_GETREGS"))?,
                )),
                xstate: String::new(),
                sigmask: ptrace::sigmask(tid).map_err(fail("PTRACE_GETSIGMASK"))?,
                altstack: (0, 0, 0),
                robust: remote::robust_list(tid).map_err(fail("get_robust_list"))?,
                rseq: ptrace::rseq(tid).map_err(fail("PTRACE_GET_RSEQ_CONFIGURATION"))?,
                clear_child_tid: 0,
                comm: sched.comm,
                pending: encode(ptrace::pending(tid, false).map_err(fail("PTRACE_PEEKSIGINFO"))?),
                sched: sched.sched,
                affinity: sched.affinity,
            });
        }
        let shared = ptrace::pending(leader, true);
        let shared = shared
            .map_err(|e| Error::Target(TargetError::Ptrace(leader, "PTRACE_PEEKSIGINFO", e)))?;
        Ok(Self {
            threads,
            xstates,
            shared: encode(shared),
        })
    }
}

/// A call with a timeout that was interrupted once before, by an earlier stop, goes on as restart_syscall(2), whose state is
/// in the kernel. A new process has none: there the call itself must be made again. Its number stands in the code in front
/// of the `syscall` instruction; its arguments are in the registers still. The thread may be in the call, or not have come to
/// it again since that stop: then restart_syscall is what it is about to call.
fn name_restarted(before: &Before, tid: i32, mut regs: ptrace::Regs) -> ptrace::Regs {
    /// `mov eax, imm32`
    const MOV: u8 = 0xb8;
    const KNOWN: [i64; 4] = [
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_poll,
        libc::SYS_futex,
    ];
    /// The length of `syscall`.
    const CALL: u64 = 2;
    let restart = libc::SYS_restart_syscall.cast_unsigned();
    let inside = regs.orig_rax == restart && regs.rax.cast_signed() == RESTARTBLOCK;
    let at_the_door = regs.rax == restart;
    if !inside && !at_the_door {
        return regs;
    }
    let after = if inside { regs.rip } else { regs.rip + CALL };
    let mut code = [0u8; 34];
    let seen = remote::read(before.pid, after.wrapping_sub(34), &mut code).is_ok();
    let number = if seen && code[32..] != [0x0f, 0x05] {
        // The number of the call stands in rax by chance.
        None
    } else if let Some(&(rip, number)) = before.interrupted.get(&tid)
        && rip == after
    {
        Some(number)
    } else {
        code[..32].windows(5).rev().find_map(|w| {
            let n = i64::from(u32::from_le_bytes([w[1], w[2], w[3], w[4]]));
            (w[0] == MOV && KNOWN.contains(&n)).then_some(n.cast_unsigned())
        })
    };
    match number {
        Some(n) if inside => regs.orig_rax = n,
        Some(n) => regs.rax = n,
        None => {}
    }
    regs
}

fn encode(infos: Vec<[u8; 128]>) -> Vec<String> {
    infos.iter().map(|i| BASE64.encode(i)).collect()
}

#[derive(Debug)]
struct ProcessQuestions {
    actions: Vec<(i32, Arg)>,
    itimers: [Arg; 3],
    timers: Vec<(PosixTimer, usize, Arg)>,
    dumpable: usize,
    pdeathsig: Arg,
    subreaper: Arg,
    securebits: usize,
    brk: usize,
    ppid: usize,
    pgid: usize,
    sid: usize,
    umask: usize,
    uid: Arg,
    gid: Arg,
    fsuid: usize,
    fsgid: usize,
    groups: (usize, Arg),
    caps: Arg,
    no_new_privs: usize,
}

/// Threads that are at work on what must be asked in their own names.
#[derive(Debug)]
pub struct Asked {
    threads: Threads,
    process: ProcessQuestions,
    /// Numbers in `threads`.
    questions: Vec<(usize, Questions)>,
    batches: Vec<Batch>,
    started: Started,
}

/// Has what must be asked in the process's own name be asked. The driver holds the first thread, and those that are not in
/// `known`, in the order of `threads`.
pub fn ask(
    driver: &mut Driver<'_>,
    before: &Before,
    mut threads: Threads,
    known: &HashMap<i32, Own>,
) -> Result<Asked, Error> {
    let timers = timers(before.pid)?;
    let mut batches = vec![Batch::new()];
    let mut questions = vec![(0, Questions::ask(&mut batches[0]))];
    let process = ask_process(&mut batches[0], before, &timers);
    for (i, thread) in threads.threads.iter_mut().enumerate().skip(1) {
        if let Some(own) = known.get(&thread.tid) {
            thread.take(*own);
        } else {
            let mut b = Batch::new();
            questions.push((i, Questions::ask(&mut b)));
            batches.push(b);
        }
    }
    let started = driver.start(&batches)?;
    Ok(Asked {
        threads,
        process,
        questions,
        batches,
        started,
    })
}

/// Waits for the answers and puts all together. Memory, open files and the number of the address space are left for the
/// caller, and so are the extended states.
pub fn put_together(
    driver: &mut Driver<'_>,
    before: &Before,
    asked: Asked,
    stopped: &Stopped,
) -> Result<(Process, Space, Xstates), Error> {
    let pid = before.pid;
    let Asked {
        mut threads,
        process: p,
        questions,
        mut batches,
        started,
    } = asked;
    driver.finish(started, &mut batches)?;
    for ((i, q), b) in questions.iter().zip(&batches) {
        threads.threads[*i].take(q.answers(b));
    }
    let umask = batches[0].result(p.umask).unwrap_or_default();
    if umask != i64::from(before.status.umask) {
        let mut back = Batch::new();
        back.call(libc::SYS_umask, &[(umask as u64).into()]);
        driver.run(&mut back)?;
    }
    let mut layout = before.stat.layout;
    layout[5] = batches[0]
        .result(p.brk)
        .map_err(|e| Error::Call(pid, "brk", e))? as u64;
    let space = Space {
        layout,
        auxv: before.auxv.clone(),
        ranges: Vec::new(),
        thp_disabled: !before.status.thp_enabled,
    };
    let xstates = std::mem::take(&mut threads.xstates);
    let process = answer(before, &batches[0], &p, threads, stopped)?;
    Ok((process, space, xstates))
}

/// The auxiliary vector, words.
fn auxv(pid: i32) -> Result<Vec<u64>, Error> {
    let bytes = proc::read_bytes(pid, "auxv")?;
    Ok(bytes
        .chunks_exact(8)
        .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
        .collect())
}

fn ask_process(b: &mut Batch, before: &Before, timers: &[PosixTimer]) -> ProcessQuestions {
    let most_groups = before.most_groups();
    let mut actions = Vec::new();
    for signal in 1..=SIGNALS {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        let old = b.room(32);
        b.call(
            libc::SYS_rt_sigaction,
            &[signal.into(), 0.into(), old, 8.into()],
        );
        actions.push((signal, old));
    }
    let itimers = [0, 1, 2].map(|which| {
        let value = b.room(32);
        b.call(libc::SYS_getitimer, &[which.into(), value]);
        value
    });
    let timers = timers
        .iter()
        .map(|t| {
            let value = b.room(32);
            (
                t.clone(),
                b.call(libc::SYS_timer_gettime, &[t.id.into(), value]),
                value,
            )
        })
        .collect();
    let dumpable = b.call(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]);
    let (pdeathsig, subreaper) = (b.room(8), b.room(8));
    b.call(libc::SYS_prctl, &[libc::PR_GET_PDEATHSIG.into(), pdeathsig]);
    b.call(
        libc::SYS_prctl,
        &[libc::PR_GET_CHILD_SUBREAPER.into(), subreaper],
    );
    let securebits = b.call(libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into()]);
    // An impossible break is refused, and the present one is the answer.
    let brk = b.call(libc::SYS_brk, &[0.into()]);
    let (uid, gid, groups, caps) = (b.room(16), b.room(16), b.room(4 * most_groups), b.room(24));
    let at = |place: Arg, n: usize| match place {
        Arg::Data(d) => Arg::Data(d + n),
        word => word,
    };
    b.call(libc::SYS_getresuid, &[uid, at(uid, 4), at(uid, 8)]);
    b.call(libc::SYS_getresgid, &[gid, at(gid, 4), at(gid, 8)]);
    // An impossible number changes nothing, and the answer is the present one.
    let fsuid = b.call(libc::SYS_setfsuid, &[u64::from(u32::MAX).into()]);
    let fsgid = b.call(libc::SYS_setfsgid, &[u64::from(u32::MAX).into()]);
    let asked = b.call(libc::SYS_getgroups, &[(most_groups as u64).into(), groups]);
    // Version 3 of the capabilities, of the caller.
    let head = b.data(&[0x22, 0x05, 0x08, 0x20, 0, 0, 0, 0]);
    b.call(libc::SYS_capget, &[head, caps]);
    // umask(2) can only be read by setting it: to what it was, which is what it is but in the rarest of cases.
    let umask = b.call(libc::SYS_umask, &[u64::from(before.status.umask).into()]);
    let [ppid, pgid, sid] =
        [libc::SYS_getppid, libc::SYS_getpgid, libc::SYS_getsid].map(|nr| b.call(nr, &[0.into()]));
    let no_new_privs = b.call(libc::SYS_prctl, &[libc::PR_GET_NO_NEW_PRIVS.into()]);
    ProcessQuestions {
        ppid,
        pgid,
        sid,
        umask,
        uid,
        gid,
        fsuid,
        fsgid,
        groups: (asked, groups),
        caps,
        no_new_privs,
        brk,
        actions,
        itimers,
        timers,
        dumpable,
        pdeathsig,
        subreaper,
        securebits,
    }
}

fn answer(
    before: &Before,
    b: &Batch,
    p: &ProcessQuestions,
    threads: Threads,
    stopped: &Stopped,
) -> Result<Process, Error> {
    let pid = before.pid;
    let call = |what| move |e| Error::Call(pid, what, e);
    let mut timers = Vec::new();
    for (timer, asked, value) in &p.timers {
        b.result(*asked).map_err(call("timer_gettime"))?;
        let ns = |at| {
            b.word(*value, at)
                .saturating_mul(1_000_000_000)
                .saturating_add(b.word(*value, at + 8))
        };
        timers.push(PosixTimer {
            interval_ns: ns(0),
            left_ns: ns(16),
            ..timer.clone()
        });
    }
    let itimers = p.itimers.map(|v| {
        let us = |at| {
            b.word(v, at)
                .saturating_mul(1_000_000)
                .saturating_add(b.word(v, at + 8))
        };
        (us(0), us(16))
    });
    let actions = p.actions.iter().filter_map(|&(signal, old)| {
        let action = SignalAction {
            signal,
            handler: b.word(old, 0),
            flags: b.word(old, 8),
            restorer: b.word(old, 16),
            mask: b.word(old, 24),
        };
        (action.handler != 0 || action.flags != 0).then_some(action)
    });
    let status = &before.status;
    let number = |asked, what| b.result(asked).map(|n| n as i32).map_err(call(what));
    let ids = |place, fs| {
        let three = b.word(place, 0);
        let r: Result<_, Error> = Ok([
            three as u32,
            (three >> 32) as u32,
            b.word(place, 8) as u32,
            b.result(fs).map_err(call("setfsuid"))? as u32,
        ]);
        r
    };
    let groups = b.result(p.groups.0).map_err(call("getgroups"))?;
    let groups = b.bytes(p.groups.1, 4 * usize::try_from(groups).unwrap_or_default());
    // capget(2) gives effective, permitted, inheritable: low words, then high ones.
    let caps = |i: usize| {
        let word = |at| b.word(p.caps, at) as u32;
        u64::from(word(12 + 4 * i)) << 32 | u64::from(word(4 * i))
    };
    Ok(Process {
        pid: status.ns_pid.last().copied().unwrap_or(pid),
        ppid: number(p.ppid, "getppid")?,
        pgid: number(p.pgid, "getpgid")?,
        sid: number(p.sid, "getsid")?,
        exit_signal: before.stat.exit_signal,
        zombie: None,
        space: 0,
        exe: before.exe.clone(),
        cwd: proc::link(pid, "cwd")?,
        root: proc::link(pid, "root")?,
        umask: number(p.umask, "umask")? as u32,
        credentials: Credentials {
            uid: ids(p.uid, p.fsuid)?,
            gid: ids(p.gid, p.fsgid)?,
            groups: groups
                .chunks_exact(4)
                .map(|c| u32::from_le_bytes(c.try_into().unwrap_or_default()))
                .collect(),
            caps: [caps(2), caps(1), caps(0), status.caps[3], status.caps[4]],
            securebits: b
                .result(p.securebits)
                .map_err(call("prctl(PR_GET_SECUREBITS)"))? as u32,
        },
        limits: before.limits.clone(),
        personality: before.personality,
        oom_score_adj: before.oom_score_adj,
        prctl: Prctl {
            dumpable: b
                .result(p.dumpable)
                .map_err(call("prctl(PR_GET_DUMPABLE)"))? as u32,
            no_new_privs: number(p.no_new_privs, "prctl(PR_GET_NO_NEW_PRIVS)")? != 0,
            subreaper: b.word(p.subreaper, 0) as u32 != 0,
            pdeathsig: b.word(p.pdeathsig, 0) as i32,
        },
        actions: actions.collect(),
        pending: threads.shared,
        itimers,
        timers,
        fds: Vec::new(),
        threads: threads.threads,
        stopped: stopped.job_stop().is_some(),
    })
}

/// POSIX timers as `/proc/PID/timers` lists them (proc_pid_timers(5)), without times.
pub fn timers(pid: i32) -> Result<Vec<PosixTimer>, Error> {
    let text = proc::read_bytes(pid, "timers")?;
    Ok(parse_timers(&String::from_utf8_lossy(&text)))
}

pub(crate) fn parse_timers(text: &str) -> Vec<PosixTimer> {
    let mut out: Vec<PosixTimer> = Vec::new();
    for (key, value) in text.lines().filter_map(|l| l.split_once(':')) {
        let value = value.trim();
        match (key, out.last_mut()) {
            ("ID", _) => out.push(PosixTimer {
                id: value.parse().unwrap_or_default(),
                clock: 0,
                notify: 0,
                signal: 0,
                value: 0,
                tid: 0,
                interval_ns: 0,
                left_ns: 0,
            }),
            // signal: 14/00007ffd...
            ("signal", Some(t)) => {
                if let Some((signal, pointer)) = value.split_once('/') {
                    t.signal = signal.parse().unwrap_or_default();
                    t.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16)
                        .unwrap_or_default();
                }
            }
            // notify: signal/pid.77, thread/tid.78, none/pid.0
            ("notify", Some(t)) => {
                let (how, whom) = value.split_once('/').unwrap_or((value, ""));
                let by_thread = whom.starts_with("tid.");
                t.notify = match how {
                    "signal" if by_thread => libc::SIGEV_THREAD_ID,
                    "signal" => libc::SIGEV_SIGNAL,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_NONE,
                };
                t.tid = whom
                    .get(4..)
                    .filter(|_| by_thread)
                    .and_then(|n| n.parse().ok())
                    .unwrap_or_default();
            }
            ("ClockID", Some(t)) => t.clock = value.parse().unwrap_or_default(),
            _ => {}
        }
    }
    out
}

/// A zombie's entry: only who it was and how it ended.
pub fn zombie(pid: i32) -> Result<Process, Error> {
    let stat = proc::stat(pid)?;
    let status = proc::status(pid)?;
    Ok(Process {
        pid: status.ns_pid.last().copied().unwrap_or(pid),
        ppid: stat.ppid,
        pgid: stat.pgid,
        sid: stat.sid,
        exit_signal: stat.exit_signal,
        zombie: Some(stat.exit_code),
        space: 0,
        exe: PathBuf::new(),
        cwd: PathBuf::new(),
        root: PathBuf::new(),
        umask: 0,
        credentials: Credentials::default(),
        limits: Vec::new(),
        personality: 0,
        oom_score_adj: 0,
        prctl: Prctl::default(),
        actions: Vec::new(),
        pending: Vec::new(),
        itimers: [(0, 0); 3],
        timers: Vec::new(),
        fds: Vec::new(),
        threads: Vec::new(),
        stopped: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_parsed() {
        let text = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/tid.2635\nClockID: 1\n";
        let t = parse_timers(text);
        assert_eq!(t.len(), 2);
        assert_eq!(
            (t[0].id, t[0].signal, t[0].value, t[0].notify),
            (1, 60, 0x7fff_86e4_52a8, libc::SIGEV_SIGNAL)
        );
        assert_eq!(
            (t[1].notify, t[1].tid, t[1].clock),
            (libc::SIGEV_THREAD_ID, 2635, 1)
        );
    }

    /// A wait that was interrupted before is recorded as itself: in the call again, and on the way back to it (a thread that
    /// lost its CPU there was recorded as about to call restart_syscall, and its wait ended with EINTR after a resume).
    #[test]
    fn an_interrupted_wait_is_recorded_as_itself() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let nr = libc::SYS_clock_nanosleep.cast_unsigned();
        let sleeps = || {
            proc::read_bytes(pid, "syscall")
                .is_ok_and(|s| s.starts_with(format!("{nr} ").as_bytes()))
        };
        while !sleeps() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let mut before = Before::read(pid).unwrap();
        let stopped = Stopped::one(pid, pid).unwrap();
        before.note_interrupted(pid);
        let first = ptrace::regs(pid).unwrap();
        let mut results = vec![before.interrupted.get(&pid) == Some(&(first.rip, nr))];
        let mut again = first;
        again.orig_rax = libc::SYS_restart_syscall.cast_unsigned();
        let mut door = again;
        door.rax = again.orig_rax;
        door.rip -= 2;
        // Known from the stop before; and not known: then the code tells.
        for known in [before.interrupted.clone(), HashMap::new()] {
            before.interrupted = known;
            results.push(name_restarted(&before, pid, again).orig_rax == nr);
            let door = name_restarted(&before, pid, door);
            results.push((door.rax, door.rip) == (nr, first.rip - 2));
        }
        // The same number in rax elsewhere is only a number.
        door.rip += 2;
        results.push(name_restarted(&before, pid, door).rax == door.rax);
        stopped.release();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(results, [true; 6]);
    }
}
