//! Serving a mount: threads take turns in waiting for the next request.
//!
//! One thread at a time is the leader: it reads a request and, if it is quick, answers it and reads on, so that a run of
//! small requests stays on one hot CPU without waking anybody. Before something slow the handler calls [`step_aside`]:
//! another thread leads, and if none is idle a new one is made, up to 64. After an answer the leader looks for the next
//! request for a few microseconds before it sleeps, since waking up costs more than most answers; with one CPU it never
//! does, as that would only keep the client from running.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::mount::{limit_writeback, mount_device, set_readahead};
use super::request::{Op, Request};
use super::splice::Way;
use super::{
    Errno, FuseError, MountOptions, Negotiated, Notifier, Reply, SharedFs, abi, request, sys,
};

/// A mount that is not served yet.
#[derive(Debug)]
pub struct Session {
    dev: Arc<File>,
    target: PathBuf,
    options: MountOptions,
}

/// Mounts; requests wait until [`Session::run`].
///
/// # Errors
/// [`FuseError::Device`], [`FuseError::Mount`].
pub fn mount(target: &Path, options: &MountOptions) -> Result<Session, FuseError> {
    let dev = mount_device(target, options)?;
    Ok(Session {
        dev: Arc::new(dev),
        target: target.to_path_buf(),
        options: options.clone(),
    })
}

/// The flags that are asked for, if the kernel has them. The writeback cache only if it is wanted: see `mount/drain.rs`. No
/// lock flags: the kernel keeps locks by itself. No atomic O_TRUNC: there are no OPEN requests.
const WANTED: u64 = abi::ASYNC_READ
    | abi::BIG_WRITES
    | abi::DONT_MASK
    | abi::DO_READDIRPLUS
    | abi::ASYNC_DIO
    | abi::NO_OPEN_SUPPORT
    | abi::PARALLEL_DIROPS
    | abi::POSIX_ACL
    | abi::MAX_PAGES
    | abi::CACHE_SYMLINKS
    | abi::NO_OPENDIR_SUPPORT
    | abi::EXPLICIT_INVAL_DATA
    | abi::HANDLE_KILLPRIV_V2
    | abi::SETXATTR_EXT
    | abi::INIT_EXT
    | abi::DIRECT_IO_ALLOW_MMAP;

/// Requests of the background kind (read-ahead, write-back of memory maps) that the kernel sends at a time.
const MAX_BACKGROUND: u16 = 256;
/// From so many on the kernel passes over what need not be written now.
pub const CONGESTION: u16 = 192;
/// The same with a writeback cache: the limit on its size keeps the queue short.
const CONGESTION_WRITEBACK: u16 = u16::MAX;
/// Room for replies other than data: a listing.
const REPLY_ROOM: usize = 64 << 10;
/// Threads at most. Beyond that slow requests keep the lead.
const MAX_THREADS: usize = 64;
/// The leader looks for requests at least as long as slow ones (mostly fsync) are at work, but no longer than this.
const SLOW_LOOK: Duration = Duration::from_millis(1);

struct Shared {
    dev: Arc<File>,
    fs: SharedFs,
    crew: Mutex<Crew>,
    /// The lead is free.
    free: Condvar,
    /// A thread has ended.
    ended: Condvar,
    /// Slow requests at work.
    slow: AtomicUsize,
    max_io: u32,
    spin: Duration,
    /// Idle threads that are kept.
    keep: usize,
}

/// The threads of a session.
#[derive(Default)]
struct Crew {
    led: bool,
    /// The mount is gone.
    over: bool,
    idle: usize,
    threads: usize,
    error: Option<std::io::Error>,
}

