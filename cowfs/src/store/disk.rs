//! The host storage a store lives on, behind one small trait, so that tests can put a simulated disk
//! (which loses or reorders unsynced writes) where the host filesystem is.

use std::fmt::Debug;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};

/// A directory of files that a store keeps its state in. Names may contain one `/`.
pub trait Disk: Send + Sync + Debug {
    /// Opens a file for reading and writing; with `create` it is made when missing.
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes a directory (no error when it is there).
    fn make_dir(&self, name: &str) -> io::Result<()>;
    /// The names in a directory.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// Makes creations and removals in a directory durable (`""` is the store's own).
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
    /// Free and total bytes of the disk, and free and total file nodes.
    fn space(&self) -> io::Result<Space>;
}

/// What [`Disk::space`] tells.
#[derive(Debug, Clone, Copy, Default)]
pub struct Space {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Bytes free to users other than root.
    pub avail_bytes: u64,
}

/// One open file of a [`Disk`].
pub trait DiskFile: Send + Sync + Debug {
    /// Fills `buf` from `off`; what lies past the end reads as zeros.
    fn read_at(&self, buf: &mut [u8], off: u64) -> io::Result<()>;
    /// The host's file, if that is what it is.
    fn host(&self) -> Option<&fs::File> {
        None
    }
    /// Writes all of `buf` at `off`.
    fn write_at(&self, buf: &[u8], off: u64) -> io::Result<()>;
    /// Makes all that was written durable (fdatasync).
    fn sync(&self) -> io::Result<()>;
    /// Starts writing a range to the disk, without waiting; only a hint.
    fn start_writeback(&self, _off: u64, _len: u64) {}
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// True when the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Sets the length.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Gives a range's blocks back; it reads as zeros afterwards.
    fn punch(&self, off: u64, len: u64) -> io::Result<()>;
    /// Reserves blocks for a range, growing the file when needed.
    fn allocate(&self, off: u64, len: u64) -> io::Result<()>;
}

/// A directory of the host's filesystem.
#[derive(Debug, Clone)]
pub struct HostDisk {
    dir: PathBuf,
}

impl HostDisk {
    /// A disk on an existing directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
        }
    }
}

impl Disk for HostDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(self.dir.join(name))?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Arc::new(HostFile { file }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.dir.join(name))
    }

    fn make_dir(&self, name: &str) -> io::Result<()> {
        let mut b = fs::DirBuilder::new();
        b.mode(0o700);
        match b.create(self.dir.join(name)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir.join(dir))? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        fs::File::open(self.dir.join(dir))?.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let s = nix::sys::statvfs::statvfs(&self.dir)?;
        let unit = s.fragment_size();
        Ok(Space {
            total_bytes: s.blocks().saturating_mul(unit),
            free_bytes: s.blocks_free().saturating_mul(unit),
            avail_bytes: s.blocks_available().saturating_mul(unit),
        })
    }
}

#[derive(Debug)]
struct HostFile {
    file: fs::File,
}

/// The host's offsets are signed; ours come from disk and may be anything.
fn signed(v: u64) -> io::Result<i64> {
    i64::try_from(v).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

impl DiskFile for HostFile {
    fn read_at(&self, buf: &mut [u8], off: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], off + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    return Ok(());
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn host(&self) -> Option<&fs::File> {
        Some(&self.file)
    }

    fn write_at(&self, buf: &[u8], off: u64) -> io::Result<()> {
        self.file.write_all_at(buf, off)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn start_writeback(&self, off: u64, len: u64) {
        if let (Ok(off), Ok(len)) = (signed(off), signed(len))
            && let Err(e) = super::sys::start_writeback(&self.file, off, len)
        {
            tracing::debug!(error = %e, "write-back was not started");
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch(&self, off: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self.file.as_fd(), flags, signed(off)?, signed(len)?) {
            // A host without holes keeps the space; nothing else is lost.
            Err(nix::errno::Errno::EOPNOTSUPP) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        match fallocate(
            self.file.as_fd(),
            FallocateFlags::empty(),
            signed(off)?,
            signed(len)?,
        ) {
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                let end = off + len;
                if self.len()? < end {
                    self.set_len(end)?;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
            Ok(()) => Ok(()),
        }
    }
}
