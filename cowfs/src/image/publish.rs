//! New files appear whole or not at all: written beside the target, synced, renamed.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::copy::At;
use super::error::{ImageError, Result};
use super::lock;
use super::open::regular;
use crate::fault;

/// End of the names of files that are not whole yet.
pub(super) const PARTIAL: &str = ".cowfs-partial";

/// A file that is not there yet. Dropped without [`Fresh::publish`] it is taken away.
#[derive(Debug)]
pub(super) struct Fresh {
    file: File,
    partial: PathBuf,
    target: PathBuf,
    force: bool,
    done: bool,
}

/// A path without symbolic links in its directory, as uml_mkcow and the guest kernel make it.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    let failed = ImageError::io(path, "finding its directory");
    let name = path
        .file_name()
        .ok_or_else(|| failed(io::Error::from(io::ErrorKind::InvalidInput)))?;
    let dir = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    Ok(dir.canonicalize().map_err(&failed)?.join(name))
}

impl Fresh {
    /// Begins a file.
    ///
    /// # Errors
    /// When something has the name already, and `force` is not set or a guest uses it.
    pub fn new(target: &Path, force: bool) -> Result<Self> {
        let full = absolute(target)?;
        if full.symlink_metadata().is_ok() {
            if !force {
                return Err(ImageError::Exists(target.to_owned()));
            }
            let old = regular(&full, false)?;
            if let Some(u) = lock::in_use(&full, &old)? {
                return Err(ImageError::InUse {
                    path: target.to_owned(),
                    by: u.to_string(),
                });
            }
        }
        Self::begin(full, force)
    }

    /// Begins a file that takes the place of one that the caller has locked.
    pub fn replacing(target: &Path) -> Result<Self> {
        Self::begin(absolute(target)?, true)
    }

    fn begin(full: PathBuf, force: bool) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = full.file_name().unwrap_or_default().to_string_lossy();
        // Cut, so that the longest names have room for the rest.
        let name: String = name.chars().take(40).collect();
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let partial = full.with_file_name(format!(".{name}.{}-{n}{PARTIAL}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&partial)
            .map_err(ImageError::io(&full, "making it"))?;
        Ok(Self {
            file,
            partial,
            target: full,
            force,
            done: false,
        })
    }

    /// The file to write to.
    pub fn at(&self) -> At<'_> {
        At {
            path: &self.partial,
            file: &self.file,
        }
    }

    /// Sets the size of what is still empty.
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.file
            .set_len(len)
            .map_err(ImageError::io(&self.target, "setting its size"))
    }

    /// Gives it mode and owner of another file; the owner only if the caller may.
    pub fn like(&self, meta: &Metadata) -> Result<()> {
        match std::os::unix::fs::fchown(&self.file, Some(meta.uid()), Some(meta.gid())) {
            // EINVAL is of an owner that this user namespace does not know.
            Err(e) if !matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => {
                return Err(ImageError::io(&self.target, "setting its owner")(e));
            }
            _ => {}
        }
        self.mode(meta.mode() & 0o777)
    }

    /// Sets the mode.
    pub fn mode(&self, mode: u32) -> Result<()> {
        self.file
            .set_permissions(Permissions::from_mode(mode))
            .map_err(ImageError::io(&self.target, "setting its mode"))
    }

    /// Puts the file in its place; with `sync` it and its name are on disk then.
    pub fn publish(mut self, sync: bool) -> Result<()> {
        fault::point("image:written");
        if sync {
            self.file
                .sync_all()
                .map_err(ImageError::io(&self.target, "syncing"))?;
        }
        fault::point("image:synced");
        self.rename()?;
        self.done = true;
        fault::point("image:renamed");
        if sync {
            let dir = self.target.parent().unwrap_or(Path::new("/"));
            File::open(dir)
                .and_then(|d| d.sync_all())
                .map_err(ImageError::io(dir, "syncing"))?;
        }
        Ok(())
    }

    fn rename(&self) -> Result<()> {
        let failed = ImageError::io(&self.target, "renaming");
        if self.force {
            return std::fs::rename(&self.partial, &self.target).map_err(failed);
        }
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(AT_FDCWD, &self.partial, AT_FDCWD, &self.target, flags) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) => Err(ImageError::Exists(self.target.clone())),
            // A filesystem without that flag has links that do not replace either.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                match std::fs::hard_link(&self.partial, &self.target) {
                    Ok(()) => std::fs::remove_file(&self.partial).map_err(failed),
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        Err(ImageError::Exists(self.target.clone()))
                    }
                    Err(e) => Err(failed(e)),
                }
            }
            Err(e) => Err(failed(e.into())),
        }
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Refuses to write a file from itself.
pub(super) fn not_same(source: &File, target: &Path) -> Result<()> {
    if let (Ok(a), Ok(b)) = (source.metadata(), target.metadata())
        && (a.dev(), a.ino()) == (b.dev(), b.ino())
    {
        return Err(ImageError::Same(target.to_owned()));
    }
    Ok(())
}

/// A file without a name, for tests.
#[cfg(test)]
pub(super) fn unnamed(dir: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(dir)
}
