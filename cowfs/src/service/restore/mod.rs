//! Brings single files and directories back from a checkpoint, through the mount, so that the kernel knows of it.
//!
//! The tree may belong to users who want to get at root by this. So the checkpoint is mounted where only root can go, the
//! copy grows in a directory that only root can enter, every directory on the way is held by descriptor and entered
//! without following symlinks or mounts, and the finished copy is put into place by one rename.

mod dirs;
mod shown;
mod sys;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, RenameFlags, renameat2};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{Service, micros};
use crate::control::{Answer, Failure, NotRestored};
use crate::mountinfo;
use dirs::{by_fd, dress, in_the_way, make_private, open_dir};
use shown::Shown;

/// Bytes of a failed command's output that are shown.
const TAIL: usize = 1000;

fn failed(what: &str, e: impl std::fmt::Display) -> Failure {
    Failure::new(format!("{what}: {e}"))
}

/// A path inside the root, without `..`.
fn inside(path: &str) -> Result<PathBuf, String> {
    let mut out = PathBuf::new();
    for c in Path::new(path).components() {
        match c {
            Component::Normal(n) => out.push(n),
            Component::RootDir | Component::CurDir => {}
            _ => return Err("'..' is not allowed here".into()),
        }
    }
    if out.as_os_str().is_empty() {
        return Err("the whole root is not restored but rolled back: use 'cowfs rollback'".into());
    }
    Ok(out)
}

/// Runs a command in a directory; what it prints when it fails.
fn run_in(dir: &File, input: Stdio, program: &str, args: &[&OsStr]) -> Result<(), String> {
    let out = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .current_dir(by_fd(dir))
        .stdin(input)
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let from = said.len().saturating_sub(TAIL);
    let from = (from..=said.len())
        .find(|i| said.is_char_boundary(*i))
        .unwrap_or(0);
    Err(said[from..].trim().to_owned())
}

fn dot_slash(name: &OsStr) -> OsString {
    let mut out = OsString::from("./");
    out.push(name);
    out
}

/// The two trees, and the private directory in the second where copies grow.
struct Trees<'a> {
    checkpoint: &'a str,
    from: File,
    to: File,
    mountpoint: &'a Path,
    staging: File,
}

