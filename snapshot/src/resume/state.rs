//! The calls that give a process and its threads back what is not memory: signals, timers, prctl values, credentials.

use super::Error;
use super::table::{Arg, Data, Expect, Script, TableId};
use crate::image::manifest::{Credentials, Process, Thread};
use base64::Engine;
use libc::{c_long, siginfo_t};

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// SIGEV_THREAD_ID and the largest size of `struct sigevent`.
const SIGEVENT: usize = 64;

/// A pending signal's siginfo.
fn siginfo(text: &str) -> Result<Vec<u8>, Error> {
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .ok()
        .filter(|b| b.len() == size_of::<siginfo_t>())
        .ok_or(Error::Manifest(
            "a pending signal is not 128 bytes of base64",
        ))
}

struct Calls<'a> {
    script: &'a mut Script,
    table: TableId,
}

impl Calls<'_> {
    fn ok(&mut self, what: &'static str, nr: c_long, args: &[Arg]) {
        self.script
            .call(self.table, what, nr, args, Expect::Success);
    }

    fn data(&mut self, bytes: &[u8]) -> Data {
        self.script.bytes(bytes)
    }

    fn prctl(&mut self, what: &'static str, option: u64, value: u64) {
        self.ok(what, libc::SYS_prctl, &[option.into(), value.into()]);
    }
}

/// Signal actions and timers of a process. Its threads must exist by then, as timers may name them.
pub fn process(script: &mut Script, table: TableId, p: &Process) -> Result<(), Error> {
    let mut c = Calls { script, table };
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        let a = p.actions.iter().find(|a| a.signal == signal);
        let words = a.map_or([0; 4], |a| [a.handler, a.flags, a.restorer, a.mask]);
        let act = c.script.words(&words);
        c.ok(
            "setting a signal action",
            libc::SYS_rt_sigaction,
            &[(signal as u64).into(), act.into(), 0.into(), 8.into()],
        );
    }
    posix_timers(&mut c, p);
    for (which, &(interval, left)) in p.itimers.iter().enumerate() {
        if left == 0 && interval == 0 {
            continue;
        }
        let split = |us: u64| [us / 1_000_000, us % 1_000_000];
        let value = c.script.words(&[split(interval), split(left)].concat());
        c.ok(
            "setting an interval timer",
            libc::SYS_setitimer,
            &[(which as u64).into(), value.into(), 0.into()],
        );
    }
    for text in &p.pending {
        let info = siginfo(text)?;
        let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let info = c.data(&info);
        c.ok(
            "queueing a signal",
            libc::SYS_rt_sigqueueinfo,
            &[(p.pid as u64).into(), (signal as u64).into(), info.into()],
        );
    }
    Ok(())
}

fn posix_timers(c: &mut Calls<'_>, p: &Process) {
    if p.timers.is_empty() {
        return;
    }
    c.prctl(
        "asking for timers by number",
        PR_TIMER_CREATE_RESTORE_IDS,
        1,
    );
    for t in &p.timers {
        let mut event = vec![0u8; SIGEVENT];
        event[..8].copy_from_slice(&t.value.to_ne_bytes());
        event[8..12].copy_from_slice(&t.signal.to_ne_bytes());
        event[12..16].copy_from_slice(&t.notify.to_ne_bytes());
        event[16..20].copy_from_slice(&t.tid.to_ne_bytes());
        let event = c.data(&event);
        let id = c.data(&(t.id as u32 as u64).to_ne_bytes());
        c.ok(
            "making a timer",
            libc::SYS_timer_create,
            &[(t.clock as i64 as u64).into(), event.into(), id.into()],
        );
        if t.left_ns == 0 {
            continue;
        }
        let split = |ns: u64| [ns / 1_000_000_000, ns % 1_000_000_000];
        let value = c
            .script
            .words(&[split(t.interval_ns), split(t.left_ns)].concat());
        c.ok(
            "setting a timer",
            libc::SYS_timer_settime,
            &[(t.id as u64).into(), 0.into(), value.into(), 0.into()],
        );
    }
    c.prctl("ending timers by number", PR_TIMER_CREATE_RESTORE_IDS, 0);
}

