//! Directories by descriptor: entered without following symlinks or mounts, made so that only root gets in.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown};

use super::sys;

/// Opens a directory below another one: no symlinks, nothing mounted on the way.
pub(super) fn open_dir(at: &File, path: &Path) -> Result<File, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    openat2(at, path, how).map(File::from)
}

/// What an errno on the way to a directory means.
pub(super) fn in_the_way(e: Errno) -> String {
    match e {
        Errno::ELOOP => "a symlink is in the way".into(),
        Errno::EXDEV => "something is mounted in the way".into(),
        Errno::ENOTDIR => "a file is in the way of a directory".into(),
        other => other.desc().into(),
    }
}

/// Makes a directory that only root can enter, under a name nobody can guess, and opens it.
pub(super) fn make_private(at: &File, name: &OsStr) -> Result<File, String> {
    mkdirat(at, name, Mode::S_IRWXU).map_err(|e| e.desc())?;
    let dir = open_dir(at, Path::new(name)).map_err(in_the_way)?;
    // Whoever may write to the directory around it could have put another one in its place.
    let meta = dir.metadata().map_err(|e| e.to_string())?;
    let own = nix::unistd::geteuid().as_raw();
    let empty = || std::fs::read_dir(by_fd(&dir)).is_ok_and(|mut d| d.next().is_none());
    if meta.uid() != own || meta.mode() & 0o7777 != 0o700 || !empty() {
        return Err("somebody replaced the directory for the copy".into());
    }
    sys::drop_default_acl(&dir).map_err(|e| e.to_string())?;
    Ok(dir)
}

/// A path to an open file that means this one whatever its name is now; in a child its standard input is 0.
pub(super) fn by_fd(f: &File) -> PathBuf {
    format!("/proc/self/fd/{}", f.as_raw_fd()).into()
}

/// Gives a directory owner, mode, attributes and times of another.
pub(super) fn dress(from: &File, to: &File) -> std::io::Result<()> {
    let m = from.metadata()?;
    fchown(
        to,
        Some(Uid::from_raw(m.uid())),
        Some(Gid::from_raw(m.gid())),
    )?;
    sys::copy_xattrs(from, to)?;
    fchmod(to, Mode::from_bits_truncate(m.mode()))?;
    let time = |s, ns| TimeSpec::new(s, ns);
    futimens(
        to,
        &time(m.atime(), m.atime_nsec()),
        &time(m.mtime(), m.mtime_nsec()),
    )?;
    Ok(())
}
