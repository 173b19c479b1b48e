//! What changes the catalog: checkpoints, rollbacks, names, deletion.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{Service, head_of, micros};
use crate::control::{Answer, Failure, HeadInfo, Listing, Shown};
use crate::mount::Undo;
use crate::names;
use crate::store::{Catalog, CatalogOp, Row, StoreError, now_us};

pub(super) fn free_name(c: &Catalog, name: &str) -> Result<(), StoreError> {
    if c.is_taken(name) {
        return Err(StoreError::Exists(format!("the name {name} is taken")));
    }
    Ok(())
}

impl Service {
    /// A catalog change that is durable when it returns.
    pub(super) fn catalog_op(
        &self,
        make: impl FnOnce(&Catalog) -> Result<CatalogOp, StoreError>,
    ) -> Result<Answer, Failure> {
        let ((), seq) = self.store.change(|c| Ok((make(c)?, ())), |(), _| ())?;
        self.store.flush(seq)?;
        Ok(Answer::Done)
    }

    pub(super) fn checkpoint(
        &self,
        head: String,
        name: Option<String>,
        tags: BTreeMap<String, String>,
        wait: bool,
    ) -> Result<Answer, Failure> {
        let start = Instant::now();
        if let Some(n) = &name {
            names::check(n)?;
        }
        if let Some(m) = self.mounted(&head) {
            m.sync_kernel()
                .map_err(|e| Failure::new(format!("bringing mapped pages back failed: {e}")))?;
        }
        let ((id, name), seq) = self.store.change(
            |c| {
                let now = now_us();
                let name = match name {
                    Some(n) => n,
                    None => names::automatic(c, "", now),
                };
                free_name(c, &name)?;
                if !c.heads.contains_key(&head) {
                    return Err(StoreError::NotFound(format!("there is no head {head}")));
                }
                let op = CatalogOp::Checkpoint {
                    head: head.clone(),
                    id: c.next_checkpoint,
                    name: name.clone(),
                    tags,
                    created_us: now,
                };
                Ok((op, (c.next_checkpoint, name)))
            },
            |_, _| (),
        )?;
        let elapsed_us = micros(start);
        if wait {
            self.store.flush(seq)?;
        }
        Ok(Answer::Checkpoint {
            id,
            name,
            head,
            elapsed_us,
            durable: wait,
        })
    }

    pub(super) fn rollback(
        &self,
        head: String,
        checkpoint: &str,
        discard: bool,
        dry_run: bool,
        keep_as: Option<String>,
    ) -> Result<Answer, Failure> {
        let start = Instant::now();
        let catalog = self.store.catalog()?;
        if !catalog.heads.contains_key(&head) {
            return Err(Failure::new(format!("there is no head {head}")));
        }
        let target = names::resolve(&catalog, Some(&head), checkpoint)?;
        if let Some(k) = &keep_as {
            names::check(k)?;
            free_name(&catalog, k)?;
        }
        let undo = match (discard, keep_as) {
            (true, _) => Undo::Discard,
            (false, Some(k)) => Undo::Keep(k),
            (false, None) => Undo::Keep(names::automatic(&catalog, "left-", now_us())),
        };
        let left_behind = match &undo {
            Undo::Keep(n) => Some(n.clone()),
            Undo::Discard => None,
        };
        if dry_run {
            let mut steps = vec![format!(
                "head {head} goes back to checkpoint {} of {}",
                target.name,
                names::timestamp(target.created_us)
            )];
            steps.push(match &left_behind {
                Some(_) => "its present state stays as a checkpoint named left-<time>".into(),
                None => "its present state is discarded".into(),
            });
            return Ok(Answer::Plan { steps });
        }
        let id = target.id;
        // Held until it is done, so that an unmounted head is not mounted meanwhile.
        let mounts = crate::mount::lock(&self.mounts);
        let (seq, elapsed_us) = if let Some(m) = head_of(&mounts, &head) {
            drop(mounts);
            let done = m.rollback(id, &undo, start)?;
            (done.seq, done.elapsed_us)
        } else {
            let ((), seq) = self.store.change(
                |c| {
                    let left = left_behind.clone().map(|n| (c.next_checkpoint, n));
                    let op = CatalogOp::Rollback {
                        head: head.clone(),
                        to: id,
                        left,
                        created_us: now_us(),
                    };
                    Ok((op, ()))
                },
                |(), _| (),
            )?;
            drop(mounts);
            (seq, micros(start))
        };
        self.store.flush(seq)?;
        if discard {
            self.store.want_gc();
        }
        Ok(Answer::Rollback {
            name: target.name.clone(),
            head,
            left_behind,
            elapsed_us,
        })
    }

