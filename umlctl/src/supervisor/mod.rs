//! The one process that stands behind a VM: it owns the VM's pid namespace, console, network port and control socket.
//!
//! ```text
//!   supervisor ── fork, new pid and mount namespace ──> keeper (process 1 there) ── start ──> main, the guest's kernel
//!      │                                                   └ dies with the supervisor           └ io threads, user processes
//!      ├─ console, agent channel: socket pairs to main
//!      └─ control.sock: requests of umlctl's verbs
//! ```
//!
//! The supervisor has one thread and one loop. `docs/vm.md` has the life of a VM and what a death at each step leaves.

pub mod agent;
pub mod capture;
pub mod clients;
pub mod console;
pub mod keeper;
pub mod launch;
pub mod mounts;
pub mod queue;
pub mod run;
pub mod start;

use std::path::PathBuf;

/// What can go wrong in a supervisor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the VM's files
    #[error(transparent)]
    Vm(#[from] crate::vm::Error),
    /// the network
    #[error(transparent)]
    Net(#[from] crate::net::Error),
    /// a system call failed
    #[error("cannot {0}")]
    System(&'static str, #[source] std::io::Error),
    /// a file operation failed
    #[error("cannot {what} {path}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// the keeper could not start the guest's kernel
    #[error("the guest's kernel could not be started: {0}")]
    Start(String),
    /// the supervisor was not started as it should be
    #[error("`umlctl supervise` is started by `umlctl run`, not by hand")]
    ByHand,
}

/// For `map_err`: a failed system call.
pub(crate) fn system<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::System(what, e.into())
}
