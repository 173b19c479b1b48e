//! The order of a capture: prepare while the target runs, freeze in the stop, finish after it.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use super::error::{Error, Refusal, Refuse};
use super::fdinfo::Info;
use super::path::Root;
use super::scan::{self, Description, Slot, Table};
use super::{Kind, OpenFile, Owner};
use super::{
    content, epoll, event, inet, inotify, locks, netlink, path, pidfd, pipe, regular, tcp, tty,
    unix,
};
use crate::image::manifest::Fd;
use crate::sys::{descriptor, kcmp};

/// What the user allows, and what other parts of the snapshot provide.
pub struct Options<'a> {
    /// The snapshot's directory: content of unlinked files goes to `files/N` in it.
    pub dir: PathBuf,
    /// Terminals, pipes and sockets to the outside under the numbers 0, 1 and 2 become those of the resuming command.
    pub stdio: bool,
    /// More numbers for which this holds.
    pub external: Vec<i32>,
    /// Stream sockets whose peer is outside become sockets whose peer has closed, instead of being refused.
    pub close_outside: bool,
    /// From now on the captured TCP connections neither hear nor answer anything, so that the peer still agrees with
    /// the snapshot when the target is killed. [`Frozen::held`] has them.
    pub hold_connections: bool,
    /// The number in `Manifest::shared` of the object with this device and inode, if the memory side saves it.
    pub shared: &'a SharedNumber<'a>,
}

/// Answers which object of `Manifest::shared` a file (device, inode, a descriptor) is.
pub type SharedNumber<'a> = dyn Fn(u64, u64, BorrowedFd<'_>) -> Option<u32> + 'a;

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl<'a> Options<'a> {
    /// The least that is allowed, for a snapshot in `dir`.
    pub fn new(dir: impl Into<PathBuf>, shared: &'a SharedNumber<'a>) -> Self {
        let (stdio, close_outside, hold_connections) = (false, false, false);
        Self {
            dir: dir.into(),
            stdio,
            external: Vec::new(),
            close_outside,
            hold_connections,
            shared,
        }
    }

    pub(super) fn may_be_external(&self, fd: i32) -> bool {
        (self.stdio && (0..=2).contains(&fd)) || self.external.contains(&fd)
    }
}

/// What a description is, as found while the target ran.
#[derive(Debug)]
pub(super) enum Class {
    /// Nothing but the offset can change.
    Fixed(Kind),
    Regular(regular::Plan),
    Unlinked(regular::Copy),
    Pipe(pipe::Plan),
    Eventfd,
    Timerfd,
    Signalfd,
    Epoll,
    Inotify(inotify::Plan),
    Unix(unix::Plan),
    Inet,
    Netlink,
    Master,
    Slave(u32),
}

/// A state that was read in the stop; some of it is still to be worked out.
pub(super) enum Late {
    Now(Kind),
    Later(Box<dyn FnOnce() -> Result<Kind, Error> + Send>),
}

/// What kinds need to know about the whole tree.
#[derive(Debug)]
pub(super) struct World<'a> {
    pub options: &'a Options<'a>,
    pub pids: Vec<i32>,
    pub roots: Vec<Root>,
    /// Pipes that others have open too; looked up when the first pipe is met.
    pub outside_pipes: Option<std::collections::HashSet<PathBuf>>,
    /// (dev, ino) of outside objects that have been given to a number.
    pub externals: HashMap<(u64, u64), i32>,
    /// Copies of contents that were made: (dev, ino) to its number.
    pub copies: HashMap<(u64, u64), u32>,
    pub diag: Option<unix::Diag>,
    /// Numbers of pseudo-terminals whose master is in the tree.
    pub masters: std::collections::HashSet<u32>,
    pub next_copy: u32,
}

/// The open files of some processes, being captured.
#[derive(Debug)]
pub struct Capture<'a> {
    world: World<'a>,
    tables: Vec<Table>,
    descriptions: Vec<Description>,
    /// Numbers of descriptions in kcmp's order.
    sorted: Vec<usize>,
    buffer: Vec<u8>,
    /// What [`Capture::list`] has found out, until it is used.
    listed: Option<Vec<Refusal>>,
}

