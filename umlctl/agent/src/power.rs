//! Power off: by the real process 1 if it knows how, or else by ourselves.

use crate::sys::{self, signals};
use std::fs;
use std::thread::sleep;
use std::time::Duration;

/// How long process 1 gets.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long other processes get.
const GRACE: Duration = Duration::from_secs(2);

/// Which signal makes process 1 power off, if there is one.
fn signal_for_init() -> Option<i32> {
    let comm = fs::read_to_string("/proc/1/comm").ok()?;
    if comm.trim() == "systemd" {
        // SIGRTMIN+4
        return Some(38);
    }
    // busybox's init, and scripts that follow its example. Whoever does not catch the signal does not know how.
    let status = fs::read_to_string("/proc/1/status").ok()?;
    let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:"))?;
    let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
    (caught >> (signals::USR2 - 1) & 1 == 1).then_some(signals::USR2)
}

/// Does not return: the machine is gone, or this process is killed on the way.
pub fn off() -> ! {
    sys::ignore(signals::TERM, true);
    if let Some(signal) = signal_for_init() {
        sys::send_signal(1, signal);
        sleep(PATIENCE);
    }
    // All but process 1 and this one.
    sys::send_signal(-1, signals::TERM);
    sys::sync_all();
    sleep(GRACE);
    sys::send_signal(-1, signals::KILL);
    sys::sync_all();
    let _ = sys::mount_at("", "/", "", sys::MS_REMOUNT | sys::MS_RDONLY, "");
    sys::power_off();
    sys::exit_now(1)
}
