//! Commands about history, and their options.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::store::packs::PackOptions;

/// Commands about history.
#[derive(Debug, Subcommand)]
pub enum History {
    /// Pack what old checkpoints hold: compressed, and shared between them; it stays readable as before
    Pack(PackArgs),
    /// Delete checkpoints by rules that say which to keep (of each head; times are UTC)
    Prune(PruneArgs),
    /// Send a checkpoint, whole or as the difference to one that the other side has
    Send(SendArgs),
    /// Receive a checkpoint that was sent; it is there only when it is whole
    Receive(ReceiveArgs),
}

/// Options of `pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// Store or mount point
    pub target: PathBuf,
    /// Pack everything that this checkpoint holds, also what heads share with it; may be repeated. Without it: what only
    /// checkpoints hold; what heads share gets sums
    #[arg(long, value_name = "CHECKPOINT")]
    pub checkpoint: Vec<String>,
    /// Level of compression
    #[arg(long, default_value_t = PackOptions::LEVEL, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub level: i32,
}

/// Options of `prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Store or mount point
    pub target: PathBuf,
    /// Keep the last so many
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_last: u32,
    /// Keep the last of each of so many days that have one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_daily: u32,
    /// Keep the last of each of so many weeks that have one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep_weekly: u32,
    /// Keep all that are younger, as 36h, 7d or 1w3d
    #[arg(long, value_name = "T", value_parser = crate::history::prune::duration)]
    pub keep_within: Option<i64>,
    /// Keep all that have this tag, K or K=V; may be repeated
    #[arg(long, value_name = "K")]
    pub keep_tag: Vec<String>,
    /// Only say what would be deleted
    #[arg(long)]
    pub dry_run: bool,
}

/// Options of `send`.
#[derive(Debug, Args)]
pub struct SendArgs {
    /// Store or mount point
    pub target: PathBuf,
    /// Checkpoint
    pub checkpoint: String,
    /// Send only the difference to this checkpoint, which the other side must have
    #[arg(long, value_name = "BASE")]
    pub from: Option<String>,
    /// Where to: a file, - (standard output), file:///DIRECTORY or s3://BUCKET/PREFIX
    #[arg(long, value_name = "FILE|-|URL", default_value = "-")]
    pub to: String,
    /// Go on where a receive was cut off, by the token that it has printed
    #[arg(long, value_name = "TOKEN")]
    pub resume: Option<String>,
    /// Level of compression
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub level: i32,
}

/// Options of `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Store or mount point
    pub target: PathBuf,
    /// Where from: a file, - (standard input), file:///DIRECTORY or s3://BUCKET/PREFIX
    #[arg(long, value_name = "FILE|-|URL", default_value = "-")]
    pub from: String,
    /// Which checkpoint, where there are several (file:// and s3://); the last one sent if there is no name
    #[arg(long, value_name = "CHECKPOINT")]
    pub checkpoint: Option<String>,
    /// Name that it gets here, instead of its own
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}
