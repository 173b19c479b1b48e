//! eventfd, timerfd, signalfd.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId as Clock, clock_gettime};
use serde::{Deserialize, Serialize};

use super::OpenFile;
use super::error::{Error, Refuse};
use super::fdinfo::Info;
use crate::sys::{descriptor, fdioctl};

/// eventfd(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eventfd {
    /// Its counter.
    pub count: u64,
    /// EFD_SEMAPHORE.
    pub semaphore: bool,
}

/// timerfd_create(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timerfd {
    /// CLOCK_ number.
    pub clock: i32,
    /// TFD_TIMER_ flags it was set with.
    pub settime: i32,
    /// Expirations not read yet.
    pub ticks: u64,
    /// Time left, nanoseconds; 0 is disarmed.
    pub left_ns: u64,
    /// Interval, nanoseconds.
    pub interval_ns: u64,
    /// When it expires, nanoseconds of CLOCK_REALTIME, if it was set to a time of day.
    pub due_ns: Option<u64>,
}

/// signalfd(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signalfd {
    /// Signals it takes, in the kernel's form.
    pub mask: u64,
}

fn unknown() -> Refuse {
    Refuse::no(
        "its fdinfo has an unknown form",
        "this kernel is not supported for it",
    )
}

pub(super) fn eventfd(info: &Info) -> Result<Eventfd, Refuse> {
    let count = info
        .value("eventfd-count:")
        .and_then(|text| u64::from_str_radix(text, 16).ok())
        .ok_or_else(unknown)?;
    Ok(Eventfd {
        count,
        semaphore: info.value("eventfd-semaphore:") == Some("1"),
    })
}

pub(super) fn restore_eventfd(
    at: usize,
    file: &OpenFile,
    event: &Eventfd,
) -> Result<OwnedFd, Error> {
    let mut flags = libc::EFD_CLOEXEC | (file.flags & libc::O_NONBLOCK);
    if event.semaphore {
        flags |= libc::EFD_SEMAPHORE;
    }
    if event.count == u64::MAX {
        return Err(Error::damaged(at, "a counter above the largest"));
    }
    let fd = descriptor::eventfd(flags).map_err(Error::restore(at, "eventfd"))?;
    if event.count > 0 {
        nix::unistd::write(&fd, &event.count.to_ne_bytes())
            .map_err(Error::errno(at, "set the counter of an eventfd"))?;
    }
    Ok(fd)
}

const CLOCKS_OF_DAY: [i32; 2] = [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_ALARM];

/// It shows no time left. It may be disarmed; or be due in this very instant, and not have ticked yet; or have an
/// interval and have expired, and not be started again until it is read.
pub(super) fn shows_no_time(info: &Info) -> bool {
    let ticked = info.value("ticks:") != Some("0");
    let interval = info.pair("it_interval:") != Some((0, 0));
    info.pair("it_value:") == Some((0, 0)) && (interval || !ticked)
}

pub(super) fn timerfd(info: &Info) -> Result<Timerfd, Refuse> {
    let number = |key| info.value(key).and_then(|text| text.parse::<u64>().ok());
    let nanoseconds = |key| {
        info.pair(key)
            .and_then(|(s, ns)| s.checked_mul(1_000_000_000)?.checked_add(ns))
    };
    let clock = info
        .value("clockid:")
        .and_then(|text| text.parse().ok())
        .ok_or_else(unknown)?;
    let settime = info
        .value("settime flags:")
        .and_then(|text| i32::from_str_radix(text, 8).ok())
        .ok_or_else(unknown)?;
    let ticks = number("ticks:").ok_or_else(unknown)?;
    let left_ns = nanoseconds("it_value:").ok_or_else(unknown)?;
    let interval_ns = nanoseconds("it_interval:").ok_or_else(unknown)?;
    let mut due_ns = None;
    if left_ns > 0 && settime & libc::TFD_TIMER_ABSTIME != 0 && CLOCKS_OF_DAY.contains(&clock) {
        let now = clock_gettime(Clock::CLOCK_REALTIME).map_err(Refuse::errno("CLOCK_REALTIME"))?;
        let now =
            u64::try_from(std::time::Duration::from(now).as_nanos()).map_err(|_| unknown())?;
        due_ns = now.checked_add(left_ns);
    }
    Ok(Timerfd {
        clock,
        settime,
        ticks,
        left_ns,
        interval_ns,
        due_ns,
    })
}

pub(super) fn restore_timerfd(
    at: usize,
    file: &OpenFile,
    timer: &Timerfd,
) -> Result<OwnedFd, Error> {
    let clock = match timer.clock {
        libc::CLOCK_REALTIME => ClockId::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC => ClockId::CLOCK_MONOTONIC,
        libc::CLOCK_BOOTTIME => ClockId::CLOCK_BOOTTIME,
        libc::CLOCK_REALTIME_ALARM => ClockId::CLOCK_REALTIME_ALARM,
        libc::CLOCK_BOOTTIME_ALARM => ClockId::CLOCK_BOOTTIME_ALARM,
        other => return Err(Error::damaged(at, format!("a timer on clock {other}"))),
    };
    let flags =
        TimerFlags::from_bits_truncate(file.flags & libc::O_NONBLOCK) | TimerFlags::TFD_CLOEXEC;
    let fd = TimerFd::new(clock, flags).map_err(Error::errno(at, "timerfd_create"))?;
    let spec = |ns| TimeSpec::from_duration(std::time::Duration::from_nanos(ns));
    if timer.left_ns > 0 {
        let (first, how) = match timer.due_ns {
            Some(due) => (due, TimerSetTimeFlags::from_bits_truncate(timer.settime)),
            None => (timer.left_ns, TimerSetTimeFlags::empty()),
        };
        let when = match timer.interval_ns {
            0 => Expiration::OneShot(spec(first)),
            interval => Expiration::IntervalDelayed(spec(first), spec(interval)),
        };
        fd.set(when, how)
            .map_err(Error::errno(at, "timerfd_settime"))?;
    }
    if timer.ticks > 0 {
        fdioctl::set_ticks(fd.as_fd(), timer.ticks)
            .map_err(Error::restore(at, "TFD_IOC_SET_TICKS"))?;
    }
    Ok(fd.into())
}

pub(super) fn signalfd(info: &Info) -> Result<Signalfd, Refuse> {
    let mask = info
        .value("sigmask:")
        .and_then(|text| u64::from_str_radix(text, 16).ok())
        .ok_or_else(unknown)?;
    Ok(Signalfd { mask })
}

pub(super) fn restore_signalfd(
    at: usize,
    file: &OpenFile,
    signal: &Signalfd,
) -> Result<OwnedFd, Error> {
    let flags = libc::SFD_CLOEXEC | (file.flags & libc::O_NONBLOCK);
    descriptor::signalfd(signal.mask, flags).map_err(Error::restore(at, "signalfd"))
}
