//! The state root, and the directory and lock of each VM.

use super::config::Config;
use super::name::Name;
use super::state::{Phase, State};
use super::{Error, io};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// No file of JSON is longer.
const MOST: u64 = 16 << 20;

/// The bytes of a file of JSON; of one that is too long, those that do not fit are missing.
pub(crate) fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Where all VMs are.
#[derive(Debug, Clone)]
pub struct Home(PathBuf);

impl Home {
    /// `$UMLCTL_HOME`, or /var/lib/umlctl.
    ///
    /// # Errors
    /// It cannot be made an absolute path.
    pub fn from_env() -> Result<Self, Error> {
        let path = std::env::var_os("UMLCTL_HOME")
            .filter(|v| !v.is_empty())
            .map_or_else(|| PathBuf::from("/var/lib/umlctl"), PathBuf::from);
        let path = std::path::absolute(&path).map_err(io("find", &path))?;
        Ok(Self(path))
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where a VM would be.
    #[must_use]
    pub fn place(&self, name: &Name) -> Vm {
        Vm {
            home: self.0.clone(),
            dir: self.0.join("vms").join(name.as_str()),
            name: name.clone(),
        }
    }

    /// A VM that is there.
    ///
    /// # Errors
    /// It is not.
    pub fn find(&self, name: &Name) -> Result<Vm, Error> {
        let vm = self.place(name);
        match fs::symlink_metadata(&vm.dir) {
            Ok(m) if m.is_dir() => Ok(vm),
            _ => Err(Error::NoVm(name.to_string(), self.0.clone())),
        }
    }

    /// Makes the directory of a new VM, which claims its name, and takes its lock.
    ///
    /// # Errors
    /// The name is taken.
    pub fn create(&self, name: &Name) -> Result<(Vm, Lock), Error> {
        let vm = self.place(name);
        let vms = self.0.join("vms");
        let mut builder = DirBuilder::new();
        builder.mode(0o700).recursive(true);
        builder.create(&vms).map_err(io("make", &vms))?;
        match DirBuilder::new().mode(0o700).create(&vm.dir) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                return Err(Error::Exists(name.to_string()));
            }
            Err(e) => return Err(io("make", &vm.dir)(e)),
        }
        let lock = vm.lock()?;
        Ok((vm, lock))
    }

    /// All VMs, by name.
    ///
    /// # Errors
    /// The state root cannot be read. That there is none is no error.
    pub fn all(&self) -> Result<Vec<Vm>, Error> {
        let vms = self.0.join("vms");
        let dir = match fs::read_dir(&vms) {
            Ok(d) => d,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io("list", &vms)(e)),
        };
        let mut names: Vec<Name> = dir
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        Ok(names.iter().map(|n| self.place(n)).collect())
    }
}

/// The lock of a VM: held as long as something of it may run, or its files are being changed.
///
/// A lock of the open file, not of a process: who inherits the descriptor holds the lock, and it can be looked at without
/// being taken, so that a `list` never comes between two others.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// The open file that carries the lock; a process that inherits it holds the lock, too.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0
    }

    /// The lock on an open file; `None` if another has it.
    ///
    /// # Errors
    /// The file system's.
    pub fn take(file: File) -> std::io::Result<Option<Self>> {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole())) {
            Ok(_) => Ok(Some(Self(file))),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// An exclusive lock on all of a file.
fn whole() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// A VM's directory.
#[derive(Debug, Clone)]
pub struct Vm {
    home: PathBuf,
    dir: PathBuf,
    name: Name,
}

macro_rules! files {
    ($($(#[$doc:meta])* $fn:ident $file:literal)*) => {
        $( $(#[$doc])* #[must_use] pub fn $fn(&self) -> PathBuf { self.dir.join($file) } )*
    };
}

impl Vm {
    files! {
        /// What it was made of.
        config_path "config.json"
        /// How far it is.
        state_path "state.json"
        /// Its lock.
        lock_path "lock"
        /// Where its supervisor listens.
        socket "control.sock"
        /// What came from its console.
        console_log "console.log"
        /// What its kernel said.
        kernel_log "kernel.log"
        /// What its supervisor said.
        supervisor_log "supervisor.log"
        /// Its disk.
        disk "disk.cow"
        /// What its kernel starts with; there only until it has.
        initrd "initrd"
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The state root it is in.
    #[must_use]
    pub fn home(&self) -> Home {
        Home(self.home.clone())
    }

    /// Takes the lock.
    ///
    /// # Errors
    /// [`Error::Running`] if somebody has it.
    pub fn lock(&self) -> Result<Lock, Error> {
        let path = self.lock_path();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))?;
        Lock::take(file)
            .map_err(io("lock", &path))?
            .ok_or_else(|| Error::Running(self.name.to_string()))
    }

    /// Whether somebody has the lock.
    #[must_use]
    pub fn locked(&self) -> bool {
        let Ok(file) = File::options()
            .read(true)
            .write(true)
            .open(self.lock_path())
        else {
            return false;
        };
        let mut lock = whole();
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok()
            && i32::from(lock.l_type) != libc::F_UNLCK
    }

    /// Its configuration.
    ///
    /// # Errors
    /// See [`Config::load`].
    pub fn config(&self) -> Result<Config, Error> {
        Config::load(&self.config_path())
    }

    /// Its state, with the lock taken into account.
    ///
    /// # Errors
    /// See [`State::load`].
    pub fn state(&self) -> Result<State, Error> {
        // In this order: a supervisor writes its last state before it lets go of the lock.
        let held = self.locked();
        let mut state = State::load(&self.state_path())?;
        if !held && state.phase.alive() {
            state.phase = Phase::Lost;
        }
        Ok(state)
    }
}

/// Reads JSON with a version.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path, known: u32) -> Result<T, Error> {
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }
    let bytes = read_limited(path).map_err(io("read", path))?;
    let malformed = |e: serde_json::Error| Error::Malformed {
        path: path.to_owned(),
        why: e.to_string(),
    };
    let Version { version } = serde_json::from_slice(&bytes).map_err(malformed)?;
    if version > known {
        return Err(Error::Newer {
            path: path.to_owned(),
            found: version,
            known,
        });
    }
    serde_json::from_slice(&bytes).map_err(malformed)
}

/// Writes JSON beside the file and renames it.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::Malformed {
        path: path.to_owned(),
        why: e.to_string(),
    })?;
    text.push(b'\n');
    let new = path.with_extension("json.new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .map_err(io("write", &new))?;
    file.write_all(&text).map_err(io("write", &new))?;
    fs::rename(&new, path).map_err(io("write", path))
}
