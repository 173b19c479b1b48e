//! Bringing pages that the kernel keeps to the daemon, so that a checkpoint has them: those that were changed through
//! memory maps, and with the mount option `writeback` all that was written.
//!
//! syncfs(2) on a FUSE mount only starts the write-back: the kernel sends the pages as requests of the background kind and
//! does not wait (SB_I_NO_DATA_INTEGRITY, and before it temporary pages). So the daemon makes a barrier of its own: it reads
//! from a file that only it can look up. That read is of the background kind as well, these are sent in order, and when
//! it arrives every page that syncfs sent has arrived before it. Pages that could not be sent, as they were under write-back
//! already or the queue was full, come with another round.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::fcntl::{OFlag, PosixFadviseAdvice, openat, posix_fadvise};
use nix::sys::stat::Mode;
use rustc_hash::FxHashSet;

use super::{MountFs, lock};
use crate::fuse::{Attr, CONGESTION, Entry, Errno, Op, Reply, Request, WRITE_CACHE};

/// Node ids of the barrier files: no view has this bit.
const BARRIER: u64 = 1 << 63;
/// Name of a barrier file, before its number.
const PREFIX: &str = ".cowfs.barrier.";
/// Rounds at most, for maps that are stored to all the time.
const ROUNDS: usize = 64;

/// Writes of pages that have arrived and are not answered yet, in two groups that are counted in turn.
#[derive(Debug, Default)]
struct Open {
    turn: usize,
    count: [usize; 2],
    /// The nodes that they were about, while somebody wants to know.
    nodes: Option<FxHashSet<u64>>,
}

/// What is known of writes of pages.
#[derive(Debug, Default)]
pub(super) struct Drain {
    one: Mutex<()>,
    /// What only the daemon knows, in the names of the barrier files.
    secret: OnceLock<String>,
    serial: AtomicU64,
    open: Mutex<Open>,
    less: Condvar,
    arrived: AtomicU64,
    /// Errno of the last one that failed though its view is the present one.
    failed: AtomicI32,
}

impl Drain {
    /// Notes a request that was read; its mark is for [`Drain::finished`].
    pub fn arrived(&self, req: &Request<'_>) -> usize {
        let Op::Write { write_flags, .. } = req.op else {
            return 0;
        };
        if write_flags & WRITE_CACHE == 0 {
            return 0;
        }
        let mut open = lock(&self.open);
        self.arrived.fetch_add(1, Ordering::Relaxed);
        let turn = open.turn;
        open.count[turn] += 1;
        if let Some(nodes) = &mut open.nodes {
            nodes.insert(req.nodeid);
        }
        turn + 1
    }

    /// The request of this mark is answered.
    pub fn finished(&self, mark: usize) {
        if let Some(turn) = mark.checked_sub(1) {
            lock(&self.open).count[turn & 1] -= 1;
            self.less.notify_all();
        }
    }

    /// How many have arrived.
    pub fn count(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Begins to note the nodes, or ends it.
    fn watch(&self, on: bool) {
        lock(&self.open).nodes = on.then(FxHashSet::default);
    }

    /// The nodes since then.
    pub fn written(&self) -> Vec<u64> {
        let open = lock(&self.open);
        open.nodes.iter().flatten().copied().collect()
    }

    /// Notes that one failed for another reason than a rollback.
    pub fn fail(&self, errno: i32) {
        self.failed.store(errno, Ordering::Relaxed);
    }

    fn secret(&self) -> io::Result<&str> {
        if let Some(s) = self.secret.get() {
            return Ok(s);
        }
        let mut b = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut b)?;
        Ok(self
            .secret
            .get_or_init(|| format!("{:032x}", u128::from_le_bytes(b))))
    }

    /// The number in a barrier file's name.
    fn number_of(&self, name: &[u8]) -> Option<u64> {
        let rest = std::str::from_utf8(name).ok()?.strip_prefix(PREFIX)?;
        let (secret, number) = rest.split_once('.')?;
        let number = number.parse().ok()?;
        (self.secret.get().map(String::as_str) == Some(secret)).then_some(number)
    }

