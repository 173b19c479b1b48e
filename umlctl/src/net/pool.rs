//! Who has which number of the pool. The pool is the host's, whatever the state root, so it is kept in /run.

use super::{Error, names};
use crate::vm::config::Config;
use crate::vm::home::Vm;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file for each number that is taken, and a lock.
const DIRECTORY: &str = "/run/umlctl/net";

/// The file of a number: whose it is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    /// The VM's directory.
    dir: PathBuf,
}

/// The pool, locked.
#[derive(Debug)]
pub struct Pool {
    _lock: Flock<File>,
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |source| Error::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

fn file(index: u32) -> PathBuf {
    Path::new(DIRECTORY).join(index.to_string())
}

fn owner(index: u32) -> Option<Owner> {
    serde_json::from_slice(&fs::read(file(index)).ok()?).ok()
}

impl Pool {
    /// Waits for the lock.
    ///
    /// # Errors
    /// The file system's.
    pub fn lock() -> Result<Self, Error> {
        let dir = Path::new(DIRECTORY);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io("make", dir))?;
        let path = dir.join("lock");
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| io("lock", &path)(e.into()))?;
        Ok(Self { _lock: lock })
    }

    /// Takes a number for a VM whose directory is there: the wanted one if it can be had.
    ///
    /// # Errors
    /// All are taken, or the file system's.
    pub fn take(&self, vm: &Vm, wanted: Option<u32>) -> Result<u32, Error> {
        let new = Owner {
            dir: vm.dir().to_owned(),
        };
        let index = wanted
            .into_iter()
            .chain(1..=names::LAST)
            .find(|i| Self::free(*i, &new))
            .ok_or(Error::Full)?;
        let path = file(index);
        let text = serde_json::to_vec(&new).map_err(|e| io("write", &path)(e.into()))?;
        fs::write(&path, text).map_err(io("write", &path))?;
        Ok(index)
    }

    /// A number is free if nobody has it, or its VM is gone or has another one by now. A VM's directory is made before its
    /// number is taken, and its configuration is written after that.
    fn free(index: u32, new: &Owner) -> bool {
        let Some(old) = owner(index) else {
            return true;
        };
        if old == *new || !old.dir.exists() {
            return true;
        }
        Config::load(&old.dir.join("config.json")).is_ok_and(|c| c.net_index != Some(index))
    }

    /// Gives a number back, if it is still this VM's. Says whether it was.
    ///
    /// # Errors
    /// The file system's.
    pub fn give_back(&self, vm: &Vm, index: u32) -> Result<bool, Error> {
        if owner(index).is_none_or(|o| o.dir != vm.dir()) {
            return Ok(false);
        }
        let path = file(index);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", &path)(e)),
            _ => Ok(true),
        }
    }
}
