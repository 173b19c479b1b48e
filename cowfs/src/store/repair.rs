//! Tree pages that are damaged: which trees need them, what they held, and putting right ones in their places.

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::{FxHashMap, FxHashSet};

use super::bitmap::Bitmap;
use super::packs::Keep;
use super::pages::{self, PageMap};
use super::{CatalogOp, Store, StoreError, now_us};
use crate::fault;
use crate::fs::{ROOT_INO, key};
use crate::tree::{self, Lost, PAGE_SIZE, Page, PageId, Pages as _, Visit};

/// Files named for each damaged page of a tree at most.
const NAMED: usize = 100;
/// Changed pages in memory before they are written: no background does it while a store is repaired.
const DIRTY: usize = 4096;

/// A damaged page.
#[derive(Debug, Clone)]
pub struct LostPage {
    /// The page, and what it held.
    pub lost: Lost,
    /// What is wrong with it.
    pub what: String,
    /// Trees that need it: `head NAME`, `checkpoint NAME`, `hidden tree NAME`.
    pub trees: Vec<String>,
    /// Numbers of the checkpoints among them.
    pub checkpoints: BTreeSet<u64>,
}

/// A tree.
pub(super) struct Named {
    /// What it is called.
    pub name: String,
    /// The number of a checkpoint.
    pub checkpoint: Option<u64>,
    pub root: PageId,
    /// The next inode; a hidden tree has none.
    pub next_ino: Option<u64>,
}

/// What a hidden tree is called.
pub(crate) fn hidden_tree(name: &str) -> String {
    format!("hidden tree {name}")
}

/// Inodes of which a damaged page may have held something, from and to, and what of these is for certain not whole.
pub(crate) fn inodes_of(lost: &Lost) -> (u64, u64) {
    let number = |key: &[u8]| {
        let mut bytes = [0; 8];
        let n = key.len().min(8);
        bytes[..n].copy_from_slice(&key[..n]);
        u64::from_be_bytes(bytes)
    };
    let to = lost.high.as_deref().map_or(u64::MAX, |high| {
        // Below the first key of an inode is nothing of it.
        number(high).saturating_sub(u64::from(high.len() <= 8))
    });
    (number(&lost.low), to.max(number(&lost.low)))
}

/// What is left of a tree's names.
#[derive(Default)]
struct Names {
    up: FxHashMap<u64, (u64, Vec<u8>)>,
    known: FxHashSet<u64>,
}

impl Names {
    fn entry(&mut self, k: &[u8], v: &[u8]) {
        match key::split(k) {
            Some((ino, key::INODE, [])) => drop(self.known.insert(ino)),
            Some((dir, key::DIRENT, _)) => {
                if let Some(ino) = v.first_chunk::<8>().map(|b| u64::from_le_bytes(*b))
                    && let Some((_, name)) = key::dirent_parts(k)
                {
                    self.up.insert(ino, (dir, name.to_vec()));
                }
            }
            _ => {}
        }
    }

    fn path(&self, ino: u64) -> String {
        let (mut at, mut parts) = (ino, Vec::new());
        while at != ROOT_INO && parts.len() < 4096 {
            let Some((dir, name)) = self.up.get(&at) else {
                break;
            };
            parts.push(String::from_utf8_lossy(name).into_owned());
            at = *dir;
        }
        parts.reverse();
        let path = parts.join("/");
        match at {
            ROOT_INO => format!("/{path}"),
            _ if parts.is_empty() => format!("inode {ino}"),
            _ => format!("{path} (inode {ino}, in a directory that is lost)"),
        }
    }

    /// What a damaged page has taken, in words.
    fn taken(&self, lost: &Lost) -> String {
        let (from, to) = inodes_of(lost);
        // At the ends of what is gone a part of an inode may be left.
        let cut_low = lost.low.len() > 8;
        let cut_high = lost.high.as_deref().is_some_and(|h| h.len() > 8);
        let mut gone: BTreeSet<u64> = self.up.keys().copied().collect();
        gone.insert(ROOT_INO);
        gone.extend([from, to]);
        gone.retain(|ino| {
            let cut = cut_low && *ino == from || cut_high && *ino == to;
            let named = *ino == ROOT_INO || self.up.contains_key(ino) || self.known.contains(ino);
            (from..=to).contains(ino) && named && (cut || !self.known.contains(ino))
        });
        let paths: Vec<String> = gone.iter().take(NAMED).map(|i| self.path(*i)).collect();
        let more = match gone.len().saturating_sub(NAMED) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let range = match to {
            _ if to == from => format!("inode {from}"),
            u64::MAX => format!("inodes from {from} on"),
            _ => format!("inodes {from} to {to}"),
        };
        match paths.is_empty() {
            true => format!("it had records of {range}, which no name leads to"),
            false => format!(
                "it had records of {range}, whole or in part: {}{more}",
                paths.join(", ")
            ),
        }
    }
}

impl Store {
    /// All trees: heads, checkpoints, hidden ones.
    pub(super) fn trees(&self) -> Result<Vec<Named>, StoreError> {
        let catalog = self.catalog()?;
        let heads = catalog.heads.iter().map(|(n, h)| Named {
            name: format!("head {n}"),
            checkpoint: None,
            root: h.root,
            next_ino: Some(h.next_ino),
        });
        let checkpoints = catalog.checkpoints.values().map(|c| Named {
            name: format!("checkpoint {}", c.name),
            checkpoint: Some(c.id),
            root: c.root,
            next_ino: Some(c.next_ino),
        });
        let hidden = catalog.hidden.iter().map(|(n, h)| Named {
            name: hidden_tree(n),
            checkpoint: None,
            root: h.root,
            next_ino: None,
        });
        Ok(heads.chain(checkpoints).chain(hidden).collect())
    }

