//! Ways to checkpoint and roll back, one for each peer.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cli::Plan;
use crate::peers::overlay::{mount_kernel, options};
use crate::peers::{
    Btrfs, Cowfs, FsUnderTest, WRITEBACK, make_dir, remove_dir, unmount, unmount_by_force,
};
use crate::run::{command, timed};

/// Figures of one call by the suffix of their row; microseconds.
pub type Figures = Vec<(&'static str, f64)>;

/// Suffix of the figures of whole calls; figures without a suffix are what the daemon says.
pub const CALL: &str = "_call";

/// A way to checkpoint a tree and to go back.
pub trait Snapshots {
    /// Column in the results.
    fn name(&self) -> &'static str;
    /// Makes it, empty.
    fn setup(&mut self) -> Result<()>;
    /// The live tree.
    fn tree(&self) -> PathBuf;
    /// Fixes the present state under a name.
    fn checkpoint(&mut self, name: &str) -> Result<Figures>;
    /// Goes back to it.
    fn rollback(&mut self, name: &str) -> Result<Figures>;
    /// Is the live tree kept while processes are inside?
    fn live(&self) -> bool {
        false
    }
    /// Repetitions in one round: those that take microseconds need more samples.
    fn repeats(&self) -> u64 {
        1
    }
    /// What starting the command alone takes, microseconds.
    fn spawn_us(&self) -> Option<f64> {
        None
    }
    /// Memory of the daemon, bytes.
    fn rss(&self) -> Option<f64> {
        None
    }
    /// A checkpoint without starting a command, if there is a daemon to ask; microseconds.
    fn checkpoint_by_socket(&mut self, _name: &str) -> Option<Result<f64>> {
        None
    }
    /// Mounting after a clean end and after a crash, if that is to be measured; microseconds.
    fn mount_times(&mut self) -> Option<Result<(f64, f64)>> {
        None
    }
    /// Daemons.
    fn pids(&self) -> Vec<i32> {
        Vec::new()
    }
}

fn us(d: Duration) -> f64 {
    d.as_secs_f64() * 1e6
}

impl Snapshots for Cowfs {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn setup(&mut self) -> Result<()> {
        FsUnderTest::setup(self)
    }

    fn tree(&self) -> PathBuf {
        self.root().to_owned()
    }

    fn checkpoint(&mut self, name: &str) -> Result<Figures> {
        let c = self.call("checkpoint", &[name])?;
        Ok(vec![("", c.inside), (CALL, c.outside)])
    }

    fn rollback(&mut self, name: &str) -> Result<Figures> {
        let c = self.call("rollback", &[name])?;
        Ok(vec![("", c.inside), (CALL, c.outside)])
    }

    fn live(&self) -> bool {
        true
    }

    fn repeats(&self) -> u64 {
        4
    }

    fn spawn_us(&self) -> Option<f64> {
        Cowfs::spawn_us(self).ok()
    }

    fn rss(&self) -> Option<f64> {
        Cowfs::rss(self).ok()
    }

    fn checkpoint_by_socket(&mut self, name: &str) -> Option<Result<f64>> {
        Some(Cowfs::checkpoint_by_socket(self, name))
    }

    fn mount_times(&mut self) -> Option<Result<(f64, f64)>> {
        Some(Cowfs::mount_times(self))
    }

    fn pids(&self) -> Vec<i32> {
        Cowfs::pids(self)
    }
}

/// btrfs: a subvolume, mounted by name; snapshots beside it.
pub struct BtrfsSnapshots {
    fs: Btrfs,
    live: PathBuf,
}

impl BtrfsSnapshots {
    /// In this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            fs: Btrfs::new(&dir.join("btrfs")),
            live: dir.join("btrfs-live"),
        }
    }

    fn snapshot(&self, from: &str, to: &str) -> Result<Duration> {
        let mut c = command("btrfs", &["subvolume", "snapshot"]);
        c.arg(self.fs.root().join(from))
            .arg(self.fs.root().join(to));
        timed(c)
    }
}

impl Snapshots for BtrfsSnapshots {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn setup(&mut self) -> Result<()> {
        self.fs.setup()?;
        let mut c = command("btrfs", &["subvolume", "create"]);
        c.arg(self.fs.root().join("live"));
        timed(c)?;
        make_dir(&self.live)?;
        self.fs.mount_at(&self.live, Some("subvol=live"))
    }

    fn tree(&self) -> PathBuf {
        self.live.clone()
    }

    fn checkpoint(&mut self, name: &str) -> Result<Figures> {
        let dirty = us(self.snapshot("live", name)?);
        let clean = us(self.snapshot("live", &format!("{name}.clean"))?);
        Ok(vec![(CALL, dirty), ("_clean_call", clean)])
    }

