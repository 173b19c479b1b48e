//! Repairs trees of which pages are damaged, with the help of another store or a store of objects that has the same
//! checkpoint.
//!
//! A page never changes once a commit has it, so what it held is the same for all trees that share it: of any one checkpoint
//! among them, got anew, the records between the page's bounds make a page that is right for all. It is written where the
//! damaged one is. What becomes of this at a crash is drawn in `docs/history.md`, section 8.

mod contents;
mod pages;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::{BufReader, BufWriter, Write};
use std::sync::Arc;

use super::base::QuietKv;
use super::receive::{Twin, here, receive_part};
use super::remote::Remote;
use super::send::{SendOptions, TransferError, send_some, source_of};
use super::stream::StreamError;
use crate::errors::in_full;
use crate::fault;
use crate::fs;
use crate::store::packs::records::Name;
use crate::store::packs::{HEAD, Keep, PackOptions, unwrap_fs};
use crate::store::pages::PageMap;
use crate::store::{Checkpoint, LostPage, Source, Store, StoreError, repair};
use crate::tree::PageId;
use contents::name_contents;
use pages::make_page;

/// First characters of the hidden heads of a repair.
const PREFIX: &str = "@repair-";
/// The hidden head that a checkpoint is got into.
const HIDDEN: &str = "@repair-tree";
/// Some inodes.
#[derive(Debug, Clone)]
pub(super) struct Inodes(Vec<(u64, u64)>);

impl Inodes {
    /// Those of these ranges, ends included.
    fn new(mut all: Vec<(u64, u64)>) -> Self {
        all.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for r in all {
            match joined.last_mut() {
                Some(last) if r.0 <= last.1 => last.1 = last.1.max(r.1),
                _ => joined.push(r),
            }
        }
        Self(joined)
    }

    pub fn has(&self, ino: u64) -> bool {
        let i = self.0.partition_point(|r| r.1 < ino);
        self.0.get(i).is_some_and(|r| r.0 <= ino)
    }
}

/// Who may have what is damaged here.
#[derive(Debug)]
pub enum Elsewhere {
    /// Another store.
    Store(Arc<Store>),
    /// A store of objects.
    Objects(Box<Remote>),
}

impl Elsewhere {
    /// A chunk by its name.
    ///
    /// # Errors
    /// Theirs.
    pub fn chunk(&self, name: &Name) -> Result<Option<Vec<u8>>, TransferError> {
        Ok(match self {
            Self::Store(s) => s.chunk_anywhere(name)?,
            Self::Objects(r) => r.chunk(name)?,
        })
    }

    /// How they call a checkpoint, if they have it.
    fn find(&self, source: &Source) -> Result<Option<Found>, TransferError> {
        Ok(match self {
            Self::Store(s) => here(s, &s.catalog()?, source).map(|c| Found::Number(c.id)),
            Self::Objects(r) => r.find(source)?.map(Found::Object),
        })
    }

    /// Sends some inodes of a checkpoint.
    fn send(
        &self,
        what: &Found,
        only: &Inodes,
        have: HashSet<Name>,
        to: impl Write,
    ) -> Result<(), TransferError> {
        match (self, what) {
            (Self::Store(s), Found::Number(id)) => {
                let options = SendOptions {
                    checkpoint: *id,
                    base: None,
                    resume: None,
                    level: 1,
                    have,
                };
                send_some(s, options, Some(only), to).map(drop)
            }
            (Self::Objects(r), Found::Object(key)) => Ok(r.pass_on(key, Some(only), have, to)?),
            _ => Ok(()),
        }
    }
}

enum Found {
    Number(u64),
    Object(String),
}

/// What a repair of trees did.
#[derive(Debug, Clone, Default)]
pub struct Mended {
    /// Damaged pages that are right again.
    pub pages: u64,
    /// The index of packed contents was made anew.
    pub index: bool,
    /// Bytes of segments of which nobody could say what they were, and of which another store could.
    pub unknown_bytes: u64,
    #[allow(missing_docs, reason = "as above")]
    pub named_bytes: u64,
    /// What could not be done, and why.
    pub refused: Vec<String>,
}