/// The open files at the point in time; nothing more is asked of the target.
pub struct Frozen {
    files: Vec<(OpenFile, Option<Late>)>,
    fds: Vec<Vec<Fd>>,
    dir: PathBuf,
    /// Released when it is dropped, whatever goes wrong.
    held: tcp::Held,
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frozen")
            .field("files", &self.files.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Capture<'a> {
    /// Lists the open files of the processes (the first is the tree's root), which run on, and opens what is needed.
    /// What cannot be captured comes as one [`Error::Refused`]; nothing has been disturbed then.
    pub fn prepare(pids: &[i32], options: &'a Options<'a>) -> Result<Self, Error> {
        let world = World {
            options,
            pids: pids.to_vec(),
            roots: pids
                .iter()
                .map(|&pid| Root::of(pid))
                .collect::<Result<_, _>>()?,
            outside_pipes: None,
            externals: HashMap::new(),
            copies: HashMap::new(),
            diag: None,
            masters: std::collections::HashSet::new(),
            next_copy: 0,
        };
        let tables = pids
            .iter()
            .map(|&pid| Table::open(pid))
            .collect::<Result<_, _>>()?;
        let (descriptions, sorted, buffer) = (Vec::new(), Vec::new(), Vec::new());
        let mut capture = Self {
            world,
            tables,
            descriptions,
            sorted,
            buffer,
            listed: None,
        };
        let mut refusals = shared_tables(pids);
        for table in 0..capture.tables.len() {
            capture.relist(table)?;
        }
        capture.classify(&mut refusals)?;
        // A dry run of the stop finds what only the state shows.
        capture.read(&mut refusals, true)?;
        if refusals.is_empty() {
            Ok(capture)
        } else {
            Err(Error::Refused(refusals))
        }
    }

    /// Brings the list of one process up to date.
    fn relist(&mut self, number: usize) -> Result<(), Error> {
        let list = self.tables[number].list()?;
        let old = std::mem::take(&mut self.tables[number].slots);
        let mut known: HashMap<i32, Slot> = old.into_iter().map(|slot| (slot.fd, slot)).collect();
        for fd in list {
            if let Some(slot) = known.remove(&fd)
                && self.holds(number, &slot)?
            {
                self.tables[number].slots.push(slot);
                continue;
            }
            let Some((description, info)) = self.tables[number].fetch(fd)? else {
                continue;
            };
            let description = self.join(description)?;
            self.tables[number].slots.push(Slot {
                fd,
                info,
                description,
            });
        }
        Ok(())
    }

    fn holds(&self, table: usize, slot: &Slot) -> Result<bool, Error> {
        let pid = self.tables[table].pid;
        scan::unchanged(
            &self.tables[table],
            slot,
            &self.descriptions[slot.description],
        )
        .map_err(|source| Error::Read {
            pid,
            what: "kcmp".into(),
            source,
        })
    }

    /// The number of a description, which is new or one that another descriptor has too.
    fn join(&mut self, new: Description) -> Result<usize, Error> {
        let (mut low, mut high) = (0, self.sorted.len());
        while low < high {
            let middle = low.midpoint(high);
            let other = self.sorted[middle];
            let order =
                scan::order(&new.file, &self.descriptions[other].file).map_err(|source| {
                    Error::Read {
                        pid: new.pid,
                        what: "kcmp".into(),
                        source,
                    }
                })?;
            match order {
                Ordering::Equal => return Ok(other),
                Ordering::Less => high = middle,
                Ordering::Greater => low = middle + 1,
            }
        }
        self.descriptions.push(new);
        self.sorted.insert(low, self.descriptions.len() - 1);
        Ok(self.descriptions.len() - 1)
    }

    /// Looks at descriptions that are new.
    fn classify(&mut self, refusals: &mut Vec<Refusal>) -> Result<(), Error> {
        let mut used = vec![false; self.descriptions.len()];
        for slot in self.tables.iter().flat_map(|table| &table.slots) {
            used[slot.description] = true;
        }
        for description in &self.descriptions {
            if description.class.is_none() && tty::is_master(description) {
                self.world.masters.extend(tty::number(description));
            }
        }
        for (i, used) in used.into_iter().enumerate() {
            if !used || self.descriptions[i].class.is_some() {
                continue;
            }
            let description = &self.descriptions[i];
            let info = match Info::read(&description.info, &mut self.buffer) {
                Ok(info) => info,
                // Closed since it was listed: the stop will list anew.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBADF)) => {
                    continue;
                }
                Err(source) => {
                    return Err(Error::Read {
                        pid: description.pid,
                        what: "fdinfo".into(),
                        source,
                    });
                }
            };
            match path::classify(&mut self.world, description, &info) {
                Ok(class) => self.descriptions[i].class = Some(class),
                Err(refuse) => note(refusals, description, refuse)?,
            }
        }
        Ok(())
    }