    /// A list but for its rows, and the catalog that has these.
    fn listing(&self) -> Result<(Listing, Catalog), Failure> {
        let mounts = crate::mount::lock(&self.mounts);
        let c = self.store.catalog()?;
        let heads = c
            .heads
            .iter()
            .map(|(name, h)| HeadInfo {
                name: name.clone(),
                parent: h
                    .parent
                    .and_then(|id| c.checkpoints.get(&id))
                    .map(|k| k.name.clone()),
                created_us: h.created_us,
                mounted_at: head_of(&mounts, name).map(|m| m.mountpoint().to_path_buf()),
            })
            .collect();
        let shown = mounts
            .iter()
            .filter_map(|(at, m)| {
                Some(Shown {
                    id: m.checkpoint?,
                    at: at.clone(),
                })
            })
            .collect();
        let listing = Listing {
            heads,
            shown,
            rows: Vec::new(),
        };
        Ok((listing, c))
    }

    pub(super) fn list(&self) -> Result<Answer, Failure> {
        let (mut listing, catalog) = self.listing()?;
        listing.rows = catalog.checkpoints.values().map(Row::from).collect();
        Ok(Answer::List(listing))
    }

    /// The JSON of [`Service::list`], with the text that the catalog has of its rows: to make it anew for each of a
    /// thousand would cost more than all else.
    pub(super) fn list_line(&self) -> Result<Vec<u8>, Failure> {
        let (listing, catalog) = self.listing()?;
        let mut line = serde_json::to_vec(&Answer::List(listing))
            .map_err(|e| Failure::new(format!("the list: {e}")))?;
        // The rows are last, and none.
        const END: &[u8] = b"]}";
        line.truncate(line.len() - END.len());
        for (i, text) in catalog.checkpoints.rows().enumerate() {
            if i > 0 {
                line.push(b',');
            }
            line.extend_from_slice(text.as_bytes());
        }
        line.extend_from_slice(END);
        Ok(line)
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<Answer, Failure> {
        names::check(to)?;
        self.op_on_unmounted(|c| {
            free_name(c, to)?;
            if c.heads.contains_key(from) {
                return Ok(CatalogOp::RenameHead {
                    head: from.to_owned(),
                    name: to.to_owned(),
                });
            }
            Ok(CatalogOp::Rename {
                id: names::resolve(c, None, from)?.id,
                name: to.to_owned(),
            })
        })
    }

    pub(super) fn delete(&self, name: &str) -> Result<Answer, Failure> {
        let answer = self.op_on_unmounted(|c| {
            if c.heads.contains_key(name) {
                if c.heads.len() == 1 {
                    return Err(StoreError::Refused(
                        "the last head cannot be deleted".into(),
                    ));
                }
                return Ok(CatalogOp::DeleteHead {
                    head: name.to_owned(),
                });
            }
            // Only a full name: a beginning could come to mean another one.
            let k = c.checkpoint_named(name).ok_or_else(|| {
                StoreError::NotFound(format!("there is no checkpoint or head {name}"))
            })?;
            if k.pinned {
                return Err(StoreError::Refused(format!(
                    "checkpoint {name} is pinned; 'cowfs unpin' it first"
                )));
            }
            Ok(CatalogOp::Delete { id: k.id })
        })?;
        self.store.want_gc();
        Ok(answer)
    }

    /// A change of the catalog that is refused if a mounted head would get another name, or something mounted would go.
    /// Nothing is mounted while it is decided and done.
    fn op_on_unmounted(
        &self,
        make: impl FnOnce(&Catalog) -> Result<CatalogOp, StoreError>,
    ) -> Result<Answer, Failure> {
        let mounts = crate::mount::lock(&self.mounts);
        let ((), seq) = self.store.change(
            |c| {
                let op = make(c)?;
                let what = match &op {
                    CatalogOp::RenameHead { head, .. } | CatalogOp::DeleteHead { head } => {
                        head_of(&mounts, head).map(|_| format!("head {head}"))
                    }
                    // By number: its name may have changed since it was mounted.
                    CatalogOp::Delete { id } => mounts
                        .values()
                        .any(|m| m.checkpoint == Some(*id))
                        .then(|| c.checkpoints.get(id))
                        .flatten()
                        .map(|k| format!("checkpoint {}", k.name)),
                    _ => None,
                };
                match what {
                    Some(w) => Err(StoreError::Refused(format!(
                        "{w} is mounted; unmount it first"
                    ))),
                    None => Ok((op, ())),
                }
            },
            |(), _| (),
        )?;
        drop(mounts);
        self.store.flush(seq)?;
        Ok(Answer::Done)
    }
}
