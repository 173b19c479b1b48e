//! Paths in the target's root, what kind of file stands behind a description, and files that are only opened again.

use std::fs::{self, File, Metadata};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};

use super::capture::{Class, World};
use super::error::{Error, Refuse};
use super::fdinfo::Info;
use super::restore::Context;
use super::scan::Description;
use super::{Kind, OpenFile, external, inet, inotify, netlink, pipe, regular, tty, unix};

/// A file that is opened again by its path, and nothing more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reopened {
    /// Its path in the target's root.
    pub path: PathBuf,
    /// Its inode, if it must be the same directory.
    pub ino: Option<u64>,
    /// Device number, if it must be this device.
    pub rdev: Option<u64>,
}

/// Root directory of a process.
#[derive(Debug)]
pub(super) struct Root {
    pub pid: i32,
    link: PathBuf,
    dir: File,
}

impl Root {
    pub(super) fn of(pid: i32) -> Result<Self, Error> {
        let path = format!("/proc/{pid}/root");
        let fail = |source| Error::Read {
            pid,
            what: path.clone(),
            source,
        };
        Ok(Self {
            pid,
            link: fs::read_link(&path).map_err(fail)?,
            dir: File::open(&path).map_err(fail)?,
        })
    }

    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// A path as the saver sees it, in this root; none if it lies outside.
    pub(super) fn inside(&self, seen: &Path) -> Option<PathBuf> {
        let rest = seen.strip_prefix(&self.link).ok()?;
        Some(Path::new("/").join(rest))
    }
}

/// Opens a path in a root directory, whatever symbolic links say.
pub(super) fn open_in(root: BorrowedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    openat2(
        root,
        path,
        OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT),
    )
}

/// fstat(2) of a path in a root.
pub(super) fn stat_in(root: BorrowedFd, path: &Path) -> std::io::Result<Metadata> {
    File::from(open_in(root, path, OFlag::O_PATH)?).metadata()
}

pub(super) fn root_of<'w>(world: &'w World, pid: i32) -> Result<&'w Root, Refuse> {
    let found = world.roots.iter().find(|root| root.pid == pid);
    found.ok_or_else(|| Refuse::no("its process is not part of the snapshot", "take it again"))
}

/// The path of a file in its process's root; refused if another file is there now.
pub(super) fn target_path(world: &World, description: &Description) -> Result<PathBuf, Refuse> {
    let root = root_of(world, description.pid)?;
    let path = root.inside(&description.link).ok_or_else(|| {
        Refuse::no(
            "it lies outside the process's root directory",
            "close it before the snapshot",
        )
    })?;
    let stat = &description.stat;
    match stat_in(root.dir(), &path) {
        Ok(now) if (now.dev(), now.ino()) == (stat.dev(), stat.ino()) => Ok(path),
        _ => Err(Refuse::no(
            "its name is now gone or belongs to another file, though it has other names or mounts",
            "close it, or open it anew",
        )),
    }
}

const STATELESS: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];
const PROC: i64 = 0x9fa0;
const SYSFS: i64 = 0x6265_6572;
const CGROUP2: i64 = 0x6367_7270;
const NSFS: i64 = 0x6e73_6673;
const DEBUG_FILESYSTEMS: [i64; 4] = [0x6462_6720, 0x7472_6163, 0xcafe_4a11, 0x1980_0202];

fn filesystem(description: &Description) -> i64 {
    nix::sys::statfs::fstatfs(&description.file).map_or(0, |stat| stat.filesystem_type().0)
}

