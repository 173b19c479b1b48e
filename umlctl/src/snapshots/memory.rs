//! A resumed machine's memory: a file that is served page by page from the snapshot, each chunk checked before any of it
//! is given away, with what the machine has changed in a file of its own.
//!
//! It is a FUSE file because every process of the machine maps it, with mappings that come and go: whichever touches a
//! page first, the kernel asks for it once and all see the same page.

use crate::sys::fd;
use cowfs::fuse::{
    self, Attr, Entry, Errno, Filesystem, MountOptions, Negotiated, Op, Reply, Request, Statfs,
};
use nix::unistd::Pid;
use snapshot::sys::clone::{self, Fork};
use snapshot::uml::image::{self, CHUNK, Sums};
use snapshot::uml::manifest::Machine;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAGE: u64 = 4096;
const ROOT: u64 = 1;
const MEMORY: u64 = 2;
const NAME: &[u8] = b"memory";
const FOREVER: Duration = Duration::from_secs(1 << 30);
/// What is read ahead costs memory that an idle machine may never touch.
const READAHEAD_KB: u32 = 16;

/// Serving the memory failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot's files.
    #[error(transparent)]
    Image(#[from] snapshot::uml::Error),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] cowfs::fuse::FuseError),
    /// The process that serves it.
    #[error("the machine's memory is not served: {0}")]
    Process(String),
    /// A file or directory.
    #[error("cannot {1} {path}", path = .0.display())]
    Io(PathBuf, &'static str, #[source] std::io::Error),
}

/// Called once with what is wrong, when a chunk does not fit its sum or cannot be read.
pub type OnDamage = Box<dyn Fn(String) + Send + Sync>;

/// Bits of pages or chunks, set by several threads.
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(len: u64) -> Self {
        Self((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn get(&self, i: u64) -> bool {
        let word = self.0.get((i / 64) as usize);
        word.is_some_and(|w| w.load(Ordering::Acquire) >> (i % 64) & 1 == 1)
    }

    fn set(&self, i: u64) {
        if let Some(word) = self.0.get((i / 64) as usize) {
            word.fetch_or(1 << (i % 64), Ordering::AcqRel);
        }
    }
}

struct Memory {
    len: u64,
    base: File,
    base_path: PathBuf,
    sums: Sums,
    checked: Bits,
    /// Pages that the machine has changed, and the kernel has given back.
    own: File,
    changed: Bits,
    on_damage: OnDamage,
    ready: Mutex<Option<Sender<()>>>,
    attr: Attr,
}

/// The file of a VM's directory in which the end of a machine by damage is explained.
pub const DAMAGE: &str = "damage";

/// Has the memory of a snapshot served by a process of its own, which dies with the caller's thread. Gives the file, open for
/// reading and writing; it is served as long as anybody has it open. `dir` is a directory of the machine's own; if a chunk is
/// damaged, why is written there, and `keeper` is killed.
///
/// Not by threads of the caller: it reads this memory itself, and one that is killed while it waits for its own answer
/// waits for ever, and with it all that have the memory mapped.
///
/// The caller must have one thread.
///
/// # Errors
/// Then nothing is left.
pub fn spawn(dir: &Path, snapshot: &Path, machine: &Machine, keeper: Pid) -> Result<File, Error> {
    let process = |e: nix::errno::Errno| Error::Process(e.desc().into());
    let (ours, theirs) = fd::messages().map_err(process)?;
    let parent = nix::unistd::getpid();
    if clone::fork(0, libc::SIGCHLD, None).map_err(process)? == Fork::Child {
        let alive = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).is_ok()
            && nix::unistd::getppid() == parent;
        if alive {
            fd::close_except(&[theirs.as_raw_fd()]);
            let reason = dir.join(DAMAGE);
            let on_damage = Box::new(move |what: String| {
                // Who cannot write it down still must not let the guest go on.
                let _ = std::fs::write(&reason, &what);
                let _ = nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGKILL);
            });
            match serve(dir, snapshot, machine, on_damage) {
                Ok((file, session)) => {
                    let given = super::resume::give(&theirs, &file).is_ok();
                    drop((file, theirs));
                    if given {
                        let _ = session.join();
                    }
                }
                Err(e) => {
                    let text = snapshot::resume::text(&e);
                    let text = &text.as_bytes()[..text.len().min(fd::MESSAGE)];
                    let _ = fd::send(&theirs, text, None);
                }
            }
        }
        clone::exit_now(0);
    }
    drop(theirs);
    super::resume::receive(&ours)
        .map(File::from)
        .map_err(Error::Process)
}

/// Serves it, in threads of this process.
fn serve(
    dir: &Path,
    snapshot: &Path,
    machine: &Machine,
    on_damage: OnDamage,
) -> Result<(File, std::thread::JoinHandle<()>), Error> {
    let (base, base_path) = image::open(snapshot, image::MEMORY)?;
    let len = machine.memory_len;
    let found = base
        .metadata()
        .map_err(|e| Error::Io(base_path.clone(), "look at", e))?
        .len();
    if found != len {
        let what = format!("it has {found} bytes instead of {len}");
        return Err(snapshot::uml::Error::Damaged(base_path, what).into());
    }
    let sums = Sums::load(
        &snapshot.join(image::MEMORY_SUMS),
        &machine.memory_sums,
        &base_path,
        len,
    )?;
    let own = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(dir)
        .and_then(|f| f.set_len(len).map(|()| f))
        .map_err(|e| Error::Io(dir.into(), "make a file in", e))?;
    let target = dir.join("memory");
    let io = |what| {
        let target = target.clone();
        move |e| Error::Io(target, what, e)
    };
    std::fs::create_dir_all(&target).map_err(io("make"))?;
    let options = MountOptions {
        source: "umlctl".into(),
        subtype: "umlctl-memory".into(),
        nosuid: true,
        nodev: true,
        readahead_kb: READAHEAD_KB,
        threads: 2,
        spin_us: 60,
        ..MountOptions::default()
    };
    let session = fuse::mount(&target, &options)?;
    let (sender, ready) = channel();
    let memory = Memory {
        len,
        base,
        base_path,
        sums,
        checked: Bits::new(len.div_ceil(CHUNK)),
        own,
        changed: Bits::new(len.div_ceil(PAGE)),
        on_damage,
        ready: Mutex::new(Some(sender)),
        attr: Attr {
            ino: MEMORY,
            size: len,
            blocks: len / 512,
            mode: libc::S_IFREG | 0o600,
            nlink: 1,
            ..Attr::default()
        },
    };
    let thread = std::thread::Builder::new()
        .name("memory".into())
        .spawn(move || {
            if let Err(e) = session.run(Arc::new(memory)) {
                tracing::error!("the machine's memory is no longer served: {e}");
            }
        })
        .map_err(io("serve"))?;
    // The end of a session that failed drops the sender.
    let _ = ready.recv();
    let file = File::options()
        .read(true)
        .write(true)
        .open(target.join("memory"))
        .map_err(io("open the file in"));
    if let Ok(stat) = std::fs::metadata(&target) {
        // By default a mount like this may have one hundredth of what the kernel lets be dirty, and who writes more waits.
        fuse::limit_writeback(stat.dev(), (len >> 20) as u32 * 2 + 64);
    }
    // Only who has the file open goes on with it.
    let unmounted = fuse::unmount(&target, true);
    let file = file?;
    unmounted.map_err(io("unmount"))?;
    std::fs::remove_dir(&target).map_err(io("remove"))?;
    Ok((file, thread))
}

impl Memory {
    fn read(&self, mut at: u64, mut out: &mut [u8]) -> Result<(), Errno> {
        while !out.is_empty() {
            let changed = self.changed.get(at / PAGE);
            let mut len = PAGE - at % PAGE;
            while len < out.len() as u64 && self.changed.get((at + len) / PAGE) == changed {
                len += PAGE;
            }
            let (now, later) = out.split_at_mut((len as usize).min(out.len()));
            if changed {
                self.own
                    .read_exact_at(now, at)
                    .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
            } else {
                self.read_base(at, now)?;
            }
            at += now.len() as u64;
            out = later;
        }
        Ok(())
    }

    fn read_base(&self, mut at: u64, mut out: &mut [u8]) -> Result<(), Errno> {
        while !out.is_empty() {
            let chunk = at / CHUNK;
            let start = chunk * CHUNK;
            let end = (start + CHUNK).min(self.len);
            let (now, later) = out.split_at_mut(((end - at) as usize).min(out.len()));
            if self.checked.get(chunk) {
                self.base
                    .read_exact_at(now, at)
                    .map_err(|e| self.damaged(chunk, &e.to_string()))?;
            } else {
                let mut bytes = vec![0; (end - start) as usize];
                self.base
                    .read_exact_at(&mut bytes, start)
                    .map_err(|e| self.damaged(chunk, &e.to_string()))?;
                if !self.sums.fits(chunk, &bytes) {
                    return Err(self.damaged(chunk, "they are not what was saved"));
                }
                self.checked.set(chunk);
                let from = (at - start) as usize;
                now.copy_from_slice(&bytes[from..from + now.len()]);
            }
            at += now.len() as u64;
            out = later;
        }
        Ok(())
    }

    /// The guest must not go on without it: it would not know.
    fn damaged(&self, chunk: u64, what: &str) -> Errno {
        let at = chunk * CHUNK;
        let path = self.base_path.display();
        (self.on_damage)(format!(
            "{path} is damaged: bytes {at} to {}: {what}",
            at + CHUNK
        ));
        Errno(libc::EIO)
    }

    fn write(&self, at: u64, data: &[u8]) -> Result<(), Errno> {
        let end = at.checked_add(data.len() as u64).filter(|&e| e <= self.len);
        let end = end.ok_or(Errno(libc::EFBIG))?;
        let whole = at.is_multiple_of(PAGE) && end.is_multiple_of(PAGE);
        if !whole {
            // The kernel brings whole pages; a write(2) by somebody else need not.
            let (first, last) = (at / PAGE * PAGE, end.div_ceil(PAGE) * PAGE);
            let mut pages = vec![0; (last - first) as usize];
            self.read(first, &mut pages)?;
            pages[(at - first) as usize..(end - first) as usize].copy_from_slice(data);
            return self.write(first, &pages);
        }
        self.own
            .write_all_at(data, at)
            .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
        (at / PAGE..end / PAGE).for_each(|p| self.changed.set(p));
        Ok(())
    }

    /// SEEK_DATA and SEEK_HOLE, as far as the pages are known here: the kernel may have newer ones.
    fn seek(&self, from: u64, whence: i32) -> Result<u64, Errno> {
        let mut at = from;
        while at < self.len {
            let page = at / PAGE;
            let (data, end) = if self.changed.get(page) {
                (true, (page + 1) * PAGE)
            } else {
                self.base_extent(at)?
            };
            if data == (whence == libc::SEEK_DATA) {
                return Ok(at.max(from));
            }
            at = match data {
                true => end,
                // A hole of the snapshot may have pages that were changed.
                false => (page + 1..end / PAGE)
                    .find(|&p| self.changed.get(p))
                    .map_or(end, |p| p * PAGE),
            };
        }
        match whence {
            libc::SEEK_HOLE => Ok(self.len),
            _ => Err(Errno(libc::ENXIO)),
        }
    }

    /// Whether there is data in the snapshot at a place, and up to where that is so.
    fn base_extent(&self, at: u64) -> Result<(bool, u64), Errno> {
        use nix::unistd::{Whence, lseek};
        let seek = |whence| match lseek(&self.base, at.cast_signed(), whence) {
            Ok(found) => Ok(found.cast_unsigned()),
            Err(nix::errno::Errno::ENXIO) => Ok(self.len),
            Err(e) => Err(Errno(e as i32)),
        };
        let data = seek(Whence::SeekData)?;
        if data / PAGE > at / PAGE {
            return Ok((false, data / PAGE * PAGE));
        }
        let hole = seek(Whence::SeekHole)?;
        Ok((true, hole.div_ceil(PAGE) * PAGE))
    }
}

impl Filesystem for Memory {
    fn handle(&self, req: &Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let root = Attr {
            ino: ROOT,
            mode: libc::S_IFDIR | 0o700,
            nlink: 2,
            ..Attr::default()
        };
        match (&req.op, req.nodeid) {
            (Op::Lookup { name }, ROOT) if *name == NAME => {
                reply.entry(&Entry {
                    nodeid: MEMORY,
                    attr: self.attr,
                    entry_valid: FOREVER,
                    attr_valid: FOREVER,
                });
                Ok(())
            }
            (Op::Lookup { .. }, _) => Err(Errno(libc::ENOENT)),
            (Op::Getattr | Op::Setattr(_), ROOT) => {
                reply.attr(&root, FOREVER);
                Ok(())
            }
            (Op::Getattr | Op::Setattr(_), MEMORY) => {
                reply.attr(&self.attr, FOREVER);
                Ok(())
            }
            (Op::Read { offset, size }, MEMORY) => {
                let end = offset.saturating_add(u64::from(*size)).min(self.len);
                let len = end.saturating_sub(*offset) as usize;
                let buffer = reply.data_buf(len);
                self.read(*offset, buffer)
            }
            (Op::Write { offset, data, .. }, MEMORY) => {
                self.write(*offset, data)?;
                reply.written(data.len() as u32);
                Ok(())
            }
            (Op::Lseek { offset, whence }, MEMORY) => {
                let at = self.seek(*offset, *whence as i32)?;
                reply.lseek(at);
                Ok(())
            }
            (Op::Statfs, _) => {
                reply.statfs(&Statfs::default());
                Ok(())
            }
            (
                Op::Fsync { .. } | Op::Release | Op::Releasedir | Op::Destroy | Op::Access { .. },
                _,
            ) => Ok(()),
            _ => Err(Errno(libc::ENOSYS)),
        }
    }

    fn forget(&self, _: u64, _: u64) {}

    fn ready(&self, _: &Negotiated) {
        if let Ok(mut ready) = self.ready.lock() {
            ready.take();
        }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("base", &self.base_path)
            .finish_non_exhaustive()
    }
}