    /// The damaged pages of all trees. Without damage every page is read once.
    ///
    /// # Errors
    /// When the store has stopped.
    pub fn lost_pages(&self) -> Result<Vec<LostPage>, StoreError> {
        let mut found: BTreeMap<PageId, LostPage> = BTreeMap::new();
        let mut whole = Bitmap::default();
        whole.grow(self.core()?.pages.bitmap.len());
        for tree in self.trees()? {
            let mut here: Vec<PageId> = Vec::new();
            let mut any = false;
            tree::survey(
                &mut self.quiet(),
                tree.root,
                &StoreError::is_damage,
                &mut |page| {
                    if whole.is_set(page) {
                        return Visit::Skip;
                    }
                    here.push(page);
                    Visit::Descend
                },
                &mut |_, _| (),
                &mut |lost, e| {
                    any = true;
                    let one = found.entry(lost.page).or_insert_with(|| LostPage {
                        lost: lost.clone(),
                        what: e.to_string(),
                        trees: Vec::new(),
                        checkpoints: BTreeSet::new(),
                    });
                    if one.lost.level.is_none() {
                        // A root here is a part of a tree there, whose parent knows more of it.
                        one.lost = lost;
                    }
                    if one.trees.last() != Some(&tree.name) {
                        one.trees.push(tree.name.clone());
                    }
                    one.checkpoints.extend(tree.checkpoint);
                },
            )?;
            if !any {
                for page in here {
                    whole.set(page);
                }
            }
        }
        Ok(found.into_values().collect())
    }

    /// Says which pages of a tree are damaged, and what that takes from it.
    pub(super) fn name_lost(&self, root: PageId) -> Result<Vec<String>, StoreError> {
        let mut names = Names::default();
        let mut lost = Vec::new();
        tree::survey(
            &mut self.quiet(),
            root,
            &StoreError::is_damage,
            &mut |_| Visit::Descend,
            &mut |k, v| names.entry(k, v),
            &mut |l, _| lost.push(l),
        )?;
        let lines = lost.iter();
        Ok(lines
            .map(|l| {
                let taken = names.taken(l);
                format!("page {} of its tree is damaged; {taken}", l.page)
            })
            .collect())
    }

    /// A new hidden head, empty or from a checkpoint; what had its name goes.
    pub(crate) fn hide_anew(&self, name: &str, from: Option<u64>) -> Result<(), StoreError> {
        self.unhide(name)?;
        let name = name.to_owned();
        self.change(
            |c| {
                let op = CatalogOp::Hide {
                    id: c.next_head,
                    name,
                    from,
                    created_us: now_us(),
                };
                Ok((op, ()))
            },
            |(), _| (),
        )
        .map(drop)
    }

    /// Removes a hidden head, if it is there.
    pub(crate) fn unhide(&self, name: &str) -> Result<(), StoreError> {
        if self.catalog()?.any_head(name).is_none() {
            return Ok(());
        }
        let name = name.to_owned();
        self.change(|_| Ok((CatalogOp::Unhide { name }, ())), |(), _| ())
            .map(drop)
    }

    /// Takes a place for a page that trees share: no head may take it for its own, so its birth is before all.
    pub(crate) fn add_page(&self, page: Page) -> Result<PageId, StoreError> {
        let mut core = self.core()?;
        core.pages.reserve(pages::FLOOR + 8)?;
        let (id, slot) = core.pages.alloc()?;
        *slot = page;
        slot.set_birth(0);
        drop(core);
        self.commit_if_many()?;
        Ok(id)
    }

    /// Writes changed pages when there are many.
    pub(crate) fn commit_if_many(&self) -> Result<(), StoreError> {
        if self.core()?.pages.dirty_len() > DIRTY {
            self.commit()?;
        }
        Ok(())
    }

    /// Copies a damaged page before anything takes its place.
    pub(crate) fn keep_page(&self, id: PageId, keep: &mut Keep<'_>) -> Result<(), StoreError> {
        let file = self.core()?.pages.file();
        let mut buf = [0; PAGE_SIZE];
        // What cannot be read cannot be kept.
        if file.read_at(&mut buf, id * PAGE_SIZE as u64).is_err() {
            return Ok(());
        }
        keep(&format!("{}@{id}", pages::FILE), &buf)
    }

    /// Writes right pages over damaged ones. All that they lead to must be durable. A page that comes out torn is as damaged
    /// as before.
    pub(crate) fn replace_pages(&self, pages: &PageMap) -> Result<(), StoreError> {
        let state = self.flush_state();
        let runs = state.blob.iter().chain(&state.spare);
        let blob: Vec<_> = runs.copied().collect();
        drop(state);
        let file = {
            let core = self.core()?;
            for id in pages.keys() {
                // A tree of a hostile store may lead anywhere.
                let is_blob = blob.iter().any(|r| (r.0..r.0 + r.1).contains(id));
                if is_blob
                    || *id == 0
                    || *id >= core.pages.bitmap.len()
                    || !core.pages.bitmap.is_set(*id)
                {
                    return Err(StoreError::corrupt(
                        pages::FILE,
                        format!("page {id} of a tree is in use for something else"),
                    ));
                }
            }
            core.pages.file()
        };
        for (id, page) in pages {
            let mut sealed = Page::clone(page);
            sealed.set_birth(0);
            sealed.seal(*id);
            file.write_at(sealed.as_bytes(), id * PAGE_SIZE as u64)
                .map_err(StoreError::io(pages::FILE, "writing"))?;
            fault::point("repair:page");
        }
        file.sync().map_err(StoreError::sync(pages::FILE))?;
        let mut core = self.core()?;
        for id in pages.keys() {
            core.pages.forget_clean(*id);
        }
        Ok(())
    }
}
