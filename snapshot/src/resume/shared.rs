//! Making objects of shared memory again, once for all processes that have them.

use super::memory::Helpers;
use super::open::bad;
use super::source::{PAGE, PageSource, pieces};
use super::{Error, sys};
use crate::image::manifest::{Backing, Credentials, Manifest, SharedKind, SharedObject};
use crate::sys::sysv;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// An object that was made.
#[derive(Debug)]
pub enum Made {
    /// A file to map.
    File(OwnedFd),
    /// The number of a segment.
    SysV(i32),
}

/// Makes an object and fills it: it is not private, so that there is nothing to be lazy with. A twin's objects are its own,
/// without a name: the original's are in use.
pub fn make(
    m: &Manifest,
    source: &dyn PageSource,
    number: u32,
    object: &SharedObject,
    twin: bool,
    h: &mut Helpers,
) -> Result<Made, Error> {
    let space = (m.spaces.len() as u32).saturating_add(number);
    let size = object.size;
    let file = match &object.kind {
        SharedKind::SysV(id, key, mode) => {
            let id = segment((*id, *key, *mode), size, m, number, h)?;
            let fill = |to: &mut [u8]| {
                to.fill(0);
                fill(source, space, size, &mut |at, bytes| {
                    let to = usize::try_from(at)
                        .ok()
                        .and_then(|at| to.get_mut(at..at.checked_add(bytes.len())?));
                    to.ok_or_else(|| io::Error::from_raw_os_error(libc::ERANGE))?
                        .copy_from_slice(bytes);
                    Ok(())
                })
            };
            let filled = sysv::with(id, fill).map_err(sys("shmat"))?;
            filled.map_err(|e| bad(Path::new("System V shared memory"), &e.to_string()))?;
            return Ok(Made::SysV(id));
        }
        SharedKind::Tmpfs(path) if !twin => named(path, size, owner(m, number))?,
        SharedKind::Memfd(name, _) => unnamed(name, size)?,
        _ => unnamed("umlctl-shared", size)?,
    };
    let put = &mut |at, bytes: &[u8]| file.write_all_at(bytes, at);
    fill(source, space, size, put).map_err(|e| bad(Path::new("shared memory"), &e.to_string()))?;
    // The last page may have made it longer.
    set_len(&file, size)?;
    if let SharedKind::Memfd(_, seals) = &object.kind
        && *seals != 0
    {
        let seals = nix::fcntl::SealFlag::from_bits_truncate(*seals as i32);
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(sys("sealing"))?;
    }
    Ok(Made::File(file.into()))
}

fn set_len(file: &File, size: u64) -> Result<(), Error> {
    let len = i64::try_from(size).map_err(|_| Error::Manifest("a shared object is too large"))?;
    nix::unistd::ftruncate(file, len).map_err(sys("ftruncate"))
}

fn unnamed(name: &str, size: u64) -> Result<File, Error> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags).map_err(sys("memfd_create"))?);
    set_len(&file, size)?;
    Ok(file)
}

/// The file of a name, as it is after its processes were killed, or a new one; emptied of what it holds.
fn named(path: &Path, size: u64, owner: Option<&Credentials>) -> Result<File, Error> {
    let failed = |e: io::Error| bad(path, &e.to_string());
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW);
    let file = match options.open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let file = options
                .create_new(true)
                .mode(0o600)
                .open(path)
                .map_err(failed)?;
            if let Some(c) = owner {
                let (user, group) = (Some(c.uid[1]), Some(c.gid[1]));
                std::os::unix::fs::fchown(&file, user, group).map_err(failed)?;
            }
            file
        }
        other => other.map_err(failed)?,
    };
    set_len(&file, size)?;
    if let (Ok(len @ 1..), flags) = (i64::try_from(size), FallocateFlags::FALLOC_FL_PUNCH_HOLE) {
        let flags = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, 0, len).map_err(sys("fallocate"))?;
    }
    Ok(file)
}

/// Who maps it: the manifest does not have the owner of an object.
fn owner(m: &Manifest, number: u32) -> Option<&Credentials> {
    let maps = |p: &&crate::image::manifest::Process| {
        m.spaces.get(p.space as usize).is_some_and(|s| {
            s.ranges
                .iter()
                .any(|r| matches!(r.backing, Backing::Shared { object, .. } if object == number))
        })
    };
    let first = m.processes.iter().filter(|p| p.zombie.is_none()).find(maps);
    first.map(|p| &p.credentials)
}

/// The segment that the killed processes have left, or a new one.
fn segment(
    (id, key, mode): (i32, i32, u32),
    size: u64,
    m: &Manifest,
    number: u32,
    h: &mut Helpers,
) -> Result<i32, Error> {
    let destroyed = mode & sysv::DESTROYED != 0;
    match sysv::segment(id) {
        Ok(s) if s.attached == 0 && s.size == size && s.key == key => return Ok(id),
        Ok(_) => {
            return Err(Error::Host(format!(
                "System V shared memory {id} is another one or in use; end its users, or resume in a namespace"
            )));
        }
        Err(Errno::EINVAL | Errno::EIDRM) => {}
        Err(e) => return Err(Error::Sys("shmctl", e)),
    }
    // One that waits for its end has no key any more.
    let key = if destroyed { libc::IPC_PRIVATE } else { key };
    let made = sysv::create(id, key, size, mode).map_err(sys("shmget"))?;
    h.made_segments.push(made);
    if made != id {
        return Err(Error::Host(format!(
            "System V shared memory cannot be made under its number, {id}"
        )));
    }
    if let Some(c) = owner(m, number) {
        sysv::give(id, c.uid[1], c.gid[1]).map_err(sys("shmctl"))?;
    }
    if destroyed {
        h.ending_segments.push(id);
    }
    Ok(id)
}

/// Gives all pages of an object to `put`.
fn fill(
    source: &dyn PageSource,
    space: u32,
    size: u64,
    put: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let files = source.files();
    let mut buf = vec![0; 1 << 20];
    for (at, len, layer, offset) in pieces(source, space, 0, size.next_multiple_of(PAGE)) {
        let from = files
            .get(layer as usize)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?
            .try_clone_to_owned()
            .map(File::from)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(buf.len() as u64) as usize;
            from.read_exact_at(&mut buf[..n], offset + done)?;
            put(at + done, &buf[..n])?;
            done += n as u64;
        }
    }
    Ok(())
}
