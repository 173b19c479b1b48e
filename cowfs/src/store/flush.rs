//! Flushes: making records durable by the log.
//!
//! Order on disk, which is what makes a crash leave a prefix: file data of the records (synced in place, or, if little,
//! copied into the chunk), then the chunk, synced.

use std::time::Instant;

use super::error::StoreError;
use super::segments::Place;
use super::{Core, FlushState, Ordering, QUICK_US, Store, log};
use crate::fault;

/// Up to this much unsynced file data is copied into the log instead of being synced in place.
const EMBED_BYTES: u64 = 256 << 10;
const EMBED_PIECES: usize = 512;
/// Bytes of records in memory beyond which a batch waits for a flush first.
const LOG_MAX: u64 = 128 << 20;

impl Store {
    /// Makes all records up to `seq` durable.
    ///
    /// # Errors
    /// What the host says; the records are kept and tried again.
    pub fn flush(&self, seq: u64) -> Result<(), StoreError> {
        let mut state = self.flush_state();
        if state.flushed >= seq {
            return Ok(());
        }
        let done = self.flush_locked(&mut state);
        drop(state);
        self.or_commit(done)
    }

    /// As [`Store::sync`], if that is sure to take little time: nobody else flushes, there is little to flush, and flushes
    /// are quick on this disk. False when it was not done. Waking another thread for the requests that come meanwhile would
    /// cost more than such a flush.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn sync_at_once(&self) -> Result<bool, StoreError> {
        if self.flush_us.load(Ordering::Relaxed) >= QUICK_US {
            return Ok(false);
        }
        let Ok(mut state) = self.flush.try_lock() else {
            return Ok(false);
        };
        if state.sync_all || !state.pending.is_empty() || self.segments.is_crowded() {
            return Ok(false);
        }
        {
            let core = self.core()?;
            let little = core.unsynced_bytes <= EMBED_BYTES
                && core.unsynced.len() <= EMBED_PIECES
                && core.log_buf.len() as u64 <= EMBED_BYTES;
            if !little {
                return Ok(false);
            }
        }
        match self.flush_locked(&mut state) {
            Ok(()) => Ok(true),
            // That takes a commit.
            Err(StoreError::NoSpace) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Makes everything that happened so far durable.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn flush_all(&self) -> Result<(), StoreError> {
        let mut state = self.flush_state();
        let done = self.flush_locked(&mut state);
        drop(state);
        self.or_commit(done)
    }

    /// Records that the log has no room for go with a commit, which needs none.
    fn or_commit(&self, flushed: Result<(), StoreError>) -> Result<(), StoreError> {
        match flushed {
            Err(StoreError::NoSpace) => self.commit(),
            other => other,
        }
    }

    /// Flushes when so many records wait that a batch must not add to them.
    pub(super) fn push_back(&self) -> Result<(), StoreError> {
        // No commit here, whatever the error: the caller may hold the gate, and a commit waits for it.
        let done = self.flush_locked(&mut self.flush_state());
        if done.is_err() {
            self.want(|w| w.commit = true);
        }
        done
    }

    /// True when more records wait in memory than is good.
    pub(super) fn is_overfull(&self, core: &Core) -> bool {
        core.log_buf.len() as u64 + self.waiting.load(Ordering::Relaxed) > LOG_MAX
    }

    pub(super) fn flush_locked(&self, state: &mut FlushState) -> Result<(), StoreError> {
        let last = {
            let mut core = self.core()?;
            let core = &mut *core;
            if state.pending.is_empty() {
                std::mem::swap(&mut state.pending, &mut core.log_buf);
            } else {
                state.pending.append(&mut core.log_buf);
            }
            state.pending_data.append(&mut core.unsynced);
            core.unsynced_bytes = 0;
            // Until they are durable.
            let waiting = state.pending.len() as u64;
            self.waiting.store(waiting, Ordering::Relaxed);
            core.seq
        };
        if state.pending.is_empty() && state.pending_data.is_empty() {
            state.flushed = last;
            return Ok(());
        }
        let begun = Instant::now();
        fault::point("flush:data");
        let embedded = if state.sync_all {
            self.segments.sync()?;
            Vec::new()
        } else {
            self.embed_or_sync(&state.pending_data)?
        };
        fault::point("flush:chunk");
        let first = state.flushed + 1;
        let FlushState { log, pending, .. } = state;
        log.append(first, last, &[&embedded, pending])?;
        fault::point("flush:done");
        state.pending.clear();
        // One flush of very much must not keep the memory for ever.
        state.pending.shrink_to(8 << 20);
        state.pending_data.clear();
        state.flushed = last;
        self.waiting.store(0, Ordering::Relaxed);
        let us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let before = self.flush_us.load(Ordering::Relaxed);
        // Under the lock of `state`, so nothing is lost between the two.
        self.flush_us
            .store((before * 7 + us.min(1 << 30)) / 8, Ordering::Relaxed);
        Ok(())
    }

    /// Data records for the chunk, or nothing after a sync of the segments.
    fn embed_or_sync(&self, data: &[(u32, u64, u32)]) -> Result<Vec<u8>, StoreError> {
        let bytes: u64 = data.iter().map(|d| u64::from(d.2)).sum();
        if bytes > EMBED_BYTES || data.len() > EMBED_PIECES || self.segments.is_crowded() {
            self.segments.sync()?;
            return Ok(Vec::new());
        }
        let mut out = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0) + data.len() * 32);
        let mut buf = Vec::new();
        for &(segment, offset, len) in data {
            buf.resize(len as usize, 0);
            // Written since the last flush: not packed.
            self.segments
                .read_unpacked(Place { segment, offset }, &mut buf)?;
            log::push_data(&mut out, segment, offset, &buf);
        }
        Ok(out)
    }
}