    /// Reads all state. The threads are stopped (or it is a dry run, which changes nothing).
    fn read(&mut self, refusals: &mut Vec<Refusal>, dry: bool) -> Result<Frozen, Error> {
        let mut frozen = Frozen {
            files: Vec::new(),
            fds: Vec::new(),
            dir: self.world.options.dir.clone(),
            held: tcp::Held::default(),
        };
        let mut numbers: Vec<Option<u32>> = vec![None; self.descriptions.len()];
        let mut order = Vec::new();
        let mut places = Vec::new();
        for table in &self.tables {
            let mut fds = Vec::with_capacity(table.slots.len());
            for slot in &table.slots {
                let info = match scan::info_of(table.pid, &slot.info, &mut self.buffer) {
                    Ok(info) => info,
                    Err(_) if dry => continue,
                    Err(error) => return Err(error),
                };
                let file = if let Some(number) = numbers[slot.description] {
                    number
                } else {
                    let number = u32::try_from(order.len()).unwrap_or(u32::MAX);
                    numbers[slot.description] = Some(number);
                    order.push((slot.description, info.clone(), Vec::new()));
                    places.push((table.pid, slot));
                    number
                };
                // Record locks of each process that has it show only in its own fdinfo.
                locks::capture(&info, table.pid, &mut order[file as usize].2);
                fds.push(Fd {
                    fd: slot.fd,
                    cloexec: info.flags & libc::O_CLOEXEC != 0,
                    file,
                });
            }
            frozen.fds.push(fds);
        }
        let again: Vec<usize> = (0..order.len())
            .filter(|&i| self.shows_no_time(order[i].0, &order[i].1))
            .collect();
        let mut inodes: HashMap<_, Vec<_>> = HashMap::new();
        for ((i, _, _), number) in order.iter().zip(0u32..) {
            let description = &self.descriptions[*i];
            if matches!(
                description.class,
                Some(Class::Pipe(_) | Class::Unix(_) | Class::Master | Class::Slave(_))
            ) {
                inodes
                    .entry(scan::identity(&description.stat))
                    .or_default()
                    .push((*i, number));
            }
        }
        let (descriptions, sorted) = (&self.descriptions, &self.sorted);
        let group = Group {
            descriptions,
            numbers: &numbers,
            sorted,
            inodes,
        };
        for (at, (i, info, locks)) in order.iter().enumerate() {
            let description = &self.descriptions[*i];
            let Some(class) = &description.class else {
                continue;
            };
            let found = locks::check(locks).and_then(|()| {
                let held = frozen.held.sockets();
                state(
                    &mut self.world,
                    &group,
                    description,
                    class,
                    info,
                    ((places[at].0, places[at].1.fd), dry),
                    held,
                )
            });
            match found {
                Ok(late) => {
                    let owner = owner(description, class);
                    let file = OpenFile {
                        flags: info.flags & !libc::O_CLOEXEC,
                        offset: info.pos,
                        owner,
                        locks: locks.clone(),
                        kind: Kind::SharedMemory { object: 0 },
                    };
                    frozen.files.push((file, Some(late)));
                }
                Err(refuse) => note(refusals, description, refuse)?,
            }
        }
        for i in again {
            // A little later the one that was due has ticked, and the kernel starts one with an interval when asked.
            let timer = &self.descriptions[order[i].0].file;
            let _ = crate::sys::fdioctl::restart_timer(timer.as_fd());
            let info = scan::info_of(places[i].0, &places[i].1.info, &mut self.buffer);
            if let (Ok(info), Some(file)) = (info, frozen.files.get_mut(i))
                && let Ok(timer) = event::timerfd(&info)
            {
                file.1 = Some(Late::Now(Kind::Timerfd(timer)));
            }
        }
        Ok(frozen)
    }

