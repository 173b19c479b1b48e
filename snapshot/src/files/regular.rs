//! Regular files: with a name, without one, and memfds that are mapped nowhere.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::capture::{Class, World};
use super::content;
use super::error::{Error, Refuse};
use super::path::{open_flags, open_in, root_of, seek, target_path};
use super::restore::Context;
use super::scan::{self, Description, identity};
use super::{Kind, OpenFile};
use crate::sys::descriptor;

/// A regular file that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Regular {
    /// Its path in the target's root.
    pub path: PathBuf,
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Bytes it had; it may have grown since.
    pub size: u64,
}

/// A regular file without a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unlinked {
    /// The directory that it was in.
    pub dir: PathBuf,
    /// Its content: `files/N` in the snapshot.
    pub saved: u32,
    /// Bytes.
    pub size: u64,
    /// The sum of its content, hexadecimal.
    pub sum: String,
    /// Permissions.
    pub mode: u32,
    /// Owner: user, group.
    pub owner: (u32, u32),
}

/// memfd_create(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memfd {
    /// Its name.
    pub name: String,
    /// F_GET_SEALS.
    pub seals: i32,
    /// Its content: `files/N` in the snapshot.
    pub saved: u32,
    /// Bytes.
    pub size: u64,
    /// The sum of its content, hexadecimal.
    pub sum: String,
}

#[derive(Debug)]
pub(super) struct Plan {
    path: PathBuf,
}

/// A file whose content is copied into the snapshot.
#[derive(Debug)]
pub(super) struct Copy {
    saved: u32,
    memfd: Option<String>,
    dir: PathBuf,
    /// The file as it was when it was copied ahead of the stop; none if it must be copied in the stop.
    as_of: Option<Stamp>,
}

/// (size, mtime, ctime)
type Stamp = (u64, i64, i64, i64, i64);

fn stamp(stat: &fs::Metadata) -> Stamp {
    (
        stat.len(),
        stat.mtime(),
        stat.mtime_nsec(),
        stat.ctime(),
        stat.ctime_nsec(),
    )
}

const HUGETLBFS: i64 = 0x9584_58f6;

pub(super) fn classify(world: &mut World, description: &Description) -> Result<Class, Refuse> {
    let stat = &description.stat;
    let (dev, ino) = identity(stat);
    if let Some(object) = (world.options.shared)(dev, ino, description.file.as_fd()) {
        return Ok(Class::Fixed(Kind::SharedMemory { object }));
    }
    if stat.nlink() > 0 {
        return Ok(Class::Regular(Plan {
            path: target_path(world, description)?,
        }));
    }
    let magic =
        nix::sys::statfs::fstatfs(&description.file).map_or(0, |found| found.filesystem_type().0);
    if magic == HUGETLBFS {
        return Err(Refuse::no(
            "an unlinked file of huge pages",
            "close it before the snapshot",
        ));
    }
    let link = description.link.to_string_lossy();
    let name = link.strip_suffix(" (deleted)").unwrap_or(&link);
    let memfd = name.strip_prefix("/memfd:").map(str::to_owned);
    let dir = match memfd {
        Some(_) => PathBuf::new(),
        None => {
            let root = root_of(world, description.pid)?;
            let seen = Path::new(name).parent().unwrap_or(Path::new("/"));
            root.inside(seen).unwrap_or_else(|| PathBuf::from("/tmp"))
        }
    };
    let saved = *world.copies.entry((dev, ino)).or_insert_with(|| {
        world.next_copy += 1;
        world.next_copy - 1
    });
    let mut copy = Copy {
        saved,
        memfd,
        dir,
        as_of: None,
    };
    // Times are trusted only if nothing writes through a mapping, and the last change is not of this moment.
    let recent = SystemTime::now().checked_sub(Duration::from_millis(20));
    let settled = stat
        .modified()
        .ok()
        .zip(recent)
        .is_some_and(|(changed, recent)| changed < recent);
    if settled && !mapped(&world.pids, dev, ino) {
        save(world, &copy, description)?;
        copy.as_of = Some(stamp(stat));
    }
    Ok(Class::Unlinked(copy))
}

