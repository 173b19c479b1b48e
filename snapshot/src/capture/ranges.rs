//! Mappings of a target as the manifest has them.

use super::Error;
use super::plan::Refusal;
use crate::image::manifest::{Backing, FileIdentity, Range, SharedKind, SharedObject};
use crate::proc::{Map, MapKind};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const TMPFS: i64 = 0x0102_1994;

/// Objects of shared memory that were met, by device and inode.
#[derive(Debug, Default)]
pub struct Objects {
    by_inode: HashMap<(u64, u64), u32>,
    /// Mappings that were looked at before the stop, by process and everything that names them.
    known: HashMap<(i32, u64, u64, u64, u64, u64), Backing>,
    /// As the manifest has them.
    pub objects: Vec<SharedObject>,
    /// An open descriptor of each, through which its content is read.
    pub files: Vec<File>,
}

/// What a mapping is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// Private anonymous: tracked by write-protection.
    Tracked,
    /// Private, of a file: pages that were written are copied in the stop.
    Written,
    /// Nothing of it is saved here.
    None,
}

/// How memory of this mapping is saved.
#[must_use]
pub fn treatment(map: &Map) -> Treatment {
    match map.kind {
        MapKind::Anonymous(_) if !map.shared => Treatment::Tracked,
        MapKind::File { .. } if !map.shared => Treatment::Written,
        _ => Treatment::None,
    }
}

/// Why memory that somebody else fills or watches cannot be captured.
pub const PAGED: &str = "its memory is under a userfaultfd already";

