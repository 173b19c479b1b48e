//! btrfs on a loop file of the host.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::{FsUnderTest, make_dir, remove_dir, unmount, unmount_by_force};
use crate::run::{command, output, timed};

/// Size of the (sparse) loop file, bytes.
const SIZE: u64 = 24 << 30;

/// btrfs.
#[derive(Debug)]
pub struct Btrfs {
    dir: PathBuf,
    root: PathBuf,
    device: Option<String>,
    options: Option<&'static str>,
    mkfs: &'static [&'static str],
}

impl Btrfs {
    /// In this directory, mounted below it.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            root: dir.join("mnt"),
            device: None,
            options: None,
            mkfs: &[],
        }
    }

    /// With options of mkfs and of the mount.
    pub fn with_options(dir: &Path, mkfs: &'static [&'static str], mount: &'static str) -> Self {
        let mut fs = Self::new(dir);
        (fs.mkfs, fs.options) = (mkfs, Some(mount));
        fs
    }

    /// The loop file, which is as large as what is allocated in it.
    pub fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// Mounts the device at a place with options, such as `subvol=NAME`.
    pub fn mount_at(&self, at: &Path, options: Option<&str>) -> Result<()> {
        let device = self.device.as_deref().context("no loop device")?;
        mount(Some(device), at, Some("btrfs"), MsFlags::empty(), options).context("mounting btrfs")
    }
}

impl FsUnderTest for Btrfs {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.root)?;
        let image = self.image();
        let f = std::fs::File::create(&image).context("making the loop file")?;
        f.set_len(SIZE).context("making the loop file")?;
        let mut mkfs = command("mkfs.btrfs", &["-q"]);
        mkfs.args(self.mkfs).arg(&image);
        timed(mkfs)?;
        let mut loop_ = command("losetup", &["--find", "--show"]);
        loop_.arg(&image);
        self.device = Some(output(loop_)?.1.trim().to_owned());
        self.mount_at(&self.root, self.options)
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn remount(&mut self) -> Result<()> {
        unmount(&self.root)?;
        self.mount_at(&self.root, self.options)
    }

    fn teardown(&mut self) {
        unmount_by_force(&self.root);
        if let Some(device) = self.device.take() {
            let _ = command("losetup", &["-d", &device]).status();
        }
        remove_dir(&self.dir);
    }
}

impl Drop for Btrfs {
    fn drop(&mut self) {
        if self.dir.exists() {
            self.teardown();
        }
    }
}
