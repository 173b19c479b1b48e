//! Trees of which pages are damaged: what can still be read of them, and pages to put in the damaged ones' places.

use super::cursor::Cursor;
use super::page::{CAPACITY, Item, common, entry_size};
use super::{OnEach, Page, PageId, Pages, Visit, read_at};

/// A page that cannot be used, and what it held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The page.
    pub page: PageId,
    /// Its level, as its parent says; nothing for a root.
    pub level: Option<u8>,
    /// No key that it held, itself or below it, is lower than this.
    pub low: Vec<u8>,
    /// All are lower than this.
    pub high: Option<Vec<u8>>,
}

/// Reads what can be read of a tree: as [`mark`](super::mark()), but passes by what is damaged, and hands it to `lost` with
/// what is wrong.
///
/// # Errors
/// Those that `is_damage` says are none.
pub fn survey<P: Pages>(
    p: &mut P,
    root: PageId,
    is_damage: &dyn Fn(&P::Error) -> bool,
    visit_page: &mut dyn FnMut(PageId) -> Visit,
    visit_entry: &mut OnEach<'_>,
    lost: &mut dyn FnMut(Lost, P::Error),
) -> Result<(), P::Error> {
    if root == 0 || visit_page(root) == Visit::Skip {
        return Ok(());
    }
    let mut cursor = Cursor::new();
    match read_at(p, root, None) {
        Ok(page) => cursor.push_page(root, page),
        Err(e) if is_damage(&e) => {
            let all = Lost {
                page: root,
                level: None,
                low: Vec::new(),
                high: None,
            };
            lost(all, e);
            return Ok(());
        }
        Err(e) => return Err(e),
    }
    while let Some((_, page, idx)) = cursor.top() {
        if page.is_leaf() {
            for i in 0..page.count() {
                let (key, value) = page.item(i);
                visit_entry(key, value);
            }
            cursor.pop();
            continue;
        }
        if idx >= page.count() {
            cursor.pop();
            continue;
        }
        let (child, level) = (page.child(idx), page.level().checked_sub(1));
        if visit_page(child) == Visit::Skip {
            cursor.next();
            continue;
        }
        match cursor.push_child(p) {
            Ok(()) => {}
            Err(e) if is_damage(&e) => {
                let (low, high) = cursor.bounds();
                let (low, high) = (low.to_vec(), high.map(<[u8]>::to_vec));
                cursor.next();
                let one = Lost {
                    page: child,
                    level,
                    low,
                    high,
                };
                lost(one, e);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Takes finished pages below the topmost one; returns their places.
pub type OnPage<'a, E> = dyn FnMut(Page) -> Result<PageId, E> + 'a;

/// A page being filled: its entries, and the bytes that they take.
#[derive(Default)]
struct Open {
    items: Vec<(Vec<u8>, Vec<u8>)>,
    used: usize,
    /// Lower bound of what is in it.
    low: Vec<u8>,
}

impl Open {
    fn close(&mut self, level: u8) -> Option<(Vec<u8>, Page)> {
        let items: Vec<Item<'_>> = self.items.iter().map(|(k, v)| (&k[..], &v[..])).collect();
        let page = Page::build(level, &items).ok()?;
        let low = std::mem::take(&mut self.low);
        self.items.clear();
        self.used = 0;
        Some((low, page))
    }
}

/// Makes a page of a given level, and pages below it, of entries in ascending order.
#[derive(Default)]
pub struct Filler {
    levels: Vec<Open>,
    /// The last key.
    last: Vec<u8>,
    broken: bool,
}

impl std::fmt::Debug for Filler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filler {{ levels: {} }}", self.levels.len())
    }
}

impl Filler {
    /// Adds an entry.
    ///
    /// # Errors
    /// Those of `place`.
    pub fn push<E>(
        &mut self,
        key: &[u8],
        value: &[u8],
        place: &mut OnPage<'_, E>,
    ) -> Result<(), E> {
        // As a split does it: no longer than what tells the two sides apart.
        let shared = common(key, &self.last);
        let separator = key[..key.len().min(shared + 1)].to_vec();
        self.add(0, separator, (key.to_vec(), value.to_vec()), place)?;
        self.last = key.to_vec();
        Ok(())
    }

    fn add<E>(
        &mut self,
        level: usize,
        low: Vec<u8>,
        item: (Vec<u8>, Vec<u8>),
        place: &mut OnPage<'_, E>,
    ) -> Result<(), E> {
        if self.levels.len() <= level {
            self.levels.push(Open::default());
        }
        let open = &mut self.levels[level];
        if !open.items.is_empty() && open.used + entry_size(&item.0, &item.1) > CAPACITY {
            self.close(level, place)?;
        }
        let open = &mut self.levels[level];
        // The first key of an inner page is dropped.
        let dropped = open.items.is_empty() && level > 0;
        let key = if dropped { &[][..] } else { &item.0[..] };
        open.used += entry_size(key, &item.1);
        if open.items.is_empty() {
            open.low = low;
        }
        open.items.push(item);
        Ok(())
    }

    fn close<E>(&mut self, level: usize, place: &mut OnPage<'_, E>) -> Result<(), E> {
        let number = u8::try_from(level).unwrap_or(u8::MAX);
        let Some((low, page)) = self.levels[level].close(number) else {
            self.broken = true;
            return Ok(());
        };
        let id = place(page)?;
        let up = (low.clone(), id.to_le_bytes().to_vec());
        self.add(level + 1, low, up, place)
    }

    /// The topmost page: of this level, or of what level it comes to. Nothing if all that was added does not fit below one
    /// page of this level, or if nothing was added.
    ///
    /// # Errors
    /// Those of `place`.
    pub fn finish<E>(
        mut self,
        level: Option<u8>,
        place: &mut OnPage<'_, E>,
    ) -> Result<Option<Page>, E> {
        let mut at = 0;
        loop {
            let top = match level {
                Some(l) => at == usize::from(l),
                None => self.levels.len() == at + 1,
            };
            if top {
                let fits = self.levels.len() == at + 1 && !self.broken;
                let number = u8::try_from(at).unwrap_or(u8::MAX);
                let open = self
                    .levels
                    .last_mut()
                    .filter(|o| fits && !o.items.is_empty());
                return Ok(open.and_then(|o| o.close(number)).map(|(_, page)| page));
            }
            if self.levels.len() <= at {
                return Ok(None);
            }
            self.close(at, place)?;
            at += 1;
        }
    }
}
