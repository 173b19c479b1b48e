//! Options, and the plan made of them: what to measure, where, and how much.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use crate::client::Op;
use crate::peers::WRITEBACK;

/// Measures cowfs beside native ext4, kernel overlayfs, fuse-overlayfs and btrfs.
#[derive(Debug, Parser)]
#[command(name = "bench", version, max_term_width = 100)]
pub struct Cli {
    /// Options of a run
    #[command(flatten)]
    pub options: Options,
    /// Nothing for a run
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the process is, if it is not the bench itself.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Snapshots of processes: the paper's Table 1 again, with umlctl
    Table1(crate::table1::Options),
    /// Machines: snapshots, resumes and twins, beside a bare kernel
    Vm(crate::vm::Options),
    /// Ten upgrades of a Debian root, kept by cowfs, btrfs, restic and borg
    History(crate::history::Options),
    /// The program that table1 takes snapshots of
    #[command(hide = true)]
    Target(crate::table1::target::Options),
    /// One timed operation in a fresh process
    #[command(hide = true)]
    Client {
        /// Which
        #[command(subcommand)]
        op: Op,
    },
}

/// Options of a run.
#[derive(Debug, Parser)]
pub struct Options {
    /// Small sizes, few rounds
    #[arg(long)]
    pub quick: bool,
    /// Only rows whose name or group begins so: io, tree, snap, space, seq_read, untar, checkpoint, ...
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    pub only: Vec<String>,
    /// Peers beside native
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "overlay,fuse-overlayfs,btrfs"
    )]
    pub peers: Vec<String>,
    /// Where results.json, results.md and the plots go
    #[arg(long, default_value = "bench-results")]
    pub out: PathBuf,
    /// Work here; this directory's filesystem is the native one (a new directory in /var/tmp)
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The cowfs to measure (the one built beside this program)
    #[arg(long)]
    pub cowfs: Option<PathBuf>,
    /// Peers only
    #[arg(long)]
    pub no_cowfs: bool,
    /// Options for `cowfs mount -o`
    #[arg(long, value_name = "OPTIONS")]
    pub mount_options: Option<String>,
    /// Rounds (3 of the tree, 5 of the rest; 2 with --quick)
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Largest number of files in the checkpoint rows (1000000; 10000 with --quick)
    #[arg(long)]
    pub max_files: Option<u64>,
    /// Only the unpinned half, or only the pinned one
    #[arg(long, value_parser = ["unpinned", "pinned"])]
    pub placement: Option<String>,
}

/// What one run does.
#[derive(Debug)]
pub struct Plan {
    /// Small sizes?
    pub quick: bool,
    /// Prefixes of rows or groups; empty for all
    pub only: Vec<String>,
    /// Filesystems, native first
    pub systems: Vec<String>,
    /// Directory of our own inside the working directory, removed at the end
    pub work: PathBuf,
    /// Where the results go
    pub out: PathBuf,
    /// The cowfs binary, if it is measured
    pub cowfs: Option<PathBuf>,
    /// Options for `cowfs mount -o`
    pub mount_options: Option<String>,
    /// Rounds of the tree rows
    pub tree_rounds: usize,
    /// Rounds of the other rows
    pub rounds: usize,
    /// Size of the file that is read and written, bytes
    pub file_bytes: u64,
    /// Random operations in one sample
    pub random_ops: u64,
    /// Random operations in one sample with cold caches
    pub cold_ops: u64,
    /// Writes with fsync in one sample
    pub fsync_ops: u64,
    /// Files in the source tree, at least
    pub tree_files: usize,
    /// Numbers of files of the checkpoint rows
    pub counts: Vec<u64>,
    /// Placements
    pub placements: Vec<crate::run::Placement>,
}

impl Options {
    /// Checks the options and makes the working directory.
    pub fn plan(&self) -> Result<Plan> {
        let mut systems = vec!["native".to_owned()];
        for p in &self.peers {
            match p.as_str() {
                "" | "ext4" | "native" => {}
                "overlay" | "fuse-overlayfs" | "btrfs" => systems.push(p.clone()),
                _ => bail!("unknown peer {p}: there are ext4, overlay, fuse-overlayfs and btrfs"),
            }
        }
        let cowfs = if self.no_cowfs {
            None
        } else {
            let path = match &self.cowfs {
                Some(p) => p.clone(),
                None => beside_me("cowfs")?,
            };
            let path = path.canonicalize().with_context(|| {
                format!(
                    "{}: build cowfs first, or give --cowfs PATH or --no-cowfs",
                    path.display()
                )
            })?;
            systems.splice(1..1, ["cowfs", WRITEBACK].map(str::to_owned));
            Some(path)
        };
        let parent = self
            .dir
            .clone()
            .unwrap_or_else(|| PathBuf::from("/var/tmp"));
        std::fs::create_dir_all(&parent).with_context(|| format!("making {}", parent.display()))?;
        let work = parent
            .canonicalize()
            .with_context(|| format!("finding {}", parent.display()))?
            .join(format!("cowfs-bench.{}", std::process::id()));
        std::fs::create_dir_all(&self.out)
            .with_context(|| format!("making {}", self.out.display()))?;
        std::fs::create_dir(&work).with_context(|| format!("making {}", work.display()))?;
        let q = self.quick;
        let all: &[u64] = if q {
            &[100, 1_000, 10_000]
        } else {
            &[100, 10_000, 100_000, 1_000_000]
        };
        let max = self.max_files.unwrap_or(u64::MAX);
        Ok(Plan {
            quick: q,
            only: self.only.clone(),
            systems,
            work,
            out: self.out.clone(),
            cowfs,
            mount_options: self.mount_options.clone(),
            tree_rounds: self.rounds.unwrap_or(if q { 2 } else { 3 }),
            rounds: self.rounds.unwrap_or(if q { 2 } else { 5 }),
            file_bytes: if q { 64 << 20 } else { 512 << 20 },
            random_ops: if q { 4_000 } else { 40_000 },
            cold_ops: if q { 500 } else { 3_000 },
            fsync_ops: if q { 100 } else { 500 },
            tree_files: if q { 2_000 } else { 20_500 },
            counts: all.iter().copied().filter(|n| *n <= max).collect(),
            placements: crate::run::Placement::ALL
                .into_iter()
                .filter(|p| self.placement.as_deref().is_none_or(|w| w == p.name()))
                .collect(),
        })
    }
}

impl Plan {
    /// Is a row of a group asked for?
    pub fn wants(&self, group: &str, row: &str) -> bool {
        self.only.is_empty()
            || self
                .only
                .iter()
                .any(|o| o == group || row.starts_with(o.as_str()))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // A mount that could not be taken away must not be deleted through: one filesystem only.
        let status = std::process::Command::new("rm")
            .args(["-rf", "--one-file-system", "--"])
            .arg(&self.work)
            .status();
        if !status.is_ok_and(|s| s.success()) {
            eprintln!("bench: left behind: {}", self.work.display());
        }
    }
}

/// A program in the directory of this one.
pub fn beside_me(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("finding myself")?;
    Ok(me.parent().unwrap_or_else(|| Path::new(".")).join(name))
}
