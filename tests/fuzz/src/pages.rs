//! Tree pages in memory, made from an input: well formed in themselves more often than not, in any relation to each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cowfs::tree::{PAGE_SIZE, Page, PageId, Pages, TreeError};

use crate::Bytes;

/// The present generation; what a page of the input claims may be the same.
pub const GENERATION: u64 = 9;
const DATA_END: usize = PAGE_SIZE - 16;
/// Page reads in one run, of at most a few hundred operations on at most 255 pages.
const READS_MAX: u64 = 2_000_000;

/// The pages, as a store keeps them: what is not `fresh` is copied before it is changed.
#[derive(Debug, Default)]
pub struct MemPages {
    pages: BTreeMap<PageId, Arc<Page>>,
    fresh: BTreeSet<PageId>,
    next: PageId,
    reads: u64,
}

impl MemPages {
    /// Reads pages: their number, then each as level (with 0x80: entries stay in the input's order), birth, limit of the
    /// shared prefix, number of entries, entries (key, and value or child); then bytes to change in them.
    pub fn from_input(b: &mut Bytes<'_>) -> Self {
        let mut raw: Vec<_> = (0..b.u8().min(32)).map(|_| encode(b)).collect();
        for _ in 0..b.u8().min(16) {
            let (page, at, byte) = (b.u8(), b.u16(), b.u8());
            if let Some(p) = raw.get_mut(usize::from(page)) {
                p[usize::from(at) % PAGE_SIZE] = byte;
            }
        }
        let mut me = Self::default();
        for bytes in raw {
            me.next += 1;
            // A page that is refused is a hole in the store.
            if let Ok(page) = Page::from_bytes(bytes) {
                me.pages.insert(me.next, Arc::new(page));
            }
        }
        me
    }

    /// True if a page claims to be of the present generation, which no page of a commit is.
    pub fn claims_present(&self) -> bool {
        self.pages.values().any(|p| p.birth() >= GENERATION)
    }
}

fn encode(b: &mut Bytes<'_>) -> Box<[u8; PAGE_SIZE]> {
    let (level, birth, limit, count) = (b.u8(), b.u8(), b.u8(), b.u8());
    let inner = level & 0x7f > 0;
    let mut entries: Vec<(Vec<u8>, Vec<u8>)> = (0..count)
        .map(|_| {
            let key = b.short().to_vec();
            let value = if inner {
                u64::from(b.u8()).to_le_bytes().to_vec()
            } else {
                b.short().to_vec()
            };
            (key, value)
        })
        .collect();
    if level & 0x80 == 0 {
        entries.sort();
        entries.dedup_by(|a, b| a.0 == b.0);
    }
    if inner && let Some(e) = entries.first_mut() {
        e.0.clear();
    }
    let first = usize::from(inner);
    let keys = entries.get(first..).unwrap_or_default();
    let skip = match (keys.first(), keys.last()) {
        (Some(a), Some(b)) => a.0.iter().zip(&b.0).take_while(|(x, y)| x == y).count(),
        _ => 0,
    };
    let skip = skip.min(usize::from(limit));
    let mut page = Box::new([0; PAGE_SIZE]);
    page[..6].copy_from_slice(&[b'C', b'o', b'W', b't', 1, level & 0x7f]);
    let mut put = |at: usize, v: usize| page[at..at + 2].copy_from_slice(&(v as u16).to_le_bytes());
    let mut heap = DATA_END;
    let mut count = 0;
    let mut cells = Vec::new();
    for (key, value) in &entries {
        let size = 4 + key.len() + value.len();
        if 24 + 6 * (count + 1) + size > heap {
            break;
        }
        heap -= size;
        cells.push((heap, key, value));
        count += 1;
    }
    put(6, count);
    put(8, heap);
    put(10, DATA_END - heap);
    put(12, skip);
    page[16] = birth;
    for (i, (at, key, value)) in cells.into_iter().enumerate() {
        let mut head = [0; 4];
        if i >= first {
            for (h, k) in head.iter_mut().zip(&key[skip.min(key.len())..]) {
                *h = *k;
            }
        }
        head.reverse();
        page[24 + 6 * i..28 + 6 * i].copy_from_slice(&head);
        page[28 + 6 * i..30 + 6 * i].copy_from_slice(&(at as u16).to_le_bytes());
        page[at..at + 2].copy_from_slice(&(key.len() as u16).to_le_bytes());
        page[at + 2..at + 4].copy_from_slice(&(value.len() as u16).to_le_bytes());
        let at = at + 4;
        page[at..at + key.len()].copy_from_slice(key);
        page[at + key.len()..at + key.len() + value.len()].copy_from_slice(value);
    }
    page
}

impl Pages for MemPages {
    type Error = TreeError;

    fn read(&mut self, id: PageId) -> Result<Arc<Page>, TreeError> {
        self.reads += 1;
        assert!(self.reads < READS_MAX, "an endless walk");
        self.pages.get(&id).cloned().ok_or(TreeError::Corrupt {
            page: id,
            what: "there is no such page",
        })
    }

    fn modify(&mut self, id: PageId) -> Result<(PageId, &mut Page), TreeError> {
        let mut to = id;
        if !self.fresh.contains(&id) {
            let mut copy = Page::clone(&*self.read(id)?);
            copy.set_birth(GENERATION);
            self.next += 1;
            to = self.next;
            self.fresh.insert(to);
            self.pages.insert(to, Arc::new(copy));
        }
        let page = self.pages.get_mut(&to).expect("it was just there");
        Ok((to, Arc::make_mut(page)))
    }

    fn alloc(&mut self) -> Result<(PageId, &mut Page), TreeError> {
        self.next += 1;
        let mut page = Page::empty_leaf();
        page.set_birth(GENERATION);
        self.fresh.insert(self.next);
        let slot = self.pages.entry(self.next).or_insert(Arc::new(page));
        Ok((self.next, Arc::make_mut(slot)))
    }

    fn release(&mut self, id: PageId) {
        if self.fresh.remove(&id) {
            self.pages.remove(&id);
        }
    }

    fn is_owned(&self, page: &Page) -> bool {
        page.birth() == GENERATION
    }
}
