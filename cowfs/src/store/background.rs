//! The background thread: flushes, commits and collections, when they are due or asked for.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Ordering, Store};
use crate::tree::PAGE_SIZE;

/// Dirty pages at which a commit begins.
pub(super) const DIRTY_PAGES: usize = 10 * 1024;
/// Freed data at which a commit begins, so that the space can be used again.
pub(super) const FREED_BYTES: u64 = 512 << 20;
/// Log length at which a commit begins.
const LOG_BYTES: u64 = 24 << 20;
/// Log length at which a commit begins when nothing has happened since the last flush: then it disturbs nobody, and the
/// space comes back.
const IDLE_LOG_BYTES: u64 = 1 << 20;
/// A flush happens at least this often when there is something to flush.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// With fewer free places `meta` grows, by so many.
pub(super) const GROW_AT: u64 = 2048;
/// Collections that fail are not begun again by themselves for this long, then for twice as long, up to an hour.
const GC_WAIT: Duration = Duration::from_secs(30);

/// When a collection may begin by itself after failed ones.
#[derive(Debug, Default)]
pub(super) struct Backoff(Mutex<Option<(Instant, Duration)>>);

impl Backoff {
    fn with<T>(&self, f: impl FnOnce(&mut Option<(Instant, Duration)>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn may_go(&self) -> bool {
        self.with(|b| b.is_none_or(|(since, wait)| since.elapsed() >= wait))
    }

    fn ok(&self) {
        self.with(|b| *b = None);
    }

    fn failed(&self) {
        self.with(|b| {
            let wait = b.map_or(GC_WAIT, |(_, w)| (w * 2).min(Duration::from_secs(3600)));
            *b = Some((Instant::now(), wait));
        });
    }
}

impl Store {
    /// Starts the thread that flushes, commits and collects garbage in the background.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start_background(self: &Arc<Self>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let store = Arc::clone(self);
        std::thread::Builder::new()
            .name("cowfs-store".into())
            .spawn(move || store.background())
    }

    fn background(self: &Arc<Self>) {
        let mut last_flush = Instant::now();
        let mut last_seq = None;
        loop {
            let (got, due) = {
                let mut w = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    let due = w.flush || w.commit || w.gc || last_flush.elapsed() >= FLUSH_EVERY;
                    if due || w.stop || w.grow {
                        break (std::mem::take(&mut *w), due);
                    }
                    let left = FLUSH_EVERY.saturating_sub(last_flush.elapsed());
                    w = self
                        .wake
                        .wait_timeout(w, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            };
            if got.stop {
                return;
            }
            self.grow_ahead();
            if !due {
                continue;
            }
            last_flush = Instant::now();
            self.no_room.store(false, Ordering::Relaxed);
            if let Err(e) = self.flush_all() {
                tracing::error!(error = %e, "flush failed; it will be tried again");
            }
            let seq = self.core().ok().map(|c| c.seq);
            let idle = seq == last_seq;
            last_seq = seq;
            if (got.commit || self.commit_is_due(idle))
                && let Err(e) = self.commit()
            {
                tracing::error!(error = %e, "commit failed; it will be tried again");
            }
            if got.gc || (self.gc_backoff.may_go() && self.gc_is_due()) {
                self.spawn_gc();
            }
        }
    }

    /// Gets space that will be needed soon from the host, so that nobody waits for it under a lock.
    fn grow_ahead(&self) {
        self.segments.make_next();
        let Ok(core) = self.core() else { return };
        if core.pages.bitmap.free() >= GROW_AT || core.pages.dirty_len() == 0 {
            return;
        }
        let (file, from) = (core.pages.file(), core.pages.bitmap.len());
        drop(core);
        // Reserving twice does no harm, should a batch do the same meanwhile.
        let grow = GROW_AT * PAGE_SIZE as u64;
        if file.allocate(from * PAGE_SIZE as u64, grow).is_err() {
            // Batches will find out, or the host has room again by then.
            self.no_room.store(true, Ordering::Relaxed);
        } else if let Ok(mut core) = self.core() {
            core.pages.grown(from + GROW_AT);
        }
    }

    /// Collects garbage in a thread of its own, so that flushes go on meanwhile; one that runs goes on with another
    /// collection afterwards.
    fn spawn_gc(self: &Arc<Self>) {
        self.gc_again.store(true, Ordering::Release);
        if self.gc_busy.swap(true, Ordering::AcqRel) {
            return;
        }
        let store = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("cowfs-gc".into())
            .spawn(move || {
                super::sys::lower_priority();
                loop {
                    while store.gc_again.swap(false, Ordering::AcqRel) {
                        match store.gc() {
                            Ok(_) => store.gc_backoff.ok(),
                            Err(e) => {
                                store.gc_backoff.failed();
                                tracing::error!(error = %e, "garbage collection failed");
                            }
                        }
                    }
                    store.gc_busy.store(false, Ordering::Release);
                    // Somebody may have asked since the last look and left it to this thread.
                    let again = store.gc_again.load(Ordering::Acquire);
                    if !again || store.gc_busy.swap(true, Ordering::AcqRel) {
                        return;
                    }
                }
            });
        match spawned {
            Ok(thread) => *self.gc_thread() = Some(thread),
            Err(e) => {
                self.gc_busy.store(false, Ordering::Release);
                self.gc_backoff.failed();
                tracing::error!(error = %e, "no thread for garbage collection");
            }
        }
    }

    fn gc_thread(&self) -> std::sync::MutexGuard<'_, Option<std::thread::JoinHandle<()>>> {
        self.gc_thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of a collection in the background, which [`Store::stop_background`] has asked for.
    pub fn join_gc(&self) {
        let thread = self.gc_thread().take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn commit_is_due(&self, idle: bool) -> bool {
        let log = self.flush_state().log.used();
        self.core().is_ok_and(|c| {
            log > if idle { IDLE_LOG_BYTES } else { LOG_BYTES }
                || c.pages.dirty_len() > DIRTY_PAGES
                || c.freed_bytes > FREED_BYTES
        })
    }

    /// True when a quarter of the pages, or much file data, may be garbage.
    fn gc_is_due(&self) -> bool {
        if self.gc_lock.try_lock().is_err() {
            return false;
        }
        self.core().is_ok_and(|c| {
            c.pages.garbage > 4096.max(c.pages.bitmap.len() / 4) || c.garbage_bytes > 1 << 30
        })
    }

    /// Ends the background thread's loop.
    pub fn stop_background(&self) {
        self.gc_stop.store(true, Ordering::Relaxed);
        self.want(|w| w.stop = true);
    }
}
