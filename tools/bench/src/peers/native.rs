//! A directory of the host's filesystem.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{FsUnderTest, make_dir, remove_dir};

/// The host's filesystem.
#[derive(Debug)]
pub struct Native {
    dir: PathBuf,
}

impl Native {
    /// In this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }
}

impl FsUnderTest for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.dir)
    }

    fn root(&self) -> &Path {
        &self.dir
    }

    /// The host's filesystem cannot be mounted anew: it stays as it is, which makes the comparison strict.
    fn remount(&mut self) -> Result<()> {
        Ok(())
    }

    fn teardown(&mut self) {
        remove_dir(&self.dir);
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if self.dir.exists() {
            self.teardown();
        }
    }
}