impl Trees<'_> {
    /// Copies one path and puts it into place: whoever looks sees the old or the new one.
    fn restore(&self, path: &str) -> Result<(), String> {
        let path = inside(path)?;
        let below = self.mountpoint.join(&path);
        let mounts = mountinfo::of("self").map_err(|e| e.to_string())?;
        if let Some(m) = mounts.iter().find(|m| m.point.starts_with(&below)) {
            return Err(format!("{} is mounted there", m.point.display()));
        }
        let names: Vec<&OsStr> = path.iter().collect();
        let Some((leaf, parents)) = names.split_last() else {
            return Err("there is no name".into());
        };
        let absent = || format!("it is not in checkpoint {}", self.checkpoint);
        let source_dir = |n: usize| {
            open_dir(&self.from, &parents[..n].iter().collect::<PathBuf>()).map_err(|e| match e {
                Errno::ENOENT | Errno::ENOTDIR => absent(),
                e => in_the_way(e),
            })
        };
        let source = source_dir(parents.len())?;
        match fstatat(&source, *leaf, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => {}
            Err(Errno::ENOENT) => return Err(absent()),
            Err(e) => return Err(e.desc().into()),
        }
        // As far as the directories are there now.
        let mut there = self.to.try_clone().map_err(|e| e.to_string())?;
        let mut have = 0;
        for name in parents {
            match open_dir(&there, Path::new(name)) {
                Ok(d) => there = d,
                Err(Errno::ENOENT) => break,
                Err(e) => return Err(in_the_way(e)),
            }
            have += 1;
        }
        let top = names[have];
        let done = self
            .grow(source, &parents[have..], leaf, |n| source_dir(have + n))
            .and_then(|()| self.place(top, &there));
        // What is left is a copy that came to nothing, or what was there before.
        let rest = dot_slash(top);
        let cleared = run_in(
            &self.staging,
            Stdio::null(),
            "rm",
            &[OsStr::new("-rf"), OsStr::new("--"), &rest],
        );
        done?;
        cleared
            .map_err(|e| format!("it is restored, but what was there before is not all gone: {e}"))
    }

    /// Makes the copy. Directories that are missing are made around it, and come into place with it.
    fn grow(
        &self,
        source: File,
        missing: &[&OsStr],
        leaf: &OsStr,
        like: impl Fn(usize) -> Result<File, String>,
    ) -> Result<(), String> {
        let mut chain: Vec<File> = Vec::new();
        for name in missing {
            let at = chain.last().unwrap_or(&self.staging);
            mkdirat(at, *name, Mode::S_IRWXU).map_err(|e| e.desc())?;
            chain.push(open_dir(at, Path::new(name)).map_err(in_the_way)?);
        }
        self.copy(source, chain.last().unwrap_or(&self.staging), leaf)?;
        // Inner ones first: what is made in a directory changes its times.
        for (i, dir) in chain.iter().enumerate().rev() {
            dress(&like(i + 1)?, dir).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Copies with everything that belongs to it.
    fn copy(&self, source: File, to: &File, leaf: &OsStr) -> Result<(), String> {
        let mut from = OsString::from("/proc/self/fd/0/");
        from.push(leaf);
        let args = [
            OsStr::new("-dRT"),
            // With the attributes named, one that cannot be kept is an error.
            OsStr::new("--preserve=mode,ownership,timestamps,links,xattr"),
            OsStr::new("--sparse=auto"),
            OsStr::new("--reflink=never"),
            OsStr::new("--"),
            &from,
            &dot_slash(leaf),
        ];
        run_in(to, Stdio::from(OwnedFd::from(source)), "cp", &args)
    }

    fn place(&self, name: &OsStr, dir: &File) -> Result<(), String> {
        let put = |flags| renameat2(&self.staging, name, dir, name, flags);
        // Others may make or remove the name between the two.
        for _ in 0..100 {
            match put(RenameFlags::RENAME_NOREPLACE) {
                Err(Errno::EEXIST) => {}
                r => return r.map_err(|e| e.desc().into()),
            }
            match put(RenameFlags::RENAME_EXCHANGE) {
                Err(Errno::ENOENT) => {}
                r => return r.map_err(|e| e.desc().into()),
            }
        }
        Err("the name comes and goes".into())
    }
}

pub(super) fn restore(
    service: &Arc<Service>,
    head: &str,
    checkpoint: &str,
    paths: &[String],
) -> Result<Answer, Failure> {
    let start = Instant::now();
    let mount = service
        .mounted(head)
        .ok_or_else(|| Failure::new(format!("head {head} is not mounted")))?;
    let mountpoint = mount.mountpoint();
    let shown = Shown::new(service, head, checkpoint)?;
    let open = |p: &Path| File::open(p).map_err(|e| failed(&p.display().to_string(), e));
    let (from, to) = (open(&shown.dir())?, open(mountpoint)?);
    let mut name = shown
        .private
        .file_name()
        .map_or_else(Vec::new, |n| n.as_bytes().to_vec());
    name.insert(0, b'.');
    let name = OsStr::from_bytes(&name);
    let staging = make_private(&to, name).map_err(|e| failed("a directory for the copy", e))?;
    let trees = Trees {
        checkpoint,
        from,
        to,
        mountpoint,
        staging,
    };
    let mut wrong = Vec::new();
    for path in paths {
        if let Err(error) = trees.restore(path) {
            let path = path.clone();
            wrong.push(NotRestored { path, error });
        }
    }
    if let Err(e) = unlinkat(&trees.to, name, UnlinkatFlags::RemoveDir) {
        tracing::warn!(error = %e, name = %name.display(), "a directory for copies stays");
    }
    if wrong.len() == paths.len() {
        let all: Vec<String> = wrong
            .iter()
            .map(|w| format!("{}: {}", w.path, w.error))
            .collect();
        return Err(Failure::new(all.join("\n")));
    }
    Ok(Answer::Restored {
        paths: (paths.len() - wrong.len()) as u64,
        failed: wrong,
        elapsed_us: micros(start),
    })
}
