//! borg, with a repository on the native filesystem.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::peer::{Back, Keeper};
use super::tree;
use crate::peers::{make_dir, pids_with_argument, remove_dir, unmount, unmount_by_force};
use crate::run::{command, detached, timed};

/// A repository.
#[derive(Debug)]
pub struct Borg {
    dir: PathBuf,
    native: PathBuf,
    open: bool,
}

impl Borg {
    /// In a directory of its own, for the tree in `native`.
    pub fn new(dir: &Path, native: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            native: native.to_owned(),
            open: false,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut c = command("borg", args);
        // Its caches and notes go where all of it is removed again.
        c.env("BORG_BASE_DIR", self.dir.join("base"))
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        c
    }

    fn repository(&self) -> PathBuf {
        self.dir.join("repo")
    }

    fn archive(&self, version: &str) -> String {
        format!("{}::{version}", self.repository().display())
    }

    fn mnt(&self) -> PathBuf {
        self.dir.join("mnt")
    }
}

impl Keeper for Borg {
    fn name(&self) -> &'static str {
        "borg"
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.dir.join("base"))?;
        // Without encryption it is faster, and the others but restic have none either.
        let mut c = self.command(&["init", "--encryption", "none"]);
        c.arg(self.repository());
        timed(c).map(drop)
    }

    fn store(&mut self, version: &str) -> Result<Duration> {
        let mut c = self.command(&["create", "--compression", "zstd,3"]);
        let above = self.native.parent().context("the tree's parent")?;
        let name = self.native.file_name().context("the tree's name")?;
        c.arg(self.archive(version)).arg(name).current_dir(above);
        timed(c)
    }

    fn bytes(&mut self) -> Result<f64> {
        tree::allocated(&self.repository())
    }

    fn bring_back(&mut self, version: &str) -> Result<Back> {
        let to = self.dir.join("back");
        remove_dir(&to);
        make_dir(&to)?;
        crate::run::settle();
        let mut c = self.command(&["extract", "--numeric-ids"]);
        c.arg(self.archive(version)).current_dir(&to);
        let took = timed(c)?;
        let name = self.native.file_name().context("the tree's name")?;
        Ok(Back {
            took,
            inside: None,
            tree: to.join(name),
        })
    }

    fn open(&mut self, version: &str) -> Result<PathBuf> {
        make_dir(&self.mnt())?;
        let mut c = self.command(&["mount"]);
        c.arg(self.archive(version)).arg(self.mnt());
        self.open = true;
        detached(c)?;
        let name = self.native.file_name().context("the tree's name")?;
        Ok(self.mnt().join(name))
    }

    fn close(&mut self) -> Result<()> {
        if self.open {
            unmount(&self.mnt())?;
            self.open = false;
            // It still holds its lock for a moment.
            let start = Instant::now();
            while !pids_with_argument(&self.mnt()).is_empty() && start.elapsed().as_secs() < 10 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

impl Drop for Borg {
    fn drop(&mut self) {
        if self.close().is_err() {
            unmount_by_force(&self.mnt());
        }
        remove_dir(&self.dir);
    }
}