    fn shows_no_time(&self, description: usize, info: &Info) -> bool {
        matches!(self.descriptions[description].class, Some(Class::Timerfd))
            && event::shows_no_time(info)
    }

    /// Reads the state of all open files. All threads of all processes are stopped. What has become impossible since
    /// [`Capture::prepare`] comes as [`Error::Refused`]: let the target go on, and try again.
    pub fn freeze(&mut self) -> Result<Frozen, Error> {
        if self.listed.is_none() {
            self.list()?;
        }
        let mut refusals = self.listed.take().unwrap_or_default();
        let frozen = self.read(&mut refusals, false)?;
        if refusals.is_empty() {
            return Ok(frozen);
        }
        // Dropping it lets connections go that were silenced.
        drop(frozen);
        Err(Error::Refused(refusals))
    }

    /// The first half of [`Capture::freeze`]: finds out what is open now. True: there are connections among it, which the other
    /// half changes for a moment.
    pub fn list(&mut self) -> Result<bool, Error> {
        for table in 0..self.tables.len() {
            let mut same = self.tables[table].same_count()?;
            if same {
                for slot in &self.tables[table].slots {
                    if !self.holds(table, slot)? {
                        same = false;
                        break;
                    }
                }
            }
            if !same {
                self.relist(table)?;
            }
        }
        let mut refusals = Vec::new();
        self.classify(&mut refusals)?;
        self.listed = Some(refusals);
        let is_connection = |d: &Description| {
            matches!(d.class, Some(Class::Inet)) && tcp::is_connection(d.file.as_fd())
        };
        Ok(self.descriptions.iter().any(is_connection))
    }

    /// The number of the copy (`files/N`) of an unlinked file, for a mapping of it.
    pub fn copy_of(&self, dev: u64, ino: u64) -> Option<u32> {
        self.world.copies.get(&(dev, ino)).copied()
    }
}

impl Frozen {
    /// The connections that were silenced, if [`Options::hold_connections`] was set. Those that are not taken out are
    /// released by [`Frozen::finish`].
    pub fn held(&mut self) -> tcp::Held {
        std::mem::take(&mut self.held)
    }

    /// Works out what was put off until the target runs again: `Manifest::files`, and `Process::fds` of each process.
    pub fn finish(self) -> Result<(Vec<OpenFile>, Vec<Vec<Fd>>), Error> {
        let mut files = Vec::with_capacity(self.files.len());
        for (mut file, late) in self.files {
            match late {
                Some(Late::Now(kind)) => file.kind = kind,
                Some(Late::Later(work)) => file.kind = work()?,
                None => {}
            }
            files.push(file);
        }
        content::seal(&mut files, &self.dir)?;
        Ok((files, self.fds))
    }
}

/// The descriptions of the tree, to find one among them.
pub(super) struct Group<'g> {
    pub descriptions: &'g [Description],
    /// Numbers in the manifest.
    pub numbers: &'g [Option<u32>],
    sorted: &'g [usize],
    /// Pipes, sockets and terminals: descriptions and their numbers in the manifest, by inode.
    inodes: HashMap<(u64, u64), Vec<(usize, u32)>>,
}

