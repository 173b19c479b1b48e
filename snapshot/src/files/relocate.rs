//! Open files that are at other paths when they are made again: a machine's own disk and sockets.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Blob, Kind, OpenFile};

/// The paths at which files are opened, and sockets bound.
#[must_use]
pub fn paths(files: &[OpenFile]) -> Vec<PathBuf> {
    files
        .iter()
        .filter_map(|file| match &file.kind {
            Kind::Regular(regular) => Some(regular.path.clone()),
            Kind::Path(reopened) => Some(reopened.path.clone()),
            Kind::Unix(socket) => {
                let name = socket.name.as_ref().filter(|n| n.0.first() != Some(&0))?;
                Some(OsStr::from_bytes(&name.0).into())
            }
            _ => None,
        })
        .collect()
}

/// Gives files other paths, where `to` has one for the old path. A file must be at its new path already, and is then the
/// one that is meant.
pub fn relocate(
    files: &mut [OpenFile],
    to: &dyn Fn(&Path) -> Option<PathBuf>,
) -> std::io::Result<()> {
    for file in files {
        match &mut file.kind {
            Kind::Regular(regular) => {
                if let Some(new) = to(&regular.path) {
                    let stat = std::fs::metadata(&new)?;
                    (regular.dev, regular.ino) = (stat.dev(), stat.ino());
                    regular.size = regular.size.min(stat.len());
                    regular.path = new;
                }
            }
            Kind::Path(reopened) => {
                if let Some(new) = to(&reopened.path) {
                    if reopened.ino.is_some() {
                        reopened.ino = Some(std::fs::metadata(&new)?.ino());
                    }
                    reopened.path = new;
                }
            }
            Kind::Unix(socket) => {
                let old = socket.name.as_ref().filter(|n| n.0.first() != Some(&0));
                let new = old.and_then(|n| to(Path::new(OsStr::from_bytes(&n.0))));
                if let Some(new) = new {
                    socket.name = Some(Blob(new.as_os_str().as_bytes().to_vec()));
                }
            }
            _ => {}
        }
    }
    Ok(())
}
