//! Opening what new processes map from: files that must be the same as before, shared objects, pages.

use super::memory::Helpers;
use super::shared::{self, Made};
use super::source::PageSource;
use super::{Error, sys};
use crate::image::manifest::{Backing, FileIdentity, Manifest};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Opens all, on numbers above those that any process of the snapshot uses.
pub fn helpers(m: &Manifest, source: &dyn PageSource, twin: bool) -> Result<Helpers, Error> {
    let top = m.processes.iter().flat_map(|p| &p.fds).map(|f| f.fd).max();
    let first = top.unwrap_or(0).clamp(1022, 1 << 24) + 2;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(sys("getrlimit"))?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(sys("setrlimit"))?;
    }
    let mut h = Helpers::from(first);
    for f in source.files() {
        let fd = raise(&mut h, f.as_fd())?;
        h.pages.push(fd);
    }
    for (number, object) in m.shared.iter().enumerate() {
        let number = number as u32;
        match shared::make(m, source, number, object, twin, &mut h)? {
            Made::File(fd) => {
                let fd = raise(&mut h, fd.as_fd())?;
                h.shared.insert(number, fd);
            }
            Made::SysV(id) => {
                h.sysv.insert(number, id);
            }
        }
    }
    for p in m.processes.iter().filter(|p| p.zombie.is_none()) {
        let exe = in_root(&p.root, &p.exe);
        let file = File::open(&exe).map_err(|e| bad(&exe, &e.to_string()))?;
        let fd = raise(&mut h, file.as_fd())?;
        h.exe.insert(p.pid, fd);
        let Some(space) = m.spaces.get(p.space as usize) else {
            return Err(Error::Manifest("no such address space"));
        };
        for r in &space.ranges {
            let Backing::File { path, identity, .. } = &r.backing else {
                continue;
            };
            let write = r.flags & libc::MAP_SHARED != 0 && r.prot & libc::PROT_WRITE != 0;
            let key = (path.clone(), write);
            if !h.files.contains_key(&key) {
                let file = open_same(&in_root(&p.root, path), identity, write)?;
                let fd = raise(&mut h, file.as_fd())?;
                h.files.insert(key, fd);
            }
        }
    }
    Ok(h)
}

/// A path of a process whose root directory may be another one.
fn in_root(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

pub(super) fn bad(path: &Path, what: &str) -> Error {
    Error::File {
        path: path.into(),
        what: what.into(),
    }
}

pub(crate) fn raise(h: &mut Helpers, fd: impl AsFd) -> Result<i32, Error> {
    let fd = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(h.first)).map_err(sys("F_DUPFD"))?;
    h.own(fd);
    Ok(fd)
}

pub(crate) fn open_same(path: &Path, was: &FileIdentity, write: bool) -> Result<File, Error> {
    let file = OpenOptions::new().read(true).write(write).open(path);
    let file = file.map_err(|e| bad(path, &e.to_string()))?;
    let is = file.metadata().map_err(|e| bad(path, &e.to_string()))?;
    let mtime = is
        .mtime()
        .saturating_mul(1_000_000_000)
        .saturating_add(is.mtime_nsec());
    if is.dev() != was.dev || is.ino() != was.ino {
        return Err(bad(path, "another file is there now"));
    }
    // A file that is mapped shared is written by those who map it.
    if !write && (is.size() != was.size || mtime != was.mtime_ns) {
        return Err(bad(path, "it has changed since"));
    }
    Ok(file)
}