/// What a description is.
pub(super) fn classify(
    world: &mut World,
    description: &Description,
    info: &Info,
) -> Result<Class, Refuse> {
    if world.options.external.contains(&description.fd) {
        return external::classify(world, description, "it is given anew");
    }
    let kind = description.stat.file_type();
    let link = description.link.to_string_lossy().into_owned();
    if let Some(name) = link.strip_prefix("anon_inode:") {
        return anonymous(world, name.trim_matches(['[', ']']), description, info);
    }
    if kind.is_socket() {
        return socket(world, description);
    }
    if info.flags & libc::O_PATH != 0 {
        return named(world, description, true);
    }
    if kind.is_fifo() {
        return pipe::classify(world, description);
    }
    if kind.is_char_device() {
        return device(world, description, info);
    }
    if kind.is_dir() {
        return named(world, description, true);
    }
    if !kind.is_file() {
        return Err(Refuse::no(
            "a device or file of this kind is not captured",
            "close it before the snapshot",
        ));
    }
    match filesystem(description) {
        NSFS => namespace(description, &link),
        PROC | SYSFS | CGROUP2 => kernel_file(world, description),
        magic if DEBUG_FILESYSTEMS.contains(&magic) => Err(Refuse::no(
            "a file of the kernel with a state of its own",
            "close it before the snapshot",
        )),
        _ => regular::classify(world, description),
    }
}

fn named(world: &World, description: &Description, same: bool) -> Result<Class, Refuse> {
    if description.stat.nlink() == 0 {
        return Err(Refuse::no(
            "a directory (or O_PATH file) without a name",
            "close it before the snapshot",
        ));
    }
    let path = target_path(world, description)?;
    let ino = same.then(|| description.stat.ino());
    Ok(Class::Fixed(Kind::Path(Reopened {
        path,
        ino,
        rdev: None,
    })))
}

fn namespace(description: &Description, link: &str) -> Result<Class, Refuse> {
    let name = link.split(':').next().unwrap_or_default();
    let own = fs::read_link(format!("/proc/{}/ns/{name}", description.pid));
    if own.is_ok_and(|own| own == description.link) {
        let path = PathBuf::from(format!("/proc/self/ns/{name}"));
        return Ok(Class::Fixed(Kind::Path(Reopened {
            path,
            ino: None,
            rdev: None,
        })));
    }
    Err(Refuse::no(
        "a namespace that is not the process's own",
        "close it before the snapshot",
    ))
}

fn kernel_file(world: &World, description: &Description) -> Result<Class, Refuse> {
    let mut words = description.link.iter().skip(1);
    if words.next().is_some_and(|word| word == "proc")
        && let Some(pid) = words
            .next()
            .and_then(|word| word.to_str()?.parse::<i32>().ok())
        && Some(&pid) != world.pids.first()
    {
        return Err(Refuse::no(
            format!("a file of process {pid}"),
            "close it before the snapshot",
        ));
    }
    let path = root_of(world, description.pid)?.inside(&description.link);
    let path =
        path.ok_or_else(|| Refuse::no("it lies outside the process's root directory", "close it"))?;
    Ok(Class::Fixed(Kind::Path(Reopened {
        path,
        ino: None,
        rdev: None,
    })))
}

fn device(world: &mut World, description: &Description, info: &Info) -> Result<Class, Refuse> {
    let rdev = description.stat.rdev();
    let number = (libc::major(rdev), libc::minor(rdev));
    if STATELESS.contains(&number) {
        let path = target_path(world, description)?;
        return Ok(Class::Fixed(Kind::Path(Reopened {
            path,
            ino: None,
            rdev: Some(rdev),
        })));
    }
    match number.0 {
        5 if number.1 == 2 => Ok(tty::master_class(info)),
        136..=143 => tty::slave_class(world, description, (number.0 - 136) * 256 * 4096 + number.1),
        4 | 5 => external::classify(world, description, "a terminal outside the tree"),
        _ => Err(Refuse::no(
            format!(
                "device {}:{} holds state that cannot be read",
                number.0, number.1
            ),
            "close it before the snapshot",
        )),
    }
}

