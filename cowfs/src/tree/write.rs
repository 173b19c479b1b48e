//! Changes: insertion with splits, removal with merges.

use super::page::{CAPACITY, Item, Page, common, entry_size};
use super::{MAX_KEY, MAX_LEVEL, MAX_VALUE, PageId, Pages, TreeError, corrupt, read_at};

const MAX_HEIGHT: usize = MAX_LEVEL as usize + 1;

/// The way from the root to a leaf: page ids, and the index of the next page in each.
#[derive(Clone, Copy)]
struct Path {
    id: [PageId; MAX_HEIGHT],
    idx: [usize; MAX_HEIGHT],
    /// Index of the leaf.
    leaf: usize,
    /// Whether every step was to the last child.
    rightmost: bool,
}

/// Where a key is, or belongs, in the leaf at the end of a path.
struct Place {
    path: Path,
    page: std::sync::Arc<Page>,
    pos: usize,
    found: bool,
}

fn descend<P: Pages>(p: &mut P, root: PageId, key: &[u8]) -> Result<Place, P::Error> {
    let mut path = Path {
        id: [0; MAX_HEIGHT],
        idx: [0; MAX_HEIGHT],
        leaf: 0,
        rightmost: true,
    };
    path.id[0] = root;
    let mut page = read_at(p, root, None)?;
    while let Some(level) = page.level().checked_sub(1) {
        let idx = page.child_index(key);
        path.idx[path.leaf] = idx;
        path.rightmost &= idx + 1 == page.count();
        // No overrun: levels go down by one from at most MAX_LEVEL.
        path.leaf += 1;
        path.id[path.leaf] = page.child(idx);
        page = read_at(p, path.id[path.leaf], Some(level))?;
    }
    let (pos, found) = page.search(key);
    Ok(Place {
        path,
        page,
        pos,
        found,
    })
}

impl Path {
    /// Takes the pages `0..=last` for writing, from the top. After each step the tree under the
    /// (possibly new) root is whole.
    fn own<P: Pages>(&mut self, p: &mut P, last: usize) -> Result<(), P::Error> {
        for i in 0..=last {
            let (id, _) = p.modify(self.id[i])?;
            if id != self.id[i] {
                self.id[i] = id;
                if i > 0 {
                    let (_, parent) = p.modify(self.id[i - 1])?;
                    parent.set_child(self.idx[i - 1], id);
                }
            }
        }
        Ok(())
    }

    /// Changes only the leaf, by `change`. Returns the new root.
    fn change_leaf<P: Pages>(
        &mut self,
        p: &mut P,
        owned: bool,
        change: impl FnOnce(&mut Page),
    ) -> Result<PageId, P::Error> {
        if !owned {
            self.own(p, self.leaf)?;
        }
        let (id, page) = p.modify(self.id[self.leaf])?;
        change(page);
        // Only if the store said something wrong about the page being owned.
        let (mut id, mut i) = (id, self.leaf);
        while id != self.id[i] {
            self.id[i] = id;
            if i == 0 {
                break;
            }
            i -= 1;
            let (up, parent) = p.modify(self.id[i])?;
            parent.set_child(self.idx[i], id);
            id = up;
        }
        Ok(self.id[0])
    }
}

/// Makes sure that the root page belongs to the current generation, and returns its new id.
/// A store that keeps the result before it goes on has the strongest guarantee about errors (see
/// the module's documentation). One lookup if there is nothing to do.
///
/// # Errors
///
/// Those of the store; nothing has changed then.
pub fn own_root<P: Pages>(p: &mut P, root: PageId) -> Result<PageId, P::Error> {
    match root {
        0 => Ok(0),
        id => Ok(p.modify(id)?.0),
    }
}