/// Whether a process of the tree has it mapped shared and for writing.
fn mapped(pids: &[i32], dev: u64, ino: u64) -> bool {
    let device = format!("{:02x}:{:02x}", libc::major(dev), libc::minor(dev));
    let inode = ino.to_string();
    pids.iter().any(|pid| {
        let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        String::from_utf8_lossy(&maps).lines().any(|line| {
            let words: Vec<&str> = line.split_ascii_whitespace().take(5).collect();
            words.get(3) == Some(&&*device)
                && words.get(4) == Some(&&*inode)
                && words[1].ends_with('s')
        })
    })
}

pub(super) fn state(plan: &Plan, description: &Description) -> Result<Kind, Refuse> {
    let stat = nix::sys::stat::fstat(&description.file).map_err(Refuse::errno("fstat"))?;
    let (dev, ino) = identity(&description.stat);
    Ok(Kind::Regular(Regular {
        path: plan.path.clone(),
        dev,
        ino,
        size: u64::try_from(stat.st_size).unwrap_or(0),
    }))
}

pub(super) fn unlinked_state(
    world: &mut World,
    copy: &Copy,
    description: &Description,
    dry: bool,
) -> Result<Kind, Refuse> {
    let stat = scan::stat_of(&description.file).map_err(Refuse::failed("fstat"))?;
    if !dry && copy.as_of != Some(stamp(&stat)) {
        save(world, copy, description)?;
    }
    let (saved, size) = (copy.saved, stat.len());
    if let Some(name) = copy.memfd.clone() {
        let seals = descriptor::fcntl(description.file.as_fd(), libc::F_GET_SEALS, 0);
        let seals = seals.map_err(Refuse::failed("F_GET_SEALS"))?;
        return Ok(Kind::Memfd(Memfd {
            name,
            seals,
            saved,
            size,
            // When it runs again.
            sum: String::new(),
        }));
    }
    let (mode, owner) = (stat.mode() & 0o7777, (stat.uid(), stat.gid()));
    Ok(Kind::Unlinked(Unlinked {
        dir: copy.dir.clone(),
        saved,
        size,
        sum: String::new(),
        mode,
        owner,
    }))
}

/// Copies the content into the snapshot.
fn save(world: &World, copy: &Copy, description: &Description) -> Result<(), Refuse> {
    let path = content::path(&world.options.dir, copy.saved);
    let fail = |source| Refuse::Save(path.clone(), source);
    fs::create_dir_all(world.options.dir.join("files")).map_err(fail)?;
    // A description of our own: the target's may be write-only, and its offset must not move.
    let from = File::open(description.magic()).map_err(Refuse::failed("open the file anew"))?;
    let to = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(fail)?;
    content::copy_sparse(&from, &to).map_err(fail)
}

/// Opens a file with a name again, and checks that it is the same.
pub(super) fn restore(
    at: usize,
    file: &OpenFile,
    regular: &Regular,
    ctx: &Context,
) -> Result<OwnedFd, Error> {
    let name = regular.path.display();
    let flags = open_flags(file) & !OFlag::O_DIRECTORY;
    let fd = open_in(ctx.root, &regular.path, flags);
    let fd = fd.map_err(Error::errno(
        at,
        format!("open {name}; bring the file back, it was open in the snapshot"),
    ))?;
    let stat = scan::stat_of(&fd).map_err(Error::restore(at, "fstat"))?;
    if identity(&stat) != (regular.dev, regular.ino) {
        let what = format!(
            "{name} is another file now (inode {} instead of {}); bring the old one back",
            stat.ino(),
            regular.ino
        );
        return Err(Error::Changed { file: at, what });
    }
    if stat.len() < regular.size {
        let what = format!(
            "{name} is shorter ({} bytes) than it was ({}); bring its content back",
            stat.len(),
            regular.size
        );
        return Err(Error::Changed { file: at, what });
    }
    if file.offset != 0 {
        seek(at, &fd, file.offset)?;
    }
    Ok(fd)
}

