//! Walks: range scans, marking for garbage collection, verification.

use super::cursor::Cursor;
use super::{OnEach, OnEntry, PageId, Pages, read_at};

/// Calls `f` with all entries in `from..to` in ascending order, until it breaks.
///
/// # Errors
///
/// Those of the store, and [`Corrupt`](super::TreeError::Corrupt); entries before the damage have
/// been given to `f` by then.
pub fn scan<P: Pages>(
    p: &mut P,
    root: PageId,
    from: &[u8],
    to: Option<&[u8]>,
    f: &mut OnEntry<'_>,
) -> Result<(), P::Error> {
    if root == 0 || to.is_some_and(|to| from >= to) {
        return Ok(());
    }
    let mut cursor = Cursor::new();
    cursor.push_root(p, root)?;
    // Only on the first way down can `from` be inside a page.
    let mut first = true;
    while let Some((_, page, idx)) = cursor.top() {
        if page.is_leaf() {
            let start = if first { page.search(from).0 } else { 0 };
            first = false;
            let end = to.map_or(page.count(), |to| page.search(to).0);
            for i in start..end {
                let (key, value) = page.item(i);
                if f(key, value).is_break() {
                    return Ok(());
                }
            }
            if end < page.count() {
                return Ok(());
            }
            cursor.pop();
            continue;
        }
        let idx = if first { page.child_index(from) } else { idx };
        if idx >= page.count() {
            cursor.pop();
            continue;
        }
        if idx > 0 && to.is_some_and(|to| page.key(idx) >= to) {
            return Ok(());
        }
        cursor.set_index(idx);
        cursor.push_child(p)?;
    }
    Ok(())
}

/// What [`mark`] shall do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// Go on with what is below it.
    Descend,
    /// Leave out it and what is below it.
    Skip,
}

/// Calls `visit_page` with every page of a tree (id, whether it is a leaf), parents first, and
/// `visit_entry` with every entry of every leaf that is not skipped.
///
/// Without `visit_entry` leaves are not read, save for a root, whose level is not known otherwise.
///
/// # Errors
///
/// Those of the store, and [`Corrupt`](super::TreeError::Corrupt).
pub fn mark<P: Pages>(
    p: &mut P,
    root: PageId,
    visit_page: &mut dyn FnMut(PageId, bool) -> Visit,
    mut visit_entry: Option<&mut OnEach<'_>>,
) -> Result<(), P::Error> {
    if root == 0 {
        return Ok(());
    }
    let page = read_at(p, root, None)?;
    if visit_page(root, page.is_leaf()) == Visit::Skip {
        return Ok(());
    }
    let mut cursor = Cursor::new();
    cursor.push_page(root, page);
    while let Some((_, page, idx)) = cursor.top() {
        if page.is_leaf() {
            if let Some(visit) = &mut visit_entry {
                for i in 0..page.count() {
                    let (key, value) = page.item(i);
                    visit(key, value);
                }
            }
            cursor.pop();
            continue;
        }
        if idx >= page.count() {
            cursor.pop();
            continue;
        }
        let leaf = page.level() == 1;
        let visit = visit_page(page.child(idx), leaf);
        if visit == Visit::Skip || (leaf && visit_entry.is_none()) {
            cursor.next();
        } else {
            cursor.push_child(p)?;
        }
    }
    Ok(())
}

/// Size of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Pages, inner ones and leaves.
    pub pages: u64,
    /// Entries in leaves.
    pub entries: u64,
    /// Levels; 0 for the empty tree.
    pub height: u8,
}

/// Reads all pages of a tree and checks levels, order and bounds; the store's `read` has checked
/// the pages in themselves. If it succeeds, no page is used twice in the tree.
///
/// # Errors
///
/// Those of the store, and [`Corrupt`](super::TreeError::Corrupt) for the first damage found.
pub fn verify<P: Pages>(p: &mut P, root: PageId) -> Result<Stats, P::Error> {
    let mut stats = Stats::default();
    if root == 0 {
        return Ok(stats);
    }
    let mut cursor = Cursor::new();
    cursor.push_root(p, root)?;
    while let Some((_, page, idx)) = cursor.top() {
        if idx == 0 {
            stats.pages += 1;
            stats.height = stats.height.max(page.level() + 1);
        }
        if page.is_leaf() {
            stats.entries += page.count() as u64;
            cursor.pop();
        } else if idx >= page.count() {
            cursor.pop();
        } else {
            cursor.push_child(p)?;
        }
    }
    Ok(stats)
}