    fn rollback(&mut self, name: &str) -> Result<Figures> {
        let root = self.fs.root().to_owned();
        let start = Instant::now();
        unmount(&self.live)?;
        std::fs::rename(root.join("live"), root.join(format!("left.{name}")))
            .context("moving the old state away")?;
        self.snapshot(name, "live")?;
        self.fs.mount_at(&self.live, Some("subvol=live"))?;
        let took = us(start.elapsed());
        Ok(vec![(CALL, took)])
    }
}

impl Drop for BtrfsSnapshots {
    fn drop(&mut self) {
        unmount_by_force(&self.live);
        remove_dir(&self.live);
    }
}

/// overlayfs: a checkpoint freezes the upper layer and mounts a new one above it.
pub struct OverlaySnapshots {
    dir: PathBuf,
    /// Frozen layers, the newest first
    lower: Vec<PathBuf>,
    names: Vec<String>,
    made: usize,
}

impl OverlaySnapshots {
    /// In this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.join("overlay-layers"),
            lower: Vec::new(),
            names: Vec::new(),
            made: 0,
        }
    }

    fn upper(&self) -> PathBuf {
        self.dir.join(format!("upper{}", self.made))
    }

    fn mount_new(&mut self) -> Result<()> {
        self.made += 1;
        let work = self.dir.join(format!("work{}", self.made));
        make_dir(&self.upper())?;
        make_dir(&work)?;
        mount_kernel(&self.tree(), &options(&self.lower, &self.upper(), &work))
    }
}

impl Snapshots for OverlaySnapshots {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn setup(&mut self) -> Result<()> {
        let base = self.dir.join("base");
        make_dir(&base)?;
        make_dir(&self.tree())?;
        self.lower = vec![base];
        self.mount_new()
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    fn checkpoint(&mut self, name: &str) -> Result<Figures> {
        let start = Instant::now();
        unmount(&self.tree())?;
        self.lower.insert(0, self.upper());
        self.names.insert(0, name.to_owned());
        self.mount_new()?;
        let took = us(start.elapsed());
        Ok(vec![(CALL, took)])
    }

    fn rollback(&mut self, name: &str) -> Result<Figures> {
        let start = Instant::now();
        unmount(&self.tree())?;
        let newer = self
            .names
            .iter()
            .position(|n| n == name)
            .context("no such checkpoint")?;
        self.names.drain(..newer);
        self.lower.drain(..newer);
        self.mount_new()?;
        let took = us(start.elapsed());
        Ok(vec![(CALL, took)])
    }
}

impl Drop for OverlaySnapshots {
    fn drop(&mut self) {
        unmount_by_force(&self.tree());
        remove_dir(&self.dir);
    }
}

/// `cp -a` of the whole tree; going back exchanges the copy with the tree by two renames, after copying it again.
pub struct Copies {
    dir: PathBuf,
}

impl Copies {
    /// In this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.join("copies"),
        }
    }

    fn copy(&self, from: &str, to: &str) -> Result<()> {
        let mut c = command("cp", &["-a", "--"]);
        c.arg(self.dir.join(from)).arg(self.dir.join(to));
        timed(c).map(|_| ())
    }
}

impl Snapshots for Copies {
    fn name(&self) -> &'static str {
        "native"
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.tree())
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("live")
    }

    fn checkpoint(&mut self, name: &str) -> Result<Figures> {
        remove_dir(&self.dir.join("saved"));
        let start = Instant::now();
        self.copy("live", name)?;
        let took = us(start.elapsed());
        // One copy is enough for the next rollback.
        std::fs::rename(self.dir.join(name), self.dir.join("saved")).context("keeping the copy")?;
        Ok(vec![(CALL, took)])
    }

    fn rollback(&mut self, _name: &str) -> Result<Figures> {
        let start = Instant::now();
        self.copy("saved", "next")?;
        std::fs::rename(self.tree(), self.dir.join("left")).context("moving the old state away")?;
        std::fs::rename(self.dir.join("next"), self.tree()).context("moving the copy in")?;
        let took = us(start.elapsed());
        remove_dir(&self.dir.join("left"));
        Ok(vec![(CALL, took)])
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        remove_dir(&self.dir);
    }
}

/// Those that the plan wants at this number of files. Slow ones stop early.
pub fn all(plan: &Plan, files: u64, dir: &Path) -> Result<Vec<Box<dyn Snapshots>>> {
    let mut all: Vec<Box<dyn Snapshots>> = Vec::new();
    for system in &plan.systems {
        match system.as_str() {
            "cowfs" => all.push(Box::new(Cowfs::new(plan, &dir.join("cowfs"))?)),
            WRITEBACK => all.push(Box::new(Cowfs::with_writeback(plan, &dir.join(WRITEBACK))?)),
            "btrfs" => all.push(Box::new(BtrfsSnapshots::new(dir))),
            "overlay" if files <= 100_000 => all.push(Box::new(OverlaySnapshots::new(dir))),
            "native" if files <= if plan.quick { 1000 } else { 10_000 } => {
                all.push(Box::new(Copies::new(dir)))
            }
            _ => {}
        }
    }
    Ok(all)
}
