//! The page file `meta`: tree pages at fixed 4 KiB places, copied on write by generation.
//!
//! A page that was allocated in the current generation is changed in place, in memory. Any older page may be part of a
//! checkpoint, or of a commit that is being written, so a change copies it to a new place. What becomes of the old place
//! depends on its birth:
//!
//! - at or before the head's base generation: some checkpoint may share it; garbage collection finds out;
//! - after the base, but part of a commit: free once a commit without it is durable;
//! - after the last commit began: free at once.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::disk::DiskFile;
use super::error::StoreError;
use crate::tree::{self, PAGE_SIZE, Page, PageId};

/// File name.
pub const FILE: &str = "meta";
/// The file grows by this many pages, reserved on the host so that a commit never runs out of space half way.
const GROW: u64 = 1024;
/// Pages in each of the two halves of the clean cache.
const CACHE_HALF: usize = 6 * 1024;

/// A bit per page.
#[derive(Debug, Clone, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: u64,
    free: u64,
    hint: usize,
}

impl Bitmap {
    /// From little-endian words that cover `bits` pages.
    pub fn from_bytes(bytes: &[u8], bits: u64) -> Option<Self> {
        let n = usize::try_from(bits.div_ceil(64)).ok()?;
        if bytes.len() != n * 8 {
            return None;
        }
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|c| c.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b)))
            .collect();
        let used: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
        Some(Self {
            words,
            bits,
            free: bits.checked_sub(used)?,
            hint: 0,
        })
    }

    /// Little-endian words.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// Pages covered.
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Free pages.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Makes room for more pages, free.
    pub fn grow(&mut self, bits: u64) {
        if bits > self.bits {
            self.free += bits - self.bits;
            self.bits = bits;
            self.words
                .resize(usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX), 0);
        }
    }

    /// Cuts free pages off the end.
    pub fn shrink(&mut self, bits: u64) {
        if bits < self.bits {
            self.free -= self.bits - bits;
            self.bits = bits;
            self.words
                .truncate(usize::try_from(bits.div_ceil(64)).unwrap_or(0));
        }
    }

    fn place(bit: u64) -> (usize, u64) {
        (
            usize::try_from(bit / 64).unwrap_or(usize::MAX),
            1 << (bit % 64),
        )
    }

    /// True if the page is taken.
    pub fn is_set(&self, bit: u64) -> bool {
        let (w, m) = Self::place(bit);
        self.words.get(w).is_some_and(|v| v & m != 0)
    }

    /// Takes a page; false if it was taken or does not exist.
    pub fn set(&mut self, bit: u64) -> bool {
        let (w, m) = Self::place(bit);
        if bit >= self.bits || self.words[w] & m != 0 {
            return false;
        }
        self.words[w] |= m;
        self.free -= 1;
        true
    }

    /// Frees a page; false if it was free.
    pub fn clear(&mut self, bit: u64) -> bool {
        let (w, m) = Self::place(bit);
        if bit >= self.bits || self.words[w] & m == 0 {
            return false;
        }
        self.words[w] &= !m;
        self.free += 1;
        self.hint = self.hint.min(w);
        true
    }

    /// Takes the first free page.
    pub fn take(&mut self) -> Option<u64> {
        for w in self.hint..self.words.len() {
            let free = !self.words[w];
            if free != 0 {
                let bit = w as u64 * 64 + u64::from(free.trailing_zeros());
                if bit >= self.bits {
                    return None;
                }
                self.hint = w;
                self.set(bit);
                return Some(bit);
            }
        }
        None
    }

    /// Takes `n` pages in a row, growing the map at the end if there is no such run.
    pub fn take_run(&mut self, n: u64) -> u64 {
        let (mut start, mut len) = (0, 0);
        for bit in 1..self.bits {
            if self.is_set(bit) {
                len = 0;
            } else {
                if len == 0 {
                    start = bit;
                }
                len += 1;
                if len == n {
                    break;
                }
            }
        }
        if len < n {
            if len == 0 {
                start = self.bits;
            }
            self.grow(start + n);
        }
        for bit in start..start + n {
            self.set(bit);
        }
        start
    }
}