fn anonymous(
    world: &World,
    name: &str,
    description: &Description,
    info: &Info,
) -> Result<Class, Refuse> {
    match name {
        "eventfd" => Ok(Class::Eventfd),
        "timerfd" => Ok(Class::Timerfd),
        "signalfd" => Ok(Class::Signalfd),
        "eventpoll" => Ok(Class::Epoll),
        "inotify" => inotify::classify(world, description, info),
        "pidfd" => super::capture::pidfd_class(world, info),
        other => {
            let reason = match other {
                "io_uring" => "requests in flight in the kernel cannot be read".to_owned(),
                "userfaultfd" => "it serves page faults of a process".to_owned(),
                "fanotify" => "its marks and events cannot be read whole".to_owned(),
                "perf_event" => "its counters belong to the processor".to_owned(),
                other if other.starts_with("bpf") => {
                    "programs in the kernel are not captured".to_owned()
                }
                "fscontext" | "mount" => "a mount that is being made".to_owned(),
                other => format!("{other} is not captured"),
            };
            Err(Refuse::no(reason, "close it before the snapshot"))
        }
    }
}

fn socket(world: &mut World, description: &Description) -> Result<Class, Refuse> {
    use crate::sys::sockopt;
    let fd = description.file.as_fd();
    let get =
        |name| sockopt::get_int(fd, libc::SOL_SOCKET, name).map_err(Refuse::failed("getsockopt"));
    let (family, kind) = (get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?);
    match (family, kind) {
        (libc::AF_UNIX, _) => unix::classify(world, description),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_DGRAM) => {
            inet::classify(description)
        }
        (libc::AF_NETLINK, _) => netlink::classify(description),
        _ => {
            let reason = format!("sockets of family {family}, type {kind} are not captured");
            Err(Refuse::no(reason, "close it before the snapshot"))
        }
    }
}

/// Flags that open(2) takes when a description is made again; the others are of the moment or come later.
pub(super) fn open_flags(file: &OpenFile) -> OFlag {
    let of_the_moment = libc::O_CREAT
        | libc::O_EXCL
        | libc::O_TRUNC
        | libc::O_ASYNC
        | (libc::O_TMPFILE & !libc::O_DIRECTORY);
    OFlag::from_bits_retain(file.flags & !of_the_moment) | OFlag::O_NOCTTY
}

/// Opens it again.
pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    reopened: &Reopened,
    ctx: &Context,
) -> Result<OwnedFd, Error> {
    let name = reopened.path.display();
    let what = format!("open {name}; bring it back as it was");
    let flags = open_flags(file);
    let flags = if flags.contains(OFlag::O_PATH) {
        flags & !OFlag::O_NOCTTY
    } else {
        flags
    };
    let fd = if reopened.path.starts_with("/proc") {
        // Its magic links lead out of any root.
        nix::fcntl::open(
            &reopened.path,
            flags | OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )
    } else {
        open_in(ctx.root, &reopened.path, flags)
    };
    let fd = fd.map_err(Error::errno(at, &*what))?;
    let stat = super::scan::stat_of(&fd).map_err(Error::restore(at, &*what))?;
    if reopened
        .rdev
        .is_some_and(|rdev| stat.rdev() != rdev || !stat.file_type().is_char_device())
    {
        return Err(Error::Changed {
            file: at,
            what: format!("{name} is another device now; bring the old one back"),
        });
    }
    if reopened.ino.is_some_and(|ino| stat.ino() != ino) {
        return Err(Error::Changed {
            file: at,
            what: format!("{name} was replaced; bring the old one back"),
        });
    }
    if file.offset != 0 && !flags.contains(OFlag::O_PATH) {
        seek(at, &fd, file.offset)?;
    }
    Ok(fd)
}

/// Sets the offset.
pub(super) fn seek(at: usize, fd: &OwnedFd, offset: u64) -> Result<(), Error> {
    nix::unistd::lseek(fd, offset.cast_signed(), nix::unistd::Whence::SeekSet)
        .map(drop)
        .map_err(Error::errno(at, format!("set the offset to {offset}")))
}
