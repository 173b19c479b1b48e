//! A VM's network: an address from a pool, a network namespace, and what stands in it.
//!
//! ```text
//!   host                          | the VM's namespace umlctl-N                       | guest
//!   umlvN  10.84.0.1 -------- veth | host0      stateless NAT       tap0 10.83.0.1 --- | vec0 10.83.0.2
//!   route 10.84.x.y dev umlvN      |   10.84.x.y  <--->  10.83.0.2                     |
//! ```
//!
//! All guests have the same addresses. Nothing in a namespace depends on what has passed through it, so it can be made
//! again under connections that live.

pub mod names;
pub mod netns;
pub mod pool;

use std::path::PathBuf;

/// What can go wrong with the network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a tool is missing
    #[error("cannot run {0}, which the network needs: install the package {1}, or use --net none")]
    NoTool(&'static str, &'static str),
    /// a tool has failed
    #[error("{tool} failed: {message}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// What it said.
        message: String,
    },
    /// all addresses are taken
    #[error("all addresses of the pool are taken: remove VMs that are not needed")]
    Full,
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
}
