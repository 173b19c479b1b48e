//! The snapshot that a sequel builds on.

use std::path::Path;

use crate::image::index::{Entry, Index};
use crate::image::manifest::{Layer, Manifest};
use crate::image::pages::{PagesReader, sum};
use crate::image::pageset::{BLOCK, PAGE, PageSet};
use crate::image::{Error, verify};

/// The snapshot that a sequel builds on.
#[derive(Debug)]
pub struct Parent {
    index: Index,
    pages: PagesReader,
    layers: Vec<Layer>,
}

impl Parent {
    /// Opens it. The sizes and the sums of the indexes are checked, not the pages: what is compared with them later is
    /// either equal or saved anew.
    pub fn open(dir: &Path, manifest: &Manifest) -> Result<Self, Error> {
        let (index, pages) = verify::open(dir, manifest)?;
        let layers = std::iter::once(Layer {
            path: dir.into(),
            index: manifest.index.clone(),
        })
        .chain(manifest.layers.iter().cloned())
        .collect();
        Ok(Self {
            index,
            pages,
            layers,
        })
    }

    /// What the sequel's manifest must list as its layers.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Which of the pages `set` of a block are byte for byte as in the parent.
    pub(super) fn same(
        &self,
        (space, block): (u32, u64),
        set: &PageSet,
        bytes: &[u8],
        room: &mut [u8],
    ) -> Result<PageSet, Error> {
        let mut same = PageSet::EMPTY;
        for e in self.index.block(space, block) {
            let both = e.pages & *set;
            self.pages.read(e.layer, e.slot, &both, room)?;
            for p in both.runs().flatten() {
                let at = p * PAGE..(p + 1) * PAGE;
                if bytes[at.clone()] == room[at] {
                    same.add(p..p + 1);
                }
            }
        }
        Ok(same)
    }

    /// The sequel's entries for pages that are the parent's.
    pub(super) fn entries(
        &self,
        (space, block): (u32, u64),
        same: &PageSet,
        room: &mut [u8],
        out: &mut Vec<Entry>,
    ) -> Result<(), Error> {
        debug_assert_eq!(room.len() as u64, BLOCK);
        for e in self.index.block(space, block) {
            let pages = e.pages & *same;
            if pages.is_empty() {
                continue;
            }
            let mut entry = Entry {
                layer: e.layer + 1,
                pages,
                ..*e
            };
            if pages != e.pages {
                self.pages.read(e.layer, e.slot, &pages, room)?;
                entry.sum = sum(&pages, room);
            }
            out.push(entry);
        }
        Ok(())
    }
}
