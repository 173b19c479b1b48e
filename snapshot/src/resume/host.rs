//! Whether this machine can run a snapshot, and whether a manifest makes sense.

use super::Error;
use super::memory::{OwnVdso, TOP};
use crate::capture::host::cpu_flags;
use crate::image::manifest::{Backing, Host, Manifest, Process, Space};
use crate::sys::clone::own_vdso_bytes;
use crate::sys::cpu::xcr0;
use nix::sys::resource::{Resource, getrlimit};
use std::collections::HashSet;

/// Refuses another machine; gives the offset in the vdso of a `syscall` instruction.
pub fn check(host: &Host, vdso: &OwnVdso) -> Result<u64, Error> {
    let (start, end) = vdso.part("[vdso]").ok_or(Error::Vdso)?;
    let bytes = own_vdso_bytes(start, end);
    if blake3::hash(&bytes).to_hex().as_str() != host.vdso {
        return Err(Error::Vdso);
    }
    let release = nix::sys::utsname::uname().map_err(super::sys("uname"))?;
    let release = release.release().to_string_lossy();
    if release != host.release {
        let (old, new) = (&host.release, release);
        return Err(Error::Host(format!(
            "it was taken on kernel {old}, this is {new}"
        )));
    }
    if xcr0() & host.xcr0 != host.xcr0 {
        return Err(Error::Host(format!(
            "its extended state is {:#x}, this processor's {:#x}",
            host.xcr0,
            xcr0()
        )));
    }
    let at = bytes.windows(2).position(|w| w == [0x0f, 0x05]);
    let at = at.map(|a| a as u64).ok_or(Error::Vdso)?;
    // In the boot in which it was taken the processor is the same; to read what it can takes the kernel long.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if !host.boot_id.is_empty() && boot.trim() == host.boot_id {
        return Ok(at);
    }
    let flags = cpu_flags();
    let missing: Vec<&str> = host
        .cpu_flags
        .iter()
        .map(String::as_str)
        .filter(|f| !flags.iter().any(|have| have == f))
        .collect();
    if !missing.is_empty() {
        let missing = missing.join(" ");
        return Err(Error::Host(format!("the processor lacks {missing}")));
    }
    Ok(at)
}

/// Our limits, in the kernel's order.
#[must_use]
pub fn own_limits() -> Vec<(u64, u64)> {
    use Resource as R;
    [
        R::RLIMIT_CPU,
        R::RLIMIT_FSIZE,
        R::RLIMIT_DATA,
        R::RLIMIT_STACK,
        R::RLIMIT_CORE,
        R::RLIMIT_RSS,
        R::RLIMIT_NPROC,
        R::RLIMIT_NOFILE,
        R::RLIMIT_MEMLOCK,
        R::RLIMIT_AS,
        R::RLIMIT_LOCKS,
        R::RLIMIT_SIGPENDING,
        R::RLIMIT_MSGQUEUE,
        R::RLIMIT_NICE,
        R::RLIMIT_RTPRIO,
        R::RLIMIT_RTTIME,
    ]
    .into_iter()
    .map(|r| getrlimit(r).unwrap_or((0, 0)))
    .collect()
}

/// What the code that follows relies on.
pub fn check_manifest(m: &Manifest) -> Result<(), Error> {
    if m.processes.is_empty() {
        return Err(Error::Manifest("it has no process"));
    }
    let mut pids = HashSet::new();
    let mut tids = HashSet::new();
    for (i, p) in m.processes.iter().enumerate() {
        if p.pid <= 0 || p.pid > 1 << 22 || !pids.insert(p.pid) {
            return Err(Error::Manifest("a process number is impossible"));
        }
        if i > 0 && !pids.contains(&p.ppid) {
            return Err(Error::Manifest("a process comes before its parent"));
        }
        if p.zombie.is_none() {
            check_process(p, &mut tids)?;
        } else if i == 0 {
            return Err(Error::Manifest("its root is a zombie"));
        }
    }
    let mut spaces: Vec<u32> = m
        .processes
        .iter()
        .filter(|p| p.zombie.is_none())
        .map(|p| p.space)
        .collect();
    spaces.sort_unstable();
    if spaces.windows(2).any(|w| w[0] == w[1]) {
        return Err(Error::Manifest("processes share an address space"));
    }
    m.spaces.iter().try_for_each(check_space)
}

fn check_process(p: &Process, tids: &mut HashSet<i32>) -> Result<(), Error> {
    if p.threads.first().is_none_or(|t| t.tid != p.pid) {
        return Err(Error::Manifest("a process has no leading thread"));
    }
    for t in &p.threads {
        if t.tid <= 0 || t.tid > 1 << 22 || !tids.insert(t.tid) || t.regs.len() != 27 {
            return Err(Error::Manifest("a thread is impossible"));
        }
    }
    let signal = |s: i32| (0..=64).contains(&s);
    if !signal(p.exit_signal) || p.actions.iter().any(|a| !signal(a.signal)) {
        return Err(Error::Manifest("a signal is impossible"));
    }
    Ok(())
}

fn check_space(s: &Space) -> Result<(), Error> {
    let mut last = 0;
    for r in &s.ranges {
        if r.backing == Backing::Vsyscall && r.start < r.end {
            continue;
        }
        if r.start < last || r.end <= r.start || r.end > TOP || (r.start | r.end) % 4096 != 0 {
            return Err(Error::Manifest("its ranges overlap or are impossible"));
        }
        last = r.end;
    }
    if s.auxv.len() > 1024 {
        return Err(Error::Manifest("an auxiliary vector is too long"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::Range;

    #[test]
    fn ranges_that_end_before_they_begin_are_refused() {
        let space = |start, end, backing| Space {
            ranges: vec![Range {
                start,
                end,
                prot: 1,
                flags: libc::MAP_PRIVATE,
                backing,
                advice: Vec::new(),
                name: None,
            }],
            ..Space::default()
        };
        let high = 0xffff_ffff_ff60_0000;
        assert!(check_space(&space(high, high + 4096, Backing::Vsyscall)).is_ok());
        assert!(check_space(&space(4096, 8192, Backing::Anonymous)).is_ok());
        for backing in [Backing::Vsyscall, Backing::Anonymous] {
            assert!(check_space(&space(8192, 4096, backing.clone())).is_err());
            assert!(check_space(&space(8192, 8192, backing)).is_err());
        }
    }
}
