//! The command line's definition: help, man pages and completions come from here.

pub use super::vm::args as vm;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Runs User Mode Linux VMs; snapshots running processes with a pause of a fraction of a millisecond, and resumes them.
#[derive(Debug, Parser)]
#[command(
    name = "umlctl",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub struct Cli {
    /// One line of JSON on stdout; errors as JSON on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Save a running VM under a name, or a running process (or a tree of them) in a directory
    #[command(
        override_usage = "umlctl snapshot NAME SNAP [OPTIONS]\n       umlctl snapshot --pid PID DIR [OPTIONS]"
    )]
    Snapshot(Snapshot),
    /// Make a running VM, or running processes, of a snapshot
    Resume(Resume),
    /// Snapshot and resume in one: twins of a running VM or process
    #[command(
        override_usage = "umlctl fork NAME [NEW]... [--count N]\n       umlctl fork --pid PID [--count N] [--tree]"
    )]
    Fork(Fork),
    /// Show the snapshots of VMs
    Snapshots {
        /// Without the line of headings
        #[arg(long)]
        no_headers: bool,
    },
    /// Remove snapshots of VMs. VMs that were made of them go on
    RmSnapshot {
        /// Their names, in full
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Show what is in a snapshot
    Inspect(Inspect),
    /// Read a whole snapshot and check every sum
    Verify(Verify),
    /// Compress a snapshot that will not be needed soon; using it again unpacks it
    Pack(Pack),
    /// Start a VM: a new one of an image, or one that has ended
    Run(vm::Run),
    /// Show the VMs
    #[command(visible_alias = "ls")]
    List(vm::List),
    /// Show what a VM is and how it is
    Info(vm::One),
    /// Show what a VM's console has shown
    Logs(vm::Logs),
    /// Run a program in a VM, with the standard input and output of this one
    Exec(vm::Exec),
    /// Attach to a VM's console; Ctrl-] leaves it
    Console(vm::One),
    /// Copy a file or directory into a VM or out of it
    Cp(vm::Cp),
    /// Power a VM off; kill it if that takes too long
    Stop(vm::Stop),
    /// End a VM at once
    Kill(vm::One),
    /// Remove a VM and its disk
    Rm(vm::Rm),
    /// The process behind a VM
    #[command(hide = true)]
    Supervise(vm::Supervise),
    /// The process that holds connections
    #[command(hide = true)]
    Hold(Hold),
    /// Put processes right that a killed umlctl has left in the middle of a snapshot
    Rescue(Rescue),
    /// Say what this machine has of what is needed, and what is lost without it
    Doctor,
    /// Print completions for a shell
    Completions {
        /// Which one
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    Man {
        /// Which one
        dir: PathBuf,
    },
}

/// `umlctl snapshot`
#[derive(Debug, Args)]
pub struct Snapshot {
    /// The process
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// The VM; with --pid the directory to make
    #[arg(value_name = "NAME|DIR")]
    pub first: String,
    /// The snapshot of the VM
    #[arg(
        value_name = "SNAP",
        required_unless_present = "pid",
        conflicts_with = "pid"
    )]
    pub second: Option<String>,
    /// With all its descendants
    #[arg(long, requires = "pid")]
    pub tree: bool,
    /// Return when everything is on disk; without it, when the point in time is fixed (of processes: when it is in the
    /// page cache)
    #[arg(long)]
    pub wait: bool,
    /// Leave the processes stopped (SIGCONT lets them go on)
    #[arg(long, conflicts_with = "kill", requires = "pid")]
    pub leave_stopped: bool,
    /// End the VM or the processes at the point in time; nothing of them runs after it
    #[arg(long)]
    pub kill: bool,
    /// Save only what has changed since that snapshot
    #[arg(long, value_name = "PARENT-DIR", requires = "pid")]
    pub since: Option<PathBuf>,
    /// Stop, copy, and let go, instead of copying while it runs: slower for it, and without a userfaultfd
    #[arg(long)]
    pub stop_and_copy: bool,
    /// A descriptor to the outside (a pipe, socket or terminal) that the resuming command will provide under the same
    /// number; 0, 1 and 2 always are
    #[arg(long, value_name = "FD", requires = "pid")]
    pub external: Vec<i32>,
    /// Streams to processes outside the tree are closed in the snapshot, instead of being refused
    #[arg(long, requires = "pid")]
    pub close_outside: bool,
    /// Show what it has cost
    #[arg(long)]
    pub print_stats: bool,
}

/// `umlctl resume`
#[derive(Debug, Args)]
pub struct Resume {
    /// The snapshot: of a VM by its name, of processes by its directory
    #[arg(value_name = "SNAP|DIR")]
    pub dir: PathBuf,
    /// The VM's name; that of the VM that the snapshot was taken of, if there is none
    #[arg(long, value_name = "NEW")]
    pub name: Option<String>,
    /// Return once it runs; without this, wait for processes and end as they end. A VM always runs on
    #[arg(long)]
    pub detach: bool,
    /// How many copies
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Fill all memory before the first instruction; so it is done anyway if a process has several threads
    #[arg(long)]
    pub eager: bool,
    /// Fill memory as it is touched even if there are several threads. Wrong memory is possible if they unmap and move
    /// memory at the same time, in the first moments
    #[arg(long, conflicts_with = "eager")]
    pub lazy: bool,
    /// Read and check every page first, even if this snapshot was checked before
    #[arg(long)]
    pub verify: bool,
}

/// `umlctl fork`
#[derive(Debug, Args)]
pub struct Fork {
    /// The process
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// The VM, and the names of its twins; without those they are called NAME-1, NAME-2, ...
    #[arg(
        value_name = "NAME",
        required_unless_present = "pid",
        conflicts_with = "pid"
    )]
    pub names: Vec<String>,
    /// How many twins
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: Option<u32>,
    /// With all its descendants
    #[arg(long, requires = "pid")]
    pub tree: bool,
}

/// `umlctl inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// The snapshot: of a VM by its name, of processes by its directory
    #[arg(value_name = "SNAP|DIR")]
    pub dir: PathBuf,
}

/// `umlctl verify`
#[derive(Debug, Args)]
pub struct Verify {
    /// The snapshot: of a VM by its name, of processes by its directory
    #[arg(value_name = "SNAP|DIR")]
    pub dir: PathBuf,
}

/// `umlctl pack`
#[derive(Debug, Args)]
pub struct Pack {
    /// The snapshot
    pub dir: PathBuf,
    /// zstd level
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub level: i32,
}

/// `umlctl rescue`
#[derive(Debug, Args)]
pub struct Rescue {
    /// Only this process; all that need it otherwise
    #[arg(long)]
    pub pid: Option<i32>,
    /// Wait for the end of this process first (how a snapshot starts its guardian)
    #[arg(long, hide = true, value_name = "PID")]
    pub watch: Option<i32>,
    /// The journals to watch
    #[arg(hide = true, requires = "watch")]
    pub journals: Vec<PathBuf>,
}

/// `umlctl hold`, which is not for people.
#[derive(Debug, clap::Args)]
pub struct Hold {
    /// The snapshot's directory
    pub dir: PathBuf,
    /// The sockets
    #[arg(long, value_delimiter = ',')]
    pub sockets: Vec<i32>,
    /// Where it is said that they are held
    #[arg(long)]
    pub report_fd: i32,
}
