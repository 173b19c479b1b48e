//! Open files of the new processes: made once by the root of the tree, put at their numbers by each process.

use super::table::{Expect, Script, TableId};
use super::{Error, Plan};
use crate::files::{self, Connections, Context, Kind, LockKind};
use crate::image::manifest::{Manifest, Process};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::os::fd::{AsFd, OwnedFd};

/// An error with what it came of, in one line.
pub fn text(e: &dyn std::error::Error) -> String {
    let mut out = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        let _ = write!(out, ": {s}");
        source = s.source();
    }
    out
}

/// The caller's descriptors that stand for things outside of the tree: 0 to 2, and others that it was given itself.
pub fn external(m: &Manifest, withheld: &[i32]) -> Result<BTreeMap<i32, OwnedFd>, Error> {
    let mut found = BTreeMap::new();
    for file in &m.files {
        let Kind::External(e) = &file.kind else {
            continue;
        };
        if e.number < 0 || withheld.contains(&e.number) || found.contains_key(&e.number) {
            continue;
        }
        let number = crate::sys::clone::borrow(e.number);
        // One that is closed at exec was not given to the caller: it is its own.
        let Ok(flags) = fcntl(number, FcntlArg::F_GETFD) else {
            continue;
        };
        if e.number > 2 && flags & FdFlag::FD_CLOEXEC.bits() != 0 {
            continue;
        }
        let own = fcntl(number, FcntlArg::F_DUPFD_CLOEXEC(3)).map_err(super::sys("F_DUPFD"))?;
        found.insert(e.number, crate::sys::clone::own(own));
    }
    Ok(found)
}

/// Makes all open files, in the root of the tree; the others inherit them.
pub fn restore(plan: &Plan<'_>) -> Result<Vec<OwnedFd>, String> {
    let m = plan.manifest;
    let root = nix::fcntl::open(
        &m.processes[0].root,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(|e| format!("cannot open its root directory: {e}"))?;
    let shared = |object: u32| {
        let number = plan.helpers.shared.get(&object);
        let number = number.ok_or_else(|| std::io::Error::from_raw_os_error(libc::EBADF))?;
        crate::sys::clone::borrow(*number).try_clone_to_owned()
    };
    let external = external(m, &plan.options.withheld).map_err(|e| text(&e))?;
    let twin = plan.options.twin;
    let let_go = || {
        if let Some(call) = plan.options.before_connections {
            call();
        }
    };
    let context = Context {
        root: root.as_fd(),
        external,
        log: plan.options.log.as_deref(),
        shared: &shared,
        connections: if twin {
            Connections::Reset
        } else {
            Connections::Repair
        },
        before_connections: Some(&let_go),
        contended_locks: twin,
    };
    files::restore(&m.files, &plan.options.dir, &context).map_err(|e| text(&e))
}

/// Puts them at the numbers of a process, which keeps nothing else but the helpers and its userfaultfd.
pub fn install(plan: &Plan<'_>, p: &Process, made: Vec<OwnedFd>) -> Result<(), String> {
    let h = &plan.helpers;
    let numbers = h.numbers().chain(plan.lazy().then_some(h.uffd));
    // Their numbers are above all of the table's, so that they stay what they are.
    let keep = numbers.map(crate::sys::clone::own).collect();
    let kept = files::install(
        &p.fds,
        &plan.manifest.files,
        made,
        keep,
        (p.pid, plan.options.twin),
    )
    .map_err(|e| text(&e))?;
    kept.into_iter().for_each(std::mem::forget);
    Ok(())
}

/// What needs all processes to be there.
pub fn complete(plan: &Plan<'_>, p: &Process) -> Result<(), String> {
    files::complete(&p.fds, &plan.manifest.files, p.pid, &|n| n).map_err(|e| text(&e))
}

/// Record locks are lost whenever the process closes any descriptor of the file, as it has just done with those that it
/// mapped files from: it takes them again.
pub fn locks(
    script: &mut Script,
    table: TableId,
    files: &[files::OpenFile],
    p: &Process,
    twin: bool,
) {
    let mut seen = std::collections::HashSet::new();
    for fd in p.fds.iter().filter(|fd| seen.insert(fd.file)) {
        let Some(file) = files.get(fd.file as usize) else {
            continue;
        };
        for lock in file
            .locks
            .iter()
            .filter(|l| l.kind == LockKind::Posix(p.pid))
        {
            let kind = if lock.exclusive {
                libc::F_WRLCK
            } else {
                libc::F_RDLCK
            };
            // struct flock: l_type, l_whence (SEEK_SET), padding, l_start, l_len, l_pid.
            let words = [kind as u64, lock.start as u64, lock.len as u64, 0];
            let words = script.words(&words);
            script.call(
                table,
                "taking a record lock again",
                libc::SYS_fcntl,
                &[
                    (fd.fd as u64).into(),
                    (libc::F_SETLK as u64).into(),
                    words.into(),
                ],
                if twin {
                    Expect::Anything
                } else {
                    Expect::Success
                },
            );
        }
    }
}