thread_local! {
    /// The session that this thread leads.
    static LEADS: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// Lets another thread wait for requests, as what follows may take long. Does nothing outside of a session's thread,
/// or when it was called for this request already.
pub fn step_aside() {
    if let Some(shared) = LEADS.with(RefCell::take) {
        shared.slow.fetch_add(1, Ordering::Relaxed);
        shared.give_lead();
    }
}

/// True if this thread has the lead.
fn leads() -> bool {
    LEADS.with_borrow(Option::is_some)
}

impl Session {
    /// For notifications.
    pub fn notifier(&self) -> Notifier {
        Notifier {
            dev: Arc::clone(&self.dev),
        }
    }

    /// Answers the kernel's first request, then serves until the mount is gone.
    ///
    /// # Errors
    /// [`FuseError::TooOld`], or the device's.
    pub fn run(self, fs: SharedFs) -> Result<(), FuseError> {
        let negotiated = self.handshake()?;
        let spin_us = if sys::cpus() > 1 {
            self.options.spin_us
        } else {
            0
        };
        if spin_us > 0 {
            fcntl(self.dev.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(std::io::Error::from)?;
        }
        let keep = self.options.threads.clamp(2, MAX_THREADS);
        let shared = Arc::new(Shared {
            dev: Arc::clone(&self.dev),
            fs: Arc::clone(&fs),
            crew: Mutex::default(),
            free: Condvar::new(),
            ended: Condvar::new(),
            slow: AtomicUsize::new(0),
            max_io: self.options.max_io,
            spin: Duration::from_micros(spin_us),
            keep,
        });
        shared.hire()?;
        for _ in 1..keep {
            if let Err(e) = shared.hire() {
                tracing::warn!(error = %e, "fewer threads than wanted");
                break;
            }
        }
        if let Ok(stat) = nix::sys::stat::stat(&self.target) {
            set_readahead(stat.st_dev, self.options.readahead_kb);
            if self.options.writeback_mib > 0 {
                limit_writeback(stat.st_dev, self.options.writeback_mib);
            }
        }
        fs.ready(&negotiated);
        let mut crew = shared.crew();
        while crew.threads > 0 {
            crew = shared
                .ended
                .wait(crew)
                .unwrap_or_else(PoisonError::into_inner);
        }
        crew.error.take().map_or(Ok(()), |e| Err(e.into()))
    }

    fn handshake(&self) -> Result<Negotiated, FuseError> {
        let mut buf = vec![0; 64 << 10];
        loop {
            let n = match (&*self.dev).read(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            let Some(req) = Request::parse(&buf[..n]) else {
                continue;
            };
            let Op::Init {
                major,
                minor,
                max_readahead,
                flags,
            } = req.op
            else {
                return Err(std::io::Error::other("the first request was not INIT").into());
            };
            if major != abi::MAJOR || minor < abi::MINOR_MIN {
                self.send_error(req.unique, libc::EPROTO)?;
                return Err(FuseError::TooOld { major, minor });
            }
            let cache = if self.options.writeback_mib > 0 {
                abi::WRITEBACK_CACHE
            } else {
                0
            };
            let granted = flags & (WANTED | cache);
            let mut out = Vec::with_capacity(80);
            out.extend_from_slice(&80u32.to_le_bytes());
            out.extend_from_slice(&0i32.to_le_bytes());
            out.extend_from_slice(&req.unique.to_le_bytes());
            let ahead = max_readahead.max(self.options.readahead_kb << 10);
            let low = u32::try_from(granted & 0xffff_ffff).unwrap_or(0);
            let high = u32::try_from(granted >> 32).unwrap_or(0);
            for v in [abi::MAJOR, minor.min(abi::MINOR), ahead, low] {
                out.extend_from_slice(&v.to_le_bytes());
            }
            let congestion = if granted & abi::WRITEBACK_CACHE == 0 {
                CONGESTION
            } else {
                CONGESTION_WRITEBACK
            };
            for v in [MAX_BACKGROUND, congestion] {
                out.extend_from_slice(&v.to_le_bytes());
            }
            for v in [self.options.max_io, 1] {
                out.extend_from_slice(&v.to_le_bytes());
            }
            let pages = u16::try_from(self.options.max_io / 4096).unwrap_or(256);
            for v in [pages, 0] {
                out.extend_from_slice(&v.to_le_bytes());
            }
            out.extend_from_slice(&high.to_le_bytes());
            out.resize(80, 0);
            (&*self.dev).write_all(&out)?;
            return Ok(Negotiated {
                minor,
                flags: granted,
            });
        }
    }

    fn send_error(&self, unique: u64, errno: i32) -> std::io::Result<()> {
        (&*self.dev).write_all(Reply::new(0).finish(unique, errno))
    }
}

/// What reading the device gave.
enum Got {
    Request(usize),
    /// The mount is gone.
    End,
}

impl Shared {
    fn crew(&self) -> MutexGuard<'_, Crew> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more thread.
    fn hire(self: &Arc<Self>) -> std::io::Result<()> {
        let mut crew = self.crew();
        crew.threads += 1;
        let shared = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name(format!("fuse-{}", crew.threads))
            .spawn(move || {
                let _ends = Ends(&shared);
                if let Err(e) = work(&shared) {
                    let mut crew = shared.crew();
                    // Another thread would only meet the same.
                    crew.over = true;
                    crew.error.get_or_insert(e);
                }
            });
        if spawned.is_err() {
            crew.threads -= 1;
        }
        spawned.map(drop)
    }

    /// Waits for the lead; false if there are enough threads that do so.
    fn take_lead(self: &Arc<Self>) -> bool {
        let mut crew = self.crew();
        if crew.over || crew.led && crew.idle >= self.keep {
            return false;
        }
        crew.idle += 1;
        while crew.led {
            crew = self.free.wait(crew).unwrap_or_else(PoisonError::into_inner);
        }
        crew.idle -= 1;
        crew.led = true;
        drop(crew);
        LEADS.set(Some(Arc::clone(self)));
        true
    }

    fn give_lead(self: &Arc<Self>) {
        let mut crew = self.crew();
        crew.led = false;
        let short = crew.idle == 0 && crew.threads < MAX_THREADS && !crew.over;
        drop(crew);
        self.free.notify_one();
        if short && let Err(e) = self.hire() {
            tracing::warn!(error = %e, "no further thread; slow requests will hold up others");
        }
    }

    /// Waits for a request: looks a while, then sleeps.
    fn next(&self, buf: &mut [u8], look: bool) -> std::io::Result<Got> {
        let begun = Instant::now();
        let mut until = (look && !self.spin.is_zero()).then(|| begun + self.spin);
        loop {
            match (&*self.dev).read(buf) {
                Ok(n) => return Ok(Got::Request(n)),
                Err(e) => match e.raw_os_error() {
                    Some(libc::ENODEV) => return Ok(Got::End),
                    Some(libc::EINTR | libc::ENOENT) => {}
                    // The kernel is short of memory, or the request is not ours to understand: the next may be.
                    Some(libc::ENOMEM | libc::EIO) => std::thread::sleep(Duration::from_millis(10)),
                    Some(libc::EAGAIN) => {
                        if let Some(t) = until {
                            let now = Instant::now();
                            // Whoever waits for a slow request will send the next one when it is answered.
                            let slow = self.slow.load(Ordering::Relaxed) > 0;
                            if slow && now < begun + SLOW_LOOK {
                                until = Some(now + self.spin);
                            }
                            if now < t {
                                sys::yield_now();
                                continue;
                            }
                        }
                        until = None;
                        let mut fds = [PollFd::new(self.dev.as_fd(), PollFlags::POLLIN)];
                        match poll(&mut fds, PollTimeout::NONE) {
                            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                            Err(e) => return Err(e.into()),
                        }
                    }
                    _ => return Err(e),
                },
            }
        }
    }

    fn answer(&self, req: &Request<'_>, reply: &mut Reply) -> std::io::Result<()> {
        let forgets = match req.op {
            Op::Forget { .. } | Op::BatchForget { .. } => true,
            // Nothing here waits long for anything but the disk.
            Op::Interrupt => return Ok(()),
            _ => false,
        };
        reply.begin(req.unique);
        let mark = self.fs.arrived(req);
        let handled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if forgets {
                self.forget(req);
                return Ok(());
            }
            self.fs.handle(req, reply)
        }));
        let errno = match handled {
            Ok(Ok(())) => 0,
            Ok(Err(Errno(e))) => e,
            Err(_) => {
                tracing::error!(op = ?std::mem::discriminant(&req.op), "a request failed by a panic");
                libc::EIO
            }
        };
        let sent = if forgets || reply.was_sent() {
            Ok(())
        } else {
            self.send(reply.finish(req.unique, errno))
        };
        self.fs.finished(mark);
        sent
    }

    fn forget(&self, req: &Request<'_>) {
        match req.op {
            Op::Forget { nlookup } => self.fs.forget(req.nodeid, nlookup),
            Op::BatchForget { pairs } => {
                for p in pairs {
                    let (node, n) = p.split_at(8);
                    let at = |b: &[u8]| b.iter().rev().fold(0, |v, x| v << 8 | u64::from(*x));
                    self.fs.forget(at(node), at(n));
                }
            }
            _ => {}
        }
    }

    fn send(&self, message: &[u8]) -> std::io::Result<()> {
        match (&*self.dev).write(message) {
            Ok(_) => Ok(()),
            // The caller was killed and nobody waits for the answer, or the mount is going.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// Tells the crew that a thread is gone, also by a panic.
struct Ends<'a>(&'a Arc<Shared>);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if let Some(shared) = LEADS.with(RefCell::take) {
            shared.give_lead();
        }
        self.0.crew().threads -= 1;
        self.0.ended.notify_all();
    }
}

