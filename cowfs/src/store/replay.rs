//! Replay of the log when a store is opened.

use std::sync::MutexGuard;

use super::error::StoreError;
use super::log::{self, Record};
use super::segments::Place;
use super::superblock::Superblock;
use super::{Catalog, CatalogOp, Core, Store, pages};
use crate::tree;

impl Store {
    /// Replays the log after opening, and commits what it brought.
    pub(super) fn replay(&self, sb: &Superblock) -> Result<(), StoreError> {
        let mut applied = 0u64;
        self.core()?.pages.floor = 0;
        let end = log::replay(
            self.disk.as_ref(),
            sb.log as usize,
            sb.chain,
            sb.last_seq,
            &mut |last, payload| {
                // A chunk that the commit holds whole: its data may have been replaced since.
                if last <= sb.last_seq {
                    return Ok(());
                }
                let mut rest = payload;
                while let Some(record) = log::next_record(&mut rest)? {
                    self.replay_record(&record, sb.generation)?;
                    applied += 1;
                }
                Ok(())
            },
        )?;
        {
            let mut state = self.flush_state();
            state.flushed = end.last_seq.max(sb.last_seq);
            // Go on behind what was replayed. If that began in one file and ended in the other, the first is needed until
            // a commit is durable, as after a commit that failed.
            state.log = log::Log::open(self.disk.as_ref(), end.file, end.pos, end.chain)?;
            if end.file != sb.log as usize {
                state.switched = Some(end.first_chain);
                state.sync_all = true;
            }
            let mut core = self.core()?;
            core.seq = core.seq.max(end.last_seq);
            core.pages.floor = pages::FLOOR;
        }
        if end.chunks > 0 {
            tracing::info!(
                records = applied,
                chunks = end.chunks,
                "replayed the log after an unclean end"
            );
            match self.commit() {
                // As long as the log is there, nothing is lost by going on.
                Err(StoreError::NoSpace) => {
                    tracing::warn!("the disk is full: what was replayed is still in the log only");
                    self.want(|w| w.commit = true);
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn replay_record(&self, record: &Record<'_>, durable: u64) -> Result<(), StoreError> {
        match *record {
            Record::Data {
                segment,
                offset,
                bytes,
            } => {
                if segment >= self.segments.next_segment()
                    || offset.saturating_add(bytes.len() as u64) > super::segments::SEGMENT_BYTES
                {
                    return Err(StoreError::corrupt(
                        "log",
                        "a data record outside of any segment",
                    ));
                }
                self.segments.write(Place { segment, offset }, bytes)
            }
            Record::Batch {
                seq,
                generation,
                head,
                mut changes,
            } => {
                let Some(mut guard) = self.core_for(seq, generation)? else {
                    return Ok(());
                };
                let core = &mut *guard;
                core.pages.generation = core.pages.generation.max(generation).max(durable + 1);
                let h = core.catalog.head_by_id(head).ok_or_else(|| {
                    StoreError::corrupt(
                        "log",
                        format!("a batch for head {head}, which is not there"),
                    )
                })?;
                core.pages.base = h.base;
                while let Some((key, value)) = log::next_change(&mut changes)? {
                    let (root, _) = match value {
                        Some(v) => tree::insert(&mut core.pages, h.root, key, v)?,
                        None => tree::remove(&mut core.pages, h.root, key)?,
                    };
                    h.root = root;
                    if let Some(ino) = crate::fs::inode_of_key(key) {
                        if ino >= crate::fs::INO_END {
                            return Err(StoreError::corrupt(
                                "log",
                                "an inode number of impossible size",
                            ));
                        }
                        h.next_ino = h.next_ino.max(ino + 1);
                    }
                }
                core.seq = seq;
                Ok(())
            }
            Record::Catalog {
                seq,
                generation,
                json,
            } => {
                let Some(mut guard) = self.core_for(seq, generation)? else {
                    return Ok(());
                };
                let core = &mut *guard;
                let op: CatalogOp = serde_json::from_slice(json)
                    .map_err(|e| StoreError::corrupt("log", format!("a catalog record: {e}")))?;
                core.pages.generation = core.pages.generation.max(generation);
                let generation = core.pages.generation;
                core.catalog.apply(&op, generation)?;
                if Catalog::fixes_state(&op) {
                    core.pages.generation += 1;
                }
                core.seq = seq;
                Ok(())
            }
        }
    }

    /// The core, to replay the record of this number; nothing if the commit holds it. Refuses numbers that counting can
    /// never have come to: there would be none after them.
    fn core_for(
        &self,
        seq: u64,
        generation: u64,
    ) -> Result<Option<MutexGuard<'_, Core>>, StoreError> {
        if seq > u64::MAX / 2 || generation > u64::MAX / 2 {
            return Err(StoreError::corrupt(
                "log",
                "a record number or generation of impossible size",
            ));
        }
        let core = self.core()?;
        Ok((seq > core.seq).then_some(core))
    }
}
