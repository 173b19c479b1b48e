//! Checks a whole store: pages, trees, files, and the places they refer to.

use rustc_hash::FxHashMap;

use super::error::StoreError;
use super::segments::file_name;
use super::{ReadTxn, Store};
use crate::fs;
use crate::tree::{self, PageId};

/// What a check found.
#[derive(Debug, Default, Clone)]
pub struct CheckReport {
    /// Heads and checkpoints checked.
    pub trees: u64,
    /// Tree pages read (once for each tree that has them).
    pub pages: u64,
    /// Inodes, likewise.
    pub inodes: u64,
    /// Problems, naming head or checkpoint and inode (the first hundred of each tree).
    pub problems: Vec<String>,
}

impl Store {
    /// Checks every head and checkpoint. `progress` is told trees done and trees in all.
    ///
    /// # Errors
    /// When the store has stopped; damage is reported, not an error.
    pub fn check(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<CheckReport, StoreError> {
        let catalog = self.catalog()?;
        let mut report = CheckReport::default();
        let mut trees: Vec<(String, PageId, u64)> = Vec::new();
        for (name, h) in &catalog.heads {
            trees.push((format!("head {name}"), h.root, h.next_ino));
        }
        for c in catalog.checkpoints.values() {
            trees.push((format!("checkpoint {}", c.name), c.root, c.next_ino));
        }
        let hidden = catalog.hidden.iter();
        for (name, h) in hidden {
            let verified = tree::verify(&mut self.quiet(), h.root);
            match verified {
                Ok(stats) => report.pages += stats.pages,
                Err(e) => report.problems.push(format!("hidden tree {name}: {e}")),
            }
        }
        let mut lens: FxHashMap<u32, Option<u64>> = FxHashMap::default();
        let all = trees.len() as u64;
        for (i, (name, root, next_ino)) in trees.iter().enumerate() {
            progress(i as u64, all);
            report.trees += 1;
            let verified = {
                let mut core = self.core()?;
                tree::verify(&mut core.pages, *root)
            };
            match verified {
                Ok(stats) => report.pages += stats.pages,
                Err(e) => {
                    report.problems.push(format!("{name}: {e}"));
                    continue;
                }
            }
            let mut in_store = |e: &fs::Extent| {
                let len = *lens.entry(e.seg).or_insert_with(|| self.segment_len(e.seg));
                self.has_bytes_of(e, len)
            };
            let mut read: ReadTxn<'_> = self.read(*root)?;
            match fs::check::check(&mut read, *next_ino, &mut in_store) {
                Ok(r) => {
                    report.inodes += r.inodes;
                    report
                        .problems
                        .extend(r.problems.iter().map(|p| format!("{name}: {p}")));
                }
                Err(e) => report.problems.push(format!("{name}: {e}")),
            }
        }
        progress(all, all);
        Ok(report)
    }

    fn segment_len(&self, segment: u32) -> Option<u64> {
        let file = self.segments.file(segment).ok()?;
        let len = file.len();
        len.map_err(StoreError::io(&file_name(segment), "reading"))
            .ok()
    }

    fn has_bytes_of(&self, e: &fs::Extent, len: Option<u64>) -> bool {
        let (packed, n) = self.packs.run(e.seg, e.off, u64::from(e.len));
        packed && n == u64::from(e.len) || len.is_some_and(|l| e.off + u64::from(e.len) <= l)
    }

    /// True if an extent lies in what is packed, or within its segment's file.
    pub(crate) fn has_bytes(&self, e: &fs::Extent) -> bool {
        self.has_bytes_of(e, self.segment_len(e.seg))
    }
}