/// Sets the value of a key. Returns the new root and the old value.
///
/// # Errors
///
/// Those of the store, [`TreeError`]. See the module's documentation for what holds then.
pub fn insert<P: Pages>(
    p: &mut P,
    root: PageId,
    key: &[u8],
    value: &[u8],
) -> Result<(PageId, Option<Vec<u8>>), P::Error> {
    if key.len() > MAX_KEY {
        return Err(TreeError::KeyTooLong(key.len()).into());
    }
    if value.len() > MAX_VALUE {
        return Err(TreeError::ValueTooLong(value.len()).into());
    }
    if root == 0 {
        let (id, page) = p.alloc()?;
        page.assign(&Page::empty_leaf());
        page.insert_at(0, key, value);
        return Ok((id, None));
    }
    let Place {
        mut path,
        page,
        pos,
        found,
    } = descend(p, root, key)?;
    let old = found.then(|| page.value(pos).to_vec());
    let owned = p.is_owned(&page);
    let fits = match &old {
        Some(old) => page.free() + old.len() >= value.len(),
        None => page.free() >= entry_size(key, value),
    };
    if fits {
        drop(page);
        let root = path.change_leaf(p, owned, |leaf| {
            if found {
                leaf.set_value(pos, value);
            } else {
                leaf.insert_at(pos, key, value);
            }
        })?;
        return Ok((root, old));
    }
    let id = path.id[path.leaf];
    let split = split(&page, pos, found, key, value, path.rightmost).map_err(|e| corrupt(id, e))?;
    drop(page);
    Ok((split_up(p, path, split)?, old))
}

/// What a split makes of a page: itself, the page to its right, and the separator.
struct Split {
    left: Page,
    right: Page,
    separator: Vec<u8>,
    /// Entries in `left`.
    at: usize,
}

impl Split {
    fn set_child(&mut self, i: usize, id: PageId) {
        if i < self.at {
            self.left.set_child(i, id);
        } else {
            self.right.set_child(i - self.at, id);
        }
    }
}

/// Splits a page in two while adding an entry at `pos`, or giving the one at `pos` a new value.
///
/// Two pages are always enough: together there are at most 4056 + 1322 bytes, and no entry is
/// above 1322, so at the middle neither half is above 3350.
fn split(
    page: &Page,
    pos: usize,
    replace: bool,
    key: &[u8],
    value: &[u8],
    rightmost: bool,
) -> Result<Split, &'static str> {
    let mut items: Vec<Item<'_>> = Vec::with_capacity(page.count() + 1);
    items.extend((0..page.count()).map(|i| page.item(i)));
    if replace {
        items[pos].1 = value;
    } else {
        items.insert(pos, (key, value));
    }
    let total: usize = items.iter().map(|(k, v)| entry_size(k, v)).sum();
    let before: usize = items[..pos].iter().map(|(k, v)| entry_size(k, v)).sum();
    let leaf = page.is_leaf();
    let ascending = !replace && pos > 0 && page.hint() == pos;
    let mut at = 0;
    if !replace && pos == page.count() && (ascending || rightmost) {
        // Appending: leave the left page full. An inner page takes a second child along so that
        // its leaves have a neighbour to merge with.
        at = if leaf || pos < 2 { pos } else { pos - 1 };
    } else if ascending {
        // A run of ascending keys in the middle: it shall fill pages, too.
        at = if before >= CAPACITY / 2 { pos } else { pos + 1 };
    }
    let left_size =
        |at: usize| -> usize { items[..at].iter().map(|(k, v)| entry_size(k, v)).sum() };
    let fits = |at: usize| {
        let left = left_size(at);
        left <= CAPACITY && total - left <= CAPACITY
    };
    if at == 0 || at >= items.len() || !fits(at) {
        // The point nearest to the middle, in bytes.
        let (mut sum, mut best) = (0, usize::MAX);
        for (i, (k, v)) in items.iter().enumerate().take(items.len() - 1) {
            sum += entry_size(k, v);
            let distance = (2 * sum).abs_diff(total);
            if distance < best {
                (best, at) = (distance, i + 1);
            }
        }
    }
    let (low, high) = items.split_at(at);
    let (Some(last), Some(next)) = (low.last(), high.first()) else {
        return Err("nothing to split");
    };
    if last.0 >= next.0 {
        return Err("keys out of order");
    }
    let separator = if leaf {
        // The shortest key that is above the left and not above the right.
        next.0[..common(last.0, next.0) + 1].to_vec()
    } else {
        next.0.to_vec()
    };
    let mut left = Page::build(page.level(), low)?;
    let mut right = Page::build(page.level(), high)?;
    if replace {
        // No run is going on in pages that were rewritten.
    } else if pos < at {
        left.set_hint(pos + 1);
    } else {
        right.set_hint(pos - at + 1);
    }
    Ok(Split {
        left,
        right,
        separator,
        at,
    })
}