/// Whether a mapping cannot be captured, judged by what it is of and its flags in smaps.
#[must_use]
pub fn refusal(pid: i32, map: &Map, flags: Option<&Vec<String>>) -> Option<Refusal> {
    let has = |f: &str| flags.is_some_and(|l| l.iter().any(|x| x == f));
    let name = match &map.kind {
        MapKind::Anonymous(_) => "anonymous memory".to_owned(),
        MapKind::File { path, .. } => path.display().to_string(),
        MapKind::Special(s) => s.clone(),
    };
    let (reason, remedy) = if has("um") || has("uw") || has("ui") {
        (
            PAGED,
            "another snapshot of it is under way, or it pages itself",
        )
    } else if has("ss") {
        (
            "it uses shadow stacks",
            "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        )
    } else if name.contains("[io_uring]") {
        (
            "io_uring rings are shared with the kernel",
            "have it use epoll instead",
        )
    } else if name.contains("[aio]") {
        (
            "requests of Linux AIO may be in flight",
            "have it use its own threads instead (for databases: a setting)",
        )
    } else if (has("io") || has("pf")) && !matches!(map.kind, MapKind::Special(_)) {
        ("memory of a device", "close the device first")
    } else if has("ht") {
        (
            "huge pages of hugetlbfs",
            "have it use transparent huge pages instead",
        )
    } else if name.starts_with("anon_inode:") {
        (
            "memory that is shared with the kernel",
            "have it unmap this first",
        )
    } else {
        return match &map.kind {
            MapKind::Special(s) if !known(s) => Some(Refusal::new(
                pid,
                format!("mapping {s} at {:#x}", map.start),
                "a mapping of the kernel's own that this program does not know",
                "report it",
            )),
            _ => None,
        };
    };
    Some(Refusal::new(
        pid,
        format!("mapping {name} at {:#x}", map.start),
        reason,
        remedy,
    ))
}

fn known(special: &str) -> bool {
    special == "[vdso]" || special == "[vsyscall]" || special.starts_with("[vvar")
}

impl Objects {
    /// The range of a mapping; `flags` are its letters in smaps, as read before the stop.
    pub fn range(
        &mut self,
        pid: i32,
        map: &Map,
        flags: Option<&Vec<String>>,
    ) -> Result<Range, Error> {
        let has = |f: &str| flags.is_some_and(|l| l.iter().any(|x| x == f));
        let (backing, name) = match &map.kind {
            MapKind::Anonymous(name) => (Backing::Anonymous, name.clone()),
            MapKind::Special(s) if s == "[vdso]" => (Backing::Vdso, None),
            MapKind::Special(s) if s == "[vsyscall]" => (Backing::Vsyscall, None),
            MapKind::Special(s) => (Backing::Vvar(s.clone()), None),
            MapKind::File { path, deleted } => match self.known.get(&key(pid, map)) {
                Some(known) => (known.clone(), None),
                None => (self.file(pid, map, path, *deleted)?, None),
            },
        };
        let flag = |f: &str, v: i32| if has(f) { v } else { 0 };
        let advice = [
            ("dc", 10),
            ("hg", 14),
            ("nh", 15),
            ("dd", 16),
            ("wf", 18),
            ("mg", 12),
        ];
        Ok(Range {
            start: map.start,
            end: map.end,
            prot: map.prot,
            flags: if map.shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            } | flag("gd", libc::MAP_GROWSDOWN)
                | flag("nr", libc::MAP_NORESERVE)
                | flag("ht", libc::MAP_HUGETLB)
                | flag("lo", libc::MAP_LOCKED),
            backing,
            advice: advice
                .into_iter()
                .filter(|(f, _)| has(f))
                .map(|(_, a)| a)
                .collect(),
            name,
        })
    }

    /// The object that a descriptor is of: one that is mapped, or a memfd, which nothing else would save.
    pub fn of_descriptor(&mut self, dev: u64, ino: u64, fd: BorrowedFd<'_>) -> Option<u32> {
        if let Some(&object) = self.by_inode.get(&(dev, ino)) {
            return Some(object);
        }
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let text = path.to_str()?.strip_suffix(" (deleted)")?;
        if !text.starts_with("/memfd:") {
            return None;
        }
        let file = File::from(fd.try_clone_to_owned().ok()?);
        let kind = shared_kind(&file, Path::new(text), true)?;
        let size = file.metadata().ok()?.len();
        let object = self.objects.len() as u32;
        self.objects.push(SharedObject { size, kind });
        self.files.push(file);
        self.by_inode.insert((dev, ino), object);
        Some(object)
    }

    /// Looks at a mapping ahead of the stop, so that the stop need not.
    pub fn look_ahead(&mut self, pid: i32, map: &Map) -> Result<(), Error> {
        if let MapKind::File { path, deleted } = &map.kind {
            match self.file(pid, map, path, *deleted) {
                Ok(backing) => drop(self.known.insert(key(pid, map), backing)),
                // It was unmapped or split since it was listed. The stop looks at what there is then.
                Err(Error::Mapping(_, _, _, e)) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn file(&mut self, pid: i32, map: &Map, path: &Path, deleted: bool) -> Result<Backing, Error> {
        if let Some(&object) = self.by_inode.get(&(map.dev, map.ino)) {
            return Ok(Backing::Shared {
                object,
                offset: map.offset,
            });
        }
        let link = PathBuf::from(format!(
            "/proc/{pid}/map_files/{:x}-{:x}",
            map.start, map.end
        ));
        let fail = |e| Error::Mapping(pid, path.into(), map.start, e);
        let meta = std::fs::metadata(&link).map_err(fail)?;
        if map.shared {
            // Opened for reading and writing where that may be: a resume that takes over needs no more than reading.
            let file = File::open(&link).map_err(fail)?;
            if let Some(kind) = shared_kind(&file, path, deleted) {
                let object = self.objects.len() as u32;
                self.objects.push(SharedObject {
                    size: meta.len(),
                    kind,
                });
                self.files.push(file);
                self.by_inode.insert((map.dev, map.ino), object);
                return Ok(Backing::Shared {
                    object,
                    offset: map.offset,
                });
            }
        }
        let identity = FileIdentity {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.len(),
            mtime_ns: meta
                .mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(meta.mtime_nsec()),
        };
        Ok(Backing::File {
            path: path.into(),
            offset: map.offset,
            identity,
            saved: None,
        })
    }
}

fn key(pid: i32, map: &Map) -> (i32, u64, u64, u64, u64, u64) {
    (pid, map.start, map.end, map.dev, map.ino, map.offset)
}

/// What kind of shared memory it is; `None`: a file of a disk, which keeps its content itself.
fn shared_kind(file: &File, path: &Path, deleted: bool) -> Option<SharedKind> {
    let text = path.to_string_lossy();
    let tmpfs = nix::sys::statfs::fstatfs(file).is_ok_and(|s| s.filesystem_type().0 == TMPFS);
    if text == "/dev/zero" && deleted {
        Some(SharedKind::Anonymous)
    } else if let Some(name) = text.strip_prefix("/memfd:") {
        let seals = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap_or_default();
        Some(SharedKind::Memfd(name.to_owned(), seals as u32))
    } else if let Some(key) = text.strip_prefix("/SYSV") {
        let key = u32::from_str_radix(key, 16)
            .unwrap_or_default()
            .cast_signed();
        let id = file.metadata().ok()?.ino() as i32;
        // The file's own mode says nothing; and a segment that waits for its end has lost its key.
        let mode = crate::sys::sysv::segment(id).map_or(0o600, |s| s.mode & 0o1777);
        Some(SharedKind::SysV(id, key, mode))
    } else if tmpfs && deleted {
        Some(SharedKind::TmpfsUnlinked(path.into()))
    } else if tmpfs {
        Some(SharedKind::Tmpfs(path.into()))
    } else {
        None
    }
}

/// Reads the first bytes of a file, for tests of what a mapping is of.
pub fn first_bytes(file: &File, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0; len];
    file.read_exact_at(&mut buf, 0)?;
    Ok(buf)
}
