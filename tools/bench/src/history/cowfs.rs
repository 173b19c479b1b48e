//! cowfs: the tree lives on a mount, a version is a checkpoint, and what is old is packed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::peer::{Back, COWFS, COWFS_ALL, Keeper};
use super::tree;
use crate::peers::{Cowfs, FsUnderTest, make_dir, unmount_by_force};

/// A store with its head mounted.
#[derive(Debug)]
pub struct Mounted {
    fs: Cowfs,
    /// Is everything packed that a checkpoint holds, or only what no head holds?
    all: bool,
    /// Where a checkpoint is mounted for reading.
    at: PathBuf,
    open: bool,
}

impl Mounted {
    /// In a directory of its own.
    pub fn new(binary: &Path, dir: &Path, all: bool) -> Self {
        Self {
            fs: Cowfs::of(binary, dir),
            all,
            at: dir.join("at"),
            open: false,
        }
    }
}

impl Keeper for Mounted {
    fn name(&self) -> &'static str {
        if self.all { COWFS_ALL } else { COWFS }
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.at)?;
        self.fs.setup()
    }

    fn live(&self) -> Option<PathBuf> {
        Some(self.fs.root().to_owned())
    }

    fn store(&mut self, version: &str) -> Result<Duration> {
        Ok(self.fs.answer("checkpoint", &[version, "--wait"])?.0)
    }

    fn tidy(&mut self, version: &str) -> Result<Vec<(&'static str, Duration)>> {
        let args: &[&str] = if self.all {
            &["--checkpoint", version]
        } else {
            &[]
        };
        let pack = self.fs.answer("pack", args)?.0;
        let gc = self.fs.answer("gc", &["--wait"])?.0;
        Ok(vec![("pack", pack), ("gc", gc)])
    }

    fn bytes(&mut self) -> Result<f64> {
        tree::allocated(&self.fs.store())
    }

    fn bring_back(&mut self, version: &str) -> Result<Back> {
        let call = self.fs.call("rollback", &[version])?;
        let us = |us: f64| Duration::from_secs_f64(us / 1e6);
        Ok(Back {
            took: us(call.outside),
            inside: Some(us(call.inside)),
            tree: self.fs.root().to_owned(),
        })
    }

    fn open(&mut self, version: &str) -> Result<PathBuf> {
        // A new daemon has nothing unpacked yet.
        self.fs.unmount()?;
        self.fs
            .mount_checkpoint(version, &self.at)
            .context("mounting a checkpoint")?;
        self.open = true;
        Ok(self.at.clone())
    }

    fn close(&mut self) -> Result<()> {
        if self.open {
            self.fs.unmount_last(&self.at)?;
            self.open = false;
            self.fs.mount()?;
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount_by_force(&self.at);
    }
}
