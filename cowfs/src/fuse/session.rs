//! Serving a mount: threads take turns in waiting for the next request.
//!
//! One thread at a time is the leader: it reads a request and, if it is quick, answers it and reads on, so that a run of
//! small requests stays on one hot CPU without waking anybody. Before something slow it gives the lead to another.
//! After an answer the leader looks for the next request for a few microseconds before it sleeps, since waking up costs
//! more than most answers; with one CPU it never does, as that would only keep the client from running.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::mount::{mount_device, set_readahead};
use super::request::{Op, Request};
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

/// The flags that are asked for, if the kernel has them. No writeback cache: a write(2) that returned is in the next
/// checkpoint. No lock flags: the kernel keeps locks by itself. No atomic O_TRUNC: there are no OPEN requests.
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

struct Shared {
    dev: Arc<File>,
    fs: SharedFs,
    /// Held by the leader.
    lead: Mutex<()>,
    max_io: u32,
    spin: Duration,
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
        let shared = Arc::new(Shared {
            dev: Arc::clone(&self.dev),
            fs: Arc::clone(&fs),
            lead: Mutex::new(()),
            max_io: self.options.max_io,
            spin: Duration::from_micros(spin_us),
        });
        let mut workers = Vec::new();
        for i in 0..self.options.threads.max(2) {
            let shared = Arc::clone(&shared);
            let spawned = std::thread::Builder::new()
                .name(format!("fuse-{i}"))
                .spawn(move || work(&shared))?;
            workers.push(spawned);
        }
        let (target, kb) = (self.target.clone(), self.options.readahead_kb);
        set_readahead(&target, kb);
        fs.ready(&negotiated);
        let mut result = Ok(());
        for w in workers {
            match w.join() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => result = Err(e.into()),
                Err(_) => result = Err(std::io::Error::other("a thread panicked").into()),
            }
        }
        result
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
            let granted = flags & WANTED;
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
            for v in [64u16, 48] {
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
    /// Waits for a request: looks a while, then sleeps.
    fn next(&self, buf: &mut [u8], look: bool) -> std::io::Result<Got> {
        let mut until = (look && !self.spin.is_zero()).then(|| Instant::now() + self.spin);
        loop {
            match (&*self.dev).read(buf) {
                Ok(n) => return Ok(Got::Request(n)),
                Err(e) => match e.raw_os_error() {
                    Some(libc::ENODEV) => return Ok(Got::End),
                    Some(libc::EINTR | libc::ENOENT) => {}
                    Some(libc::EAGAIN) => {
                        if until.is_some_and(|t| Instant::now() < t) {
                            sys::yield_now();
                            continue;
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
        match req.op {
            Op::Forget { nlookup } => {
                self.fs.forget(req.nodeid, nlookup);
                return Ok(());
            }
            Op::BatchForget { pairs } => {
                for p in pairs {
                    let (node, n) = p.split_at(8);
                    let at = |b: &[u8]| b.iter().rev().fold(0, |v, x| v << 8 | u64::from(*x));
                    self.fs.forget(at(node), at(n));
                }
                return Ok(());
            }
            // Nothing here waits long for anything but the disk.
            Op::Interrupt => return Ok(()),
            _ => {}
        }
        reply.clear();
        let handled =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.fs.handle(req, reply)));
        let errno = match handled {
            Ok(Ok(())) => 0,
            Ok(Err(Errno(e))) => e,
            Err(_) => {
                tracing::error!(op = ?std::mem::discriminant(&req.op), "a request failed by a panic");
                libc::EIO
            }
        };
        self.send(reply.finish(req.unique, errno))
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

fn work(shared: &Shared) -> std::io::Result<()> {
    let mut buf = vec![0; shared.max_io as usize + 8192];
    let mut reply = Reply::new(shared.max_io as usize);
    let lock = || shared.lead.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lead = Some(lock());
    let mut look = false;
    loop {
        if lead.is_none() {
            lead = Some(lock());
        }
        let n = match shared.next(&mut buf, look)? {
            Got::Request(n) => n,
            Got::End => return Ok(()),
        };
        let Some(req) = Request::parse(&buf[..n]) else {
            if let Some((_, unique)) = request::header(&buf[..n]) {
                reply.clear();
                shared.send(reply.finish(unique, libc::EIO))?;
            }
            continue;
        };
        look = true;
        if shared.fs.is_slow(&req.op) {
            lead = None;
        }
        if let Err(e) = shared.answer(&req, &mut reply) {
            // One answer that the kernel does not take must not end the service.
            tracing::error!(error = %e, op = ?std::mem::discriminant(&req.op), "the kernel refused an answer");
            reply.clear();
            shared.send(reply.finish(req.unique, libc::EIO)).ok();
        }
    }
}
