//! The machine, as the manifest names it.

use super::Error;
use crate::image::manifest::{Host, Taken};
use crate::proc::{self, MapKind};
use crate::sys::{cpu, remote};
use nix::time::{ClockId, clock_gettime};
use std::io::Read;

/// This machine.
pub fn current() -> Result<Host, Error> {
    let own = std::process::id().cast_signed();
    let maps = proc::maps(own)?;
    let vdso = match maps
        .iter()
        .find(|m| m.kind == MapKind::Special("[vdso]".into()))
    {
        Some(m) => {
            let mut bytes = vec![0; (m.end - m.start) as usize];
            remote::read(own, m.start, &mut bytes)
                .map_err(|e| Error::Call(own, "process_vm_readv", e))?;
            blake3::hash(&bytes).to_hex().to_string()
        }
        None => String::new(),
    };
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    Ok(Host {
        release: read("/proc/sys/kernel/osrelease"),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        vdso,
        cpu_flags: cpu_flags(),
        xcr0: cpu::xcr0(),
    })
}

/// The first processor's flags, sorted. The kernel makes the file processor by processor: its start is enough.
#[must_use]
pub fn cpu_flags() -> Vec<String> {
    let mut text = vec![0; 8192];
    let n = std::fs::File::open("/proc/cpuinfo")
        .and_then(|mut f| f.read(&mut text))
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&text[..n]).into_owned();
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("flags"))
        .and_then(|l| l.split_once(':'));
    let mut flags: Vec<String> = line
        .map(|(_, f)| f.split_ascii_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    flags.sort_unstable();
    flags
}

/// Now, by the clocks.
#[must_use]
pub fn now() -> Taken {
    let ns = |clock| {
        clock_gettime(clock).map_or(0, |t| {
            t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
        })
    };
    Taken {
        realtime_ns: ns(ClockId::CLOCK_REALTIME),
        monotonic_ns: ns(ClockId::CLOCK_MONOTONIC),
        boottime_ns: ns(ClockId::CLOCK_BOOTTIME),
    }
}