/// Contents that were made again, by number of the copy.
pub(super) type Made = HashMap<u32, OwnedFd>;

/// Makes a file without a name, once, and opens it.
pub(super) fn restore_unlinked(
    at: usize,
    file: &OpenFile,
    unlinked: &Unlinked,
    (ctx, dir, made): (&Context, &Path, &mut Made),
) -> Result<OwnedFd, Error> {
    if let Entry::Vacant(vacant) = made.entry(unlinked.saved) {
        let new =
            unnamed(ctx, &unlinked.dir).map_err(Error::errno(at, "make a file without a name"))?;
        let new = File::from(new);
        let saved = (unlinked.saved, unlinked.size, &*unlinked.sum);
        content::restore(at, dir, saved, &new)?;
        std::os::unix::fs::fchown(&new, Some(unlinked.owner.0), Some(unlinked.owner.1))
            .and_then(|()| new.set_permissions(fs::Permissions::from_mode(unlinked.mode & 0o7777)))
            .map_err(Error::restore(at, "set the owner of a file without a name"))?;
        vacant.insert(new.into());
    }
    reopen(at, file, &made[&unlinked.saved])
}

fn unnamed(ctx: &Context, dir: &Path) -> nix::Result<OwnedFd> {
    let mut last = nix::Error::ENOENT;
    for dir in [dir, Path::new("/tmp"), Path::new("/dev/shm")] {
        match unnamed_in(ctx, dir) {
            Ok(fd) => return Ok(fd),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn unnamed_in(ctx: &Context, dir: &Path) -> nix::Result<OwnedFd> {
    let parent = open_in(ctx.root, dir, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let mode = Mode::from_bits_truncate(0o600);
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match nix::fcntl::openat(&parent, ".", flags, mode) {
        Err(nix::Error::EOPNOTSUPP | nix::Error::EISDIR) => {}
        result => return result,
    }
    let name = format!(".umlctl-{}", std::process::id());
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::openat(&parent, &*name, flags, mode)?;
    nix::unistd::unlinkat(&parent, &*name, nix::unistd::UnlinkatFlags::NoRemoveDir)?;
    Ok(fd)
}

/// Makes a memfd, once, and opens it.
pub(super) fn restore_memfd(
    at: usize,
    file: &OpenFile,
    memfd: &Memfd,
    (dir, made): (&Path, &mut Made),
) -> Result<OwnedFd, Error> {
    if let Entry::Vacant(vacant) = made.entry(memfd.saved) {
        let name = std::ffi::CString::new(&*memfd.name)
            .map_err(|_| Error::damaged(at, "a name with a zero byte"))?;
        let new = descriptor::memfd(&name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        let new = File::from(new.map_err(Error::restore(at, "memfd_create"))?);
        let saved = (memfd.saved, memfd.size, &*memfd.sum);
        content::restore(at, dir, saved, &new)?;
        if memfd.seals != 0 {
            descriptor::fcntl(new.as_fd(), libc::F_ADD_SEALS, memfd.seals)
                .map_err(Error::restore(at, "F_ADD_SEALS"))?;
        }
        vacant.insert(new.into());
    }
    reopen(at, file, &made[&memfd.saved])
}

/// A description of its own for a file we have, with the flags and offset that are wanted.
pub(super) fn reopen(at: usize, file: &OpenFile, of: &OwnedFd) -> Result<OwnedFd, Error> {
    let magic = format!("/proc/self/fd/{}", of.as_raw_fd());
    let flags = (open_flags(file) & !OFlag::O_DIRECTORY & !OFlag::O_NOFOLLOW) | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(&*magic, flags, Mode::empty())
        .map_err(Error::errno(at, "open it with its flags"))?;
    if file.offset != 0 {
        seek(at, &fd, file.offset)?;
    }
    Ok(fd)
}
