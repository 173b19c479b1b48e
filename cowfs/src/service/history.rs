//! Packing, pruning, sending and receiving.

use std::collections::{BTreeSet, HashSet};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Service, micros};
use crate::control::{Answer, Failure};
use crate::history::prune::{self, Rules};
use crate::history::{self as transfer, SendOptions, TransferError};
use crate::names;
use crate::store::packs::PackOptions;
use crate::store::{CatalogOp, Store, StoreError, now_us};

/// Packing by age looks for something to do at least this often.
const PACK_EVERY: Duration = Duration::from_secs(3600);

/// How long what a broken receive has left is kept, microseconds: seven days.
const RECEIVE_KEPT_US: i64 = 7 * 86_400_000_000;

impl Service {
    /// Runs something long in a thread of low priority, so that it does not slow what is mounted.
    pub(super) fn low(
        &self,
        f: impl FnOnce(&Store) -> Result<Answer, StoreError> + Send + 'static,
    ) -> Result<Answer, Failure> {
        // Without a mount nobody is slowed.
        if crate::mount::lock(&self.mounts).is_empty() {
            return Ok(f(&self.store)?);
        }
        let store = Arc::clone(&self.store);
        let done = std::thread::Builder::new()
            .name("cowfs-low".into())
            .spawn(move || {
                Store::lower_priority();
                f(&store)
            })
            .map_err(|e| Failure::new(format!("no thread for it: {e}")))?
            .join();
        match done {
            Ok(r) => Ok(r?),
            Err(_) => Err(Failure::new("it stopped after an internal error")),
        }
    }

    pub(super) fn pack(
        &self,
        head: Option<&str>,
        checkpoints: &[String],
        level: i32,
    ) -> Result<Answer, Failure> {
        let catalog = self.store.catalog()?;
        let mut ids = Vec::new();
        for name in checkpoints {
            ids.push(names::resolve(&catalog, head, name)?.id);
        }
        drop(catalog);
        let options = PackOptions {
            whole: !ids.is_empty(),
            checkpoints: ids,
            level,
        };
        self.low(move |s| Ok(Answer::Packed(s.pack(&options)?)))
    }

    /// Packs by itself, while anything is mounted, what only checkpoints older than this hold.
    pub(super) fn pack_by_age(self: &Arc<Self>, age_us: i64) -> std::io::Result<()> {
        // The last one that was asked for counts.
        if self.pack_age_us.swap(age_us, Ordering::AcqRel) > 0 {
            return Ok(());
        }
        let service = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("cowfs-packer".into())
            .spawn(move || {
                Store::lower_priority();
                let mut last: Vec<u64> = Vec::new();
                let mut waited = Duration::ZERO;
                loop {
                    std::thread::sleep(Duration::from_millis(500));
                    waited += Duration::from_millis(500);
                    let Some(s) = service.upgrade() else { return };
                    let age_us = s.pack_age_us.load(Ordering::Acquire);
                    let every = Duration::from_micros(age_us.unsigned_abs()).min(PACK_EVERY);
                    if waited < every {
                        continue;
                    }
                    waited = Duration::ZERO;
                    if let Err(e) = s.pack_older(now_us().saturating_sub(age_us), &mut last) {
                        tracing::error!(error = %e, "packing by itself failed; it will be tried again");
                    }
                }
            })
            .map(drop)
    }

    fn pack_older(&self, than_us: i64, last: &mut Vec<u64>) -> Result<(), StoreError> {
        let catalog = self.store.catalog()?;
        let old = catalog.checkpoints.values();
        let ids: Vec<u64> = old
            .filter(|c| c.created_us < than_us)
            .map(|c| c.id)
            .collect();
        drop(catalog);
        // Nothing has become old, and nothing was given up, since the last time.
        if ids.is_empty() || ids == *last {
            return Ok(());
        }
        let options = PackOptions {
            checkpoints: ids.clone(),
            whole: false,
            level: PackOptions::LEVEL,
        };
        let done = self.store.pack(&options)?;
        tracing::info!(
            packed = done.packed_bytes,
            stored = done.stored_bytes,
            freed = done.freed_bytes,
            damaged = done.damaged.len(),
            "packed"
        );
        *last = ids;
        Ok(())
    }

    pub(super) fn prune(&self, rules: &Rules, dry_run: bool) -> Result<Answer, Failure> {
        rules.check().map_err(|e| Failure {
            code: 2,
            message: e.to_string(),
        })?;
        // Held until it is done, so that nothing is mounted meanwhile.
        let mounts = crate::mount::lock(&self.mounts);
        let mounted: BTreeSet<u64> = mounts.values().filter_map(|m| m.checkpoint).collect();
        let mut plan = prune::plan(&self.store.catalog()?, rules, &mounted, now_us());
        if dry_run {
            return Ok(Answer::Pruned { plan, dry_run });
        }
        let mut last = None;
        for v in plan.iter_mut().filter(|v| !v.is_kept()) {
            let id = v.id;
            let gone = self.store.change(
                // It may have been pinned or rolled back to since the plan was made.
                |c| match prune::held(c, id) {
                    Some(why) => Err(StoreError::Refused(why)),
                    None => Ok((CatalogOp::Delete { id }, ())),
                },
                |(), _| (),
            );
            match gone {
                Ok(((), seq)) => last = Some(seq),
                Err(StoreError::Refused(why)) => v.reasons.push(why),
                // Somebody else was faster.
                Err(StoreError::NotFound(_)) => {}
                Err(e) => return Err(e.into()),
            }
        }
        drop(mounts);
        if let Some(seq) = last {
            self.store.flush(seq)?;
            self.store.want_gc();
        }
        Ok(Answer::Pruned { plan, dry_run })
    }
}