/// Brings a split of the leaf into the pages above it, and writes everything.
fn split_up<P: Pages>(p: &mut P, mut path: Path, leaf: Split) -> Result<PageId, P::Error> {
    const NO_CHILD: [u8; 8] = [0; 8];
    // Bottom up: pages that split, then perhaps one that takes the last separator.
    let mut splits = vec![leaf];
    let mut taker: Option<Page> = None;
    let mut top = path.leaf;
    while top > 0 && taker.is_none() {
        top -= 1;
        let (id, pos) = (path.id[top], path.idx[top] + 1);
        let page = read_at(p, id, None)?;
        let separator = splits.last().map_or(&[][..], |s| &s.separator);
        if page.key(pos - 1) >= separator || (pos < page.count() && page.key(pos) <= separator) {
            return Err(corrupt(path.id[top + 1], "key outside of the parent's bounds").into());
        }
        let mut changed = Page::clone(&page);
        if changed.insert_at(pos, separator, &NO_CHILD) {
            taker = Some(changed);
        } else {
            let next = split(&page, pos, false, separator, &NO_CHILD, path.rightmost)
                .map_err(|e| corrupt(id, e))?;
            splits.push(next);
        }
    }
    let new_root = taker.is_none();
    let top_level = splits.last().map_or(0, |s| s.left.level());
    if new_root && top_level >= MAX_LEVEL {
        return Err(TreeError::TooHigh.into());
    }

    // All that can fail.
    let mut fresh = Vec::with_capacity(splits.len() + 1);
    let wanted = splits.len() + usize::from(new_root);
    let done = loop {
        if fresh.len() == wanted {
            break path.own(p, path.leaf);
        }
        match p.alloc() {
            Ok((id, _)) => fresh.push(id),
            Err(e) => break Err(e),
        }
    };
    if let Err(e) = done {
        for id in fresh {
            p.release(id);
        }
        return Err(e);
    }

    // All that can not.
    for (i, split) in splits.iter_mut().enumerate() {
        let depth = path.leaf - i;
        if i > 0 {
            split.set_child(path.idx[depth], path.id[depth + 1]);
            split.set_child(path.idx[depth] + 1, fresh[i - 1]);
        }
        p.modify(path.id[depth])?.1.assign(&split.left);
        p.modify(fresh[i])?.1.assign(&split.right);
    }
    let last = splits.len() - 1;
    if let Some(mut page) = taker {
        page.set_child(path.idx[top], path.id[top + 1]);
        page.set_child(path.idx[top] + 1, fresh[last]);
        p.modify(path.id[top])?.1.assign(&page);
        return Ok(path.id[0]);
    }
    let (left, right) = (path.id[0].to_le_bytes(), fresh[last].to_le_bytes());
    let items = [(&[][..], &left[..]), (&splits[last].separator, &right[..])];
    let page = Page::build(top_level + 1, &items).map_err(|e| corrupt(path.id[0], e))?;
    p.modify(fresh[last + 1])?.1.assign(&page);
    Ok(fresh[last + 1])
}

/// Pages less full than this look for a neighbour to merge with.
const LOW: usize = CAPACITY / 4;
/// A merged page is at most this full, so that it does not split again at once.
const MERGED: usize = CAPACITY - CAPACITY / 8;

/// Removes a key. Returns the new root (0 if nothing is left) and the value.
///
/// # Errors
///
/// Those of the store, [`TreeError`]. See the module's documentation for what holds then.
pub fn remove<P: Pages>(
    p: &mut P,
    root: PageId,
    key: &[u8],
) -> Result<(PageId, Option<Vec<u8>>), P::Error> {
    if root == 0 {
        return Ok((0, None));
    }
    let Place {
        mut path,
        page,
        pos,
        found,
    } = descend(p, root, key)?;
    if !found {
        return Ok((root, None));
    }
    let value = page.value(pos);
    let left = page.used() - entry_size(key, value);
    let old = Some(value.to_vec());
    let owned = p.is_owned(&page);
    if left >= LOW || (path.leaf == 0 && page.count() > 1) {
        drop(page);
        let root = path.change_leaf(p, owned, |leaf| leaf.remove_at(pos))?;
        return Ok((root, old));
    }
    let mut leaf = Page::clone(&page);
    leaf.remove_at(pos);
    drop(page);
    Ok((merge_up(p, path, leaf)?, old))
}

