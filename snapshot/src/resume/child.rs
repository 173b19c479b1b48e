//! What a new process does in ordinary Rust, before its memory is exchanged; and the first calls of its table.

use super::table::{Arg, Expect, MESSAGE, READY, Script, TableId};
use super::{Plan, files};
use crate::image::manifest::Process;
use crate::sys::clone::{CloneArgs, Fork, exit_now, fork, own_rseq};
use nix::errno::Errno;
use nix::unistd::Pid;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The C library registered an area for the thread that forked; it is about to be unmapped.
pub fn leave_rseq(script: &mut Script, table: TableId) {
    let Some((area, size)) = own_rseq() else {
        return;
    };
    // The size that was registered is not always the one that is announced; the wrong one is refused.
    for size in [32, size, 20, 24, 28] {
        let args = [
            area.into(),
            u64::from(size).into(),
            1.into(),
            0x5305_3053.into(),
        ];
        script.call(
            table,
            "leaving restartable sequences",
            libc::SYS_rseq,
            &args,
            Expect::Anything,
        );
    }
}

/// Makes a thread that starts on its own table.
pub fn thread(script: &mut Script, leader: TableId, table: TableId, tid: i32) {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let wanted = script.words(&[tid as u64]);
    let args = CloneArgs {
        flags: flags as u64,
        stack_size: 64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let args = script.words(&args.words());
    // The stack pointer of the new thread is the end of its stack. It comes out of the call as if it had made the entry
    // before its first one: that is the end mark of another table, whose result nobody reads.
    script.relocate_back(args, 5, Arg::Table(table), 128);
    script.relocate(args, 8, wanted.into());
    script.call(
        leader,
        "making a thread",
        libc::SYS_clone3,
        &[args.into(), (size_of::<CloneArgs>() as u64).into()],
        Expect::Exactly(tid as u64),
    );
}

/// Becomes the process: never comes back. The root makes the open files, the others inherit them.
pub fn become_process(plan: &Plan<'_>, p: &Process, made: Option<Vec<OwnedFd>>) -> ! {
    let run = std::panic::AssertUnwindSafe(|| prepare(plan, p, made));
    let message = match std::panic::catch_unwind(run) {
        Ok(Ok(())) => {
            if let Some(t) = plan.tables.iter().find(|t| t.pid == p.pid) {
                plan.scratch.enter(plan.script.offset(t.leader));
            }
            "it has no table".into()
        }
        Ok(Err(message)) => message,
        Err(_) => "panic".into(),
    };
    let mut bytes = format!("{} {message}", p.pid).into_bytes();
    bytes.truncate(1000);
    bytes.push(0);
    plan.scratch.write(MESSAGE, &bytes);
    exit_now(127)
}

fn to<T>(what: &'static str) -> impl Fn(T) -> String
where
    T: std::fmt::Display,
{
    move |e| format!("{what} failed: {e}")
}

fn prepare(plan: &Plan<'_>, p: &Process, made: Option<Vec<OwnedFd>>) -> Result<(), String> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(to("PR_SET_PDEATHSIG"))?;
    let made = match made {
        Some(made) => made,
        None => files::restore(plan)?,
    };
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(p.umask));
    let persona = nix::sys::personality::Persona::from_bits_retain(p.personality as i32);
    nix::sys::personality::set(persona).map_err(to("personality"))?;
    // Lowering it needs CAP_SYS_RESOURCE; a process that is killed a little earlier is better than none.
    let _ = std::fs::write("/proc/self/oom_score_adj", p.oom_score_adj.to_string());
    let made = children(plan, p, true, made)?;
    session(plan, p)?;
    let made = children(plan, p, false, made)?;
    if plan.lazy() {
        let fd = crate::sys::fill::create().map_err(to("userfaultfd"))?;
        crate::sys::clone::move_to(fd, plan.helpers.uffd).map_err(to("dup3"))?;
    }
    files::install(plan, p, made)?;
    all_there(plan)?;
    files::complete(plan, p)?;
    std::env::set_current_dir(&p.cwd).map_err(to("chdir"))?;
    if p.root != std::path::Path::new("/") {
        // The working directory may be outside of it, and stays open.
        nix::unistd::chroot(&p.root).map_err(to("chroot"))?;
    }
    Ok(())
}

/// Waits until all processes have made their children.
fn all_there(plan: &Plan<'_>) -> Result<(), String> {
    let all = plan.tables.len() as u64;
    plan.scratch.increment(READY);
    for _ in 0..3000 {
        let now = plan.scratch.word(READY);
        if now >= all {
            return Ok(());
        }
        plan.scratch.wait(READY, now as u32, 20);
    }
    Err("not all processes of the tree were made".into())
}

/// Session and group. A leader makes its own; a group's leader may not be there yet.
fn session(plan: &Plan<'_>, p: &Process) -> Result<(), String> {
    if p.sid == p.pid {
        nix::unistd::setsid().map_err(to("setsid"))?;
        return Ok(());
    }
    let own = nix::unistd::getpgrp().as_raw();
    // A group whose leader is outside of the tree is not made again: the caller's is as good.
    if p.pgid == own || !plan.manifest.processes.iter().any(|l| l.pid == p.pgid) {
        return Ok(());
    }
    for _ in 0..1000 {
        match nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(p.pgid)) {
            Ok(()) => return Ok(()),
            Err(Errno::EPERM | Errno::ESRCH) if p.pgid != p.pid => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(format!("setpgid failed: {e}")),
        }
    }
    Err(format!("its process group {} did not appear", p.pgid))
}

/// Children that are in another session than their parent, and lead none, were made before their parent made its own.
fn children(
    plan: &Plan<'_>,
    p: &Process,
    early: bool,
    made: Vec<OwnedFd>,
) -> Result<Vec<OwnedFd>, String> {
    for c in &plan.manifest.processes[1..] {
        let first = p.sid == p.pid && c.sid != p.sid && c.sid != c.pid;
        if c.ppid != p.pid || c.pid == p.pid || first != early {
            continue;
        }
        match fork(0, c.exit_signal, Some(c.pid)).map_err(to("clone3"))? {
            Fork::Parent(_) => {}
            Fork::Child => match c.zombie {
                None => become_process(plan, c, Some(made)),
                Some(status) => {
                    let _ = session(plan, c);
                    end_as(status)
                }
            },
        }
    }
    Ok(made)
}

/// Ends with a status as of wait(2).
fn end_as(status: i32) -> ! {
    let signal = status & 0x7f;
    if signal != 0 {
        crate::sys::signals::die_of(signal);
    }
    exit_now(status >> 8 & 0xff)
}