/// The pages of a store: dirty ones, those being committed, a cache of clean ones, and the file.
#[derive(Debug)]
pub struct Pages {
    file: Arc<dyn DiskFile>,
    /// Which pages are taken.
    pub bitmap: Bitmap,
    /// Changed since the last commit began.
    dirty: FxHashMap<PageId, Arc<Page>>,
    /// Part of the commit that is being written.
    writing: FxHashMap<PageId, Arc<Page>>,
    young: FxHashMap<PageId, Arc<Page>>,
    old: FxHashMap<PageId, Arc<Page>>,
    /// Current generation.
    pub generation: u64,
    /// Newest generation that a commit (begun or done) holds.
    pub committed: u64,
    /// Base generation of the head in use.
    pub base: u64,
    /// Freed, but part of the last durable commit: free when the next one is.
    deferred: Vec<PageId>,
    /// While garbage is collected, places are not given out again.
    pub hold: bool,
    /// Pages left for garbage collection since the last one (an estimate).
    pub garbage: u64,
}

impl Pages {
    /// Pages over a file; page 0 is never used.
    pub fn new(file: Arc<dyn DiskFile>, bitmap: Bitmap, generation: u64) -> Self {
        let mut bitmap = bitmap;
        bitmap.set(0);
        Self {
            file,
            bitmap,
            dirty: FxHashMap::default(),
            writing: FxHashMap::default(),
            young: FxHashMap::default(),
            old: FxHashMap::default(),
            generation: generation + 1,
            committed: generation,
            base: 0,
            deferred: Vec::new(),
            hold: false,
            garbage: 0,
        }
    }

    /// Number of dirty pages.
    pub fn dirty_len(&self) -> usize {
        self.dirty.len()
    }

    /// True while a commit's pages are being written.
    pub fn is_writing(&self) -> bool {
        !self.writing.is_empty()
    }

    /// The file.
    pub fn file(&self) -> Arc<dyn DiskFile> {
        Arc::clone(&self.file)
    }

    /// Makes sure that `n` pages can be taken.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the host has none left.
    pub fn reserve(&mut self, n: u64) -> Result<(), StoreError> {
        if self.bitmap.free() >= n {
            return Ok(());
        }
        let from = self.bitmap.len();
        let grow = GROW.max(n);
        self.file
            .allocate(from * PAGE_SIZE as u64, grow * PAGE_SIZE as u64)
            .map_err(StoreError::io(FILE, "growing"))?;
        self.bitmap.grow(from + grow);
        // Page 0 means none.
        self.bitmap.set(0);
        Ok(())
    }

    fn cached(&mut self, id: PageId) -> Option<&Arc<Page>> {
        if !self.young.contains_key(&id) {
            let page = self.old.remove(&id)?;
            self.remember(id, page);
        }
        self.young.get(&id)
    }