/// True if a tree has damaged pages, or contents of which nobody knows what they were.
///
/// # Errors
/// When the store has stopped.
pub fn is_needed(store: &Store) -> Result<bool, StoreError> {
    if !store.lost_pages()?.is_empty() {
        return Ok(true);
    }
    let unknown = store.unknown()?;
    if unknown.is_empty() {
        return Ok(false);
    }
    // What no tree has goes with the next collection.
    let catalog = store.catalog()?;
    let heads = catalog.heads.values().map(|h| h.root);
    for root in heads.chain(catalog.checkpoints.values().map(|c| c.root)) {
        if !store.mapped_in(root, &unknown)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Puts damaged pages of all trees right, as far as can be. Whatever is replaced is given to `keep` before.
///
/// # Errors
/// What the host says; what was put right by then stays so.
pub fn repair(
    store: &Store,
    from: Option<&Elsewhere>,
    keep: &mut Keep<'_>,
) -> Result<Mended, TransferError> {
    let mut done = Mended::default();
    forget_all(store)?;
    let repaired = repair_all(store, from, keep, &mut done);
    // Also after an error: what was got is of use to nobody.
    forget_all(store)?;
    store.sync()?;
    repaired.map(|()| done)
}

/// Removes the hidden heads of repairs.
fn forget_all(store: &Store) -> Result<(), StoreError> {
    for name in store.catalog()?.hidden.keys() {
        if name.starts_with(PREFIX) {
            store.unhide(name)?;
        }
    }
    Ok(())
}

fn repair_all(
    store: &Store,
    from: Option<&Elsewhere>,
    keep: &mut Keep<'_>,
    done: &mut Mended,
) -> Result<(), TransferError> {
    hidden_trees(store, keep, done)?;
    let Some(from) = from else {
        if !store.lost_pages()?.is_empty() || !store.unknown()?.is_empty() {
            let what = "what only another store has was not looked for: say where with --from";
            done.refused.push(what.into());
        }
        return Ok(());
    };
    // By number: a difference needs the checkpoint before it.
    let mut failed: BTreeMap<u64, String> = BTreeMap::new();
    loop {
        let lost = store.lost_pages()?;
        let ids: BTreeSet<u64> = lost.iter().flat_map(|l| &l.checkpoints).copied().collect();
        let Some(id) = ids.iter().find(|id| !failed.contains_key(id)) else {
            for l in lost.iter().filter(|l| l.checkpoints.is_empty()) {
                let trees = l.trees.join(", ");
                done.refused.push(format!(
                    "{trees}: page {} is in no checkpoint, so nobody else can have it",
                    l.lost.page
                ));
            }
            break;
        };
        let Some(c) = store.catalog()?.checkpoints.get(id).cloned() else {
            break;
        };
        let mine: Vec<&LostPage> = lost.iter().filter(|l| l.checkpoints.contains(id)).collect();
        match mend(store, from, &c, &mine, keep) {
            Ok(()) => {
                done.pages += mine.len() as u64;
                // What they were the base of may be got now.
                failed.clear();
            }
            Err(e @ TransferError::Store(StoreError::NoSpace)) => return Err(e),
            Err(e) => drop(failed.insert(*id, format!("checkpoint {}: {}", c.name, in_full(&e)))),
        }
    }
    done.refused.extend(failed.into_values());
    name_contents(store, from, done)
}

/// The index is made anew; what was received in part is given up, as it is sent again.
fn hidden_trees(
    store: &Store,
    keep: &mut Keep<'_>,
    done: &mut Mended,
) -> Result<(), TransferError> {
    let lost = store.lost_pages()?;
    let catalog = store.catalog()?;
    for name in catalog.hidden.keys() {
        let tree = repair::hidden_tree(name);
        let mut any = false;
        for l in lost.iter().filter(|l| l.trees.contains(&tree)) {
            store.keep_page(l.lost.page, keep)?;
            any = true;
        }
        if any && name == HEAD {
            done.unknown_bytes = store.rebuild_index()?;
            done.index = true;
        } else if any {
            store.unhide(name)?;
        }
    }
    Ok(())
}

/// Gets some inodes of a checkpoint that is here into the hidden head; returns its root.
fn bring(
    store: &Store,
    from: &Elsewhere,
    c: &Checkpoint,
    only: &Inodes,
) -> Result<PageId, TransferError> {
    let source = source_of(store, c);
    let Some(found) = from.find(&source)? else {
        let what = format!(
            "it is not there (it was taken as number {} of store {})",
            source.id, source.store
        );
        return Err(StoreError::NotFound(what).into());
    };
    // What is in a segment may be damaged, which is found out only when it is needed: then all of it is sent.
    let twins = store.unpacked_chunks()?;
    if let Err(e) = bring_once(store, from, (&source, &found), only, twins.clone()) {
        if twins.is_empty() || matches!(e, TransferError::Store(StoreError::NoSpace)) {
            return Err(e);
        }
        let all = bring_once(store, from, (&source, &found), only, HashMap::new());
        // If it is not for the twins the first reason is the one.
        all.map_err(|_| e)?;
    }
    fault::point("repair:got");
    let root = store.catalog()?.any_head(HIDDEN).map(|h| h.root);
    root.ok_or_else(|| StoreError::NotFound("what was got is gone".into()).into())
}

fn bring_once(
    store: &Store,
    from: &Elsewhere,
    (source, found): (&Source, &Found),
    only: &Inodes,
    twins: HashMap<Name, Twin>,
) -> Result<(), TransferError> {
    let mut have: HashSet<Name> = twins.keys().copied().collect();
    store.each_chunk(&mut |name| {
        have.insert(*name);
    })?;
    let pipe = std::io::pipe().map_err(|source| StreamError::Io {
        doing: "making a pipe",
        source,
    });
    let (reader, writer) = pipe?;
    std::thread::scope(|s| {
        let sender = s.spawn(move || {
            let mut to = BufWriter::with_capacity(256 << 10, writer);
            from.send(found, only, have, &mut to)?;
            to.flush().map_err(|source| {
                TransferError::from(StreamError::Io {
                    doing: "writing",
                    source,
                })
            })
        });
        let got = receive_part(store, BufReader::new(reader), source, HIDDEN, twins);
        let sent = sender
            .join()
            .unwrap_or_else(|_| Err(StoreError::Refused("an internal error".into()).into()));
        match (sent, got) {
            // The end that failed first is the one that says why.
            (Err(e), Err(m)) => Err(if in_full(&e).contains("Broken pipe") {
                m
            } else {
                e
            }),
            (Err(e), Ok(())) | (Ok(()), Err(e)) => Err(e),
            (Ok(()), Ok(())) => Ok(()),
        }
    })
}

/// Puts the damaged pages of a checkpoint right: all of them, or none.
fn mend(
    store: &Store,
    from: &Elsewhere,
    c: &Checkpoint,
    lost: &[&LostPage],
    keep: &mut Keep<'_>,
) -> Result<(), TransferError> {
    let only = Inodes::new(lost.iter().map(|l| repair::inodes_of(&l.lost)).collect());
    let root = bring(store, from, c, &only)?;
    // Collections are held off until the new pages are what trees need.
    store.with_writer(PackOptions::LEVEL, |w| {
        let mut pages = PageMap::default();
        for l in lost {
            let page = make_page(store, w, root, l)?;
            pages.insert(l.lost.page, Arc::new(page));
        }
        w.finish()?;
        let mut tree = QuietKv::with(store, c.root, &pages);
        let checked = fs::check::check(&mut tree, c.next_ino, &mut |e| store.has_bytes(e));
        if let Some(p) = checked.map_err(unwrap_fs)?.problems.first() {
            return Err(StoreError::Refused(format!(
                "with what is there its tree would contradict itself: {p}"
            )));
        }
        store.commit()?;
        fault::point("repair:made");
        for l in lost {
            store.keep_page(l.lost.page, keep)?;
        }
        store.replace_pages(&pages)?;
        fault::point("repair:done");
        Ok(())
    })?;
    Ok(store.unhide(HIDDEN)?)
}