fn work(shared: &Arc<Shared>) -> std::io::Result<()> {
    let mut buf = vec![0; shared.max_io as usize + 8192];
    let mut reply = Reply::new(REPLY_ROOM);
    reply.set_way(Way::new(Arc::clone(&shared.dev)));
    // What follows a request follows soon; before the first there may be a long wait.
    let mut look = false;
    loop {
        if !leads() {
            if !shared.take_lead() {
                return Ok(());
            }
            look = shared.slow.load(Ordering::Relaxed) > 0;
        }
        let n = match shared.next(&mut buf, look)? {
            Got::Request(n) => n,
            Got::End => {
                shared.crew().over = true;
                return Ok(());
            }
        };
        let Some(req) = Request::parse(&buf[..n]) else {
            if let Some((_, unique)) = request::header(&buf[..n]) {
                reply.clear();
                shared.send(reply.finish(unique, libc::EIO))?;
            }
            continue;
        };
        look = true;
        let answered = shared.answer(&req, &mut reply);
        if !leads() {
            shared.slow.fetch_sub(1, Ordering::Relaxed);
        }
        if let Err(e) = answered {
            // One answer that the kernel does not take must not end the service.
            tracing::error!(error = %e, op = ?std::mem::discriminant(&req.op), "the kernel refused an answer");
            reply.clear();
            shared.send(reply.finish(req.unique, libc::EIO)).ok();
        }
    }
}
