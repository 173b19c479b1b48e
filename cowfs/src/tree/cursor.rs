//! A position in a tree, for walks over much of it.

use std::sync::Arc;

use super::{Page, PageId, Pages, TreeError, corrupt, read_at};

struct Frame {
    id: PageId,
    page: Arc<Page>,
    idx: usize,
}

/// The path from the root to an entry of a page. Every page is checked against the bounds given by
/// its parents when it is entered.
pub(super) struct Cursor {
    stack: Vec<Frame>,
}

impl Cursor {
    pub(super) fn new() -> Cursor {
        Cursor {
            stack: Vec::with_capacity(8),
        }
    }

    /// Enters the root.
    pub(super) fn push_root<P: Pages>(&mut self, p: &mut P, id: PageId) -> Result<(), P::Error> {
        let page = read_at(p, id, None)?;
        self.push_page(id, page);
        Ok(())
    }

    /// Enters a root that has been read.
    pub(super) fn push_page(&mut self, id: PageId, page: Arc<Page>) {
        self.stack.push(Frame { id, page, idx: 0 });
    }

    /// The current page: its id, itself, and the current entry. The entry may be past the end.
    pub(super) fn top(&self) -> Option<(PageId, &Page, usize)> {
        self.stack.last().map(|f| (f.id, &*f.page, f.idx))
    }

    pub(super) fn set_index(&mut self, idx: usize) {
        if let Some(f) = self.stack.last_mut() {
            f.idx = idx;
        }
    }

    /// Goes to the next entry of the current page.
    pub(super) fn next(&mut self) {
        if let Some(f) = self.stack.last_mut() {
            f.idx += 1;
        }
    }

    /// Leaves the current page and goes to the next entry of its parent.
    pub(super) fn pop(&mut self) {
        self.stack.pop();
        self.next();
    }

    /// Lower bound of the current child; empty if there is none.
    pub(super) fn low(&self) -> &[u8] {
        let mut frames = self.stack.iter().rev();
        frames
            .find(|f| f.idx > 0)
            .map_or(&[], |f| f.page.key(f.idx))
    }

    /// Upper bound (exclusive) of the current child.
    fn high(&self) -> Option<&[u8]> {
        let mut frames = self.stack.iter().rev();
        frames
            .find(|f| f.idx + 1 < f.page.count())
            .map(|f| f.page.key(f.idx + 1))
    }

    /// Lower bound of the current child, and upper bound.
    pub(super) fn bounds(&self) -> (&[u8], Option<&[u8]>) {
        (self.low(), self.high())
    }

    /// Enters the current child at its first entry. The current page must be an inner one, and the
    /// current entry not past its end.
    pub(super) fn push_child<P: Pages>(&mut self, p: &mut P) -> Result<(), P::Error> {
        let Some(f) = self.stack.last() else {
            return Ok(());
        };
        let id = f.page.child(f.idx);
        let level = f.page.level().checked_sub(1);
        let level = level.ok_or_else(|| corrupt(f.id, "leaf used as inner page"))?;
        let page = read_at(p, id, Some(level))?;
        self.check(id, &page)?;
        self.push_page(id, page);
        Ok(())
    }

    fn check(&self, id: PageId, page: &Page) -> Result<(), TreeError> {
        let (count, first) = (page.count(), page.first_key());
        if count <= first {
            return if first == 0 {
                Err(corrupt(id, "empty leaf below the root"))
            } else {
                Ok(())
            };
        }
        let (low, least) = (self.low(), page.key(first));
        if least < low || (first == 1 && least == low) {
            return Err(corrupt(id, "key below the bound given by the parent"));
        }
        if self.high().is_some_and(|high| page.key(count - 1) >= high) {
            return Err(corrupt(id, "key above the bound given by the parent"));
        }
        Ok(())
    }
}
