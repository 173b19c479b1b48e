//! restic, with a repository on the native filesystem.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::peer::{Back, Keeper};
use super::tree;
use crate::peers::{make_dir, remove_dir, unmount, unmount_by_force};
use crate::run::{check_interrupted, command, timed};

/// How long a mount may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A repository.
#[derive(Debug)]
pub struct Restic {
    dir: PathBuf,
    native: PathBuf,
    max: bool,
    mounted: Option<Child>,
}

impl Restic {
    /// In a directory of its own, for the tree in `native`.
    pub fn new(dir: &Path, native: &Path, max: bool) -> Self {
        Self {
            dir: dir.to_owned(),
            native: native.to_owned(),
            max,
            mounted: None,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut c = command("restic", &["--quiet", "--compression"]);
        c.arg(if self.max { "max" } else { "auto" })
            .arg("--repo")
            .arg(self.dir.join("repo"))
            .args(args)
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", self.dir.join("cache"));
        c
    }

    /// Where a version's tree is below the directory that it is restored or mounted to.
    fn below(&self, top: &Path) -> PathBuf {
        top.join(self.native.strip_prefix("/").unwrap_or(&self.native))
    }
}

impl Keeper for Restic {
    fn name(&self) -> &'static str {
        if self.max { "restic-max" } else { "restic" }
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.dir)?;
        timed(self.command(&["init"])).map(drop)
    }

    fn store(&mut self, version: &str) -> Result<Duration> {
        let mut c = self.command(&["backup", "--tag", version]);
        c.arg(&self.native);
        timed(c)
    }

    fn bytes(&mut self) -> Result<f64> {
        tree::allocated(&self.dir.join("repo"))
    }

    fn bring_back(&mut self, version: &str) -> Result<Back> {
        let to = self.dir.join("back");
        remove_dir(&to);
        make_dir(&to)?;
        crate::run::settle();
        let mut c = self.command(&["restore", "latest", "--tag", version, "--target"]);
        c.arg(&to);
        let took = timed(c)?;
        Ok(Back {
            took,
            inside: None,
            tree: self.below(&to),
        })
    }

    fn reads_differently(&self) -> bool {
        !self.max
    }

    fn open(&mut self, version: &str) -> Result<PathBuf> {
        let at = self.dir.join("mnt");
        make_dir(&at)?;
        let mut c = self.command(&["mount"]);
        c.arg(&at).stderr(Stdio::null());
        self.mounted = Some(c.spawn().context("starting restic mount")?);
        let tree = self.below(&at.join("tags").join(version).join("latest"));
        let start = Instant::now();
        while !tree.is_dir() {
            check_interrupted()?;
            if start.elapsed() > PATIENCE {
                bail!("restic mount does not show {}", tree.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(tree)
    }

    fn close(&mut self) -> Result<()> {
        if let Some(mut child) = self.mounted.take() {
            let gone = unmount(&self.dir.join("mnt"));
            if gone.is_err() {
                let _ = child.kill();
            }
            let _ = child.wait();
            gone?;
        }
        Ok(())
    }
}

impl Drop for Restic {
    fn drop(&mut self) {
        if self.close().is_err() {
            unmount_by_force(&self.dir.join("mnt"));
        }
        remove_dir(&self.dir);
    }
}