/// What a thread sets for itself. The credentials of its process are among it, as the kernel keeps them for each thread.
/// Last of all: after them nothing privileged can be done.
pub fn thread(script: &mut Script, table: TableId, p: &Process, t: &Thread) -> Result<(), Error> {
    let mut c = Calls { script, table };
    let mut name = t.comm.as_bytes().to_vec();
    name.truncate(15);
    name.push(0);
    let name = c.data(&name);
    c.ok(
        "setting a thread's name",
        libc::SYS_prctl,
        &[(libc::PR_SET_NAME as u64).into(), name.into()],
    );
    schedule(&mut c, t);
    let (sp, flags, size) = t.altstack;
    // SS_ONSTACK is what the kernel reports, not what it takes.
    let flags = flags & !(libc::SS_ONSTACK as u32);
    let stack = c.script.words(&[sp, u64::from(flags), size]);
    c.ok(
        "setting the signal stack",
        libc::SYS_sigaltstack,
        &[stack.into(), 0.into()],
    );
    c.ok(
        "setting where a thread's end is noted",
        libc::SYS_set_tid_address,
        &[t.clear_child_tid.into()],
    );
    if t.robust.0 != 0 {
        c.ok(
            "setting the list of robust futexes",
            libc::SYS_set_robust_list,
            &[t.robust.0.into(), t.robust.1.into()],
        );
    }
    let (area, size, signature, flags) = t.rseq;
    if area != 0 {
        c.ok(
            "registering restartable sequences",
            libc::SYS_rseq,
            &[
                area.into(),
                u64::from(size).into(),
                u64::from(flags).into(),
                u64::from(signature).into(),
            ],
        );
    }
    for text in &t.pending {
        let info = siginfo(text)?;
        let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let info = c.data(&info);
        c.ok(
            "queueing a thread's signal",
            libc::SYS_rt_tgsigqueueinfo,
            &[
                (p.pid as u64).into(),
                (t.tid as u64).into(),
                (signal as u64).into(),
                info.into(),
            ],
        );
    }
    credentials(&mut c, &p.credentials);
    if p.prctl.no_new_privs {
        c.ok(
            "setting no_new_privs",
            libc::SYS_prctl,
            &[(libc::PR_SET_NO_NEW_PRIVS as u64).into(), 1.into()],
        );
    }
    c.prctl(
        "setting the parent-death signal",
        libc::PR_SET_PDEATHSIG as u64,
        p.prctl.pdeathsig as u64,
    );
    Ok(())
}

fn schedule(c: &mut Calls<'_>, t: &Thread) {
    let (policy, nice, priority) = t.sched;
    if policy != libc::SCHED_OTHER {
        let param = c.data(&priority.to_ne_bytes());
        c.ok(
            "setting the scheduling policy",
            libc::SYS_sched_setscheduler,
            &[0.into(), (policy as u64).into(), param.into()],
        );
    }
    c.ok(
        "setting the nice value",
        libc::SYS_setpriority,
        &[
            u64::from(libc::PRIO_PROCESS).into(),
            0.into(),
            (nice as i64 as u64).into(),
        ],
    );
    if !t.affinity.is_empty() {
        let mask = c.script.words(&t.affinity);
        // Another machine may have fewer processors.
        c.script.call(
            c.table,
            "setting the processors",
            libc::SYS_sched_setaffinity,
            &[
                0.into(),
                ((t.affinity.len() * 8) as u64).into(),
                mask.into(),
            ],
            Expect::Anything,
        );
    }
}

/// Resource limits. Without CAP_SYS_RESOURCE a hard limit cannot be raised: ours holds then.
pub fn limits(script: &mut Script, table: TableId, p: &Process, own: &[(u64, u64)]) {
    let mut c = Calls { script, table };
    for (i, (&(soft, hard), &(_, most))) in p.limits.iter().zip(own).enumerate() {
        let pair = c.script.words(&[soft.min(most), hard.min(most)]);
        c.ok(
            "setting a limit",
            libc::SYS_prlimit64,
            &[0.into(), (i as u64).into(), pair.into(), 0.into()],
        );
    }
}

