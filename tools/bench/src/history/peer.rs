//! What keeps versions: cowfs, and the peers beside it.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use super::Plan;
use super::borg::Borg;
use super::btrfs::Subvolumes;
use super::cowfs::Mounted;
use super::restic::Restic;

/// What `--peers` knows.
pub const PEERS: [&str; 4] = ["btrfs", "restic", "restic-max", "borg"];

/// cowfs, packed as it packs by itself: what only older checkpoints hold.
pub const COWFS: &str = "cowfs";
/// cowfs, with all that its checkpoints hold packed, also what the head shares with them.
pub const COWFS_ALL: &str = "cowfs-all";
/// The directory that the peers without a filesystem of their own read.
pub const NATIVE: &str = "native";

/// A version that was brought back.
#[derive(Debug)]
pub struct Back {
    /// What it took, by the clock of the bench
    pub took: Duration,
    /// The same as the daemon says, where there is one
    pub inside: Option<Duration>,
    /// Where the tree is now
    pub tree: PathBuf,
}

/// Something that keeps versions of a tree. What it made is gone when it is dropped.
pub trait Keeper: Debug {
    /// Column in the results.
    fn name(&self) -> &'static str;
    /// Makes it, empty.
    fn setup(&mut self) -> Result<()>;
    /// Where the present tree is, if it is in the store itself. The others read [`NATIVE`].
    fn live(&self) -> Option<PathBuf> {
        None
    }
    /// Stores the present tree under a name, until it is on disk.
    fn store(&mut self, version: &str) -> Result<Duration>;
    /// What is done later in the background, by name.
    fn tidy(&mut self, _version: &str) -> Result<Vec<(&'static str, Duration)>> {
        Ok(Vec::new())
    }
    /// What it takes on disk, bytes.
    fn bytes(&mut self) -> Result<f64>;
    /// Brings a version back: in the place of the present tree if that is in the store, else to an empty directory.
    fn bring_back(&mut self, version: &str) -> Result<Back>;
    /// Is it worth reading? Not if another one is the same but for how hard it has tried to compress.
    fn reads_differently(&self) -> bool {
        true
    }
    /// Makes its contents readable, freshly mounted; where they are.
    fn open(&mut self, version: &str) -> Result<PathBuf>;
    /// Ends what `open` began.
    fn close(&mut self) -> Result<()>;
}

/// cowfs, twice, and the peers that are asked for, made and empty. Those that cannot be made are told to `miss`.
pub fn make(
    plan: &Plan,
    native: &Path,
    mut miss: impl FnMut(&str, &anyhow::Error),
) -> Result<Vec<Box<dyn Keeper>>> {
    let dir = |name: &str| plan.work.join(name);
    let mut keepers: Vec<Box<dyn Keeper>> = vec![
        Box::new(Mounted::new(&plan.cowfs, &dir(COWFS), false)),
        Box::new(Mounted::new(&plan.cowfs, &dir(COWFS_ALL), true)),
    ];
    for p in &plan.peers {
        keepers.push(match p.as_str() {
            "btrfs" => Box::new(Subvolumes::new(&dir(p))),
            "restic" => Box::new(Restic::new(&dir(p), native, false)),
            "restic-max" => Box::new(Restic::new(&dir(p), native, true)),
            "borg" => Box::new(Borg::new(&dir(p), native)),
            _ => bail!("no such peer: {p}"),
        });
    }
    let mut made = Vec::new();
    for mut k in keepers {
        match k.setup() {
            Ok(()) => made.push(k),
            Err(e) => miss(k.name(), &e),
        }
    }
    Ok(made)
}