/// Merges two neighbours; `separator` is what stands between them in the parent.
fn merge(left: &Page, right: &Page, separator: &[u8]) -> Result<Option<Page>, &'static str> {
    let inner = usize::from(!left.is_leaf());
    if left.used() + right.used() + inner * separator.len() > MERGED {
        return Ok(None);
    }
    let low = (0..left.count()).map(|i| left.item(i));
    let high = (0..right.count()).map(|i| match right.item(i) {
        (_, child) if inner == 1 && i == 0 => (separator, child),
        item => item,
    });
    let items: Vec<Item<'_>> = low.chain(high).collect();
    Page::build(left.level(), &items).map(Some)
}

/// Brings a leaf that has become small into the tree, and writes everything.
fn merge_up<P: Pages>(p: &mut P, mut path: Path, leaf: Page) -> Result<PageId, P::Error> {
    // New contents of the pages of the path, and where the next one is in them.
    let mut pages: [Option<Page>; MAX_HEIGHT] = [const { None }; MAX_HEIGHT];
    let mut idx = path.idx;
    let mut gone = Vec::new();
    // Pages `keep_from..keep_to` of the path stay.
    let (mut keep_from, mut keep_to) = (0, path.leaf + 1);
    let mut depth = path.leaf;
    let mut page = leaf;
    while depth > 0 && (page.used() < LOW || page.count() == 0) {
        let parent_id = path.id[depth - 1];
        let parent = read_at(p, parent_id, None)?;
        let i = path.idx[depth - 1];
        let mut changed = Page::clone(&parent);
        if page.count() == 0 {
            gone.push(path.id[depth]);
            keep_to = depth;
            changed.remove_at(i);
        } else {
            let mut merged = None;
            // `j` is the right one of the two.
            for j in [i, i + 1] {
                if j == 0 || j >= parent.count() || merged.is_some() {
                    continue;
                }
                let id = parent.child(if j == i { i - 1 } else { j });
                let other = read_at(p, id, Some(page.level()))?;
                let (left, right) = if j == i {
                    (&*other, &page)
                } else {
                    (&page, &*other)
                };
                let both = merge(left, right, parent.key(j)).map_err(|e| corrupt(id, e))?;
                merged = both.map(|both| (both, j, id));
                if merged.is_some() && j == i {
                    // What was at this place of the path's page comes behind the neighbour's.
                    idx[depth] += other.count();
                }
            }
            let Some((both, j, id)) = merged else {
                break;
            };
            // The page of the path takes all, as it is written anyway; its neighbour goes.
            gone.push(id);
            changed.remove_at(j);
            idx[depth - 1] = j - 1;
            pages[depth] = Some(both);
        }
        page = changed;
        depth -= 1;
    }
    if page.count() == 0 {
        // Only at the root, as any other empty page has been taken out of its parent.
        gone.push(path.id[0]);
        for id in gone {
            p.release(id);
        }
        return Ok(0);
    }
    pages[depth] = Some(page);

    // A root with one child gives way to the child.
    let mut outside = 0;
    while keep_from < keep_to && outside == 0 {
        match &pages[keep_from] {
            Some(root) if !root.is_leaf() && root.count() == 1 => {
                keep_from += 1;
                if keep_from == keep_to {
                    outside = root.child(0);
                }
            }
            _ => break,
        }
    }
    if outside != 0 {
        let level = pages[keep_from - 1].as_ref().map_or(0, Page::level);
        let mut page = read_at(p, outside, level.checked_sub(1))?;
        while let Some(level) = page.level().checked_sub(1) {
            if page.count() > 1 {
                break;
            }
            gone.push(outside);
            outside = page.child(0);
            page = read_at(p, outside, Some(level))?;
        }
    }

    // All that can fail. Nothing to write if the whole path goes.
    if keep_from < keep_to {
        path.own(p, keep_to - 1)?;
    }

    // All that can not.
    for i in keep_from..keep_to {
        if let Some(page) = &mut pages[i] {
            if i + 1 < keep_to {
                page.set_child(idx[i], path.id[i + 1]);
            }
            p.modify(path.id[i])?.1.assign(page);
        }
    }
    for &id in &path.id[..keep_from] {
        p.release(id);
    }
    for id in gone {
        p.release(id);
    }
    Ok(if outside != 0 {
        outside
    } else {
        path.id[keep_from]
    })
}
