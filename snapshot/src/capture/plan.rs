//! What is to be captured, and what cannot be: found before the target is disturbed.

use super::ranges;
use super::{Error, state};
use crate::proc::{self, Map};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Something that cannot be captured.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Refusal {
    /// The process.
    pub pid: i32,
    /// Which descriptor, mapping or property.
    pub object: String,
    /// Why not.
    pub reason: String,
    /// What would help.
    pub remedy: String,
}

impl Refusal {
    /// A refusal.
    #[must_use]
    pub fn new(pid: i32, object: String, reason: &str, remedy: &str) -> Self {
        Self {
            pid,
            object,
            reason: reason.to_owned(),
            remedy: remedy.to_owned(),
        }
    }
}

/// One line a refusal.
#[must_use]
pub fn lines(refusals: &[Refusal]) -> String {
    let lines: Vec<String> = refusals
        .iter()
        .map(|r| {
            format!(
                "  process {}: {}: {} (to do: {})",
                r.pid, r.object, r.reason, r.remedy
            )
        })
        .collect();
    lines.join("\n")
}

/// A process that is to be captured.
#[derive(Debug)]
pub struct Planned {
    /// Its number in our namespace.
    pub pid: i32,
    /// With the number it names the process for good.
    pub start_time: u64,
    /// It has ended, and its parent has not asked for it.
    pub zombie: bool,
    /// What was read of it; none for a zombie.
    pub before: Option<state::Before>,
    /// Its mappings' letters in smaps, by address.
    pub vm_flags: HashMap<u64, Vec<String>>,
    /// Its mappings.
    pub maps: Vec<Map>,
    /// Threads it has.
    pub threads: usize,
    /// POSIX timers it has.
    pub timers: usize,
}

/// How long a process that was resumed is given until all its memory is there.
const FILLED: Duration = Duration::from_secs(5);

/// As [`plan`], but of processes that were resumed a moment ago it waits until their memory is there, for some seconds.
pub fn plan_filled(root: i32, tree: bool) -> Result<(Vec<Planned>, Vec<Refusal>), Error> {
    let begun = Instant::now();
    loop {
        let (planned, refusals) = plan(root, tree)?;
        let only = !refusals.is_empty() && refusals.iter().all(|r| r.reason == ranges::PAGED);
        if !only || begun.elapsed() > FILLED {
            return Ok((planned, refusals));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Looks at a process, and with `tree` at all that descend from it.
///
/// Gives what it found, and everything that cannot be captured; with a refusal nothing may be done to the target.
pub fn plan(root: i32, tree: bool) -> Result<(Vec<Planned>, Vec<Refusal>), Error> {
    let mut refusals = Vec::new();
    let pids = if tree { proc::tree(root)? } else { vec![root] };
    if !tree {
        let children = proc::children(root)?;
        if !children.is_empty() {
            let object = format!("children {children:?}");
            refusals.push(Refusal::new(
                root,
                object,
                "a process is captured with its children or not at all",
                "add --tree",
            ));
        }
    }
    let mut planned = Vec::new();
    for &pid in &pids {
        match look(pid, &pids, &mut refusals) {
            Ok(p) => planned.push(p),
            Err(Error::Proc(proc::Error::Gone(_))) if pid != root => {}
            Err(e) => return Err(e),
        }
    }
    Ok((planned, refusals))
}

fn look(pid: i32, pids: &[i32], refusals: &mut Vec<Refusal>) -> Result<Planned, Error> {
    let stat = proc::stat(pid)?;
    let status = proc::status(pid)?;
    let mut planned = Planned {
        pid,
        start_time: stat.start_time,
        zombie: stat.state == 'Z' && status.threads <= 1,
        before: None,
        vm_flags: HashMap::new(),
        maps: Vec::new(),
        threads: status.threads as usize,
        timers: 0,
    };
    if planned.zombie {
        if pid == pids[0] {
            refusals.push(Refusal::new(
                pid,
                "the process".into(),
                "it has ended already",
                "choose one that runs",
            ));
        }
        return Ok(planned);
    }
    let mut refuse = |object: &str, reason: &str, remedy: &str| {
        refusals.push(Refusal::new(pid, object.to_owned(), reason, remedy));
    };
    planned.maps = proc::maps(pid)?;
    if planned.maps.is_empty() {
        refuse(
            "the process",
            "a kernel thread, or one whose first thread has ended",
            "choose another",
        );
        return Ok(planned);
    }
    if status.tgid != pid {
        refuse(
            "the number",
            &format!("it is a thread of process {}", status.tgid),
            "name the process",
        );
    }
    if pid == std::process::id().cast_signed() {
        refuse(
            "the process",
            "a process cannot capture itself",
            "name another",
        );
    }
    if status.tracer != 0 && !pids.contains(&status.tracer) {
        refuse(
            "tracer",
            &format!("it is traced by process {}", status.tracer),
            "end strace, gdb or what else traces it",
        );
    } else if status.tracer != 0 {
        refuse(
            "tracer",
            "a process of the tree traces another",
            "not supported for plain processes",
        );
    }
    if status.seccomp != 0 {
        refuse(
            "seccomp",
            "a filter of system calls is in force, which cannot be read back",
            "start it without one",
        );
    }
    if status
        .features
        .split_ascii_whitespace()
        .any(|f| f == "shstk")
    {
        refuse(
            "shadow stack",
            "it uses shadow stacks",
            "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        );
    }
    if stat.policy == libc::SCHED_DEADLINE {
        refuse(
            "scheduling",
            "SCHED_DEADLINE has run-time state",
            "use another policy",
        );
    }
    if let Ok(file) = std::fs::File::open(proc::path(pid, "exe"))
        && let Ok(head) = ranges::first_bytes(&file, 5)
        && head[..4] == *b"\x7fELF"
        && head[4] != 2
    {
        refuse(
            "program",
            "it is not a 64-bit program",
            "use its 64-bit build",
        );
    }
    planned.vm_flags = proc::vm_flags(pid)?;
    for map in &planned.maps {
        refusals.extend(ranges::refusal(pid, map, planned.vm_flags.get(&map.start)));
    }
    refusals.extend(shared_memory_refusal(pid, &status));
    planned.timers = state::timers(pid)?.len();
    planned.before = Some(state::Before::read(pid)?);
    Ok(planned)
}

/// A process that shares its memory with another process (not a thread) cannot be stopped as a whole.
fn shared_memory_refusal(pid: i32, status: &proc::Status) -> Option<Refusal> {
    let parent = proc::stat(pid).ok()?.ppid;
    (status.tgid == pid && parent > 1 && crate::sys::remote::same_memory(pid, parent)).then(|| {
        Refusal::new(
            pid,
            format!("memory shared with its parent {parent}"),
            "it was made by vfork and has not yet started its program",
            "try again",
        )
    })
}
