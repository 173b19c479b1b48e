//! Reads all that can be wrong with an image.

use std::path::Path;

use super::bitmap;
use super::copy::At;
use super::digest;
use super::error::{ImageError, Result};
use super::header::{SECTOR, is_cow};
use super::merge::pieces;
use super::open::{Cow, beginning, len, regular};

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong; the image should not be used.
    pub problems: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Checks header, bitmap, that the data is there, and the base; a base against the digest that was noted when it was
/// imported. All problems are in the report; those that hide others end it.
///
/// # Errors
/// When the file cannot be read at all.
pub fn verify(path: &Path) -> Result<Report> {
    let file = regular(path, false)?;
    let mut report = Report::default();
    if !is_cow(&beginning(path, &file)?) {
        base(path, &mut report)?;
        return Ok(report);
    }
    let cow = match Cow::of(path, file) {
        Ok(c) => c,
        Err(e) => {
            report.problems.push(e.in_full());
            return Ok(report);
        }
    };
    let stray = bitmap::runs(cow.at(), cow.layout(), &mut |_| Ok(()))?;
    if stray > 0 {
        report.problems.push(format!(
            "{}: {stray} bits of the bitmap are set behind the last sector; the file is damaged: restore it from a copy",
            path.display()
        ));
    }
    match pieces(&cow, &mut |_, _| Ok(())) {
        Err(e @ ImageError::Truncated { .. }) => report.problems.push(e.in_full()),
        r => r?,
    }
    match cow.base() {
        Ok(_) => base(&cow.header().base, &mut report)?,
        Err(e) => report.problems.push(e.in_full()),
    }
    Ok(report)
}

fn base(path: &Path, report: &mut Report) -> Result<()> {
    let file = regular(path, false)?;
    let size = len(path, &file)?;
    if size % SECTOR != 0 {
        let e = ImageError::OddSize {
            path: path.to_owned(),
            size,
        };
        report.problems.push(e.in_full());
    }
    match digest::noted(path)? {
        None => report.notes.push(format!(
            "{}: no digest was noted, so only size and time could be compared",
            path.display()
        )),
        Some(was) => {
            let is = digest::of(At { path, file: &file })?;
            if was != is {
                report.problems.push(format!(
                    "{}: its contents are not those of its digest {}; restore it, or import it anew",
                    path.display(),
                    digest::digest_path(path).display()
                ));
            }
        }
    }
    Ok(())
}
