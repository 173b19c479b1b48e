//! A snapshot's directory as a source of pages.

use super::source::{PageSource, Run};
use crate::image::index::Index;
use crate::image::manifest::Manifest;
use crate::image::pages::PagesReader;
use crate::image::{verified, verify};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// An open snapshot.
#[derive(Debug)]
pub struct Snapshot {
    index: Index,
    pages: PagesReader,
}

impl Snapshot {
    /// Opens the pages of the snapshot in `dir`, and checks the index against the manifest.
    pub fn open(dir: &Path, manifest: &Manifest) -> Result<Self, crate::image::Error> {
        let (index, pages) = verify::open(dir, manifest)?;
        Ok(Self { index, pages })
    }

    /// The same, with all pages checked, unless that was done since the machine was started and nothing has changed. With
    /// `again` they are checked in any case.
    pub fn open_verified(
        records: &Path,
        dir: &Path,
        manifest: &Manifest,
        again: bool,
    ) -> Result<Self, crate::image::Error> {
        let (index, pages) = verified::open(records, dir, manifest, again)?;
        Ok(Self { index, pages })
    }
}

impl PageSource for Snapshot {
    fn blocks(&self, space: u32) -> Vec<u64> {
        self.index.blocks(space).collect()
    }

    fn runs(&self, space: u32, block: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = self
            .index
            .runs(space, block)
            .map(|r| Run {
                first: ((r.address % super::source::BLOCK) / super::source::PAGE) as u32,
                count: (r.len / super::source::PAGE) as u32,
                layer: r.layer,
                offset: r.offset,
            })
            .collect();
        // Layers may take turns in a block.
        runs.sort_unstable_by_key(|r| r.first);
        runs
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.pages.files().map(|(_, f)| f.as_fd()).collect()
    }
}