    /// Waits for all that have arrived so far.
    fn settle(&self) {
        let mut open = lock(&self.open);
        let before = open.turn;
        open.turn = before ^ 1;
        while open.count[before] > 0 {
            open = self.less.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Answers a request about a barrier file; `None` if it is about something else.
pub(super) fn answer(
    drain: &Drain,
    req: &Request<'_>,
    reply: &mut Reply,
) -> Option<Result<(), Errno>> {
    let attr = |nodeid: u64| Attr {
        ino: nodeid,
        size: 1,
        mode: libc::S_IFREG | 0o400,
        nlink: 1,
        ..Attr::default()
    };
    match req.op {
        Op::Lookup { name } if req.nodeid == 1 && name.starts_with(PREFIX.as_bytes()) => {
            // Others may ask for such names, but cannot guess the rest; and "no" must not be kept.
            let Some(number) = drain.number_of(name) else {
                return Some(Err(Errno(libc::ENOENT)));
            };
            let nodeid = BARRIER | number;
            reply.entry(&Entry {
                nodeid,
                attr: attr(nodeid),
                entry_valid: Duration::ZERO,
                attr_valid: Duration::from_secs(60),
            });
            Some(Ok(()))
        }
        _ if req.nodeid & BARRIER == 0 => None,
        Op::Getattr => {
            reply.attr(&attr(req.nodeid), Duration::from_secs(60));
            Some(Ok(()))
        }
        Op::Read { .. } => {
            reply.bytes(b"|");
            Some(Ok(()))
        }
        // As for all files: no message is needed.
        Op::Open { .. } | Op::Flush => Some(Err(Errno(libc::ENOSYS))),
        Op::Release => Some(Ok(())),
        _ => Some(Err(Errno(libc::EACCES))),
    }
}

impl MountFs {
    /// Brings pages that the kernel keeps to the daemon. Costs a few system calls if there are none.
    ///
    /// # Errors
    /// What the mount says, or the error of a page that could not be taken.
    pub fn sync_kernel(&self) -> io::Result<()> {
        // Without a notifier there is no kernel to ask.
        if self.read_only || self.notifier.get().is_none() {
            return Ok(());
        }
        let _still = self.still();
        self.drain.failed.store(0, Ordering::Relaxed);
        self.drain.watch(self.has_writeback());
        let done = self.rounds();
        self.drain.watch(false);
        done?;
        match self.drain.failed.load(Ordering::Relaxed) {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }

    /// Keeps everybody else from asking the kernel for pages, and with that from using the mount point.
    pub fn still(&self) -> MutexGuard<'_, ()> {
        lock(&self.drain.one)
    }

    fn rounds(&self) -> io::Result<()> {
        let drain = &self.drain;
        let mut brought = FxHashSet::default();
        let mut slowed = self.is_written_much().then(|| self.slow_down());
        for round in 0..ROUNDS {
            // Pages that are under write-back now would be passed over, though they may be dirty again.
            drain.settle();
            let before = drain.count();
            let mut barrier = self.start_round()?;
            barrier.read_exact(&mut [0; 1])?;
            drain.settle();
            let came = drain.count() - before;
            let few = came < u64::from(CONGESTION);
            let over = match round {
                _ if came == 0 => true,
                0 => false,
                _ if self.has_writeback() => self.bring_nodes(&mut brought).unwrap_or(few),
                _ => few,
            };
            if over {
                return Ok(());
            }
            if self.has_writeback() && !few && slowed.is_none() {
                slowed = Some(self.slow_down());
            }
        }
        Err(io::Error::other(
            "programs write faster than that can be saved; try again",
        ))
    }

    /// Starts the write-back of all dirty pages. What is read from the file that is returned comes after them.
    pub(super) fn start_round(&self) -> io::Result<File> {
        let n = self.drain.serial.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}.{n}", self.drain.secret()?);
        let dir = File::open(&self.mountpoint)?;
        // First, so that a filesystem that was mounted over ours is not synced but noticed.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let barrier = File::from(openat(&dir, name.as_str(), flags, Mode::empty())?);
        self.asker.know_device(&barrier);
        // An error is that of any page since the last call, also of a view that is closed: ours are counted.
        let _ = crate::fuse::syncfs(&dir);
        // Without read-ahead the kernel never passes the read over and sends it past the queue, however long that is.
        posix_fadvise(&barrier, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        Ok(barrier)
    }
}
