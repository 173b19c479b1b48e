//! Backing files of backing files. The guest kernel takes only one COW file on one base; longer chains are followed to say
//! what is wrong with them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::{ImageError, Result};
use super::header::{Header, is_cow};
use super::open::{beginning, regular};

/// Backing files followed.
const DEPTH_MAX: usize = 16;

/// A COW file, its backing file, that one's, and so on to the first that is no COW file or is not there.
///
/// # Errors
/// When they form a loop, are too many, or one has a header that cannot be read.
pub fn chain(path: &Path) -> Result<Vec<PathBuf>> {
    let mut out = vec![path.to_owned()];
    let mut seen = Vec::new();
    let mut at = path.to_owned();
    loop {
        let file = match regular(&at, false) {
            Ok(f) => f,
            // Whoever opens it says so.
            Err(_) if out.len() > 1 => return Ok(out),
            Err(e) => return Err(e),
        };
        let meta = file.metadata().map_err(ImageError::io(&at, "stat"))?;
        let id = (meta.dev(), meta.ino());
        if seen.contains(&id) {
            let links: Vec<String> = out.iter().map(|p| p.display().to_string()).collect();
            return Err(ImageError::Loop {
                path: path.to_owned(),
                links: links.join(" -> "),
            });
        }
        seen.push(id);
        let head = beginning(&at, &file)?;
        if !is_cow(&head) {
            return Ok(out);
        }
        if out.len() > DEPTH_MAX {
            return Err(ImageError::TooDeep {
                path: path.to_owned(),
                max: DEPTH_MAX,
            });
        }
        at = Header::parse(&at, &head)?.base;
        out.push(at.clone());
    }
}
