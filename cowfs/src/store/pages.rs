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

pub use super::bitmap::Bitmap;
use super::disk::DiskFile;
use super::error::StoreError;
use super::superblock::{RUNS_MAX, Run, run_pages};
use crate::tree::{self, PAGE_SIZE, Page, PageId};

/// File name.
pub const FILE: &str = "meta";
/// The file grows by this many pages, reserved on the host so that a commit never runs out of space half way.
const GROW: u64 = 1024;
/// When the host has not that much, by this many.
const GROW_LITTLE: u64 = 64;
/// Places that only the undoing of a batch, replay and the blob of a commit may take: they must not fail.
pub const FLOOR: u64 = 64;
/// Pages in each of the two halves of the clean cache.
const CACHE_HALF: usize = 6 * 1024;

/// Pages by place.
pub type PageMap = FxHashMap<PageId, Arc<Page>>;

/// The pages of a store: dirty ones, those being committed, a cache of clean ones, and the file.
#[derive(Debug)]
pub struct Pages {
    file: Arc<dyn DiskFile>,
    /// Which pages are taken.
    pub bitmap: Bitmap,
    /// Changed since the last commit began.
    dirty: PageMap,
    /// Part of the commit that is being written.
    writing: Arc<PageMap>,
    young: PageMap,
    old: PageMap,
    /// What was `old` before, dropped a little at a time: thousands of pages at once take milliseconds.
    dying: std::collections::hash_map::IntoIter<PageId, Arc<Page>>,
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
    /// Free places that are not given out.
    pub floor: u64,
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
            writing: Arc::default(),
            young: FxHashMap::default(),
            old: FxHashMap::default(),
            dying: PageMap::default().into_iter(),
            generation: generation + 1,
            committed: generation,
            base: 0,
            deferred: Vec::new(),
            hold: false,
            garbage: 0,
            floor: FLOOR,
        }
    }

    /// Number of dirty pages.
    pub fn dirty_len(&self) -> usize {
        self.dirty.len()
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
        let missing = n - self.bitmap.free();
        self.grow(GROW.max(missing)).or_else(|e| {
            // On a disk that is nearly full a little may still be had.
            let little = GROW_LITTLE.max(missing);
            if matches!(e, StoreError::NoSpace) && little < GROW {
                self.grow(little)
            } else {
                Err(e)
            }
        })
    }

    fn grow(&mut self, n: u64) -> Result<(), StoreError> {
        let from = self.bitmap.len();
        self.file
            .allocate(from * PAGE_SIZE as u64, n * PAGE_SIZE as u64)
            .map_err(StoreError::io(FILE, "growing"))?;
        self.grown(from + n);
        Ok(())
    }

    /// The file has blocks for so many pages now.
    pub fn grown(&mut self, pages: u64) {
        self.bitmap.grow(pages);
        // Page 0 means none.
        self.bitmap.set(0);
    }

    /// Takes a place, growing the file when needed: nobody knows before how many a batch will need.
    fn take(&mut self) -> Result<PageId, StoreError> {
        if self.bitmap.free() <= self.floor {
            self.reserve(self.floor + 1)?;
        }
        self.bitmap.take().ok_or(StoreError::NoSpace)
    }

    fn cached(&mut self, id: PageId) -> Option<&Arc<Page>> {
        if !self.young.contains_key(&id) {
            let page = self.old.remove(&id)?;
            self.remember(id, page);
        }
        self.young.get(&id)
    }

    /// A page that is in memory, without counting it as used.
    pub fn peek(&self, id: PageId) -> Option<Arc<Page>> {
        let all = [&self.dirty, &*self.writing, &self.young, &self.old];
        all.iter().find_map(|m| m.get(&id)).map(Arc::clone)
    }

    fn remember(&mut self, id: PageId, page: Arc<Page>) {
        // Two for each that comes: through before the next half is.
        for _ in 0..2 {
            drop(self.dying.next());
        }
        if self.young.len() >= CACHE_HALF {
            let young = PageMap::with_capacity_and_hasher(CACHE_HALF, Default::default());
            let young = std::mem::replace(&mut self.young, young);
            self.dying = std::mem::replace(&mut self.old, young).into_iter();
        }
        self.young.insert(id, page);
    }

    /// Birth of a page that is in memory.
    fn birth_of(&self, id: PageId) -> Option<u64> {
        [&self.dirty, &*self.writing, &self.young, &self.old]
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

    /// Forgets what the file had at a place.
    pub fn forget_clean(&mut self, id: PageId) {
        self.young.remove(&id);
        self.old.remove(&id);
    }

    /// Begins a commit: what is dirty now becomes the commit's, and the generation moves on.
    /// Returns the pages to write and the places to free when the commit is durable.
    pub fn begin_commit(&mut self) -> (Arc<PageMap>, Vec<PageId>) {
        self.committed = self.generation;
        self.generation += 1;
        self.writing = Arc::new(std::mem::take(&mut self.dirty));
        let freed = if self.hold {
            Vec::new()
        } else {
            std::mem::take(&mut self.deferred)
        };
        (Arc::clone(&self.writing), freed)
    }

    /// Takes some pages of a commit that became durable to the clean cache.
    pub fn keep_written(&mut self, ids: &[PageId]) {
        for id in ids {
            // A place freed meanwhile is on the deferred list, so the page may stay in the cache till then.
            if let Some(page) = self.writing.get(id).map(Arc::clone) {
                self.remember(*id, page);
            }
        }
    }

    /// Ends a commit that became durable. The result may take long to drop.
    pub fn end_commit(&mut self) -> Arc<PageMap> {
        std::mem::take(&mut self.writing)
    }

    /// Frees places that a durable commit no longer needs.
    pub fn free_places(&mut self, ids: &[PageId]) {
        for &id in ids {
            self.free_now(id);
        }
    }

    /// Takes back a commit that could not be written: its pages are dirty again and belong to the next one.
    pub fn abort_commit(&mut self, freed: Vec<PageId>) {
        let writing = std::mem::take(&mut self.writing);
        let writing = Arc::try_unwrap(writing).unwrap_or_else(|shared| PageMap::clone(&shared));
        if self.dirty.is_empty() {
            self.dirty = writing;
        } else {
            self.dirty.extend(writing);
        }
        self.deferred.extend(freed);
    }

    /// Forgets that places are waiting for a commit which garbage collection is about to free: freed twice, a place
    /// could have two users.
    pub fn forget_deferred(&mut self, garbage: &Bitmap) {
        self.deferred.retain(|id| !garbage.is_set(*id));
    }

    /// Frees those of the places `from..to` that garbage collection found unreachable from the last commit and from all
    /// that came after it. Returns how many.
    pub fn free_garbage(&mut self, garbage: &Bitmap, from: u64, to: u64) -> u64 {
        let mut n = 0;
        for id in from..to.min(garbage.len()) {
            if garbage.is_set(id) {
                self.free_now(id);
                n += 1;
            }
        }
        n
    }

    /// Places for a commit's blob of `need` pages: those of the blob before the last one, and others when they are too
    /// few. On an error `spare` is as it was. Returns places of `spare` that were given up, and are free.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the host has none left.
    pub fn take_blob(&mut self, spare: &mut Vec<Run>, need: u64) -> Result<Vec<Run>, StoreError> {
        // Room for a catalog that grows, so that the next commits need none.
        let ample = need + need / 4 + 2;
        let have = run_pages(spare);
        if have >= need && have <= 2 * ample + 64 && spare.len() <= 16 {
            return Ok(Vec::new());
        }
        // Too few, too many, or in crumbs: a single run if there is one.
        if let Some(run) = self.bitmap.take_run(ample) {
            let released = std::mem::replace(spare, vec![run]);
            for r in &released {
                self.bitmap.clear_run(*r);
            }
            return Ok(released);
        }
        if have >= need {
            return Ok(Vec::new());
        }
        let room = RUNS_MAX - spare.len().min(RUNS_MAX);
        let more = match self.bitmap.take_runs(need - have, room) {
            Some(runs) => runs,
            None => {
                self.grow(ample - have)?;
                self.bitmap
                    .take_runs(need - have, room)
                    .ok_or(StoreError::NoSpace)?
            }
        };
        spare.extend(more);
        Ok(Vec::new())
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
        let new = self.take()?;
        tree::Pages::release(self, id);
        let slot = self.dirty.entry(new).or_insert_with(|| Arc::new(copy));
        Ok((new, Arc::make_mut(slot)))
    }

    fn alloc(&mut self) -> Result<(PageId, &mut Page), StoreError> {
        let id = self.take()?;
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
