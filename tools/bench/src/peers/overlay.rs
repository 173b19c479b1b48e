//! Overlay filesystems with everything in the upper layer: the kernel's, and fuse-overlayfs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::{FsUnderTest, make_dir, remove_dir, unmount, unmount_by_force};
use crate::run::{command, detached};

/// An overlay filesystem.
#[derive(Debug)]
pub struct Overlay {
    dir: PathBuf,
    root: PathBuf,
    fuse: bool,
}

impl Overlay {
    /// The kernel's.
    pub fn kernel(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            root: dir.join("mnt"),
            fuse: false,
        }
    }

    /// fuse-overlayfs.
    pub fn fuse(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            root: dir.join("mnt"),
            fuse: true,
        }
    }

    fn mount(&self) -> Result<()> {
        let at = |n| self.dir.join(n);
        let options = options(&[at("lower")], &at("upper"), &at("work"));
        if self.fuse {
            let mut c = command("fuse-overlayfs", &["-o", &options]);
            c.arg(&self.root);
            return detached(c);
        }
        mount_kernel(&self.root, &options)
    }
}

/// Options of an overlay mount; the first of the lower layers is on top.
pub fn options(lower: &[PathBuf], upper: &Path, work: &Path) -> String {
    let lower: Vec<String> = lower.iter().map(|l| l.display().to_string()).collect();
    format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        upper.display(),
        work.display()
    )
}

/// Mounts the kernel's overlay filesystem.
pub fn mount_kernel(at: &Path, options: &str) -> Result<()> {
    mount(
        Some("overlay"),
        at,
        Some("overlay"),
        MsFlags::empty(),
        Some(options),
    )
    .context("mounting overlay")
}

impl FsUnderTest for Overlay {
    fn name(&self) -> &'static str {
        if self.fuse {
            "fuse-overlayfs"
        } else {
            "overlay"
        }
    }

    fn setup(&mut self) -> Result<()> {
        for n in ["lower", "upper", "work", "mnt"] {
            make_dir(&self.dir.join(n))?;
        }
        self.mount()
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn remount(&mut self) -> Result<()> {
        unmount(&self.root)?;
        self.mount()
    }

    fn teardown(&mut self) {
        unmount_by_force(&self.root);
        remove_dir(&self.dir);
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if self.dir.exists() {
            self.teardown();
        }
    }
}
