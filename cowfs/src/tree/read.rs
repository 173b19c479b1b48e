//! Point lookups.

use std::sync::Arc;

use super::{Page, PageId, Pages, corrupt, read_at};

/// Calls `f` with the value of a key. Does not allocate; one page read per level.
///
/// # Errors
///
/// Those of the store, and [`Corrupt`](super::TreeError::Corrupt).
pub fn get<P: Pages, R>(
    p: &mut P,
    root: PageId,
    key: &[u8],
    f: impl FnOnce(&[u8]) -> R,
) -> Result<Option<R>, P::Error> {
    if root == 0 {
        return Ok(None);
    }
    let mut page = read_at(p, root, None)?;
    while let Some(level) = page.level().checked_sub(1) {
        let id = page.child(page.child_index(key));
        page = read_at(p, id, Some(level))?;
    }
    Ok(page.lookup(key).map(f))
}

/// The entry with the greatest key in `from..before`.
///
/// # Errors
///
/// Those of the store, and [`Corrupt`](super::TreeError::Corrupt).
#[allow(clippy::type_complexity)]
pub fn last_before<P: Pages>(
    p: &mut P,
    root: PageId,
    from: &[u8],
    before: &[u8],
) -> Result<Option<(Vec<u8>, Vec<u8>)>, P::Error> {
    if root == 0 || from >= before {
        return Ok(None);
    }
    // The nearest subtree left of the path, and the separator between them: it is needed if no
    // key of the leaf is low enough, and then its greatest key is the one.
    let mut left: Option<(Arc<Page>, usize)> = None;
    let mut id = root;
    let mut page = read_at(p, root, None)?;
    while let Some(level) = page.level().checked_sub(1) {
        let (i, _) = page.search(before);
        let i = i - 1;
        id = page.child(i);
        let child = read_at(p, id, Some(level))?;
        if i > 0 {
            left = Some((page, i));
        }
        page = child;
    }
    let (mut i, _) = page.search(before);
    if i == 0 {
        if page.count() == 0 && id != root {
            return Err(corrupt(id, "empty leaf below the root").into());
        }
        let Some((parent, right)) = left else {
            return Ok(None);
        };
        let separator = parent.key(right);
        // Everything there is below the separator.
        if separator <= from {
            return Ok(None);
        }
        page = parent.clone();
        i = right;
        while let Some(level) = page.level().checked_sub(1) {
            id = page.child(i - 1);
            page = read_at(p, id, Some(level))?;
            i = page.count();
        }
        if i == 0 || page.key(i - 1) >= separator {
            return Err(corrupt(id, "leaf does not fit the bounds given by its parents").into());
        }
    }
    let (key, value) = page.item(i - 1);
    Ok((key >= from).then(|| (key.to_vec(), value.to_vec())))
}
