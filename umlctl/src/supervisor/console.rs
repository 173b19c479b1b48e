//! Our end of the console: everything that comes is logged; it never waits for somebody who looks at it.

use super::queue::{Got, Queue, read};
use super::{Error, system};
use crate::vm::home::Vm;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// A log of this size is put aside as `console.log.1`, and a new one begun.
const LARGEST_LOG: u64 = 16 << 20;

/// A stream socket pair: our end, which never waits, and main's.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    let (ours, mains) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(system("make a socket pair"))?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(system("set up a socket pair"))?;
    Ok((ours, mains))
}

/// Opens a log for appending.
pub fn open_log(path: PathBuf) -> Result<File, Error> {
    File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| Error::Io {
            what: "open",
            path,
            source,
        })
}

/// Our end.
#[derive(Debug)]
pub struct Console {
    end: OwnedFd,
    log: Option<File>,
    path: PathBuf,
    logged: u64,
    open: bool,
    /// What was typed and not taken yet.
    pub input: Queue,
}

impl Console {
    /// Our end, and main's.
    ///
    /// # Errors
    /// The log cannot be opened.
    pub fn new(vm: &Vm) -> Result<(Self, OwnedFd), Error> {
        let (end, mains) = pair()?;
        let path = vm.console_log();
        let log = open_log(path.clone())?;
        let console = Self {
            end,
            logged: log.metadata().map_or(0, |m| m.len()),
            log: Some(log),
            path,
            open: true,
            input: Queue::default(),
        };
        Ok((console, mains))
    }

    /// The descriptor, until main has closed its end.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.then(|| self.end.as_fd())
    }

    /// What has come; it is in the log by then.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        match read(&self.end) {
            Got::Bytes(bytes) => {
                self.write_log(&bytes);
                Some(bytes)
            }
            Got::Nothing => None,
            Got::End => {
                self.open = false;
                None
            }
        }
    }

    /// A full disk must not stop the VM: what cannot be logged is lost from the log.
    fn write_log(&mut self, bytes: &[u8]) {
        if self.logged > LARGEST_LOG {
            let _ = std::fs::rename(&self.path, self.path.with_extension("log.1"));
            self.log = open_log(self.path.clone()).ok();
            self.logged = 0;
        }
        if let Some(log) = &mut self.log {
            let _ = log.write_all(bytes);
            self.logged += bytes.len() as u64;
        }
    }

    /// Gives main what was typed, as far as it takes it.
    pub fn flush(&mut self) {
        if self.input.flush(&self.end).is_err() {
            self.input.clear();
        }
    }
}
