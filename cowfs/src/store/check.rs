//! Checks a whole store: pages, trees, files, and the places they refer to.

use rustc_hash::FxHashMap;

use super::error::StoreError;
use super::repair::{self, Named};
use super::segments::file_name;
use super::{ReadTxn, Store, packs};
use crate::fs;
use crate::tree;

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
    /// Trees with damaged pages.
    pub damaged_trees: u64,
    /// The index of packed contents is one of them: nobody can tell what contents are right.
    pub no_index: bool,
}

impl Store {
    /// Checks every head and checkpoint. `progress` is told trees done and trees in all.
    ///
    /// # Errors
    /// When the store has stopped; damage is reported, not an error.
    pub fn check(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<CheckReport, StoreError> {
        let mut report = CheckReport::default();
        let trees = self.trees()?;
        let index = repair::hidden_tree(packs::HEAD);
        let mut lens: FxHashMap<u32, Option<u64>> = FxHashMap::default();
        let all = trees.iter().filter(|t| t.next_ino.is_some()).count() as u64;
        for Named {
            name,
            root,
            next_ino,
            ..
        } in &trees
        {
            progress(report.trees, all);
            report.trees += u64::from(next_ino.is_some());
            let verified = match next_ino {
                // With the lock held: a head may go on.
                Some(_) => tree::verify(&mut self.core()?.pages, *root),
                None => tree::verify(&mut self.quiet(), *root),
            };
            match verified {
                Ok(stats) => report.pages += stats.pages,
                Err(e) => {
                    report.damaged_trees += 1;
                    report.problems.push(format!("{name}: {e}"));
                    if next_ino.is_some() {
                        let lost = self.name_lost(*root)?;
                        let lines = lost.iter().map(|l| format!("{name}: {l}"));
                        report.problems.extend(lines);
                    }
                    report.no_index |= *name == index;
                    continue;
                }
            }
            let Some(next_ino) = next_ino else { continue };
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
        let (mut at, end) = (e.off, e.off + u64::from(e.len));
        // A part may be packed, and the rest not.
        while at < end {
            let (packed, n) = self.packs.run(e.seg, at, end - at);
            at += n.max(1);
            if !packed && len.is_none_or(|l| at > l) {
                return false;
            }
        }
        true
    }

    /// True if an extent lies in what is packed, or within its segment's file.
    pub(crate) fn has_bytes(&self, e: &fs::Extent) -> bool {
        self.has_bytes_of(e, self.segment_len(e.seg))
    }
}
