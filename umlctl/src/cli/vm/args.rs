//! The arguments of the verbs for VMs.

use crate::vm::config::Net;
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;

/// `umlctl run`
#[derive(Debug, Args)]
pub struct Run {
    /// The VM's name: letters, digits, '.', '_' and '-'
    pub name: String,
    /// The file system it starts from; it is never changed. Without it a VM that has ended is started again
    #[arg(long)]
    pub image: Option<PathBuf>,
    /// Memory
    #[arg(long, default_value = "128M", requires = "image")]
    pub mem: String,
    /// How it is connected
    #[arg(long, value_enum, default_value_t = Net::Nat, requires = "image")]
    pub net: Net,
    /// Arguments for the kernel, and after a `--` for its init
    #[arg(
        long,
        value_name = "KERNEL-ARGS",
        allow_hyphen_values = true,
        requires = "image"
    )]
    pub append: Vec<String>,
    /// The kernel: a linux.uml. Else $UMLCTL_LINUX, or the one in PATH
    #[arg(long, requires = "image")]
    pub kernel: Option<PathBuf>,
    /// Let the kernel choose its RAID 6 routines, which takes most of a second at every start; without this, btrfs and md
    /// cannot be used with RAID 6
    #[arg(long, requires = "image")]
    pub raid6: bool,
    /// Return when it is up, instead of showing its console
    #[arg(long, short)]
    pub detach: bool,
    /// Do not wait until it is up
    #[arg(long, requires = "detach")]
    pub no_wait: bool,
}

/// Verbs with a name and nothing else.
#[derive(Debug, Args)]
pub struct One {
    /// The VM
    pub name: String,
}

/// `umlctl list`
#[derive(Debug, Args)]
pub struct List {
    /// Without the line of headings
    #[arg(long)]
    pub no_headers: bool,
    /// Columns, in this order
    #[arg(short, long, value_delimiter = ',', value_name = "COLUMN")]
    pub output: Vec<String>,
}

/// `umlctl logs`
#[derive(Debug, Args)]
pub struct Logs {
    /// The VM
    pub name: String,
    /// Go on showing what comes, until it has ended
    #[arg(long, short)]
    pub follow: bool,
    /// Only what its kernel has said
    #[arg(long)]
    pub kernel: bool,
}

/// `umlctl exec`
#[derive(Debug, Args)]
pub struct Exec {
    /// The VM
    pub name: String,
    /// On a terminal of its own in the guest
    #[arg(long, short)]
    pub tty: bool,
    /// More environment
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// `umlctl cp`
#[derive(Debug, Args)]
pub struct Cp {
    /// What: PATH, or NAME:PATH if it is in a VM
    pub from: String,
    /// Where to: PATH, or NAME:PATH. A directory gets it under its own name
    pub to: String,
}

/// `umlctl stop`
#[derive(Debug, Args)]
pub struct Stop {
    /// The VM
    pub name: String,
    /// Seconds until it is killed
    #[arg(long, short, default_value_t = 15, value_name = "SECONDS")]
    pub timeout: u32,
}

/// `umlctl rm`
#[derive(Debug, Args)]
pub struct Rm {
    /// The VMs
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Kill it first if it runs; no error if it is not there
    #[arg(long, short)]
    pub force: bool,
}

/// `umlctl supervise`, which is not for people.
#[derive(Debug, Args)]
pub struct Supervise {
    /// The VM
    pub name: String,
    /// Its lock
    #[arg(long)]
    pub lock_fd: i32,
    /// Where success or failure is written
    #[arg(long)]
    pub report_fd: i32,
    /// The directory of the snapshot that it is made of
    #[arg(long)]
    pub resume: Option<PathBuf>,
}
