//! epoll sets.

use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::capture::Group;
use super::error::{Error, Refuse};
use super::fdinfo::{Info, field};
use super::{Kind, OpenFile};
use crate::sys::descriptor;

/// epoll_create(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Epoll {
    /// What it watches.
    pub watches: Vec<Watch>,
}

/// An entry of an epoll set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// The number under which it was added, which need not be open any more.
    pub fd: i32,
    /// The description in `Manifest::files`.
    pub file: u32,
    /// EPOLL bits.
    pub events: u32,
    /// The program's own word.
    pub data: u64,
}

pub(super) fn state(group: &Group, epoll: (i32, i32), info: &Info) -> Result<Epoll, Refuse> {
    let mut watches: Vec<Watch> = Vec::new();
    let mut last = (u32::MAX, 0);
    for line in info.values("tfd:") {
        let parsed = (|| {
            let fd: u32 = line.split_ascii_whitespace().next()?.parse().ok()?;
            let events = u32::from_str_radix(field(line, "events")?, 16).ok()?;
            let data = u64::from_str_radix(field(line, "data")?, 16).ok()?;
            Some((fd, events, data))
        })();
        let Some((fd, events, data)) = parsed else {
            return Err(Refuse::no(
                "its fdinfo has an unknown form",
                "this kernel is not supported for it",
            ));
        };
        // Entries come in the order in which kcmp counts those of one number.
        let nth = watches
            .iter()
            .filter(|watch| watch.fd.cast_unsigned() == fd)
            .count();
        last = if last.0 == fd {
            (fd, last.1 + 1)
        } else {
            (fd, u32::try_from(nth).unwrap_or(0))
        };
        let file = group
            .watched(epoll, fd, last.1)
            .map_err(Refuse::failed("kcmp of a watched file"))?;
        let Some(file) = file else {
            let reason = format!(
                "it watches a file, added as descriptor {fd}, that no process of the tree has open"
            );
            return Err(Refuse::no(
                reason,
                "remove it from the set before it is closed",
            ));
        };
        watches.push(Watch {
            fd: fd.cast_signed(),
            file,
            events,
            data,
        });
    }
    Ok(Epoll { watches })
}

pub(super) fn restore(at: usize) -> Result<OwnedFd, Error> {
    descriptor::epoll().map_err(Error::restore(at, "epoll_create"))
}

/// Fills all sets. The set remembers the number under which a file was added, so each file is put under that number
/// for a moment. With `pidfds`, adds those that are pidfds, otherwise all others.
pub(super) fn fill(
    at: usize,
    epoll: &Epoll,
    set: &OwnedFd,
    (files, made, pidfds): (&[OpenFile], &[Option<OwnedFd>], bool),
) -> Result<(), Error> {
    for watch in &epoll.watches {
        let what = "a watch of a file that does not exist";
        let target = files
            .get(watch.file as usize)
            .ok_or_else(|| Error::damaged(at, what))?;
        if matches!(target.kind, Kind::Pidfd(_)) != pidfds {
            continue;
        }
        let made = made
            .get(watch.file as usize)
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::damaged(at, what))?;
        add_as(set, made, watch).map_err(Error::restore(at, "add a file to an epoll set"))?;
    }
    Ok(())
}

fn add_as(set: &OwnedFd, target: &OwnedFd, watch: &Watch) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let add =
        |set: &OwnedFd| descriptor::epoll_add(set.as_fd(), watch.fd, watch.events, watch.data);
    if target.as_raw_fd() == watch.fd {
        return add(set);
    }
    if !descriptor::in_use(watch.fd) {
        descriptor::place(target.as_fd(), watch.fd, true)?;
        let added = add(set);
        descriptor::close_number(watch.fd);
        return added;
    }
    // The number is taken: what is there stands aside for a moment (the set itself, perhaps).
    let aside = descriptor::duplicate_number(watch.fd, 0)?;
    let through = set.try_clone()?;
    descriptor::place(target.as_fd(), watch.fd, true)?;
    let added = add(&through);
    descriptor::place(aside.as_fd(), watch.fd, true)?;
    added
}