/// Values that hold for the whole process and that credentials change: set when all threads have theirs.
pub fn last(script: &mut Script, table: TableId, p: &Process) {
    let mut c = Calls { script, table };
    // 2 (readable by root only) is the kernel's to give, and what a change of users leaves.
    if p.prctl.dumpable < 2 {
        c.prctl(
            "setting dumpable",
            libc::PR_SET_DUMPABLE as u64,
            u64::from(p.prctl.dumpable),
        );
    }
    if p.prctl.subreaper {
        c.prctl(
            "setting child subreaper",
            libc::PR_SET_CHILD_SUBREAPER as u64,
            1,
        );
    }
}

fn credentials(c: &mut Calls<'_>, cred: &Credentials) {
    let groups: Vec<u8> = cred.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let list = c.data(&groups);
    c.ok(
        "setting groups",
        libc::SYS_setgroups,
        &[(cred.groups.len() as u64).into(), list.into()],
    );
    for cap in 0..64u64 {
        if cred.caps[3] & (1 << cap) == 0 {
            // Past the last capability that the kernel knows it is EINVAL.
            let args = [(libc::PR_CAPBSET_DROP as u64).into(), cap.into()];
            c.script.call(
                c.table,
                "dropping a capability",
                libc::SYS_prctl,
                &args,
                Expect::Anything,
            );
        }
    }
    // Without this, a change of users would drop the capabilities that the target kept.
    c.prctl(
        "keeping capabilities",
        libc::PR_SET_SECUREBITS as u64,
        1 << 2 | 1 << 4,
    );
    let id = |v: u32| Arg::from(u64::from(v));
    let [r, e, s, f] = cred.gid;
    c.ok(
        "setting groups",
        libc::SYS_setresgid,
        &[id(r), id(e), id(s)],
    );
    c.script.call(
        c.table,
        "setfsgid",
        libc::SYS_setfsgid,
        &[id(f)],
        Expect::Anything,
    );
    let [r, e, s, f] = cred.uid;
    c.ok("setting users", libc::SYS_setresuid, &[id(r), id(e), id(s)]);
    c.script.call(
        c.table,
        "setfsuid",
        libc::SYS_setfsuid,
        &[id(f)],
        Expect::Anything,
    );
    let [inheritable, permitted, effective, _, ambient] = cred.caps;
    let header = c.script.words(&[u64::from(CAPABILITY_VERSION_3)]);
    // The setting of secure bits needs CAP_SETPCAP still; so with it first, and without it after.
    let setpcap = 1u64 << 8;
    for effective in [effective | setpcap & permitted, effective] {
        let mut sets = Vec::new();
        for half in 0..2 {
            for set in [effective, permitted, inheritable] {
                sets.extend_from_slice(&((set >> (32 * half)) as u32).to_ne_bytes());
            }
        }
        if permitted & setpcap == 0 {
            // Not kept: secure bits go first, which then must still allow the change of users that was made.
            c.prctl(
                "setting secure bits",
                libc::PR_SET_SECUREBITS as u64,
                u64::from(cred.securebits),
            );
        }
        let sets = c.data(&sets);
        c.ok(
            "setting capabilities",
            libc::SYS_capset,
            &[header.into(), sets.into()],
        );
        if permitted & setpcap == 0 {
            break;
        }
        c.script.call(
            c.table,
            "setting secure bits",
            libc::SYS_prctl,
            &[
                (libc::PR_SET_SECUREBITS as u64).into(),
                u64::from(cred.securebits).into(),
            ],
            Expect::Anything,
        );
    }
    for cap in 0..64u64 {
        if ambient & (1 << cap) != 0 {
            c.ok(
                "raising an ambient capability",
                libc::SYS_prctl,
                &[
                    (libc::PR_CAP_AMBIENT as u64).into(),
                    (libc::PR_CAP_AMBIENT_RAISE as u64).into(),
                    cap.into(),
                ],
            );
        }
    }
}