impl Group<'_> {
    /// Descriptions of one pipe, socket or terminal, and their numbers in the manifest, by rising number.
    pub(super) fn with_inode(&self, inode: (u64, u64)) -> &[(usize, u32)] {
        self.inodes.get(&inode).map_or(&[], Vec::as_slice)
    }

    /// The number of what an epoll set watches.
    pub(super) fn watched(
        &self,
        epoll: (i32, i32),
        number: u32,
        nth: u32,
    ) -> std::io::Result<Option<u32>> {
        let me = std::process::id().cast_signed();
        let (mut low, mut high) = (0, self.sorted.len());
        while low < high {
            let middle = low.midpoint(high);
            let at = self.sorted[middle];
            let ours = (me, self.descriptions[at].file.as_raw_fd());
            match kcmp::epoll_target(ours, epoll, number, nth)? {
                Ordering::Equal => return Ok(self.numbers[at]),
                // `ours` is less than the target: the target is behind it.
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

fn state(
    world: &mut World,
    group: &Group,
    description: &Description,
    class: &Class,
    info: &Info,
    ((pid, fd), dry): ((i32, i32), bool),
    held: &mut Vec<std::os::fd::OwnedFd>,
) -> Result<Late, Refuse> {
    match class {
        Class::Fixed(kind) => Ok(Late::Now(kind.clone())),
        Class::Regular(plan) => regular::state(plan, description).map(Late::Now),
        Class::Unlinked(copy) => {
            regular::unlinked_state(world, copy, description, dry).map(Late::Now)
        }
        Class::Pipe(plan) => pipe::state(group, plan, description, info, dry),
        Class::Eventfd => event::eventfd(info).map(|found| Late::Now(Kind::Eventfd(found))),
        Class::Timerfd => event::timerfd(info).map(|found| Late::Now(Kind::Timerfd(found))),
        Class::Signalfd => event::signalfd(info).map(|found| Late::Now(Kind::Signalfd(found))),
        Class::Epoll => {
            epoll::state(group, (pid, fd), info).map(|found| Late::Now(Kind::Epoll(found)))
        }
        Class::Inotify(plan) => inotify::state(world, plan, description, info, dry).map(Late::Now),
        Class::Unix(plan) => unix::state(world, group, plan, description, dry),
        Class::Inet => inet::state(world, description, dry, held),
        Class::Netlink => netlink::state(description, dry).map(Late::Now),
        Class::Master => tty::master_state(description, dry).map(Late::Now),
        Class::Slave(number) => tty::slave_state(group, *number, description, dry).map(Late::Now),
    }
}

fn owner(description: &Description, class: &Class) -> Option<Owner> {
    if matches!(
        class,
        Class::Regular(_)
            | Class::Unlinked(_)
            | Class::Fixed(Kind::Path(_) | Kind::SharedMemory { .. })
            | Class::Eventfd
            | Class::Timerfd
            | Class::Signalfd
            | Class::Epoll
    ) {
        return None;
    }
    let file = description.file.as_fd();
    let (kind, pid) = descriptor::owner(file).ok()?;
    let signal = descriptor::fcntl(file, F_GETSIG, 0).ok()?;
    (pid != 0 || signal != 0).then_some(Owner { kind, pid, signal })
}

const F_GETSIG: i32 = 11;

/// Processes that share one table of descriptors, and threads that have one of their own.
fn shared_tables(pids: &[i32]) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refuse = |pid, object: String, reason: &str| {
        let advice = "it cannot be captured yet".to_owned();
        refusals.push(Refusal {
            pid,
            object,
            reason: reason.to_owned(),
            advice,
        });
    };
    for (i, &pid) in pids.iter().enumerate() {
        for &other in &pids[..i] {
            if kcmp::same_table(pid, other).unwrap_or(false) {
                let object = format!("table of descriptors shared with process {other}");
                refuse(
                    pid,
                    object,
                    "two processes share it (CLONE_FILES without CLONE_THREAD)",
                );
            }
        }
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let tid = task
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok());
            if let Some(tid) = tid
                && tid != pid
                && !kcmp::same_table(pid, tid).unwrap_or(true)
            {
                refuse(
                    pid,
                    format!("thread {tid}"),
                    "it has a table of descriptors of its own (unshare(CLONE_FILES))",
                );
            }
        }
    }
    refusals
}

fn note(
    refusals: &mut Vec<Refusal>,
    description: &Description,
    refuse: Refuse,
) -> Result<(), Error> {
    match refuse {
        Refuse::No(reason, advice) => {
            refusals.push(Refusal {
                pid: description.pid,
                object: description.object(),
                reason,
                advice,
            });
            Ok(())
        }
        Refuse::Failed(what, source) => {
            let what = format!("{}, {what}", description.object());
            Err(Error::Read {
                pid: description.pid,
                what,
                source,
            })
        }
        Refuse::Save(path, source) => Err(Error::Save { path, source }),
    }
}

/// Pidfds are classified here for want of state.
pub(super) fn pidfd_class(world: &World, info: &Info) -> Result<Class, Refuse> {
    pidfd::class(&world.pids, info).map(|found| Class::Fixed(Kind::Pidfd(found)))
}
