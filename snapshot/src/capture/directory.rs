//! The directory that a snapshot is made in.

use super::Error;
use crate::image::store;
use std::path::{Path, PathBuf};

/// The directory of a snapshot in the making: removed again unless it is kept.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    keep: bool,
}

impl Directory {
    /// Makes it, also where one that was never published was left.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let fail = |e| Error::Directory(path.into(), e);
        match std::fs::create_dir(path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                if path.join(store::NAME).exists() || !is_leftover(path) {
                    return Err(Error::Exists(path.into()));
                }
                std::fs::remove_dir_all(path).map_err(fail)?;
                std::fs::create_dir(path).map_err(fail)?;
            }
            Err(e) => return Err(fail(e)),
        }
        use std::os::unix::fs::PermissionsExt;
        // Memory holds secrets.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(fail)?;
        Ok(Self {
            path: path.into(),
            keep: false,
        })
    }

    /// It stays.
    pub fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Whether a directory holds nothing but what a snapshot that was never published leaves.
fn is_leftover(path: &Path) -> bool {
    let known = ["pages", "index", "manifest.new", "files", "index.new"];
    std::fs::read_dir(path).is_ok_and(|d| {
        d.flatten()
            .all(|e| e.file_name().to_str().is_some_and(|n| known.contains(&n)))
    })
}
