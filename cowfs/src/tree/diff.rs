//! Differences of two trees.

use std::cmp::Ordering;

use super::cursor::Cursor;
use super::{OnDifference, PageId, Pages, read_at};

/// What comes next in a tree.
enum Next<'a> {
    /// A subtree that has not been entered: id, level, lower bound.
    Node(PageId, u8, &'a [u8]),
    Entry(&'a [u8], &'a [u8]),
    End,
}

/// A cursor that can also stand before its root.
struct Side {
    cursor: Cursor,
    root: Option<(PageId, std::sync::Arc<super::Page>)>,
}

impl Side {
    fn new<P: Pages>(p: &mut P, root: PageId) -> Result<Side, P::Error> {
        let root = match root {
            0 => None,
            id => Some((id, read_at(p, id, None)?)),
        };
        let cursor = Cursor::new();
        Ok(Side { cursor, root })
    }

    /// Leaves pages that are through.
    fn settle(&mut self) {
        while let Some((_, page, idx)) = self.cursor.top() {
            if idx < page.count() {
                break;
            }
            self.cursor.pop();
        }
    }

    /// Call only after [`settle`](Side::settle).
    fn peek(&self) -> Next<'_> {
        if let Some((id, page)) = &self.root {
            return Next::Node(*id, page.level(), &[]);
        }
        match self.cursor.top() {
            None => Next::End,
            Some((_, page, idx)) => match page.level().checked_sub(1) {
                None => Next::Entry(page.key(idx), page.value(idx)),
                Some(level) => Next::Node(page.child(idx), level, self.cursor.low()),
            },
        }
    }

    fn skip(&mut self) {
        if self.root.take().is_none() {
            self.cursor.next();
        }
    }

    fn enter<P: Pages>(&mut self, p: &mut P) -> Result<(), P::Error> {
        match self.root.take() {
            Some((id, page)) => {
                self.cursor.push_page(id, page);
                Ok(())
            }
            None => self.cursor.push_child(p),
        }
    }
}

/// Calls `f` with every key whose value is not the same in `a` and `b`, in ascending order, with
/// the value in `a` and in `b`, until it breaks.
///
/// Subtrees with the same page id are the same and are not read, wherever they hang: of two
/// subtrees the one with the lower bound is entered first, then the higher one, so a shared page
/// is met from both sides at once even if heights or split points differ.
///
/// # Errors
///
/// Those of the store, and [`Corrupt`](super::TreeError::Corrupt).
pub fn diff<P: Pages>(
    p: &mut P,
    a: PageId,
    b: PageId,
    f: &mut OnDifference<'_>,
) -> Result<(), P::Error> {
    if a == b {
        return Ok(());
    }
    let mut a = Side::new(p, a)?;
    let mut b = Side::new(p, b)?;
    loop {
        a.settle();
        b.settle();
        // What to do on each side: enter the subtree, or step over what is next.
        let (mut enter_a, mut enter_b, mut skip_a, mut skip_b) = (false, false, false, false);
        match (a.peek(), b.peek()) {
            (Next::End, Next::End) => return Ok(()),
            (Next::Node(x, i, low), Next::Node(y, j, other)) => {
                if x == y {
                    (skip_a, skip_b) = (true, true);
                } else {
                    match low.cmp(other).then(j.cmp(&i)) {
                        Ordering::Less => enter_a = true,
                        Ordering::Equal => (enter_a, enter_b) = (true, true),
                        Ordering::Greater => enter_b = true,
                    }
                }
            }
            (Next::Entry(key, value), Next::Entry(other, second)) => match key.cmp(other) {
                Ordering::Less => {
                    if f(key, Some(value), None).is_break() {
                        return Ok(());
                    }
                    skip_a = true;
                }
                Ordering::Equal => {
                    if value != second && f(key, Some(value), Some(second)).is_break() {
                        return Ok(());
                    }
                    (skip_a, skip_b) = (true, true);
                }
                Ordering::Greater => {
                    if f(other, None, Some(second)).is_break() {
                        return Ok(());
                    }
                    skip_b = true;
                }
            },
            (Next::Entry(key, value), other) => {
                if matches!(other, Next::Node(_, _, low) if low <= key) {
                    enter_b = true;
                } else {
                    if f(key, Some(value), None).is_break() {
                        return Ok(());
                    }
                    skip_a = true;
                }
            }
            (other, Next::Entry(key, value)) => {
                if matches!(other, Next::Node(_, _, low) if low <= key) {
                    enter_a = true;
                } else {
                    if f(key, None, Some(value)).is_break() {
                        return Ok(());
                    }
                    skip_b = true;
                }
            }
            (Next::Node(..), Next::End) => enter_a = true,
            (Next::End, Next::Node(..)) => enter_b = true,
        }
        if enter_a {
            a.enter(p)?;
        }
        if enter_b {
            b.enter(p)?;
        }
        if skip_a {
            a.skip();
        }
        if skip_b {
            b.skip();
        }
    }
}