/// Drops what receives have left that were cut off and never gone on with.
pub(super) fn drop_stale(store: &Store) -> Result<(), StoreError> {
    let before = now_us().saturating_sub(RECEIVE_KEPT_US);
    let catalog = store.catalog()?;
    let hidden = catalog.hidden.iter();
    for (name, _) in hidden.filter(|(n, h)| transfer::is_receive(n) && h.created_us < before) {
        let name = name.clone();
        tracing::info!(name, "a receive that was not gone on with is dropped");
        store.change(|_| Ok((CatalogOp::Unhide { name }, ())), |(), _| ())?;
        store.want_gc();
    }
    Ok(())
}

/// What to send.
pub(super) struct ToSend<'a> {
    pub head: Option<&'a str>,
    pub checkpoint: &'a str,
    pub base: Option<&'a str>,
    pub resume: Option<&'a str>,
    pub level: i32,
}

fn open(path: &Path, write: bool) -> Result<std::fs::File, Failure> {
    std::fs::File::options()
        .read(!write)
        .write(write)
        .open(path)
        .map_err(|e| Failure::new(format!("the pipe of the command: {e}")))
}

impl Service {
    pub(super) fn send(
        &self,
        what: &ToSend<'_>,
        pipe: &Path,
        have: Option<&Path>,
    ) -> Result<Answer, Failure> {
        let start = Instant::now();
        let catalog = self.store.catalog()?;
        let c = names::resolve(&catalog, what.head, what.checkpoint)?;
        let base = match what.base {
            Some(b) => Some(names::resolve(&catalog, what.head, b)?.id),
            None => None,
        };
        if base == Some(c.id) {
            return Err(Failure::new("a checkpoint does not differ from itself"));
        }
        let resume = match what.resume {
            Some(t) => Some(transfer::parse_token(t).ok_or_else(|| {
                Failure::new(format!(
                    "{t:?} is no token; take the one that 'cowfs receive' printed"
                ))
            })?),
            None => None,
        };
        let mut options = SendOptions {
            checkpoint: c.id,
            base,
            resume,
            level: what.level,
            have: HashSet::new(),
        };
        if let Some(have) = have {
            let mut from = BufReader::new(open(have, false)?);
            let mut name = [0; 32];
            while from.read_exact(&mut name).is_ok() {
                options.have.insert(name);
            }
        }
        let name = c.name.clone();
        drop(catalog);
        let mut to = BufWriter::with_capacity(256 << 10, open(pipe, true)?);
        let sent = transfer::send(&self.store, options, &mut to)?;
        to.flush()
            .map_err(|e| Failure::new(format!("the pipe of the command: {e}")))?;
        Ok(Answer::Sent {
            name,
            chunks: sent.chunks,
            chunk_bytes: sent.chunk_bytes,
            stream_bytes: sent.stream_bytes,
            elapsed_us: micros(start),
        })
    }

    pub(super) fn receive(&self, name: Option<&str>, pipe: &Path) -> Result<Answer, Failure> {
        let start = Instant::now();
        let from = BufReader::with_capacity(256 << 10, open(pipe, false)?);
        // Two of one checkpoint would grow in the same place.
        let _one = crate::mount::lock(&self.receiving);
        let r = transfer::receive(&self.store, from, name)?;
        Ok(Answer::Received {
            name: r.name,
            id: r.id,
            new_chunks: r.new_chunks,
            new_bytes: r.new_bytes,
            elapsed_us: micros(start),
        })
    }

    pub(super) fn chunks(&self, pipe: &Path) -> Result<Answer, Failure> {
        let mut to = BufWriter::new(open(pipe, true)?);
        let mut failed = None;
        self.store.each_chunk(&mut |name| {
            if failed.is_none() {
                failed = to.write_all(name).err();
            }
        })?;
        match failed.or_else(|| to.flush().err()) {
            Some(e) => Err(Failure::new(format!("the pipe of the command: {e}"))),
            None => Ok(Answer::Done),
        }
    }
}

impl From<TransferError> for Failure {
    fn from(e: TransferError) -> Self {
        match e {
            TransferError::Store(e) => e.into(),
            e => match std::error::Error::source(&e) {
                Some(s) => Failure::new(format!("{e}: {s}")),
                None => Failure::new(e.to_string()),
            },
        }
    }
}
