//! How the guest's kernel comes to be. The keeper knows only the trait, so that there can be other ways than booting.

use crate::sys::fd;
use nix::errno::Errno;
use nix::sys::personality::{self, Persona};
use nix::unistd::Pid;
use snapshot::sys::clone::{self, Fork};
use std::ffi::{CString, NulError};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Main's descriptors. It has these numbers and no others, however it comes to be.
#[derive(Debug)]
pub struct MainFds {
    /// 0 and 1: one end of a stream socket pair.
    pub console: OwnedFd,
    /// 2: a file that is appended to.
    pub kernel_log: OwnedFd,
    /// 3: the tap, if the VM has a network.
    pub tap: Option<OwnedFd>,
    /// 4: one end of a stream socket pair.
    pub agent: OwnedFd,
}

impl MainFds {
    /// Descriptors, and the numbers they have in main.
    #[must_use]
    pub fn numbers(&self) -> Vec<(RawFd, RawFd)> {
        let mut all = vec![
            (self.console.as_raw_fd(), 0),
            (self.console.as_raw_fd(), 1),
            (self.kernel_log.as_raw_fd(), 2),
            (self.agent.as_raw_fd(), 4),
        ];
        all.extend(self.tap.iter().map(|t| (t.as_raw_fd(), 3)));
        all
    }
}

/// A way for main to come to be.
///
/// It is called in the keeper: process 1 of the VM's pid namespace, with one thread, in the VM's own mount and network
/// namespaces, with /proc mounted and the private file system at [`crate::vm::cmdline::PRIVATE`]. Main must be a child of the
/// keeper when it returns; the keeper reaps it, and when it ends, ends everything.
pub trait Start {
    /// Descriptors that it needs in the keeper beside main's.
    fn descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Makes main, and returns its number in the keeper's namespace.
    ///
    /// # Errors
    /// A message for the user, if it could not. Whatever was made may be left: the keeper ends, and all with it.
    fn start(&self, fds: MainFds) -> Result<Pid, String>;
}

/// Boots: executes `linux.uml`.
#[derive(Debug)]
pub struct Boot {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Boot {
    /// With the program's arguments, its own name first.
    ///
    /// # Errors
    /// Something contains a zero.
    pub fn new(program: &Path, arguments: &[String]) -> Result<Self, NulError> {
        let text = |s: &String| CString::new(s.as_bytes());
        Ok(Self {
            program: CString::new(program.as_os_str().as_bytes())?,
            arguments: arguments.iter().map(text).collect::<Result<_, _>>()?,
            // Nothing of the caller's environment: with the same environment the stack is at the same addresses.
            environment: [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
                format!("TMPDIR={}", crate::vm::cmdline::PRIVATE),
                "HOME=/".to_owned(),
            ]
            .iter()
            .map(text)
            .collect::<Result<_, _>>()?,
        })
    }

    /// Becomes main. Returns what went wrong.
    fn become_main(&self, fds: &MainFds, report: &OwnedFd) -> (Option<RawFd>, Errno) {
        // Guest memory and all of main's mappings then have the same addresses at every boot, and no gap behind the kernel's
        // image is taken for memory.
        if let Err(e) = personality::set(Persona::ADDR_NO_RANDOMIZE) {
            return (Some(report.as_raw_fd()), e);
        }
        let report = match fd::arrange(&fds.numbers(), Some(report)) {
            Ok(r) => r,
            Err(e) => return (Some(report.as_raw_fd()), e),
        };
        let Err(e) = nix::unistd::execve(&self.program, &self.arguments, &self.environment);
        (report, e)
    }
}

impl Start for Boot {
    fn start(&self, fds: MainFds) -> Result<Pid, String> {
        let (mut read, write) = std::io::pipe().map_err(|e| format!("pipe: {e}"))?;
        let write = OwnedFd::from(write);
        let forked = clone::fork(0, libc::SIGCHLD, None).map_err(|e| format!("fork: {e}"))?;
        let Fork::Parent(pid) = forked else {
            let (report, error) = self.become_main(&fds, &write);
            if let Some(report) = report {
                fd::write_raw(report, &(error as i32).to_le_bytes());
            }
            clone::exit_now(127);
        };
        drop((write, fds));
        // Closed by exec, or told why not.
        let mut error = [0; 4];
        match read.read_exact(&mut error) {
            Err(_) => Ok(Pid::from_raw(pid)),
            Ok(()) => Err(format!(
                "{}: {}",
                self.program.to_string_lossy(),
                Errno::from_raw(i32::from_le_bytes(error)).desc()
            )),
        }
    }
}
