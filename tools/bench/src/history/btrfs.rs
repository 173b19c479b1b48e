//! btrfs with zstd on a loop file: the tree is a subvolume, a version is a read-only snapshot of it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::peer::{Back, Keeper};
use super::tree;
use crate::peers::{Btrfs, FsUnderTest, make_dir};
use crate::run::{command, timed};

/// One copy of the metadata, as the others have: by default there would be two.
const MKFS: &[&str] = &["-m", "single"];
const MOUNT: &str = "compress=zstd:3";

/// Subvolumes of one filesystem.
#[derive(Debug)]
pub struct Subvolumes {
    fs: Btrfs,
}

impl Subvolumes {
    /// In a directory of its own.
    pub fn new(dir: &Path) -> Self {
        Self {
            fs: Btrfs::with_options(dir, MKFS, MOUNT),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.fs.root().join(name)
    }

    fn run(&self, args: &[&str], paths: &[PathBuf]) -> Result<Duration> {
        let mut c = command("btrfs", args);
        c.args(paths);
        timed(c)
    }
}

impl Keeper for Subvolumes {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn setup(&mut self) -> Result<()> {
        self.fs.setup()?;
        make_dir(&self.at("kept"))?;
        self.run(&["subvolume", "create"], &[self.at("live")])
            .map(drop)
    }

    fn live(&self) -> Option<PathBuf> {
        Some(self.at("live"))
    }

    fn store(&mut self, version: &str) -> Result<Duration> {
        let start = Instant::now();
        let to = self.at("kept").join(version);
        self.run(&["subvolume", "snapshot", "-r"], &[self.at("live"), to])?;
        self.run(&["filesystem", "sync"], &[self.fs.root().to_owned()])?;
        Ok(start.elapsed())
    }

    fn bytes(&mut self) -> Result<f64> {
        // The loop file gives back what the filesystem does not use.
        let mut c = command("fstrim", &[self.fs.root()]);
        c.env("LC_ALL", "C");
        timed(c)?;
        tree::allocated(&self.fs.image())
    }

    fn bring_back(&mut self, version: &str) -> Result<Back> {
        let (live, old) = (self.at("live"), self.at("old"));
        let start = Instant::now();
        std::fs::rename(&live, &old).context("setting the present subvolume aside")?;
        self.run(
            &["subvolume", "snapshot"],
            &[self.at("kept").join(version), live.clone()],
        )?;
        let took = start.elapsed();
        self.run(&["subvolume", "delete"], &[old])?;
        Ok(Back {
            took,
            inside: None,
            tree: live,
        })
    }

    fn open(&mut self, version: &str) -> Result<PathBuf> {
        self.fs.remount()?;
        Ok(self.at("kept").join(version))
    }

    fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