    fn remember(&mut self, id: PageId, page: Arc<Page>) {
        if self.young.len() >= CACHE_HALF {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(id, page);
    }

    /// Birth of a page that is in memory.
    fn birth_of(&self, id: PageId) -> Option<u64> {
        [&self.dirty, &self.writing, &self.young, &self.old]
            .iter()
            .find_map(|m| m.get(&id))
            .map(|p| p.birth())
    }

    /// Forgets a page that nothing durable or checkpointed reaches.
    fn free_now(&mut self, id: PageId) {
        self.dirty.remove(&id);
        self.young.remove(&id);
        self.old.remove(&id);
        self.bitmap.clear(id);
    }

    /// Begins a commit: what is dirty now becomes the commit's, and the generation moves on.
    /// Returns the pages to write and the places to free when the commit is durable.
    pub fn begin_commit(&mut self) -> (Vec<(PageId, Arc<Page>)>, Vec<PageId>) {
        self.committed = self.generation;
        self.generation += 1;
        self.writing = std::mem::take(&mut self.dirty);
        let mut list: Vec<_> = self
            .writing
            .iter()
            .map(|(id, p)| (*id, Arc::clone(p)))
            .collect();
        list.sort_unstable_by_key(|(id, _)| *id);
        let freed = if self.hold {
            Vec::new()
        } else {
            std::mem::take(&mut self.deferred)
        };
        (list, freed)
    }

    /// Ends a commit that became durable.
    pub fn end_commit(&mut self, freed: &[PageId]) {
        for (id, page) in std::mem::take(&mut self.writing) {
            // A place freed meanwhile is on the deferred list, so the page may stay in the cache till then.
            self.remember(id, page);
        }
        for &id in freed {
            self.free_now(id);
        }
    }

    /// Takes back a commit that could not be written: its pages are dirty again and belong to the next one.
    pub fn abort_commit(&mut self, freed: Vec<PageId>) {
        for (id, page) in std::mem::take(&mut self.writing) {
            self.dirty.insert(id, page);
        }
        self.deferred.extend(freed);
    }

    /// Frees a place when the next commit is durable.
    pub fn free_later(&mut self, id: PageId) {
        self.deferred.push(id);
    }

    /// Frees places that garbage collection found unreachable from the last commit and from all that came after it.
    /// Returns how many.
    pub fn free_garbage(&mut self, garbage: &Bitmap) -> u64 {
        // They may be waiting for a commit as well; freed twice, a place could have two users.
        self.deferred.retain(|id| !garbage.is_set(*id));
        let mut n = 0;
        for id in 0..garbage.len() {
            if garbage.is_set(id) {
                self.free_now(id);
                n += 1;
            }
        }
        self.garbage = 0;
        n
    }

    /// Takes a run of pages for a commit's blob.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the host has none left.
    pub fn take_blob(&mut self, n: u64) -> Result<PageId, StoreError> {
        let before = self.bitmap.len();
        let first = self.bitmap.take_run(n);
        let after = self.bitmap.len();
        if after > before {
            let grown = self
                .file
                .allocate(
                    before * PAGE_SIZE as u64,
                    (after - before) * PAGE_SIZE as u64,
                )
                .map_err(StoreError::io(FILE, "growing"));
            if let Err(e) = grown {
                for id in first..first + n {
                    self.bitmap.clear(id);
                }
                self.bitmap.shrink(before);
                return Err(e);
            }
        }
        Ok(first)
    }
}

/// Reads and validates a page of the file.
///
/// # Errors
/// Host errors; corrupt when the checksum or the structure is wrong.
pub fn read_page(file: &dyn DiskFile, pages: u64, id: PageId) -> Result<Arc<Page>, StoreError> {
    if id == 0 || id >= pages {
        return Err(StoreError::corrupt(
            FILE,
            format!("a pointer to page {id}, which is outside of the file"),
        ));
    }
    let mut buf = Box::new([0; PAGE_SIZE]);
    file.read_at(&mut buf[..], id * PAGE_SIZE as u64)
        .map_err(StoreError::io(FILE, "reading"))?;
    let page =
        Page::from_bytes(buf).map_err(|e| StoreError::corrupt(FILE, format!("page {id}: {e}")))?;
    if !page.verify_sum(id) {
        return Err(StoreError::corrupt(
            FILE,
            format!("page {id} has a wrong checksum"),
        ));
    }
    Ok(Arc::new(page))
}

impl tree::Pages for Pages {
    type Error = StoreError;

    fn read(&mut self, id: PageId) -> Result<Arc<Page>, StoreError> {
        if let Some(p) = self.dirty.get(&id) {
            return Ok(Arc::clone(p));
        }
        if let Some(p) = self.writing.get(&id) {
            return Ok(Arc::clone(p));
        }
        if let Some(p) = self.cached(id) {
            return Ok(Arc::clone(p));
        }
        let page = read_page(self.file.as_ref(), self.bitmap.len(), id)?;
        self.remember(id, Arc::clone(&page));
        Ok(page)
    }

    fn modify(&mut self, id: PageId) -> Result<(PageId, &mut Page), StoreError> {
        let generation = self.generation;
        if self.dirty.get(&id).is_some_and(|p| p.birth() == generation) {
            let page = self.dirty.get_mut(&id).ok_or(StoreError::NoSpace)?;
            return Ok((id, Arc::make_mut(page)));
        }
        let mut copy = Page::clone(&*tree::Pages::read(self, id)?);
        copy.set_birth(generation);
        let new = self.bitmap.take().ok_or(StoreError::NoSpace)?;
        tree::Pages::release(self, id);
        let slot = self.dirty.entry(new).or_insert_with(|| Arc::new(copy));
        Ok((new, Arc::make_mut(slot)))
    }

    fn alloc(&mut self) -> Result<(PageId, &mut Page), StoreError> {
        let id = self.bitmap.take().ok_or(StoreError::NoSpace)?;
        let mut page = Page::empty_leaf();
        page.set_birth(self.generation);
        let slot = self.dirty.entry(id).or_insert_with(|| Arc::new(page));
        Ok((id, Arc::make_mut(slot)))
    }

    fn is_owned(&self, page: &Page) -> bool {
        page.birth() == self.generation
    }

    fn release(&mut self, id: PageId) {
        match self.birth_of(id) {
            Some(birth) if birth > self.base => {
                if birth > self.committed {
                    self.free_now(id);
                } else {
                    self.deferred.push(id);
                }
            }
            _ => self.garbage += 1,
        }
    }
}
