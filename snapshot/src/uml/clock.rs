//! The clocks of a machine that goes on after a time away: the guest's kernel reads the host's CLOCK_MONOTONIC, which must
//! not go back for it. On another boot of the host it starts anew, so the machine gets a time namespace
//! (time_namespaces(7)) in which it goes on from where it was.

use super::Error;
use crate::capture::host;
use crate::image::manifest::Taken;
use crate::proc;
use nix::sched::{CloneFlags, unshare};
use std::path::PathBuf;

/// What a machine's CLOCK_MONOTONIC and CLOCK_BOOTTIME are ahead of the host's, nanoseconds.
pub type Offsets = [i64; 2];

/// Those of a running process.
pub fn of(pid: i32) -> Offsets {
    let text = proc::read_bytes(pid, "timens_offsets").unwrap_or_default();
    parse(&String::from_utf8_lossy(&text))
}

/// Parses the text of `timens_offsets`.
pub(crate) fn parse(text: &str) -> Offsets {
    let mut out = [0; 2];
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (clock, seconds, ns) = (words.next(), words.next(), words.next());
        let number = |w: Option<&str>| w.and_then(|w| w.parse::<i64>().ok()).unwrap_or(0);
        let offset = number(seconds)
            .saturating_mul(1_000_000_000)
            .saturating_add(number(ns));
        match clock {
            Some("monotonic") => out[0] = offset,
            Some("boottime") => out[1] = offset,
            _ => {}
        }
    }
    out
}

/// Now, by the clocks of a machine.
#[must_use]
pub fn now(offsets: Offsets) -> Taken {
    let mut now = host::now();
    now.monotonic_ns = now.monotonic_ns.wrapping_add_signed(offsets[0]);
    now.boottime_ns = now.boottime_ns.wrapping_add_signed(offsets[1]);
    now
}

/// What the offsets must be for a machine that was captured at `taken` with offsets `was`, when the host's clocks say
/// `host`. Time away counts: by the host's own clock on the same boot, else by the time of day, if that has not gone back.
#[must_use]
pub fn offsets(taken: &Taken, was: Offsets, same_boot: bool, host: &Taken) -> Offsets {
    if same_boot {
        return was;
    }
    let away = host.realtime_ns.saturating_sub(taken.realtime_ns);
    let ahead = |then: u64, now: u64| (then.saturating_add(away) as i64).saturating_sub(now as i64);
    [
        ahead(taken.monotonic_ns, host.monotonic_ns),
        ahead(taken.boottime_ns, host.boottime_ns),
    ]
}

/// Puts the children that the caller makes from now on into a time namespace with these offsets.
pub fn enter(offsets: Offsets) -> Result<(), Error> {
    if offsets == [0; 2] {
        return Ok(());
    }
    unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
        .map_err(|e| Error::Sys("unshare(CLONE_NEWTIME)", e))?;
    let line = |name: &str, ns: i64| {
        let (s, n) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
        format!("{name} {s} {n}\n")
    };
    let path = PathBuf::from("/proc/self/timens_offsets");
    let text = line("monotonic", offsets[0]) + &line("boottime", offsets[1]);
    std::fs::write(&path, text).map_err(|e| Error::Io(path, "write", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_beyond_all_numbers_are_the_largest() {
        let text = "monotonic 9223372036854775807 999999999\nboottime 1 2\nother 5 5\n";
        assert_eq!(parse(text), [i64::MAX, 1_000_000_002]);
        let text = "boottime -9223372036854775808 -5\n";
        assert_eq!(parse(text), [0, i64::MIN]);
    }

    #[test]
    fn time_goes_on_and_never_back() {
        let at = |real, mono, boot| Taken {
            realtime_ns: real,
            monotonic_ns: mono,
            boottime_ns: boot,
        };
        let taken = at(1000, 500, 600);
        // The same boot: the host's clock has gone on by itself.
        assert_eq!(offsets(&taken, [0, 0], true, &at(1300, 800, 900)), [0, 0]);
        assert_eq!(offsets(&taken, [7, 8], true, &at(1300, 800, 900)), [7, 8]);
        // Another boot, 300 later, 20 after its start: the machine is at 800.
        let away = offsets(&taken, [0, 0], false, &at(1300, 20, 20));
        assert_eq!(away, [780, 880]);
        // The time of day went back: no time has passed, at least.
        let back = offsets(&taken, [0, 0], false, &at(900, 20, 20));
        assert_eq!(back, [480, 580]);
    }

    #[test]
    fn offsets_as_the_kernel_prints_them() {
        let text = "monotonic           5         20\nboottime           -1  999999999\n";
        assert_eq!(parse(text), [5_000_000_020, -1]);
        assert_eq!(parse(""), [0, 0]);
    }
}
