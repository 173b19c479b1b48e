//! Copy-on-write B+tree over fixed 4096-byte pages.
//!
//! The tree is a set of functions over a root [`PageId`] and a [`Pages`] store. It keeps no state
//! of its own, so a snapshot is a copy of a root id.
//!
//! # Shape
//!
//! * The empty tree is root id 0. An empty leaf as root is accepted as well; [`remove`] of the last
//!   entry always gives 0.
//! * Leaves (level 0) hold key and value; inner pages hold (separator, child). Child `i` covers
//!   `separator[i] <= key < separator[i + 1]`; separator 0 is stored empty and means the lower
//!   bound of the page itself.
//! * A child's level is exactly its parent's level minus one, checked at every step down, so a
//!   cycle made by a hostile page ends in [`TreeError::Corrupt`] after at most 13 reads. Whole-tree
//!   walks also check each page against the bounds given by its parents and refuse empty leaves
//!   below a root, so a page that is referred to many times cannot make them run exponentially.
//!
//! # Errors in the middle of a change
//!
//! [`insert`] and [`remove`] do all reads, then all allocations, then take every page they will
//! write (top down, each parent being linked to the copied child at once), and only then change
//! contents. So if the store keeps the contracts of [`Pages::modify`], after an `Err`:
//!
//! * every snapshot and the tree under the old root id have exactly the old contents;
//! * newly allocated pages have been released again;
//! * if the root page already belonged to the current generation (see [`own_root`]), the old root
//!   id is a completely valid tree to go on with;
//! * otherwise the old root may have been copied (and released) before the error. It is readable
//!   for as long as the store does not reuse pages released in this generation, but the copy is
//!   lost: discard the transaction, or call [`own_root`] first to rule this case out.

mod cursor;
mod diff;
mod page;
mod read;
mod survey;
mod walk;
mod write;

#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::Arc;

pub use diff::diff;
pub use page::Page;
pub use read::{get, last_before};
pub use survey::{Filler, Lost, OnPage, survey};
pub use walk::{Stats, Visit, mark, scan, verify};
pub use write::{insert, own_root, remove};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// Longest key, in bytes.
pub const MAX_KEY: usize = 288;
/// Longest value, in bytes.
pub const MAX_VALUE: usize = 1024;
/// Highest level of a page; leaves are level 0.
pub const MAX_LEVEL: u8 = 12;

/// Number of a page. 0 is no page, or the empty tree.
pub type PageId = u64;

/// What can be wrong with a tree or with a request to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A page is damaged or does not belong where it was found. `page` is 0 if its id is unknown.
    #[error("tree page {page} is corrupt: {what}")]
    Corrupt {
        /// The page.
        page: PageId,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The key is longer than [`MAX_KEY`].
    #[error("key of {0} bytes is too long")]
    KeyTooLong(usize),
    /// The value is longer than [`MAX_VALUE`].
    #[error("value of {0} bytes is too long")]
    ValueTooLong(usize),
    /// The tree would grow beyond [`MAX_LEVEL`].
    #[error("tree is too high")]
    TooHigh,
}

/// Where pages live: implemented by the store.
///
/// No [`Arc`] given out by [`read`](Pages::read) is kept while [`modify`](Pages::modify) is called,
/// so a store may use [`Arc::make_mut`] without ever copying for the tree's sake.
pub trait Pages {
    /// The store's error.
    type Error: From<TreeError>;

    /// A page for reading. Must come from [`Page::from_bytes`] or from this module.
    fn read(&mut self, id: PageId) -> Result<Arc<Page>, Self::Error>;

    /// A page for writing. If `id` belongs to an older generation it is copied to a new id (with a
    /// new birth) and the old one is released; the tree stores the returned id in the parent.
    ///
    /// A call with an id that `modify` or [`alloc`](Pages::alloc) returned earlier in the same tree
    /// operation must succeed and return that id again.
    fn modify(&mut self, id: PageId) -> Result<(PageId, &mut Page), Self::Error>;

    /// A new page; contents do not matter, but its birth must be set.
    fn alloc(&mut self) -> Result<(PageId, &mut Page), Self::Error>;

    /// The page left this tree (merged away, or allocated in vain).
    fn release(&mut self, id: PageId);

    /// Whether [`modify`](Pages::modify) of this page would return the same id, that is, whether
    /// it belongs to the current generation (usually a comparison of [`Page::birth`]).
    ///
    /// The default is always right but makes every change call `modify` once per level; with a real
    /// answer most changes call it once.
    fn is_owned(&self, page: &Page) -> bool {
        let _ = page;
        false
    }
}

/// What a scan hands each entry to, key and value, until it breaks.
pub type OnEntry<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;
/// What a walk of everything hands each entry to.
pub type OnEach<'a> = dyn FnMut(&[u8], &[u8]) + 'a;
/// What [`diff()`] hands each key to that differs, with its value on either side, until it breaks.
pub type OnDifference<'a> = dyn FnMut(&[u8], Option<&[u8]>, Option<&[u8]>) -> ControlFlow<()> + 'a;

fn corrupt(page: PageId, what: &'static str) -> TreeError {
    TreeError::Corrupt { page, what }
}

/// Reads a page and checks that it has the level its parent promises (`None`: a root).
fn read_at<P: Pages>(p: &mut P, id: PageId, level: Option<u8>) -> Result<Arc<Page>, P::Error> {
    if id == 0 {
        return Err(corrupt(0, "child id is 0").into());
    }
    let page = p.read(id)?;
    if level.is_some_and(|level| page.level() != level) {
        return Err(corrupt(id, "level does not follow from the parent's").into());
    }
    Ok(page)
}
