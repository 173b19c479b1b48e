//! Commands and options. `--help`, the manual pages and the completions are made from these.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// A checkpointing filesystem for application roots: upgrade, and take the upgrade back at once.
#[derive(Debug, Parser)]
#[command(name = "cowfs", version, max_term_width = 100)]
pub struct Cli {
    /// Print JSON (durations are microseconds, named ..._us; sizes are bytes)
    #[arg(long, global = true)]
    pub json: bool,
    /// Print how long it took
    #[arg(long, global = true)]
    pub print_stats: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Columns of `list`.
pub const COLUMNS: [&str; 8] = [
    "name", "kind", "head", "parent", "created", "tags", "pinned", "mounted",
];

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a store in a new or empty directory
    Init {
        /// Directory
        store: PathBuf,
    },
    /// Mount a head, or a checkpoint read-only
    Mount {
        /// Store
        store: PathBuf,
        /// Where
        mountpoint: PathBuf,
        /// Head to mount (main)
        #[arg(long)]
        head: Option<String>,
        /// Checkpoint to mount, read-only
        #[arg(long, value_name = "CHECKPOINT")]
        at: Option<String>,
        /// Stay in the foreground
        #[arg(long)]
        foreground: bool,
        /// Mount options: ro, noatime, relatime, strictatime, nosuid, nodev, noexec, threads=N, readahead_kb=N, spin_us=N,
        /// writeback[=MIB] (the kernel keeps up to 256 MiB, or so many, of what is written to open files: small writes cost
        /// little, and a checkpoint has to bring them), pack=AGE (pack in the background what only checkpoints older than
        /// this hold, as 12h or 7d)
        #[arg(short, long, value_delimiter = ',')]
        options: Vec<String>,
    },
    /// The serving process that `mount` starts
    #[command(hide = true)]
    Daemon {
        /// Store
        store: PathBuf,
    },
    /// Unmount
    Unmount {
        /// Mount point
        mountpoint: PathBuf,
        /// Also when programs still use it
        #[arg(long)]
        lazy: bool,
    },
    /// Fix the present state under a name
    Checkpoint {
        /// Mount point (or store, for its head main)
        mountpoint: PathBuf,
        /// Name (made of the time if there is none)
        name: Option<String>,
        /// Tag, K=V; may be repeated
        #[arg(long, value_name = "K=V")]
        tag: Vec<String>,
        /// Return only when it is on disk
        #[arg(long)]
        wait: bool,
    },
    /// Go back to a checkpoint, live; what is left behind stays as a checkpoint of its own
    Rollback {
        /// Mount point (or store, for its head main)
        mountpoint: PathBuf,
        /// Checkpoint: a name, the beginning of one, latest, or @{-N}
        checkpoint: String,
        /// Do not keep what is left behind
        #[arg(long)]
        discard: bool,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Make a second head from a checkpoint, to be mounted beside the first
    Clone {
        /// Store or mount point
        target: PathBuf,
        /// Checkpoint
        checkpoint: String,
        /// Name of the new head
        new_head: String,
    },
    /// List heads and checkpoints
    List {
        /// Store or mount point (the one store that is mounted)
        target: Option<PathBuf>,
        /// Leave the heading out
        #[arg(long)]
        no_headers: bool,
        /// Columns
        #[arg(short, value_delimiter = ',', value_name = "COL,...", value_parser = COLUMNS)]
        output: Vec<String>,
    },
    /// Show what differs between two checkpoints or heads (HEAD is the present state)
    Diff {
        /// Store or mount point
        target: PathBuf,
        /// First
        a: String,
        /// Second
        b: String,
    },
    /// Bring files or directories back from a checkpoint
    Restore {
        /// Mount point
        mountpoint: PathBuf,
        /// Checkpoint
        checkpoint: String,
        /// Paths from the mount's root
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Set (K=V) or remove (K-) tags of a checkpoint
    Tag {
        /// Store or mount point
        target: PathBuf,
        /// Checkpoint
        checkpoint: String,
        /// Tags
        #[arg(required = true, allow_hyphen_values = true)]
        tag: Vec<String>,
    },
    /// Keep a checkpoint from being deleted
    Pin {
        /// Store or mount point
        target: PathBuf,
        /// Checkpoint
        checkpoint: String,
    },
    /// Take a pin away
    Unpin {
        /// Store or mount point
        target: PathBuf,
        /// Checkpoint
        checkpoint: String,
    },
    /// Rename a checkpoint or a head
    Rename {
        /// Store or mount point
        target: PathBuf,
        /// Old name
        from: String,
        /// New name
        to: String,
    },
    /// Delete a checkpoint or a head (its full name); space comes back in the background
    Delete {
        /// Store or mount point
        target: PathBuf,
        /// Name
        name: String,
    },
    /// Commands about history
    #[command(flatten)]
    History(super::history_args::History),
    /// Give back what nothing refers to any more, now
    Gc {
        /// Store or mount point (the one store that is mounted)
        target: Option<PathBuf>,
        /// Wait for the collections that deletions have asked for, and begin none beside them
        #[arg(long)]
        wait: bool,
    },
    /// Check a store that is not mounted
    Check {
        /// Store
        store: PathBuf,
        /// Read all contents and compare them with their sums
        #[arg(long)]
        data: bool,
        /// Put right what can be had from elsewhere in the store, or from where --from says: pages of trees, and with
        /// --data contents; copies of what was damaged are kept in repair/ of the store
        #[arg(long)]
        repair: bool,
        /// Store or URL that may have what is damaged here
        #[arg(long, value_name = "STORE|URL", requires = "repair")]
        from: Option<String>,
    },
    /// Show numbers about a store
    Stats {
        /// Store or mount point (the one store that is mounted)
        target: Option<PathBuf>,
    },
    /// Stop, checkpoint, upgrade, start and check a service; roll back by itself if that fails
    Upgrade(UpgradeArgs),
    /// Base images and COW files of User Mode Linux guests
    #[command(subcommand)]
    Image(super::image::ImageCommand),
    /// Show what cowfs needs of this machine, and what is missing
    Doctor {
        /// A store to look at as well
        store: Option<PathBuf>,
    },
    /// Print completions for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory
    Man {
        /// Directory
        dir: PathBuf,
    },
}

/// Options of `upgrade`.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// Mount point
    pub mountpoint: PathBuf,
    /// Stops the service
    #[arg(long, value_name = "CMD", required_unless_present = "resume")]
    pub stop: Option<String>,
    /// Upgrades it
    #[arg(long, value_name = "CMD", required_unless_present = "resume")]
    pub run: Option<String>,
    /// Starts it
    #[arg(long, value_name = "CMD", required_unless_present = "resume")]
    pub start: Option<String>,
    /// Succeeds when it is healthy
    #[arg(long, value_name = "CMD", required_unless_present = "resume")]
    pub check: Option<String>,
    /// How long it may take to become healthy, seconds
    #[arg(long, value_name = "T", default_value_t = 30)]
    pub check_timeout: u64,
    /// Name of the upgrade and of its checkpoint (made of the time if there is none)
    #[arg(long)]
    pub name: Option<String>,
    /// End an upgrade that was killed half way: roll it back, unless it was found good already
    #[arg(long)]
    pub resume: bool,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}
