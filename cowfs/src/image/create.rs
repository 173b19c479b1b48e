//! A new COW file on a base: what uml_mkcow makes, and the guest kernel when it is given a name that is not there.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::error::{ImageError, Result};
use super::header::{Header, SECTOR, is_cow};
use super::open::{beginning, regular};
use super::publish::{Fresh, absolute, not_same};

/// Makes a COW file on a base. Nothing of the base is read but its beginning.
///
/// # Errors
/// When there is something of that name, or the base is none.
pub fn create(cow: &Path, base: &Path) -> Result<Header> {
    create_with(cow, base, false)
}

/// As [`create`]; with `force` it takes the place of what has that name, if no guest uses it.
///
/// # Errors
/// As of [`create`].
pub fn create_with(cow: &Path, base: &Path, force: bool) -> Result<Header> {
    let header = header_for(base)?;
    not_same(&regular(base, false)?, cow)?;
    let fresh = Fresh::new(cow, force)?;
    let to = fresh.at();
    to.file
        .write_all_at(&header.encode(), 0)
        .map_err(ImageError::io(cow, "writing"))?;
    fresh.set_len(header.layout().len)?;
    fresh.publish(true)?;
    Ok(header)
}

/// The header of a COW file on this base.
pub(super) fn header_for(base: &Path) -> Result<Header> {
    let file = regular(base, false)?;
    if is_cow(&beginning(base, &file)?) {
        return Err(ImageError::IsCow(base.to_owned()));
    }
    let meta = file.metadata().map_err(ImageError::io(base, "stat"))?;
    if meta.len() % SECTOR != 0 {
        return Err(ImageError::OddSize {
            path: base.to_owned(),
            size: meta.len(),
        });
    }
    Header::new(&absolute(base)?, meta.len(), meta.mtime())
}
